"""The command that measures sets of images, and models by the images they draw.

python -m diffusion.evaluation.metrics REAL FAKE                  two folders
python -m diffusion.evaluation.metrics REAL results/model.pt      a folder, and a model's samples
python -m diffusion.evaluation.metrics REAL results/model.pt --samplers ddim:10,ddim:50,dpmpp_2m:10
python -m diffusion.evaluation.metrics REAL FAKE --clip FOLDER    with the prompts' CLIP score

Features are (N, D), float64 on the CPU. With clean-fid's Inception the Fréchet distance is FID;
with any other network (--fid_features) it is named after that network. The last line is JSON.
"""

import json
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from .. import UserError
from ..config import Parser, int_list, run_script
from ..data.captions import read_captions
from ..data.folder import choose_split, scan, scan_split, walk
from ..files.checkpoint import write_text
from ..files.output import create, write_free
from ..files.owned import SOFTWARE
from ..pictures.grid import write_png
from ..pictures.plot import Line, line_plot
from ..rules import check_options
from ..runtime import distributed as dist
from ..sampling.load import open_pipeline
from ..sampling.pipeline import Pipeline, is_number
from .clip_score import TextImage, count_calls, measure_folder, open_text_image
from .distances import (
    DEFINITIONS,
    FEW,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    precision_recall,
)
from .features import (
    Features,
    check_sizes,
    folder_features,
    gathered,
    open_features,
    sampled,
)


def compare(real: Tensor, fake: Tensor, features: Features) -> dict:
    """All metrics of two sets' features. Raises UserError for fewer than 2 images."""
    n = len(real)
    m = len(fake)
    name = features.name
    if min(n, m) < 2:
        raise UserError(f"{n} real and {m} generated images: a distance needs at least 2 of each")
    kid = "kid" if features.is_inception else f"{name}_kid"
    found = {
        name: frechet_distance(*moments(real), *moments(fake)),
        kid: kernel_distance(real, fake),
    }
    if min(n, m) > 3:
        found["precision"], found["recall"] = precision_recall(real, fake)
    if (probabilities := features.probabilities(fake)) is not None:
        found["inception_score"], found["inception_score_std"] = inception_score(probabilities)
    return found | {"features": features.about, "num_real": n, "num_fake": m}


def definitions(found: dict, features: Features) -> dict[str, dict]:
    """What each number that `compare` found means, whose features it is of, and of how many."""
    known = {features.name: "frechet", "kid": "kid", f"{features.name}_kid": "kid"}
    return {
        name: {
            "definition": DEFINITIONS[known.get(name, name)],
            "model": features.about,
            "num_images": found["num_fake"],
            "num_real": found["num_real"],
        }
        for name in found
        if known.get(name, name) in DEFINITIONS
    }


def meanings(measures: dict[str, dict]) -> dict[str, dict]:
    """Measures without their values, where these stand elsewhere."""
    return {k: {n: v for n, v in one.items() if n != "value"} for k, one in measures.items()}


def warn_of_few(n: int, m: int) -> None:
    if min(n, m) < FEW:
        dist.log(
            f"warning: {n} real and {m} generated images; below {FEW} a Fréchet distance is "
            "mostly bias, and comparable only at equal numbers"
        )


def warn_of_calls(folder: Path, files: list[Path]) -> None:
    """Say so where a folder's files are the pictures of several calls of sample.py."""
    if dist.is_main() and (calls := count_calls(files)) > 1:
        dist.log(
            f"warning: {folder} holds the pictures of {calls} calls of sample.py, which are "
            "all measured"
        )


# --- the command ---------------------------------------------------------------------------------


