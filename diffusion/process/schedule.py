"""Noise paths: what a step of the forward process adds, and which steps a sampler visits.

    x_t = alpha_t x0 + sigma_t eps,    t = 0 ... T-1 from clean to noise,    all in float64

lam_t = log(alpha_t / sigma_t) is half the log-SNR and falls with t. A path is a row of data: its
levels, what the network is given, and how training draws t. The variance-preserving ones here
have alpha_t^2 = alpha_bar_t and sigma_t^2 = 1 - alpha_bar_t.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

MAX_BETA = 0.999  # keeps alpha_bar above 0 (Nichol & Dhariwal 2021, section 3.2)


def vp_levels(lam: Tensor) -> tuple[Tensor, Tensor]:
    """Give (alpha, sigma) of unit variance, alpha^2 + sigma^2 = 1, at half the log-SNR lam."""
    return torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()


def plain_inputs(t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Give (c_in, c_noise) of a network that sees x_t and t as they are."""
    return torch.ones_like(alpha), t


@dataclass(frozen=True, eq=False)
class NoisePath:
    """Describe a noise path x_t = alpha_t x0 + sigma_t eps.

    alpha, sigma, lam: (T,) float64 at the integer t; lam may be -inf at the last one.
    between: lam -> (alpha, sigma), for a real-valued t between two integers.
    inputs: (t, alpha, sigma) -> (c_in, c_noise); the network is called with c_in x_t and c_noise.
    quantile: u in [0, 1) -> t, how training spreads t; None: all integers alike.
    prior_std: the standard deviation of the noise that sampling starts from.
    """

    alpha: Tensor
    sigma: Tensor
    lam: Tensor
    between: Callable[[Tensor], tuple[Tensor, Tensor]] = vp_levels
    inputs: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = plain_inputs
    quantile: Callable[[Tensor], Tensor] | None = None
    prior_std: float = 1.0

    def __len__(self) -> int:
        return len(self.alpha)

    @cached_property
    def alpha_bar(self) -> Tensor:
        return self.alpha**2

    @cached_property
    def snr(self) -> Tensor:
        return (self.alpha / self.sigma) ** 2

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Give (alpha, sigma) at real-valued t (N,); lam is linear between the integers."""
        low = t.floor().long().clamp(0, len(self) - 1)
        high = (low + 1).clamp(max=len(self) - 1)
        frac = t - low
        alpha, sigma = self.between(self.lam[low] + frac * (self.lam[high] - self.lam[low]))
        exact = frac == 0  # also where lam is infinite
        return torch.where(exact, self.alpha[low], alpha), torch.where(
            exact, self.sigma[low], sigma
        )

    def t_of(self, lam: Tensor) -> Tensor:
        """Give the real-valued t at which half the log-SNR is lam; the inverse of `at`."""
        high = torch.searchsorted(-self.lam, -lam).clamp(1, len(self) - 1)
        low = high - 1
        return low + (self.lam[low] - lam) / (self.lam[low] - self.lam[high])

    def sample_t(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw t (n,) for training."""
        if self.quantile is None:
            return torch.randint(len(self), (n,), generator=generator)
        return self.quantile(torch.rand(n, generator=generator, dtype=torch.float64))

    def stratified_t(self, order: Tensor, n: int) -> Tensor:
        """Spread t (N,) as training does, evenly: order, of 0 ... n-1, becomes the quantiles."""
        middle = order.double() + 0.5
        if self.quantile is None:
            return (middle * (len(self) / n)).long()
        return self.quantile(middle / n)


def variance_preserving(alpha_bar: Tensor) -> NoisePath:
    """Make a path of alpha_bar (T,) float64, falling, in [0, 1)."""
    lam = 0.5 * (alpha_bar.log() - torch.log1p(-alpha_bar))
    return NoisePath(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), lam)


def from_betas(beta: Tensor) -> NoisePath:
    """Make a path of beta_t = 1 - alpha_bar_t / alpha_bar_{t-1} (T,) (DDPM eq. 2)."""
    return variance_preserving((1 - beta.double().clamp(max=MAX_BETA)).cumprod(0))


def linear(T: int, first: float = 1e-4, last: float = 0.02) -> NoisePath:
    """Make DDPM section 4's path: betas for T = 1000, times 1000 / T so that alpha_bar_T stays."""
    return from_betas(torch.linspace(first, last, T, dtype=torch.float64) * (1000 / T))


def scaled_linear(T: int, first: float = 0.00085, last: float = 0.012) -> NoisePath:
    """Make latent diffusion's path, Stable Diffusion 1.x's for T = 1000: sqrt(beta) is linear."""
    root = torch.linspace(first**0.5, last**0.5, T, dtype=torch.float64)
    return from_betas(root**2 * (1000 / T))


def _from_alpha_bar(f: Callable[[Tensor], Tensor], T: int) -> NoisePath:
    """Make a path of a continuous alpha_bar(u), u in [0, 1], scaled to alpha_bar(0) = 1."""
    value = f(torch.linspace(0, 1, T + 1, dtype=torch.float64))
    return from_betas(1 - value[1:] / value[:-1])


