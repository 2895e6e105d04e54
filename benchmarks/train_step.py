#!/usr/bin/env python3
"""A training step: forward, backward, clip, optimizer, EMA; ours against two peers.

python benchmarks/train_step.py [--dim 64] [--batch_size 16] [--repeats 5] [--compile] [--device cuda]

Peers: denoising-diffusion-pytorch's Unet with its Trainer's step, and diffusers' UNet2DModel as its
unconditional example sets it up; each as shipped (float32, eager) and tuned the way ours is (bf16
autocast, channels_last). Same image size, batch and levels; widths are the multiples of 8 whose
forward passes cost nearest to lucidrains', and all costs are printed. Each side has a process of
its own, they take turns, medians are reported; a ratio above 1 means that ours is faster. MFU is
the share of the faster of a large matrix product and a large 3x3 convolution, in bf16. Also: the
share of clip, optimizer and EMA in our step, against the time their bytes take. Peers need
pip install denoising-diffusion-pytorch diffusers. The last line is JSON.
"""

import argparse
import sys
from functools import partial

import common
import torch
from step import Step

sys.path.insert(0, str(common.ROOT))

from diffusion.config import int_list  # noqa: E402
from diffusion.models.build import build_pixel_unet  # noqa: E402
from diffusion.runtime.distributed import setup  # noqa: E402

# of a parameter: norm 4, clip 8, AdamW 16 + 12, EMA 12; on a GPU norm 4, and 36 in one pass
BYTES = {"cpu": 52, "cuda": 40}


def ours(args, dim: int, update_only: bool = False):
    device = setup(args.device)
    torch.manual_seed(0)
    model = build_pixel_unet(dim, args.mults).to(device)
    if args.compile:
        model.compile()
    step = Step(model, images(args))
    return step.update_alone() if update_only else step


def images(args) -> torch.Tensor:
    shape = (args.batch_size, 3, args.size, args.size)
    x = torch.randn(shape, device=args.device)
    return x.contiguous(memory_format=torch.channels_last)


def peer_step(args, model, loss, optimizer, ema, tuned: bool):
    """loss(x) -> (); x as the peers take it."""
    if tuned:
        model.to(memory_format=torch.channels_last)
    if args.compile:
        model.compile()
    x = images(args) if tuned else images(args).contiguous()

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=tuned):
            value = loss(x)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema()

    return step


def lucidrains(args, tuned: bool):
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA as TheirEMA

    torch.manual_seed(0)
    unet = Unet(args.dim, dim_mults=args.mults)
    diffusion = GaussianDiffusion(unet, image_size=args.size, timesteps=1000).to(args.device)
    optimizer = torch.optim.Adam(diffusion.parameters(), 1e-4, betas=(0.9, 0.99))
    ema = TheirEMA(diffusion, beta=0.995, update_every=10)
    return peer_step(
        args, diffusion, lambda x: diffusion(x.sigmoid()), optimizer, ema.update, tuned
    )


def diffusers(args, width: int, tuned: bool):
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    model = common.diffusers_model(width, args.size).to(args.device)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)

    def loss(x):
        noise = torch.randn_like(x)
        t = torch.randint(0, 1000, (len(x),), device=x.device)
        out = model(scheduler.add_noise(x, noise, t), t).sample
        return torch.nn.functional.mse_loss(out.float(), noise)

    step = lambda: ema.step(model.parameters())  # noqa: E731
    return peer_step(args, model, loss, optimizer, step, tuned)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_device(parser)
    parser.add_argument("--dim", type=int, default=64, help="lucidrains' width")
    parser.add_argument("--mults", type=int_list, default=(1, 2, 4, 8))
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="all sides with torch.compile")
    args = parser.parse_args()
    device = torch.device(args.device)
    dim, width, flops = common.equal_costs(args.dim, args.mults, args.size)
    costs = {name: round(count / 1e9, 2) for name, count in flops.items()}
    print("GFLOP of a forward pass:", costs, flush=True)
    sides = {"ours": partial(ours, args, dim), "ours_update": partial(ours, args, dim, True)}
    peers = {"lucidrains": lucidrains, "diffusers": partial(diffusers, width=width)}
    for name, build in peers.items():
        if name not in flops:
            print(f"{name}: not installed")
            continue
        for how in ("shipped", "tuned"):
            sides[f"{name}_{how}"] = partial(build, args, tuned=how == "tuned")
    seconds, memory = common.in_turn(sides, device, args.repeats)
    peak, speed = common.peak_flops(device), common.bandwidth(device)
    update = seconds.pop("ours_update")
    parameters = sum(p.numel() for p in build_pixel_unet(dim, args.mults).parameters())
    mfu = {name: 3 * flops[name.split("_")[0]] * args.batch_size / s / peak
           for name, s in seconds.items()}  # fmt: skip
    ratio = {name: s / seconds["ours"] for name, s in seconds.items() if name != "ours"}
    for name, s in seconds.items():
        cost = flops[name.split("_")[0]]
        print(f"{name:>20}: {args.batch_size / s:7.1f} img/s, {cost / 1e9:.2f} GFLOP forward, MFU "
              f"{mfu[name]:.1%}, {memory[name] / 2**30:.1f} GiB; ours / this "
              f"{s / seconds['ours']:.2f}")  # fmt: skip
    bound = parameters * BYTES[device.type] / speed
    print(f"clip, optimizer and EMA: {update / seconds['ours']:.1%} of our step, {update * 1e3:.0f} ms, "
          f"{update / bound:.2f} times what their bytes take at {speed / 1e9:.0f} GB/s")  # fmt: skip
    common.report("train_step", device, {
        "size": args.size, "batch_size": args.batch_size, "mults": args.mults, "dim": args.dim,
        "our_dim": dim, "diffusers_width": width, "compile": args.compile, "repeats": args.repeats,
        "seconds": seconds, "memory_bytes": memory, "parameters": parameters,
        "gflop_forward": {k: v / 1e9 for k, v in flops.items()}, "peak_gflops": peak / 1e9,
        "mfu": mfu, "ratio": ratio, "update_seconds": update, "update_bound_seconds": bound,
    })  # fmt: skip


if __name__ == "__main__":
    main()