def parse(args: list[str] | None = None):
    # fmt: off
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("real", metavar="REAL", help="folder of real images")
    add("--split", metavar="NAME", help="of REAL; all: every image (default: train where there are splits)")
    add("fake", metavar="FAKE", help="folder of generated images (PNG), or a model.pt or .safetensors file")
    add("--size", type=int, metavar="N", help="cut and resize both to N pixels as training does (a model's own size)")
    add("--fid_features", metavar="FILE", help="TorchScript network instead of Inception: uint8 NCHW to (N, D)")
    add("--clip", metavar="FOLDER", help="a CLIP as transformers writes it: also the CLIP score of FAKE with its prompts")
    add("--lpips", action="store_true", help="also the diversity of FAKE: mean LPIPS of pairs (pip install lpips)")
    add("--num_images", type=int, default=10_000, metavar="N", help="samples of a model")
    add("--batch_size", type=int, default=64, metavar="N", help="images at a time")
    add("--samplers", default="dpmpp_2m:20", metavar="NAME:N,...", help="samplers and their steps, of a model")
    add("--seeds", type=int_list, default=(0,), metavar="N,...", help="several: the table shows medians")
    add("--guidance_scale", type=float, default=1.0, metavar="X", help="of a class-conditional model; classes take turns")
    add("--sd_path", metavar="PATH", help="where the Stable Diffusion model is now that a model was trained from")
    add("--vae", metavar="PATH", help="where the VAE is now that a model was trained with")
    add("--weights", default="ema", choices=("ema", "raw"), help="averaged weights, or the last step's")
    add("--amp", default="auto", choices=("auto", "no", "bf16", "fp16"), help="mixed precision of sampling")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    add("--save_folder", default="results", metavar="FOLDER", help="for metrics/quality.json and quality.png; where these are, for quality_2.json and so on")
    add("--overwrite", action="store_true", help="replace the quality.json and quality.png that this program wrote there")
    # fmt: on
    args = parser.parse_args(args)
    check_options(args, parser.defaults, "metrics")
    return args


def parse_samplers(text: str) -> list[tuple[str, int]]:
    """ "ddim:10,ddpm:50" -> [("ddim", 10), ("ddpm", 50)]."""
    pairs = [part.partition(":") for part in text.split(",")]
    if not all(name and is_number(steps) for name, _, steps in pairs):
        raise UserError(f"--samplers {text!r}: give names with steps, such as ddim:50,dpmpp_2m:10")
    return [(name, int(steps)) for name, _, steps in pairs]


def real_files(folder: Path, split: str | None) -> list[Path] | None:
    """Find the real images: a split where the folder holds splits, by train.py's rule."""
    return scan_split(folder, split) if folder.is_dir() else None


def captions_of(folder: Path, split: str | None, pipeline: Pipeline):
    """For a model that reads prompts: the captions of the split take turns. Else None."""
    if not pipeline.reads_prompts:
        return None
    found = walk(folder)
    texts = read_captions(folder, choose_split(folder, found.images, split).files, found=found)
    if texts is None:
        raise UserError(
            f"the model draws captions, and {folder} has none: put name.txt beside each image"
        )
    return pipeline.prompted([own[0] for own in texts])


def model_features(
    pipeline: Pipeline,
    features: Features,
    args,
    seed,
    sampler,
    steps,
    told=None,
    extra: TextImage | None = None,
):
    """(N, D) of sampled images on rank 0, None elsewhere. extra: is given the images, too."""
    found = []
    done = 0
    with dist.progress(total=args.num_images, desc=f"{sampler} {steps}", unit="img") as bar:
        for numbers, images in sampled(
            pipeline,
            args.num_images,
            args.batch_size,
            told,
            seed=seed,
            sampler=sampler,
            steps=steps,
            amp=args.amp,
            guidance_scale=args.guidance_scale,
        ):
            if len(images):
                found.append((list(numbers), features(images)))
                if extra is not None:
                    prompts = told(numbers)["prompts"] if extra.clip is not None else None
                    extra.add(numbers, images, prompts)
            done = min(done + args.batch_size * dist.world_size(), args.num_images)
            bar.update(done - bar.n)
    return gathered(found, "the model")


def quality_table(
    args,
    pipeline: Pipeline,
    real: Tensor | None,
    features: Features,
    extra: TextImage | None = None,
) -> tuple[list[dict], dict]:
    """(a row for each sampler, all metrics' medians over the seeds; what they mean), empty off
    rank 0."""
    rows = []
    meaning = {}
    for sampler, steps in parse_samplers(args.samplers):
        found = []
        seconds = 0.0
        told = captions_of(Path(args.real), args.split, pipeline)
        for seed in args.seeds:
            began = time.perf_counter()
            fake = model_features(pipeline, features, args, seed, sampler, steps, told, extra)
            more = extra.result() if extra is not None else {}
            seconds += (time.perf_counter() - began) / len(args.seeds)
            if fake is not None:
                values = {name: one["value"] for name, one in more.items()}
                found.append(compare(real, fake, features) | values)
                meaning = definitions(found[-1], features) | meanings(more)
        evaluations = steps if args.guidance_scale == 1 else 2 * steps  # with and without the class
        if found:
            numbers = [k for k, v in found[0].items() if isinstance(v, float)]
            row = {
                "sampler": sampler,
                "steps": steps,
                "evaluations": evaluations,
                "seconds": round(seconds, 1),
            }
            row |= {k: median(f[k] for f in found) for k in numbers}
            row[f"{features.name}_of_seeds"] = [f[features.name] for f in found]
            dist.log(
                "  ".join(
                    [
                        f"{sampler:>12} {steps:>5} steps",
                        *(f"{k} {row[k]:.4g}" for k in numbers),
                        f"{seconds:.0f} s",
                    ]
                )
            )
            rows.append(row)
    return rows, meaning


