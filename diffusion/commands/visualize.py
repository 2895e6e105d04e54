"""Look at a model: the forward and the reverse process, interpolations, schedule, curves.

python visualize.py                        results/model.pt, or the toy's forward process
python visualize.py --load_path results/model.pt --data FOLDER --html
"""

from pathlib import Path

from .. import UserError
from ..config import Config, Parser
from ..rules import SAMPLERS, check_options


def parse(args: list[str] | None = None):
    # fmt: off
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--load_path", metavar="FILE", help="a model.pt or .safetensors file (default: results/model.pt if there is one)")
    add("--weights", default="ema", choices=("ema", "raw"), help="averaged weights, or the last step's")
    add("--sd_path", metavar="PATH", help="where the Stable Diffusion model is now that the model was trained from")
    add("--vae", metavar="PATH", help="where the VAE is now that the model was trained with")
    add("--data", metavar="TEXT", help="images of the forward process: toy, a folder, a set's name (default: what the model was trained on)")
    add("--num_images", type=int, default=4, metavar="N", help="how many of each")
    add("--sampler", default="ddim", metavar="NAME", help="|".join(SAMPLERS))
    add("--steps", type=int, metavar="N", help="network evaluations (default: 50, or all of a shorter schedule)")
    add("--guidance_scale", type=float, default=1.0, metavar="X", help="classifier-free guidance; 1: none")
    add("--class_label", metavar="NAME", help="a class by name or number (default: every class in turn)")
    add("--prompt", action="append", metavar="TEXT", help="of a model that reads prompts; may be given again; @FILE: a prompt per line, @@TEXT: @TEXT itself (default: the data's captions)")
    add("--seed", type=int, default=0, metavar="N", help="of the noise")
    add("--amp", default="auto", choices=("auto", "no", "bf16", "fp16"), help="mixed precision; no: float32")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    add("--save_folder", default="results", metavar="FOLDER", help="for viz/; where that holds pictures, for viz_2/ and so on")
    add("--overwrite", action="store_true", help="replace the viz/ that this program wrote there")
    add("--html", action="store_true", help="also viz/index.html, a page to play with")
    # fmt: on
    args = parser.parse_args(args)
    if args.load_path is None and Path("results/model.pt").is_file():
        args.load_path = "results/model.pt"
    if args.prompt:
        from ..files.validate import prompts_of

        args.prompt = prompts_of(args.prompt)
    check_options(args, parser.defaults, "visualize")
    return args


# what the page compares with the chosen sampler, from the same noise
PAGE_RUNS = (("ddpm", 50), ("ddim", 50), ("ddim", 10), ("dpmpp_2m", 20), ("dpmpp_2m", 10))


class Folder:
    """viz/, and what has been written to it. replace: whether ours of an earlier call may go."""

    def __init__(self, path: Path, replace: bool):
        self.path = path
        self.replace = replace
        self.names = []

    def write(self, name: str, write) -> None:
        """Write a file of the folder by write(path)."""
        from ..files.output import write_new

        if not write_new(self.path / name, write, self.replace):
            raise UserError(
                f"{self.path / name} has come into being meanwhile; nothing is written "
                "over: give another --save_folder"
            )
        self.names.append(name)

    def png(self, name: str, picture) -> None:
        from ..pictures.grid import write_png

        self.write(f"{name}.png", lambda path: write_png(picture, path))

    def drop_older(self) -> None:
        """Delete what an earlier call has left and this one did not replace."""
        from ..files.output import is_ours

        for file in self.path.iterdir() if self.replace else ():
            if file.name not in self.names and file.is_file() and is_ours(file):
                file.unlink()

    def process(self, name: str, process, T: int) -> None:
        """A picture at each share of the time, all of them in one strip, and the film."""
        from ..pictures import views
        from ..pictures.grid import enlarge, grid, save_film

        at = views.at_percents(process, T)
        for p, i in zip(views.PERCENT, at):
            self.png(f"{name}_t{p:02d}", grid(enlarge(process.x[i]), len(process.x[i])))
        order = at if process.x0 is None else at[::-1]  # as time goes
        self.png(name, views.labelled(process, order, process.x))
        film = views.film(process)
        self.write(f"{name}.webp", lambda path: save_film(film, path))


