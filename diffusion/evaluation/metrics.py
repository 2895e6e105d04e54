"""Distances between sets of images, as pure functions of features; and the command that measures.

python -m diffusion.evaluation.metrics REAL FAKE                  two folders
python -m diffusion.evaluation.metrics REAL results/model.pt      a folder, and a model's samples
python -m diffusion.evaluation.metrics REAL results/model.pt --samplers ddim:10,ddim:50,dpmpp_2m:10

Features are (N, D), float64 on the CPU. With clean-fid's Inception the Fréchet distance is FID;
with any other network (--fid_features) it is named after that network. The last line is JSON.
"""

import json
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from .. import UserError
from .. import distributed as dist
from ..assemble import open_pipeline
from ..config import Parser, int_list, run_script
from ..data.datasets import folder_set, scan
from ..pipeline import Pipeline
from ..weights.checkpoint import write_text
from .features import (
    Features,
    check_sizes,
    folder_features,
    gathered,
    open_features,
    sampled,
)
from .plot import Line, line_plot
from .viz import save_png

FEW = 2048  # images below which a Fréchet distance says little; Inception has as many features


class Moments:
    """Mean and covariance of features that come in pieces, on several ranks."""

    def __init__(self, dim: int):
        self.n = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        self.n += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def reduce(self) -> tuple[Tensor, Tensor]:
        """(mean (D,), covariance (D, D)) of what all ranks have added."""
        for part in (self.n, self.sum, self.outer):
            dist.all_reduce_sum(part)
        mean = self.sum / self.n
        return mean, (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, unbiased covariance) of (N, D) features, N > 1."""
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + Tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), arXiv:1706.08500 eq. 6.

    The root's trace is that of (cov_a^(1/2) cov_b cov_a^(1/2))^(1/2), which is symmetric.
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    mean = mean_a - mean_b
    return float(mean @ mean + cov_a.trace() + cov_b.trace() - 2 * cross)


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = 100, most: int = 1000, seed: int = 0
) -> float:
    """KID: the squared MMD of kernel (x.y / D + 1)^3, unbiased (arXiv:1801.01401, section 4).

    The mean over random subsets of at most `most` images, drawn as clean-fid draws them.
    """
    random = np.random.RandomState(seed)
    D, m = real.shape[1], min(len(real), len(fake), most)
    total = 0.0
    for _ in range(subsets):
        x = fake[random.choice(len(fake), m, replace=False)]
        y = real[random.choice(len(real), m, replace=False)]
        same = (x @ x.T / D + 1) ** 3 + (y @ y.T / D + 1) ** 3
        across = (x @ y.T / D + 1) ** 3
        total += float(
            (same.sum() - same.diagonal().sum()) / (m * (m - 1)) - 2 * across.sum() / m**2
        )
    return total / subsets


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Shares of one set inside the other's manifold (Kynkäänniemi et al. 2019, eq. 1 and 2).

    A set's manifold: the balls around its points that reach their k-th nearest neighbour.
    """

    def inside(points: Tensor, manifold: Tensor) -> float:
        radius = torch.cat([torch.cdist(part, manifold).kthvalue(k + 1, dim=1).values
                            for part in manifold.split(1024)])  # fmt: skip
        hit = [(torch.cdist(part, manifold) <= radius).any(1) for part in points.split(1024)]
        return float(torch.cat(hit).double().mean())

    return inside(fake, real), inside(real, fake)


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and deviation over splits of exp(E KL(p(y|x) || p(y))), arXiv:1606.03498 section 4."""
    order = np.random.RandomState(0).permutation(len(probabilities))  # files may come by class
    scores, probabilities = [], probabilities[order]
    for p in probabilities.tensor_split(min(splits, len(probabilities))):
        kl = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))
        scores.append(kl.sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


def compare(real: Tensor, fake: Tensor, features: Features) -> dict:
    """All metrics of two sets' features. Raises UserError for fewer than 2 images."""
    n, m, name = len(real), len(fake), features.name
    if min(n, m) < 2:
        raise UserError(f"{n} real and {m} generated images: a distance needs at least 2 of each")
    kid = "kid" if features.is_inception else f"{name}_kid"
    found = {name: frechet_distance(*moments(real), *moments(fake)),
             kid: kernel_distance(real, fake)}  # fmt: skip
    if min(n, m) > 3:
        found["precision"], found["recall"] = precision_recall(real, fake)
    if (probabilities := features.probabilities(fake)) is not None:
        found["inception_score"], found["inception_score_std"] = inception_score(probabilities)
    return found | {"features": features.about, "num_real": n, "num_fake": m}


