"""Samplers as tables: rows of one linear update with two states and a short history.

A row evaluates the denoiser once, at y, and makes new states of all that is known by then:

    d0 = x0(y, t)        x' = A . (x, y, d0, d1, d2, d3, noise)        y' = B . (the same)

d1 ... d3 are what the last rows kept, p y + q d0: the predicted x0, (p, q) = (0, 1), or eps,
(1 / sigma, -alpha / sigma). Where A = B there is one state, x = y. The next row evaluates at y',
and the last y' is the result. This is a general linear method (Butcher 2006): DDIM, DPM-Solver++,
Adams, DEIS, UniPC, Heun and consistency sampling are tables, which `loop.sample_loop` runs.

Tables are built in float64 on the CPU. lam = log(alpha / sigma), h = lam_s - lam_t of a step from
t to s, and r = sigma / alpha. A step whose h is infinite is of first order.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .names import ALIASES, SAMPLERS
from .schedule import REAL, NoisePath, timesteps

HISTORY = 3
X, Y, D0, NOISE = 0, 1, 2, 3 + HISTORY  # columns of A and B; d1 ... are behind d0
COLUMNS = 4 + HISTORY


@dataclass(frozen=True, eq=False)
class Table:
    """Hold a sampler's rows, all float64.

    to_x, to_y: (N, 7), A and B, the weights of x, y, d0, d1, d2, d3 and noise.
    keep: (N, 2), p and q.
    t: (N,), levels: (N+1, 2) alpha and sigma, where y is evaluated, and at the end.
    weight: (N,), of guidance; 1 means none. The rest is what it was made of, see `make_table`.
    spacing "learned": the table was, at this guidance, and `sampler` is its file.
    """

    t: Tensor
    levels: Tensor
    to_x: Tensor
    to_y: Tensor
    keep: Tensor
    weight: Tensor
    sampler: str
    steps: int
    spacing: str
    eta: float
    strength: float

    def __len__(self) -> int:
        return len(self.t)

    def guided(self, scale: float, interval: tuple[float, float] | None = None) -> "Table":
        """Guide the rows whose sigma / alpha lies in the interval (arXiv:2404.07724); None: all.

        Raises ValueError for an interval without a row, and for other guidance than the table was
        learned with.
        """
        if self.spacing == "learned" and (interval or scale != self.weight[0]):
            raise ValueError(
                f"{self.sampler} was learned at guidance_scale {self.weight[0]:g}, without an "
                f"interval; got {scale:g}: learn another table for that"
            )
        weight = torch.full_like(self.t, scale)
        if interval:
            alpha, sigma = self.levels[:-1].T
            inside = (alpha * interval[0] <= sigma) & (sigma <= alpha * interval[-1])
            if not inside.any():
                raise ValueError(
                    f"guidance_interval {interval[0]:g} to {interval[-1]:g} holds none of the "
                    f"{len(self)} steps, whose sigma / alpha goes from {sigma[0] / alpha[0]:.3g} "
                    f"to {sigma[-1] / alpha[-1]:.3g}"
                )
            weight = torch.where(inside, weight, 1.0)
        return replace(self, weight=weight)


@dataclass(frozen=True, eq=False)
class Rows:
    """Hold A, B, p and q while they are made. keep None: x0 is kept."""

    to_x: Tensor
    to_y: Tensor
    keep: Tensor | None = None


def one_state(k_x: Tensor, k_x0: Tensor, noise: Tensor | float) -> Rows:
    """Make rows with A = B of the weights of x, d0 and the noise, each (N,)."""
    rows = k_x.new_zeros(len(k_x), COLUMNS)
    rows[:, X] = k_x
    rows[:, D0] = k_x0
    rows[:, NOISE] = noise
    return Rows(rows, rows)


def half_log_snr(levels: Tensor) -> Tensor:
    """Give lam (N,) of levels (N, 2)."""
    return levels[:, 0].log() - levels[:, 1].log()


def eps_of(levels: Tensor) -> Tensor:
    """Give (p, q), (N, 2), with eps = p y + q x0 at levels (N, 2)."""
    alpha, sigma = levels.T
    return torch.stack([1 / sigma, -alpha / sigma], 1)


# --- one step without a history ------------------------------------------------------------------


def ancestral(levels: Tensor, eta: float = 1.0, large: bool = False) -> Rows:
    """Make the rows of DDIM (arXiv:2010.02502, eq. 12 and 16), of Euler on every path.

    eta = 1 is DDPM's posterior (DDPM eq. 7), and k-diffusion's ancestral Euler.
    large: keeps eta = 1's mean but adds noise of variance beta (DDPM section 3.2).
    """
    alpha_t, sigma_t = levels[:-1].T
    alpha_s, sigma_s = levels[1:].T
    shrunk = alpha_t / alpha_s * sigma_s  # the deviation of s, carried to t
    std = eta * sigma_s * (1 - (shrunk / sigma_t) ** 2).clamp(min=0).sqrt()
    k_x = (sigma_s**2 - std**2).clamp(min=0).sqrt() / sigma_t
    if large:
        std = (sigma_t**2 - shrunk**2).clamp(min=0).sqrt() * (sigma_s > 0)  # none in the last row
    return one_state(k_x, alpha_s - k_x * alpha_t, std)


def consistency(levels: Tensor, eta: float = 1.0) -> Rows:
    """Make the rows that noise each x0 to the next level (arXiv:2303.01469, algorithm 1)."""
    alpha_s, sigma_s = levels[1:].T
    return one_state(torch.zeros_like(alpha_s), alpha_s, sigma_s)


# --- steps with a history ------------------------------------------------------------------------


def past(lam: Tensor, i: int, order: int) -> Tensor:
    """List lam - lam_i at rows i, i-1, ..., which a step from row i uses: at most `order` of them.

    Only row i itself where h is infinite.
    """
    if not (lam[i + 1] - lam[i]).isfinite():
        return lam.new_zeros(1)
    nodes = lam[max(0, i - order + 1) : i + 1].flip(0) - lam[i]
    return nodes[nodes.isfinite()]


def multistep(
    levels: Tensor,
    eta: float,
    order: int,
    weigh: Callable[[Tensor, Tensor], Tensor],
    of_eps: bool = False,
    first: Callable[..., Rows] = ancestral,
    least: int = 2,
) -> Rows:
    """Make rows whose history is weighed by weigh(nodes, h), nodes being those of `past`.

    x_s / sigma_s = x_t / sigma_t + e^lam_s sum w_j x0_j (arXiv:2211.01095, proposition 4.1),
    or, with eps
    in the history, x_s / alpha_s = x_t / alpha_t - e^-lam_t sum w_j eps_j
    (arXiv:2206.00927, proposition 3.1).
    first: makes the rows of a history that is shorter than `least`, and x's and the noise's weight.
    """
    rows = first(levels, eta)
    keep = eps_of(levels[:-1]) if of_eps else None
    lam = half_log_snr(levels)
    for i, h in enumerate(lam.diff()):
        nodes = past(lam, i, order)
        n = len(nodes)
        if n < least:
            continue
        (alpha_t, sigma_t), alpha_s = levels[i], levels[i + 1, 0]
        row = rows.to_x[i]
        if of_eps:
            weights = -alpha_s * sigma_t / alpha_t * weigh(nodes, h)
            p, q = keep[i]
            row[X] = alpha_s / alpha_t + p * weights[0]
            row[D0] = q * weights[0]
            row[D0 + 1 : D0 + n] = weights[1:]
        else:
            row[D0 : D0 + n] = alpha_s * weigh(nodes, h)
    return replace(rows, keep=keep)


def dpmpp(levels: Tensor, eta: float = 0.0) -> Rows:
    """Make the rows of DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2), eta = 1: of its SDE form.

    By the midpoint rule.
    """
    sigma_t = levels[:-1, 1]
    alpha_s, sigma_s = levels[1:].T
    h = half_log_snr(levels).diff()
    gain = -alpha_s * torch.expm1(-(1 + eta) * h)
    second = torch.zeros_like(h)  # 1 / 2r with r = h_previous / h (eq. 17)
    second[1:] = 0.5 * h[1:] / h[:-1]
    second[torch.isinf(h)] = 0
    noise = sigma_s * (-torch.expm1(-2 * eta * h)).sqrt() if eta else 0.0
    k_x = sigma_s / sigma_t * (torch.exp(-eta * h) if eta else 1)
    rows = one_state(k_x, gain * (1 + second), noise)
    rows.to_x[:, D0 + 1] = -gain * second
    return rows


def dpmpp_3m(levels: Tensor, eta: float = 0.0) -> Rows:
    """Make the rows of DPM-Solver++(3M) as k-diffusion and diffusers publish them.

    phi_3 is without the factor 2 of the Taylor series. The second row is `dpmpp`'s.
    """

    def weigh(nodes: Tensor, h: Tensor) -> Tensor:
        r0, r1 = -nodes.diff() / h
        d = torch.eye(3, dtype=h.dtype)  # d[j]: the weights of x0_j
        d1_0 = (d[0] - d[1]) / r0
        d1_1 = (d[1] - d[2]) / r1
        d1 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1)
        d2 = (d1_0 - d1_1) / (r0 + r1)
        h = (1 + eta) * h
        phi_2 = torch.expm1(-h) / h + 1
        phi_3 = phi_2 / h - 0.5
        return -torch.expm1(-h) * d[0] + phi_2 * d1 - phi_3 * d2

    return multistep(levels, eta, 3, weigh, first=dpmpp, least=3)


def integrals(nodes: Tensor, h: Tensor, sign: int = 1) -> Tensor:
    """Weigh values at nodes: the integral of the polynomial through them, exactly.

    Of e^(u - h) times it over u in [0, h]; sign -1: of e^-u times it. Exponential Adams-Bashforth
    of any order, and, with -1 and eps, DEIS in log r (arXiv:2204.13902, eq. 14).
    """
    n = len(nodes)
    end = 1.0 if sign > 0 else math.exp(-h)  # of the exponential, at u = h
    moments = [-math.expm1(-h)]  # of u^k / k!, by parts
    for k in range(1, n):
        moments.append(sign * (end * float(h) ** k / math.factorial(k) - moments[-1]))
    powers = torch.stack([nodes**k / math.factorial(k) for k in range(n)])
    return torch.linalg.solve(powers, h.new_tensor(moments))


def bashforth(nodes: Tensor, h: Tensor) -> Tensor:
    """Weigh eps as Adams-Bashforth does, as if steps were even: iPNDM (arXiv:2204.13902, 3.3)."""
    weights = (3, -1), (23, -16, 5), (55, -59, 37, -9)
    chosen = h.new_tensor(weights[len(nodes) - 2])
    return -torch.expm1(-h) * chosen / chosen.sum()


# --- two states -----------------------------------------------------------------------------------


def unipc(levels: Tensor, eta: float = 0.0, order: int = 2) -> Rows:
    """Make the rows of UniPC with B(h) = e^h - 1 (arXiv:2302.04867, algorithms 1 and 2).

    y is the prediction at a level; its evaluation first corrects x there, then predicts the next y.
    """
    lam = half_log_snr(levels)
    h = lam.diff()

    def weigh(nodes: Tensor, h: Tensor) -> Tensor:
        if len(nodes) != 2:
            return integrals(nodes, h)
        gain = -torch.expm1(-h)  # with rho = 1/2, as the paper's code has it
        other = gain / 2 * h / nodes.sum()  # one node is 0
        return torch.where(nodes == 0, gain - other, other)

    def advance(row: Tensor, i: int, nodes: Tensor) -> Tensor:
        (_, sigma_t), (alpha_s, sigma_s) = levels[i : i + 2]
        row = sigma_s / sigma_t * row
        row[D0 : D0 + len(nodes)] += alpha_s * weigh(nodes, h[i])
        return row

    x, y = torch.eye(COLUMNS, dtype=levels.dtype)[[X, Y]]
    to_x, to_y = [], []
    for i in range(len(h)):
        corrected = y
        if i and h[i - 1].isfinite():
            corrected = advance(x, i - 1, torch.cat([h[i - 1 : i], past(lam, i - 1, order)]))
        to_x.append(corrected)
        to_y.append(advance(corrected, i, past(lam, i, order)))
    return Rows(torch.stack(to_x), torch.stack(to_y))


def two_stage(
    path: NoisePath,
    t: Tensor,
    levels: Tensor,
    twice: range,
    gamma: float = 0.0,
    halfway: bool = False,
) -> tuple[Tensor, Tensor, Rows]:
    """Make t, levels and rows of Heun's method in r (EDM, algorithms 1 and 2), two rows a step.

    An Euler step, evaluated at its end, then the mean of both slopes; halfway: evaluated halfway in
    log r, then that slope alone, DPM-Solver-2 as k-diffusion has it.
    t, levels: of the steps, (n,) and (n+1, 2). twice: the steps of two rows; the others are
    Euler's. gamma: noise raises r by this share of it before each step but the first.
    """
    start, begin = t, levels  # where the steps begin, with what gamma adds
    if gamma:
        start = path.nearest_t(half_log_snr(levels[:-1]) - math.log1p(gamma))
        begin = torch.cat([torch.stack(path.at(start), 1), levels[-1:]])
        start[0], begin[0] = t[0], levels[0]
    share = 1.0 if halfway else 0.5  # of the slope where the step is evaluated again
    x = torch.eye(COLUMNS, dtype=t.dtype)[X]
    rows = []
    for i in range(len(t)):
        level, end = begin[i], levels[i + 1]
        at, row = (start[i], level), euler(level, end)
        if i in twice:
            at = t[i + 1], end
            if halfway:
                middle = path.nearest_t(half_log_snr(torch.stack([level, end])).mean())
                at = middle, torch.stack(path.at(middle))
            rows.append((start[i], level, x, euler(level, at[1])))
            # x_s / alpha_s = x_t / alpha_t + (r_s - r_t) slope; the slope in r is eps
            step = end[1] / end[0] - level[1] / level[0]
            earlier, here = step * eps_of(torch.stack([level, at[1]]))
            row = x / level[0]
            row[[X, D0 + 1]] += (1 - share) * earlier
            row[[Y, D0]] = share * here
            row = end[0] * row
        alpha, sigma = begin[i + 1]
        scale = alpha / end[0]
        row = scale * row
        row[NOISE] = (sigma**2 - (scale * end[1]) ** 2).clamp(min=0).sqrt()
        rows.append((*at, row, row))
    t, evaluated, to_x, to_y = map(torch.stack, zip(*rows))
    return t, torch.cat([evaluated, levels[-1:]]), Rows(to_x, to_y)


def euler(level: Tensor, following: Tensor) -> Tensor:
    """Make the row (7,) of DDIM from one level to another, each (2,)."""
    return ancestral(torch.stack([level, following]), 0.0).to_x[0]


# --- tables by name -------------------------------------------------------------------------------

MAKERS: dict[str, Callable] = {  # (levels, eta) -> Rows; of two_stage: see there
    "ddpm": ancestral,
    "ddpm_large": partial(ancestral, large=True),
    "ddim": ancestral,
    "dpmpp_2m": dpmpp,
    "dpmpp_2m_sde": dpmpp,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_3m_sde": dpmpp_3m,
    "adams4": partial(multistep, order=4, weigh=integrals),
    "deis": partial(multistep, order=3, weigh=partial(integrals, sign=-1), of_eps=True),
    "unipc2": unipc,
    "unipc3": partial(unipc, order=3),
    "ipndm": partial(multistep, order=4, weigh=bashforth, of_eps=True),
    "heun": two_stage,
    "dpm2": partial(two_stage, halfway=True),
    "lcm": consistency,
}
TWO_STAGE = ("heun", "dpm2")


def make_table(
    schedule: NoisePath,
    sampler: str,
    steps: int,
    *,
    spacing: str | None = None,
    eta: float | None = None,
    churn: float = 0.0,
    shift: float = 1.0,
    offset: int = 0,
    final: str = "zero",
    strength: float = 1.0,
) -> Table:
    """Make the table of a sampler for exactly `steps` network evaluations.

    Of a two-stage sampler's steps one each takes that ends at sigma = 0, that starts where alpha is
    0, and, where the number then needs it, the one before the last; all others take two.

    spacing, eta: None means the sampler's own. offset, shift: see `timesteps`.
    churn: of two-stage samplers, EDM's S_churn.
    final: where the last row ends, "zero" (sigma = 0) or "alpha_bar_0" (the schedule's first
        level, diffusers' set_alpha_to_one=False).
    strength: for image to image, the fraction of the steps that is run, from the noisier end cut;
        a table of int(steps * strength) rows, whose start is `levels[0]`.
    Raises ValueError for unknown names, strength outside (0, 1], and what a sampler cannot use.
    """
    sampler = ALIASES.get(sampler, sampler)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    kind = SAMPLERS[sampler]
    spacing = kind.spacing if spacing is None else spacing
    eta = kind.eta if eta is None else eta
    low, high = kind.etas
    if not low <= eta <= high:
        raise ValueError(f"eta is {eta}; {sampler} takes {low} to {high} (0: deterministic)")
    staged = sampler in TWO_STAGE
    if churn and not staged:
        raise ValueError(f"churn is {churn}; {sampler} takes none, but {' and '.join(TWO_STAGE)}")
    extra = kind.extra if spacing in ("leading", "linspace") else 0
    if spacing in REAL and final == "alpha_bar_0":
        extra = 1  # the last point, t = 0, is where the last row ends
    for noise_only in (0, 1):  # steps that start where alpha is 0
        points = steps - max(0, steps - 1 - noise_only) // 2 if staged else steps
        t = timesteps(schedule, points, spacing, offset, extra, shift)
        if not staged or schedule.at(t)[0][0] > 0:
            break
    first = points - int(points * strength + 1e-9)  # what image to image begins with
    if not 0 <= first < points:
        raise ValueError(
            f"strength {strength} of {points} steps leaves nothing to do; use at least "
            f"{1 / points:.2g} and at most 1"
        )
    end = (1.0, 0.0) if final == "zero" else (schedule.alpha[0], schedule.sigma[0])
    levels = torch.cat([torch.stack(schedule.at(t), 1), t.new_tensor([end])])[first:]
    t = t[first:]
    if staged:
        twice = range(noise_only - first, noise_only + steps - points - first)
        gamma = min(churn / points, math.sqrt(2) - 1)  # EDM, algorithm 2
        t, levels, rows = MAKERS[sampler](schedule, t, levels, twice, gamma)
    else:
        if spacing == "karras" and kind.extra:
            t = t.round()  # of what DPM-Solver in diffusers tells the network; levels are exact
        rows = MAKERS[sampler](levels, eta)
    keep = rows.keep
    if keep is None:
        keep = t.new_tensor([0.0, 1.0]).expand(len(t), 2)
    coefficients = (t, levels, rows.to_x, rows.to_y, keep, torch.ones_like(t))
    return Table(*coefficients, sampler, steps, spacing, float(eta), float(strength))
