#!/usr/bin/env python3
"""Sample images from a trained model, or from Stable Diffusion.

python sample.py --load_path results/model.pt
python sample.py --load_path results/model.pt --sampler dpmpp_2m --steps 15 --num_images 100
python sample.py --sd_path stable-diffusion-v1-5 --prompt "a red fox" --sampler dpmpp_2m --steps 25
torchrun --nproc_per_node=8 sample.py --load_path results/model.pt --num_images 50000
"""

import math
from pathlib import Path

from diffusion import UserError
from diffusion.config import Parser, run_script

# what does nothing, and so is refused, without what
NEEDS = (("negative_prompt", "prompt"), ("mask", "init_image"), ("strength", "init_image"),
         ("points", "lora_interpolate"))  # fmt: skip


def parse(args: list[str] | None = None):
    # fmt: off
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--load_path", metavar="FILE", help="a model.pt, or an ema.safetensors (default: results/model.pt)")
    add("--weights", choices=("ema", "raw"), help="averaged weights, or the last step's (default: ema; raw of other programs' files, whose model_ema.* is often stale)")
    add("--num_images", type=int, metavar="N", help="how many (default: one for each prompt, 16 without)")
    add("--batch_size", type=int, default=16, metavar="N", help="images drawn at a time")
    add("--sampler", default="ddim", metavar="NAME", help="ddpm|ddpm_large|ddim|dpmpp_2m|dpmpp_2m_sde")
    add("--steps", type=int, metavar="N", help="network evaluations (default: 50, or all of a shorter schedule)")
    add("--eta", type=float, metavar="X", help="noise of ddim, 0 to 1 (default: the sampler's own)")
    add("--spacing", metavar="NAME", help="leading|trailing|linspace|logsnr (default: the sampler's or the model's own)")
    add("--guidance_scale", type=float, metavar="X", help="classifier-free guidance; 1: none (default: 7.5 with prompts, else 1)")
    add("--guidance_rescale", type=float, default=0.0, metavar="X", help="0 to 1: towards the unguided contrast")
    add("--class_label", metavar="NAME", help="a class by name or number; all: every class in turn (default: no label)")
    add("--seed", type=int, default=0, metavar="N", help="image i of a seed is always the same")
    add("--amp", default="auto", choices=("auto", "no", "bf16", "fp16"), help="mixed precision; no: float32")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    add("--cuda_graph", default="auto", choices=("auto", "on", "off"), help="launch each step as a whole; auto: on GPUs")
    add("--compile", action="store_true", help="torch.compile the network: a minute to start, then faster")
    add("--save_folder", default="results", metavar="FOLDER", help="for images/ and grid.png")

    add = parser.add_argument_group("latent models").add_argument
    add("--sd_path", metavar="PATH", help="Stable Diffusion 1.x: a diffusers folder, or a .safetensors or .ckpt file")
    add("--config", metavar="FOLDER", help="configs and tokenizer of a single file of other sizes than 1.5's")
    add("--objective", choices=("eps", "v", "x0"), help="what the model of --sd_path predicts (default: as it states, else eps)")
    add("--vae", metavar="PATH", help="another VAE than the one the model was trained with")
    add("--prompt", action="append", metavar="TEXT", help="what to draw; may be given again; @FILE: a prompt per line")
    add("--negative_prompt", default="", metavar="TEXT", help="what guidance leads away from")
    add("--height", type=int, metavar="N", help="in pixels (default: the model's own)")
    add("--width", type=int, metavar="N", help="in pixels (default: the model's own)")
    add("--clip_skip", type=int, metavar="N", help="text encoder layer from the end; 1: the last (default: the model's own)")
    add("--vae_tiling", action="store_true", help="decode in overlapping tiles: less memory for large images")
    add("--sequential_guidance", action="store_true", help="two network calls per step in half the memory")

    add = parser.add_argument_group("adapters").add_argument
    add("--lora", action="append", type=weighted, default=[], metavar="FILE[:X]", help="LoRA of train.py, kohya, diffusers or peft, and its weight; may be given again")
    add("--embedding", action="append", default=[], metavar="FILE", help="textual inversion, whose token --prompt may use; may be given again")
    add("--lora_interpolate", nargs=2, type=weighted, default=[], metavar=("A", "B"), help="draw interpolation.png instead: from the one LoRA to the other")
    add("--points", type=int, metavar="N", help="its columns (default: 5)")

    add = parser.add_argument_group("from an image").add_argument
    add("--init_image", metavar="FILE", help="start from this image, noised")
    add("--strength", type=float, metavar="X", help="share of the steps that is run on it, 0 to 1 (default: 0.8)")
    add("--mask", metavar="FILE", help="image that is white where new content goes; the rest of init_image stays")
    # fmt: on
    args = parser.parse_args(args)
    args.prompt = [line for text in args.prompt or [] for line in prompts_of(text)]
    if args.num_images is None:
        args.num_images = len(args.prompt) or (4 if args.lora_interpolate else 16)
    if args.guidance_scale is None:
        args.guidance_scale = 7.5 if args.prompt else 1.0
    for name, needed in NEEDS:
        if getattr(args, name) not in (None, "") and not getattr(args, needed):
            raise UserError(f"--{name} does nothing by itself: give --{needed} as well")
    if (args.guidance_rescale or args.sequential_guidance) and args.guidance_scale == 1:
        raise UserError("--guidance_rescale and --sequential_guidance change how --guidance_scale "
                        "works; it is 1, which is no guidance")  # fmt: skip
    args.points = 5 if args.points is None else args.points
    args.strength = 0.8 if args.strength is None else args.strength
    for name in ("num_images", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"{name} is {getattr(args, name)}; it must be above 0")
    if args.points < 2:
        raise UserError(f"points is {args.points}; it must be at least 2")
    return args


