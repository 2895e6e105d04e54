"""Sample images from a trained model, or from Stable Diffusion.

python sample.py --load_path results/model.pt
python sample.py --load_path results/model.pt --sampler dpmpp_2m --steps 15 --num_images 100
python sample.py --sd_path stable-diffusion-v1-5 --prompt "a red fox" --sampler dpmpp_2m --steps 25
torchrun --nproc_per_node=8 sample.py --load_path results/model.pt --num_images 50000
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path

from .. import UserError, shown
from ..config import (
    FRACTION,
    GUIDANCE,
    GUIDED,
    NOT_NEGATIVE,
    OBJECTIVES,
    PATH,
    POSITIVE,
    SAMPLERS,
    SEED,
    SIDE,
    STEPS,
    UTF8,
    Parser,
    Rule,
    add_guidance_arguments,
    add_runtime_arguments,
    at_least,
    command_line,
    run_script,
)
from ..process.names import DEFAULT_SAMPLER, DEFAULT_STEPS, PROMPT_SCALE, SPACINGS

MAX_LORA_WEIGHT = 1000  # far beyond it pictures saturate, then numbers overflow
LORA_SUFFIXES = (".safetensors", ".pt", ".ckpt")
LORA_WEIGHTS = Rule(
    f"files with finite weights from -{MAX_LORA_WEIGHT} to {MAX_LORA_WEIGHT}",
    lambda loras: all(abs(weight) <= MAX_LORA_WEIGHT for _, weight in loras),
)
STRENGTH = Rule("above 0 and at most 1", lambda v: 0 < v <= 1)
# what options require
PROMPT = Rule("--prompt", lambda a: a.prompt)
SYNTAX = Rule("--prompt, and beside --plain_prompts", lambda a: a.prompt and not a.plain_prompts)
SHIFTS = Rule("--spacing flow", lambda a: a.spacing == "flow")
# a guide stands in the place of the model without its condition, and is a call of its own
UNGUIDED = GUIDED & Rule("without --guide", lambda a: a.guide is None)
INIT_IMAGE = Rule("--init_image", lambda a: a.init_image is not None)
# 0.8 was its default once
STRENGTH_USE = Rule("--init_image", lambda a: a.init_image is not None or a.strength == 0.8)
INTERPOLATION = Rule("--lora_interpolate", lambda a: a.lora_interpolate)


def parse(args: list[str] | None = None):
    parser = Parser(description=__doc__)
    option = parser.option
    # fmt: off
    option("--load_path MODEL", "model.pt or ema.safetensors file of the model, the folder of its run, or hf:owner/name[/file] of the Hugging Face hub, as other options may have, too (default: results/model.pt; without it the one that comes with the program, cartoon faces)")
    option("--num_images N", "number of images (default: one for each prompt, 16 without prompts)", POSITIVE)
    option("--batch_size N", "number of images sampled at a time", POSITIVE, default=16)
    option("--sampler NAME", f"sampler: {', '.join(SAMPLERS)}, or the .json file of a learned table (default: {DEFAULT_SAMPLER}; lcm for a model of --consistency)")
    option("--steps N", f"number of network evaluations per image (default: {DEFAULT_STEPS}, or all of a shorter schedule; 2 for a model of --consistency)", STEPS)
    option("--eta X", "noise of the ddim sampler, 0 to 1 (default: the sampler's own)", FRACTION)
    option("--spacing NAME", f"spacing of the timesteps: {', '.join(SPACINGS)} (default: the sampler's or the model's own)")
    option("--churn X", "S_churn of the heun and dpm2 samplers: noise that is added before each step but the first", NOT_NEGATIVE, default=0.0)
    option("--shift X", "factor on sigma / alpha of the levels that --spacing flow visits (default: the model's noise_shift)", POSITIVE, SHIFTS)
    option("--guidance_scale X", f"classifier-free guidance scale; 1: no guidance (default: {PROMPT_SCALE} with prompts, else 1)", GUIDANCE)
    option("--guidance_rescale X", "strength of the correction of the contrast that guidance raises, 0 to 1", FRACTION, GUIDED, default=0.0)
    add_guidance_arguments(parser)
    option("--class_label NAME", "class of the images, by name or number; all: every class in turn (default: no label)")
    option("--seed N", "seed of the noise; image i of a seed is always the same", SEED, default=0)
    add_runtime_arguments(parser, weights=None, more=" (default: ema; raw of other programs' files, whose model_ema.* is often stale)")
    option("--cuda_graph", "run each step as one CUDA graph; auto: on GPUs", default="auto", choices=("auto", "on", "off"))
    option("--compile", "torch.compile the network: a minute to start, then faster")
    option("--save_folder FOLDER", "folder for images/ and grid.png; pictures that are there stay, and numbers continue", default="results")
    option("--overwrite", "replace the pictures that this program wrote to save_folder")

    parser.section("latent models")
    option("--sd_path PATH", "Stable Diffusion 1.x: a diffusers folder, a .safetensors or .ckpt file, or hf:owner/name[/file]")
    option("--config FOLDER", "folder with the configs and the tokenizer of a single file of other sizes than 1.5's")
    option("--objective", "what the model of --sd_path predicts (default: as it states, else eps)", choices=OBJECTIVES)
    option("--vae PATH", "VAE to use instead of the one that the model was trained with")
    option("--prompt TEXT", "text that describes the image; may be given again; @FILE: a prompt per line, @@TEXT: @TEXT itself", UTF8, action="append")
    option("--plain_prompts", "take prompts as they stand: no (word:1.4), [word], BREAK or <lora:name:0.8>", requires=PROMPT)
    option("--negative_prompt TEXT", "text that guidance leads away from", UTF8, PROMPT & UNGUIDED, default="")
    option("--height N", "height in pixels (default: the model's own, or by the aspect of init_image)", SIDE)
    option("--width N", "width in pixels (default: the model's own, or by the aspect of init_image)", SIDE)
    option("--clip_skip N", "layer of the text encoder to read, counted from the end; 1: the last (default: the model's own)", POSITIVE)
    option("--vae_tiling", "decode in overlapping tiles: less memory for large images")
    option("--sequential_guidance", "make two network calls per step, in half the memory", requires=UNGUIDED)

    parser.section("adapters")
    option("--lora FILE[:X]", "LoRA of train.py, kohya, diffusers or peft, a file or hf:owner/name[/file], and its weight; may be given again", LORA_WEIGHTS, action="append", type=weighted, default=[])
    option("--lora_dir FOLDER", "folder of the LoRAs that --prompt names as <lora:name:0.8>", requires=SYNTAX)
    option("--embedding FILE", "textual inversion, whose word --prompt may use; may be given again", requires=PROMPT, action="append", default=[])
    option("--lora_interpolate A B", "write interpolation.png instead, from LoRA A to LoRA B", LORA_WEIGHTS, type=weighted, default=[])
    option("--points N", "number of columns of interpolation.png", at_least(2), INTERPOLATION, default=5)

    parser.section("from an image")
    option("--init_image FILE", "image to start from, noised, in its aspect unless --height and --width are given")
    option("--strength X", "fraction of the steps that is run on the init image, above 0 to 1; at 1 the masked part starts from noise (default: 0.8; 1 with an inpainting model)", STRENGTH, STRENGTH_USE)
    option("--mask FILE", "image of the init image's size, white where new content goes; black and transparent stay", requires=INIT_IMAGE)
    # fmt: on
    args = parser.parse_args(args)
    if args.prompt:
        from ..files.text_files import prompts_of

        args.prompt = args.typed = prompts_of(args.prompt)
        if args.lora_dir is not None:
            take_loras(args)
    if args.num_images is None:
        args.num_images = len(args.prompt or ()) or (4 if args.lora_interpolate else 16)
    if args.guidance_scale is None and (args.sampler or "").endswith(".json"):
        from ..files.table_files import read_table

        args.guidance_scale = read_table(Path(args.sampler))[0].weight[0].item()
    if args.guidance_scale is None:
        args.guidance_scale = PROMPT_SCALE if args.prompt else 1.0
    parser.check(args)
    return args


def weighted(text: str) -> tuple[str, float]:
    """Read FILE or FILE:WEIGHT; without a weight it is 1."""
    text = PATH(text)
    path, mark, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if mark and path else (text, 1.0)
    except ValueError:
        return text, 1.0


def take_loras(args) -> None:
    """Take the tags <lora:NAME:WEIGHT> out of the prompts, and find the files in --lora_dir.

    A name is no path: it is that of a file in the folder or below it, without the suffix. Raises
    UserError for one of no file or several, and for prompts with different tags.
    """
    from ..models.prompt_syntax import LORA

    if not Path(args.lora_dir).is_dir():
        raise UserError(f"--lora_dir {args.lora_dir} is no folder")
    tags = [
        sorted((name, float(weight or 1)) for name, weight in LORA.findall(prompt))
        for prompt in args.prompt
    ]
    if different := [tag for tag in tags if tag != tags[0]]:
        raise UserError(
            f"--prompt: one names the LoRAs {shown(tags[0])}, another {shown(different[0])}; all "
            "pictures of a call are of one model: give each prompt the same <lora:NAME:WEIGHT>"
        )
    texts = (*args.prompt, args.negative_prompt)
    if not args.plain_prompts and not any("<" in text for text in texts):
        raise UserError("--lora_dir: no effect without <lora:NAME:WEIGHT> in --prompt")
    files = sorted(Path(args.lora_dir).rglob("*"))
    for name, weight in tags[0]:
        named = [f for f in files if f.stem == name and f.suffix.lower() in LORA_SUFFIXES]
        found = [f for f in named if f.is_file()]
        if len(found) != 1:
            raise UserError(
                f"--prompt names the LoRA {shown(name)}; expected one file of this name in "
                f"--lora_dir {args.lora_dir}, found {', '.join(map(str, found)) or 'none'}"
            )
        args.lora = [*args.lora, (str(found[0]), weight)]
    args.prompt = [LORA.sub("", prompt) for prompt in args.prompt]


def open_model(args, device):
    """Open the pipeline that the arguments name. Raises UserError for what it has no use for."""
    from ..files.sd_files import check_averaged
    from ..runtime import compiler
    from ..sampling.load import Options, default_model, open_pipeline

    if args.cuda_graph == "on" and device.type != "cuda":
        raise UserError(f"--cuda_graph on needs a CUDA device; this is {device.type}")
    if args.compile:
        compiler.prepare(device)
    if args.load_path is None and args.sd_path is None:
        args.load_path = str(default_model())
    foreign = args.load_path is None
    if args.weights == "ema" and foreign:
        check_averaged(args.sd_path, "--weights")
    if args.weights is None and not (foreign and Path(args.sd_path).is_dir()):
        args.weights = "raw" if foreign else "ema"
    pipeline = open_pipeline(
        args.load_path,
        args.sd_path,
        args.weights,
        device,
        **{f.name: getattr(args, f.name) for f in dataclasses.fields(Options)},
        loras=[*args.lora, *args.lora_interpolate],
        embeddings=args.embedding,
        merged=not args.lora_interpolate,
        guide=args.guide,
    )
    pipeline.compiled = args.compile
    if pipeline.reads_prompts and not args.prompt and UNGUIDED.holds(args):
        raise UserError("--guidance_scale leads towards a prompt: give --prompt as well")
    return pipeline


def sampling_options(args, pipeline, device):
    """Return the function (indices) -> options of `Pipeline.sample_batch`.

    Raises UserError for options that do not go together.
    """
    from ..runtime.distributed import log
    from ..sampling.adapt import warn_unused

    prompts = (args.prompt or [])[: args.num_images]
    if (left := len(args.prompt or ()) - len(prompts)) > 0:
        log(
            f"warning: --num_images {args.num_images}: the last {left} of "
            f"{len(args.prompt)} prompts are not sampled"
        )
    of_image = pipeline.options_of(
        args.prompt,
        args.negative_prompt,
        args.plain_prompts or None,
        args.class_label,
        args.init_image,
        args.mask,
        args.height,
        args.width,
    )
    warn_unused(pipeline, [*prompts, args.negative_prompt], args.plain_prompts)
    same = {
        "seed": args.seed,
        "guidance_scale": args.guidance_scale,
        "amp": args.amp,
        "guidance_rescale": args.guidance_rescale,
        "guidance_interval": args.guidance_interval,
        "batched": not args.sequential_guidance,
        "cuda_graph": args.cuda_graph == "on"
        or args.cuda_graph == "auto"
        and device.type == "cuda",
    }

    def options(indices) -> dict:
        return same | of_image(indices)

    try:  # mistakes show before the work
        usual = pipeline.usual_strength(args.init_image)
        strength = usual if args.strength is None else args.strength
        kind = (args.sampler, args.steps, args.spacing, args.eta)
        same["table"] = pipeline.table(*kind, strength, args.churn, args.shift)
        pipeline.frames([0], **options([0]))
    except ValueError as error:
        raise UserError(str(error)) from None
    return options


# --- what is written ------------------------------------------------------------------------------


def parameters(args, pipeline, options: dict, row: int, index: int, image) -> str:
    """Describe how a picture came about, as other programs read it.

    options: those of `Pipeline.sample_batch` that it was sampled with, in which it is row `row`.
    """
    from ..pictures.grid import parameters_text
    from ..process.names import SAMPLERS, TITLES

    table = options["table"]
    labels = options.get("labels")
    prompt = args.typed[index % len(args.typed)] if args.prompt else None
    guided = options["guidance_scale"] != 1
    vae = args.vae or (pipeline.config.vae if pipeline.config.mode == "latent" else None)
    settings = {
        "Steps": table.steps,
        "Sampler": short_name(table.sampler)
        if table.spacing == "learned"
        else TITLES.get(args.sampler) or SAMPLERS[table.sampler].title,
        "CFG scale": options["guidance_scale"],
        "Seed": options["seed"],
        "Image": index,
        "Size": f"{image.shape[1]}x{image.shape[0]}",
        "Model": short_name(args.load_path or args.sd_path),
        "Weights": args.weights,
        "VAE": short_name(vae) if vae else None,
        "Clip skip": pipeline.clip_skip,
        "Class": None if labels is None else pipeline.classes[labels[row]],
        "Denoising strength": table.strength if "init" in options else None,
        "Init image": args.init_image and Path(args.init_image).name,
        "Mask": args.mask and Path(args.mask).name,
        "Spacing": table.spacing,
        "Eta": table.eta,
        "Churn": args.churn or None,
        "Shift": args.shift,
        "Guidance rescale": (options["guidance_rescale"] or None) if guided else None,
        "Guidance interval": args.guidance_interval,
        "Guide": args.guide and short_name(args.guide),
        "Lora": ", ".join(map(lora_name, args.lora)) or None,
        "Lora interpolation": " to ".join(map(lora_name, args.lora_interpolate)) or None,
        "Embeddings": ", ".join(map(short_name, args.embedding)) or None,
        "Objective": pipeline.config.objective,
        "Path": None if pipeline.config.path == "vp" else pipeline.config.path,
        "Precision": pipeline.precision(options["amp"]),
        "VAE tiling": "on" if args.vae_tiling else None,
    }
    return parameters_text(prompt, args.negative_prompt if guided else "", settings)


# names that many files have, which their folders tell apart
COMMON_NAMES = {
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


def short_name(path: str | Path) -> str:
    """Name a file without its suffix, or a folder; a common name comes with its folder."""
    path = Path(path)
    name = path.name if path.is_dir() else path.stem
    parent = path.resolve().parent
    if str(path).startswith("hf:"):
        return str(path)[3:]
    shared = (
        name in COMMON_NAMES and parent.name and parent != Path.home()
    )  # whose name is a user's
    return f"{parent.name}/{name}" if shared else name


def lora_name(lora: tuple[str, float]) -> str:
    """Write a LoRA and its weight as --lora takes them."""
    return f"{short_name(lora[0])}:{lora[1]:.10g}"


def main() -> None:
    args = parse()

    from ..pictures.samples import Samples
    from ..runtime import distributed as dist

    device = dist.setup(args.device)
    named = args.load_path
    pipeline = open_model(args, device)
    samples = Samples(
        pipeline=pipeline,
        options=sampling_options(args, pipeline, device),
        describe=partial(parameters, args, pipeline),
        folder=Path(args.save_folder),
        count=args.num_images,
        batch_size=args.batch_size,
        overwrite=args.overwrite,
    )
    if not args.lora_interpolate:
        samples.write_images()
    elif dist.is_main():
        samples.write_interpolation(args.lora_interpolate, len(args.lora), args.points)
    dist.barrier()
    if args.sd_path is None or named is not None:
        where = {"load_path": named, "sd_path": args.sd_path, "vae": args.vae}
        then = command_line("visualize", "--html", **where)
    else:
        then = command_line("sample", *sys.argv[1:], "--seed", args.seed + 1)
    dist.log(f"next: {then}")
    dist.cleanup()


command = partial(run_script, main)


if __name__ == "__main__":
    command()
