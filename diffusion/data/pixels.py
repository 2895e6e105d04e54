"""Decoded images by index: each read once into the cache, or from its file at every use."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .. import UserError
from ..config import Size, sides, size_text
from ..runtime.distributed import log
from .cache import Cache
from .folder import report
from .image_set import ImageSet, digest
from .images import TRANSFORM, BadImage, ImageLog, read_noting

CHUNK = 64  # images that are decoded and held in memory at a time
SHARD = 1 << 13  # images in a file of the cache


class Pixels:
    """Reads the images of an image set at one size.

    images: those that can be used. Without a cache that is not known beforehand: where one cannot
    be read, the next that can stands in for it. Raises UserError if no image can be used.
    """

    def __init__(self, images: ImageSet, size: Size, cache_dir: Path | None, workers: int = 2):
        self.images = images
        self.size = size
        self.workers = max(1, workers)
        self.stand_ins = {}  # {index: index} of images that cannot be read
        self.log = ImageLog()
        self.cache = None
        if cache_dir is not None:
            self._open_cache(cache_dir)

    def __len__(self) -> int:
        return len(self.images)

    def with_images(self, images: ImageSet) -> "Pixels":
        """Give the same pixels with other labels, classes or texts."""
        other = copy.copy(self)
        other.images = images
        return other

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Read images: (n, size, size, 3) uint8."""
        if self.cache is not None:
            return self.cache[self.usable[indices]]
        with ThreadPoolExecutor(self.workers) as pool:
            return np.stack(list(pool.map(self._read, indices)))

    def shown(self, indices: np.ndarray) -> list[int]:
        """Name the images that are seen at these indices, stand-ins for those not readable."""
        return [self.stand_ins.get(int(i), int(i)) for i in indices]

    def _open_cache(self, cache_dir: Path) -> None:
        every = self.images
        n = len(every)
        shape = (*sides(self.size), 3)
        notes = {}  # by index: a text says why it is skipped, a list what is odd about it

        def read(i):
            try:
                pixels, odd = read_noting(every.read, i, self.size)
            except BadImage as error:
                notes[i] = " ".join(str(error).split())[:500]
                return np.zeros(shape, np.uint8)
            if odd:
                notes[i] = odd
            return pixels

        def decode(indices):
            with ThreadPoolExecutor(self.workers) as pool, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's on large images: MAX_PIXELS decides
                return np.stack(list(pool.map(read, indices)))

        folder = cache_dir / digest(every.stamp, TRANSFORM, self.size, *every.names)
        what = f"images of {every.name} at {size_text(self.size)} px"
        self.cache = Cache(folder, n, shape, np.uint8, decode, CHUNK, what, notes, SHARD)
        bad = {i for i, note in notes.items() if isinstance(note, str)}
        skipped = [(every.names[i], notes[i]) for i in sorted(bad)]
        report("images cannot be used and are skipped", skipped, n)
        if len(bad) == n:
            raise UserError(f"none of the {n} images of {every.name} can be used")
        self.usable = np.array([i for i in range(n) if i not in bad])
        self.images = every.subset(self.usable)
        if self.cache.built:
            usable = sorted(notes.keys() - bad)
            odd = [(every.names[i], text) for i in usable for text in notes[i]]
            report("images are used, but may not be what was meant", odd, n)
            log(f"decoded {len(self)} images of {every.name} to {size_text(self.size)} px")

    def _read(self, index: int) -> np.ndarray:
        """Read image `index`, or in place of one that cannot be read the next that can."""
        for i in range(index, index + len(self)):
            i = int(i % len(self))
            pixels = self.log.read(repr(self.images.names[i]), self.images.read, i, self.size)
            if pixels is not None:
                if i != index:
                    self.stand_ins[int(index)] = i
                return pixels
        raise UserError(f"none of the {len(self)} images of {self.images.name} can be used")
