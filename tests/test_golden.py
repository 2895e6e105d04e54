"""The same bits as ever: digests of weights, metrics and pixels, through the three scripts alone.

golden.json holds the digests of each case, under a key that names the version of torch and the kind
of CPU: other ones round differently. Where a change of bits is meant, write them again:

    python tests/test_golden.py --write

Nothing of the package is imported here, so that all of it may be moved and renamed.
"""

import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
import tiny_sd
import torch
import warm
from PIL import Image
from safetensors.torch import load_file

FILE = Path(__file__).parent / "golden.json"
WRITE = "UPDATE_GOLDEN" in os.environ
CLOCK = {"img_per_s", "fid_seconds"}  # fields of metrics.jsonl that are no function of the run

# --- the runs ------------------------------------------------------------------------------------

# every option that has a part in the bits is written out: another default moves no digest
COMMON = (
    "--preset none --data {faces} --image_size 8 --batch_size 4 --train_steps 4 --seed 0 "
    "--learning_rate 0.003 --lr_schedule constant --lr_warmup_steps 2 --weight_decay 0 "
    "--grad_accum 1 --grad_clip 1 --ema_decay 0.9 --device cpu --amp no --num_workers 1 "
    "--cache_dir {cache} --save_and_sample_every 2 --log_every 1 --keep_last 2 --num_samples 2 "
)
DIFFUSION = (
    "--loss l1 --noise_offset 0 --min_snr_gamma 0 --condition_dropout 0.1 --sampler ddim "
    "--sample_steps 3 --guidance_scale 1 "
)
SCRATCH = DIFFUSION + "--time_steps 20 --schedule cosine --objective v "
PIXEL = COMMON + SCRATCH + (
    "--mode pixel --condition none --unet_dim 8 --dim_mults 1,2 --heads 2 --dropout 0 "
)  # fmt: skip
CLASS = PIXEL + "--condition class --condition_dropout 0.3 --dropout 0.1 "
LATENT = COMMON + SCRATCH + (
    "--mode latent --vae {vae} --unet_dim 16 --dim_mults 1,2 --layers_per_block 1 --image_size 16 "
)  # fmt: skip
TEXT = LATENT + (
    "--condition text --text_encoder scratch --text_dim 16 --text_layers 1 --text_length 32 "
)
VAE = COMMON + (
    "--mode vae --image_size 16 --unet_dim 8 --dim_mults 1,2 --latent_channels 3 --kl_weight 1e-6 "
    "--perceptual_weight 0 "
)
SD = COMMON + DIFFUSION + (
    "--mode latent --sd_path {sd} --condition text --objective eps --image_size 16 --clip_skip 1 "
    "--train_steps 2 --save_and_sample_every 1 "
)  # fmt: skip
ON_PIXEL = COMMON + DIFFUSION + "--mode pixel --load_path {class}/model.pt "
ON_TEXT = COMMON + DIFFUSION + "--mode latent --load_path {text}/model.pt --image_size 16 "
LORA = "--adapter lora --rank 2 --targets attention --lora_dropout 0 "
LORA_ALL = "--adapter lora --rank 3 --alpha 1.5 --targets all --lora_dropout 0.1 "
INVERSION = "--adapter textual_inversion --token <new> --init_word face --vectors 2 "
PRIOR = (
    "--instance_prompt 'a sks face' --class_prompt 'a face' --class_images 3 --prior_weight 0.5 "
)

