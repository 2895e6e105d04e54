"""Easy consistency tuning: a trained network learns to give x0 in one or two evaluations.

    f(x_t, t) = f(x_r, r),    r < t on one line x0 + (sigma / alpha) eps,    f(x, 0) = x

arXiv:2406.14548, algorithm 1. Here t and r are noise levels, sigma / alpha, and f is the x0 that a
network's output means, by any objective but x0 itself: without noise that is x, whatever it says.
"""

import torch
from torch import Tensor

from .objective import Denoiser
from .schedule import NoisePath

HUBER_C = 0.06  # section 4, for ImageNet 64; 0 for CIFAR-10


def consistency_coefficients(path: NoisePath, objective: str, t: Tensor, stage: int) -> Tensor:
    """Give (7, 2, B) float32 for the path's t (B,), and for r of it, which nears t by the stage.

    The rows: alpha, sigma, c_in, c_noise, c_x, c_out and the level itself, t or r (section 3.3;
    q = 2, k = 8, b = 1); an r below the path's first level is 0.
    """
    alpha, sigma = path.at(t)
    t = (sigma / alpha).clamp(max=1e6)  # infinite where alpha is 0
    r = t * (1 - 2.0**-stage * (1 + 8 * torch.sigmoid(-t)))
    rows = []
    for level in (t, r * (r >= path.sigma[0] / path.alpha[0])):
        place = path.nearest_t(-level.log())
        pair = path.at(place)
        known = Denoiser(None, path, objective).coefficients(place, *pair)
        rows.append(torch.stack([*pair, *known.T, level]))
    return torch.stack(rows, 1).float()


def consistency_loss(network, coefficients: Tensor, x0: Tensor, eps: Tensor, cond=None) -> Tensor:
    """Give (B,) float32: the distance of f at t from f at r, over t - r, of each sample.

    It is sqrt(|d|^2 + c^2) - c, with the norm over all of a sample (section 3.3). f at r has no
    gradient, the same dropout, and float32 throughout. network, cond: see `training_loss`.
    coefficients: (7, 2, B) on x0's device, see `consistency_coefficients`.
    """

    def predict(levels: Tensor) -> Tensor:
        alpha, sigma, c_in, _, c_x, c_out, level = levels[..., None, None, None]
        x = alpha * x0 + sigma * eps
        f = c_x * x + c_out * network(c_in * x, levels[3], cond).float()
        return torch.where(level > 0, f, x0)

    at_t, at_r = coefficients.unbind(1)
    with torch.no_grad(), torch.random.fork_rng([x0.device] * x0.is_cuda):
        with torch.autocast(x0.device.type, enabled=False):
            target = predict(at_r)
    distance = ((predict(at_t) - target).square().sum((1, 2, 3)) + HUBER_C**2).sqrt() - HUBER_C
    return distance / (at_t[6] - at_r[6])
