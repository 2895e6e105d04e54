"""Batches as a function of the step: no iterator, no state, nothing to save.

Sample j of step s is position p = s B + j of an endless sequence that runs through one
permutation per (seed, epoch) after another. So a resumed run, another number of ranks and
another number of micro-batches see the same samples.
"""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import UserError
from ..config import Config
from ..runtime.distributed import log
from ..runtime.seeding import generator, permutation
from .cache import cached
from .captions import Selection
from .image_set import HELD_OUT_FROM, ImageSet, configured, held_out, open_data
from .images import BadImage, OddLog, read_noting


@dataclass(frozen=True, eq=False)
class Batch:
    """pixels: (b, 3, size, size) uint8, channels last in memory; labels: (b,) int64, -1: none.

    Of latent mode (encoded.py), in place of pixels: moments (b, 2, C, h, w) float16, mean and
    log-variance; text: what the network is told, ids (b, L) int64 or embeddings (b, L, D) float16.
    """

    pixels: Tensor | None
    labels: Tensor
    moments: Tensor | None = None
    text: Tensor | None = None
    empty: Tensor | None = None  # the text of no caption
    captions: list[str] | None = None  # of a stream, whose text is not encoded beforehand


class Pixels:
    """Decoded images by index: from the cache, or from the files at every use."""

    def __init__(self, images: ImageSet, size: int, cache_dir: Path | None, workers: int = 2):
        self.size = size
        self.workers = workers
        self.instead: dict[int, int] = {}  # bad image -> the one that stands in for it
        self.odd = OddLog()
        self.memory = None
        if cache_dir is not None:
            self.memory, kept = cached(images, size, cache_dir, workers)
            images = images.subset(kept)
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def with_images(self, images: ImageSet) -> "Pixels":
        """Give the same pixels with other labels, classes or texts."""
        other = copy.copy(self)
        other.images = images
        return other

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """(n, size, size, 3) uint8."""
        if self.memory is not None:
            return np.asarray(self.memory[indices])  # a copy: indexed by an array
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            return np.stack(list(pool.map(self._read, indices)))

    def shown(self, indices: np.ndarray) -> list[int]:
        """The images that are seen at these places: others for those that cannot be read."""
        return [self.instead.get(int(i), int(i)) for i in indices]

    def _read(self, index: int) -> np.ndarray:
        """Image `index`; in place of one that cannot be read, the next that can."""
        for i in range(index, index + len(self)):
            i = int(i % len(self))
            try:
                pixels, found = read_noting(lambda: self.images.read(i, self.size))
            except BadImage as error:
                if i not in self.instead:
                    log(f"warning: {self.images.names[i]!r} is skipped: {error}")
                self.instead.setdefault(i, -1)
                continue
            self.odd(repr(self.images.names[i]), found)
            if i != index:
                self.instead[int(index)] = i
            return pixels
        raise UserError(f"none of the {len(self)} images of {self.images.name} can be used")


class StepBatches:
    """Calls _load(step, low, high), the next call's in a thread while this one's is used."""

    def __init__(self):
        self.ahead: tuple[tuple, Future] | None = None
        self.pool = ThreadPoolExecutor(1)

    def __call__(self, step: int, low: int, high: int, then: tuple | None = None) -> Batch:
        """Samples low ... high-1 of a step; `then`, the next call's arguments, is read ahead."""
        key = (step, low, high)
        ahead = self.ahead
        self.ahead = None
        batch = ahead[1].result() if ahead and ahead[0] == key else self._load(*key)
        if then is not None:
            self.ahead = (then, self.pool.submit(self._load, *then))
        return batch