RUNS = {  # {name}: the folder of another run, or a file of MAKERS
    "toy": PIXEL + "--data toy --no_cache --save_and_sample_every 4",
    "class": CLASS,
    "held out": PIXEL + "--data {many} --num_samples 5",
    # objectives and losses
    "eps": PIXEL + "--objective eps --loss l2",
    "eps min-snr": PIXEL + "--objective eps --loss l2 --min_snr_gamma 5",
    "x0": PIXEL + "--objective x0 --loss huber",
    "x0 min-snr": PIXEL + "--objective x0 --loss l1 --min_snr_gamma 5",
    "v": PIXEL + "--objective v --loss huber",
    "v min-snr": PIXEL + "--objective v --loss l2 --min_snr_gamma 5",
    "noise offset": PIXEL + "--noise_offset 0.1",
    # schedules
    "linear": PIXEL + "--schedule linear --time_steps 100",
    "sigmoid": PIXEL + "--schedule sigmoid",
    "scaled_linear": PIXEL + "--schedule scaled_linear --time_steps 100",
    "zero snr": PIXEL + "--schedule linear --time_steps 100 --zero_snr",
    # optimisation
    "accumulation": CLASS + "--grad_accum 2",
    "uneven accumulation": CLASS + "--grad_accum 4 --no_flip",
    "checkpointing": CLASS + "--checkpointing",
    "lr linear": PIXEL + "--lr_schedule linear --weight_decay 0.1 --grad_clip 0",
    "lr cosine": PIXEL + "--lr_schedule cosine --grad_clip 0.01",
    "epochs": PIXEL.replace("--train_steps 4", "--epochs 1.5") + "--data_class bob",
    "seed": CLASS + "--seed 7 --sampler dpmpp_2m_sde --guidance_scale 2",
    "bf16": CLASS + "--amp bf16",
    "loaded": CLASS + "--load_path {class}/model.pt",
    "two ranks": PIXEL + "--data toy --no_cache",
    "two ranks, accumulation": CLASS + "--grad_accum 2",
    # adapters of a pixel model
    "lora": ON_PIXEL + LORA,
    "lora all": ON_PIXEL + LORA_ALL,
    "lora regex": ON_PIXEL + LORA + "--targets .*mid.*",
    # latents
    "vae": VAE,
    "other vae": VAE + "--kl_weight 0.01 --latent_channels 4 --grad_accum 2",
    "text": TEXT,
    "latent": LATENT + "--condition none --no_cache",
    "latent class": LATENT + "--condition class --objective eps --loss l2 --checkpointing",
    "text, ranks": TEXT + "--grad_accum 2 --guidance_scale 2",
    "text lora": ON_TEXT + LORA,
    "text lora all": ON_TEXT + LORA_ALL + "--train_text_encoder",
    "text inversion": ON_TEXT + INVERSION,
    # Stable Diffusion
    "sd run": SD,
    "sd clip skip": SD + "--clip_skip 2",
    "sd v": SD + "--sd_path {sd of v} --objective v --min_snr_gamma 5",
    "sd file": SD + "--sd_path {one.safetensors} --sd_config {sd} --guidance_scale 3",
    "sd lora": SD + LORA,
    "sd lora all": SD + LORA_ALL + "--train_text_encoder",
    "sd inversion": SD + INVERSION,
    "dreambooth": SD + PRIOR + "--class_data {class images}",
    "text dreambooth": ON_TEXT + PRIOR + "--train_text_encoder --class_data {other class images}",
    "dreambooth lora": SD + LORA + PRIOR + "--train_text_encoder --class_data {more class images}",
    "sd on scratch vae": LATENT + "--vae {sd}/vae --condition none",
}
RANKS = {"two ranks": 2, "two ranks, accumulation": 2, "text, ranks": 2}

# a run that is stopped at step 2 and continued: the case is the run's whose bits it must have
RESUMED = {
    "held out": 4,
    "class": 4,
    "accumulation": 4,
    "vae": 4,
    "text": 4,
    "lora all": 4,
    "sd lora": 2,
}

# --- the pictures --------------------------------------------------------------------------------

SAMPLE = (
    "--device cpu --amp no --seed 0 --batch_size 2 --num_images 3 --cuda_graph off --steps 4 "
    "--guidance_scale 1 --guidance_rescale 0 --weights ema "
)
OF_CLASS = SAMPLE + "--load_path {class}/model.pt "
OF_TEXT = SAMPLE + "--load_path {text}/model.pt --spacing trailing --prompt 'a face, bob' "
OF_SD = SAMPLE + "--sd_path {sd} --weights raw --num_images 2 --prompt 'a red face' --spacing leading "  # fmt: skip
DDIM = "--sampler ddim --spacing trailing --eta 0 "
GUIDED = "--guidance_scale 3 --negative_prompt 'a spiky face' "
FROM = "--init_image {start.png} --strength 0.6 "
MASKED = "--init_image {start.png} --mask {mask.png} --strength 0.8 "
ETA = {"ddpm": 1, "ddpm_large": 1, "ddim": 0, "dpmpp_2m": 0, "dpmpp_2m_sde": 1}

