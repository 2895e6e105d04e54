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

    to_x, to_y: (N, 7), A and B. keep: (N, 2), p and q.
    t: (N,), levels: (N+1, 2) alpha and sigma, where y is evaluated, and at the end.
    weight: (N,), of guidance; 1 means none. The rest is what it was made of, see `make_table`.
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
        """Guide the rows whose sigma / alpha lies in the interval (arXiv:2404.07724); None: all."""
        weight = torch.full_like(self.t, scale)
        if interval is not None:
            alpha, sigma = self.levels[:-1].T
            inside = (alpha * interval[0] <= sigma) & (sigma <= alpha * interval[1])
            weight = torch.where(inside, weight, 1.0)
        return replace(self, weight=weight)


@dataclass(frozen=True, eq=False)
class Rows:
    """Hold A, B, p and q while they are made. keep None: x0 is kept."""

    to_x: Tensor
    to_y: Tensor
    keep: Tensor | None = None


def one_state(k_x: Tensor, history: list[Tensor], noise: Tensor | None = None) -> Rows:
    """Make rows with A = B of the weights of x, of d0, d1, ... and of the noise, each (N,)."""
    rows = k_x.new_zeros(len(k_x), COLUMNS)
    rows[:, X] = k_x
    for j, weights in enumerate(history):
        rows[:, D0 + j] = weights
    if noise is not None:
        rows[:, NOISE] = noise
    return Rows(rows, rows)


# --- one evaluation a step, x0 in the history ---------------------------------------------------


def ancestral(levels: Tensor, eta: float = 1.0, variance: str = "posterior") -> Rows:
    """Make the rows of DDIM (arXiv:2010.02502, eq. 12 and 16), of Euler on every path.

    eta = 1 is DDPM's posterior (DDPM eq. 7), and k-diffusion's ancestral Euler.
    variance "beta" keeps eta = 1's mean but adds noise of variance beta (DDPM section 3.2).
    """
    (alpha_t, sigma_t) = levels[:-1].T
    (alpha_s, sigma_s) = levels[1:].T
    shrunk = alpha_t / alpha_s * sigma_s  # the deviation of s, carried to t
    std = eta * sigma_s * (1 - (shrunk / sigma_t) ** 2).clamp(min=0).sqrt()
    k_x = (sigma_s**2 - std**2).clamp(min=0).sqrt() / sigma_t
    if variance == "beta":
        std = (sigma_t**2 - shrunk**2).clamp(min=0).sqrt() * (sigma_s > 0)  # none in the last row
    return one_state(k_x, [alpha_s - k_x * alpha_t], std)


def dpmpp(levels: Tensor, eta: float = 0.0, order: int = 2) -> Rows:
    """Make the rows of DPM-Solver++ (arXiv:2211.01095, algorithm 2), eta = 1: of its SDE form.

    Order 2 takes the midpoint rule; order 3, from the third row, phi_2 and phi_3 as k-diffusion and
    diffusers publish them (phi_3 without the factor 2 of the Taylor series).
    """
    sigma_t = levels[:-1, 1]
    (alpha_s, sigma_s) = levels[1:].T
    lam = levels[:, 0].log() - levels[:, 1].log()
    h = lam[1:] - lam[:-1]
    gain = -alpha_s * torch.expm1(-(1 + eta) * h)
    second = torch.zeros_like(h)  # 1 / 2r with r = h_previous / h (eq. 17)
    second[1:] = 0.5 * h[1:] / h[:-1]
    second[torch.isinf(h)] = 0
    noise = sigma_s * (-torch.expm1(-2 * eta * h)).sqrt() if eta else torch.zeros_like(h)
    k_x = sigma_s / sigma_t * (torch.exp(-eta * h) if eta else 1)
    rows = one_state(k_x, [gain * (1 + second), -gain * second], noise)
    if order == 3:
        for i in range(2, len(h)):
            if h[i - 2 : i + 1].isfinite().all():
                weights = third_order(h[i], h[i - 1] / h[i], h[i - 2] / h[i], eta)
                rows.to_x[i, D0 : D0 + 3] = alpha_s[i] * weights
    return rows


