"""Sample images from a trained model, or from Stable Diffusion.

python sample.py --load_path results/model.pt
python sample.py --load_path results/model.pt --sampler dpmpp_2m --steps 15 --num_images 100
python sample.py --sd_path stable-diffusion-v1-5 --prompt "a red fox" --sampler dpmpp_2m --steps 25
torchrun --nproc_per_node=8 sample.py --load_path results/model.pt --num_images 50000
"""

import contextlib
from pathlib import Path

from .. import UserError
from ..config import Parser
from ..rules import MOST_LORA, SAMPLERS, SPACINGS, check_bounds, check_options


def parse(args: list[str] | None = None):
    # fmt: off
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--load_path", metavar="FILE", help="a model.pt, or an ema.safetensors (default: results/model.pt)")
    add("--weights", choices=("ema", "raw"), help="averaged weights, or the last step's (default: ema; raw of other programs' files, whose model_ema.* is often stale)")
    add("--num_images", type=int, metavar="N", help="how many (default: one for each prompt, 16 without)")
    add("--batch_size", type=int, default=16, metavar="N", help="images sampled at a time")
    add("--sampler", default="ddim", metavar="NAME", help="|".join(SAMPLERS))
    add("--steps", type=int, metavar="N", help="network evaluations (default: 50, or all of a shorter schedule)")
    add("--eta", type=float, metavar="X", help="noise of ddim, 0 to 1 (default: the sampler's own)")
    add("--spacing", metavar="NAME", help=f"{'|'.join(SPACINGS)} (default: the sampler's or the model's own)")
    add("--guidance_scale", type=float, metavar="X", help="classifier-free guidance; 1: none (default: 7.5 with prompts, else 1)")
    add("--guidance_rescale", type=float, default=0.0, metavar="X", help="0 to 1: towards the unguided contrast")
    add("--class_label", metavar="NAME", help="a class by name or number; all: every class in turn (default: no label)")
    add("--seed", type=int, default=0, metavar="N", help="image i of a seed is always the same")
    add("--amp", default="auto", choices=("auto", "no", "bf16", "fp16"), help="mixed precision; no: float32")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    add("--cuda_graph", default="auto", choices=("auto", "on", "off"), help="launch each step as a whole; auto: on GPUs")
    add("--compile", action="store_true", help="torch.compile the network: a minute to start, then faster")
    add("--save_folder", default="results", metavar="FOLDER", help="for images/ and grid.png; what is there stays, and numbers continue")
    add("--overwrite", action="store_true", help="replace the pictures that this program wrote there")

    add = parser.add_argument_group("latent models").add_argument
    add("--sd_path", metavar="PATH", help="Stable Diffusion 1.x: a diffusers folder, or a .safetensors or .ckpt file")
    add("--config", metavar="FOLDER", help="configs and tokenizer of a single file of other sizes than 1.5's")
    add("--objective", choices=("eps", "v", "x0"), help="what the model of --sd_path predicts (default: as it states, else eps)")
    add("--vae", metavar="PATH", help="another VAE than the one the model was trained with")
    add("--prompt", action="append", metavar="TEXT", help="what to draw; may be given again; @FILE: a prompt per line, @@TEXT: @TEXT itself")
    add("--negative_prompt", default="", metavar="TEXT", help="what guidance leads away from")
    add("--height", type=int, metavar="N", help="in pixels (default: the model's own, or by the aspect of init_image)")
    add("--width", type=int, metavar="N", help="in pixels (default: the model's own, or by the aspect of init_image)")
    add("--clip_skip", type=int, metavar="N", help="text encoder layer from the end; 1: the last (default: the model's own)")
    add("--vae_tiling", action="store_true", help="decode in overlapping tiles: less memory for large images")
    add("--sequential_guidance", action="store_true", help="two network calls per step in half the memory")

    add = parser.add_argument_group("adapters").add_argument
    add("--lora", action="append", type=weighted, default=[], metavar="FILE[:X]", help="LoRA of train.py, kohya, diffusers or peft, and its weight; may be given again")
    add("--embedding", action="append", default=[], metavar="FILE", help="textual inversion, whose token --prompt may use; may be given again")
    add("--lora_interpolate", nargs=2, type=weighted, default=[], metavar=("A", "B"), help="draw interpolation.png instead: from the one LoRA to the other")
    add("--points", type=int, default=5, metavar="N", help="its columns")

    add = parser.add_argument_group("from an image").add_argument
    add("--init_image", metavar="FILE", help="start from this image, noised, in its aspect unless --height and --width are given")
    add("--strength", type=float, default=0.8, metavar="X", help="fraction of the steps that is run on it, above 0 to 1; at 1 a mask's part starts from noise")
    add("--mask", metavar="FILE", help="image of the same size, white where new content goes; black and transparent stay")
    # fmt: on
    args = parser.parse_args(args)
    if args.prompt:
        from ..files.validate import prompts_of

        args.prompt = prompts_of(args.prompt)
    if args.num_images is None:
        args.num_images = len(args.prompt or ()) or (4 if args.lora_interpolate else 16)
    if args.guidance_scale is None:
        args.guidance_scale = 7.5 if args.prompt else 1.0
    for path, weight in (*args.lora, *args.lora_interpolate):
        if not abs(weight) <= MOST_LORA:
            raise UserError(
                f"--lora {path}: the weight is {weight}; it must be finite, from "
                f"-{MOST_LORA} to {MOST_LORA}"
            )
    check_options(args, parser.defaults | {"guidance_scale": 1.0}, "sample")
    return args


