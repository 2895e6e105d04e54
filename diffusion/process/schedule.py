"""Noise paths: what a step of the forward process adds, and which steps a sampler visits.

    x_t = alpha_t x0 + sigma_t eps,    t = 0 ... T-1 from clean to noise,    all in float64

lam_t = log(alpha_t / sigma_t) is half the log-SNR and falls with t. A path is a row of data: its
levels, what the network is given, and how training draws t. The variance-preserving ones here
have alpha_t^2 = alpha_bar_t and sigma_t^2 = 1 - alpha_bar_t; EDM's and the flow's have a formula.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

MAX_BETA = 0.999  # keeps alpha_bar above 0 (Nichol & Dhariwal 2021, section 3.2)


def vp_levels(lam: Tensor) -> tuple[Tensor, Tensor]:
    """Give (alpha, sigma) of unit variance, alpha^2 + sigma^2 = 1, at half the log-SNR lam."""
    return torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()


def same_levels(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Give (alpha, sigma) of a network that was trained on the path itself."""
    return alpha, sigma


@dataclass(frozen=True, eq=False)
class NoisePath:
    """Describe a noise path x_t = alpha_t x0 + sigma_t eps.

    alpha, sigma, lam: (T,) float64 at the integer t; lam may be -inf at the last one.
    at: real-valued t (N,) -> (alpha, sigma), each (N,) float64. t_of: lam (N,) -> t, its inverse.
    network_inputs: (t, alpha, sigma) -> (c_in, c_noise), what the network is called with:
        c_in x_t and c_noise.
    seen: (alpha, sigma) -> the levels of c_in x_t, at which the network's target is read.
    quantile: u in [0, 1) -> t, how training spreads t; None: all integers alike.
    prior_std: (alpha, sigma) of the level that sampling starts from -> the deviation of its noise.
    sigma_data: the deviation of the data that EDM's preconditioning takes for granted.
    """

    alpha: Tensor
    sigma: Tensor
    lam: Tensor
    at: Callable[[Tensor], tuple[Tensor, Tensor]]
    t_of: Callable[[Tensor], Tensor]
    network_inputs: Callable = lambda t, alpha, sigma: (torch.ones_like(alpha), t)
    seen: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = same_levels
    quantile: Callable[[Tensor], Tensor] | None = None
    prior_std: Callable[[float, float], float] = lambda alpha, sigma: 1.0
    sigma_data: float = 0.5

    def __len__(self) -> int:
        return len(self.alpha)

    @cached_property
    def alpha_bar(self) -> Tensor:
        return self.alpha**2

    def nearest_t(self, lam: Tensor) -> Tensor:
        """Give `t_of` the path's level that is nearest to lam, which may lie beyond its ends."""
        return self.t_of(lam.clamp(self.lam[-1], self.lam[0])).clamp(0, len(self) - 1)

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
    """Make a path of alpha_bar (T,) float64, falling, in [0, 1).

    Between the integer t, lam is linear; towards an infinite one, alpha / sigma is.
    """
    lam = 0.5 * (alpha_bar.log() - torch.log1p(-alpha_bar))
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    rise = torch.cat([lam.diff(), lam.new_zeros(1)])

    def at(t: Tensor) -> tuple[Tensor, Tensor]:
        low = t.floor().long().clamp(0, len(lam) - 1)
        frac = t - low
        step = torch.where(rise[low].isfinite(), frac * rise[low], torch.log1p(-frac))
        inside = vp_levels(lam[low] + step)
        exact = frac == 0
        return torch.where(exact, alpha[low], inside[0]), torch.where(exact, sigma[low], inside[1])

    def t_of(value: Tensor) -> Tensor:
        low = (torch.searchsorted(-lam, -value) - 1).clamp(0, len(lam) - 2)
        rest = value - lam[low]
        return low + torch.where(rise[low].isfinite(), rest / rise[low], -torch.expm1(rest))

    return NoisePath(alpha, sigma, lam, at, t_of)


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


def sigmoid(T: int) -> NoisePath:
    """Make the path of Jabri et al. 2022 (arXiv:2212.11972), algorithm 2, from -3 to 3, tau = 1."""
    a, b = (1 / (1 + math.exp(-v)) for v in (-3, 3))
    return _from_alpha_bar(lambda u: (b - torch.sigmoid(u * 6 - 3)) / (b - a), T)


SCHEDULES = {
    "cosine": cosine,
    "linear": linear,
    "sigmoid": sigmoid,
    "scaled_linear": scaled_linear,
}


def zero_terminal_snr(schedule: NoisePath) -> NoisePath:
    """Shift and scale alpha: the last becomes 0, the first stays (arXiv:2305.08891, alg. 1)."""
    a = schedule.alpha
    return variance_preserving(((a - a[-1]) * (a[0] / (a[0] - a[-1]))) ** 2)