def draw_model(folder: Folder, pipeline, data, args, options):
    """The reverse process, which is returned, and interpolations."""
    from ..pictures import views
    from ..pictures.grid import strip

    n = args.num_images
    T = len(pipeline.schedule)
    reverse = views.reverse(pipeline, range(n), args.sampler, args.steps, **options(range(n)))
    folder.process("backward", reverse, T)
    at = views.at_percents(reverse, T)[::-1]
    folder.png("backward_x0", views.labelled(reverse, at, reverse.x0))

    points = [f"{i / 7:.2g}" for i in range(8)]
    sampler = views.deterministic(args.sampler)
    seeds = [args.seed, args.seed + 1]
    shared = dict(sampler=sampler, steps=args.steps, points=len(points))
    rows = views.between_seeds(pipeline, args.seed, n, **shared, options=options)
    heading = f"between the noise of seeds {seeds[0]} and {seeds[1]}, {sampler}"
    folder.png("interpolate_seeds", strip(rows, points, heading))
    if (half := len(data.images) // 2) > 0:
        a = data.images[:half]
        b = data.images[half : 2 * half]

        def plain(indices) -> dict:  # the pictures have classes and captions of their own
            given = options(indices)
            if args.class_label is not None or args.prompt:
                return given
            nothing = {name: None for name in ("labels", "prompts") if name in given}
            return given | nothing | {"guidance_scale": 1.0}

        rows = views.between_images(pipeline, a, b, args.seed, **shared, options=plain)
        heading = f"between two images, noised for half of the steps, {sampler}"
        folder.png("interpolate_images", strip(rows, ["image", *points, "image"], heading))
    return reverse


def draw_all(folder: Folder, pipeline, data, table, args, options) -> None:
    """Write all that is asked for; last of it the page."""
    from ..pictures import views
    from ..runtime import distributed as dist

    n = args.num_images
    T = len(pipeline.schedule)
    times = {*range(0, T, max(1, T // 50)), *(views.timestep_at(p, T) for p in views.PERCENT)}
    runs = {}
    if args.load_path is not None:  # first: a model whose pictures are none replaces nothing
        chosen = (args.sampler, args.steps)
        runs[chosen] = draw_model(folder, pipeline, data, args, options)
    forward = views.forward(pipeline, data.images[:n], sorted(times), args.seed)
    folder.process("forward", forward, T)
    folder.png("schedule", views.schedule_plot(pipeline.schedule, table, args.sampler))
    folder.png("table", views.table_plot(table, args.sampler))
    if args.load_path is not None:
        if (curves := views.curves(Path(args.load_path).parent / "metrics.jsonl")) is not None:
            folder.png("curves", curves)
    if args.html:
        from ..pictures.page import write_page

        for sampler, steps in PAGE_RUNS if args.load_path is not None else ():
            key = (sampler, min(steps, T))
            if key not in runs:
                runs[key] = views.reverse(pipeline, range(n), *key, **options(range(n)))
        shown = (pipeline, forward, data, list(runs.values()))
        folder.write("index.html", lambda path: write_page(path, *shown))
    folder.drop_older()
    dist.log(f"{folder.path}: {', '.join(sorted(folder.names))}")


def main() -> None:
    args = parse()
    import torch

    from ..files.output import output_folder
    from ..pictures import views
    from ..process.schedule import make_schedule
    from ..runtime import distributed as dist
    from ..sampling.load import open_pipeline
    from ..sampling.pipeline import Pipeline

    device = dist.setup(args.device)
    path = args.load_path
    if path is not None:
        pipeline = open_pipeline(path, args.sd_path, args.weights, device, vae=args.vae)
    else:
        dist.log("no results/model.pt: only the forward process and the schedules are shown")
        config = Config(data="toy")
        schedule = make_schedule(config.schedule, config.time_steps)
        pipeline = Pipeline(config, torch.nn.Identity(), schedule, device=device)
    n = args.num_images
    T = len(pipeline.schedule)
    args.steps = min(50, T) if args.steps is None else args.steps

    def options(indices) -> dict:
        """Of the images with these indices."""
        same = {"guidance_scale": args.guidance_scale, "amp": args.amp, "seed": args.seed}
        if pipeline.reads_prompts:
            return same | prompted(indices)
        if args.class_label is None:
            return same | {"labels": pipeline.labels_in_turn(indices)}
        return same | {"labels": pipeline.labels(args.class_label, indices)}

    data = views.pick_images(args.data, pipeline.config, 2 * n)
    if args.prompt and not pipeline.reads_prompts:
        raise UserError(f"--prompt: {path} reads no text")
    if args.class_label is not None and pipeline.reads_prompts:
        raise UserError(f"--class_label: {path} reads prompts, not classes: give --prompt")
    if pipeline.reads_prompts:
        prompted = pipeline.prompted(args.prompt or data.captions)
    try:  # mistakes show before the work
        table = pipeline.table(args.sampler, args.steps)
        if path is not None:
            pipeline.frames([0], sampler=args.sampler, steps=args.steps, **options([0]))
    except ValueError as error:
        raise UserError(str(error)) from None

    viz = Path(args.save_folder) / "viz"
    with output_folder(viz, args.overwrite) as chosen:
        if chosen != viz:
            dist.log(f"{viz} is left as it is; this goes to {chosen}")
        draw_all(Folder(chosen, args.overwrite), pipeline, data, table, args, options)