def third_order(h: Tensor, r0: Tensor, r1: Tensor, eta: float) -> Tensor:
    """Weigh d0, d1 and d2 in DPM-Solver++(3M), for alpha_s = 1: (3,). r0, r1: past steps / h."""
    d = torch.eye(3, dtype=h.dtype)
    d1_0 = (d[0] - d[1]) / r0
    d1_1 = (d[1] - d[2]) / r1
    d1 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1)
    d2 = (d1_0 - d1_1) / (r0 + r1)
    h = (1 + eta) * h
    phi_2 = torch.expm1(-h) / h + 1
    phi_3 = phi_2 / h - 0.5
    return -torch.expm1(-h) * d[0] + phi_2 * d1 - phi_3 * d2


def consistency(levels: Tensor, eta: float = 1.0) -> Rows:
    """Make the rows that noise every x0 anew to the next level (arXiv:2303.01469, algorithm 1)."""
    alpha_s, sigma_s = levels[1:].T
    return one_state(torch.zeros_like(alpha_s), [alpha_s], sigma_s)


def moments(h: Tensor, count: int, sign: int) -> Tensor:
    """Integrate e^(sign u) u^k / k! over u in [0, h] for k < count, times e^-h where sign is 1.

    J_0 = 1 - e^-h and, by parts, J_k = sign (e^(...) h^k / k! - J_(k-1)).
    """
    end = 1.0 if sign > 0 else math.exp(-h)  # of the exponential, at u = h
    found = [-math.expm1(-h)]
    for k in range(1, count):
        found.append(sign * (end * float(h) ** k / math.factorial(k) - found[-1]))
    return h.new_tensor(found)


def interpolated(nodes: Tensor, h: Tensor, sign: int) -> Tensor:
    """Integrate the polynomial through values at these lam, from 0 to h: the weights of the values.

    The integrand is e^(sign u) times the polynomial, see `moments`.
    """
    count = len(nodes)
    powers = [nodes**k / math.factorial(k) for k in range(count)]
    return torch.linalg.solve(torch.stack(powers), moments(h, count, sign))


def past(lam: Tensor, i: int, order: int) -> Tensor:
    """List lam - lam_i at rows i, i-1, ..., at most `order` of them, all of finite lam."""
    nodes = lam[max(0, i - order + 1) : i + 1].flip(0)
    return nodes[nodes.isfinite()] - lam[i]


def adams(levels: Tensor, eta: float = 0.0, order: int = 4, history: str = "x0") -> Rows:
    """Make the rows of exponential Adams-Bashforth: exact integrals of the interpolated history.

    x_s / sigma_s = x_t / sigma_t + integral of e^lam x0 d lam (arXiv:2206.00927, eq. 3.4), or, with
    eps in the history, x_s / alpha_s = x_t / alpha_t - integral of e^-lam eps d lam: DEIS
    (arXiv:2204.13902, eq. 14, in log r).
    """
    rows = ancestral(levels, 0.0)
    lam = levels[:, 0].log() - levels[:, 1].log()
    if history == "eps":
        rows = replace(rows, keep=eps_of(levels[:-1]))
    for i, h in enumerate(lam.diff()):
        nodes = past(lam, i, order)
        if len(nodes) < 2 or not h.isfinite():
            continue
        (alpha_t, sigma_t), alpha_s = levels[i], levels[i + 1, 0]
        if history == "x0":
            rows.to_x[i, D0 : D0 + len(nodes)] = alpha_s * interpolated(nodes, h, 1)
        else:
            weights = -alpha_s * sigma_t / alpha_t * interpolated(nodes, h, -1)
            rows.to_x[i] = eps_row(alpha_s / alpha_t, weights, levels[i])
    return rows


