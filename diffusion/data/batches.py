"""Batches as a function of the step: no iterator, no state, nothing to save.

Sample j of step s is position p = s B + j of an endless sequence that runs through one permutation
per (seed, epoch) after another. So a resumed run, another number of ranks and another number of
micro-batches see the same samples.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import UserError
from ..config import Config
from ..runtime.distributed import log
from ..runtime.seeding import permutation
from .batch import Batch, StepBatches, channels_first
from .image_set import HELD_OUT_FROM, ImageSet, held_out
from .pixels import Pixels
from .sources import configured, open_data
from .stream import StreamBatches, open_stream


class Batches(StepBatches):
    """Gives training batches by step, and the held-out images. labels, classes: of all images."""

    def __init__(self, pixels: Pixels, batch_size: int, seed: int, flip: bool = True):
        super().__init__(batch_size, seed, flip)
        self.pixels = pixels
        self.train, self.held_out = held_out(pixels.images.names)
        if pixels.images.repeats:
            repeats = np.asarray(pixels.images.repeats)[self.train]
            self.train = np.concatenate([self.train[repeats > n] for n in range(repeats.max())])
        self.labels = np.asarray(pixels.images.labels, np.int64)
        self.classes = pixels.images.classes
        self.length = len(self.train)  # samples in an epoch, where known
        self.order = lru_cache(2)(lambda e: permutation(len(self.train), seed, "order", e))

    def __len__(self) -> int:
        """Count the images of an epoch."""
        return len(self.train)

    def describe(self) -> str:
        few = "" if len(self.held_out) else f" (from {HELD_OUT_FROM} images on there are some)"
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return (
            f"{len(self.train):,} images to train on, {len(self.held_out)} held out{few}{classes}"
        )

    def order_key(self) -> str:
        """Digest the order: two runs with the same digest see the same images in the same order."""
        return self.pixels.images.order_key()

    def indices(self, step: int) -> np.ndarray:
        """Find the images of a step: (batch_size,) indices into pixels."""
        positions = step * self.batch_size + np.arange(self.batch_size)
        epochs, places = np.divmod(positions, len(self.train))
        chosen = [self.order(e)[p] for e, p in zip(epochs.tolist(), places)]
        return self.train[chosen]

    def _load(self, step: int, low: int, high: int) -> Batch:
        batch = self._batch(self.indices(step)[low:high])
        for image, flip in zip(batch.pixels, self.flips(step)[low:high]):
            if flip:
                image[:] = image.flip(2)
        return batch

    def held_out_batch(self, low: int, high: int) -> Batch:
        """Give held-out images low ... high-1, never flipped."""
        return self._batch(self.held_out[low:high])

    def _batch(self, chosen: np.ndarray) -> Batch:
        pixels = channels_first(self.pixels[chosen])
        return Batch(pixels, torch.from_numpy(self.labels[self.pixels.shown(chosen)]))


def move(x: Tensor, device: torch.device) -> Tensor:
    """Move a CPU tensor; to a GPU through pinned memory, so that nothing waits."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def to_unit(pixels: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Turn uint8 images into float32 in [-1, 1] on the device."""
    return move(pixels, torch.device(device)).float().div_(127.5).sub_(1)


def open_batches(config: Config) -> Batches | StreamBatches:
    """Open a configuration's training data. Raises UserError if there is nothing to train on."""
    c = config
    if c.streaming:
        return open_stream(c)
    images = open_data(*configured(c))
    if c.condition == "class" and not c.adapts:
        check_classes(images, movable=not c.data.startswith("hf:"))
    cached = c.cache and not c.aspect_buckets  # whose latents are of other sizes
    pixels = Pixels(images, c.image_size, Path(c.cache_dir) if cached else None, c.num_workers)
    return Batches(pixels, c.batch_size, c.seed, c.flip)


def check_classes(images: ImageSet, movable: bool) -> None:
    """Raise UserError for images without a class, or warn of them where they cannot be moved."""
    without = sum(label < 0 for label in images.labels)
    if without and images.classes and not movable:
        log(
            f"warning: {without} of {len(images)} images of {images.name} have no label; they are "
            "trained on without a class"
        )
    elif without or not images.classes:
        raise UserError(
            f"--condition class needs a folder per class; {without or len(images)} of "
            f"{len(images)} images of {images.name} are in none"
        )