def warn_of_few(n: int, m: int) -> None:
    if min(n, m) < FEW:
        dist.log(f"warning: {n} real and {m} generated images; below {FEW} a Fréchet distance is "
                 "mostly bias, and comparable only at equal numbers")  # fmt: skip


# --- the command ---------------------------------------------------------------------------------


def parse(args: list[str] | None = None):
    # fmt: off
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("real", metavar="REAL", help="folder of real images")
    add("fake", metavar="FAKE", help="folder of generated images (PNG), or a model.pt or .safetensors file")
    add("--size", type=int, metavar="N", help="cut and resize both to N pixels as training does (a model's own size)")
    add("--fid_features", metavar="FILE", help="TorchScript network instead of Inception: uint8 NCHW to (N, D)")
    add("--num_images", type=int, default=10_000, metavar="N", help="samples of a model")
    add("--batch_size", type=int, default=64, metavar="N", help="images at a time")
    add("--samplers", default="dpmpp_2m:20", metavar="NAME:N,...", help="samplers and their steps, of a model")
    add("--seeds", type=int_list, default=(0,), metavar="N,...", help="several: the table shows medians")
    add("--guidance_scale", type=float, default=1.0, metavar="X", help="of a class-conditional model; classes take turns")
    add("--weights", default="ema", choices=("ema", "raw"), help="averaged weights, or the last step's")
    add("--amp", default="auto", choices=("auto", "no", "bf16", "fp16"), help="mixed precision of sampling")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    add("--save_folder", default="results", metavar="FOLDER", help="for metrics/quality.json and quality.png")
    # fmt: on
    args = parser.parse_args(args)
    for name in ("num_images", "batch_size", "size"):
        least = 2 if name == "num_images" else 1  # a covariance
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    return args


def parse_samplers(text: str) -> list[tuple[str, int]]:
    """ "ddim:10,ddpm:50" -> [("ddim", 10), ("ddpm", 50)]."""
    pairs = [part.partition(":") for part in text.split(",")]
    if not all(name and steps.isdigit() for name, _, steps in pairs):
        raise UserError(f"--samplers {text!r}: give names with steps, such as ddim:50,dpmpp_2m:10")
    return [(name, int(steps)) for name, _, steps in pairs]


def captions_of(folder: Path, pipeline: Pipeline):
    """For a model that reads prompts: the real images' captions take turns. Else None."""
    if not pipeline.reads_prompts:
        return None
    captions = folder_set(folder).captions
    if captions is None:
        raise UserError(f"the model draws captions, and {folder} has none: put name.txt beside "
                        "each image")  # fmt: skip
    return lambda indices: {"prompts": [captions[i % len(captions)] for i in indices]}


def model_features(pipeline: Pipeline, features: Features, args, seed, sampler, steps, told=None):
    """(N, D) of sampled images on rank 0, None elsewhere."""
    found, done = [], 0
    with dist.progress(total=args.num_images, desc=f"{sampler} {steps}", unit="img") as bar:
        for numbers, images in sampled(pipeline, args.num_images, args.batch_size, told, seed=seed,
                              sampler=sampler, steps=steps, amp=args.amp,
                              guidance_scale=args.guidance_scale):  # fmt: skip
            if len(images):
                found.append((list(numbers), features(images)))
            done = min(done + args.batch_size * dist.world_size(), args.num_images)
            bar.update(done - bar.n)
    return gathered(found, "the model")


