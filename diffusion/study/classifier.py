"""Train a small network that tells styles apart, to count the images that show the right one.

    image (64 px) -> four convolutions of stride 2 -> mean over positions: features
                  -> one of the styles, or none of them

It is trained on the styles' training images, mirrored, blurred and made noisy, so that it goes by
the drawing and not by what a VAE leaves of it. None of them: images cut into shuffled squares, and
blends of two styles, so that broken images count for nothing. Its accuracy on held-out images
stands beside each of its numbers.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import UserError
from ..data.batch import channels_first
from ..data.batches import to_unit
from ..files.strict import load_strict
from ..files.tensors import read_safetensors, write_tensors
from ..runtime.distributed import log, progress
from ..runtime.seeding import generator
from .styles import Style

SIDE = 64
WIDTHS = (16, 32, 64, 64)
STEPS = 400
BATCH = 48


class StyleNet(nn.Module):
    """Map (B, 3, 64, 64) in [-1, 1] to features (B, 64), class scores (B, K + 1), none last."""

    def __init__(self, classes: int):
        super().__init__()
        layers = []
        for before, width in pairwise((3, *WIDTHS)):
            convolution = nn.Conv2d(before, width, 3, stride=2, padding=1)
            layers += [convolution, nn.GroupNorm(8, width), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes + 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x).mean((2, 3))
        return features, self.head(features)


def resize(x: Tensor, side: int, antialias: bool = True) -> Tensor:
    return F.interpolate(x, (side, side), mode="bilinear", antialias=antialias)


def to_pixels(images: np.ndarray) -> Tensor:
    """Convert (N, H, W, 3) uint8 to (N, 3, H, W) in [-1, 1]."""
    return to_unit(channels_first(images))


def to_input(images: np.ndarray) -> Tensor:
    """Convert (N, H, W, 3) uint8 to (N, 3, 64, 64) in [-1, 1]."""
    return resize(to_pixels(images), SIDE)


def augment(x: Tensor, g: torch.Generator) -> Tensor:
    """Mirror half of a batch, blur half of it, add noise of a standard deviation up to 0.1."""

    def uniform():
        return torch.rand(len(x), 1, 1, 1, generator=g)

    x = torch.where(uniform() < 0.5, x.flip(3), x)
    side = int(torch.randint(SIDE // 4, SIDE, (), generator=g))
    blurred = resize(resize(x, side), SIDE, antialias=False)
    x = torch.where(uniform() < 0.5, blurred, x)
    return x + 0.1 * uniform() * torch.randn(x.shape, generator=g)


def break_images(x: Tensor, labels: Tensor, g: torch.Generator) -> Tensor:
    """Make of images ones that show no style: blends of two styles, else squares shuffled."""
    B = len(x)
    squares = rearrange(x, "b c (i h) (j w) -> b (i j) c h w", i=4, j=4)
    squares = torch.stack([row[torch.randperm(16, generator=g)] for row in squares])
    shuffled = rearrange(squares, "b (i j) c h w -> b c (i h) (j w)", i=4)
    partner = torch.randperm(B, generator=g)
    weight = 0.35 + 0.3 * torch.rand(B, 1, 1, 1, generator=g)
    blended = torch.lerp(x, x[partner], weight)
    blend = (labels != labels[partner]) & (torch.rand(B, generator=g) < 0.5)
    return torch.where(blend.view(-1, 1, 1, 1), blended, shuffled)


def train(net: StyleNet, styles: list[Style], seed: int, steps: int) -> None:
    """Train by AdamW on batches in which every style is equally frequent."""
    data = [to_input(style.train.pixels) for style in styles]
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    broken = BATCH // 4
    for step in progress(range(steps), desc="classifier of styles", leave=False):
        g = generator(seed, "classifier", step)
        labels = torch.randint(len(styles), (BATCH,), generator=g)
        rows = [data[k][torch.randint(len(data[k]), (), generator=g)] for k in labels.tolist()]
        x = torch.stack(rows)
        x[:broken] = break_images(x[:broken], labels[:broken], g)
        labels[:broken] = len(styles)
        _, scores = net(augment(x, g))
        optimizer.zero_grad()
        F.cross_entropy(scores, labels).backward()
        optimizer.step()
        schedule.step()


@dataclass(frozen=True, eq=False)
class Classifier:
    """Hold a trained network and its styles, in class order."""

    net: StyleNet
    styles: list[Style]

    @torch.inference_mode()
    def outputs(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        """Map (N, H, W, 3) uint8 to features (N, 64) float64 and classes (N,)."""
        chunks = [images[low : low + 128] for low in range(0, len(images), 128)]
        features, scores = map(torch.cat, zip(*(self.net(to_input(chunk)) for chunk in chunks)))
        return features.double(), scores.argmax(1)

    def fraction(self, images: np.ndarray, style: str) -> float:
        """Compute the fraction of images that are classified as a style."""
        index = [s.name for s in self.styles].index(style)
        return float((self.outputs(images)[1] == index).double().mean())

    @cached_property
    def held_out(self) -> dict[str, float]:
        """Accuracy on each style's held-out images."""
        return {s.name: self.fraction(s.held_out.pixels, s.name) for s in self.styles}

    @property
    def accuracy(self) -> float:
        """Accuracy on all held-out images."""
        counts = [len(s.held_out) for s in self.styles]
        return float(np.average(list(self.held_out.values()), weights=counts))


def open_classifier(path: Path, styles: list[Style], seed: int, steps: int = STEPS) -> Classifier:
    """Load a study's classifier, or train it; the same seed gives the same network."""
    torch.manual_seed(seed)
    net = StyleNet(len(styles))
    if path.exists():
        try:
            net = load_strict(net, read_safetensors(path)[0], path)
            return Classifier(net, styles)
        except UserError as error:
            log(f"warning: {error}; the classifier is trained again")
    train(net, styles, seed, steps)
    write_tensors(path, net.state_dict())
    return Classifier(net.eval().requires_grad_(False), styles)
