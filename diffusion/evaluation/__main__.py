"""Measure a folder of generated images, or a model by the images that it samples.

python -m diffusion.evaluation REAL FAKE                  two folders
python -m diffusion.evaluation REAL results/model.pt      a folder, and a model's samples
python -m diffusion.evaluation REAL results/model.pt --samplers ddim:10,ddim:50,dpmpp_2m:10
python -m diffusion.evaluation REAL FAKE --clip FOLDER    with the prompts' CLIP score
python -m diffusion.evaluation REAL FAKE --size 64 --copies TRAIN
                                                          and how many are training images

With clean-fid's Inception the Fréchet distance is FID; with any other network (--fid_features) it
is named after that network. The last line is JSON.
"""

import json
import re
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from .. import UserError
from ..config import (
    GUIDANCE,
    POSITIVE,
    SEEDS,
    SIZE,
    Config,
    Parser,
    Rule,
    add_runtime_arguments,
    at_least,
    int_list,
    run_script,
    size_text,
)
from ..data.batches import open_batches
from ..data.captions import read_captions
from ..data.folder import scan_split, walk
from ..files.output import create, write_free
from ..files.owned import SOFTWARE
from ..files.sd_files import write_json
from ..pictures.grid import count_calls, write_png
from ..pictures.plot import Line, distance_title, line_plot
from ..pictures.samples import sample_batches
from ..runtime.distributed import cleanup, is_main, log, setup
from ..sampling.load import open_pipeline
from ..sampling.pipeline import Pipeline
from .clip_score import read_prompts
from .copies import find_copies
from .distances import MIN_IMAGES
from .image_batches import collect, folder_batches
from .metrics import Metrics, open_metrics

MODEL = Rule("a model in place of the folder FAKE", lambda a: not Path(a.fake).is_dir())
SIZED = Rule("a folder FAKE and --size", lambda a: a.size and not MODEL.holds(a))
PICTURES = Rule(f"{MODEL.text}, or --copies", lambda a: a.copies or MODEL.holds(a))
NAMES_WITH_STEPS = Rule(
    "names with steps, such as ddim:50,dpmpp_2m:10",
    lambda text: re.fullmatch(r"\w+:\d+(,\w+:\d+)*", text),
)


def parse(args: list[str] | None = None):
    parser = Parser(prog="python -m diffusion.evaluation", description=__doc__)
    option = parser.option
    # fmt: off
    parser.add_argument("real", metavar="REAL", help="folder of real images")
    parser.add_argument("fake", metavar="FAKE", help="folder of generated images (PNG), or a model.pt or .safetensors file")
    option("--split NAME", "split of REAL; all: every image (default: train where there are splits)")
    option("--size SIZE", "cut and resize all images to N pixels, or to HEIGHTxWIDTH, as training does (default: a model's own size)", SIZE)
    option("--fid_features FILE", "TorchScript network instead of Inception: uint8 NCHW to (N, D); or pixels, the images' own at 16x16")
    option("--clip FOLDER", "CLIP model as transformers writes it: also measure the CLIP score of FAKE with its prompts")
    option("--lpips", "also measure the diversity of FAKE: mean LPIPS of pairs (pip install lpips)")
    option("--copies TRAIN", "also look for copies of training images, those of TRAIN (a folder, or what else --data of training takes) that training does not hold out: the fraction of FAKE nearer to one of them than 99 in 100 of REAL's images that are not trained on. Without --fid_features FILE all is measured in pixels. metrics/copies.png shows the nearest pairs", requires=SIZED)
    option("--num_images N", "number of images to sample from a model", at_least(2), MODEL, default=10_000)
    option("--batch_size N", "images that a model samples at a time", POSITIVE, default=64)
    option("--samplers NAME:N,...", "samplers of a model, each with its steps", NAMES_WITH_STEPS, MODEL, default="dpmpp_2m:20")
    option("--seeds N,...", "seeds of the noise; of several, the table shows medians", SEEDS, MODEL, type=int_list, default=(0,))
    option("--guidance_scale X", "classifier-free guidance of a class-conditional model; classes take turns", GUIDANCE, MODEL, default=1.0)
    option("--sd_path PATH", "where the Stable Diffusion model is now that the model was trained from", requires=MODEL)
    option("--vae PATH", "where the VAE is now that the model was trained with", requires=MODEL)
    add_runtime_arguments(parser, requires=MODEL)
    option("--save_folder FOLDER", "folder for metrics/quality.json and quality.png, or copies.png; where these exist, quality_2.json and so on are written", requires=PICTURES, default="results")
    option("--overwrite", "replace the quality.json, quality.png and copies.png that this program wrote there", requires=PICTURES)
    # fmt: on
    args = parser.parse_args(args)
    parser.check(args)
    return args


