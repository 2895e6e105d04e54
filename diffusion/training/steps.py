"""The parts of a training step: how a batch is split, what is sampled for it, what is counted."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import UserError
from ..config import Config
from ..data.augment import augmentations
from ..data.batches import move
from ..process.consistency import consistency_coefficients
from ..process.objective import training_coefficients
from ..process.schedule import NoisePath
from ..runtime import distributed as dist
from ..runtime.seeding import generator


@dataclass(frozen=True)
class BatchSplit:
    """Split a global batch into `ranks` times `accum` micro-batches of `micro` samples."""

    ranks: int
    accum: int
    micro: int

    def micro_batches(self, rank: int) -> list[tuple[int, int]]:
        """List a rank's parts of the global batch, as (first sample, one behind the last)."""
        first = rank * self.accum
        return [(i * self.micro, (i + 1) * self.micro) for i in range(first, first + self.accum)]


def split_batch(config: Config) -> BatchSplit:
    """Split config.batch_size over ranks and micro-batches.

    Raises UserError if it does not divide, naming the nearest sizes that do.
    """
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
    return BatchSplit(ranks, config.grad_accum, B // parts)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count a model's parameters, and those of them that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


# --- randomness ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Draw:
    """Hold the random numbers of B samples.

    levels: (7, B) or (7, 2, B), see `loss_coefficients`; eps (B, C, h, w); drop (B,) bool on the
    CPU, whose condition is dropped; vae_eps: eps's shape, what samples latents from the VAE's
    distribution. augment (B, 6): see data/augment.py.
    """

    levels: Tensor
    eps: Tensor
    drop: Tensor
    vae_eps: Tensor | None = None
    augment: Tensor | None = None

    def __getitem__(self, part: slice) -> "Draw":
        rows = (self.eps, self.drop, self.vae_eps, self.augment)
        return Draw(self.levels[..., part], *(x if x is None else x[part] for x in rows))


def loss_coefficients(
    config: Config, schedule: NoisePath, t: Tensor, progress: float = 1.0
) -> Tensor:
    """Give the `training_coefficients` (7, B) of t (B,), with the loss that is configured.

    With --consistency its own, (7, 2, B). progress: how far the run is, from 0 to 1.
    """
    c = config
    if c.consistency:
        stage = math.ceil(progress * c.consistency_stages)
        return consistency_coefficients(schedule, c.objective, t, stage)
    power = 1 if c.loss == "l1" else 2
    return training_coefficients(schedule, c.objective, t, c.min_snr_gamma, c.space, c.t_eps, power)


def draw(
    config: Config,
    schedule: NoisePath,
    shape: tuple[int, ...],
    step: int,
    device: torch.device,
    seed: int,
    progress: float = 1.0,
) -> Draw:
    """Sample the random numbers of a step's global batch; each depends on (seed, step, j) only.

    shape: (C, h, w) of x0. progress: see `loss_coefficients`.
    """
    c = config
    B = c.batch_size
    t = schedule.sample_t(B, generator(seed, "t", step))
    levels = loss_coefficients(c, schedule, t, progress)
    drop = torch.rand(B, generator=generator(seed, "hide", step)) < c.condition_dropout

    def normal(what: str, *sizes: int) -> Tensor:
        g = generator(seed, what, step, device=device)
        return torch.randn((B, *sizes), generator=g, device=device)

    eps = normal("noise", *shape)
    if c.noise_offset:
        eps = eps + c.noise_offset * normal("noise offset", shape[0], 1, 1)
    vae_eps = normal("latents", *shape) if c.mode == "latent" else None
    eps = eps.contiguous(memory_format=torch.channels_last)
    vectors = None
    if c.augment:
        g = generator(seed, "augment", step)
        vectors = move(augmentations(B, c.augment, *shape[1:], g), device)
    return Draw(move(levels, device), eps, drop, vae_eps, vectors)


# --- the update ----------------------------------------------------------------------------------


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Give (): what gradients of this norm are multiplied with, so that it is at most max_norm."""
    return (max_norm / (norm + 1e-6)).clamp(max=1)


def learning_rate(config: Config, step: int, total: int) -> float:
    """Give the learning rate of update `step`: linear warm-up, then decay to 0 as scheduled."""
    warmup = min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    left = 1 - max(0, step - config.lr_warmup_steps) / max(1, total - config.lr_warmup_steps)
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    return config.learning_rate * warmup * shape[config.lr_schedule]


def total_steps(config: Config, epoch_length: int | None) -> int:
    """Give the number of steps of a run. Raises UserError for epochs of an unknown length."""
    if config.epochs is None:
        return config.train_steps
    if epoch_length is None:
        raise UserError("a stream's length is not known: give --train_steps instead of --epochs")
    return math.ceil(config.epochs * epoch_length / config.batch_size)


class StepStats:
    """Sum up steps since the last log line on the device, read only where a line is written."""

    def __init__(self, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.values = torch.zeros(7, dtype=dtype, device=device)  # what a checkpoint holds
        (
            self.loss_sum,  # of the good steps
            self.good_steps,
            self.grad_norm,  # of the last step
            self.skipped,  # steps with non-finite gradients, in all
            self.streak,  # of them in a row, until now
            self.worst_streak,
            self.step_loss,  # of the step that is being summed
        ) = self.values.unbind()

    def add_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's part of the step's loss."""
        self.step_loss += loss.detach()

    def add_step(self, norm: Tensor, ok: Tensor) -> None:
        """Count a step by the norm of its gradient, (), and whether that was finite."""
        self.loss_sum += torch.where(ok, self.step_loss, 0)
        self.good_steps += ok
        self.grad_norm.copy_(norm)
        self.skipped += ~ok
        self.streak.add_(1).mul_(~ok)
        torch.maximum(self.worst_streak, self.streak, out=self.worst_streak)
        self.step_loss.zero_()

    def read(self) -> dict[str, float]:
        """Give the means over ranks and steps (NaN if every step was bad); the sums restart."""
        loss = float(dist.all_reduce_sum(self.loss_sum.clone())) / dist.world_size()
        _, good, norm, skipped, _, worst, _ = self.values.tolist()
        self.loss_sum.zero_()
        self.good_steps.zero_()
        self.worst_streak.zero_()
        return {
            "loss": loss / good if good else math.nan,
            "grad_norm": norm,
            "skipped": int(skipped),
            "worst_streak": int(worst),
        }
