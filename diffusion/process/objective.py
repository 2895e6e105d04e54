"""The forward process, its posterior, the training objectives and their loss.

    q(x_t | x0)          x_t = alpha_t x0 + sigma_t eps                     (DDPM eq. 4)
    q(x_{t-1} | x_t, x0) mean and variance of DDPM eq. 6-7
    v                    v = alpha_t eps - sigma_t x0                       (arXiv:2202.00512)

Shapes: x0, x_t, eps, v (B, C, H, W), images in [-1, 1]; t (B,) int64 on any device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import Schedule

OBJECTIVES = ("eps", "x0", "v")


def gather(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """table[t] in like's dtype and on its device, shaped to broadcast over (B, C, H, W)."""
    # cast and moved in one call: MPS has no float64
    values = table.to(device=t.device, dtype=like.dtype)[t]
    return values.to(like.device).view(-1, *[1] * (like.dim() - 1))


def q_sample(schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Diffuse x0 to step t with the given noise (DDPM eq. 4)."""
    return gather(schedule.alpha, t, x0) * x0 + gather(schedule.sigma, t, x0) * eps


def x0_coefficients(objective: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(c_x, c_out) with x0 = c_x x_t + c_out out, for a network that predicts `objective`."""
    if objective == "eps":
        return 1 / alpha, -sigma / alpha
    if objective == "x0":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if objective == "v":
        return alpha, -sigma
    raise ValueError(f"objective {objective!r} is unknown; choose one of {', '.join(OBJECTIVES)}")


def predict_x0(schedule: Schedule, objective: str, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    c_x, c_out = x0_coefficients(objective, schedule.alpha, schedule.sigma)
    return gather(c_x, t, x_t) * x_t + gather(c_out, t, x_t) * out


def predict_eps(schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The noise that x_t holds if its clean image is x0 (DDPM eq. 4, solved for eps)."""
    return (x_t - gather(schedule.alpha, t, x_t) * x0) / gather(schedule.sigma, t, x_t)


def target(schedule: Schedule, objective: str, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """What the network should put out at (x_t, t)."""
    if objective == "eps":
        return eps
    if objective == "x0":
        return x0
    if objective == "v":
        return gather(schedule.alpha, t, x0) * eps - gather(schedule.sigma, t, x0) * x0
    raise ValueError(f"objective {objective!r} is unknown; choose one of {', '.join(OBJECTIVES)}")


def posterior(schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, C, H, W) and variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x0) (DDPM eq. 7)."""
    bar = schedule.alpha_bar
    prev = schedule.alpha_bar_prev
    beta = schedule.beta
    mean_x0 = prev.sqrt() * beta / (1 - bar)
    mean_xt = (1 - beta).sqrt() * (1 - prev) / (1 - bar)
    mean = gather(mean_x0, t, x_t) * x0 + gather(mean_xt, t, x_t) * x_t
    return mean, gather(beta * (1 - prev) / (1 - bar), t, x_t)


def p_sample(schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """One ancestral step from t to t-1, given the predicted x0 (DDPM algorithm 2).

    The posterior variance is 0 at t = 0, so the last step adds no noise.
    """
    mean, variance = posterior(schedule, x0, x_t, t)
    return mean + variance.sqrt() * noise


# --- the loss ----------------------------------------------------------------------------------

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}


def min_snr_weight(objective: str, snr: Tensor, gamma: float) -> Tensor:
    """Loss weights that clamp the SNR at gamma (arXiv:2303.09556, section 3.4).

    In terms of x0 the weight is min(snr, gamma); an eps error is snr times an x0 error and a v
    error snr + 1 times. Written so that snr = 0 divides nothing: the v weight is 0 there, the
    eps weight 1.
    """
    if objective == "eps":
        return (gamma / snr).clamp(max=1)
    if objective == "x0":
        return snr.clamp(max=gamma)
    return snr.clamp(max=gamma) / (snr + 1)


def training_loss(
    model,
    schedule: Schedule,
    objective: str,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    cond=None,
    loss: str = "l2",
    min_snr_gamma: float = 0.0,
) -> Tensor:
    """(B,) float32: the loss of each sample, averaged over its pixels (DDPM eq. 14).

    model(x_t, t, cond) puts out (B, C, H, W); t goes in as float32. min_snr_gamma 0 means equal
    weights. Raises ValueError for an unknown loss or objective.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is unknown; choose one of {', '.join(LOSSES)}")
    x_t = q_sample(schedule, x0, t, eps)
    out = model(x_t, t.to(x0), cond).float()
    goal = target(schedule, objective, x0, t, eps)
    per_sample = LOSSES[loss](out, goal, reduction="none").mean((1, 2, 3))
    if min_snr_gamma:
        weight = min_snr_weight(objective, schedule.snr, min_snr_gamma)
        per_sample = per_sample * gather(weight, t, per_sample)
    return per_sample
