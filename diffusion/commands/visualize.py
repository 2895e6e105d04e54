"""Look at a model: the forward and the reverse process, interpolations, schedule, curves.

python visualize.py                        results/model.pt, or the model of the program
python visualize.py --load_path results/model.pt --data FOLDER --html
"""

import sys
from functools import partial
from pathlib import Path
from shlex import quote

from .. import UserError, shown
from ..config import (
    GUIDANCE,
    PATH,
    SAMPLERS,
    SEED,
    STEPS,
    UTF8,
    Parser,
    Rule,
    add_runtime_arguments,
    between,
    command_line,
    run_script,
)
from ..process.names import DEFAULT_SAMPLER, DEFAULT_STEPS

PROMPT = Rule("--prompt", lambda a: a.prompt)


def parse(args: list[str] | None = None):
    parser = Parser(description=__doc__)
    option = parser.option
    # fmt: off
    option("--load_path MODEL", "model.pt or .safetensors file of the model, or the folder of its run (default: results/model.pt; without it the one that comes with the program, cartoon faces)")
    option("--sd_path PATH", "where the Stable Diffusion model is now that the model was trained from")
    option("--vae PATH", "where the VAE is now that the model was trained with")
    option("--data TEXT", type=PATH, help="images of the forward process: toy, a folder, a set's name (default: toy, or what a run was trained on that was made in the folder of the model; else samples of the model)")
    option("--num_images N", "number of images in each picture", between(1, 16), default=4)
    option("--sampler NAME", f"sampler: {', '.join(SAMPLERS)} (default: {DEFAULT_SAMPLER}; lcm for a model of --consistency)")
    option("--steps N", f"number of network evaluations per image (default: {DEFAULT_STEPS}, or all of a shorter schedule; 2 for a model of --consistency)", STEPS)
    option("--guidance_scale X", "classifier-free guidance scale; 1: no guidance", GUIDANCE, default=1.0)
    option("--class_label NAME", "class of the images, by name or number (default: every class in turn)")
    option("--prompt TEXT", "text for a model that reads prompts; may be given again; @FILE: a prompt per line, @@TEXT: @TEXT itself (default: the data's captions)", UTF8, action="append")
    option("--plain_prompts", "take prompts as they stand: no (word:1.4), [word] or BREAK", requires=PROMPT)
    option("--seed N", "seed of the noise", SEED, default=0)
    add_runtime_arguments(parser)
    option("--save_folder FOLDER", "folder for viz/; where viz/ holds pictures, for viz_2/ and so on", default="results")
    option("--overwrite", "replace the viz/ that this program wrote to save_folder")
    option("--html", "also write viz/index.html, an interactive page")
    # fmt: on
    args = parser.parse_args(args)
    if args.prompt:
        from ..files.text_files import prompts_of

        args.prompt = prompts_of(args.prompt)
    parser.check(args)
    return args


def choose_images(args, pipeline):
    """Pick images of --data, the toy or what a run was trained on that was made here; else None.

    What else a model names is neither opened nor fetched: it may be anything of the user's.
    """
    from ..pictures.views import pick_images
    from ..runtime.distributed import log
    from ..training.run_folder import made_here

    config = pipeline.config
    if args.data is None and config.data != "toy":
        config = made_here(Path(args.load_path).parent)
        if config is None or not (Path(config.data).exists() or Path("data", config.data).exists()):
            log(
                f"the forward process is shown of the model's own samples; the model names "
                f"{shown(pipeline.config.data)} as its data: --data shows images of it"
            )
            return None
    return pick_images(args.data, config, 2 * args.num_images)


def sampling_options(args, pipeline, captions: list[str]):
    """Return the function (indices) -> options of `Pipeline.frames`."""
    same = {"guidance_scale": args.guidance_scale, "amp": args.amp, "seed": args.seed}
    plain = args.plain_prompts or not args.prompt or None  # captions always are
    prompts = args.prompt or (captions if pipeline.reads_prompts else None)
    own = pipeline.options_of(prompts, "", plain, args.class_label)
    return lambda indices: same | {"labels": pipeline.labels_in_turn(indices)} | own(indices)


def main() -> None:
    args = parse()

    from ..files.output import output_folder
    from ..pictures.grid import Picked
    from ..pictures.views import Gallery
    from ..runtime import distributed as dist
    from ..sampling.load import default_model, open_pipeline

    device = dist.setup(args.device)
    if args.load_path is None:
        args.load_path = str(default_model())
    pipeline = open_pipeline(args.load_path, args.sd_path, args.weights, device, vae=args.vae)
    data = choose_images(args, pipeline)
    options = sampling_options(args, pipeline, [""] if data is None else data.captions)
    try:  # mistakes show before the work
        table = pipeline.table(args.sampler, args.steps)
        pipeline.frames([0], table=table, **options([0]))
    except ValueError as error:
        raise UserError(str(error)) from None
    if data is None:
        indices = range(2 * args.num_images)
        images = pipeline.sample_batch(indices, table=table, **options(indices))
        names = [f"sample {i}" for i in indices]
        data = Picked(images.clamp(-1, 1).cpu(), names, [""] * len(names))

    viz = Path(args.save_folder) / "viz"
    with output_folder(viz, args.overwrite) as chosen:
        if chosen != viz:
            dist.log(f"{viz} is left as it is; this goes to {chosen}")
        gallery = Gallery(
            path=chosen,
            replace=args.overwrite,
            pipeline=pipeline,
            data=data,
            table=table,
            count=args.num_images,
            seed=args.seed,
            options=options,
            conditioned=args.class_label is not None or bool(args.prompt),
        )
        gallery.draw(Path(args.load_path), args.html)
    if args.html:
        then = f"python -m webbrowser {quote((chosen / 'index.html').resolve().as_uri())}"
    else:
        then = command_line("visualize", *sys.argv[1:], "--html")
    dist.log(f"next: {then}")


command = partial(run_script, main)


if __name__ == "__main__":
    command()