def make_schedule(name: str, T: int, zero_snr: bool = False) -> NoisePath:
    """Make a path by the name of its schedule, T >= 2."""
    schedule = SCHEDULES[name](T)
    return zero_terminal_snr(schedule) if zero_snr else schedule


# --- paths by a formula ----------------------------------------------------------------------


def by_formula(T: int, at: Callable, t_of: Callable, **inputs) -> NoisePath:
    """Make a path that training spreads over evenly in t, and that starts as its own noise."""
    alpha, sigma = at(torch.arange(T, dtype=torch.float64))
    inputs |= {"quantile": lambda u: u * (T - 1), "prior_std": lambda alpha, sigma: sigma}
    return NoisePath(alpha, sigma, alpha.log() - sigma.log(), at, t_of, **inputs)


def flow(T: int, low: float, high: float) -> NoisePath:
    """Make the straight path, alpha = 1 - u and sigma = u (arXiv:2210.02747, arXiv:2209.03003).

    u: uniform in t from low to high. The network is given 1000 u for its time.
    """
    step = (high - low) / (T - 1)

    def at(t: Tensor) -> tuple[Tensor, Tensor]:
        u = high - step * (T - 1 - t.double())
        return 1 - u, u

    return by_formula(
        T,
        at,
        lambda lam: T - 1 - (high - torch.sigmoid(-lam)) / step,
        network_inputs=lambda t, alpha, sigma: (torch.ones_like(alpha), 1000 * sigma),
    )