def quality_table(args, pipeline: Pipeline, real: Tensor | None, features: Features) -> list[dict]:
    """A row for each sampler, all metrics' medians over the seeds. Empty off rank 0."""
    rows = []
    for sampler, steps in parse_samplers(args.samplers):
        found, seconds, told = [], 0.0, captions_of(Path(args.real), pipeline)
        for seed in args.seeds:
            began = time.perf_counter()
            fake = model_features(pipeline, features, args, seed, sampler, steps, told)
            seconds += (time.perf_counter() - began) / len(args.seeds)
            if fake is not None:
                found.append(compare(real, fake, features))
        evaluations = steps if args.guidance_scale == 1 else 2 * steps  # with and without the class
        if found:
            numbers = [k for k, v in found[0].items() if isinstance(v, float)]
            row = {"sampler": sampler, "steps": steps, "evaluations": evaluations,
                   "seconds": round(seconds, 1)}  # fmt: skip
            row |= {k: median(f[k] for f in found) for k in numbers}
            row[f"{features.name}_of_seeds"] = [f[features.name] for f in found]
            dist.log("  ".join([f"{sampler:>12} {steps:>5} steps", *(
                f"{k} {row[k]:.4g}" for k in numbers), f"{seconds:.0f} s"]))  # fmt: skip
            rows.append(row)
    return rows


def save_quality(folder: Path, result: dict, name: str) -> None:
    """quality.json, and the distance against network evaluations as quality.png."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "quality.json", json.dumps(result, indent=2))
    rows, lines = result["rows"], []
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        own = sorted((r["evaluations"], r[name]) for r in rows if r["sampler"] == sampler)
        lines.append(Line(*zip(*own), sampler, dots=True))
    title = "FID" if name == "fid" else f"Frechet distance ({name})"
    plot = line_plot(lines, f"{title} against network evaluations", "evaluations",
                     f"{result['num_fake']} images", log_x=True, log_y=True)  # fmt: skip
    save_png(plot, folder / "quality.png")


def main() -> None:
    args = parse()
    device = dist.setup(args.device)
    fake, real = Path(args.fake), Path(args.real)
    if fake.is_dir():
        features = open_features(args.fid_features, device)
        if any(f.suffix.lower() in (".jpg", ".jpeg") for f in scan(fake)):
            dist.log(f"warning: {fake} holds JPEG files, whose artefacts count; save as PNG")
        a, sizes = folder_features(real, args.size, features)
        b, others = folder_features(fake, args.size, features)
        check_sizes(sizes | others, features, f"{real} and {fake}")
        if dist.is_main():
            warn_of_few(len(a), len(b))
            result = compare(a, b, features)
    else:
        pipeline = open_pipeline(str(fake), None, args.weights, device)
        for sampler, steps in parse_samplers(args.samplers):
            check_sampler(pipeline, sampler, steps, args.guidance_scale)
        size = pipeline.config.image_size
        if args.size not in (None, size):
            raise UserError(f"--size {args.size}: the model's images have {size} pixels")
        features = open_features(args.fid_features, device)
        a, _ = folder_features(real, size, features)
        if a is not None:
            if len(a) < 2:
                raise UserError(f"{real} holds {len(a)} usable image; a distance needs at least 2")
            warn_of_few(len(a), args.num_images)
        rows = quality_table(args, pipeline, a, features)
        if dist.is_main():
            result = {"checkpoint": str(fake), "weights": args.weights, "real": str(real),
                      "size": size, "features": features.about, "num_real": len(a),
                      "num_fake": args.num_images, "seeds": list(args.seeds),
                      "rows": rows}  # fmt: skip
            save_quality(Path(args.save_folder) / "metrics", result, features.name)
    if dist.is_main():
        print(json.dumps(result))
    dist.cleanup()


def check_sampler(pipeline: Pipeline, sampler: str, steps: int, guidance_scale: float) -> None:
    """Raises UserError for settings that the model cannot be sampled with, before the long work."""
    labels = torch.zeros(1, dtype=torch.long) if pipeline.conditional else None
    try:
        pipeline.frames([0], sampler=sampler, steps=steps, labels=labels,
                        guidance_scale=guidance_scale)  # fmt: skip
    except ValueError as error:
        raise UserError(f"--samplers {sampler}:{steps}: {error}") from None


if __name__ == "__main__":
    run_script(main)
