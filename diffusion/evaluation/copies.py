"""Tell which generated images are copies of training images, by the nearest ones in some features.

    d(x)   = min |f(x) - f(y)| over the training images y and their mirror images
    copies = fraction of generated images x with d(x) < the 1 % quantile of d(held-out image)

A model that has learned what its images have in common gives about 0.01. Blurred images are near to
everything, and give more in pixels: the picture of the pairs shows which it is.

While a model trains (--fid_copies) the quantile is that of training images, each measured against
all others: a small set holds too few images out. Pictures of the same thing make it smaller; the
same picture twice does not count.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import UserError
from ..data.batches import Batches
from ..data.images import read_image
from ..pictures.grid import strip
from ..runtime.distributed import all_reduce_sum, progress, rank, world_size
from .clip_score import measure
from .features import Features

COPIES = (
    "fraction of generated images nearer to a training image or its mirror image than 99 % of the "
    "held-out images are; medians of the distances to the nearest training and held-out images"
)
FEWEST = 100  # held-out images, below which there is no 1 % quantile
CHUNK = 256  # images that are in memory at a time, and whose distances to all others are
SAME = 1e-4  # of a feature's length: what is nearer is the same image
PAIRS = 16  # in the picture


def nearest(points: Tensor, others: Tensor) -> Tensor:
    """Measure the distance of each of (N, D) points to the nearest of (M, D) others: (N,)."""
    return torch.cat([torch.cdist(part, others).amin(1) for part in points.split(CHUNK)])


def features_of(data: Batches, features: Features) -> Tensor:
    """Compute the features of n training images, then of their mirror images: (2 n, D) float64.

    Ranks share the work.
    """
    n = len(data)
    width = features(data.pixels[data.train[:1]]).shape[1]
    found = torch.zeros((2 * n, width), dtype=torch.float64)
    chunks = [(low, direction) for direction in (1, -1) for low in range(0, n, CHUNK)]
    for low, direction in progress(chunks[rank() :: world_size()], desc="copies", leave=False):
        rows = data.train[low : low + CHUNK]
        part = features(np.ascontiguousarray(data.pixels[rows][:, :, ::direction]))
        first = low if direction == 1 else n + low
        found[first : first + len(part)] = part
    return all_reduce_sum(found)


def nearness(train: Tensor) -> Tensor:
    """Give the 1 % quantile of the distances of training images to the nearest of the others.

    train: see `features_of`. An image's own mirror image is none of the others, nor is the same
    image another time. 0 where there are no others.
    """
    n = len(train) // 2
    found = []
    for rows in torch.arange(n).split(CHUNK):
        points = train[rows]
        distances = torch.cdist(points, train)
        for own in (rows, rows + n):
            distances.scatter_(1, own[:, None], math.inf)
        distances[distances <= SAME * points.norm(dim=1, keepdim=True)] = math.inf
        found.append(distances.amin(1))
    nearest_others = torch.cat(found)
    nearest_others = nearest_others[nearest_others.isfinite()]
    return nearest_others.quantile(0.01) if len(nearest_others) else torch.zeros(())


def find_copies(
    features: Features, data: Batches, real: dict, fake: dict, files: list[Path]
) -> tuple[dict, Image.Image]:
    """Compare the rows (see `Metrics.rows`) of real and generated images with training images.

    data: of training. Real images that are none of its training images are held-out ones. files:
    of the generated images. Gives the record, and a picture of the nearest pairs. Raises UserError
    for too few held-out images.
    """
    n = len(data)
    train = features_of(data, features)
    others, samples = real["features"], fake["features"]
    usual = nearest(others, train)
    held_out = usual > SAME * others.norm(dim=1)
    count = int(held_out.sum())
    if count < FEWEST:
        raise UserError(
            f"--copies: {count} images of REAL are not trained on; to tell what is near it takes "
            f"{FEWEST}: name a folder of others as REAL"
        )
    distances = nearest(samples, train)
    near = distances < usual[held_out].quantile(0.01)
    record = measure(float(near.double().mean()), COPIES, features.about, len(samples)) | {
        "num_held_out": count,
        "nearest_train": float(distances.median()),
        "nearest_held_out": float(nearest(samples, others[held_out]).median()),
    }
    order = distances.argsort()[:PAIRS]
    images = [read_image(files[i], data.pixels.size) for i in fake["number"][order]]
    indices = torch.cdist(samples[order], train).argmin(1).numpy() % n
    pairs = np.stack([images, data.pixels[data.train[indices]]])
    labels = [f"{distance:.4g}" for distance in distances[order]]
    return record, strip(pairs, labels, "Generated images above the nearest training images")