class Batches(StepBatches):
    """Training batches by step, and the held-out images.

    Raises UserError if there are no images to train on.
    """

    def __init__(self, pixels: Pixels, batch_size: int, seed: int, flip: bool = True):
        super().__init__()
        self.pixels = pixels
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self.train, self.held_out = held_out(pixels.images.names)
        self.labels = np.asarray(pixels.images.labels, np.int64)
        self.classes = pixels.images.classes
        self.orders: dict[int, np.ndarray] = {}
        self.length: int | None = len(self.train)  # samples in an epoch, where known

    def __len__(self) -> int:
        """Images in an epoch."""
        return len(self.train)

    def describe(self) -> str:
        few = "" if len(self.held_out) else f" (from {HELD_OUT_FROM} images on there are some)"
        return f"{len(self.train):,} images to train on, {len(self.held_out)} held out{few}" + (
            f", {len(self.classes)} classes" if self.classes else ""
        )

    def order_key(self) -> str:
        """Two runs with the same one see the same images in the same order."""
        return self.pixels.images.order_key()

    def indices(self, step: int) -> np.ndarray:
        """(batch_size,) the images of a step, as indices into pixels."""
        n = len(self.train)
        positions = step * self.batch_size + np.arange(self.batch_size)
        epochs = positions // n
        for old in [e for e in self.orders if e < epochs[0]]:
            del self.orders[old]
        for e in np.unique(epochs).tolist():
            if e not in self.orders:
                self.orders[e] = permutation(n, self.seed, "order", e)
        return np.array(
            [
                self.train[self.orders[e][p]]
                for e, p in zip(epochs.tolist(), (positions % n).tolist())
            ]
        )

    def _load(self, step: int, low: int, high: int) -> Batch:
        chosen = self.indices(step)[low:high]
        pixels = self.pixels[chosen]
        flips = self.flips(step)[low:high]
        images = torch.from_numpy(pixels)
        for i in np.flatnonzero(flips):  # a third of the time of one statement for all
            images[i] = images[i].flip(1)
        return self._batch(pixels, chosen)

    def flips(self, step: int) -> np.ndarray:
        """(batch_size,) bool: which images of a step are mirrored."""
        if not self.flip:
            return np.zeros(self.batch_size, bool)
        g = generator(self.seed, "flip", step)
        return torch.randint(2, (self.batch_size,), generator=g).bool().numpy()

    def held_out_batch(self, low: int, high: int) -> Batch:
        """Held-out images low ... high-1, never flipped."""
        chosen = self.held_out[low:high]
        return self._batch(self.pixels[chosen], chosen)

    def _batch(self, pixels: np.ndarray, chosen: np.ndarray) -> Batch:
        labels = self.labels[self.pixels.shown(chosen)]
        return Batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels))


def move(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; to a GPU through pinned memory, so that nothing waits."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def to_unit(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 images to float32 in [-1, 1] on the device."""
    return move(pixels, device).float().div_(127.5).sub_(1)


def open_batches(config: Config):
    """The training data of a configuration: `Batches`, or a `StreamBatches` of the same shape."""
    if config.streaming:
        from .hub import StreamBatches

        if config.data_class != "all":
            raise UserError("--data_class picks from a whole set: drop it, or --streaming")
        size = config.image_size
        batch_size = config.batch_size
        stream = StreamBatches(
            config.data[3:],
            size,
            batch_size,
            config.seed,
            config.flip,
            config.default_caption,
            Selection.of(config),
        )
        if config.condition == "class" and not stream.classes:
            raise UserError(
                f"--condition class: {config.data} has no column of class labels, "
                "which in a stream must be of type ClassLabel"
            )
        return stream
    images = open_data(*configured(config))
    if config.condition == "class" and not config.adapts:
        without = sum(label < 0 for label in images.labels)
        if images.classes and config.data.startswith("hf:"):  # nobody can move a row elsewhere
            if without:
                log(
                    f"warning: {without} of {len(images)} images of {images.name} have no label; "
                    "they are trained on without a class"
                )
        elif without or not images.classes:
            raise UserError(
                f"--condition class needs a folder per class; {without or len(images)} of "
                f"{len(images)} images of {images.name} are in none"
            )
    cache_dir = Path(config.cache_dir) if config.cache else None
    pixels = Pixels(images, config.image_size, cache_dir, config.num_workers)
    return Batches(pixels, config.batch_size, config.seed, config.flip)
