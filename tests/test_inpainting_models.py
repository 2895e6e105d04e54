"""U-Nets that read a mask and a masked image, through sample.py, against diffusers."""

import json
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import CPU
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from diffusion import UserError
from diffusion.config import Config
from diffusion.files import sd_files as loader
from diffusion.runtime.seeding import ImageNoise
from diffusion.sampling.load import open_pipeline, open_stack

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (tests/requirements.txt)")
pytest.importorskip("transformers", reason="needs transformers (tests/requirements.txt)")
from diffusers_models import make_pipeline  # noqa: E402

PROMPT = "a red fox"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(diffusers' pipeline, its folder) with a U-Net of nine channels."""
    folder = tmp_path_factory.mktemp("inpainting")
    pipeline, _ = make_pipeline(folder, "small")
    torch.manual_seed(1)
    sizes = {k: v for k, v in pipeline.unet.config.items() if not k.startswith("_")}
    unet = diffusers.UNet2DConditionModel(**sizes | {"in_channels": 9})
    unet.save_pretrained(folder / "unet")
    parts = {**pipeline.components, "unet": unet}
    parts["scheduler"] = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    inpaint = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    inpaint.set_progress_bar_config(disable=True)
    return inpaint, folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A picture and a mask with grey edges, each of the model's size."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "image.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[5:21, 9:28] = 255
    mask[5:21, 8] = 140
    mask[4, 9:28] = 100
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "image.png", folder / "mask.png"


@pytest.fixture
def sample(monkeypatch, tmp_path):
    """Run sample.py: (count, H, W, 3) in levels of 255."""

    def run(folder, *args, count=2):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        given = ["--sd_path", folder, "--save_folder", out, "--prompt", PROMPT, "--device", "cpu",
                 "--num_images", count, "--sampler", "ddim", "--steps", 5, "--amp", "no", *args]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, given)])
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
        files = sorted((out / "images").glob("*.png"))
        return np.stack([np.asarray(Image.open(file)).astype(int) for file in files])

    return run


def expected(theirs, pictures, monkeypatch, guidance, strength, count=2):
    """diffusers' pictures from the noise of seed 0, with the mean of the VAE's distribution."""
    pipeline, _ = theirs
    eps = ImageNoise(0, range(count), (4, 16, 16))()
    module = sys.modules[type(pipeline).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: eps)
    kind = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(kind, "sample", lambda self, generator=None: self.mode())
    image, mask = map(Image.open, pictures)
    made = pipeline(
        [PROMPT] * count, image=image, mask_image=mask, height=32, width=32, strength=strength,
        num_inference_steps=5, guidance_scale=guidance, output_type="np",
    )  # fmt: skip
    return made.images * 255


@pytest.mark.parametrize(
    "guidance, strength, more",
    [
        (4.0, None, ("--batch_size", 1)),
        (4.0, 0.6, ("--sequential_guidance",)),
        pytest.param(1.0, 1.0, (), marks=pytest.mark.slow),
        pytest.param(4.0, 0.6, (), marks=pytest.mark.slow),
    ],
)
def test_sample_paints_as_diffusers_does(theirs, pictures, sample, monkeypatch, guidance, strength, more):  # fmt: skip
    own = () if strength is None else ("--strength", strength)
    image, mask = pictures
    found = sample(theirs[1], "--init_image", image, "--mask", mask, "--guidance_scale", guidance,
                   *own, *more)  # fmt: skip
    want = expected(theirs, pictures, monkeypatch, guidance, strength or 1.0)
    assert abs(found - want).max() < 1.01  # the rounding to a byte
    assert want.std() > 5


def test_the_latents_are_diffusers(theirs, pictures, monkeypatch):
    from diffusion.sampling.init_image import read_init_image

    ours = open_pipeline(None, str(theirs[1]), None, CPU, amp="no")
    start = read_init_image(ours, *map(str, pictures))
    start = {name: value.expand(2, -1, -1, -1) for name, value in start.items()}
    found = ours.sample(range(2), sampler="ddim", steps=5, prompts=[PROMPT] * 2, guidance_scale=4.0, amp="no", **start)  # fmt: skip
    want = torch.from_numpy(expected(theirs, pictures, monkeypatch, 4.0, 1.0)) / 127.5 - 1
    assert_close(found.clamp(-1, 1).permute(0, 2, 3, 1), want.float(), rtol=0, atol=1e-4)


def test_single_file_and_folder_keep_nine_channels(theirs, pictures, sample, tmp_path):
    _, folder = theirs
    sd = loader.load_sd(folder)
    loader.save_sd_file(sd, tmp_path / "a.safetensors")
    loader.save_sd_folder(sd, tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
    args = ("--init_image", pictures[0], "--mask", pictures[1])
    first = sample(folder, *args, count=1)
    assert (first == sample(tmp_path / "again", *args, count=1)).all()
    single = sample(tmp_path / "a.safetensors", "--config", folder, *args, count=1)
    assert (first == single).all()
    about = tmp_path / "again" / "unet" / "config.json"  # the sizes of an ordinary model
    about.write_text(json.dumps(json.loads(about.read_text()) | {"in_channels": 4}))
    single = sample(tmp_path / "a.safetensors", "--config", tmp_path / "again", *args, count=1)
    assert (first == single).all()
    tiled = sample(folder, *args, "--vae_tiling", count=1)
    assert abs(first - tiled).max() <= 2  # one tile is the whole


def test_what_it_needs_is_said(theirs, pictures, sample):
    for args in ((), ("--init_image", pictures[0])):
        with pytest.raises(SystemExit, match="^error: .*--init_image.*--mask"):
            sample(theirs[1], *args)
    with pytest.raises(UserError, match="--mask"):
        open_pipeline(None, str(theirs[1]), None, CPU).sample([0], prompts=["a"])


def test_training_refuses_it_by_name(theirs):
    options = dict(mode="latent", sd_path=str(theirs[1]), condition="text", objective="eps")
    for adapter in ("none", "lora"):
        with pytest.raises(UserError, match="9 channels in.*inpainting"):
            open_stack(Config(**options, adapter=adapter), CPU)


@pytest.mark.parametrize("channels, name", [(5, "depth"), (7, "upscaling"), (8, "pix2pix"), (6, "6 channels")])  # fmt: skip
def test_other_channels_are_named(theirs, sample, tmp_path, channels, name):
    shutil.copytree(theirs[1], tmp_path / "sd")
    file = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :channels].contiguous()
    save_file(tensors, file)
    about = tmp_path / "sd" / "unet" / "config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"in_channels": channels}))
    with pytest.raises(SystemExit, match=f"^error: .*{name}"):
        sample(tmp_path / "sd")


def test_a_lora_on_it(theirs, pictures, sample, tmp_path):
    """Of the attention layers, as kohya names them; at weight 0 nothing changes."""
    down, up = (torch.randn(s, generator=torch.Generator().manual_seed(0)) for s in ((2, 32), (32, 2)))  # fmt: skip
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "l.safetensors")  # fmt: skip
    args = ("--init_image", pictures[0], "--mask", pictures[1])
    plain, none, much = (
        sample(theirs[1], *args, *lora, count=1)
        for lora in (
            (),
            ("--lora", f"{tmp_path}/l.safetensors:0"),
            ("--lora", f"{tmp_path}/l.safetensors:3"),
        )  # fmt: skip
    )
    assert (plain == none).all() and abs(plain - much).max() > 2
