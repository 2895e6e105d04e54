"""Compute all metrics of a set of images, each with its definition, network and image count.

    Fréchet distance, KID   distances between real and generated images' features (distances.py)
    precision, recall       fractions of each set in the other's manifold
    Inception score         of Inception's class probabilities
    CLIP score              how well generated images go with their prompts
    LPIPS diversity         how much generated images differ

`python -m diffusion.evaluation.metrics` is another name of `python -m diffusion.evaluation`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import UserError
from .clip_score import CLIP_SCORE, ClipScore, measure, open_clip
from .distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    precision_recall,
)
from .diversity import DIVERSITY, MAX_PAIRS, diversity, open_lpips
from .features import Features, open_features

DEFINITIONS = {
    "frechet": "Frechet distance of the features' Gaussians, arXiv:1706.08500 eq. 6 (FID where X "
    "is Inception); lower is nearer",
    "kid": "squared MMD of the kernel (x.y / D + 1)^3, unbiased, arXiv:1801.01401; lower is nearer",
    "precision": "fraction of generated images in the real images' manifold (Kynkaanniemi et al. "
    "2019, k = 3)",
    "recall": "fraction of real images in the generated images' manifold (the same, k = 3)",
    "inception_score": "exp E KL(p(y|x) || p(y)), arXiv:1606.03498, mean over ten parts",
    "inception_score_std": "standard deviation of the inception score over the ten parts",
}


@dataclass(frozen=True, eq=False)
class Metrics:
    """Holds the networks of all metrics. clip, lpips: None where these are not asked for."""

    features: Features
    clip: ClipScore | None = None
    lpips: Callable | None = None

    def rows(self, numbers: Sequence[int], given: dict, images: np.ndarray) -> dict[str, Tensor]:
        """Compute what each image of a batch contributes; for LPIPS, keep the first images."""
        H, W = images.shape[1:3]
        rows = {"size": torch.tensor([[W, H]] * len(images)), "features": self.features(images)}
        rows["number"] = torch.tensor(numbers)
        if self.clip is not None:
            rows["clip"] = self.clip(images, given["prompts"])
        if self.lpips is not None:
            first = sum(number < MAX_PAIRS for number in numbers)
            rows["images"] = torch.from_numpy(images[:first])
        return rows

    def compare(self, real: dict[str, Tensor], fake: dict[str, Tensor]) -> dict[str, dict]:
        """Measure two sets by their rows: {name: record}. Raises UserError for too few images."""
        a = real["features"]
        b = fake["features"]
        n = len(a)
        m = len(b)
        if min(n, m) < 2:
            raise UserError(f"{n} real and {m} generated images: a distance needs 2 of each")
        name = self.features.name
        names = {"frechet": name, "kid": "kid" if self.features.is_inception else f"{name}_kid"}
        found = {
            "frechet": frechet_distance(*moments(a), *moments(b)),
            "kid": kernel_distance(a, b),
        }
        if min(n, m) > 3:
            found |= zip(("precision", "recall"), precision_recall(a, b))
        if (probabilities := self.features.probabilities(b)) is not None:
            found |= zip(("inception_score", "inception_score_std"), inception_score(probabilities))
        records = {
            names.get(key, key): measure(value, DEFINITIONS[key], self.features.about, m)
            | {"num_real": n}
            for key, value in found.items()
        }
        if self.clip is not None:
            value = float(fake["clip"].numpy().mean())
            records["clip_score"] = measure(value, CLIP_SCORE, self.clip.name, m)
        if self.lpips is not None:
            images = fake["images"].numpy()
            value = diversity(images, self.lpips, self.features.device)
            records["lpips_diversity"] = measure(value, DIVERSITY, "lpips 0.1, alex", len(images))
        return records


def open_metrics(
    features: str | None, clip: str | None, lpips: bool, device: torch.device
) -> Metrics:
    """Open the networks of --fid_features, --clip and --lpips. Raises UserError."""
    return Metrics(
        open_features(features, device),
        open_clip(clip, device) if clip is not None else None,
        open_lpips(device, "alex", "--lpips") if lpips else None,
    )


if __name__ == "__main__":
    from ..config import run_script
    from .__main__ import main

    run_script(main)