def weighted(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT; without one the weight is 1."""
    path, mark, weight = text.rpartition(":")
    try:
        known = (path, float(weight)) if mark and path else (text, 1.0)
    except ValueError:
        return text, 1.0
    if not math.isfinite(known[1]):
        raise UserError(f"--lora {text}: the weight is {known[1]}; it must be a number")
    return known


def prompts_of(text: str) -> list[str]:
    """The prompt itself, or the lines of @FILE."""
    if not text.startswith("@"):
        return [text]
    try:
        lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--prompt {text}: {text[1:]} cannot be read: {reason}") from None
    if not any(lines):
        raise UserError(f"--prompt {text}: the file holds no prompt")
    return [line for line in lines if line.strip()]


def read_start(pipeline, init_image: str | None, mask: str | None) -> dict:
    """init (1, C, H, W) and mask (1, 1, H, W) as `Pipeline.frames` takes them; {} without."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from diffusion.data.images import BadImage, read_image

    if init_image is None:
        return {}
    h, w = pipeline.image_hw

    def read(path: str) -> Image.Image:
        try:
            return ImageOps.fit(
                Image.fromarray(read_image(Path(path), None)), (w, h), Image.LANCZOS
            )
        except BadImage as error:
            raise UserError(f"{path}: {error}") from None

    pixels = torch.from_numpy(np.array(read(init_image))).permute(2, 0, 1)[None]
    start = {"init": pipeline.encode(pixels.float() / 127.5 - 1)}
    if mask is not None:
        white = torch.from_numpy(np.array(read(mask).convert("L"))).float()[None, None] / 255
        size = start["init"].shape[-2:]
        start["mask"] = (torch.nn.functional.interpolate(white, size, mode="area") > 0.5).float()
    return start


def parameters(args, pipeline, index: int, image) -> str:
    """How image `index` came about, as other programs read it."""
    from diffusion.evaluation.viz import SAMPLER_NAMES, parameters_text

    prompt = args.prompt[index % len(args.prompt)] if args.prompt else None
    settings = {
        "Steps": len(pipeline.table(args.sampler, args.steps)),
        "Sampler": SAMPLER_NAMES[args.sampler], "CFG scale": args.guidance_scale,
        "Seed": args.seed, "Image": index, "Size": f"{image.shape[1]}x{image.shape[0]}",
        "Model": Path(args.load_path or args.sd_path or "results/model.pt").stem,
        "Clip skip": args.clip_skip, "Class": args.class_label,
        "Denoising strength": args.strength if args.init_image else None,
        "Lora": ", ".join(f"{Path(path).stem}:{weight:g}" for path, weight in args.lora) or None,
    }  # fmt: skip
    return parameters_text(prompt, args.negative_prompt if args.prompt else "", settings)


def interpolate(args, pipeline, settings, path: Path) -> None:
    """A strip: row i image i, columns from the last LoRA but one to the last, (1 - w) and w."""
    import numpy as np

    from diffusion import distributed as dist
    from diffusion.adapters import set_weights
    from diffusion.evaluation.viz import save_png, strip, to_uint8

    first, last = len(args.lora), len(args.lora) + 1
    (_, a), (_, b) = args.lora_interpolate
    columns, shares = [], np.linspace(0, 1, args.points)
    with dist.progress(total=args.num_images * args.points, unit="img") as bar:
        for w in shares:
            set_weights(pipeline, {str(first): (1 - w) * a, str(last): w * b})
            column = []
            for low in range(0, args.num_images, args.batch_size):
                indices = range(low, min(low + args.batch_size, args.num_images))
                column.append(to_uint8(pipeline.sample(indices, **settings(indices))))
                bar.update(len(indices))
            columns.append(np.concatenate(column))
    save_png(strip(np.stack(columns, 1), [f"{w:.2g}" for w in shares]), path)
    dist.log(f"{path}: from {args.lora_interpolate[0][0]} to {args.lora_interpolate[1][0]}")


def main() -> None:
    args = parse()

    from diffusion import distributed as dist
    from diffusion.adapters import warn_unused
    from diffusion.assemble import open_pipeline
    from diffusion.evaluation.viz import grid, save_png, to_uint8
    from diffusion.weights.loader import check_averaged

    device = dist.setup(args.device)
    if args.cuda_graph == "on" and device.type != "cuda":
        raise UserError(f"--cuda_graph on needs a CUDA device; this is {device.type}")
    if args.weights == "ema" and args.load_path is None and args.sd_path is not None:
        check_averaged(args.sd_path, "--weights")
    pipeline = open_pipeline(
        args.load_path, args.sd_path, args.weights, device, amp=args.amp, config=args.config,
        vae=args.vae, clip_skip=args.clip_skip, height=args.height, width=args.width,
        tiling=args.vae_tiling, loras=[*args.lora, *args.lora_interpolate],
        embeddings=args.embedding, merged=not args.lora_interpolate, objective=args.objective,
    )  # fmt: skip
    pipeline.compiled = args.compile
    guided = args.guidance_scale != 1  # else the negative prompt is not read
    warn_unused(pipeline, [*args.prompt, *([args.negative_prompt] if guided else [])])
    folder = Path(args.save_folder)
    start = read_start(pipeline, args.init_image, args.mask)
    prompted = pipeline.prompted(args.prompt, args.negative_prompt) if args.prompt else None

    def settings(indices) -> dict:
        same = ("seed", "sampler", "steps", "eta", "spacing", "guidance_scale", "guidance_rescale", "amp")  # fmt: skip
        chosen = {name: getattr(args, name) for name in same}
        chosen["cuda_graph"] = (
            args.cuda_graph == "on" or args.cuda_graph == "auto" and device.type == "cuda"
        )
        chosen["labels"] = pipeline.labels(args.class_label, indices)
        if args.prompt:
            chosen |= prompted(indices)
        if args.sequential_guidance:
            chosen["batched"] = False
        if start:
            n = len(indices)
            chosen |= {k: v.expand(n, *v.shape[1:]) for k, v in start.items()}
            chosen["strength"] = args.strength
        return chosen

    try:
        pipeline.frames([0], **settings([0]))  # builds the table: mistakes show before the work
    except ValueError as error:
        raise UserError(str(error)) from None

    if args.lora_interpolate:
        if dist.is_main():
            interpolate(args, pipeline, settings, folder / "interpolation.png")
        dist.barrier()
        dist.cleanup()
        return

    # whole batches go to the ranks in turn, so that an image's batch mates never change
    starts = range(0, args.num_images, args.batch_size)[dist.rank() :: dist.world_size()]
    with dist.progress(total=args.num_images, unit="img") as bar:
        for low in starts:
            indices = range(low, min(low + args.batch_size, args.num_images))
            images = to_uint8(pipeline.sample(indices, **settings(indices)))
            for i, image in zip(indices, images):
                path = folder / "images" / f"{i:06d}.png"
                save_png(image, path, {"parameters": parameters(args, pipeline, i, image)})
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