def main() -> None:
    args = parse()
    device = setup(args.device)
    if not Path(args.real).is_dir():
        raise UserError(f"{args.real} is no folder of images")
    files = scan_split(Path(args.real), args.split)
    measured = measure_folder if Path(args.fake).is_dir() else measure_model
    result = measured(args, files, Path(args.fake), device)
    if result is not None:
        print(json.dumps(result))
    cleanup()


def definitions(found: dict[str, dict]) -> dict[str, dict]:
    """Describe numbers without their values, which stand elsewhere."""
    return {name: {k: v for k, v in one.items() if k != "value"} for name, one in found.items()}


def read_real(args, files: list[Path], size: int | None, metrics: Metrics, m: int) -> dict | None:
    """Compute the features of the real images, to be compared with m generated ones."""
    batches = folder_batches(Path(args.real), files, size)
    rows = collect(batches, Metrics(metrics.features).rows, args.real)
    if rows is None:
        return None
    n = len(rows["features"])
    if n < 2:
        raise UserError(f"{args.real} holds {n} usable image; a distance needs at least 2")
    if min(n, m) < MIN_IMAGES:
        log(
            f"warning: {n} real and {m} generated images; below {MIN_IMAGES} a Fréchet distance is "
            "mostly bias, and comparable only at equal numbers"
        )
    return rows


# --- a folder of generated images ----------------------------------------------------------------


def measure_folder(args, real: list[Path], fake: Path, device: torch.device) -> dict | None:
    """Compare two folders; return the result on rank 0, None elsewhere."""
    scan = walk(fake, sampled=True).report()
    files = scan.images
    if is_main() and (calls := count_calls(files)) > 1:
        log(f"warning: {fake} holds pictures of {calls} calls of sample.py: all are measured")
    if any(file.suffix.lower() in (".jpg", ".jpeg") for file in files):
        log(f"warning: {fake} holds JPEG files, whose artefacts count; save as PNG")
    prompts = read_prompts(scan) if args.clip is not None else None
    features = args.fid_features or (args.copies and "pixels")
    metrics = open_metrics(features, args.clip, args.lpips, device)
    data = args.copies and open_batches(Config(data=args.copies, image_size=args.size, cache=False))
    reference = read_real(args, real, args.size, metrics, len(files))
    generated = collect(folder_batches(fake, files, args.size, prompts), metrics.rows, fake)
    if reference is None:
        return None
    check_sizes(torch.cat([reference["size"], generated["size"]]), metrics)
    found = metrics.compare(reference, generated)
    if data is not None:
        found["copies"], sheet = find_copies(metrics.features, data, reference, generated, files)
        file = Path(args.save_folder) / "metrics" / "copies.png"
        create(file.parent)
        log(f"{write_free(file, lambda path: write_png(sheet, path), args.overwrite)}")
    return {name: one["value"] for name, one in found.items()} | {
        "features": metrics.features.about,
        "num_real": len(reference["features"]),
        "num_fake": len(generated["features"]),
        "definitions": definitions(found),
    }


def check_sizes(sizes: Tensor, metrics: Metrics) -> None:
    """Refuse images of several sizes (N, 2), unless the network resizes them itself: then warn."""
    sizes = sizes.unique(dim=0).tolist()
    if len(sizes) == 1:
        return
    named = ", ".join(sorted(f"{w}x{h}" for w, h in sizes)[:4])
    if not metrics.features.is_inception:
        raise UserError(f"images of {len(sizes)} sizes ({named}); give --size N for all")
    log(
        f"warning: images of {len(sizes)} sizes ({named}), compared as they are; --size N "
        "brings all to N pixels"
    )


# --- a model -------------------------------------------------------------------------------------


