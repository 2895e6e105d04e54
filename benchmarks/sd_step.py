#!/usr/bin/env python3
"""Stable Diffusion 1.5 at full size, random weights: ours against diffusers, in one run.

python benchmarks/sd_step.py [--device cuda] [--repeats 5]

A guidance step (the U-Net on a batch of 2 at 64x64 latents), decoding one 512x512 image, and
encoding a prompt; the same weights in the same precision on both sides, which take turns. A ratio
above 1 means that ours is faster. The last line is JSON.
"""

import argparse
import contextlib
import math
import statistics
import sys
from importlib.metadata import version

import common
import torch

sys.path.insert(0, str(common.ROOT))

from diffusion.models.build import build  # noqa: E402
from diffusion.models.cond import Cond  # noqa: E402
from diffusion.models.configs import CLIPTextConfig, UNetConfig, VAEConfig  # noqa: E402


def fill(model: torch.nn.Module, device, dtype) -> torch.nn.Module:
    """A network from the meta device with random weights, the norms' left at one."""
    model = model.to(dtype).to_empty(device=device)
    g = torch.Generator(device).manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5, generator=g)
        else:
            torch.nn.init.constant_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]))
    return model.eval().requires_grad_(False)


def pair(part: str, device, dtype):
    """(ours, theirs) with the same weights; theirs is None where they are not installed."""
    sizes = {"unet": UNetConfig, "vae": VAEConfig, "text": CLIPTextConfig}[part]()
    try:
        import diffusers
        import transformers
    except ImportError:
        with torch.device("meta"):
            ours = build({"text": "text_encoder"}.get(part, part), sizes)
        return fill(ours, device, dtype), None

    with torch.device("meta"):
        if part == "unet":
            ours = build("unet", sizes)
            theirs = diffusers.UNet2DConditionModel.from_config(ours.config.to_dict())
        elif part == "vae":
            ours = build("vae", sizes)
            theirs = diffusers.AutoencoderKL.from_config(ours.config.to_dict())
        else:
            ours = build("text_encoder", sizes)
            config = transformers.CLIPTextConfig(**sizes.to_dict())
            theirs = transformers.CLIPTextModel(config)
    theirs = fill(theirs, device, dtype)
    state = theirs.state_dict()
    if part == "text":
        state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in state.items()}
        state = {k: v for k, v in state.items() if not k.endswith("position_ids")}
    ours.load_state_dict(state, assign=True)  # the very same tensors
    return ours.eval().requires_grad_(False), theirs


def run_part(part: str, repeats: int, device, dtype) -> tuple[dict[str, float], float]:
    """(median seconds of both, relative difference of what they compute)."""
    ours, theirs = pair(part, device, dtype)
    ours = ours.to(memory_format=torch.channels_last)  # copies: theirs stay as they were
    if part == "unet":
        x = torch.randn(2, 4, 64, 64, device=device, dtype=dtype)
        t = torch.full((2,), 500.0, device=device)
        context = torch.randn(2, 77, 768, device=device, dtype=dtype)
        mine = x.contiguous(memory_format=torch.channels_last)
        calls = {
            "ours": lambda: ours(mine, t, Cond(context)),
            "diffusers": lambda: theirs(x, t, context).sample,
        }
    elif part == "vae":
        z = torch.randn(1, 4, 64, 64, device=device, dtype=dtype)
        calls = {"ours": lambda: ours.decode(z), "diffusers": lambda: theirs.decode(z).sample}
    else:
        ids = torch.randint(0, 49406, (1, 77), device=device)
        calls = {"ours": lambda: ours(ids), "diffusers": lambda: theirs(ids).last_hidden_state}
    difference = math.nan
    if theirs is None:
        del calls["diffusers"]
    else:
        a, b = (calls[name]().float() for name in calls)
        difference = float((a - b).norm() / b.norm())
    times = {name: [] for name in calls}
    for i in range(repeats + 1):  # in turn, in one process: both sides hold the same weights
        for name, call in calls.items():
            times[name] += [common.timed(call, device)][not i :]
    return {k: statistics.median(t) for k, t in times.items()}, difference


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    common.add_device(parser)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--parts", default="unet,vae,text")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    ours, theirs, ratio, difference = {}, {}, {}, {}
    for part in args.parts.split(","):
        found, difference[part] = run_part(part, args.repeats, device, dtype)
        ours[part], theirs[part] = found["ours"], found.get("diffusers", math.nan)
        ratio[part] = theirs[part] / ours[part]
        print(f"{part:>5}: ours {ours[part]:.3f} s, diffusers {theirs[part]:.3f} s, ratio "
              f"{ratio[part]:.2f}, relative difference {difference[part]:.1e}", flush=True)  # fmt: skip
    peer = None
    with contextlib.suppress(ImportError):
        peer = version("diffusers")
    common.report("sd_step", device, {
        "dtype": args.dtype, "diffusers": peer, "repeats": args.repeats,
        "seconds": ours, "diffusers_seconds": theirs, "relative_difference": difference,
        "ratio": ratio,
    })  # fmt: skip


if __name__ == "__main__":
    main()