def weighted(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT; without one the weight is 1."""
    path, mark, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if mark and path else (text, 1.0)
    except ValueError:
        return text, 1.0


# --- from an image -------------------------------------------------------------------------------


def read_start(
    pipeline,
    init_image: str | None,
    mask: str | None = None,
    height: int | None = None,
    width: int | None = None,
) -> dict:
    """Read init (1, C, H, W) and mask (1, 1, H, W) as `Pipeline.frames` takes them; {} without.

    A latent pipeline takes the image's aspect where height and width do not say otherwise.
    Raises UserError for files that cannot be read, and for a mask of another size than the image.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from ..data.images import BadImage, read_image, read_mask
    from ..runtime.distributed import log

    if init_image is None:
        return {}

    def read(path: str, reader) -> Image.Image:
        try:
            return Image.fromarray(reader(Path(path)))
        except BadImage as error:
            raise UserError(f"{path}: {error}") from None

    image = read(init_image, lambda path: read_image(path, None))
    if pipeline.codec.factor > 1:
        pipeline.set_size(*size_like(image, pipeline, height, width))
    H, W = pipeline.image_hw
    scale = max(W / image.width, H / image.height)
    cut = round(image.width - W / scale), round(image.height - H / scale)
    what = "" if cut == (0, 0) else f", without {cut[0]} columns and {cut[1]} rows at its edges"
    log(f"{init_image}: {image.width}x{image.height} becomes {W}x{H}{what}")

    def fitted(picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(ImageOps.fit(picture, (W, H), Image.LANCZOS)))

    start = {"init": pipeline.encode(fitted(image).permute(2, 0, 1)[None].float() / 127.5 - 1)}
    if mask is not None:
        strokes = read(mask, read_mask)
        (w, h) = image.size
        (w_m, h_m) = strokes.size
        if min(abs(w * h_m / h - w_m), abs(h * w_m / w - h_m)) > 1:  # beyond rounding
            raise UserError(
                f"--mask {mask} has {w_m}x{h_m} pixels, and --init_image {init_image} "
                f"{w}x{h}: give a mask of the image's size, or of its aspect"
            )
        white = fitted(strokes.resize(image.size, Image.LANCZOS)).float()[None, None] / 255
        size = start["init"].shape[-2:]
        start["mask"] = (torch.nn.functional.interpolate(white, size, mode="area") > 0.5).float()
        if not start["mask"].any():
            raise UserError(
                f"--mask {mask} repaints nothing: it is white nowhere, or in spots too "
                "small for this model; paint white what to repaint"
            )
    return start


def size_like(image, pipeline, height: int | None, width: int | None) -> tuple[int, int]:
    """Choose (height, width) in the aspect of an image, with about as many pixels as the model's own.

    One that is given stays; sides are multiples of the VAE's factor.
    """
    aspect = image.width / image.height
    factor = pipeline.codec.factor
    side = pipeline.config.image_size

    def rounded(pixels: float) -> int:
        return max(factor, round(pixels / factor) * factor)

    if height is None and width is None:
        height = rounded(side / aspect**0.5)
        width = rounded(side * aspect**0.5)
    elif height is None:
        height = rounded(width / aspect)
    elif width is None:
        width = rounded(height * aspect)
    check_bounds({"height": height, "width": width})  # of an image that is all length
    return height, width


# --- what is written -----------------------------------------------------------------------------


COMMON = {
    "model",
    "ema",
    "best",
    "adapter",
    "adapter_kohya",
    "adapter_model",
    "learned_embeds",
    "pytorch_lora_weights",
    "diffusion_pytorch_model",
    "vae",
}


def name_of(path: str | Path | None) -> str | None:
    """Name a file without its suffix, or a folder; what many are called, with its folder."""
    if path is None:
        return None
    path = Path(path)
    name = path.name if path.is_dir() else path.stem
    parent = path.resolve().parent.name
    return f"{parent}/{name}" if name in COMMON and parent else name


def parameters(args, pipeline, options: dict, row: int, index: int, image) -> str:
    """Describe how a picture came about, as other programs read it.

    options: those of `Pipeline.sample` that it was sampled with, in which it is row `row`.
    """
    from ..pictures.grid import SAMPLER_NAMES, parameters_text

    table = options["table"]
    labels = options["labels"]
    prompt, negative = (
        options.get(name, [None] * (row + 1))[row] for name in ("prompts", "negative_prompts")
    )
    guided = options["guidance_scale"] != 1
    vae = args.vae or (pipeline.config.vae if pipeline.config.mode == "latent" else None)

    settings = {
        "Steps": table.steps,
        "Sampler": SAMPLER_NAMES.get(table.sampler, table.sampler),
        "CFG scale": options["guidance_scale"],
        "Seed": options["seed"],
        "Image": index,
        "Size": f"{image.shape[1]}x{image.shape[0]}",
        "Model": name_of(args.load_path or args.sd_path or "results/model.pt"),
        "Weights": args.weights,
        "VAE": name_of(vae),
        "Clip skip": pipeline.clip_skip,
        "Class": None if labels is None else pipeline.classes[labels[row]],
        "Denoising strength": table.strength if "init" in options else None,
        "Init image": args.init_image and Path(args.init_image).name,
        "Mask": args.mask and Path(args.mask).name,
        "Spacing": table.spacing,
        "Eta": table.eta,
        "Guidance rescale": (options["guidance_rescale"] or None) if guided else None,
        "Lora": ", ".join(map(weight_of, args.lora)) or None,
        "Lora interpolation": " to ".join(map(weight_of, args.lora_interpolate)) or None,
        "Embeddings": ", ".join(map(name_of, args.embedding)) or None,
        "Objective": pipeline.config.objective,
        "Precision": pipeline.precision(options["amp"]),
        "VAE tiling": "on" if args.vae_tiling else None,
    }
    return parameters_text(prompt, negative if guided else "", settings)


def weight_of(lora: tuple[str, float]) -> str:
    """Write a LoRA and its weight as --lora takes them."""
    return f"{name_of(lora[0])}:{lora[1]:.10g}"


def interpolate(args, pipeline, settings, path: Path) -> None:
    """A strip: row i image i, columns from the last LoRA but one to the last, (1 - w) and w."""
    import numpy as np

    from ..files.output import write_free
    from ..pictures.grid import strip, to_uint8, write_png
    from ..runtime import distributed as dist
    from ..sampling.adapt import set_weights

    first = len(args.lora)
    last = len(args.lora) + 1
    (_, a), (_, b) = args.lora_interpolate
    columns = []
    fractions = np.linspace(0, 1, args.points)
    with dist.progress(total=args.num_images * args.points, unit="img") as bar:
        for w in fractions:
            set_weights(pipeline, {str(first): (1 - w) * a, str(last): w * b})
            column = []
            for low in range(0, args.num_images, args.batch_size):
                indices = range(low, min(low + args.batch_size, args.num_images))
                options = settings(indices)
                images = pipeline.sample(indices, **options)
                column.append(to_uint8(images, indices))
                bar.update(len(indices))
            columns.append(np.concatenate(column))
    picture = strip(np.stack(columns, 1), [f"{w:.2g}" for w in fractions])
    text = {"parameters": parameters(args, pipeline, options, 0, 0, column[0][0])}
    path = write_free(path, lambda p: write_png(picture, p, text), args.overwrite)
    dist.log(f"{path}: from {args.lora_interpolate[0][0]} to {args.lora_interpolate[1][0]}")


def sample_all(args, pipeline, settings, folder: Path) -> None:
    """Write images/, on all ranks, and a grid of the first."""
    import numpy as np
    from PIL import Image

    from ..files.output import drop_others, reserve, write_free
    from ..pictures.grid import grid, to_uint8, write_png
    from ..runtime import distributed as dist

    count = args.num_images
    place = folder / "images"
    with contextlib.ExitStack() as held:
        numbers = None
        if dist.is_main():
            numbers = held.enter_context(reserve(place, count, args.overwrite))
        numbers = dist.from_main(numbers)
        if numbers.older and not args.overwrite:
            dist.log(
                f"{place} holds {numbers.older} pictures from before: these are numbered from "
                f"{numbers.first}"
            )

        # whole batches go to the ranks in turn, so that an image's batch mates never change
        starts = range(0, count, args.batch_size)[dist.rank() :: dist.world_size()]
        with dist.progress(total=count, unit="img") as bar:
            for low in starts:
                indices = range(low, min(low + args.batch_size, count))
                options = settings(indices)
                images = to_uint8(pipeline.sample(indices, **options), indices)
                for row, (i, image) in enumerate(zip(indices, images)):
                    text = {"parameters": parameters(args, pipeline, options, row, i, image)}
                    numbers.save(i, lambda path: write_png(image, path, text))
                bar.update(min(len(indices) * dist.world_size(), count - bar.n))
        dist.barrier()

        if dist.is_main():
            if args.overwrite and (dropped := numbers.drop_older()):
                dist.log(f"{dropped} other pictures of earlier calls are deleted")
                drop_others(folder / "grid.png")
            shown = [np.asarray(Image.open(numbers.file(i))) for i in range(min(count, 100))]
            sheet = grid(np.stack(shown))
            path = write_free(
                folder / "grid.png", lambda path: write_png(sheet, path), args.overwrite
            )
            last = numbers.file(count - 1).name
            dist.log(
                f"{count} images in {place}, {numbers.file(0).name} to {last}, the first in {path}"
            )


def main() -> None:
    args = parse()

    from ..files.sd_files import check_averaged
    from ..runtime import distributed as dist
    from ..sampling.adapt import warn_unused
    from ..sampling.load import open_pipeline

    device = dist.setup(args.device)
    if args.cuda_graph == "on" and device.type != "cuda":
        raise UserError(f"--cuda_graph on needs a CUDA device; this is {device.type}")
    foreign = args.load_path is None and args.sd_path is not None
    if args.weights == "ema" and foreign:
        check_averaged(args.sd_path, "--weights")
    if args.weights is None and not (foreign and Path(args.sd_path).is_dir()):
        args.weights = "raw" if foreign else "ema"
    pipeline = open_pipeline(
        args.load_path,
        args.sd_path,
        args.weights,
        device,
        amp=args.amp,
        config=args.config,
        vae=args.vae,
        clip_skip=args.clip_skip,
        height=args.height,
        width=args.width,
        tiling=args.vae_tiling,
        loras=[*args.lora, *args.lora_interpolate],
        embeddings=args.embedding,
        merged=not args.lora_interpolate,
        objective=args.objective,
    )
    pipeline.compiled = args.compile
    prompts = (args.prompt or [])[: args.num_images]
    if (left := len(args.prompt or ()) - len(prompts)) > 0:
        dist.log(
            f"warning: --num_images {args.num_images}: the last {left} of "
            f"{left + len(prompts)} prompts are not sampled"
        )
    warn_unused(pipeline, [*prompts, args.negative_prompt])
    if args.class_label is not None and pipeline.reads_prompts:
        raise UserError("--class_label: this model reads prompts, not classes: give --prompt")
    prompted = pipeline.prompted(args.prompt, args.negative_prompt) if args.prompt else None
    if pipeline.reads_prompts and prompted is None and args.guidance_scale != 1:
        raise UserError("--guidance_scale leads towards a prompt: give --prompt as well")
    start = read_start(pipeline, args.init_image, args.mask, args.height, args.width)
    same = {
        "seed": args.seed,
        "guidance_scale": args.guidance_scale,
        "amp": args.amp,
        "guidance_rescale": args.guidance_rescale,
        "batched": not args.sequential_guidance,
        "cuda_graph": args.cuda_graph == "on"
        or args.cuda_graph == "auto"
        and device.type == "cuda",
    }

    def settings(indices) -> dict:
        chosen = same | {"labels": pipeline.labels(args.class_label, indices)}
        if prompted is not None:
            chosen |= prompted(indices)
        return chosen | {k: v.expand(len(indices), *v.shape[1:]) for k, v in start.items()}

    try:  # mistakes show before the work
        strength = args.strength if start else 1.0
        same["table"] = pipeline.table(args.sampler, args.steps, args.spacing, args.eta, strength)
        pipeline.frames([0], **settings([0]))
    except ValueError as error:
        raise UserError(str(error)) from None

    folder = Path(args.save_folder)
    try:
        if not args.lora_interpolate:
            sample_all(args, pipeline, settings, folder)
        elif dist.is_main():
            interpolate(args, pipeline, settings, folder / "interpolation.png")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None
    dist.barrier()
    dist.cleanup()
