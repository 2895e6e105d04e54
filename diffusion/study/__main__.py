"""The style study: how well a text-to-image model learns new styles, by which method, at what cost.

python -m diffusion.study --sd_path stable-diffusion-v1-5 --data STYLES --budget full
python -m diffusion.study --load_path results/sd_tiny/ema.safetensors --data STYLES --styles NEW

STYLES holds a folder per style: images, captions as name.txt beside them if there are any, and
prompts/validation_prompt.txt (a prompt a line; held-out images' captions where there is none).
The same command resumes a study that was stopped.
"""

import gc
import signal
from pathlib import Path
from shlex import quote

from .. import UserError
from ..config import (
    AMP,
    COUNTS,
    DEVICES,
    GUIDANCE,
    OBJECTIVES,
    POSITIVE,
    SAMPLERS,
    SD_PATH,
    SD_START,
    SEED,
    UTF8,
    Parser,
    Rule,
    add_guidance_arguments,
    at_least,
    between,
    int_list,
    run_script,
)
from .plan import BUDGETS, EXPERIMENTS, SMALL_AND_FULL, Settings

EXPERIMENT_3 = Rule("experiment 3", lambda s: 3 in s.experiments)
EXPERIMENT_4 = Rule("experiment 4", lambda s: 4 in s.experiments)
MODEL = Rule("--load_path", lambda s: s.load_path is not None)
KNOWN = Rule(f"among {', '.join(map(str, EXPERIMENTS))}", lambda v: set(v) <= set(EXPERIMENTS))