def measure_model(args, real: list[Path], file: Path, device: torch.device) -> dict | None:
    """Measure a model's samples with each sampler and write quality.json and quality.png.

    Returns the result on rank 0, None elsewhere.
    """
    pipeline = open_pipeline(str(file), args.sd_path, args.weights, device, vae=args.vae)
    pairs = (part.split(":") for part in args.samplers.split(","))
    samplers = [(name, int(steps)) for name, steps in pairs]
    check_settings(args, pipeline, samplers)
    conditioning = captions_in_turn(args.real, real, pipeline)
    metrics = open_metrics(args.fid_features, args.clip, args.lpips, device)
    size = pipeline.config.image_size
    reference = read_real(args, real, size, metrics, args.num_images)
    name = metrics.features.name
    rows = []
    for sampler, steps in samplers:
        found = []
        start = time.perf_counter()
        for seed in args.seeds:
            sampling = dict(sampler=sampler, steps=steps, guidance_scale=args.guidance_scale)
            sampling |= dict(seed=seed, amp=args.amp)
            options = lambda indices: conditioning(indices) | sampling
            title = f"{sampler} {steps}"
            batches = sample_batches(pipeline, options, args.num_images, args.batch_size, title)
            generated = collect(batches, metrics.rows, "the model")
            if generated is not None:
                found.append(metrics.compare(reference, generated))
        if found:
            seconds = (time.perf_counter() - start) / len(args.seeds)
            values = {key: median(one[key]["value"] for one in found) for key in found[0]}
            shown = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
            log(f"{sampler:>12} {steps:>5} steps  {shown}  {seconds:.0f} s")
            # guidance evaluates the network with and without the class
            evaluations = steps if args.guidance_scale == 1 else 2 * steps
            row = dict(sampler=sampler, steps=steps, evaluations=evaluations)
            row |= {"seconds": round(seconds, 1)} | values
            rows.append(row | {f"{name}_of_seeds": [one[name]["value"] for one in found]})
    if reference is None:
        return None
    result = {
        "software": SOFTWARE,
        "checkpoint": file.name,
        "weights": args.weights,
        "real": Path(args.real).resolve().name,
        "size": size,
        "features": metrics.features.about,
        "num_real": len(reference["features"]),
        "num_fake": args.num_images,
        "seeds": list(args.seeds),
        "definitions": definitions(found[-1]),
        "rows": rows,
    }
    save_quality(Path(args.save_folder) / "metrics", result, name, args.overwrite)
    return result


def check_settings(args, pipeline: Pipeline, samplers: list[tuple[str, int]]) -> None:
    """Raise UserError for settings that the model cannot be measured with, before the long work."""
    if args.clip is not None and not pipeline.reads_prompts:
        raise UserError(f"--clip measures images against their prompts, and {args.fake} reads none")
    size = pipeline.config.image_size
    if args.size not in (None, size):
        text = size_text(size)
        raise UserError(f"--size {size_text(args.size)}: the model's images have {text} pixels")
    given = {"labels": pipeline.labels_in_turn([0]), "guidance_scale": args.guidance_scale}
    for sampler, steps in samplers:
        try:
            pipeline.frames([0], sampler=sampler, steps=steps, **given)
        except ValueError as error:
            raise UserError(f"--samplers {sampler}:{steps}: {error}") from None


def captions_in_turn(folder: str, files: list[Path], pipeline: Pipeline):
    """Return indices -> options of `Pipeline.frames`: classes, or captions of REAL, in turn."""
    if not pipeline.reads_prompts:
        return lambda indices: {"labels": pipeline.labels_in_turn(indices)}
    captions = read_captions(walk(Path(folder)), files)
    if captions is None:
        raise UserError(
            f"the model reads captions, and {folder} has none: put name.txt beside each image"
        )
    return pipeline.prompted([texts[0] for texts in captions], plain_prompts=True)


def save_quality(folder: Path, result: dict, name: str, overwrite: bool) -> None:
    """Write quality.json, and the distance against network evaluations as quality.png.

    Files of these names stay, and the new ones get a number, unless overwrite is set and the old
    ones are ours.
    """
    create(folder)
    file = write_free(folder / "quality.json", lambda path: write_json(path, result), overwrite)
    curves = {}
    for row in result["rows"]:
        curves.setdefault(row["sampler"], []).append((row["evaluations"], row[name]))
    lines = [Line(*zip(*sorted(points)), sampler) for sampler, points in curves.items()]
    title = f"{distance_title(name)} of {result['num_fake']} images"
    plot = line_plot(lines, title, "network evaluations", log_x=True, log_y=True)
    picture = file.with_suffix(".png")
    picture = write_free(picture, lambda path: write_png(plot, path), overwrite)
    log(f"{file}, {picture}")


if __name__ == "__main__":
    run_script(main)
