"""Noise schedules and timestep spacing, in float64.

    x_t = alpha_t x0 + sigma_t eps,    alpha_t^2 = alpha_bar_t,    sigma_t^2 = 1 - alpha_bar_t

T steps, t = 0 ... T-1; alpha_bar falls with t. lam_t = log(alpha_t / sigma_t) is half the log-SNR.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MAX_BETA = 0.999  # keeps alpha_bar above 0 (Nichol & Dhariwal 2021, section 3.2)


@dataclass(frozen=True, eq=False)
class Schedule:
    """A variance-preserving schedule; alpha_bar: (T,) float64, falling, in [0, 1)."""

    alpha_bar: Tensor

    def to(self, device: torch.device) -> "Schedule":
        """The same with its tables on a device, still float64 (MPS has none: stays where it is)."""
        return self if device.type == "mps" else Schedule(self.alpha_bar.to(device))

    def __len__(self) -> int:
        return len(self.alpha_bar)

    @cached_property
    def alpha(self) -> Tensor:
        return self.alpha_bar.sqrt()

    @cached_property
    def sigma(self) -> Tensor:
        return (1 - self.alpha_bar).sqrt()

    @cached_property
    def lam(self) -> Tensor:
        """Half the log-SNR; -inf at the last step of a zero-terminal-SNR schedule."""
        return 0.5 * (self.alpha_bar.log() - torch.log1p(-self.alpha_bar))

    @cached_property
    def snr(self) -> Tensor:
        return self.alpha_bar / (1 - self.alpha_bar)

    @cached_property
    def beta(self) -> Tensor:
        """beta_t = 1 - alpha_bar_t / alpha_bar_{t-1} (DDPM eq. 2), with alpha_bar_{-1} = 1."""
        return 1 - self.alpha_bar / self.alpha_bar_prev

    @cached_property
    def alpha_bar_prev(self) -> Tensor:
        return torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at real-valued t (N,): lam is linear between the integers."""
        low = t.floor().long().clamp(0, len(self) - 1)
        high = (low + 1).clamp(max=len(self) - 1)
        frac = t - low
        lam = self.lam[low] + frac * (self.lam[high] - self.lam[low])
        exact = frac == 0  # also where lam is infinite
        alpha = torch.where(exact, self.alpha[low], torch.sigmoid(2 * lam).sqrt())
        sigma = torch.where(exact, self.sigma[low], torch.sigmoid(-2 * lam).sqrt())
        return alpha, sigma

    def t_of(self, lam: Tensor) -> Tensor:
        """The real-valued t at which half the log-SNR is lam; the inverse of `at`."""
        high = torch.searchsorted(-self.lam, -lam).clamp(1, len(self) - 1)
        low = high - 1
        return low + (self.lam[low] - lam) / (self.lam[low] - self.lam[high])


def from_betas(beta: Tensor) -> Schedule:
    return Schedule((1 - beta.double().clamp(max=MAX_BETA)).cumprod(0))


def linear(T: int, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """DDPM section 4's betas for T = 1000, scaled by 1000 / T so that alpha_bar_T stays put."""
    return from_betas(torch.linspace(first, last, T, dtype=torch.float64) * (1000 / T))


def scaled_linear(T: int, first: float = 0.00085, last: float = 0.012) -> Schedule:
    """Latent diffusion's betas: linear in sqrt(beta). Stable Diffusion 1.x for T = 1000."""
    root = torch.linspace(first**0.5, last**0.5, T, dtype=torch.float64)
    return from_betas(root**2 * (1000 / T))


def _from_alpha_bar(f: Callable[[Tensor], Tensor], T: int) -> Schedule:
    """Betas from a continuous alpha_bar(u), u in [0, 1], normalised to alpha_bar(0) = 1."""
    value = f(torch.linspace(0, 1, T + 1, dtype=torch.float64))
    return from_betas(1 - value[1:] / value[:-1])


def cosine(T: int, s: float = 0.008) -> Schedule:
    """Nichol & Dhariwal 2021, eq. 17."""
    return _from_alpha_bar(lambda u: torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2, T)


def sigmoid(T: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Schedule:
    """Jabri et al. 2022 (arXiv:2212.11972), algorithm 2."""

    def alpha_bar(u: Tensor) -> Tensor:
        a, b = (1 / (1 + math.exp(-v / tau)) for v in (start, end))
        return (b - torch.sigmoid((u * (end - start) + start) / tau)) / (b - a)

    return _from_alpha_bar(alpha_bar, T)


SCHEDULES = {f.__name__: f for f in (cosine, linear, sigmoid, scaled_linear)}


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Shift and scale alpha: the last becomes 0, the first stays (arXiv:2305.08891, alg. 1)."""
    a = schedule.alpha
    return Schedule(((a - a[-1]) * (a[0] / (a[0] - a[-1]))) ** 2)


def make_schedule(name: str, T: int, zero_snr: bool = False) -> Schedule:
    """A schedule by its name. Raises ValueError for an unknown name or T < 2."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    if T < 2:
        raise ValueError(f"time_steps is {T}; a schedule needs at least 2")
    schedule = SCHEDULES[name](T)
    return zero_terminal_snr(schedule) if zero_snr else schedule


# --- spacing: which timesteps a sampler visits -----------------------------------------------


def _leading(schedule: Schedule, points: int, offset: int) -> Tensor:
    return torch.arange(points, dtype=torch.float64) * (len(schedule) // points) + offset


def _trailing(schedule: Schedule, points: int, offset: int) -> Tensor:
    T = len(schedule)
    return (T - torch.arange(points, dtype=torch.float64) * T / points).round().flip(0) - 1


def _linspace(schedule: Schedule, points: int, offset: int) -> Tensor:
    return torch.linspace(0, len(schedule) - 1, points, dtype=torch.float64).round()


def _logsnr(schedule: Schedule, points: int, offset: int) -> Tensor:
    """Real-valued t, uniform in log-SNR; an infinite end is visited, but not spread over."""
    lam = schedule.lam
    infinite = int(torch.isinf(lam[-1]))
    if points == 1:
        return torch.tensor([len(schedule) - 1.0], dtype=torch.float64)
    last = len(schedule) - 1 - infinite
    grid = torch.linspace(float(lam[0]), float(lam[last]), points - infinite, dtype=torch.float64)
    t = schedule.t_of(grid)
    t[0] = 0.0
    t[-1] = float(last)
    return torch.cat([t, t.new_tensor([last + 1.0])]) if infinite else t


SPACINGS = {"leading": _leading, "trailing": _trailing, "linspace": _linspace, "logsnr": _logsnr}


def timesteps(
    schedule: Schedule, steps: int, spacing: str, offset: int = 0, extra: int = 0
) -> Tensor:
    """The timesteps to visit: (steps,) float64, falling.

    spacing: leading (t = 0 is visited, the last T/steps are not), trailing (T-1 is visited),
        linspace (both are), logsnr (both are; real-valued t, uniform in log-SNR).
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
    if points > T and spacing != "logsnr":
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