def name_list(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def parse(args: list[str] | None = None) -> tuple[Settings, Path, str | None, bool]:
    """Return (settings, the folder of studies, --name, --new)."""
    parser = Parser(description=__doc__, prog="python -m diffusion.study")
    option = parser.option
    experiments = ", ".join(f"{n} {text}" for n, text in EXPERIMENTS.items())
    # fmt: off
    option("--load_path MODEL", "base model: a model.pt or .safetensors of train.py, or the folder of its run, that reads captions")
    option("--sd_path PATH", "base model: Stable Diffusion 1.x, a folder or a single file; with --load_path: where it is now that the base model was trained from")
    option("--vae PATH", "where the VAE is now that the base model was trained with", requires=MODEL)
    option("--sd_config FOLDER", "configs and tokenizer of a single file of other sizes than 1.5's", requires=SD_PATH)
    option("--sd_weights", "weights of a single file that has both: raw, its plain ones, or ema, its model_ema.*", requires=SD_PATH & SD_START, default="raw", choices=("raw", "ema"))
    option("--objective", "prediction type of a single file that does not state it (default: eps)", requires=SD_PATH & SD_START, choices=OBJECTIVES)
    option("--data STYLES", "folder with a folder of images per style")
    option("--styles NAME,...", "styles to learn (default: all); the base knows the others, which serve the classifier", type=name_list)
    option("--experiments N,...", f"experiments to run: {experiments}", KNOWN, type=int_list, default="1,2,3,4")
    option("--budget", "small: an hour on two CPU cores with a small model; full: Stable Diffusion on a GPU", default="small", choices=BUDGETS)
    option("--features FILE", "TorchScript network for the Frechet distance (default: the classifier's own features)")
    option("--clip FOLDER", "CLIP as transformers writes it, for CLIP scores")
    option("--image_size N", "height and width in pixels (default: the base model's)", POSITIVE)
    option("--class_prompt TEXT", "prompt of DreamBooth's prior preservation images (default: no prior preservation)", UTF8, EXPERIMENT_3)
    option("--init_word TEXT", "word whose embedding Textual Inversion starts from (default: the style's name)", UTF8, EXPERIMENT_3)
    option("--guidance_scale X", "guidance scale of all images (default: the base model's, 3 or 7.5)", GUIDANCE)
    add_guidance_arguments(parser)
    option("--seed N", "seed of all random numbers", SEED, default=0)
    option("--device", "device to compute on", default="auto", choices=DEVICES)
    option("--amp", "mixed precision; no: float32", default="auto", choices=AMP)
    option("--save_folder FOLDER", "folder of studies, each in <timestamp>_<name>/", default="results")
    option("--name TEXT", "name of the study's folder (default: that of --data)")
    option("--keep_images", "keep the folders of training images, and show held-out images in the report")
    option("--new", "start from scratch, even if there is a study of these settings")

    parser.section("instead of the budget's numbers")
    option("--steps N", "training steps of a cell; the ablation adds half and twice as many", between(2, 1_000_000))
    option("--batch_size N", "samples per training step", POSITIVE)
    option("--ranks N,...", "LoRA ranks of the ablation; the middle one is used elsewhere", COUNTS, type=int_list)
    option("--targets TEXT", "layers that a LoRA adapts, as for train.py (small: all, full: attention)")
    option("--learning_rate X", "learning rate of a LoRA; the ablation adds a third and three times of it", POSITIVE)
    option("--ti_learning_rate X", "learning rate of Textual Inversion", POSITIVE, EXPERIMENT_3)
    option("--dreambooth_learning_rate X", "learning rate of DreamBooth", POSITIVE, EXPERIMENT_3)
    option("--vectors N", "number of vectors of a Textual Inversion token", POSITIVE, EXPERIMENT_3)
    option("--num_images N", "number of images sampled for a cell", at_least(2))
    option("--mix_images N", "number of images sampled for a mixture of the interpolation", POSITIVE, EXPERIMENT_4)
    option("--points N", "number of mixtures in the interpolation", between(2, 101), EXPERIMENT_4, default=5)
    option("--sampler NAME", f"sampler of all images: {'|'.join(SAMPLERS)}", default="dpmpp_2m")
    option("--sample_steps N", "number of network evaluations per image", POSITIVE)
    # fmt: on
    s = parser.parse_args(args)
    parser.check(s)
    if s.load_path is None and s.sd_path is None:
        raise UserError("the study needs a base model: give either --sd_path or --load_path")
    if s.data is None:
        raise UserError("--data STYLES is missing: a folder with a folder of images per style")
    s.experiments = tuple(dict.fromkeys(s.experiments))
    for name, values in SMALL_AND_FULL.items():
        if getattr(s, name) is None:
            setattr(s, name, values[BUDGETS.index(s.budget)])
    root, name, new = (vars(s).pop(key) for key in ("save_folder", "name", "new"))
    return s, Path(root), name, new


def choose_styles(s: Settings) -> Settings:
    """Add the styles to learn, if none are given. Raises UserError for unknown or too few ones."""
    from .styles import style_folders

    known = [folder.name for folder in style_folders(s.data)]
    styles = tuple(dict.fromkeys(s.styles or known))
    if unknown := [name for name in styles if name not in known]:
        raise UserError(
            f"--styles: {unknown[0]!r} is no style of {s.data}; it has {', '.join(known)}"
        )
    if 4 in s.experiments and len(styles) < 2:
        raise UserError(
            f"experiment 4 interpolates two styles, and there is only {styles[0]!r}: give two, "
            "or leave it out by --experiments 1,2,3"
        )
    if len(known) < 2 and s.features is None:
        raise UserError(
            f"{s.data} holds one style, and a classifier needs two: add another style, or give "
            "--features for the distances"
        )
    s.styles = styles
    return s


def open_base(s: Settings, device):
    """Open the base model's pipeline, and take from it what the settings leave open.

    Raises UserError for a base model that prompts cannot sample.
    """
    from ..files.sd_files import check_averaged
    from ..sampling.load import open_pipeline

    foreign = s.load_path is None
    if s.sd_weights == "ema":
        check_averaged(s.sd_path, "--sd_weights")
    pipeline = open_pipeline(
        s.load_path,
        s.sd_path,
        s.sd_weights if foreign else None,
        device,
        config=s.sd_config,
        vae=s.vae,
        objective=s.objective,
        height=s.image_size,
        width=s.image_size,
        guide=s.guide,
    )
    if not pipeline.reads_prompts:
        raise UserError(
            f"the base model {s.load_path or s.sd_path} reads no prompts: a style study needs one "
            "of --mode latent --condition text"
        )
    if pipeline.height != pipeline.width:
        raise UserError("a style study is of square pictures: give --image_size N")
    s.image_size = pipeline.height
    if s.guidance_scale is None:
        own = pipeline.config.guidance_scale
        s.guidance_scale = 7.5 if foreign else 3.0 if own == 1 else own
    given = {"sampler": s.sampler, "steps": s.sample_steps, "amp": s.amp}
    given["guidance_interval"] = s.guidance_interval
    try:
        pipeline.frames([0], prompts=[""], guidance_scale=s.guidance_scale, **given)
    except ValueError as error:
        raise UserError(f"the base model cannot be sampled: {error}") from None
    return pipeline


def main() -> None:
    s, root, name, new = parse()
    s = choose_styles(s)

    from ..evaluation.clip_score import open_clip
    from ..evaluation.features import open_features
    from ..runtime import distributed as dist
    from .classifier import open_classifier
    from .experiment import Study, run_study
    from .judge import Judge, check_classifier
    from .study_folder import check_links, create, describe, find, read_metrics
    from .styles import read_style, slugs_of, style_folders

    description = describe(s)
    folder = None if new else find(root, description)
    if folder and read_metrics(folder)["finished"] and (folder / "report.html").is_file():
        dist.log(f"This study is finished: {folder / 'report.html'} (--new runs it again)")
        return
    if folder is not None:
        check_links(folder)
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    # whatever can be found wrong is, before anything is written or trained
    device = dist.setup(s.device)
    features = open_features(s.features, device) if s.features is not None else None
    clip = open_clip(s.clip, device) if s.clip is not None else None
    pipeline = open_base(s, device)
    folders = style_folders(s.data)
    slugs = slugs_of([f.name for f in folders])
    styles = {f.name: read_style(f, slugs[f.name], s.image_size) for f in folders}

    if folder is None:
        folder = create(root, name or Path(s.data).resolve().name, description)
        dist.log(f"new study: {folder}, in which logs.txt shows how far a cell is")
    else:
        dist.log(f"resuming {folder}, a study of the same settings")
    metrics = read_metrics(folder)
    classifier = None
    if len(styles) > 1:
        file = folder / "checkpoints" / "classifier.safetensors"
        classifier = open_classifier(file, list(styles.values()), s.seed)
        metrics["classifier"] = check_classifier(classifier, pipeline)
    del pipeline  # the children need the memory
    gc.collect()
    judge = Judge(styles, classifier, features, clip)
    report = run_study(Study(s, folder, judge, metrics))
    dist.log(f"report: {report}\nnext: python -m webbrowser {quote(report.resolve().as_uri())}")


if __name__ == "__main__":
    run_script(main)
