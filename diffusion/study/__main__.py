"""The style study: how well a text-to-image model learns new styles, by which method, at what cost.

python -m diffusion.study --sd_path stable-diffusion-v1-5 --data STYLES --budget full
python -m diffusion.study --load_path results/sd_tiny/ema.safetensors --data STYLES --styles NEW

STYLES holds a folder per style: images, captions as name.txt beside them if there are any, and
prompts/validation_prompt.txt (a prompt a line; held-out images' captions where there is none).
The same command goes on where it was stopped.
"""

import dataclasses
import gc
import signal
from pathlib import Path

from .. import UserError
from ..config import Parser, int_list, run_script
from ..rules import SAMPLERS, check_options
from .plan import BUDGETS, EXPERIMENTS, Settings, with_budget


def parse(args: list[str] | None = None):
    """(Settings, the folder of studies, name or None, whether to start anew)."""
    told = ", ".join(f"{n} {text}" for n, text in EXPERIMENTS.items())
    parser = Parser(description=__doc__, prog="python -m diffusion.study")
    # fmt: off
    add = parser.add_argument
    add("--load_path", metavar="FILE", help="the base: a model.pt or .safetensors of ours that reads captions")
    add("--sd_path", metavar="PATH", help="the base: Stable Diffusion 1.x, a folder or a single file")
    add("--sd_config", metavar="FOLDER", help="configs and tokenizer of a single file of other sizes")
    add("--sd_weights", default="raw", choices=("raw", "ema"), help="of a single file with both: its plain weights, or its averaged ones (model_ema.*)")
    add("--objective", choices=("eps", "v", "x0"), help="what a single file predicts that does not state it (default: eps)")
    add("--data", metavar="STYLES", help="folder with a folder of images per style")
    add("--styles", metavar="NAME,...", help="those to learn (default: all); the others are known to the base and serve the classifier")
    add("--experiments", type=int_list, default=tuple(EXPERIMENTS), metavar="N,...", help=f"{told} (default: all)")
    add("--budget", default="small", choices=tuple(BUDGETS), help="small: an hour on two CPU cores with a small model; full: Stable Diffusion on a GPU")
    add("--features", metavar="FILE", help="TorchScript network of the Frechet distance (default: the classifier's own features)")
    add("--clip", metavar="FOLDER", help="a CLIP as transformers writes it, for CLIP scores")
    add("--image_size", type=int, metavar="N", help="in pixels (default: the base's own)")
    add("--class_prompt", metavar="TEXT", help="prior preservation of DreamBooth with images of this")
    add("--init_word", metavar="TEXT", help="Textual Inversion begins with this word's vectors (default: the style's name)")
    add("--guidance_scale", type=float, metavar="X", help="of all images (default: the base's own, 3 or 7.5)")
    add("--seed", type=int, default=0, metavar="N", help="of everything random")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    add("--amp", default="auto", choices=("auto", "no", "bf16", "fp16"), help="mixed precision")
    add("--save_folder", default="results", metavar="FOLDER", help="for <timestamp>_<name>/")
    add("--name", metavar="TEXT", help="of the study's folder (default: that of --data)")
    add("--new", action="store_true", help="begin anew, even if there is an unfinished study of these settings")

    add = parser.add_argument_group("instead of the budget's numbers").add_argument
    add("--steps", type=int, metavar="N", help="of a training; the ablation adds half and twice of it")
    add("--batch_size", type=int, metavar="N", help="samples per step")
    add("--ranks", type=int_list, metavar="N,N,N", help="of the ablation; the middle one is used elsewhere")
    add("--targets", metavar="TEXT", help="layers of LoRA, as for train.py (small: all, full: attention)")
    add("--learning_rate", type=float, metavar="X", help="of LoRA; the ablation adds a third and three times of it")
    add("--ti_learning_rate", type=float, metavar="X", help="of Textual Inversion")
    add("--dreambooth_learning_rate", type=float, metavar="X", help="of DreamBooth")
    add("--vectors", type=int, metavar="N", help="of a Textual Inversion token")
    add("--num_images", type=int, metavar="N", help="sampled for each cell")
    add("--mix_images", type=int, metavar="N", help="sampled for each point of the interpolation")
    add("--points", type=int, default=5, metavar="N", help="of the interpolation")
    add("--sampler", default="dpmpp_2m", metavar="NAME", help="|".join(SAMPLERS))
    add("--sample_steps", type=int, metavar="N", help="network evaluations per image")
    # fmt: on
    given = parser.parse_args(args)
    check_options(given, parser.defaults, "study")
    values = {name: value for name, value in vars(given).items() if value is not None}
    folder, name, new = (values.pop(k, None) for k in ("save_folder", "name", "new"))
    if (given.load_path is None) == (given.sd_path is None):
        raise UserError("the study needs a base: give either --sd_path or --load_path")
    if given.data is None:
        raise UserError("--data STYLES is missing: a folder with a folder of images per style")
    values["styles"] = tuple(filter(None, (given.styles or "").split(",")))
    values["experiments"] = tuple(dict.fromkeys(values["experiments"]))
    return with_budget(Settings(**values)), Path(folder), name, new