PICTURES = {
    **{
        f"{sampler} {spacing}": OF_CLASS + f"--sampler {sampler} --spacing {spacing} --eta {eta}"
        for sampler, eta in ETA.items()
        for spacing in ("leading", "trailing", "linspace", "logsnr")
    },
    "ddim eta": OF_CLASS + DDIM + "--eta 0.5",
    "ddim eta 1": OF_CLASS + DDIM + "--eta 1",
    "sde eta": OF_CLASS + "--sampler dpmpp_2m_sde --spacing logsnr --eta 0.5",
    "every step": OF_CLASS + "--sampler ddpm --spacing trailing --eta 1 --steps 20",
    "one step": OF_CLASS + DDIM + "--steps 1",
    "bf16": OF_CLASS + DDIM + "--amp bf16",
    "raw": OF_CLASS + DDIM + "--weights raw --seed 5",
    "ema.safetensors": SAMPLE + DDIM + "--load_path {class}/ema.safetensors",
    "classes": OF_CLASS + DDIM + "--class_label all --batch_size 3",
    "guidance": OF_CLASS + DDIM + "--class_label bob --guidance_scale 3",
    "guidance rescale": OF_CLASS
    + DDIM
    + "--class_label 2 --guidance_scale 4 --guidance_rescale 0.7",
    "guidance sde": OF_CLASS + "--sampler dpmpp_2m_sde --spacing logsnr --eta 1 --class_label 1 --guidance_scale 2",
    "img2img": OF_CLASS + DDIM + FROM,
    "img2img ddpm": OF_CLASS + "--sampler ddpm --spacing trailing --eta 1 " + FROM,
    "inpainting": OF_CLASS + DDIM + MASKED,
    "inpainting from noise": OF_CLASS + DDIM + MASKED + "--strength 1 --class_label 0 --guidance_scale 2",
    **{
        f"of {run}": SAMPLE + DDIM + f"--load_path {{{run}}}/model.pt"
        for run in ("eps", "x0", "linear", "sigmoid", "scaled_linear", "zero snr", "latent")
    },
    "zero snr 2m": SAMPLE + "--load_path {zero snr}/model.pt --sampler dpmpp_2m --spacing trailing --eta 0",
    "pixel lora": OF_CLASS + DDIM + "--lora {lora}/adapter.safetensors",
    "pixel loras": OF_CLASS + DDIM + "--lora {lora}/adapter.safetensors:0.5 --lora {lora all}/adapter.safetensors:-2",
    "text": OF_TEXT + DDIM,
    "text guided": OF_TEXT + DDIM + GUIDED,
    "text in turn": OF_TEXT + DDIM + GUIDED + "--sequential_guidance --guidance_rescale 0.5",
    "text prompts": OF_TEXT + DDIM + "--prompt 'number 3' --prompt @{prompts.txt} --num_images 4",
    "text wide": OF_TEXT + DDIM + "--height 24 --width 16",
    "text img2img": OF_TEXT + DDIM + FROM,
    "text inpainting": OF_TEXT + DDIM + MASKED,
    "text lora": OF_TEXT + DDIM + "--lora {text lora}/adapter.safetensors:3",
    "text lora kohya": OF_TEXT + DDIM + "--lora {text lora all}/adapter_kohya.safetensors",
    "text embedding": OF_TEXT + DDIM + "--embedding {text inversion}/adapter.safetensors --prompt 'a <new>'",
    "latent class": SAMPLE + DDIM + "--load_path {latent class}/model.pt --class_label 1 --guidance_scale 2",
    "sd": OF_SD + "--sampler ddim --eta 0",
    "sd guided": OF_SD + "--sampler dpmpp_2m --eta 0 " + GUIDED,
    "sd sde": OF_SD + "--sampler dpmpp_2m_sde --eta 1 --guidance_rescale 0.7 " + GUIDED,
    "sd ddpm": OF_SD + "--sampler ddpm --eta 1 --objective v",
    "sd long prompt": OF_SD + DDIM + GUIDED + "--plain_prompts --prompt '(a red face:1.3), [blue], " + "many words " * 12 + "'",
    "sd clip skip": OF_SD + DDIM + "--clip_skip 2",
    "sd tiling": OF_SD + DDIM + "--vae_tiling --height 160 --width 144 --num_images 1 --steps 1",
    "sd img2img": OF_SD + DDIM + FROM + GUIDED,
    "sd inpainting": OF_SD + DDIM + MASKED + GUIDED,
    "sd file": OF_SD.replace("{sd}", "{one.safetensors}") + DDIM + "--config {sd}",
    "sd lora": OF_SD + DDIM + "--lora {sd lora}/adapter.safetensors:2",
    "sd lora kohya": OF_SD + DDIM + "--lora {sd lora all}/adapter_kohya.safetensors",
    "sd embedding": OF_SD + DDIM + "--embedding {sd inversion}/adapter.safetensors --embedding {turner.pt} "
    "--prompt 'a <new>, turner'",
    "sd lora and embedding": OF_SD + DDIM + GUIDED + "--lora {dreambooth lora}/adapter.safetensors "
    "--embedding {turner.pt} --prompt 'a sks face, turner'",
    "sd fine-tuned": SAMPLE + DDIM + "--load_path {sd run}/model.pt --prompt 'a face'",
    "text fine-tuned": SAMPLE + DDIM + "--load_path {text dreambooth}/model.pt --prompt 'a face'",
    "sd fine-tuned of clip skip": SAMPLE + DDIM + "--load_path {sd clip skip}/ema.safetensors --prompt 'a face'",
    "sd other vae": OF_SD + DDIM + "--vae {other vae}",
    "two ranks": OF_CLASS + DDIM + "--num_images 5",
}  # fmt: skip