def eps_of(levels: Tensor) -> Tensor:
    """Give (p, q), (N, 2), with eps = p y + q x0."""
    alpha, sigma = levels.T
    return torch.stack([1 / sigma, -alpha / sigma], 1)


def eps_row(k_x: Tensor, weights: Tensor, level: Tensor) -> Tensor:
    """Make a row of A of the weights of eps now, and of those in the history."""
    p, q = eps_of(level[None])[0]
    row = level.new_zeros(COLUMNS)
    row[X] = k_x + weights[0] * p
    row[D0] = weights[0] * q
    row[D0 + 1 : D0 + len(weights)] = weights[1:]
    return row


ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ipndm(levels: Tensor, eta: float = 0.0) -> Rows:
    """Make the rows of iPNDM: Adams-Bashforth's weights of eps, as if steps were even.

    arXiv:2204.13902, section 3.3, after arXiv:2202.09778: DDIM with 4 past eps for one.
    """
    rows = replace(ancestral(levels, 0.0), keep=eps_of(levels[:-1]))
    for i in range(1, len(levels) - 1):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels[i], levels[i + 1]
        order = len(past(levels[:-1, 0].log(), i, 4))
        if order > 1:
            k_x = alpha_s / alpha_t
            weights = (sigma_s - k_x * sigma_t) * levels.new_tensor(ADAMS_BASHFORTH[order - 1])
            rows.to_x[i] = eps_row(k_x, weights, levels[i])
    return rows


# --- two states -----------------------------------------------------------------------------------


def unipc(levels: Tensor, eta: float = 0.0, order: int = 2) -> Rows:
    """Make the rows of UniPC with B(h) = e^h - 1 (arXiv:2302.04867, algorithms 1 and 2).

    y is the prediction at a level; its evaluation first corrects x there, then predicts the next y.
    """
    N = len(levels) - 1
    lam = levels[:, 0].log() - levels[:, 1].log()
    to_x = levels.new_zeros(N, COLUMNS)
    to_y = levels.new_zeros(N, COLUMNS)
    to_x[:, X] = 1  # the first row has nothing to correct
    for i in range(N):
        nodes = past(lam, i, order)
        if i and lam[i - 1].isfinite():
            used = past(lam, i - 1, order)
            weights = unified(used, lam[i] - lam[i - 1], corrects=True)
            to_x[i, X] = levels[i, 1] / levels[i - 1, 1]
            to_x[i, D0 : D0 + len(weights)] = levels[i, 0] * weights
        elif i:
            to_x[i] = 0
            to_x[i, Y] = 1
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels[i], levels[i + 1]
        k_x = sigma_s / sigma_t
        to_y[i] = k_x * to_x[i]
        h = lam[i + 1] - lam[i]
        if h.isfinite():
            weights = alpha_s * unified(nodes, h, corrects=False)
            to_y[i, D0 : D0 + len(weights)] += weights
        else:
            to_y[i, D0] += alpha_s - k_x * alpha_t
    return Rows(to_x, to_y)


def unified(nodes: Tensor, h: Tensor, corrects: bool) -> Tensor:
    """Weigh x0 at nodes (lam - lam_t) for a step h, alpha_s = 1; a corrector's x0 at s comes first.

    With rho = 1/2, as the paper's code has it, in order 2's predictor and order 1's corrector.
    """
    order = len(nodes)
    values = torch.eye(order + corrects, dtype=h.dtype)
    ratios = nodes[1:] / h
    m0 = values[int(corrects)]
    differences = [(values[j + 1 + corrects] - m0) / ratio for j, ratio in enumerate(ratios)]
    if corrects:
        ratios = torch.cat([ratios, h.new_ones(1)])
        differences.append(values[0] - m0)
    unknown = len(ratios)
    gain = -torch.expm1(-h)  # - B(h) and - h phi_1 at once
    weights = gain * m0
    if not unknown:
        return weights
    if unknown == 1:
        rho = h.new_tensor([0.5])
    else:
        phi = torch.expm1(-h) / -h - 1
        sums = []
        for k in range(1, unknown + 1):
            sums.append(phi * math.factorial(k) / -gain)
            phi = phi / -h - 1 / math.factorial(k + 1)
        powers = torch.stack([ratios**k for k in range(unknown)])
        rho = torch.linalg.solve(powers, torch.stack(sums))
    return weights + gain * (rho[:, None] * torch.stack(differences)).sum(0)


