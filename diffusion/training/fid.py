"""--fid: the Fréchet distance of the averaged weights' samples to the training images.

All ranks sample and compute features; the sums are all that is exchanged.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import UserError
from ..config import Config
from ..data.cache import TRANSFORM
from ..data.image_set import digest
from ..evaluation.distances import FEW, Moments, frechet_distance
from ..evaluation.features import open_features, sampled
from ..files.checkpoint import atomic
from ..files.validate import check_size
from ..pictures.grid import NonFinite
from ..runtime import distributed as dist
from ..runtime.seeding import permutation
from ..sampling.pipeline import Pipeline

SAMPLER = "dpmpp_2m"
STEPS = 20


class Fid:
    """Opens the network and the reference; raises UserError now for all that would fail later."""

    def __init__(self, config: Config, data, device: torch.device):
        if config.streaming:
            raise UserError(
                "--fid compares with the whole training set: it needs a set that is "
                "downloaded, not --streaming"
            )
        if len(data.train) < 2:
            raise UserError(
                f"--fid compares with the training images, and there is only "
                f"{len(data.train)}; it needs at least 2"
            )
        self.config = config
        self.data = data
        self.order = permutation(len(data.train), config.seed, "fid")
        self.features = open_features(config.fid_features, device)
        self.name = self.features.name
        self.steps = min(STEPS, config.time_steps)
        self.reference = self._reference()
        if not all(part.isfinite().all() for part in self.reference):
            raise UserError(
                f"the feature network {self.features.about} makes non-finite features "
                "of the training images"
            )
        few = f"; below {FEW} it is mostly bias" if config.fid_num_images < FEW else ""
        dist.log(
            f"{self.name} every {config.fid_every} steps: {self.features.about}, "
            f"{config.fid_num_images} samples of the averaged weights by {SAMPLER} in "
            f"{self.steps} steps, against {len(data.train)} training images at "
            f"{config.image_size} px{few}"
        )

    def due(self, step: int, total: int) -> bool:
        return step > 0 and (step % self.config.fid_every == 0 or step >= total)

    def told(self, indices) -> dict:
        """The classes or captions of these samples: as frequent as among the training images."""
        chosen = [self.data.train[self.order[i % len(self.order)]] for i in indices]
        if self.config.condition == "class":
            null = len(self.data.classes)
            labels = [int(self.data.labels[i]) for i in chosen]
            return {"labels": torch.tensor([null if i < 0 else i for i in labels])}
        if self.config.condition == "text":
            captions = self.data.pixels.images.captions
            return {"prompts": [captions[i] for i in chosen], "chunks": 1}  # as in training
        return {}

    def measure(self, pipeline: Pipeline, micro: int, stopped: Callable[[], bool]) -> dict | None:
        """{name: distance, how it was measured}; None if `stopped` says so on some rank."""
        count = self.config.fid_num_images
        micro = min(64, micro)
        began = time.perf_counter()
        found = Moments(len(self.reference[0]))

        def result(value: float) -> dict:
            return {
                self.name: value,
                "fid_num_images": count,
                "fid_seconds": time.perf_counter() - began,
            }

        with dist.progress(total=count, desc=self.name, unit="img", leave=False) as bar:
            options = dict(sampler=SAMPLER, steps=self.steps, amp=self.config.amp)
            options["seed"] = self.config.seed
            pictures = sampled(pipeline, count, micro, self.told, **options)
            bad = False
            for _ in range(0, count, micro * dist.world_size()):  # turns, as many on each rank
                try:
                    _, images = next(pictures)
                    if len(images):
                        found.add(self.features(images))
                except NonFinite:
                    bad = True
                bar.update(min(micro * dist.world_size(), count - bar.n))
                if dist.any_rank(stopped()):
                    return None
                if dist.any_rank(bad):  # black pictures would count as pictures
                    dist.log(f"warning: {self.name} is not measured: pictures are not finite")
                    return result(math.nan)
        statistics = found.reduce()
        finite = all(part.isfinite().all() for part in statistics)  # else the run says so by null
        value = math.nan
        if finite and dist.is_main():
            value = frechet_distance(*self.reference, *statistics)
        return result(value)

    def _reference(self) -> tuple[Tensor, Tensor]:
        """(mean, covariance) of the training images' features, from the cache if they are there."""
        key = digest(
            self.data.pixels.images.stamp,
            self.data.order_key(),
            TRANSFORM,
            str(self.config.image_size),
            self.features.key,
        )
        file = Path(self.config.cache_dir) / f"{key}.npz"
        known = _read(file)
        if not dist.any_rank(known is None):
            dist.log(f"reference features of {self.config.data}: from {file}")
            return known
        train = self.data.train
        mine = np.array_split(train, dist.world_size())[dist.rank()]
        found = Moments(self.features(self.data.pixels[train[:1]]).shape[1])
        for low in dist.progress(range(0, len(mine), 64), desc="reference features", leave=False):
            found.add(self.features(self.data.pixels[mine[low : low + 64]]))
        known = found.reduce()
        if dist.is_main():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                atomic(file, lambda path: _write(path, *known))
            except OSError as error:
                dist.log(f"warning: reference features are not kept: {error}")
        return known


def _read(file: Path) -> tuple[Tensor, Tensor] | None:
    """Mean and covariance; None if there is no such file or it is damaged."""
    try:
        check_size(file)
        with np.load(file, allow_pickle=False) as found:
            mean, cov = (torch.from_numpy(found[name]) for name in ("mean", "cov"))
    except Exception:  # a zip file can be damaged in many ways
        return None
    whole = all(v.is_floating_point() and v.isfinite().all() for v in (mean, cov))
    return (mean, cov) if whole and mean.dim() == 1 and cov.shape == 2 * mean.shape else None


def _write(path: Path, mean: Tensor, cov: Tensor) -> None:
    with open(path, "wb") as out:
        np.savez(out, mean=mean.numpy(), cov=cov.numpy())
