#!/usr/bin/env python3
"""Sample images from a trained model.

python sample.py --load_path results/model.pt
python sample.py --load_path results/model.pt --sampler dpmpp_2m --steps 15 --num_images 100
torchrun --nproc_per_node=8 sample.py --load_path results/model.pt --num_images 50000
"""

from pathlib import Path

from diffusion import UserError
from diffusion.config import Parser, run_script


def parse(args: list[str] | None = None):
    # fmt: off
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--load_path", default="results/model.pt", metavar="FILE", help="a model.pt, or an ema.safetensors")
    add("--weights", default="ema", choices=("ema", "raw"), help="averaged weights, or the last step's")
    add("--num_images", type=int, default=16, metavar="N", help="how many")
    add("--batch_size", type=int, default=16, metavar="N", help="images drawn at a time")
    add("--sampler", default="ddim", metavar="NAME", help="ddpm|ddpm_large|ddim|dpmpp_2m|dpmpp_2m_sde")
    add("--steps", type=int, metavar="N", help="network evaluations (default: 50, or all of a shorter schedule)")
    add("--eta", type=float, metavar="X", help="noise of ddim, 0 to 1 (default: the sampler's own)")
    add("--spacing", metavar="NAME", help="leading|trailing|linspace|logsnr (default: the sampler's own)")
    add("--guidance_scale", type=float, default=1.0, metavar="X", help="classifier-free guidance; 1: none")
    add("--guidance_rescale", type=float, default=0.0, metavar="X", help="0 to 1: towards the unguided contrast")
    add("--class_label", metavar="NAME", help="a class by name or number; all: every class in turn (default: no label)")
    add("--seed", type=int, default=0, metavar="N", help="image i of a seed is always the same")
    add("--amp", default="auto", choices=("auto", "no", "bf16", "fp16"), help="mixed precision; no: float32")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    add("--save_folder", default="results", metavar="FOLDER", help="for images/ and grid.png")
    # fmt: on
    return parser.parse_args(args)


def main() -> None:
    args = parse()
    for name in ("num_images", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"{name} is {getattr(args, name)}; it must be above 0")

    from diffusion import distributed as dist
    from diffusion.evaluation.viz import grid, save_png, to_uint8
    from diffusion.pipeline import Pipeline

    device = dist.setup(args.device)
    pipeline = Pipeline.load(args.load_path, args.weights, device)
    folder = Path(args.save_folder)

    def settings(indices) -> dict:
        options = (
            "seed",
            "sampler",
            "steps",
            "eta",
            "spacing",
            "guidance_scale",
            "guidance_rescale",
            "amp",
        )
        chosen = {name: getattr(args, name) for name in options}
        return chosen | {"labels": pipeline.labels(args.class_label, indices)}

    try:
        pipeline.frames([0], **settings([0]))  # builds the table: mistakes show before the work
    except ValueError as error:
        raise UserError(str(error)) from None

    # whole batches go to the ranks in turn, so that an image's batch mates never change
    starts = range(0, args.num_images, args.batch_size)[dist.rank() :: dist.world_size()]
    with dist.progress(total=args.num_images, unit="img") as bar:
        for start in starts:
            indices = range(start, min(start + args.batch_size, args.num_images))
            images = to_uint8(pipeline.sample(indices, **settings(indices)))
            for i, image in zip(indices, images):
                save_png(image, folder / "images" / f"{i:06d}.png")
            bar.update(min(len(indices) * dist.world_size(), args.num_images - bar.n))
    dist.barrier()

    if dist.is_main():
        older = sum(1 for _ in (folder / "images").glob("*.png")) - args.num_images
        if older > 0:
            dist.log(f"warning: {folder / 'images'} also holds {older} pictures from before")
        import numpy as np
        from PIL import Image

        shown = [np.asarray(Image.open(folder / "images" / f"{i:06d}.png"))
                 for i in range(min(args.num_images, 100))]  # fmt: skip
        save_png(grid(np.stack(shown)), folder / "grid.png")
        dist.log(
            f"{args.num_images} images in {folder / 'images'}, the first in {folder / 'grid.png'}"
        )
    dist.cleanup()


if __name__ == "__main__":
    run_script(main)
