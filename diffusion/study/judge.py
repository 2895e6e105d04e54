"""What is measured of a cell's images. Every number stands with its definition, model and count."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.images import read_image
from ..evaluation.clip_score import CLIP_SCORE, ClipScore, measure, open_clip
from ..evaluation.distances import frechet_distance, moments
from ..evaluation.features import Features, open_features
from ..files.output import is_ours, numbered
from ..runtime.distributed import log
from ..runtime.seeding import permutation
from ..sampling.pipeline import Pipeline
from .classifier import Classifier, accuracies
from .plan import Settings
from .styles import Style

CLASSIFIER = "classifier.safetensors, trained by this study"


@dataclass(eq=False)
class Judge:
    """features: of --features, or None: the classifier's own. classifier: None of one style."""

    styles: list[Style]
    classifier: Classifier | None
    features: Features | None
    clip: ClipScore | None

    def __post_init__(self):
        self.references: dict[str, tuple[Tensor, Tensor]] = {}

    def style(self, name: str) -> Style:
        return next(s for s in self.styles if s.name == name)

    def extract(self, images: np.ndarray) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, D) float64."""
        if self.features is None:
            return self.classifier.outputs(images)[0]
        parts = [images[low : low + 64] for low in range(0, len(images), 64)]
        return torch.cat([self.features(part) for part in parts])

    def frechet(self, images: np.ndarray, name: str) -> dict:
        style = self.style(name)
        if name not in self.references:
            self.references[name] = moments(self.extract(style.images("held_out")))
        value = frechet_distance(*moments(self.extract(images)), *self.references[name])
        model = CLASSIFIER if self.features is None else self.features.about
        return measure(
            value,
            f"Frechet distance (arXiv:1706.08500 eq. 6) to {len(style.held_out)} "
            f"held-out images of {name}, in features of the named network; not FID",
            model,
            len(images),
        )

    def share(self, images: np.ndarray, name: str) -> dict:
        judge = self.classifier
        told = (
            f"share of the images that the classifier of {len(judge.styles)} styles (or none) "
            f"takes for {name}; it has {judge.accuracy:.1%} of held-out images right, "
            f"{judge.accuracies[name]:.1%} of this style's"
        )
        return measure(judge.share(images, name), told, CLASSIFIER, len(images))

    def __call__(
        self, images: np.ndarray, prompts: list[str], style: str, other: str | None = None
    ):
        """{name: measure} of drawn images (N, H, W, 3) uint8; `other_...`: of a second style."""
        found = {}
        for name, prefix in ((style, ""), (other, "other_")):
            if name is not None and self.classifier is not None:
                found[f"{prefix}style_share"] = self.share(images, name)
            if name is not None:
                found[f"{prefix}frechet"] = self.frechet(images, name)
        if self.clip is not None:
            score = self.score(images, prompts)
            found["clip_score"] = measure(score, CLIP_SCORE, self.clip.name, len(images))
        return found

    def score(self, images: np.ndarray, prompts: list[str]) -> float:
        pairs = [(images[i : i + 32], prompts[i : i + 32]) for i in range(0, len(images), 32)]
        return float(torch.cat([self.clip(*pair) for pair in pairs]).mean())

    def real(self, name: str, count: int) -> dict:
        """The same of as many training images of the style: what perfect drawings would have."""
        train = self.style(name).images("train")
        images = train[permutation(len(train), "real", name)[:count]]
        found = {"frechet": self.frechet(images, name)}
        if self.classifier is not None:
            found["style_share"] = self.share(self.style(name).images("held_out"), name)
        return found


def open_networks(s: Settings, device: torch.device) -> tuple[Features | None, ClipScore | None]:
    """What --features and --clip name. Raises UserError for what cannot be used."""
    features = open_features(s.features, device) if s.features is not None else None
    return features, open_clip(s.clip, device) if s.clip is not None else None


def through_vae(pipeline: Pipeline, most: int = 64):
    """Images -> what is left of them by the base's VAE, the first `most`."""
    from ..pictures.grid import to_uint8

    def change(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(images[:most]).permute(0, 3, 1, 2).float() / 127.5 - 1
        return np.concatenate([to_uint8(pipeline.decode(pipeline.encode(p))) for p in x.split(16)])

    return change


def check_classifier(judge: Classifier, styles: list[Style], pipeline: Pipeline) -> dict:
    """How far the classifier can be trusted, as measures."""
    after = accuracies(judge.net, styles, through_vae(pipeline))
    mean = float(np.mean(list(after.values())))
    log(f"... and {mean:.1%} of those that the base's VAE has encoded and decoded")
    total = sum(len(s.held_out) for s in styles)
    few = sum(min(64, len(s.held_out)) for s in styles)
    return {
        "heldout_accuracy": measure(
            judge.accuracy, "share of held-out images told right", CLASSIFIER, total
        ),
        "heldout_accuracy_after_vae": measure(
            mean,
            "the same of images that the base's VAE has encoded and decoded, mean over styles",
            CLASSIFIER,
            few,
        ),
    }


def read_images(folder: Path) -> np.ndarray:
    """Read the pictures that sample.py has written to a folder, (N, H, W, 3) uint8, in order."""
    files = [file for _, file in sorted(numbered(folder).items()) if file.suffix == ".png"]
    files = [file for file in files if is_ours(file)] or files  # those of before do not say
    return np.stack([read_image(file, None) for file in files])
