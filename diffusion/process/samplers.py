"""Samplers as tables of coefficients, guidance, and the one loop that runs them.

One row takes x from noise level (alpha_t, sigma_t) to the next, (alpha_s, sigma_s):

    x_s = k_x x_t  +  k_x0 x0  +  k_prev x0_prev  +  k_eps noise

x0 is what the denoiser predicts at x_t (clipped if asked), x0_prev what it predicted a row
earlier. Tables are built in float64 on the CPU and cast once. A row evaluates the denoiser once,
reads nothing from the device and has no branch.

In this form a clipped x0 changes the noise that goes with it too (diffusers'
use_clipped_model_output=True): x_t is always alpha_t x0 + sigma_t eps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import UserError
from .schedule import REAL, NoisePath, timesteps


@dataclass(frozen=True, eq=False)
class Table:
    """Hold a sampler's rows (N, 4) k_x k_x0 k_prev k_eps; t (N,); levels (N+1, 2) alpha sigma.

    All float64. The rest is what it was made of, see `make_table`. steps: with a strength below
    1, those of which the last N are run.
    """

    t: Tensor
    rows: Tensor
    levels: Tensor
    sampler: str
    steps: int
    spacing: str
    eta: float
    strength: float

    def __len__(self) -> int:
        return len(self.t)


def ancestral(levels: Tensor, eta: float = 1.0, variance: str = "posterior") -> Tensor:
    """Make the rows of DDIM (arXiv:2010.02502, eq. 12 and 16).

    eta = 1 is DDPM's posterior (DDPM eq. 7).
    variance "beta" keeps eta = 1's mean but adds noise of variance beta (DDPM section 3.2).
    """
    (alpha_t, sigma_t) = levels[:-1].T
    (alpha_s, sigma_s) = levels[1:].T
    shrunk = alpha_t / alpha_s * sigma_s  # the deviation of s, carried to t
    std = eta * sigma_s * (1 - (shrunk / sigma_t) ** 2).clamp(min=0).sqrt()
    k_x = (sigma_s**2 - std**2).clamp(min=0).sqrt() / sigma_t
    if variance == "beta":
        std = (sigma_t**2 - shrunk**2).clamp(min=0).sqrt() * (sigma_s > 0)  # none in the last row
    return torch.stack([k_x, alpha_s - k_x * alpha_t, torch.zeros_like(std), std], 1)


def dpmpp_2m(levels: Tensor, eta: float = 0.0) -> Tensor:
    """Make the rows of DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2).

    eta = 1 is its SDE form; midpoint rule. The first row, and the last where it ends at sigma = 0,
    are of first order.
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
    return torch.stack([k_x, gain * (1 + second), -gain * second, noise], 1)


@dataclass(frozen=True)
class Sampler:
    """Describe a sampler: how levels become rows, and what it does by default."""

    rows: Callable[..., Tensor]
    eta: float
    etas: tuple[float, float]  # what eta may be set to
    title: str  # the name that other programs write into their pictures
    spacing: str = "trailing"
    extra: int = 0  # see `timesteps`


SAMPLERS = {
    "ddpm": Sampler(ancestral, 1.0, (1, 1), "DDPM"),
    "ddpm_large": Sampler(partial(ancestral, variance="beta"), 1.0, (1, 1), "DDPM large"),
    "ddim": Sampler(ancestral, 0.0, (0, 1), "DDIM"),
    "dpmpp_2m": Sampler(dpmpp_2m, 0.0, (0, 0), "DPM++ 2M", extra=1),
    "dpmpp_2m_sde": Sampler(dpmpp_2m, 1.0, (0, 1), "DPM++ 2M SDE", extra=1),
}


def make_table(
    schedule: NoisePath,
    sampler: str,
    steps: int,
    *,
    spacing: str | None = None,
    eta: float | None = None,
    offset: int = 0,
    final: str = "zero",
    strength: float = 1.0,
) -> Table:
    """Make the table of a sampler for exactly `steps` network evaluations.

    spacing, eta: None means the sampler's own. offset: see `timesteps`.
    final: where the last row ends, "zero" (sigma = 0) or "alpha_bar_0" (the schedule's first
        level, diffusers' set_alpha_to_one=False).
    strength: for image to image, the fraction of the steps that is run, from the noisier end cut;
        a table of int(steps * strength) rows, whose start is `levels[0]`.
    Raises ValueError for unknown names, more steps than the schedule has, strength outside (0, 1].
    """
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
    extra = kind.extra if spacing in ("leading", "linspace") else 0
    if spacing in REAL and final == "alpha_bar_0":
        extra = 1  # the last point, t = 0, is where the last row ends
    t = timesteps(schedule, steps, spacing, offset, extra)
    end = (1.0, 0.0) if final == "zero" else (float(schedule.alpha[0]), float(schedule.sigma[0]))
    levels = torch.cat([torch.stack(schedule.at(t), 1), t.new_tensor([end])])
    first = start_row(steps, strength)
    t = t[first:]
    if spacing == "karras" and kind.extra:
        t = t.round()  # of what DPM-Solver in diffusers tells the network; the levels are exact
    levels = levels[first:]
    rows = kind.rows(levels, eta=eta)
    return Table(t, rows, levels, sampler, steps, spacing, float(eta), float(strength))