def cosine(T: int, s: float = 0.008) -> NoisePath:
    """Make the path of Nichol & Dhariwal 2021, eq. 17."""
    return _from_alpha_bar(lambda u: torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2, T)


def sigmoid(T: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> NoisePath:
    """Make the path of Jabri et al. 2022 (arXiv:2212.11972), algorithm 2."""

    def alpha_bar(u: Tensor) -> Tensor:
        a, b = (1 / (1 + math.exp(-v / tau)) for v in (start, end))
        return (b - torch.sigmoid((u * (end - start) + start) / tau)) / (b - a)

    return _from_alpha_bar(alpha_bar, T)


SCHEDULES = {
    "cosine": cosine,
    "linear": linear,
    "sigmoid": sigmoid,
    "scaled_linear": scaled_linear,
}


def zero_terminal_snr(schedule: NoisePath) -> NoisePath:
    """Shift and scale alpha: the last becomes 0, the first stays (arXiv:2305.08891, alg. 1)."""
    if not torch.allclose(schedule.alpha**2 + schedule.sigma**2, torch.ones_like(schedule.alpha)):
        raise ValueError("zero_snr needs a variance-preserving schedule")
    a = schedule.alpha
    return variance_preserving(((a - a[-1]) * (a[0] / (a[0] - a[-1]))) ** 2)


def make_schedule(name: str, T: int, zero_snr: bool = False) -> NoisePath:
    """Make a path by the name of its schedule. Raises ValueError for an unknown name or T < 2."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    if T < 2:
        raise ValueError(f"time_steps is {T}; a schedule needs at least 2")
    schedule = SCHEDULES[name](T)
    return zero_terminal_snr(schedule) if zero_snr else schedule


# --- spacing: which timesteps a sampler visits -----------------------------------------------


def _leading(schedule: NoisePath, points: int, offset: int) -> Tensor:
    return torch.arange(points, dtype=torch.float64) * (len(schedule) // points) + offset


def _trailing(schedule: NoisePath, points: int, offset: int) -> Tensor:
    T = len(schedule)
    return (T - torch.arange(points, dtype=torch.float64) * T / points).round().flip(0) - 1


def _linspace(schedule: NoisePath, points: int, offset: int) -> Tensor:
    return torch.linspace(0, len(schedule) - 1, points, dtype=torch.float64).round()


def _logsnr(schedule: NoisePath, points: int, offset: int, power: int | None = None) -> Tensor:
    """Space real-valued t uniformly in log-SNR, or in the noise level sigma / alpha to 1 / power.

    An infinite end is visited, but not spread over.
    """
    lam = schedule.lam
    infinite = int(torch.isinf(lam[-1]))
    if points == 1:
        return torch.tensor([len(schedule) - 1.0], dtype=torch.float64)
    last = len(schedule) - 1 - infinite
    ends = lam[[0, last]] if power is None else torch.exp(-lam[[0, last]] / power)
    grid = torch.linspace(*ends.tolist(), points - infinite, dtype=torch.float64)
    t = schedule.t_of(grid if power is None else -power * grid.log())
    t[0] = 0.0
    t[-1] = float(last)
    return torch.cat([t, t.new_tensor([last + 1.0])]) if infinite else t


SPACINGS = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "logsnr": _logsnr,
    "karras": partial(_logsnr, power=7),  # arXiv:2206.00364, eq. 5
}
REAL = ("logsnr", "karras")  # whose t are no whole numbers


def timesteps(
    schedule: NoisePath, steps: int, spacing: str, offset: int = 0, extra: int = 0
) -> Tensor:
    """Choose the timesteps to visit: (steps,) float64, falling.

    spacing: leading (t = 0 is visited, the last T/steps are not), trailing (T-1 is visited),
        linspace (both are), logsnr and karras (both are; real-valued t, uniform in log-SNR, or in
        the seventh root of the noise level).
    offset: added to every t of `leading` (Stable Diffusion's steps_offset is 1).
    extra: the spacing is computed for steps + extra points and its lowest points dropped;
        DPM-Solver in diffusers has 1 for leading and linspace.
    Raises ValueError if the schedule has too few steps or the spacing is unknown.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing {spacing!r} is unknown; choose one of {', '.join(SPACINGS)}")
    T = len(schedule)
    points = steps + extra
    if steps < 1:
        raise ValueError(f"steps is {steps}; a sampler needs at least 1")
    if points > T and spacing not in REAL:
        raise ValueError(
            f"{steps} steps are more than the schedule's {T} can be split into by {spacing} "
            f"spacing; use at most {T - extra}, or spacing logsnr"
        )
    t = SPACINGS[spacing](schedule, points, offset).flip(0)[:steps]
    if t[0] > T - 1:
        raise ValueError(
            f"{spacing} spacing of {steps} steps with offset {offset} reaches t = {t[0]:.0f}, "
            f"beyond the last, {T - 1}; use fewer steps or --spacing trailing"
        )
    return t
