"""What several test files share besides fixtures: options of tiny runs, and comparisons of runs."""

import dataclasses
import json
import time

import torch
from torch import nn

from diffusion.config import Config
from diffusion.files import checkpoint
from diffusion.models.configs import UNetConfig
from diffusion.models.sd_unet import SDUNet

CPU = torch.device("cpu")
TIMES = ("img_per_s", "fid_seconds")


# --- options -------------------------------------------------------------------------------------


def tiny_run(faces, folder) -> dict:
    """The options of a run of a second or two."""
    return dict(
        data=str(faces), image_size=16, unet_dim=8, dim_mults=(1, 2), heads=2, batch_size=8,
        time_steps=20, train_steps=12, save_and_sample_every=4, log_every=2, lr_warmup_steps=4,
        num_samples=4, sample_steps=5, cache_dir=str(folder / "cache"), device="cpu", amp="no",
        save_folder=str(folder / "run"), condition="class", dropout=0.1, ema_decay=0.99,
    )  # fmt: skip


def plain(options: dict, *more: str) -> dict:
    """Without what only the pixel network has, and more."""
    return {k: v for k, v in options.items() if k not in ("heads", "dropout", *more)}


def options_of(sd: str) -> dict:
    scratch = usual(
        "text_encoder text_dim text_layers text_length layers_per_block unet_dim dim_mults time_steps"
    )
    return scratch | dict(
        mode="latent", sd_path=sd, vae=None, condition="text", objective="eps", image_size=32
    )


def usual(names: str) -> dict:
    return {f.name: f.default for f in dataclasses.fields(Config) if f.name in names.split()}


UNREAD = usual(
    "text_encoder text_dim text_layers text_length"
)  # beside a condition other than text


def on_scratch(scratch) -> dict:
    return dict(mode="latent", load_path=str(scratch))


def on_sd(folder) -> dict:
    return dict(mode="latent", sd_path=folder, image_size=32)


LORA = dict(adapter="lora", default_caption="a face", rank=2, lora_dropout=0.1)
INVERSION = dict(adapter="textual_inversion", token="<new>", init_word="face", vectors=2)


# --- runs ----------------------------------------------------------------------------------------


def flags(options: dict) -> list[str]:
    """A configuration as command-line arguments."""
    out = []
    for name, value in options.items():
        if isinstance(value, bool):
            out.append(f"--{name}" if value else f"--no_{name}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            out += [f"--{name}", text]
    return [*out, "--preset", "none"]


def run_lines(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def same(a, b, path="") -> None:
    """Bit for bit, through nested dictionaries and lists; dictionaries of any kind are alike."""
    assert type(a) is type(b) or isinstance(a, dict) and isinstance(b, dict), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            same(a[k], b[k], f"{path}/{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def same_runs(a, b) -> None:
    states = [checkpoint.read(folder / "model.pt") for folder in (a, b)]
    for state in states:
        for name in ("save_folder", "cache_dir", "overwrite"):
            state["config"].pop(name)
    same(*states)
    assert run_lines(a) == run_lines(b)


def wait_for_step(folder, step, process, timeout=120) -> None:
    deadline = time.time() + timeout
    while time.time() < deadline and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and f'"step": {step}' in path.read_text():
            return
        time.sleep(0.005)
    process.kill()
    raise AssertionError("".join(process.communicate()))


# --- networks ------------------------------------------------------------------------------------


def sd_unet() -> SDUNet:
    torch.manual_seed(0)
    unet = SDUNet(UNetConfig(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24,
        attention_head_dim=2, norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ))  # fmt: skip
    for p in unet.parameters():  # its zeros would hide what branches do
        nn.init.normal_(p, std=0.1) if p.ndim > 1 else None
    return unet.eval()


def stand_in_for_graphs(monkeypatch) -> list:
    """Put a stand-in for the capture of CUDA graphs; the functions that it is given are listed."""
    captured = []

    class Recorded:
        def __init__(self, function, inputs):
            captured.append(function)
            self.function = function

        def __call__(self, *inputs):
            return self.function(*inputs)

    monkeypatch.setattr("diffusion.runtime.cuda_graph.Graph", Recorded)
    return captured
