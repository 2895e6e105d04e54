"""The forward process, its posterior, what a network may predict, and the loss.

    q(x_t | x0)           x_t = alpha_t x0 + sigma_t eps                     (DDPM eq. 4)
    q(x_{t-1} | x_t, x0)  mean and variance of DDPM eq. 6-7

An objective is a row (a, b): the network's target is a x0 + b eps. With x_t this makes

    x0 = (b x_t - sigma out) / (alpha b - sigma a)

and an error in the space of another row (a', b') is the network's own error times
(alpha b' - sigma a') / (alpha b - sigma a).

Shapes: x0, x_t, eps (B, C, H, W), images in [-1, 1]; t (B,); tables (T,) float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import NoisePath


def edm_row(alpha: Tensor, sigma: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Give the row of EDM's F (arXiv:2206.00364, eq. 7 and 8): unit variance in and out."""
    norm = (sigma**2 + (alpha * s) ** 2).rsqrt()
    return norm * sigma / s, -norm * alpha * s


OBJECTIVES: dict[str, Callable] = {  # (alpha, sigma, sigma_data) -> (a, b)
    "eps": lambda alpha, sigma, s: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "x0": lambda alpha, sigma, s: (torch.ones_like(alpha), torch.zeros_like(alpha)),
    "v": lambda alpha, sigma, s: (-sigma, alpha),  # arXiv:2202.00512
    "flow": lambda alpha, sigma, s: (-torch.ones_like(alpha), torch.ones_like(alpha)),
    "edm": edm_row,
}
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}


