"""Batches of a Hugging Face set that is streamed and never stored."""

from itertools import islice

import numpy as np
import torch

from .. import UserError
from ..config import Config
from ..runtime.seeding import generator, permutation
from .batch import Batch, StepBatches, channels_first
from .captions import Selection
from .hub import HubSet
from .image_set import digest
from .images import ImageLog

Sample = tuple[np.ndarray, int, tuple[str, ...]]  # pixels, label, captions


class StreamBatches(StepBatches):
    """Gives batches of a stream, whose first images are held out.

    Every rank reads the whole stream and decodes its part. Block b of epoch e is shuffled by
    (seed, e, b), so that resuming means to open the stream at the block in question. How many
    samples an epoch has is known once one has been read (`length`, which a checkpoint keeps).
    """

    BLOCK = 1024
    HELD_OUT = 128

    def __init__(self, hub: HubSet, size: int, batch_size: int, seed: int, flip: bool = True):
        super().__init__(batch_size, seed, flip)
        self.hub = hub
        self.classes = hub.classes
        self.size = size
        self.captioned = bool(hub.text or hub.default_caption)
        self.log = ImageLog()
        self.length = None
        self.block = (-1, [])  # the one that was read last: number, rows
        self.reader = None
        rows = list(self.hub.data.take(self.HELD_OUT))
        if len(rows) < self.HELD_OUT:
            raise UserError(f"{self.hub.name} streams only {len(rows)} images: drop --streaming")
        first = (self._decode(row, i) for i, row in enumerate(rows))
        self.first = [sample for sample in first if sample is not None]
        self.held_out = range(len(self.first))

    def __len__(self) -> int:
        return self.length or 0

    def describe(self) -> str:
        return f"a stream, its first {self.HELD_OUT} images held out"

    def order_key(self) -> str:
        return digest(self.hub.path)

    def held_out_batch(self, low: int, high: int) -> Batch:
        """Give held-out images low ... high-1, never flipped, with their first captions."""
        return self._batch(self.first[low:high])

    def _decode(self, row: dict, number: int) -> Sample | None:
        """Read a row; None, and a warning, without a usable image."""
        pixels = self.log.read(f"row {number} of {self.hub.name}", self.hub.pixels, row, self.size)
        if pixels is None:
            return None
        return pixels, self.hub.label_of(row), self.hub.captions_of(row, number)

    def _block(self, b: int) -> list[dict]:
        """Read block b of the stream: up to BLOCK rows, images still encoded."""
        last, rows = self.block
        if b == last:
            return rows
        if b != last + 1 or self.reader is None:
            self.reader = iter(self.hub.data.skip(self.HELD_OUT + b * self.BLOCK))
        rows = list(islice(self.reader, self.BLOCK))
        self.block = (b, rows)
        if len(rows) < self.BLOCK and self.length is None:
            # an empty block may lie anywhere beyond the end: the one before it knows
            if rows or b == 0 or len(self._block(b - 1)) == self.BLOCK:
                self.length = b * self.BLOCK + len(rows)
            if self.length == 0:
                raise UserError(f"{self.hub.name} streams nothing beyond its held-out images")
        return rows

    def _sample(self, position: int) -> Sample:
        """Read the sample at a position of the endless sequence of epochs."""
        epoch, offset = divmod(position, self.length) if self.length else (0, position)
        b, place = divmod(offset, self.BLOCK)
        block = self._block(b)
        if place >= len(block):  # the stream has just ended here: length is known now
            return self._sample(position)
        first = int(permutation(len(block), self.seed, "order", epoch, b)[place])
        for i in range(first, first + len(block)):  # in place of a bad image, the next good one
            i %= len(block)
            sample = self._decode(block[i], self.HELD_OUT + b * self.BLOCK + i)
            if sample is not None:
                return sample
        raise UserError(f"{self.hub.name}: no image of block {b} can be used")

    def _load(self, step: int, low: int, high: int) -> Batch:
        flips = self.flips(step)
        g = generator(self.seed, "caption", step)
        fractions = torch.rand(self.batch_size, generator=g, dtype=torch.float64).tolist()
        samples = []
        for j in range(low, high):
            pixels, label, texts = self._sample(step * self.batch_size + j)
            text = texts[int(fractions[j] * len(texts))]
            samples.append((pixels[:, ::-1] if flips[j] else pixels, label, [text]))
        return self._batch(samples)

    def _batch(self, samples: list) -> Batch:
        """Make a batch of (pixels, label, captions), the first of which counts."""
        images, labels, texts = zip(*samples)
        pixels = channels_first(np.stack(images))
        captions = [own[0] for own in texts] if self.captioned else None
        return Batch(pixels, torch.tensor(labels), captions=captions)


def open_stream(config: Config) -> StreamBatches:
    """Open --data with --streaming. Raises UserError for options that ask for the whole set."""
    c = config
    if c.data_class != "all":
        raise UserError("--data_class picks from a whole set: drop it, or --streaming")
    hub = HubSet(c.data[3:], True, Selection.of(c), c.default_caption)
    found = StreamBatches(hub, c.image_size, c.batch_size, c.seed, c.flip)
    if c.condition == "class" and not found.classes:
        raise UserError(
            f"--condition class: {c.data} has no column of class labels, which in a stream must be "
            "of type ClassLabel"
        )
    return found
