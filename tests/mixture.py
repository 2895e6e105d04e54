"""A mixture of Gaussians whose score is known exactly."""

import torch
from torch import Tensor

from diffusion.process import samplers
from diffusion.process.samplers import Table

WIDTH = 0.15
_centres = torch.randn(12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CENTRES = 2 * _centres / _centres.norm(dim=1, keepdim=True)  # (12, 16)


def parts(x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How likely x (B, 16) is of each part (B, 12, 1), x - alpha centre (B, 12, 16), variance."""
    variance = alpha**2 * WIDTH**2 + sigma**2
    off = x[:, None] - alpha * CENTRES
    return torch.softmax(-(off**2).sum(2, keepdim=True) / (2 * variance), 1), off, variance


def x0_mean(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] at a level, x (B, 16)."""
    share, off, variance = parts(x, alpha, sigma)
    return (share * (CENTRES + alpha * WIDTH**2 / variance * off)).sum(1)


def velocity(x: Tensor, u: Tensor) -> Tensor:
    """The flow's dx/du at time u: each part's own, which moves its mean and scales around it."""
    share, off, variance = parts(x, 1 - u, u)
    growth = (u - (1 - u) * WIDTH**2) / variance  # d ln(std) / du
    return (share * (growth * off - CENTRES)).sum(1)


def solve(x: Tensor, first: float, last: float, steps: int = 3000) -> Tensor:
    """x where alpha = 1, from sigma first to last, by Runge-Kutta 4 in ln sigma."""
    grid = torch.linspace(0, 1, 2 * steps + 1, dtype=torch.float64)
    sigma = first * (last / first) ** grid
    h = torch.log(sigma[2] / sigma[0])
    slope = lambda x, s: x - x0_mean(x, torch.ones(()).double(), s)
    for i in range(0, 2 * steps, 2):
        k1 = slope(x, sigma[i])
        k2 = slope(x + h / 2 * k1, sigma[i + 1])
        k3 = slope(x + h / 2 * k2, sigma[i + 1])
        k4 = slope(x + h * k3, sigma[i + 2])
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def run(table: Table, x: Tensor, noise=None, denoiser=x0_mean) -> list[Tensor]:
    """The table in float64, straight from the definition in samplers.py: every y."""
    zero = torch.zeros_like(x)
    y, history, states = x, [zero] * samplers.HISTORY, [x]
    for i, (alpha, sigma) in enumerate(table.levels[:-1]):
        d0 = denoiser(y, alpha, sigma)
        p, q = table.keep[i]
        known = [x, y, d0, *history, zero if noise is None else noise[i]]
        history = [p * y + q * d0, *history][: samplers.HISTORY]
        x, y = (sum(map(torch.mul, row, known)) for row in (table.to_x[i], table.to_y[i]))
        states.append(y)
    return states
