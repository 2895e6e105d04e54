#!/usr/bin/env python3
"""A training step: forward, backward, clip, optimizer, EMA; ours against lucidrains'.

python benchmarks/train_step.py [--dim 64] [--batch_size 16] [--repeats 5] [--device cuda]

Peers: denoising-diffusion-pytorch's Unet as its Trainer runs it (float32, eager), and tuned the way
ours is (bf16 autocast, channels_last). Same image size, batch, levels; our width is the multiple of
8 whose forward costs nearest to theirs, and both costs are printed. The sides take turns, medians
are reported; a ratio above 1 means that ours is faster. MFU is the share of the faster of a large
matrix product and a large 3x3 convolution, in bf16. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diffusion.models.unet import UNet  # noqa: E402
from diffusion.process.gaussian import training_loss  # noqa: E402
from diffusion.process.schedule import make_schedule  # noqa: E402
from diffusion.training.ema import EMA  # noqa: E402
from diffusion.training.optimizer import AdamW  # noqa: E402
from diffusion.training.steps import clip_factor  # noqa: E402


def forward_flops(model, size: int) -> int:
    x, t = torch.zeros(1, 3, size, size), torch.zeros(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t)
    return counter.get_total_flops()


def our_width(target: int, mults, size: int) -> int:
    """The width, a multiple of 8, whose forward pass costs nearest to `target` FLOPs."""
    widths = range(8, 257, 8)
    costs = {}
    for dim in widths:
        costs[dim] = forward_flops(UNet(dim, mults), size)
        if costs[dim] > 1.5 * target:
            break
    return min(costs, key=lambda dim: abs(costs[dim] - target))


def our_step(args, dim: int, device):
    torch.manual_seed(0)
    model = UNet(dim, args.mults).to(device, memory_format=torch.channels_last)
    levels = make_schedule("cosine", 1000).to(device)
    optimizer = AdamW(model.parameters(), 1e-4, betas=(0.9, 0.99))
    ema, n = EMA(model, 0.9999), [0]
    x0, eps = (torch.randn(args.batch_size, 3, args.size, args.size, device=device)
               .contiguous(memory_format=torch.channels_last) for _ in range(2))  # fmt: skip
    t = torch.randint(1000, (args.batch_size,), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            loss = training_loss(model, levels, "v", x0, t, eps).mean()
        loss.backward()
        gradients = optimizer.take_gradients()
        norm = torch.nn.utils.get_total_norm(gradients)
        ok = torch.isfinite(norm)
        torch._foreach_mul_(gradients, clip_factor(norm, 1.0))
        optimizer.found_inf = (~ok).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(n[0], ok)
        n[0] += 1

    return model, step


def lucidrains_step(args, device, tuned: bool):
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA as TheirEMA

    torch.manual_seed(0)
    unet = Unet(args.dim, dim_mults=args.mults)
    diffusion = GaussianDiffusion(unet, image_size=args.size, timesteps=1000).to(device)
    if tuned:
        diffusion = diffusion.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(diffusion.parameters(), 1e-4, betas=(0.9, 0.99))
    ema = TheirEMA(diffusion, beta=0.995, update_every=10)
    x = torch.rand(args.batch_size, 3, args.size, args.size, device=device)
    if tuned:
        x = x.contiguous(memory_format=torch.channels_last)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=tuned):
            loss = diffusion(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return unet, step


def peak_flops(device) -> float:
    """FLOP/s in bf16 of the faster of a 4096 matrix product and a wide 3x3 convolution."""
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    x = torch.randn(32, 128, 64, 64, device=device, dtype=torch.bfloat16)
    w = torch.randn(128, 128, 3, 3, device=device, dtype=torch.bfloat16)
    x, w = (v.contiguous(memory_format=torch.channels_last) for v in (x, w))
    work = {2 * 4096**3: lambda: a @ a,
            2 * 32 * 64 * 64 * 128 * 128 * 9: lambda: torch.nn.functional.conv2d(x, w, padding=1)}  # fmt: skip
    best = 0.0
    with torch.no_grad():
        for flops, call in work.items():
            best = max(best, flops / min(timed(call, device) for _ in range(4)))
    return best


def timed(call, device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dim", type=int, default=64, help="lucidrains' width")
    parser.add_argument(
        "--mults", type=lambda s: tuple(map(int, s.split(","))), default=(1, 2, 4, 8)
    )
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    from denoising_diffusion_pytorch import Unet

    theirs = forward_flops(Unet(args.dim, dim_mults=args.mults), args.size)
    dim = our_width(theirs, args.mults, args.size)
    sides = {"ours": our_step(args, dim, device),
             "lucidrains_shipped": lucidrains_step(args, device, tuned=False),
             "lucidrains_tuned": lucidrains_step(args, device, tuned=True)}  # fmt: skip
    times = {name: [] for name in sides}
    for i in range(args.repeats + 2):  # two rounds of warm-up
        for name, (_, step) in sides.items():
            seconds = timed(step, device)
            if i > 1:
                times[name].append(seconds)
    median = {name: statistics.median(t) for name, t in times.items()}
    parameters = {
        name: sum(p.numel() for p in model.parameters()) for name, (model, _) in sides.items()
    }
    ours, peak = forward_flops(UNet(dim, args.mults), args.size), peak_flops(device)
    flops = {"ours": ours} | dict.fromkeys(("lucidrains_shipped", "lucidrains_tuned"), theirs)
    mfu = {name: 3 * flops[name] * args.batch_size / median[name] / peak for name in sides}
    for name in sides:
        print(f"{name:>20}: {args.batch_size / median[name]:7.1f} img/s, {parameters[name] / 1e6:.1f} M "
              f"parameters, {flops[name] / 1e9:.2f} GFLOP forward, MFU {mfu[name]:.1%}")  # fmt: skip
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    machine = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    ratio = {name: median[name] / median["ours"] for name in sides if name != "ours"}
    print(json.dumps({
        "bench": "train_step", "device": device.type, "machine": machine, "torch": torch.__version__,
        "commit": commit.stdout.strip(), "size": args.size, "batch_size": args.batch_size,
        "mults": args.mults, "dim": args.dim, "our_dim": dim, "repeats": args.repeats,
        "seconds": median, "parameters": parameters, "gflop_forward": {k: v / 1e9 for k, v in flops.items()},
        "peak_gflops": peak / 1e9, "mfu": mfu, "ratio": ratio,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
