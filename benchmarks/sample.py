#!/usr/bin/env python3
"""Images a second, end to end, from noise to pixels: ours against lucidrains' and diffusers'.

python benchmarks/sample.py [--counts 1,16,128] [--steps 50] [--repeats 5] [--compile]

DDIM of `--steps` network evaluations; peers as shipped (float32), and in bf16 channels_last as ours
runs where the machine has it. Widths such that all forward passes cost the same (printed). The
sides take turns, medians are reported; a ratio above 1 means that ours is faster. ours_dpmpp_2m is
DPM-Solver++(2M) of 15 evaluations, which on cats is better than DDIM's 50 (docs/log.md). Peers need
pip install denoising-diffusion-pytorch diffusers. The last line is JSON.
"""

import argparse
import sys
from functools import partial

import common
import torch

sys.path.insert(0, str(common.ROOT))

from diffusion.config import Config, int_list  # noqa: E402
from diffusion.models.build import build_pixel_unet  # noqa: E402
from diffusion.pictures.grid import to_uint8  # noqa: E402
from diffusion.process.schedule import make_schedule  # noqa: E402
from diffusion.runtime.distributed import setup  # noqa: E402
from diffusion.sampling.pipeline import Pipeline  # noqa: E402

CL = torch.channels_last


def ours(args, dim: int, n: int, compiled: bool = False, **options):
    """A call that draws n images."""
    device = setup(args.device)
    torch.manual_seed(0)
    model = build_pixel_unet(dim, args.mults).to(device).eval().requires_grad_(False)
    config = Config(image_size=args.size, unet_dim=dim, dim_mults=args.mults)
    pipeline = Pipeline(config, model, make_schedule("cosine", 1000), device=device)
    pipeline.compiled = compiled
    options = dict(sampler="ddim", steps=args.steps) | options
    return lambda: to_uint8(pipeline.sample(range(n), **options))


def lucidrains(args, n: int, dtype=None):
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as module

    module.tqdm = lambda it, **_: it
    torch.manual_seed(0)
    unet = Unet(args.dim, dim_mults=args.mults)
    diffusion = GaussianDiffusion(unet, image_size=args.size, timesteps=1000,
                                  sampling_timesteps=args.steps).to(args.device).eval()  # fmt: skip
    if dtype is not None:
        diffusion = diffusion.to(memory_format=CL)

    def draw():
        with torch.autocast(args.device, dtype, enabled=dtype is not None):
            return to_uint8(2 * diffusion.sample(n).float() - 1)

    return draw


def diffusers(args, width: int, n: int, dtype=None):
    from diffusers import DDIMPipeline, DDIMScheduler

    torch.manual_seed(0)
    model = common.diffusers_model(width, args.size).eval()
    pipeline = DDIMPipeline(model, DDIMScheduler(num_train_timesteps=1000)).to(args.device)
    if dtype is not None:
        model.to(memory_format=CL)
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        with torch.autocast(args.device, dtype, enabled=dtype is not None):
            return pipeline(batch_size=n, num_inference_steps=args.steps, output_type="np")

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_device(parser)
    parser.add_argument("--dim", type=int, default=64, help="lucidrains' width")
    parser.add_argument("--mults", type=int_list, default=(1, 2, 4, 8))
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--counts", type=int_list, default=(1, 16, 128))
    parser.add_argument("--compile", action="store_true", help="also ours with torch.compile")
    args = parser.parse_args()
    device, bf16 = torch.device(args.device), torch.bfloat16
    dim, width, cost = common.equal_costs(args.dim, args.mults, args.size)
    print("GFLOP of a forward pass:", {k: round(v / 1e9, 2) for k, v in cost.items()}, flush=True)
    images, ratio = {}, {}
    for n in args.counts:
        mine = partial(ours, args, dim, n)
        sides = {
            "ours": mine, "ours_float32": partial(mine, amp="no"),
            "ours_dpmpp_2m": partial(mine, sampler="dpmpp_2m", steps=15),
            "lucidrains_shipped": partial(lucidrains, args, n),
            "lucidrains_bf16": partial(lucidrains, args, n, bf16),
            "diffusers_shipped": partial(diffusers, args, width, n),
            "diffusers_bf16": partial(diffusers, args, width, n, bf16),
        }  # fmt: skip
        sides = {name: side for name, side in sides.items() if name.split("_")[0] in cost}
        if args.compile:
            sides["ours_compiled"] = partial(mine, compiled=True)
        if device.type == "cuda":
            sides["ours_graph"] = partial(mine, cuda_graph=True)
        repeats = args.repeats if n < 100 or device.type == "cuda" else 1
        median, _ = common.in_turn(sides, device, repeats, warm_up=1)
        images[n] = {name: n / s for name, s in median.items()}
        ratio[n] = {name: s / median["ours"] for name, s in median.items() if name != "ours"}
        for name in median:
            print(f"{n:4d} images, {name:>18}: {images[n][name]:8.3f} img/s; ours / this "
                  f"{median[name] / median['ours']:.2f}", flush=True)  # fmt: skip
    common.report("sample", device, {
        "size": args.size, "steps": args.steps, "dim": args.dim, "our_dim": dim,
        "diffusers_width": width, "gflop_forward": {k: v / 1e9 for k, v in cost.items()},
        "images_per_second": images, "ratio": ratio,
    })  # fmt: skip


if __name__ == "__main__":
    main()