def save_quality(folder: Path, result: dict, name: str, overwrite: bool = False) -> None:
    """Write quality.json, and the distance against network evaluations as quality.png.

    Those that are there stay, and these get a number, unless overwrite is set and they are ours.
    """
    text = json.dumps(result, indent=2)
    create(folder)
    file = write_free(folder / "quality.json", lambda p: write_text(p, text), overwrite)
    rows = result["rows"]
    lines = []
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        own = sorted((r["evaluations"], r[name]) for r in rows if r["sampler"] == sampler)
        lines.append(Line(*zip(*own), sampler, dots=True))
    title = "FID" if name == "fid" else f"Frechet distance ({name})"
    plot = line_plot(
        lines,
        f"{title} against network evaluations",
        "evaluations",
        f"{result['num_fake']} images",
        log_x=True,
        log_y=True,
    )
    picture = file.with_suffix(".png")
    picture = write_free(picture, lambda p: write_png(plot, p), overwrite)
    dist.log(f"{file}, {picture}")


def main() -> None:
    args = parse()
    device = dist.setup(args.device)
    fake = Path(args.fake)
    real = Path(args.real)
    extra = open_text_image(args.clip, args.lpips, device)
    if fake.is_dir():
        files = scan(fake, sampled=True)
        warn_of_calls(fake, files)
        features = open_features(args.fid_features, device)
        if any(f.suffix.lower() in (".jpg", ".jpeg") for f in files):
            dist.log(f"warning: {fake} holds JPEG files, whose artefacts count; save as PNG")
        a, sizes = folder_features(real, args.size, features, real_files(real, args.split))
        b, others = folder_features(fake, args.size, features, files)
        check_sizes(sizes | others, features, f"{real} and {fake}")
        more = measure_folder(extra, fake, args.size) if extra is not None else {}
        if dist.is_main():
            warn_of_few(len(a), len(b))
            result = compare(a, b, features)
            result |= {name: one["value"] for name, one in more.items()}
            result["definitions"] = definitions(result, features) | meanings(more)
    else:
        pipeline = open_pipeline(str(fake), args.sd_path, args.weights, device, vae=args.vae)
        if args.clip is not None and not pipeline.reads_prompts:
            raise UserError(f"--clip measures images against their prompts, and {fake} reads none")
        for sampler, steps in parse_samplers(args.samplers):
            check_sampler(pipeline, sampler, steps, args.guidance_scale)
        size = pipeline.config.image_size
        if args.size not in (None, size):
            raise UserError(f"--size {args.size}: the model's images have {size} pixels")
        features = open_features(args.fid_features, device)
        a, _ = folder_features(real, size, features, real_files(real, args.split))
        if a is not None:
            if len(a) < 2:
                raise UserError(f"{real} holds {len(a)} usable image; a distance needs at least 2")
            warn_of_few(len(a), args.num_images)
        rows, meaning = quality_table(args, pipeline, a, features, extra)
        if dist.is_main():
            result = {
                "software": SOFTWARE,
                "checkpoint": str(fake),
                "weights": args.weights,
                "real": str(real),
                "size": size,
                "features": features.about,
                "num_real": len(a),
                "num_fake": args.num_images,
                "seeds": list(args.seeds),
                "definitions": meaning,
                "rows": rows,
            }
            save_quality(Path(args.save_folder) / "metrics", result, features.name, args.overwrite)
    if dist.is_main():
        print(json.dumps(result))
    dist.cleanup()


def check_sampler(pipeline: Pipeline, sampler: str, steps: int, guidance_scale: float) -> None:
    """Raises UserError for settings that the model cannot be sampled with, before the long work."""
    labels = torch.zeros(1, dtype=torch.long) if pipeline.conditional else None
    try:
        pipeline.frames(
            [0], sampler=sampler, steps=steps, labels=labels, guidance_scale=guidance_scale
        )
    except ValueError as error:
        raise UserError(f"--samplers {sampler}:{steps}: {error}") from None


if __name__ == "__main__":
    run_script(main)
