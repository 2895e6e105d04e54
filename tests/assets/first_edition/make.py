"""Make files.tar.xz: what commit 69aa47a wrote, for tests/test_first_edition.py.

python make.py CHECKOUT               CHECKOUT: a folder with that commit, the first edition
python make.py CHECKOUT --digests     only what that commit makes of the archive on this machine
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from test_golden import machine, of_pictures, of_run  # noqa: E402

TRAIN = (
    "--preset none --data data --batch_size 4 --seed 0 --learning_rate 0.003 --lr_schedule constant "
    "--lr_warmup_steps 2 --weight_decay 0 --grad_accum 1 --grad_clip 1 --ema_decay 0.9 --device cpu "
    "--amp no --num_workers 1 --cache_dir cache --save_and_sample_every 4 --log_every 1 "
    "--keep_last 2 --num_samples 2 "
)
DIFFUSION = TRAIN + (
    "--loss l1 --noise_offset 0 --min_snr_gamma 0 --condition_dropout 0.3 --sampler ddim "
    "--sample_steps 3 --guidance_scale 1 "
)
SCRATCH = DIFFUSION + "--time_steps 20 --schedule cosine --objective v "
LONG = "--save_and_sample_every 1000 --learning_rate 0.01 "  # else the pictures would be all grey
RUNS = {  # in this order; the first two are stopped at step 4 of 8
    "run": SCRATCH + "--mode pixel --image_size 8 --unet_dim 2 --dim_mults 1,2 --heads 1 "
    "--dropout 0 --condition class",  # torch 2.6 and 2.14 drop other units
    "lora": DIFFUSION + "--mode pixel --load_path run/model.pt --adapter lora --rank 1 "
    "--targets all --lora_dropout 0",
    "vae": TRAIN + LONG + "--train_steps 300 --mode vae --image_size 8 --unet_dim 4 "
    "--dim_mults 1,2 --latent_channels 2 --kl_weight 1e-6",
    "text": SCRATCH + LONG + "--train_steps 200 --objective eps --mode latent --vae vae "
    "--image_size 8 --unet_dim 4 --dim_mults 1,2 "
    "--layers_per_block 1 --condition text --text_encoder scratch --text_dim 8 --text_layers 1 "
    "--text_length 16",
    "text_lora": DIFFUSION + LONG + "--train_steps 40 --learning_rate 0.05 --mode latent "
    "--load_path text/ema.safetensors --image_size 8 "
    "--adapter lora --rank 1 --targets attention --lora_dropout 0 --train_text_encoder",
    "inversion": DIFFUSION + LONG + "--train_steps 40 --learning_rate 1 --mode latent "
    "--load_path text/ema.safetensors --image_size 8 "
    "--adapter textual_inversion --token <new> --init_word face --vectors 1",
}  # fmt: skip
# those that are kept so that they can be continued; which weights of their end are kept beside
WHOLE = {"run": "ema.safetensors", "lora": "adapter.safetensors"}

SAMPLE = (
    "--device cpu --amp no --seed 0 --batch_size 2 --num_images 3 --cuda_graph off --steps 4 "
    "--guidance_rescale 0 --spacing trailing "
)
PIXEL = SAMPLE + "--guidance_scale 1 "
TEXT = SAMPLE + "--load_path text/ema.safetensors --prompt 'a face <new>' --sampler ddim --eta 0 "
PICTURES = {
    "model": PIXEL + "--load_path run/model.pt --weights ema --sampler ddpm --eta 1",
    "raw": PIXEL + "--load_path run/model.pt --weights raw --sampler ddim --eta 0",
    "ema": SAMPLE + "--load_path run/ema.safetensors --sampler dpmpp_2m --eta 0 --class_label all "
    "--guidance_scale 2",
    "lora": PIXEL + "--load_path run/model.pt --lora lora/adapter.safetensors:4 --sampler ddim --eta 0",
    "text": TEXT + "--guidance_scale 3",
    "text_lora": TEXT + "--guidance_scale 1 --lora text_lora/adapter.safetensors:4",
    "kohya": TEXT + "--guidance_scale 1 --lora text_lora/adapter_kohya.safetensors:4",
    "inversion": TEXT + "--guidance_scale 1 --embedding inversion/adapter.safetensors",
}  # fmt: skip


def save_images(folder: Path) -> None:
    """Write twelve images in three class folders, with captions."""
    for i in range(12):
        path = folder / ("bald", "bob", "spiky")[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = b"".join(hashlib.sha256(f"{i} {j}".encode()).digest() for j in range(2))[:48]
        Image.frombytes("RGB", (4, 4), pixels).resize((12, 10), Image.BICUBIC).save(path)
        path.with_suffix(".txt").write_text(f"a {path.parent.name} face")


def caller(checkout: Path, root: Path):
    """Make a function that runs a script of the checkout in a folder."""

    def call(script: str, options: str, folder: str) -> None:
        command = [sys.executable, str(checkout / script), *shlex.split(options)]
        subprocess.run([*command, "--save_folder", folder], cwd=root, check=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip

    return call


def make(checkout: Path) -> None:
    """Write the archive."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        call = caller(checkout, root)
        save_images(root / "data")
        for name, options in RUNS.items():
            call("train.py", f"--train_steps 4 {options}", name)
        for name, options in PICTURES.items():
            call("sample.py", options, f"pictures/{name}")
        kept = ["commands.json", "data", "cache", "text/ema.safetensors", "vae/ema.safetensors",
                "inversion/adapter.safetensors"]  # fmt: skip
        kept += [f"text_lora/{name}.safetensors" for name in ("adapter", "adapter_kohya")]
        kept += [f"pictures/{name}/images" for name in PICTURES]
        for name, file in WHOLE.items():  # without a stop
            call("train.py", f"{RUNS[name]} --train_steps 8", f"{name}_end")
            kept += [name, f"{name}_end/{file}", f"{name}_end/metrics.jsonl"]
        about = {"runs": {name: RUNS[name] for name in WHOLE}, "pictures": PICTURES}
        (root / "commands.json").write_text(json.dumps(about, indent=1))
        for path in root.glob("*/tensorboard/*"):
            path.unlink()
        with tarfile.open(HERE / "files.tar.xz", "w:xz", preset=9) as tar:
            for name in kept:
                tar.add(root / name, name)


def add_digests(checkout: Path) -> None:
    """Write what that commit makes of the archive on this machine."""
    file = HERE / "digests.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        call = caller(checkout, root)
        with tarfile.open(HERE / "files.tar.xz") as tar:
            tar.extractall(root, filter="data")
        found = {}
        for name, options in PICTURES.items():
            call("sample.py", options, f"again/{name}")
            found[f"pictures: {name}"] = of_pictures(
                (root / "again" / name / "images").glob("*.png")
            )
        for name in reversed(WHOLE):  # the LoRA first, whose model is the other
            call("train.py", f"{RUNS[name]} --train_steps 8", name)
            found[f"run: {name}"] = of_run(root / name)
    known[machine()] = found
    file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    checkout, *more = map(Path, sys.argv[1:])
    if more != [Path("--digests")]:
        make(checkout.resolve())
    add_digests(checkout.resolve())