LABELLED = {  # the font in the picture is Pillow's
    "interpolation": OF_SD.replace("--num_images 2", "--num_images 1") + DDIM
    + "--lora_interpolate {sd lora}/adapter.safetensors {sd lora all}/adapter.safetensors:2 --points 3",
}  # fmt: skip

VIEW = "--device cpu --amp no --seed 0 --num_images 2 --steps 4 --guidance_scale 1 --weights ema "
VIEWS = {
    "class": VIEW + "--load_path {class}/model.pt --sampler ddim",
    "class ddpm": VIEW + "--load_path {class}/model.pt --sampler ddpm --class_label 1 --guidance_scale 2 --data toy",
    "text": VIEW + "--load_path {text}/model.pt --sampler dpmpp_2m",
    "sd run": VIEW + "--load_path {sd run}/model.pt --sampler dpmpp_2m_sde --prompt 'a face'",
}  # fmt: skip

FAST = {  # in the default suite
    "test_runs": {"toy", "class", "lora"},
    "test_resumed_runs": {"class"},
    "test_pictures": {*(f"{sampler} trailing" for sampler in ETA), "sd", "guidance"},
}

# --- what the cases refer to ---------------------------------------------------------------------


def noise(name: str, count: int) -> bytes:
    """Make bytes of a name, on every machine the same."""
    return b"".join(
        hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(count // 32 + 1)
    )[:count]


def picture(name: str, width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (4, 4), noise(name, 48)).resize((width, height), Image.BICUBIC)


def save_images(folder: Path, count: int) -> None:
    """Write a folder of images in three class folders, with captions."""
    for i in range(count):
        path = folder / ("bald", "bob", "spiky")[i % 3] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(path.name, 24, 20).save(path)
        path.with_suffix(".txt").write_text(f"a {path.parent.name} face, number {i}")


def save_mask(path: Path) -> None:
    mask = Image.new("L", (24, 24), 0)
    mask.paste(255, (8, 0, 24, 16))
    mask.save(path)


def save_embedding(path: Path) -> None:
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "turner"}, path
    )


