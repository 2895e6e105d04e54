"""A set of images of whatever source, known by index and read one at a time.

Where a set comes from is sources.py's work, decoding and caching it pixels.py's, putting it into
batches batches.py's.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from .. import UserError, some

HELD_OUT_FROM = 100
HELD_OUT_FRACTION = 0.02
MAX_HELD_OUT = 256


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Knows N images by index.

    read(i, size, note): (size, size, 3) uint8; raises BadImage, and calls note(text) with what is
    odd about a usable image. names: unique, stable between runs. labels: N class numbers, -1 where
    an image has none. texts: N images' captions, of which a step samples one; None where the set
    has none at all. stamp: changes whenever a file's content may have; part of the cache's key.
    """

    name: str
    names: list[str]
    read: Callable[..., np.ndarray]
    labels: list[int]
    classes: list[str] = field(default_factory=list)
    texts: list[tuple[str, ...]] | None = None
    stamp: str = ""
    repeats: list[int] | None = None

    @cached_property
    def captions(self) -> list[str] | None:
        """List each image's first caption."""
        return self.texts and [texts[0] for texts in self.texts]

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, indices) -> "ImageSet":
        """Take the images of these indices, in their order."""
        indices = [int(i) for i in indices]
        return replace(
            self,
            names=[self.names[i] for i in indices],
            read=lambda i, *args: self.read(indices[i], *args),
            labels=[self.labels[i] for i in indices],
            texts=self.texts and [self.texts[i] for i in indices],
            repeats=self.repeats and [self.repeats[i] for i in indices],
        )

    def only(self, data_class: str) -> "ImageSet":
        """Take the images of one class, or "all". Raises UserError for a class it does not have."""
        if data_class == "all":
            return self
        if data_class not in self.classes:
            raise UserError(
                f"data_class {data_class!r} is no class of {self.name}; it has "
                f"{some(self.classes, 20) or 'no classes'}"
            )
        wanted = self.classes.index(data_class)
        chosen = self.subset([i for i, label in enumerate(self.labels) if label == wanted])
        return replace(chosen, classes=[data_class], labels=[0] * len(chosen))

    def order_key(self) -> str:
        """Digest the names: two runs with the same digest see the same images in order."""
        return digest(*self.names)


def digest(*parts) -> str:
    """Digest texts, which may hold undecodable bytes of file names, or what is written as such."""
    h = hashlib.sha256()
    for part in parts:
        # as os.fsencode does it where texts are UTF-8, which is not everywhere
        h.update(str(part).encode("utf-8", "surrogateescape") + b"\0")
    return h.hexdigest()[:32]


def file_stamp(file: Path) -> str:
    """Say what changes with a file's content: its size and time."""
    try:
        s = file.stat()
    except OSError:
        return "missing"  # a broken link: reading reports it
    return f"{s.st_size} {s.st_mtime_ns}"


def held_out(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Split into (train, held-out) indices: min(256, 2 %) are held out, by a hash of the name."""
    n = len(names)
    count = min(MAX_HELD_OUT, int(HELD_OUT_FRACTION * n)) if n >= HELD_OUT_FROM else 0
    order = sorted(range(n), key=lambda i: digest(names[i]))
    return np.sort(order[count:]), np.sort(order[:count]).astype(int)
