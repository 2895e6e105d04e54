"""What frozen networks make of the data, computed once: latents of images, embeddings of captions.

The cache's key holds the images, their transform, the digest of the encoding network and all else
that the numbers depend on. The index of an entry is its image's or its caption's.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..files.validate import digest_tensors
from ..runtime.seeding import generator
from .batch import Batch, channels_first
from .batches import Batches, to_unit
from .cache import Cache
from .image_set import digest
from .images import TRANSFORM
from .pixels import Pixels

VERSION = "1"  # raise on any change of what is stored
ENCODE_BATCH = 8  # images or captions that are encoded at a time


def weights_digest(model: nn.Module) -> str:
    """Digest all weights, in their own precision: another network has another digest."""
    return digest_tensors(model.state_dict())[:32]


def settings_digest(settings) -> str:
    """Digest settings of JSON's types."""
    return digest(json.dumps(settings, sort_keys=True))


def image_latents(
    pixels: Pixels,
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    key: str,
    shape: tuple[int, ...],
    flip: bool,
    cache_dir: Path,
    device: torch.device,
) -> Cache:
    """Encode every image: mean and log-variance (F, 2, C, h, w); F = 2 with its mirror image.

    encode(x): (mean, logvar), each (B, C, h, w), of images in [-1, 1]. shape: (C, h, w).
    """
    images = pixels.images
    name = digest(
        "latents", VERSION, images.stamp, TRANSFORM, pixels.size, flip, key, *images.names
    )
    shape = (2 if flip else 1, 2, *shape)

    @torch.inference_mode()
    def compute(indices):
        x = to_unit(channels_first(pixels[np.asarray(indices)]), device)
        views = [x, x.flip(3)] if flip else [x]
        moments = torch.stack([torch.stack(encode(view), 1) for view in views], 1)
        return moments.to("cpu", torch.float16).numpy()

    return Cache(
        cache_dir / name,
        len(pixels),
        shape,
        np.float16,
        compute,
        ENCODE_BATCH,
        "latents of the images",
        pixels.stand_ins,
    )


def caption_embeddings(
    captions: list[str],
    encode: Callable[[list[str]], Tensor],
    key: str,
    shape: tuple[int, ...],
    cache_dir: Path,
) -> Cache:
    """Encode each caption by the text encoder: (L, D)."""
    folder = cache_dir / digest("captions", VERSION, key, shape, *captions)

    @torch.inference_mode()
    def compute(indices):
        return encode([captions[i] for i in indices]).to("cpu", torch.float16).numpy()

    count = len(captions)
    return Cache(folder, count, shape, np.float16, compute, ENCODE_BATCH, "embeddings of captions")


class EncodedBatches(Batches):
    """Gives batches of latents, and of each image's caption.

    text: by caption, either ids (U, L) or embeddings; the last is that of no caption. text_of:
    (N, K) each image's captions, at least one and then -1, of which a step samples one; the first
    is a held-out image's.
    """

    def __init__(
        self,
        pixels: Pixels,
        batch_size: int,
        seed: int,
        flip: bool,
        latents: Cache,
        text: Cache | Tensor | None = None,
        text_of: np.ndarray | None = None,
    ):
        super().__init__(pixels, batch_size, seed, flip)
        self.latents = latents
        self.text = text
        self.text_of = text_of
        if text is not None:
            self.counts = (text_of >= 0).sum(1)
            self.empty = self.entries(np.array([len(text) - 1]))[0]

    def _load(self, step: int, low: int, high: int) -> Batch:
        every = (self.indices(step), self.flips(step), self.which(step))
        return self._encoded(*(part[low:high] for part in every))

    def which(self, step: int) -> np.ndarray:
        """Sample which of their captions the images of a step have: (batch_size,) int."""
        if self.text is None or self.text_of.shape[1] == 1:
            return np.zeros(self.batch_size, int)
        g = generator(self.seed, "caption", step)
        K = self.text_of.shape[1]
        if (self.counts == K).all():
            return torch.randint(K, (self.batch_size,), generator=g).numpy()
        fraction = torch.rand(self.batch_size, generator=g, dtype=torch.float64).numpy()
        return (fraction * self.counts[self.indices(step)]).astype(int)

    def held_out_batch(self, low: int, high: int) -> Batch:
        chosen = self.held_out[low:high]
        return self._encoded(chosen, *np.zeros((2, len(chosen)), int))

    def _encoded(self, chosen: np.ndarray, flips: np.ndarray, which: np.ndarray) -> Batch:
        views = self.views(chosen)
        moments = torch.from_numpy(views[np.arange(len(chosen)), flips.astype(int)])
        shown = self.pixels.shown(chosen)
        labels = torch.from_numpy(self.labels[shown])
        if self.text is None:
            return Batch(None, labels, moments)
        # a stand-in for a damaged image may have fewer captions than the image
        text = self.entries(self.text_of[shown, which % self.counts[shown]])
        return Batch(None, labels, moments, text, self.empty)

    def views(self, chosen: np.ndarray) -> np.ndarray:
        """Give latents of images, and of their mirror images: (b, F, 2, C, h, w)."""
        return self.latents[chosen]

    def entries(self, indices: np.ndarray) -> Tensor:
        """Give texts by the number of their caption."""
        return torch.as_tensor(self.text[indices])