MAKERS = {
    "faces": lambda path: save_images(path, 12),
    "many": lambda path: save_images(path, 104),
    "cache": Path.mkdir,
    "class images": Path.mkdir,
    "more class images": Path.mkdir,
    "other class images": Path.mkdir,
    "sd": tiny_sd.save_folder,
    "sd of v": lambda path: tiny_sd.save_folder(path, "v_prediction"),
    "one.safetensors": tiny_sd.save_single_file,
    "start.png": lambda path: picture("start", 24, 24).save(path),
    "mask.png": save_mask,
    "turner.pt": save_embedding,
    "prompts.txt": lambda path: path.write_text("a bald face\na spiky face\n"),
}


class World(dict):
    """Holds the paths of what the cases refer to; makes each when it is first asked for."""

    def __init__(self, root: Path):
        self.root = root

    def __missing__(self, name: str) -> Path:
        path = self.root / name
        if name in RUNS:
            self.call("train.py", RUNS[name], path, RANKS.get(name, 0))
        else:
            MAKERS[name](path)
        self[name] = path
        return path

    def call(self, script: str, options: str, folder: Path, ranks: int = 0) -> Path:
        """Run a script that writes into a folder."""
        filled = re.sub(r"\{([^}]+)\}", lambda m: shlex.quote(str(self[m[1]])), options)
        args = [*shlex.split(filled), "--save_folder", folder]
        done = warm.script(script, *args, cwd=self.root, ranks=ranks)
        assert done.returncode == 0, f"{script} {options}: {done.stderr[-2000:]}"
        return folder


# --- digests -------------------------------------------------------------------------------------


def digest(*chunks: bytes) -> str:
    return hashlib.sha256(b"\0".join(chunks)).hexdigest()[:16]


