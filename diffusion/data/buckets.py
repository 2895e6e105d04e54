"""Aspect-ratio buckets: a batch is of images of one size, whose area is about that of all others.

Step s is batch s mod M of epoch s // M. An epoch is planned from (seed, epoch): its M batches are
shared out to the buckets so that over epochs each has its part of the images, be it less than a
batch. Nothing is saved: a resumed run and another number of ranks see the same batches.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from .. import UserError
from ..config import Size, sides, size_text
from ..runtime.seeding import permutation
from .cache import Cache
from .image_set import digest
from .images import TRANSFORM
from .latents import EncodedBatches
from .pixels import CHUNK, SHARD, Pixels

MAX_ASPECT = 3  # of a bucket: what is longer is cut
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 are spread evenly


def bucket_sizes(size: Size, factor: int) -> list[tuple[int, int]]:
    """List (height, width) of aspects up to 3 whose area is at most that of `size`, the first.

    Sides are multiples of an eighth of its side, itself rounded down to one of `factor`.
    """
    area = math.prod(sides(size))
    step = max(1, math.isqrt(area) // (8 * factor)) * factor
    found = [sides(size)]
    for short in range(math.isqrt(area) // step * step, 0, -step):
        long = area // short // step * step
        if long > MAX_ASPECT * short:
            break
        found += [(short, long), (long, short)]
    return list(dict.fromkeys(found))


def nearest(shapes: np.ndarray, sizes: list[tuple[int, int]]) -> np.ndarray:
    """Find the size of the nearest aspect, by its logarithm, to each of shapes (N, 2): (N,)."""
    aspects = [np.log(x[:, 0] / x[:, 1]) for x in (shapes, np.array(sizes))]
    return np.abs(aspects[0][:, None] - aspects[1]).argmin(1)


def read_shapes(pixels: Pixels, cache_dir: Path) -> tuple[Pixels, np.ndarray]:
    """Read every image, upright: those that can be, and their (height, width), (N, 2).

    Raises UserError if there is none.
    """
    images = pixels.images

    def shape(i: int) -> tuple[int, ...]:
        image = pixels.log.read(repr(images.names[i]), images.read, i, None)
        return (0, 0) if image is None else image.shape[:2]

    def compute(indices):
        with ThreadPoolExecutor(pixels.workers) as pool:
            return np.array(list(pool.map(shape, indices)))

    folder = cache_dir / digest("shapes", images.stamp, TRANSFORM, *images.names)
    what = f"shapes of the images of {images.name}"
    cache = Cache(folder, len(images), (2,), np.int32, compute, CHUNK, what, shard=SHARD)
    shapes = np.concatenate(cache.arrays)
    usable = np.flatnonzero(shapes.all(1))
    if not len(usable):
        raise UserError(f"none of the {len(images)} images of {images.name} can be used")
    return pixels.with_images(images.subset(usable)), shapes[usable]


class BucketBatches(EncodedBatches):
    """Gives batches of latents of one size each; held-out images are of the first size.

    encode(pixels): their latents, as `image_latents` gives them. sizes: (height, width) each, and
    shapes: (N, 2), those of the images. others: as EncodedBatches takes them, without latents.
    """

    def __init__(
        self,
        encode: Callable[[Pixels], Cache],
        sizes: list[tuple[int, int]],
        shapes: np.ndarray,
        pixels: Pixels,
        *others,
    ):
        super().__init__(pixels, *others)
        self.sizes = sizes
        self.bucket_of = nearest(shapes, sizes)
        self.bucket_of[self.held_out] = 0
        self.parts = {}  # by bucket: its images, and their latents
        for k in np.unique(self.bucket_of):
            members = np.flatnonzero(self.bucket_of == k)
            part = Pixels(pixels.images.subset(members), sizes[k], None, pixels.workers)
            part.log = pixels.log
            self.parts[k] = (members, encode(part))
        self.plan = lru_cache(2)(self._plan)

    def describe(self) -> str:
        buckets = zip(*np.unique(self.bucket_of[self.train], return_counts=True))
        counts = ", ".join(f"{size_text(self.sizes[k])} ({n:,})" for k, n in buckets)
        return f"{super().describe()}, of {counts} pixels"

    def _plan(self, epoch: int) -> np.ndarray:
        """Put an epoch's images into batches: (M, batch_size) indices.

        Of a bucket's images, in random order, some are left out or come again, to fill batches.
        """
        N = len(self.train)
        M = max(1, N // self.batch_size)
        order = self.train[permutation(N, self.seed, "order", epoch)]
        buckets = self.bucket_of[order]
        marks = ((np.arange(M) + epoch * GOLDEN % 1) * N / M).astype(int)
        shares = zip(*np.unique(np.sort(buckets)[marks], return_counts=True))
        parts = [np.resize(order[buckets == k], (n, self.batch_size)) for k, n in shares]
        return np.concatenate(parts)[permutation(M, self.seed, "batches", epoch)]

    def indices(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, max(1, len(self.train) // self.batch_size))
        return self.plan(epoch)[place]

    def size_at(self, step: int) -> tuple[int, int]:
        return self.sizes[self.bucket_of[self.indices(step)[0]]]

    def views(self, chosen: np.ndarray) -> np.ndarray:
        members, latents = self.parts[self.bucket_of[chosen[0]]]
        return latents[np.searchsorted(members, chosen)]
