"""Feature networks for tests, and folders of pictures to measure."""

from pathlib import Path

import torch
from PIL import Image
from torch import nn

from diffusion.data import toy


class Pooled(nn.Module):
    """uint8 images to the mean and the contrast of 2x2 cells: (N, 24)."""

    def forward(self, x):
        x = x.float() / 255
        mean = nn.functional.adaptive_avg_pool2d(x, 2)
        spread = nn.functional.adaptive_avg_pool2d(x * x, 2) - mean * mean
        return torch.cat([mean.flatten(1), spread.flatten(1)], 1)


class Layers(nn.Module):
    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)[:, :48].repeat(1, 43)[:, :2048]


class Inception(nn.Module):
    """What clean-fid asks of NVIDIA's file: layers, and output for class scores."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()
        self.output = nn.Linear(2048, 10)

    def forward(self, x, return_features: bool = False):
        return self.layers(x)


def pictures(folder: Path, indices, size=16) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for i in indices:
        Image.fromarray(toy.draw(i, size)).save(folder / f"{i:03d}.png")
    return folder
