"""Measure FID against the training images while a model trains (--fid).

All ranks sample and compute features; the sums are all that is exchanged. The training images'
mean and covariance are cached in --cache_dir.
"""

import math
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import UserError
from ..config import Config, size_text
from ..data.image_set import digest
from ..data.images import TRANSFORM
from ..files.tensors import read_safetensors, write_tensors
from ..files.validate import is_finite
from ..pictures.samples import behind, sample_batches
from ..runtime.distributed import all_reduce_sum, any_rank, is_main, log, progress, rank, world_size
from ..runtime.seeding import permutation
from ..sampling.image_tensor import NonFinite
from ..sampling.pipeline import Pipeline
from .copies import features_of, nearest, nearness
from .distances import MIN_IMAGES, Moments, frechet_distance
from .features import Features, open_features

SAMPLER = "dpmpp_2m"
STEPS = 20


class Fid:
    """Measures FID where it is due; its constructor fails for all that would fail later."""

    def __init__(self, config: Config, data, device: torch.device):
        if config.streaming:
            raise UserError(
                "--fid compares with all training images: it needs a set that is "
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
        self.reference = reference_moments(config, data, self.features)
        self.train = features_of(data, self.features) if config.fid_copies else None
        self.near = nearness(self.train) if config.fid_copies else None
        few = f"; below {MIN_IMAGES} it is mostly bias"
        log(
            f"{self.name} every {config.fid_every} steps: {self.features.about}, "
            f"{config.fid_num_images} samples of the EMA weights by {SAMPLER} in "
            f"{self.steps} steps, against {len(data.train)} training images at "
            f"{size_text(config.image_size)} px{few if config.fid_num_images < MIN_IMAGES else ''}"
        )

    def due(self, step: int, total: int) -> bool:
        return step > 0 and (step % self.config.fid_every == 0 or step >= total)

    def conditioning(self, indices) -> dict:
        """Choose classes or captions of samples, as frequent as among the training images."""
        chosen = self.data.train[self.order[np.array(indices) % len(self.order)]]
        if self.config.condition == "class":
            labels = torch.from_numpy(self.data.labels[chosen])
            return {"labels": labels.where(labels >= 0, len(self.data.classes))}
        if self.config.condition == "text":
            captions = self.data.pixels.images.captions
            # as in training
            return {"prompts": [captions[i] for i in chosen], "chunks": 1, "plain_prompts": True}
        return {}

    def measure(self, pipeline: Pipeline, micro: int, stopped: Callable[[], bool]) -> dict | None:
        """Return {name: distance, how it was measured}; None if `stopped` says so on some rank.

        With --fid_copies also the fraction of the samples that are copies, see copies.py.
        """
        start = time.perf_counter()
        c = self.config
        count = c.fid_num_images
        micro = min(64, micro)
        sampling = dict(sampler=SAMPLER, steps=self.steps, amp=c.amp, seed=c.seed)
        sampling["cuda_graph"] = pipeline.device.type == "cuda"
        options = lambda indices: self.conditioning(indices) | sampling
        batches = sample_batches(pipeline, options, count, micro, self.name)
        found = Moments(len(self.reference[0]))
        value = math.nan  # null in the run's metrics
        broken = 0.0
        copies = torch.zeros((), dtype=torch.float64)

        def take(images: np.ndarray) -> None:
            points = self.features(images)
            found.add(points)
            if self.train is not None:
                copies.add_((nearest(points, self.train) < self.near).sum())

        with behind(take, pipeline.device) as add:
            for _ in range(0, count, micro * world_size()):  # as many turns on each rank
                try:
                    for _, _, images in islice(batches, 1):
                        add(images)
                except NonFinite:  # black pictures would count as pictures
                    broken = math.nan
                if any_rank(stopped()):
                    return None
        found.n += broken
        statistics = found.reduce()
        if not all(map(is_finite, statistics)):
            log(f"warning: {self.name} is not measured: pictures or features are not finite")
        elif is_main():
            value = frechet_distance(*self.reference, *statistics)
        values = {self.name: value, "fid_num_images": count}
        if self.train is not None:
            values["copies"] = float(all_reduce_sum(copies) / found.n)
        return values | {"fid_seconds": time.perf_counter() - start}


# --- the reference -------------------------------------------------------------------------------


def reference_moments(config: Config, data, features: Features) -> tuple[Tensor, Tensor]:
    """Compute (mean, covariance) of the training images' features, or read them from the cache.

    Raises UserError if they are not finite.
    """
    images = data.pixels.images
    key = digest(images.stamp, data.order_key(), TRANSFORM, config.image_size, features.key)
    file = Path(config.cache_dir) / f"{key}.safetensors"
    reference = read_moments(file)
    if not any_rank(reference is None):
        log(f"reference features of {config.data}: from {file}")
        return reference
    own = np.array_split(data.train, world_size())[rank()]
    found = Moments(features(data.pixels[data.train[:1]]).shape[1])
    for low in progress(range(0, len(own), 64), desc="reference features", leave=False):
        found.add(features(data.pixels[own[low : low + 64]]))
    reference = found.reduce()
    if not all(map(is_finite, reference)):
        raise UserError(
            f"the feature network {features.about} makes non-finite features of the training images"
        )
    if is_main():
        try:
            mean, cov = reference
            write_tensors(file, {"mean": mean, "cov": cov})
        except OSError as error:
            log(f"warning: reference features are not cached: {error}")
    return reference


def read_moments(file: Path) -> tuple[Tensor, Tensor] | None:
    """Read mean and covariance; None if there is no such file or it is damaged."""
    try:
        found = read_safetensors(file)[0]
        return found["mean"], found["cov"]
    except (UserError, KeyError):
        return None