def two_stage(
    path: NoisePath,
    t: Tensor,
    levels: Tensor,
    evaluations: int,
    first: int = 0,
    halfway: bool = False,
    churn: float = 0.0,
) -> tuple[Tensor, Tensor, Rows]:
    """Make t, levels and rows of Heun's method in r (EDM, algorithms 1 and 2), two rows a step.

    An Euler step, evaluated at its end, then the mean of both slopes; halfway: evaluated halfway in
    log r, then that slope alone, DPM-Solver-2 as k-diffusion has it. The last step has one
    evaluation, and so has the one before it where their number is even.
    t, levels: of the steps, (n,) and (n+1, 2). first: the step that is the first one run.
    churn: S_churn, noise that raises the level before each step but the first.
    """
    n = len(t)
    gamma = min(churn / n, math.sqrt(2) - 1)
    times, evaluated, to_x, to_y = [], [], [], []
    start, (alpha_t, sigma_t) = t[first], levels[first]
    for i in range(first, n):
        alpha_s, sigma_s = levels[i + 1]
        k_x = sigma_s / sigma_t
        euler = unit(k_x, alpha_s - k_x * alpha_t)
        times.append(start)
        evaluated.append(torch.stack([alpha_t, sigma_t]))
        to_x.append(euler)
        to_y.append(euler)
        if i < (evaluations - 1) // 2:
            t_m, alpha_m, sigma_m = t[i + 1], alpha_s, sigma_s
            if halfway and alpha_t > 0:
                lam = (alpha_t / sigma_t * alpha_s / sigma_s).log() / 2
                t_m = path.nearest_t(lam)
                alpha_m, sigma_m = path.at(t_m)
                k_x = sigma_m / sigma_t
                to_y[-1] = unit(k_x, alpha_m - k_x * alpha_t)
            times.append(t_m)
            evaluated.append(torch.stack([alpha_m, sigma_m]))
            row = unit(1.0)  # after a step of infinite h: what it made
            if alpha_t > 0:
                to_x[-1] = row  # x waits at t
                share = 1.0 if halfway else 0.5
                slope = share * (sigma_s / alpha_s - sigma_t / alpha_t)  # of (y - alpha x0) / sigma
                row = unit(1 / alpha_t, -slope * alpha_m / sigma_m)
                row[Y] = slope / sigma_m
                if not halfway:
                    row[X] += slope / sigma_t
                    row[D0 + 1] = -slope * alpha_t / sigma_t
                row = alpha_s * row
            to_x.append(row)
            to_y.append(row)
        start, alpha_t, sigma_t = t[min(i + 1, n - 1)], alpha_s, sigma_s
        if gamma and i + 1 < n:  # to r (1 + gamma), which the next step starts from
            start = path.nearest_t((alpha_s / sigma_s / (1 + gamma)).log())
            alpha_t, sigma_t = path.at(start)
            added = ((sigma_t / alpha_t) ** 2 - (sigma_s / alpha_s) ** 2).clamp(min=0).sqrt()
            to_x[-1] = to_y[-1] = alpha_t / alpha_s * to_y[-1]
            to_x[-1][NOISE] = alpha_t * added
    levels = torch.stack([*evaluated, levels[-1]])
    return torch.stack(times), levels, Rows(torch.stack(to_x), torch.stack(to_y))