def q_sample(schedule: NoisePath, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Diffuse x0 to step t, (B,), with the given noise (DDPM eq. 4)."""
    # cast and moved in one call: MPS has no float64
    alpha, sigma = torch.stack(schedule.at(t.cpu())).to(x0)[..., None, None, None]
    return alpha * x0 + sigma * eps


def posterior(schedule: NoisePath, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean (B, C, H, W) and variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x0) (DDPM eq. 7).

    t: (B,) int64; before t = 0 is the image itself.
    """
    t = t.cpu()
    alpha, sigma = schedule.at(t)
    alpha_s, sigma_s = schedule.at((t - 1).clamp(min=0))
    alpha_s = torch.where(t > 0, alpha_s, 1.0)
    sigma_s = torch.where(t > 0, sigma_s, 0.0)
    shrink = alpha / alpha_s
    added = sigma**2 - (shrink * sigma_s) ** 2  # the variance of q(x_t | x_{t-1})
    kept = (sigma_s / sigma) ** 2
    rows = torch.stack([alpha_s * added / sigma**2, shrink * kept, added * kept])
    k_x0, k_xt, variance = rows.to(x_t)[..., None, None, None]
    return k_x0 * x0 + k_xt * x_t, variance


def p_sample(schedule: NoisePath, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Take one ancestral step from t to t-1, given the predicted x0 (DDPM algorithm 2).

    The posterior variance is 0 at t = 0, so the last step adds no noise. Over all t this is the
    table of the sampler ddpm.
    """
    mean, variance = posterior(schedule, x0, x_t, t)
    return mean + variance.sqrt() * noise


# --- objectives ----------------------------------------------------------------------------------


def row(schedule: NoisePath, objective: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Give (a, b): the target is a x0 + b eps."""
    return OBJECTIVES[objective](alpha, sigma, schedule.sigma_data)


def target(
    schedule: NoisePath, objective: str, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Give the `row` of what a network predicts, at the levels that it was trained on."""
    return row(schedule, objective, *schedule.seen(alpha, sigma))


def x0_coefficients(
    schedule: NoisePath, objective: str, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Give (c_x, c_out) with x0 = c_x x_t + c_out out, for a network that predicts `objective`."""
    a, b = target(schedule, objective, alpha, sigma)
    det = alpha * b - sigma * a
    return b / det, -sigma / det


def error_ratio(
    schedule: NoisePath,
    objective: str,
    space: str,
    alpha: Tensor,
    sigma: Tensor,
    t_eps: float = 0.0,
) -> Tensor:
    """Give the factor that turns an error of `objective` into one of `space`.

    t_eps: the least denominator, which is sigma where x0 is predicted (arXiv:2511.13720, app. A).
    """
    a, b = target(schedule, objective, alpha, sigma)
    a2, b2 = row(schedule, space, alpha, sigma)
    return (alpha * b2 - sigma * a2).abs() / (alpha * b - sigma * a).abs().clamp(min=t_eps)


def min_snr_weight(
    schedule: NoisePath, objective: str, alpha: Tensor, sigma: Tensor, gamma: float
) -> Tensor:
    """Give loss weights that are min(SNR, gamma) in terms of x0 (arXiv:2303.09556, section 3.4).

    At SNR = 0 the weight of eps is 1, its limit, and that of v is 0.
    """
    alpha = alpha.clamp(min=1e-150)  # so that 0 / 0 becomes the limit
    ratio = error_ratio(schedule, objective, "x0", alpha, sigma)
    return (alpha / sigma).square().clamp(max=gamma) * ratio**2


@dataclass(frozen=True, eq=False)
class Denoiser:
    """Turn a network into D(x_t) -> x0, by the objective that it was trained on.

    network: (c_in x_t, c_noise (B,), *cond) -> out, shaped as x_t.
    weighted: whether it takes the guidance weight, (), behind c_noise (`loop.guided`).
    """

    network: Callable[..., Tensor]
    schedule: NoisePath
    objective: str
    weighted: bool = False

    def coefficients(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Give (N, 4) float64, a row for each level: c_in, c_noise, c_x, c_out."""
        c_in, c_noise = self.schedule.network_inputs(t, alpha, sigma)
        c_x, c_out = x0_coefficients(self.schedule, self.objective, alpha, sigma)
        return torch.stack([c_in, c_noise, c_x, c_out], 1)

    def __call__(self, x: Tensor, k: Tensor, *cond) -> Tensor:
        """Predict x0 from x (B, C, H, W) at the level of a row k (5,) on x's device.

        k: c_in, c_noise, c_x, c_out and the guidance weight.
        """
        c_in, c_noise, c_x, c_out, *weight = k
        weight = weight[: self.weighted]
        out = self.network(c_in * x, c_noise.expand(len(x)), *weight, *cond).float()
        return c_x * x + c_out * out


# --- the loss ------------------------------------------------------------------------------------


def training_coefficients(
    schedule: NoisePath,
    objective: str,
    t: Tensor,
    min_snr_gamma: float = 0.0,
    loss_space: str | None = None,
    t_eps: float = 0.05,
    power: int = 2,
) -> Tensor:
    """Give (7, B) float32 of t (B,): alpha, sigma, c_in, c_noise, a, b and the loss weight.

    min_snr_gamma: 0 means equal weights. loss_space: the row whose error the loss measures, to
    this power; None: the objective's own. t_eps: see `error_ratio`.
    """
    t = t.double()
    alpha, sigma = schedule.at(t)
    weight = torch.ones_like(alpha)
    if min_snr_gamma:
        weight = min_snr_weight(schedule, objective, alpha, sigma, min_snr_gamma)
    if loss_space is not None:
        ratio = error_ratio(schedule, objective, loss_space, alpha, sigma, t_eps)
        weight = weight * ratio**power
    inputs = schedule.network_inputs(t, alpha, sigma)
    ab = target(schedule, objective, alpha, sigma)
    return torch.stack([alpha, sigma, *inputs, *ab, weight]).float()


def training_loss(
    network, coefficients: Tensor, x0: Tensor, eps: Tensor, cond=None, loss: str = "l2"
) -> Tensor:
    """Give (B,) float32: the loss of each sample, averaged over its pixels (DDPM eq. 14).

    network(x, c_noise (B,), cond) puts out (B, C, H, W). coefficients: (7, B) on x0's device, see
    `training_coefficients`.
    """
    alpha, sigma, c_in, _, a, b, _ = coefficients[..., None, None, None]
    x_t = alpha * x0 + sigma * eps
    out = network(c_in * x_t, coefficients[3], cond).float()
    per_sample = LOSSES[loss](out, a * x0 + b * eps, reduction="none").mean((1, 2, 3))
    return coefficients[6] * per_sample
