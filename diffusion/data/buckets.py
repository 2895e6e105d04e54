"""Aspect-ratio buckets: a batch is of images of one size, whose area is about that of all others.

Step s is batch s mod M of epoch s // M. Buckets share an epoch's batches by the numbers of their
images, in an order that depends on (seed, epoch). Nothing is saved: a resumed run and another
number of ranks see the same batches.
"""

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from .. import UserError
from ..config import Size, sides, size_text
from ..runtime.seeding import permutation
from .cache import Cache
from .image_set import ImageSet, digest
from .images import TRANSFORM, BadImage
from .latents import EncodedBatches
from .pixels import CHUNK, SHARD, Pixels

MAX_ASPECT = 3  # of a bucket: what is longer is cut


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


def read_shapes(images: ImageSet, cache_dir: Path, workers: int) -> Cache:
    """Read (height, width) of every image, upright; (0, 0) where it cannot be read."""

    def shape(i: int) -> tuple[int, ...]:
        try:
            return images.read(i, None, lambda _: None).shape[:2]
        except BadImage:
            return (0, 0)

    def compute(indices):
        with ThreadPoolExecutor(max(1, workers)) as pool, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as Pixels does
            return np.array(list(pool.map(shape, indices)))

    folder = cache_dir / digest("shapes", images.stamp, TRANSFORM, *images.names)
    what = f"shapes of the images of {images.name}"
    return Cache(folder, len(images), (2,), np.int32, compute, CHUNK, what, shard=SHARD)


class BucketBatches(EncodedBatches):
    """Gives batches of latents of one size each; held-out images are of the first size.

    encode(pixels): their latents, as `image_latents` gives them. sizes: (height, width) each, and
    shapes: (N, 2), those of the images. text: as EncodedBatches takes it.
    Raises UserError if no image can be read.
    """

    def __init__(
        self,
        pixels: Pixels,
        batch_size: int,
        seed: int,
        flip: bool,
        encode: Callable[[Pixels], Cache],
        sizes: list[tuple[int, int]],
        shapes: np.ndarray,
        *text,
    ):
        super().__init__(pixels, batch_size, seed, flip, None, *text)
        readable = shapes.all(1)
        self.train = self.train[readable[self.train]]
        self.held_out = self.held_out[readable[self.held_out]]
        if not len(self.train):
            raise UserError(f"none of the {len(shapes)} images of {pixels.images.name} can be used")
        self.length = len(self.train)
        self.sizes = sizes
        self.bucket_of = nearest(np.maximum(shapes, 1), sizes)
        self.bucket_of[self.held_out] = 0
        self.latents = Parts(pixels, encode, sizes, np.where(readable, self.bucket_of, -1))

        buckets = self.bucket_of[self.train]
        self.members = {int(k): self.train[buckets == k] for k in np.unique(buckets)}
        counts = {k: max(1, round(len(m) / batch_size)) for k, m in self.members.items()}
        self.turns = np.repeat([*counts], [*counts.values()])  # the batches of an epoch
        self.order = lru_cache(2 * len(counts))(self.order.__wrapped__)
        self.turns_of = lru_cache(2)(
            lambda e: self.turns[permutation(len(self.turns), seed, "buckets", e)]
        )

    def describe(self) -> str:
        counts = ", ".join(
            f"{size_text(self.sizes[k])} ({len(m):,})" for k, m in self.members.items()
        )
        return f"{super().describe()}, of {counts} pixels"

    def order_key(self) -> str:
        return digest(super().order_key(), *self.bucket_of, *self.sizes)

    def turn(self, step: int) -> tuple[int, int]:
        """Tell a step's bucket, and how many batches of it there were before."""
        epoch, place = divmod(step, len(self.turns))
        turns = self.turns_of(epoch)
        k = turns[place]
        return int(k), int(epoch * (turns == k).sum() + (turns[:place] == k).sum())

    def size_at(self, step: int) -> tuple[int, int]:
        return self.sizes[self.turn(step)[0]]

    def indices(self, step: int) -> np.ndarray:
        k, before = self.turn(step)
        return self.in_turn(self.members[k], before, k)


class Parts:
    """Reads the latents of images of one bucket each. bucket_of: (N,), -1 for those of none."""

    def __init__(self, pixels: Pixels, encode, sizes, bucket_of: np.ndarray):
        self.bucket_of = bucket_of
        self.place = np.zeros(len(bucket_of), int)
        self.parts = {}
        for k, size in enumerate(sizes):
            chosen = np.flatnonzero(bucket_of == k)
            self.place[chosen] = np.arange(len(chosen))
            if len(chosen):
                part = Pixels(pixels.images.subset(chosen), size, None, pixels.workers)
                self.parts[k] = encode(part)

    def __getitem__(self, chosen: np.ndarray) -> np.ndarray:
        return self.parts[self.bucket_of[chosen[0]]][self.place[chosen]]