def choose_styles(s: Settings) -> Settings:
    """With the styles that are learnt. Raises UserError for unknown ones and for too few."""
    from .styles import style_folders

    known = [folder.name for folder in style_folders(s.data)]
    if unknown := [name for name in s.styles if name not in known]:
        raise UserError(
            f"--styles: {unknown[0]!r} is no style of {s.data}; it has {', '.join(known)}"
        )
    s = dataclasses.replace(s, styles=tuple(dict.fromkeys(s.styles or known)))
    if 4 in s.experiments and len(s.styles) < 2:
        raise UserError(
            f"experiment 4 goes from one style to another, and there is only "
            f"{s.styles[0]!r}: give two, or leave it out by --experiments 1,2,3"
        )
    if len(known) < 2 and s.features is None:
        raise UserError(
            f"{s.data} holds one style, which a classifier tells from nothing: add "
            "another style, or give --features for the distances"
        )
    return s


def open_base(s: Settings, device):
    """(pipeline, Base). Raises UserError for a base that reads no text or cannot be drawn from."""
    from ..files.sd_files import check_averaged
    from ..sampling.load import open_pipeline
    from .runner import Base

    size = {} if s.image_size is None else {"height": s.image_size, "width": s.image_size}
    foreign = s.sd_path is not None
    for path in filter(None, (s.load_path, s.sd_path)):
        if not Path(path).exists():
            raise UserError(f"the base {path} does not exist")
    if s.sd_weights == "ema":
        check_averaged(s.sd_path, "--sd_weights")
    weights = s.sd_weights if foreign else None
    pipeline = open_pipeline(
        s.load_path, s.sd_path, weights, device, config=s.sd_config, objective=s.objective, **size
    )
    if not pipeline.reads_prompts:
        raise UserError(
            f"the base {s.load_path} reads no text: a style study needs a model of "
            "--mode latent --condition text"
        )
    own = pipeline.config.guidance_scale
    guidance = s.guidance_scale
    if guidance is None:
        guidance = 7.5 if foreign else own if own != 1 else 3.0
    base = Base(pipeline.image_hw[0], guidance, pipeline.config.objective if foreign else None)
    try:
        pipeline.frames(
            [0],
            sampler=s.sampler,
            steps=s.sample_steps,
            prompts=[""],
            guidance_scale=guidance,
            amp=s.amp,
        )
    except ValueError as error:
        raise UserError(f"the base cannot be drawn from: {error}") from None
    return pipeline, base


def main() -> None:
    settings, root, name, new = parse()
    settings = choose_styles(settings)
    # whatever can be found wrong is, before anything is written or trained
    from ..runtime.distributed import log
    from .results import describe, find

    about = describe(settings)
    folder = None if new else find(root, about)
    if folder is not None and is_finished(folder):
        log(f"finished: {folder / 'report.html'}; --new does it all again")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log(f"report: {study_of(settings, about, folder, root, name)}")


def is_finished(folder: Path) -> bool:
    from .results import read_metrics

    return read_metrics(folder)["finished"] and (folder / "report.html").is_file()


def study_of(s: Settings, about: dict, folder: Path | None, root: Path, name: str | None) -> Path:
    """Open everything, then run what is missing; the report."""
    from ..runtime import distributed as dist
    from .classifier import open_classifier
    from .experiment import Study, run_study
    from .judge import Judge, check_classifier, open_networks
    from .results import create, read_metrics
    from .styles import read_style, slugs_of, style_folders

    device = dist.setup(s.device)
    features, clip = open_networks(s, device)
    pipeline, base = open_base(s, device)
    folders = style_folders(s.data)
    slugs = slugs_of([f.name for f in folders])
    styles = [read_style(f, slugs[f.name], base.image_size) for f in folders]
    if folder is None:
        folder = create(root, name or Path(s.data).resolve().name, about)
        dist.log(f"new study: {folder}")
    else:
        dist.log(f"continuing {folder}, a study of the same settings")
    metrics = read_metrics(folder)
    classifier = None
    if len(styles) > 1:
        classifier = open_classifier(
            folder / "checkpoints" / "classifier.safetensors", styles, s.seed
        )
        metrics["classifier"] = check_classifier(classifier, styles, pipeline)
    del pipeline  # the children need the memory
    gc.collect()
    judge = Judge(styles, classifier, features, clip)
    return run_study(Study(s, base, folder, styles, judge, metrics))


if __name__ == "__main__":
    run_script(main)
