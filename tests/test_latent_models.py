"""What a latent model is told, what it remembers, and which options it has a use for."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapter_training import INVERSION, LORA, on_scratch, on_sd, scratch  # noqa: F401
from test_latent import CPU, UNREAD, latent, options_of, plain, sd_folder, vae  # noqa: F401
from test_training import tiny  # noqa: F401
from torch.testing import assert_close

from diffusion import UserError
from diffusion.config import PRESETS, Config, config_from_args
from diffusion.data import toy
from diffusion.files import checkpoint
from diffusion.files import sd_export as export
from diffusion.files import sd_files as loader
from diffusion.files.validate import digest_tensors
from diffusion.models.clip import CLIPTextModel
from diffusion.models.sd_blocks import Attention
from diffusion.models.sd_unet import SDUNet
from diffusion.models.tokenizer import byte_level
from diffusion.sampling.load import load_vae, open_parts, open_pipeline
from diffusion.sampling.sizes import text_config, unet_config, vae_config
from diffusion.training.autoencoder import KLAutoencoder
from diffusion.training.dry_run import forward_cost
from diffusion.training.finetune_config import based_on
from diffusion.training.latent_task import LatentDiffusion
from diffusion.training.recipe import Diffusion
from diffusion.training.trainer import train

# --- labels ---------------------------------------------------------------------------------------


def test_classes_are_learnt_and_drawn(latent, tmp_path):  # noqa: F811
    options = (
        latent
        | UNREAD
        | dict(condition="class", learning_rate=1e-2, train_steps=20, condition_dropout=0.5)
    )
    task = LatentDiffusion(Config(**options), CPU)
    network = task.build()
    for p in network.parameters():  # a new network's output is zero
        torch.nn.init.normal_(p, std=0.05)
    batch, drawn = task.data(0, 0, 8), task.draw(0)
    task.loss(network, batch, drawn, 0, 8).mean().backward()
    moved = network.class_embedding.weight.grad.abs().amax(1) > 0
    told = batch.labels.masked_fill(drawn[2], 3).unique()
    assert moved.nonzero().flatten().tolist() == told.tolist() and len(told) > 1
    train(Config(**options))
    pipeline = open_pipeline(str(tmp_path / "run" / "model.pt"), None, "raw", CPU)
    eps = torch.randn(1, *pipeline.shape)
    draw = lambda label, scale=2.0: pipeline.sample([0], steps=4, eps=eps, amp="no", guidance_scale=scale,  # noqa: E731
                                                    labels=torch.tensor([label]))  # fmt: skip
    assert (draw(0) - draw(1)).abs().max() > 1e-3
    assert (draw(0) - draw(0, 1.0)).abs().max() > 1e-3


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["none", "class", "text"])
def test_heads_have_about_32_channels(latent, vae, condition):  # noqa: F811
    config = Config(**latent | dict(condition=condition, unet_dim=64, dim_mults=(1, 2, 4)))
    network = SDUNet(unet_config(config, load_vae(str(vae)), 3))
    found = [
        (m.heads, m.to_q.weight.shape[0]) for m in network.modules() if isinstance(m, Attention)
    ]
    assert {dim for _, dim in found} == {128, 256}
    assert all(dim == 32 * heads for heads, dim in found)


def test_odd_widths(latent, vae):  # noqa: F811
    for condition in ("none", "text"):
        config = Config(
            **latent | dict(condition=condition, unet_dim=50, dim_mults=(1, 2), text_dim=100)
        )
        SDUNet(unet_config(config, load_vae(str(vae)), 0))
    CLIPTextModel(text_config(config, byte_level(64)))
    for dim in (66, 70, 130):
        network = KLAutoencoder(vae_config(Config(mode="vae", unet_dim=dim, dim_mults=(1, 2))))
        x = torch.zeros(1, 3, 8, 8)
        assert network(x, torch.zeros(1, 4, 4, 4))[0].shape == x.shape


# --- what is not in the checkpoint ------------------------------------------------------------------


def shift(path) -> None:
    """Other weights under the same path."""
    tensors = load_file(path)
    with torch.no_grad():
        tensors = {k: v + 0.01 for k, v in tensors.items()}
    with safe_open(path, "pt") as file:
        about = file.metadata()
    if "sha256" in about:
        about["sha256"] = digest_tensors(tensors)
    save_file(tensors, path, metadata=about)


@pytest.mark.slow
def test_another_vae_under_the_same_path(latent, vae, tmp_path, capfd):  # noqa: F811
    shutil.copytree(vae, tmp_path / "vae")
    options = latent | dict(vae=str(tmp_path / "vae"), train_steps=4, text_length=128)
    train(Config(**options))
    run, moved = tmp_path / "run" / "model.pt", tmp_path / "moved"
    weights = checkpoint.load_weights(tmp_path / "run" / "ema.safetensors")[2]
    assert weights["frozen"] == checkpoint.load_weights(run)[2]["frozen"]
    (tmp_path / "vae").rename(moved)
    options |= dict(vae=str(moved))
    train(Config(**options | dict(train_steps=6)))  # the same one elsewhere
    capfd.readouterr()
    open_pipeline(str(run), None, "ema", CPU)
    assert "warning" not in capfd.readouterr().out
    shift(moved / "ema.safetensors")
    open_pipeline(str(run), None, "ema", CPU)
    assert "was trained with another VAE than is there now" in capfd.readouterr().out
    open_pipeline(str(run), None, "ema", CPU, vae=str(moved))
    assert "warning" not in capfd.readouterr().out
    with pytest.raises(UserError, match="trained with another VAE than there is now"):
        train(Config(**options | dict(train_steps=8)))
    state = checkpoint.read(run)
    old = {k: v for k, v in state.items() if k != "frozen"}  # of before digests were kept
    (tmp_path / "old").mkdir()
    checkpoint.save(tmp_path / "old", old, 1)
    open_pipeline(str(tmp_path / "old" / "model.pt"), None, "ema", CPU)
    assert "warning" not in capfd.readouterr().out


@pytest.mark.slow
def test_another_text_encoder_under_the_same_path(latent, sd_folder, tmp_path, capfd):  # noqa: F811
    folder = tmp_path / "sd"
    shutil.copytree(sd_folder, folder)
    options = latent | options_of(str(folder)) | dict(train_steps=2)
    train(Config(**options))
    shift(folder / "text_encoder" / "model.safetensors")
    capfd.readouterr()
    open_pipeline(str(tmp_path / "run" / "model.pt"), None, "ema", CPU, vae=sd_folder)
    assert "another text encoder than is there now" in capfd.readouterr().out
    open_pipeline(str(tmp_path / "run" / "model.pt"), sd_folder, "ema", CPU)
    assert "warning" not in capfd.readouterr().out
    with pytest.raises(UserError, match="another text encoder than there is now"):
        train(Config(**options | dict(train_steps=4)))


def test_half_precision_files_are_computed_in_float32(latent, sd_folder, tmp_path):  # noqa: F811
    sd = loader.load_sd(sd_folder)
    for part in (sd.unet, sd.vae, sd.text_encoder):
        part.half()
    loader.save_sd_folder(sd, tmp_path / "half")
    pipeline = open_pipeline(None, str(tmp_path / "half"), "ema", CPU, amp="no")
    for network in (pipeline.model, pipeline.vae, pipeline.text.model):
        assert {p.dtype for p in network.parameters()} == {torch.float32}
    config = Config(**latent | dict(vae=str(tmp_path / "half" / "vae"), condition="none"))
    mean, _ = open_parts(config, CPU).vae.encode(torch.zeros(1, 3, 16, 16))
    assert mean.dtype == torch.float32


def test_networks_that_do_not_go_together(latent, vae, sd_folder, tmp_path):  # noqa: F811
    import diffusers

    shutil.copytree(sd_folder, tmp_path / "inpainting")
    config = json.loads((tmp_path / "inpainting" / "unet" / "config.json").read_text())
    config = {k: v for k, v in config.items() if not k.startswith("_")} | {"in_channels": 9}
    diffusers.UNet2DConditionModel(**config).save_pretrained(tmp_path / "inpainting" / "unet")
    with pytest.raises(UserError, match="9 channels in .* an inpainting model"):
        open_pipeline(None, str(tmp_path / "inpainting"), "ema", CPU)
    with pytest.raises(UserError, match="9 channels in .* an inpainting model"):
        open_parts(Config(**latent | options_of(str(tmp_path / "inpainting"))), CPU)
    with pytest.raises(UserError, match="4 channels in and 4 out, the VAE's latents have 3"):
        open_pipeline(None, sd_folder, "ema", CPU, vae=str(vae))
    train(Config(**latent | dict(train_steps=2)))
    with pytest.raises(UserError, match="3 channels in and 3 out, the VAE's latents have 4"):
        open_pipeline(str(tmp_path / "run" / "model.pt"), None, "ema", CPU, vae=sd_folder)


def test_vaes_as_files(sd_folder, tmp_path):  # noqa: F811
    sd = loader.load_sd(sd_folder)
    loader.save_sd_file(sd, tmp_path / "whole.safetensors")
    tensors = load_file(tmp_path / "whole.safetensors")
    bare = {
        k.removeprefix("first_stage_model."): v for k, v in tensors.items() if "first_stage" in k
    }
    rest = {k: v for k, v in tensors.items() if "first_stage" not in k}
    save_file(rest, tmp_path / "rest.safetensors")
    shutil.copy(f"{sd_folder}/vae/config.json", tmp_path)
    save_file(bare, tmp_path / "bare.safetensors")
    torch.save({"state_dict": bare}, tmp_path / "bare.ckpt")
    shutil.copytree(f"{sd_folder}/vae", tmp_path / "plain")
    files = [
        "bare.safetensors",
        "bare.ckpt",
        "whole.safetensors",
        "plain/diffusion_pytorch_model.safetensors",
    ]
    for file in files:
        found = load_vae(str(tmp_path / file)).state_dict()
        for name, value in sd.vae.state_dict().items():
            assert torch.equal(found[name], value)
    draw = lambda path, **given: open_pipeline(None, str(path), "ema", CPU, amp="no", **given).sample(  # noqa: E731
        [0], steps=2, prompts=["x"], amp="no")  # fmt: skip
    expected = draw(sd_folder)
    found = draw(tmp_path / "rest.safetensors", config=sd_folder, vae=str(tmp_path / files[0]))
    # weights lie elsewhere in memory, and on some processors sums are then in another order
    assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="holds no vae; give --vae"):
        draw(tmp_path / "rest.safetensors", config=sd_folder)


# --- pictures -------------------------------------------------------------------------------------


def test_batch_mates_change_nothing(sd_folder, tmp_path, monkeypatch):  # noqa: F811
    from diffusion.commands import sample

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n" + "a very long prompt " * 12 + "\na dog\n")
    made = []
    for size in (1, 2, 3):
        folder = tmp_path / str(size)
        monkeypatch.setattr(sys, "argv", ["sample.py", "--sd_path", sd_folder, "--prompt", f"@{prompts}", "--steps", "3",
                            "--batch_size", str(size), "--amp", "no", "--device", "cpu", "--save_folder", str(folder)])  # fmt: skip
        sample.main()
        made.append(
            [
                np.asarray(Image.open(folder / "images" / f"{i:06d}.png")).astype(int)
                for i in range(3)
            ]
        )
    for other in made[1:]:
        assert np.abs(np.array(other) - np.array(made[0])).max() <= 2


def test_export_keeps_the_clip_skip(latent, sd_folder, tmp_path, monkeypatch):  # noqa: F811
    train(Config(**latent | options_of(sd_folder) | dict(train_steps=2, clip_skip=2)))
    model = tmp_path / "run" / "model.pt"
    monkeypatch.setattr(sys, "argv", ["export", str(model), str(tmp_path / "made")])
    export.main()
    before = loader.load_sd(sd_folder).text_encoder.config.num_hidden_layers
    told = json.loads((tmp_path / "made" / "text_encoder" / "config.json").read_text())
    assert told["num_hidden_layers"] == before - 1
    eps = torch.randn(1, 4, 16, 16)
    a, b = (p.sample([0], steps=3, eps=eps, prompts=["a fox"], guidance_scale=5.0, amp="no") for p in (
        open_pipeline(str(model), None, "ema", CPU), open_pipeline(None, str(tmp_path / "made"), "ema", CPU, amp="no")))  # fmt: skip
    assert_close(a, b)


@pytest.mark.slow
def test_models_that_have_moved_are_measured_and_shown(latent, vae, faces, tmp_path, monkeypatch):  # noqa: F811
    from diffusion.commands import visualize
    from diffusion.evaluation import metrics

    shutil.copytree(vae, tmp_path / "vae")
    train(Config(**latent | dict(vae=str(tmp_path / "vae"), train_steps=2)))
    (tmp_path / "vae").rename(tmp_path / "moved")
    model = str(tmp_path / "run" / "model.pt")

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.float().mean((2, 3))

    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    shared = ["--device", "cpu", "--save_folder", str(tmp_path), "--vae", str(tmp_path / "moved")]
    monkeypatch.setattr(sys, "argv", ["visualize.py", "--load_path", model, "--steps", "3", "--num_images", "2", *shared])  # fmt: skip
    visualize.main()
    assert (tmp_path / "viz" / "backward.png").exists()
    measured = ["metrics", str(faces), model, "--fid_features", str(tmp_path / "mean.pt"), "--num_images", "4",
                "--samplers", "ddim:2", "--amp", "no", *shared]  # fmt: skip
    monkeypatch.setattr(sys, "argv", measured)
    metrics.main()
    result = json.loads((tmp_path / "metrics" / "quality.json").read_text())
    assert np.isfinite(result["rows"][0]["mean"]) and result["num_fake"] == 4
    monkeypatch.setattr(sys, "argv", [*measured[:2], str(faces), *measured[3:]])
    with pytest.raises(UserError, match="are parts of a model"):
        metrics.main()


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, told", [
    (dict(mode="latent", vae="x", heads=8, dropout=0.1), "--heads, --dropout: nothing without --mode pixel"),
    (dict(mode="vae", noise_offset=0.1), "--noise_offset: nothing without --mode pixel or latent"),
    (dict(mode="vae", checkpointing=True), "--checkpointing: nothing"),
    (dict(mode="vae", vae="x"), "--vae: nothing without --mode latent"),
    (dict(vae="x", layers_per_block=3), "--vae: nothing without --mode latent"),
    (dict(mode="latent", vae="x", clip_skip=2), "--clip_skip: nothing without --sd_path"),
    (dict(mode="latent", vae="x", sd_config="y"), "--sd_config: nothing without --sd_path FILE"),
    (dict(mode="latent", vae="x", text_dim=64), "--text_dim: nothing without --condition text from scratch"),
    (dict(validation_prompts="x"), "--validation_prompts: nothing without --condition text"),
    (dict(sd_path="x", schedule="linear", time_steps=20), "--schedule, --time_steps: nothing without a network from scratch"),
    (dict(sd_path="x", text_encoder="scratch"), "--text_encoder: nothing"),
    (dict(sd_path="x", unet_dim=32), "--unet_dim: nothing"),
    (dict(sd_path="x", layers_per_block=1), "--layers_per_block: nothing"),
    (dict(sd_path="x", adapter="lora", vectors=2), "--vectors: nothing without --adapter textual_inversion"),
])  # fmt: skip
def test_options_that_would_do_nothing(change, told):
    made = dict(mode="latent", condition="text", objective="eps") if "sd_path" in change else {}
    with pytest.raises(UserError, match=told):
        based_on(Config(**made | change))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_give_no_option_that_does_nothing(preset):
    sd = {"sd_path": "x"} if preset in ("anime_sd15", "fine_tune") else {}
    based_on(config_from_args(sd, preset))


def test_useless_options_of_sample(sd_folder, monkeypatch):  # noqa: F811
    from diffusion.commands import sample

    for args, told in (
        (("--sd_path", sd_folder, "--config", sd_folder), "describes a single file"),
        (("--sd_path", sd_folder, "--negative_prompt", "x"), "give --prompt as well"),
    ):
        monkeypatch.setattr(sys, "argv", ["sample.py", *args])
        with pytest.raises(UserError, match=told):
            sample.main()


def test_a_stable_diffusion_model_brings_its_settings(sd_folder, tmp_path):  # noqa: F811
    made = lambda **given: based_on(config_from_args(given), set(given))  # noqa: E731
    config = made(sd_path=sd_folder, data="somewhere")
    found = (
        config.mode,
        config.condition,
        config.objective,
        config.loss,
        config.learning_rate,
        config.image_size,
    )
    assert found == ("latent", "text", "eps", "l2", 1e-5, 32)
    assert made(sd_path=sd_folder, learning_rate=1e-4, image_size=64).image_size == 64
    assert made(sd_path=sd_folder, learning_rate=1e-4).learning_rate == 1e-4
    assert made(sd_path="some.safetensors").image_size == 512
    folder = tmp_path / "v"
    shutil.copytree(sd_folder, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    assert made(sd_path=str(folder)).objective == "v"
    lora = made(sd_path=sd_folder, adapter="lora", data="toy")
    assert (lora.image_size, lora.learning_rate, lora.unet_dim) == (32, 1e-3, 64)


def test_noise_offset_in_pixels(tiny):  # noqa: F811
    plain, moved = (
        Diffusion(Config(**tiny | dict(noise_offset=o)), CPU).draw(1)[1] for o in (0.0, 0.5)
    )
    difference = moved - plain
    assert_close(difference, difference[:, :, :1, :1].expand_as(difference))
    assert 0.2 < difference.std() < 1


def test_dry_run_describes_what_is_trained(latent, tiny, sd_folder, scratch, tmp_path):  # noqa: F811
    def counted(**options):
        config = based_on(Config(**options))
        return forward_cost(config, 3), config

    size = lambda network: sum(p.numel() for p in network.parameters())  # noqa: E731
    vae_run = plain(tiny, "time_steps", "sample_steps") | dict(
        mode="vae", condition="none", unet_dim=16
    )
    (total, trained, flops, kept), config = counted(**vae_run)
    assert total == trained == size(KLAutoencoder(vae_config(config))) and flops > 0 and kept > 0
    for change in (dict(condition="text"), UNREAD | dict(condition="class"), options_of(sd_folder)):
        (total, trained, flops, kept), config = counted(**latent | change)
        network = open_parts(config, CPU).build(3)
        assert total == trained == size(network) and flops > 0 and kept > 0
    for change in (LORA, INVERSION):
        (total, trained, _, _), config = counted(
            **on_scratch(scratch) | change | dict(data=str(tmp_path))
        )
        base = size(open_parts(config, CPU).build(0))
        assert total == base + trained and 0 < trained < base / 4
    inverted = INVERSION["vectors"] * 32
    assert trained == inverted
    (total, trained, _, _), _ = counted(**on_sd(sd_folder) | LORA)
    assert 0 < trained < total / 4


# --- data -----------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_read(latent, tmp_path):  # noqa: F811
    """With --no_cache, the next one stands in for it, with its own class and caption; also when
    the latents are there already."""
    data = tmp_path / "data"
    for i in range(12):
        folder = data / "ab"[i // 6]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(toy.draw(i, 16)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"caption {i}")
    (data / "a" / "05.png").write_bytes(b"broken")
    for _ in range(2):  # computed, then read
        for condition in ("class", "text"):
            options = latent | dict(condition=condition, data=str(data), cache=False)
            task = LatentDiffusion(Config(**options), CPU)
            none = np.zeros(2, int)
            batch = task.data._encoded(np.array([5, 6]), none.astype(bool), none)
            assert torch.equal(*batch.moments) and batch.labels.tolist() == [1, 1]
            assert condition != "text" or torch.equal(*batch.text)


def test_default_caption_of_hub_sets(latent, tmp_path, monkeypatch):  # noqa: F811
    datasets = pytest.importorskip("datasets")
    from diffusion.data import hub

    pictures = []
    for i in range(12):
        file = io.BytesIO()
        Image.fromarray(toy.draw(i, 16)).save(file, "PNG")
        pictures.append({"bytes": file.getvalue(), "path": None})
    monkeypatch.setattr(hub.StreamBatches, "HELD_OUT", 4)
    for name, columns in (
        ("none", {}),
        ("some", {"text": [None if i % 2 else f"t{i}" for i in range(12)]}),
    ):
        features = {"image": datasets.Image()} | {k: datasets.Value("string") for k in columns}
        made = datasets.Dataset.from_dict(
            {"image": pictures} | columns, features=datasets.Features(features)
        )
        (tmp_path / name).mkdir()
        made.to_parquet(tmp_path / name / "x.parquet")
        for streaming in (False, True):
            task = LatentDiffusion(Config(**latent | dict(
                data=f"hf:{tmp_path / name}", default_caption="grey", streaming=streaming, batch_size=8)), CPU)  # fmt: skip
            told = task.data(0, 0, 8).captions if streaming else task.captions
            assert ("grey" in told) and (set(told) == {"grey"}) == (name == "none")


def test_long_captions_are_told(latent, faces, capfd):  # noqa: F811
    LatentDiffusion(Config(**latent | dict(text_length=20)), CPU)
    out = capfd.readouterr().out
    assert out.count("captions are longer than 18 tokens") == 1 and "120 of 120" in out
    LatentDiffusion(Config(**latent | dict(text_length=256)), CPU)
    assert "longer than" not in capfd.readouterr().out


def test_a_tokenizer_of_another_model(sd_folder, tmp_path):  # noqa: F811
    folder = tmp_path / "sd"
    shutil.copytree(sd_folder, folder)
    file = folder / "tokenizer" / "added_tokens.json"
    size = len(json.loads((folder / "tokenizer" / "vocab.json").read_text()))
    file.write_text(json.dumps({"<more>": size}))
    with pytest.raises(UserError, match=f"{size + 1} tokens, the text encoder vectors of {size}"):
        open_pipeline(None, str(folder), "ema", CPU)
