"""The parts of a training step: how a batch is split, what is drawn for it, what is counted."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import UserError
from ..config import Config
from ..data.batches import move
from ..runtime import distributed as dist
from ..runtime.seeding import generator


@dataclass(frozen=True)
class Share:
    """How a batch is split: `ranks` times `accum` pieces of `micro` samples."""

    ranks: int
    accum: int
    micro: int

    def pieces(self, rank: int) -> list[tuple[int, int]]:
        first = rank * self.accum
        return [(i * self.micro, (i + 1) * self.micro) for i in range(first, first + self.accum)]


def rank_share(config: Config) -> Share:
    """Raises UserError if the batch does not divide, naming the nearest sizes that do."""
    ranks = dist.world_size()
    B = config.batch_size
    parts = ranks * config.grad_accum
    if B % parts:
        below = B // parts * parts
        sizes = f"{below} or {below + parts}" if below else f"{parts}"
        raise UserError(
            f"batch_size {B} does not divide by {ranks} ranks x {config.grad_accum} "
            f"micro-batches; the nearest that do: {sizes}"
        )
    return Share(ranks, config.grad_accum, B // parts)


def draw(
    config: Config, step: int, T: int, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """t (B,) int64, eps (B, *shape) and which conditions to hide (B,) bool, for a global batch."""
    B = config.batch_size
    t = move(torch.randint(T, (B,), generator=generator(config.seed, "t", step)), device)
    hidden = (
        torch.rand(B, generator=generator(config.seed, "hide", step)) < config.condition_dropout
    )
    g = generator(config.seed, "noise", step, device=device)
    eps = torch.randn((B, *shape), generator=g, device=device)
    if config.noise_offset:
        g = generator(config.seed, "noise offset", step, device=device)
        eps = eps + config.noise_offset * torch.randn(
            (B, shape[0], 1, 1), generator=g, device=device
        )
    return t, eps.contiguous(memory_format=torch.channels_last), hidden


def clip_factor(norm: Tensor, most: float) -> Tensor:
    """(): what gradients of this norm are multiplied with, so that it is at most `most`."""
    return (most / (norm + 1e-6)).clamp(max=1)


def learning_rate(config: Config, step: int, total: int) -> float:
    """Of the update that leads from `step` to step + 1: warm-up, then the schedule down to 0."""
    warmup = min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    left = 1 - max(0, step - config.lr_warmup_steps) / max(1, total - config.lr_warmup_steps)
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    return config.learning_rate * warmup * shape[config.lr_schedule]


def total_steps(config: Config, epoch_length: int | None) -> int:
    if config.epochs is None:
        return config.train_steps
    if epoch_length is None:
        raise UserError("a stream's length is not known: give --train_steps instead of --epochs")
    return math.ceil(config.epochs * epoch_length / config.batch_size)


class Tally:
    """Sums since the last log line, on the device: nothing is read until a line is written.

    sums: loss and number of the good steps, norm of the last gradient, skipped steps in all, bad
        streak, worst streak; then the loss of the step that is being summed.
    """

    def __init__(self, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(7, dtype=dtype, device=device)

    def add_loss(self, loss: Tensor) -> None:
        """Of a micro-batch: its share of the step's loss."""
        self.sums[6] += loss.detach()

    def add_step(self, norm: Tensor, ok: Tensor) -> None:
        self.sums[0] += torch.where(ok, self.sums[6], 0)
        self.sums[1] += ok
        self.sums[2] = norm
        self.sums[3] += ~ok
        self.sums[4] = (self.sums[4] + 1) * ~ok
        self.sums[5] = torch.maximum(self.sums[5], self.sums[4])
        self.sums[6:].zero_()  # `self.sums[6] = 0` would wait for a GPU

    def read(self) -> dict[str, float]:
        """The means over ranks and steps (NaN if every step was bad); the sums start again."""
        loss = float(dist.all_reduce_sum(self.sums[0].clone())) / dist.world_size()
        _, good, norm, skipped, _, worst, _ = self.sums.tolist()
        self.sums[:2].zero_()
        self.sums[5:6].zero_()
        return {
            "loss": loss / good if good else math.nan,
            "grad_norm": norm,
            "skipped": int(skipped),
            "worst_streak": int(worst),
        }
