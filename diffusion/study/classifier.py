"""A small network that tells styles apart: how much of what is drawn is of the style asked for.

    image (64 px) -> four convolutions of stride 2 -> mean over positions: features
                  -> one of the styles, or none of them

Trained on the styles' training images, mirrored, blurred and made noisy, so that it goes by the
drawing and not by what a VAE leaves of it. None of them: images cut into shuffled squares, and two
styles laid over another, so that what is broken counts for nothing. Its accuracy on held-out images
stands beside each of its numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files.checkpoint import atomic
from ..runtime.distributed import log, progress
from ..runtime.seeding import generator
from .styles import Style

SIDE = 64
WIDTHS = (16, 32, 64, 64)
STEPS = 400
BATCH = 48


class StyleNet(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> features (B, 64), class scores (B, K + 1), none last."""

    def __init__(self, classes: int):
        super().__init__()
        layers = []
        before = 3
        for width in WIDTHS:
            layers += [
                nn.Conv2d(before, width, 3, stride=2, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
            before = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(before, classes + 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x).mean((2, 3))
        return features, self.head(features)


def to_input(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, 64, 64) in [-1, 1]."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    if x.shape[-2:] != (SIDE, SIDE):
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    return x


def augmented(x: Tensor, g: torch.Generator) -> Tensor:
    """Half of a batch mirrored, half of it blurred, noise of a deviation up to 0.1."""
    coin = lambda share: torch.rand(len(x), 1, 1, 1, generator=g) < share  # noqa: E731
    x = torch.where(coin(0.5), x.flip(3), x)
    side = int(torch.randint(SIDE // 4, SIDE, (), generator=g))
    small = F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)
    blurred = F.interpolate(small, (SIDE, SIDE), mode="bilinear", align_corners=False)
    x = torch.where(coin(0.5), blurred, x)
    return x + 0.1 * torch.rand(len(x), 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)


def spoilt(x: Tensor, labels: Tensor, g: torch.Generator) -> Tensor:
    """Of a batch what belongs to no style: pairs of two styles mixed, else squares shuffled."""
    B = len(x)
    side = SIDE // 4
    tiles = x.unfold(2, side, side).unfold(3, side, side).reshape(B, 3, 16, side, side)
    order = torch.stack([torch.randperm(16, generator=g) for _ in range(B)])
    tiles = torch.stack([row[:, places] for row, places in zip(tiles, order)])
    tiles = tiles.view(B, 3, 4, 4, side, side).transpose(3, 4)
    partner = torch.randperm(B, generator=g)
    share = 0.35 + 0.3 * torch.rand(B, 1, 1, 1, generator=g)
    mixed = torch.lerp(x, x[partner], share)
    can = (labels != labels[partner]) & (torch.rand(B, generator=g) < 0.5)
    return torch.where(can.view(-1, 1, 1, 1), mixed, tiles.reshape(x.shape))


@dataclass(frozen=True, eq=False)
class Classifier:
    """styles: names in class order. accuracy: of held-out images: all, and of each style."""

    net: StyleNet
    styles: list[str]
    accuracy: float
    accuracies: dict[str, float]

    @torch.inference_mode()
    def outputs(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        """(N, H, W, 3) uint8 -> features (N, 64) float64, classes (N,)."""
        parts = [self.net(to_input(images[low : low + 128])) for low in range(0, len(images), 128)]
        features, scores = (torch.cat(p) for p in zip(*parts))
        return features.double(), scores.argmax(1)

    def share(self, images: np.ndarray, style: str) -> float:
        """Of the images that are taken for the style."""
        classes = self.outputs(images)[1]
        return float((classes == self.styles.index(style)).double().mean())


def accuracies(net: StyleNet, styles: list[Style], change: Callable | None = None) -> dict:
    """{style: share of its held-out images that is told right}. change: what to do to them."""
    judge = Classifier(net, [s.name for s in styles], 0, {})
    change = change or (lambda images: images)
    return {s.name: judge.share(change(s.images("held_out")), s.name) for s in styles}


def open_classifier(path: Path, styles: list[Style], seed: int, steps: int = STEPS) -> Classifier:
    """From the file of this study, or trained now; the same seed gives the same network."""
    torch.manual_seed(seed)
    net = StyleNet(len(styles))
    if path.is_file():
        net.load_state_dict(load_file(path))
    else:
        train(net, styles, seed, steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic(path, lambda p: save_file(net.state_dict(), p))
    net.eval().requires_grad_(False)
    found = accuracies(net, styles)
    counts = [len(s.held_out) for s in styles]
    mean = float(np.average(list(found.values()), weights=counts))
    log(f"classifier of {len(styles)} styles: {mean:.1%} of {sum(counts)} held-out images right")
    return Classifier(net, [s.name for s in styles], mean, found)


def train(net: StyleNet, styles: list[Style], seed: int, steps: int) -> None:
    """Adam on batches in which every style has the same share."""
    data = [to_input(style.images("train")) for style in styles]
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in progress(range(steps), desc="classifier of styles", leave=False):
        g = generator(seed, "classifier", step)
        labels = torch.randint(len(styles), (BATCH,), generator=g)
        rows = [data[k][int(torch.randint(len(data[k]), (), generator=g))] for k in labels.tolist()]
        x = torch.stack(rows)
        none = BATCH // 4
        x = torch.cat([spoilt(x[:none], labels[:none], g), x[none:]])
        labels[:none] = len(styles)
        _, scores = net(augmented(x, g))
        optimizer.zero_grad()
        F.cross_entropy(scores, labels).backward()
        optimizer.step()
        schedule.step()
