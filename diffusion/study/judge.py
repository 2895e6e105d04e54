"""Measure a cell's images. Every number stands with its definition, model and number of images."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..evaluation.clip_score import CLIP_SCORE, ClipScore, measure
from ..evaluation.distances import frechet_distance, moments
from ..evaluation.features import Features
from ..pictures.grid import to_uint8
from ..runtime.seeding import permutation
from ..sampling.pipeline import Pipeline
from .classifier import Classifier, to_pixels
from .styles import Style

CLASSIFIER = "classifier.safetensors, trained by this study"
MAX_DECODED = 64  # held-out images of a style that go through the VAE


@dataclass(frozen=True, eq=False)
class Judge:
    """Measure images, by style.

    classifier: None where there is one style only. features: of --features, or None for the
    classifier's own.
    """

    styles: dict[str, Style]
    classifier: Classifier | None
    features: Features | None
    clip: ClipScore | None

    @cached_property
    def references(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and covariance of each style's held-out images' features."""
        return {name: moments(self.extract(s.held_out.pixels)) for name, s in self.styles.items()}

    def extract(self, images: np.ndarray) -> Tensor:
        """Compute features (N, D) float64 of (N, H, W, 3) uint8."""
        if self.features is None:
            return self.classifier.outputs(images)[0]
        return torch.cat([self.features(images[i : i + 64]) for i in range(0, len(images), 64)])

    def frechet(self, images: np.ndarray, name: str) -> dict:
        value = frechet_distance(*moments(self.extract(images)), *self.references[name])
        definition = (
            "Frechet distance (arXiv:1706.08500 eq. 6) to "
            f"{len(self.styles[name].held_out)} held-out images of {name}, in features of the "
            "named network; not FID"
        )
        model = CLASSIFIER if self.features is None else self.features.about
        return measure(value, definition, model, len(images))

    def fraction(self, images: np.ndarray, name: str) -> dict:
        classifier = self.classifier
        definition = (
            f"fraction of the images that the classifier of {len(self.styles)} styles (or none) "
            f"takes for {name}; its accuracy on held-out images is {classifier.accuracy:.1%}, "
            f"on those of this style {classifier.held_out[name]:.1%}"
        )
        return measure(classifier.fraction(images, name), definition, CLASSIFIER, len(images))

    def __call__(
        self, images: np.ndarray, prompts: list[str], style: str, other: str | None = None
    ) -> dict[str, dict]:
        """Measure sampled images (N, H, W, 3) uint8; other_...: by a second style."""
        found = {}
        for prefix, name in {"": style, "other_": other}.items():
            if name is None:
                continue
            if self.classifier is not None:
                found[f"{prefix}style_share"] = self.fraction(images, name)
            found[f"{prefix}frechet"] = self.frechet(images, name)
        if self.clip is not None:
            chunks = [slice(low, low + 32) for low in range(0, len(images), 32)]
            value = float(torch.cat([self.clip(images[i], prompts[i]) for i in chunks]).mean())
            found["clip_score"] = measure(value, CLIP_SCORE, self.clip.name, len(images))
        return found

    def real(self, name: str, count: int) -> dict[str, dict]:
        """Measure as many training images of a style: what perfect samples would have."""
        style = self.styles[name]
        chosen = permutation(len(style.train), "real", name)[:count]
        found = {"frechet": self.frechet(style.train.pixels[chosen], name)}
        if self.classifier is not None:
            found["style_share"] = self.fraction(style.held_out.pixels, name)
        return found


def check_classifier(classifier: Classifier, pipeline: Pipeline) -> dict[str, dict]:
    """Measure how far the classifier can be trusted."""
    counts = [len(style.held_out) for style in classifier.styles]
    right = []
    for style in classifier.styles:
        batches = to_pixels(style.held_out.pixels[:MAX_DECODED]).split(16)
        decoded = [to_uint8(pipeline.decode(pipeline.encode(x))) for x in batches]
        right.append(classifier.fraction(np.concatenate(decoded), style.name))
    about = "accuracy on held-out images"
    vae = f"{about} that the base model's VAE has encoded and decoded, mean over styles"
    count = sum(min(MAX_DECODED, count) for count in counts)
    return {
        "heldout_accuracy": measure(classifier.accuracy, about, CLASSIFIER, sum(counts)),
        "heldout_accuracy_after_vae": measure(float(np.mean(right)), vae, CLASSIFIER, count),
    }