def flat(value, path: str = "") -> dict[str, torch.Tensor]:
    """Find the tensors in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, (list, tuple))
        else ()
    )
    return {k: x for name, one in items for k, x in flat(one, f"{path}/{name}").items()}


def of_tensors(content) -> str:
    """Digest names, types, shapes and bits."""
    chunks = []
    for name, x in sorted(flat(content).items()):
        chunks.append(f"{name} {x.dtype} {list(x.shape)}".encode())
        chunks.append(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest(*chunks)


def of_pictures(paths) -> str:
    chunks = []
    for path in sorted(paths):
        with Image.open(path) as image:
            chunks += [path.name.encode(), f"{image.mode} {image.size}".encode(), image.tobytes()]
    assert chunks, "no pictures"
    return digest(*chunks)


def of_run(folder: Path) -> dict[str, str]:
    state = torch.load(folder / "model.pt", weights_only=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
    found = {name: of_tensors(state.pop(name)) for name in ("model", "ema", "optimizer")}
    found["rest of model.pt"] = of_tensors(state)
    found["metrics.jsonl"] = digest(json.dumps(lines, sort_keys=True).encode())
    found["samples"] = of_pictures((folder / "samples").glob("*.png"))
    # peft's file holds the tensors of adapter.safetensors once more
    files = (f for f in folder.glob("*.safetensors") if f.stem != "adapter_model")
    return found | {path.name: of_tensors(load_file(path)) for path in files}


def of_samples(folder: Path) -> dict[str, str]:
    paths = sorted((folder / "images").glob("*.png"))
    text = [Image.open(path).text["parameters"].encode() for path in paths]
    return {
        "images": of_pictures(paths),
        "grid": of_grid(folder / "grid.png", paths),
        "parameters": digest(*text),
    }


def of_grid(path: Path, paths: list[Path]) -> str:
    """Digest a grid in its images' own size: that of small ones is enlarged by a whole factor."""
    with Image.open(path) as image, Image.open(paths[0]) as first:
        sheet = np.array(image)
        width = math.ceil(math.sqrt(min(len(paths), 100))) * (first.width + 2) + 2
        times = image.width // width
    own = sheet[::times, ::times]
    assert np.array_equal(own.repeat(times, 0).repeat(times, 1), sheet)
    assert times == (1 if first.height >= 64 else -(-96 // first.height))
    about = f"{image.mode} {(own.shape[1], own.shape[0])}"
    return digest(path.name.encode(), about.encode(), own.tobytes())


def of_views(folder: Path) -> dict[str, str]:
    """Digest the pictures without text in them."""
    paths = (folder / "viz").glob("*.png")
    return {
        path.stem: of_pictures([path]) for path in sorted(paths) if re.search(r"_t\d\d$", path.stem)
    }


def machine() -> str:
    """Name what the bits depend on."""
    kind = platform.machine()
    if Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text()
        flags = re.search(r"^flags\s*:(.*)$", text, re.M)
        vendor = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.M)
        known = [
            name
            for name in ("amx_tile", "avx512_bf16", "avx512f", "avx2")
            if flags and name in flags[1].split()
        ]
        kind = " ".join([*(vendor.groups() if vendor else [kind]), *known[:1]])
    return f"{torch.__version__.split('+')[0]} {kind}"


# --- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def golden():
    """This machine's digests; where they are to be written, a place for those that are found."""
    if not WRITE:
        known = json.loads(FILE.read_text())
        if machine() not in known:
            pytest.skip(f"golden.json holds nothing of {machine()}")
        yield known[machine()]
        return
    found = {"pillow": PIL.__version__}
    yield found
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    known[machine()] = {k: v for k, v in known.get(machine(), {}).items() if k in NAMES} | found
    FILE.write_text(json.dumps(known, indent=0, sort_keys=True) + "\n")


def check(golden: dict, case: str, found: dict[str, str]) -> None:
    if WRITE:
        golden[case] = found
        return
    assert case in golden, f"golden.json lacks {case!r}: python tests/test_golden.py --write"
    changed = [k for k in {**found, **golden[case]} if found.get(k) != golden[case].get(k)]
    assert not changed, f"{case}: other bits than golden.json's in {', '.join(changed)}"


def cases(test: str, names):
    """Make pytest's parameters, slow but for those of FAST."""
    fast = FAST.get(test, ())
    marks = [() if name in fast else pytest.mark.slow for name in names]
    return pytest.mark.parametrize("name", [pytest.param(n, marks=m) for n, m in zip(names, marks)])


@cases("test_runs", RUNS)
def test_runs(world, golden, name):
    check(golden, f"run: {name}", of_run(world[name]))


@cases("test_resumed_runs", RESUMED)
def test_resumed_runs(world, golden, name, tmp_path):
    """Stopped in the middle and continued, a run has the bits of the one that was not."""
    steps = RESUMED[name]
    for end in (steps // 2, steps):
        world.call("train.py", f"{RUNS[name]} --train_steps {end}", tmp_path / "run")
    assert of_run(tmp_path / "run") == of_run(world[name])


@cases("test_pictures", PICTURES)
def test_pictures(world, golden, name, tmp_path):
    ranks = 2 if name == "two ranks" else 0
    world.call("sample.py", PICTURES[name], tmp_path, ranks)
    check(golden, f"pictures: {name}", of_samples(tmp_path))


@cases("test_labelled_pictures", LABELLED)
def test_labelled_pictures(world, golden, name, tmp_path):
    if not WRITE and golden["pillow"] != PIL.__version__:
        pytest.skip(f"golden.json's are of Pillow {golden['pillow']}, with another font")
    world.call("sample.py", LABELLED[name], tmp_path)
    check(
        golden,
        f"pictures: {name}",
        {p.name: of_pictures([p]) for p in sorted(tmp_path.glob("*.png"))},
    )


@cases("test_views", VIEWS)
def test_views(world, golden, name, tmp_path):
    world.call("visualize.py", VIEWS[name], tmp_path)
    check(golden, f"views: {name}", of_views(tmp_path))


NAMES = (
    {f"run: {n}" for n in RUNS}
    | {f"views: {n}" for n in VIEWS}
    | {f"pictures: {n}" for n in (*PICTURES, *LABELLED)}
)

if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_golden.py --write")
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", __file__]
    sys.exit(subprocess.call(command, env={**os.environ, "UPDATE_GOLDEN": "1"}))
