"""What frozen networks make of the data, computed once: latents of images, embeddings of captions.

    <cache_dir>/<key>/00000.npy ...    float16 arrays of SHARD entries, each written whole

The key holds the images, their transform, the digest of the encoding network and all else the
numbers depend on. A build that is cut off goes on with the shards that are missing; ranks share
the work. The index of an entry is its image's or its caption's.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import UserError
from ..files.checkpoint import write_text
from ..files.validate import digest_tensors, read_json
from ..runtime.distributed import barrier, log, progress, rank, world_size
from ..runtime.seeding import generator
from .batches import Batch, Batches, Pixels, to_unit
from .cache import TRANSFORM
from .image_set import digest

SHARD = 1024
SCANNED = 1 << 29  # values: up to a gigabyte is looked through when it is opened
VERSION = "1"  # raise on any change of what is stored


def weights_digest(model: nn.Module) -> str:
    """Of all weights, in their own precision: another network has another digest."""
    return digest_tensors(model.state_dict())[:32]


class Shards:
    """(count, *shape) float16 on disk; a shard is computed where it is missing or damaged.

    compute(indices): (n, *shape) float tensor of entries with these indices. instead: entries that
        others stand in for, known when compute has made them, and kept beside their shard.
    Raises UserError if the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        shape: tuple[int, ...],
        compute: Callable[[range], Tensor],
        batch: int,
        what: str,
        instead: dict[int, int] | None = None,
    ):
        self.folder = folder
        self.count = count
        self.shape = tuple(shape)
        self.instead = {} if instead is None else instead
        shards = range(-(-count // SHARD))
        known = {s: self._open(s) for s in shards}
        missing = [s for s, array in known.items() if array is None]
        barrier()  # all ranks have looked before one writes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._build(missing, compute, batch, what)
        except OSError as error:
            raise UserError(
                f"{what} cannot be kept in {folder}: {error}; free some space or "
                "choose another --cache_dir"
            ) from None
        barrier()
        self.arrays = [self._open(s) if array is None else array for s, array in known.items()]
        if any(array is None for array in self.arrays):
            raise UserError(f"{folder} changed while it was read; start again")
        for shard in shards:
            self.instead |= self._others(shard)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """(n, *shape) float16. Raises UserError for damaged entries."""
        out = np.empty((len(indices), *self.shape), np.float16)
        for row, i in enumerate(indices):
            out[row] = self.arrays[i // SHARD][i % SHARD]
        if not np.isfinite(out).all():
            bad = next(i for row, i in enumerate(indices) if not np.isfinite(out[row]).all())
            raise UserError(
                f"{self.folder / f'{bad // SHARD:05d}.npy'} is damaged: it holds NaN "
                "or infinity; delete it, and it is made again"
            )
        return out

    def _range(self, shard: int) -> range:
        return range(shard * SHARD, min((shard + 1) * SHARD, self.count))

    def _open(self, shard: int) -> np.ndarray | None:
        """None unless it is whole: of this shape, all finite, with usable stand-ins."""
        try:
            self._others(shard)
            array = np.load(self.folder / f"{shard:05d}.npy", mmap_mode="r", allow_pickle=False)
            if array.shape != (len(self._range(shard)), *self.shape) or array.dtype != np.float16:
                return None
            if self.count * math.prod(self.shape) > SCANNED:
                return array  # `__getitem__` looks at what it reads
            bits = (entry.view(np.uint16) & 0x7FFF for entry in array)  # from 0x7C00 on: inf, NaN
            return array if all(int(b.max(initial=0)) < 0x7C00 for b in bits) else None
        except Exception:  # a damaged header can be wrong in many ways
            return None

    def _others(self, shard: int) -> dict[int, int]:
        """The entries of a shard that others stand in for. Raises ValueError for other numbers."""
        file = self.folder / f"{shard:05d}.json"
        found = read_json(file) if file.exists() else {}
        if not all(type(j) is int and 0 <= j < self.count for j in found.values()):
            raise ValueError(f"{file} names entries that are not there")
        places = {int(i): j for i, j in found.items()}
        if not places.keys() <= set(self._range(shard)):
            raise ValueError(f"{file} is of other entries")
        return places

    def _build(self, missing: list[int], compute, batch: int, what: str) -> None:
        if missing:
            done = sum(len(self._range(s)) for s in missing)
            log(f"{what}: {done} of {self.count} are computed, once")
        mine = missing[rank() :: world_size()]
        total = sum(len(self._range(s)) for s in mine)
        with progress(total=total, desc=what, unit="", leave=False) as bar:
            for shard in mine:
                entries = self._range(shard)
                parts = []
                for low in range(0, len(entries), batch):
                    chosen = entries[low : low + batch]
                    parts.append(compute(chosen).to("cpu", torch.float16).numpy())
                    bar.update(len(chosen))
                values = np.concatenate(parts)
                if not np.isfinite(values).all():
                    raise UserError(f"{what}: the network made non-finite numbers; try --amp no")
                path = self.folder / f"{shard:05d}.npy"
                path.with_suffix(".json").unlink(missing_ok=True)
                if others := {i: self.instead[i] for i in entries if i in self.instead}:
                    write_text(path.with_suffix(".json"), json.dumps(others))
                temporary = path.with_suffix(f".{os.getpid()}.tmp")
                with open(temporary, "wb") as out:
                    np.save(out, values)
                    out.flush()
                    os.fsync(out.fileno())
                os.replace(temporary, path)


def image_latents(
    pixels: Pixels,
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    key: str,
    shape,
    flip: bool,
    cache_dir: Path,
    device: torch.device,
    batch: int,
) -> Shards:
    """Mean and log-variance of every image, (F, 2, C, h, w); F = 2 with its mirror image.

    encode(x): (mean, logvar), each (B, C, h, w), of images in [-1, 1]. shape: (C, h, w).
    """
    images = pixels.images
    name = digest(
        "latents", VERSION, images.stamp, TRANSFORM, str(pixels.size), str(flip), key, *images.names
    )

    @torch.inference_mode()
    def compute(indices: range) -> Tensor:
        x = torch.from_numpy(pixels[np.asarray(indices)]).permute(0, 3, 1, 2)
        x = to_unit(x, device)
        views = [x, x.flip(3)] if flip else [x]
        return torch.stack([torch.stack(encode(view), 1) for view in views], 1)

    shape = (2 if flip else 1, 2, *shape)
    return Shards(
        cache_dir / name,
        len(pixels),
        shape,
        compute,
        batch,
        "latents of the images",
        pixels.instead,
    )


def caption_embeddings(
    captions: list[str],
    encode: Callable[[list[str]], Tensor],
    key: str,
    shape,
    cache_dir: Path,
    batch: int,
) -> Shards:
    """The text encoder's output for each caption, (L, D)."""
    name = digest("captions", VERSION, key, str(shape), *captions)

    @torch.inference_mode()
    def compute(indices: range) -> Tensor:
        return encode([captions[i] for i in indices])

    return Shards(cache_dir / name, len(captions), shape, compute, batch, "embeddings of captions")


class EncodedBatches(Batches):
    """`Batches` of latents, and of what the network is told of each image's caption.

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
        latents: Shards,
        text: Shards | Tensor | None = None,
        text_of: np.ndarray | None = None,
    ):
        super().__init__(pixels, batch_size, seed, flip)
        self.latents = latents
        self.text = text
        self.text_of = text_of
        self.counts = None if text_of is None else (text_of >= 0).sum(1)
        if text is not None:
            last = len(text) if isinstance(text, Tensor) else text.count
            self.empty = self.entries(np.array([last - 1]))[0]

    def _load(self, step: int, low: int, high: int) -> Batch:
        chosen = self.indices(step)
        flips = self.flips(step)
        which = self.which(step)
        return self._encoded(chosen[low:high], flips[low:high], which[low:high])

    def which(self, step: int) -> np.ndarray:
        """(batch_size,) which of their captions the images of a step have."""
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
        return self._encoded(chosen, np.zeros(len(chosen), bool), np.zeros(len(chosen), int))

    def _encoded(self, chosen: np.ndarray, flips: np.ndarray, which: np.ndarray) -> Batch:
        views = self.latents[chosen]  # (b, F, 2, C, h, w)
        moments = torch.from_numpy(views[np.arange(len(chosen)), flips.astype(int)])
        shown = self.pixels.shown(chosen)
        labels = torch.from_numpy(self.labels[shown])
        if self.text is None:
            return Batch(None, labels, moments)
        # a stand-in for a damaged image may have fewer captions than the image
        text = self.entries(self.text_of[shown, which % self.counts[shown]])
        return Batch(None, labels, moments, text, self.empty)

    def entries(self, indices: np.ndarray) -> Tensor:
        """Give texts by the number of their caption."""
        text = self.text[indices]
        return text if isinstance(text, Tensor) else torch.from_numpy(text)