def unit(k_x: Tensor | float, k_x0: Tensor | float = 0.0) -> Tensor:
    """Make a row (7,) of the weights of x and d0."""
    row = torch.zeros(COLUMNS, dtype=torch.float64)
    row[X] = k_x
    row[D0] = k_x0
    return row


# --- tables by name -------------------------------------------------------------------------------

MAKERS: dict[str, Callable] = {  # (levels, eta) -> Rows; of two_stage: see there
    "ddpm": ancestral,
    "ddpm_large": partial(ancestral, variance="beta"),
    "ddim": ancestral,
    "dpmpp_2m": dpmpp,
    "dpmpp_2m_sde": dpmpp,
    "dpmpp_3m": partial(dpmpp, order=3),
    "dpmpp_3m_sde": partial(dpmpp, order=3),
    "adams4": adams,
    "deis": partial(adams, order=3, history="eps"),
    "unipc2": unipc,
    "unipc3": partial(unipc, order=3),
    "ipndm": ipndm,
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

    spacing, eta: None means the sampler's own. offset, shift: see `timesteps`.
    churn: of two-stage samplers, see `two_stage`.
    final: where the last row ends, "zero" (sigma = 0) or "alpha_bar_0" (the schedule's first
        level, diffusers' set_alpha_to_one=False).
    strength: for image to image, the fraction of the steps that is run, from the noisier end cut;
        a table of int(steps * strength) rows, whose start is `levels[0]`.
    Raises ValueError for unknown names, strength outside (0, 1], and what a sampler cannot use.
    """
    sampler = ALIASES.get(sampler, sampler)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if final not in ("zero", "alpha_bar_0"):
        raise ValueError(f"final {final!r} is unknown; choose zero or alpha_bar_0")
    kind = SAMPLERS[sampler]
    spacing = kind.spacing if spacing is None else spacing
    eta = kind.eta if eta is None else eta
    low, high = kind.etas
    if not low <= eta <= high:
        known = f"{low} to {high} (0: deterministic)" if low < high else f"only {low}"
        raise ValueError(f"eta is {eta}; {sampler} takes {known}")
    staged = sampler in TWO_STAGE
    if churn and not staged:
        raise ValueError(f"churn is {churn}; {sampler} takes none, but {' and '.join(TWO_STAGE)}")
    extra = kind.extra if spacing in ("leading", "linspace") else 0
    if spacing in REAL and final == "alpha_bar_0":
        extra = 1  # the last point, t = 0, is where the last row ends
    points = steps // 2 + 1 if staged else steps
    t = timesteps(schedule, points, spacing, offset, extra, shift)
    end = (1.0, 0.0) if final == "zero" else (float(schedule.alpha[0]), float(schedule.sigma[0]))
    levels = torch.cat([torch.stack(schedule.at(t), 1), t.new_tensor([end])])
    first = start_row(points, strength)
    if staged:
        t, levels, rows = MAKERS[sampler](schedule, t, levels, steps, first, churn=churn)
    else:
        t = t[first:]
        if spacing == "karras" and kind.extra:
            t = t.round()  # of what DPM-Solver in diffusers tells the network; levels are exact
        levels = levels[first:]
        rows = MAKERS[sampler](levels, eta=eta)
    keep = rows.keep
    if keep is None:
        keep = t.new_tensor([0.0, 1.0]).expand(len(t), 2)
    coefficients = (t, levels, rows.to_x, rows.to_y, keep, torch.ones_like(t))
    return Table(*coefficients, sampler, steps, spacing, float(eta), float(strength))


def start_row(steps: int, strength: float) -> int:
    """Choose the first row that image to image runs. Raises ValueError if no row would be left."""
    rows = int(steps * strength + 1e-9)
    if not 0 < strength <= 1 or rows < 1:
        raise ValueError(
            f"strength {strength} of {steps} steps leaves nothing to do; use at least "
            f"{1 / steps:.2g} and at most 1"
        )
    return steps - rows