def start_row(steps: int, strength: float) -> int:
    """Choose the first row that image to image runs. Raises ValueError if no row would be left."""
    rows = int(steps * strength + 1e-9)
    if not 0 < strength <= 1 or rows < 1:
        raise ValueError(
            f"strength {strength} of {steps} steps leaves nothing to do; use at least "
            f"{1 / steps:.2g} and at most 1"
        )
    return steps - rows


# --- guidance ------------------------------------------------------------------------------------


def guided(network, scale: float, rescale: float = 0.0, batched: bool = True):
    """Guide a network without a classifier: (x, t, *cond) -> out becomes (x, t, *cond, *uncond).

    Scale 1 means none, and takes no uncond.

    out = uncond + scale (cond - uncond), arXiv:2207.12598 eq. 6 with scale = 1 + w; then its
    standard deviation is moved towards cond's by `rescale` in [0, 1] (arXiv:2305.08891, eq. 14-16).
    batched: one call of the network with both, or two calls in half the memory.
    """
    if scale == 1:
        return network

    def predict(x: Tensor, t: Tensor, *both: Tensor) -> Tensor:
        cond = both[: len(both) // 2]
        uncond = both[len(both) // 2 :]
        if batched:
            twice = (torch.cat(pair) for pair in ((x, x), (t, t), *zip(cond, uncond)))
            out_c, out_u = network(*twice).float().chunk(2)
        else:
            out_c, out_u = (network(x, t, *one).float() for one in (cond, uncond))
        out = out_u + scale * (out_c - out_u)
        if rescale:
            std_c, std = (o.std((1, 2, 3), keepdim=True) for o in (out_c, out))
            out = out * (rescale * std_c / std + (1 - rescale))
        return out

    return predict


# --- the loop ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Inpaint:
    """Keep `image` where mask is 0: after each row it is laid over x, noised to x's level.

    image, noise: (B, C, H, W); mask: broadcastable to it, 1 where new content goes.
    """

    image: Tensor
    mask: Tensor
    noise: Tensor

    def blend(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        known = alpha * self.image + sigma * self.noise
        return self.mask * x + (1 - self.mask) * known


def step(
    denoise, clip: bool, x: Tensor, x0_prev: Tensor, noise: Tensor, k: Tensor, *cond
) -> tuple[Tensor, Tensor]:
    """Run one row. k: (M + 4,) on the device, the denoiser's coefficients and the row's."""
    x0 = denoise(x, k[:-4], *cond)
    if clip:
        x0 = x0.clamp(-1, 1) + 0 * x0  # infinity becomes NaN: a picture that is none must show
    k_x, k_x0, k_prev, k_eps = k[-4:]
    return k_x * x + k_x0 * x0 + k_prev * x0_prev + k_eps * noise, x0


@torch.inference_mode()
def sample_loop(
    denoise,
    x: Tensor,
    table: Table,
    *,
    cond: tuple[Tensor, ...] = (),
    noise: Callable[[], Tensor] | None = None,
    clip: bool = True,
    inpaint: Inpaint | None = None,
    capture: Callable | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run a table from x at its first level; yields (x_s, x0) after each row.

    denoise(x, k, *cond) -> x0, each (B, C, H, W), for a row k of its `coefficients(t, alpha,
        sigma)` (N, M), which are computed once, in float64 (`objective.Denoiser`).
    noise(): fresh (B, C, H, W) noise on x's device; needed by stochastic tables only.
    capture: makes of the step, a function of tensors, one that does the same (cuda_graph.py).
    Raises ValueError if the denoiser says nothing at the table's first level, or noise is missing.
    """
    known = denoise.coefficients(table.t, *table.levels[:-1].T)
    if not known.isfinite().all():
        raise UserError(
            "a zero-terminal-SNR schedule (rescale_betas_zero_snr, or betas near 1) needs "
            "objective v or x0: eps says nothing about x0 where alpha is 0, which --spacing "
            "leading leaves out"
        )
    random = (table.rows[:, 3] != 0).tolist()  # read on the CPU, before the loop
    if any(random) and noise is None:
        raise ValueError("this table adds noise in its rows; pass noise=")
    k = torch.cat([known, table.rows], 1).to(x.device, torch.float32)
    levels = table.levels.to(x.device, torch.float32)
    x0 = torch.zeros_like(x)
    zero = torch.zeros_like(x)
    run = partial(step, denoise, clip)
    run = run if capture is None else capture(run)
    if inpaint is not None:
        x = inpaint.blend(x, *levels[0])
    for i in range(len(table)):
        eps = noise() if random[i] else zero
        x, x0 = run(x, x0, eps, k[i], *cond)
        if inpaint is not None:
            # the image itself stays in the end, also where the last row leaves some noise
            x = inpaint.blend(x, *(levels[i + 1] if i + 1 < len(table) else (1.0, 0.0)))
        yield x, x0


def sample(denoise, x: Tensor, table: Table, **options) -> Tensor:
    """Give the end of `sample_loop`: (B, C, H, W)."""
    states = sample_loop(denoise, x, table, **options)
    for x, _ in states:  # noqa: B007
        pass
    return x
