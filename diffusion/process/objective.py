"""The forward process, its posterior, what a network may predict, and the loss.

    q(x_t | x0)           x_t = alpha_t x0 + sigma_t eps                     (DDPM eq. 4)
    q(x_{t-1} | x_t, x0)  mean and variance of DDPM eq. 6-7

An objective is a row (a, b): the network's target is a x0 + b eps. With x_t this makes

    x0 = (b x_t - sigma out) / (alpha b - sigma a)

and the loss in the space of another row (a', b') is the network's own loss times
((alpha b' - sigma a') / (alpha b - sigma a))^2.

Shapes: x0, x_t, eps (B, C, H, W), images in [-1, 1]; t (B,); tables (T,) float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import NoisePath

OBJECTIVES: dict[str, Callable] = {  # (alpha, sigma) -> (a, b)
    "eps": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "x0": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)),
    "v": lambda alpha, sigma: (-sigma, alpha),  # arXiv:2202.00512
}
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}


def gather(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Look up table[t] in like's dtype and on its device, shaped to broadcast over (B, C, H, W)."""
    # cast and moved in one call: MPS has no float64
    values = table.to(device=t.device, dtype=like.dtype)[t]
    return values.to(like.device).view(-1, *[1] * (like.dim() - 1))


def q_sample(schedule: NoisePath, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Diffuse x0 to step t, (B,) int64, with the given noise (DDPM eq. 4)."""
    return gather(schedule.alpha, t, x0) * x0 + gather(schedule.sigma, t, x0) * eps


def posterior(schedule: NoisePath, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean (B, C, H, W) and variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x0) (DDPM eq. 7)."""
    bar = schedule.alpha_bar
    prev = torch.cat([bar.new_ones(1), bar[:-1]])
    beta = 1 - bar / prev
    mean_x0 = prev.sqrt() * beta / (1 - bar)
    mean_xt = (1 - beta).sqrt() * (1 - prev) / (1 - bar)
    mean = gather(mean_x0, t, x_t) * x0 + gather(mean_xt, t, x_t) * x_t
    return mean, gather(beta * (1 - prev) / (1 - bar), t, x_t)


def p_sample(schedule: NoisePath, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Take one ancestral step from t to t-1, given the predicted x0 (DDPM algorithm 2).

    The posterior variance is 0 at t = 0, so the last step adds no noise.
    """
    mean, variance = posterior(schedule, x0, x_t, t)
    return mean + variance.sqrt() * noise


# --- objectives ----------------------------------------------------------------------------------


def row(objective: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Give (a, b): the target is a x0 + b eps. Raises ValueError for an unknown objective."""
    if objective not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        raise ValueError(f"objective {objective!r} is unknown; choose one of {known}")
    return OBJECTIVES[objective](alpha, sigma)


def x0_coefficients(objective: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Give (c_x, c_out) with x0 = c_x x_t + c_out out, for a network that predicts `objective`."""
    a, b = row(objective, alpha, sigma)
    det = alpha * b - sigma * a
    return b / det, -sigma / det


def space_weight(objective: str, space: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Give the weight that turns a squared error of `objective` into one of `space`."""
    (a, b), (a2, b2) = (row(name, alpha, sigma) for name in (objective, space))
    return ((alpha * b2 - sigma * a2) / (alpha * b - sigma * a)) ** 2


def min_snr_weight(objective: str, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """Give loss weights that are min(SNR, gamma) in terms of x0 (arXiv:2303.09556, section 3.4).

    At SNR = 0 the weight of eps is 1, its limit, and that of v is 0.
    """
    alpha = alpha.clamp(min=1e-150)  # so that 0 / 0 becomes the limit
    return (alpha / sigma).square().clamp(max=gamma) * space_weight(objective, "x0", alpha, sigma)


@dataclass(frozen=True, eq=False)
class Denoiser:
    """Turn a network into D(x_t) -> x0, by the objective that it was trained on.

    network: (c_in x_t, c_noise (B,), *cond) -> out, shaped as x_t.
    """

    network: Callable[..., Tensor]
    schedule: NoisePath
    objective: str

    def coefficients(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Give (N, 4) float64, a row for each level: c_in, c_noise, c_x, c_out."""
        c_in, c_noise = self.schedule.inputs(t, alpha, sigma)
        return torch.stack([c_in, c_noise, *x0_coefficients(self.objective, alpha, sigma)], 1)

    def __call__(self, x: Tensor, k: Tensor, *cond) -> Tensor:
        """Predict x0 from x (B, C, H, W) at the level of a row k (4,) on x's device."""
        c_in, c_noise, c_x, c_out = k
        out = self.network(c_in * x, c_noise.expand(len(x)), *cond).float()
        return c_x * x + c_out * out


# --- the loss ------------------------------------------------------------------------------------


def training_coefficients(
    schedule: NoisePath, objective: str, t: Tensor, min_snr_gamma: float = 0.0
) -> Tensor:
    """Give (7, B) float32 of t (B,): alpha, sigma, c_in, c_noise, a, b and the loss weight.

    min_snr_gamma: 0 means equal weights. Raises ValueError for an unknown objective.
    """
    t = t.double()
    alpha, sigma = schedule.at(t)
    weight = torch.ones_like(alpha)
    if min_snr_gamma:
        weight = min_snr_weight(objective, alpha, sigma, min_snr_gamma)
    rows = [alpha, sigma, *schedule.inputs(t, alpha, sigma), *row(objective, alpha, sigma), weight]
    return torch.stack(rows).float()


def training_loss(
    network, coefficients: Tensor, x0: Tensor, eps: Tensor, cond=None, loss: str = "l2"
) -> Tensor:
    """Give (B,) float32: the loss of each sample, averaged over its pixels (DDPM eq. 14).

    network(x, c_noise (B,), cond) puts out (B, C, H, W). coefficients: (7, B) on x0's device, see
    `training_coefficients`. Raises ValueError for an unknown loss.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is unknown; choose one of {', '.join(LOSSES)}")
    alpha, sigma, c_in, _, a, b, _ = coefficients[..., None, None, None]
    x_t = alpha * x0 + sigma * eps
    out = network(c_in * x_t, coefficients[3], cond).float()
    target = a * x0 + b * eps
    per_sample = LOSSES[loss](out, target, reduction="none").mean((1, 2, 3))
    return coefficients[6] * per_sample