def edm(T: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> NoisePath:
    """Make EDM's path, alpha = 1 and ln sigma uniform in t (arXiv:2206.00364, table 1)."""
    first = math.log(sigma_min)
    step = (math.log(sigma_max) - first) / (T - 1)

    def at(t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = torch.exp(first + step * t.double())
        return torch.ones_like(sigma), sigma

    return edm_inputs(by_formula(T, at, lambda lam: (-lam - first) / step), 0.5)


def edm_inputs(path: NoisePath, sigma_data: float) -> NoisePath:
    """Give the network c_in x of unit variance and c_noise = ln(sigma / alpha) / 4 (EDM eq. 7)."""

    def inputs(t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        c_in = (sigma**2 + (alpha * sigma_data) ** 2).rsqrt()
        return c_in, (sigma / alpha).log() / 4

    return replace(path, network_inputs=inputs, sigma_data=sigma_data)


def reinterpret(base: NoisePath, name: str) -> NoisePath:
    """Read a variance-preserving network on another path, flow or edm (arXiv:2506.02221).

    Both paths are one process up to a factor: at equal lam the network is given c_in x_t, of the
    levels (c_in alpha, c_in sigma) that it knows, and the base's t. The path has the levels that
    the base has, and starts from the noise that the base starts from, divided by c_in.
    """
    finite = base.lam[base.lam.isfinite()]
    low, high = torch.exp(-finite[[0, -1]]).tolist()  # of sigma / alpha
    T = len(base)
    path = edm(T, low, high) if name == "edm" else flow(T, low / (1 + low), high / (1 + high))

    def seen(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.hypot(alpha, sigma)
        return alpha / norm, sigma / norm

    def inputs(t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / torch.hypot(alpha, sigma), base.nearest_t((alpha / sigma).log())

    return replace(path, network_inputs=inputs, seen=seen, prior_std=math.hypot)


def make_path(
    name: str,
    T: int,
    objective: str,
    *,
    schedule: str = "cosine",
    zero_snr: bool = False,
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> NoisePath:
    """Make a path by its name: vp, of a schedule; edm, from sigma_min to sigma_max; or flow.

    objective: what is predicted; EDM's own is given EDM's inputs on every path, and where alpha is
    0, eps and edm say nothing about x0: a flow then ends at its last level above.
    """
    if name == "vp":
        path = make_schedule(schedule, T, zero_snr)
    elif name == "edm":
        path = edm(T, sigma_min, sigma_max)
    else:
        high = 1 - 1 / T if objective in ("eps", "edm") else 1.0
        path = flow(T, high / T, high)
    if name == "edm" or objective == "edm":
        path = edm_inputs(path, sigma_data)
    return replace(path, sigma_data=sigma_data)


# --- how training spreads its levels ----------------------------------------------------------


def spread(
    path: NoisePath, dist: str, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> NoisePath:
    """Choose how training draws t: uniformly, or with a normal ln(sigma / alpha).

    lognormal, logit_normal: of this mean and std (EDM: -1.2, 1.2). They are one distribution:
        ln(sigma / alpha) is the logit of a flow's time u (arXiv:2403.03206, eq. 19).
    shift: what sigma / alpha is then multiplied by; a flow's u becomes s u / (1 + (s - 1) u).
    Levels beyond the path's ends become the ends.
    """
    if dist == "uniform" and shift == 1:
        return path

    def quantile(u: Tensor) -> Tensor:
        if dist == "uniform":
            alpha, sigma = path.at(u * (len(path) - 1))
            lam = alpha.log() - sigma.log()
        else:
            lam = -mean - std * torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))
        return path.nearest_t(lam - math.log(shift))

    return replace(path, quantile=quantile)


# --- spacing: which timesteps a sampler visits -----------------------------------------------


def _logsnr(schedule: NoisePath, points: int, power: int | None = None) -> Tensor:
    """Space real-valued t uniformly in log-SNR, or in the noise level sigma / alpha to 1 / power.

    An infinite end is visited, but not spread over.
    """
    lam = schedule.lam
    infinite = int(points > 1 and lam[-1].isinf())
    last = len(schedule) - 1 - infinite
    ends = lam[[0, last]] if power is None else torch.exp(-lam[[0, last]] / power)
    grid = torch.linspace(*ends.tolist(), points - infinite, dtype=torch.float64)
    t = schedule.t_of(grid if power is None else -power * grid.log())
    t[0] = 0.0
    t[-1] = last
    return torch.cat([t, t.new_tensor([last + 1.0])]) if infinite else t


def _flow(schedule: NoisePath, points: int, shift: float = 1.0, highest: float = 1.0) -> Tensor:
    """Space the flow's u = sigma / (alpha + sigma) uniformly from its last value to 0, shifted.

    highest: a bound of u, above which the path's levels are left out.
    """
    ends = torch.sigmoid(-schedule.lam[[0, -1]])
    first, last = (ends / (shift - (shift - 1) * ends)).tolist()  # what is shifted to the ends
    top = min(last, highest)
    u = torch.linspace(max(first, top / points), top, points, dtype=torch.float64)
    u = shift * u / (1 + (shift - 1) * u)  # arXiv:2403.03206, eq. 23
    t = schedule.nearest_t(-torch.logit(u))
    if top == last:
        t[-1] = len(schedule) - 1.0
    return t


SPACINGS: dict[str, Callable] = {  # (path, points) -> t, rising
    "leading": lambda path, n: torch.arange(n, dtype=torch.float64) * (len(path) // n),
    "trailing": lambda path, n: (
        (len(path) - torch.arange(n, dtype=torch.float64) * len(path) / n).round().flip(0) - 1
    ),
    "linspace": lambda path, n: torch.linspace(0, len(path) - 1, n, dtype=torch.float64).round(),
    "logsnr": _logsnr,
    "karras": partial(_logsnr, power=7),  # arXiv:2206.00364, eq. 5
    "flow": _flow,
    # starts at sigma / alpha = 20, where x is noise; the second of two levels is 0.4
    "consistency": partial(_flow, shift=0.4, highest=0.98),
}
REAL = ("logsnr", "karras", "flow", "consistency")  # whose t are no whole numbers


def timesteps(
    schedule: NoisePath,
    steps: int,
    spacing: str,
    offset: int = 0,
    extra: int = 0,
    shift: float = 1.0,
) -> Tensor:
    """Choose the timesteps to visit: (steps,) float64, falling.

    spacing: leading (t = 0 is visited, the last T/steps are not), trailing (T-1 is visited),
        linspace (both are), logsnr and karras (both are; real-valued t, uniform in log-SNR, or in
        the seventh root of the noise level), flow (uniform in a flow's time, which ends at 0),
        consistency (the same, at lower levels).
        More points than T are spread evenly over all of t.
    offset: added to every t of `leading` (Stable Diffusion's steps_offset is 1).
    extra: the spacing is computed for steps + extra points and its lowest points dropped;
        DPM-Solver in diffusers has 1 for leading and linspace.
    shift: of `flow`, see `spread`.
    Raises ValueError if the spacing is unknown, leaves the path or visits a timestep twice.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing {spacing!r} is unknown; choose one of {', '.join(SPACINGS)}")
    T = len(schedule)
    points = steps + extra
    if steps < 1:
        raise ValueError(f"steps is {steps}; a sampler needs at least 1")
    if points > T and spacing not in REAL:
        t = torch.linspace(0, T - 1, points, dtype=torch.float64)
    else:
        more = (shift,) if spacing == "flow" else ()
        t = SPACINGS[spacing](schedule, points, *more) + offset * (spacing == "leading")
    t = t.flip(0)[:steps]
    if t[0] > T - 1:
        raise ValueError(
            f"{spacing} spacing of {steps} steps with offset {offset} reaches t = {t[0]:.0f}, "
            f"beyond the last, {T - 1}; use fewer steps or --spacing trailing"
        )
    if not (t.diff() < 0).all():
        raise ValueError(
            f"{spacing} spacing has no {steps} different timesteps on this path; use fewer steps "
            "or --spacing trailing"
        )
    return t
