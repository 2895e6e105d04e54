"""One batch, and what all batches have in common: they are read ahead, and mirrored at random."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..runtime.seeding import generator


@dataclass(frozen=True, eq=False)
class Batch:
    """Holds one batch: pixels, or what the encoders have made of them.

    pixels: (b, 3, size, size) uint8, channels last in memory; labels: (b,) int64, -1: none.

    In latent mode (latents.py), in place of pixels: moments (b, 2, C, h, w) float16, mean and
    log-variance; text: of the caption, ids (b, L) int64 or embeddings (b, L, D) float16. A
    stream's text is not encoded beforehand: captions.
    """

    pixels: Tensor | None
    labels: Tensor
    moments: Tensor | None = None
    text: Tensor | None = None
    empty: Tensor | None = None  # the text of no caption
    captions: list[str] | None = None


def channels_first(images: np.ndarray) -> Tensor:
    """View images (N, H, W, C) as a tensor (N, C, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


class StepBatches:
    """Calls _load(step, low, high), for the next call in a thread while this batch is used."""

    def __init__(self, batch_size: int, seed: int, flip: bool):
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self.ahead = None  # (arguments of the next call, its future)
        self.pool = ThreadPoolExecutor(1)

    def __call__(self, step: int, low: int, high: int, then: tuple | None = None) -> Batch:
        """Give samples low ... high-1 of a step; read ahead `then`, the next call's arguments."""
        key = (step, low, high)
        ahead = self.ahead
        self.ahead = None
        batch = ahead[1].result() if ahead and ahead[0] == key else self._load(*key)
        if then is not None:
            self.ahead = (then, self.pool.submit(self._load, *then))
        return batch

    def flips(self, step: int) -> np.ndarray:
        """Sample which images of a step are mirrored: (batch_size,) bool."""
        if not self.flip:
            return np.zeros(self.batch_size, bool)
        g = generator(self.seed, "flip", step)
        return torch.randint(2, (self.batch_size,), generator=g).bool().numpy()
