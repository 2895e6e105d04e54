"""Every solver, spacing and number of steps on one model: which default gives the best pictures?

python benchmarks/solvers.py results/model.pt REAL_FOLDER --features FEATURES.pt --out FILE.json
python benchmarks/solvers.py ... --only dpmpp_2m:karras,unipc2:logsnr --seed 1 --images 1000

Prints, for each number of network evaluations, the Fréchet distance to the real images in the
features of a TorchScript network (of the tests, or Inception without --features), and the PSNR to
the picture that a deterministic solver makes of the same noise in 100 evaluations.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import common
import numpy as np
import torch

sys.path.insert(0, str(common.ROOT))

import diffusion  # noqa: E402
from diffusion.data.images import read_image  # noqa: E402
from diffusion.evaluation.distances import frechet_distance, moments  # noqa: E402
from diffusion.evaluation.features import open_features  # noqa: E402
from diffusion.pictures.grid import to_uint8  # noqa: E402
from diffusion.process.names import SAMPLERS, SPACINGS  # noqa: E402

REFERENCE = ("adams4", 100, "logsnr")


def batches_of(pipeline, count: int, batch: int, **options):
    """Yield (b, H, W, 3) uint8 of `count` images."""
    for low in range(0, count, batch):
        indices = range(low, min(low + batch, count))
        labels = pipeline.labels_in_turn(indices)
        yield to_uint8(pipeline.sample(indices, labels=labels, **options))


def chunks(items: list, size: int = 100) -> list:
    return [items[i : i + size] for i in range(0, len(items), size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("real")
    parser.add_argument("--features")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", default="5,10,20,50")
    parser.add_argument("--only", help="sampler:spacing,... (default: all)")
    parser.add_argument("--out", default="solvers.json")
    args = parser.parse_args()
    device = torch.device("cpu")
    pipeline = diffusion.load(args.model)
    features = open_features(args.features, device)
    side = pipeline.height

    files = sorted(file for file in Path(args.real).iterdir() if file.is_file())
    pictures = [read_image(file, side) for file in files]
    real = moments(torch.cat([features(np.stack(part)) for part in chunks(pictures)]))

    def distance(images: list) -> float:
        return frechet_distance(*moments(torch.cat([*map(features, images)])), *real)

    common = dict(count=args.images, batch=16, seed=args.seed)
    name, steps, spacing = REFERENCE
    exact = list(batches_of(pipeline, **common, sampler=name, steps=steps, spacing=spacing))
    print(f"{name} at {steps}, {spacing}: {distance(exact):.0f}", flush=True)
    chosen = itertools.product(SAMPLERS, SPACINGS)
    if args.only:
        chosen = [tuple(pair.split(":")) for pair in args.only.split(",")]
    found = []
    for (name, spacing), steps in itertools.product(chosen, map(int, args.steps.split(","))):
        began = time.perf_counter()
        options = dict(sampler=name, steps=steps, spacing=spacing)
        images = list(batches_of(pipeline, **common, **options))
        errors = [((a / 255.0 - b / 255.0) ** 2).mean() for a, b in zip(images, exact)]
        found.append(
            options
            | {
                "frechet": round(distance(images), 1),
                "psnr": round(float(-10 * torch.tensor(errors).mean().log10()), 2),
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
        print(found[-1], flush=True)
        Path(args.out).write_text(json.dumps(vars(args) | {"found": found}, indent=1))


if __name__ == "__main__":
    main()
