"""What is done every few hundred steps: held-out loss, sample grid, weights for others to use."""

import json
from collections import deque
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import distributed as dist
from ..config import Config
from ..data.batches import to_unit
from ..evaluation.viz import grid, to_uint8
from ..pipeline import Pipeline
from ..process.gaussian import training_loss
from ..seeding import generator
from ..weights import checkpoint
from .ema import EMA
from .steps import condition


@torch.no_grad()
def heldout_loss(config: Config, sampler: Pipeline, data, micro: int) -> float:
    """The averaged weights' loss on the held-out images, each with its fixed t and noise."""
    n, T, device = len(data.held_out), len(sampler.schedule), sampler.device
    shuffled = torch.randperm(n, generator=generator(config.seed, "held out t"))
    t = (shuffled.double() + 0.5).mul(T / n).long().to(device)  # stratified over 0 ... T-1
    total = torch.zeros((), device=device)
    pieces = [(low, min(low + micro, n)) for low in range(0, n, micro)]
    for low, high in pieces[dist.rank() :: dist.world_size()]:
        batch = data.held_out_batch(low, high)
        generators = [generator(config.seed, "held out", i) for i in range(low, high)]
        noise = [torch.randn(batch.pixels.shape[1:], generator=g) for g in generators]
        shown = torch.zeros(high - low, dtype=torch.bool)
        cond = condition(config, batch, shown, sampler.model, device)
        total += training_loss(
            sampler.autocast(config.amp), sampler.schedule, config.objective,
            to_unit(batch.pixels, device), t[low:high], torch.stack(noise).to(device), cond,
            config.loss, config.min_snr_gamma,
        ).sum()  # fmt: skip
    return float(dist.all_reduce_sum(total)) / n


def frames(config: Config, sampler: Pipeline, indices):
    """`Pipeline.frames` with the run's own settings; a block of the sheet for each class."""
    labels = None
    if sampler.conditional:
        labels = torch.tensor([i * len(sampler.classes) // config.num_samples for i in indices])
    return sampler.frames(
        indices, seed=config.seed, sampler=config.sampler, amp=config.amp, labels=labels,
        steps=min(config.sample_steps, config.time_steps), guidance_scale=config.guidance_scale,
    )  # fmt: skip


def sample_grid(config: Config, sampler: Pipeline, micro: int) -> Image.Image | None:
    """The sheet of config.num_samples images on rank 0, which all ranks draw; None elsewhere."""
    size = config.image_size
    images = [np.empty((0, size, size, 3), np.uint8)]
    mine = np.array_split(np.arange(config.num_samples), dist.world_size())[dist.rank()].tolist()
    for low in range(0, len(mine), micro):
        [(x, _)] = deque(frames(config, sampler, mine[low : low + micro]), maxlen=1)
        images.append(to_uint8(x))
    parts = dist.gather(torch.from_numpy(np.concatenate(images)))
    return grid(torch.cat(parts).numpy()) if parts is not None else None


def write_weights(folder: Path, config: Config, ema: EMA, data, step: int, best, improved) -> None:
    """ema.safetensors, best.safetensors if this is it, metadata.json."""
    weights, classes = ema.model.state_dict(), list(data.classes)
    for name in ("ema", *(["best"] if improved else [])):
        checkpoint.save_weights(
            folder / f"{name}.safetensors", weights, config, step=step, classes=classes
        )
    samples = step * config.batch_size
    epoch = samples / data.length if data.length else None
    told = {"step": step, "samples_seen": samples, "epoch": epoch, "best_loss": best}
    checkpoint.write_text(folder / "metadata.json", json.dumps(told, indent=2))
