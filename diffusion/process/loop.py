"""Guidance, and the one loop that runs every sampler's table.

A row evaluates the denoiser once, reads nothing from the device and has no branch. In this form a
clipped x0 changes the noise that goes with it too (diffusers' use_clipped_model_output=True): x_t
is always alpha_t x0 + sigma_t eps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import UserError
from .samplers import D0, HISTORY, NOISE, Table, X, Y


def guided(network, guide=None, rescale: float = 0.0, batched: bool = True):
    """Guide a network: (x, t, *cond) -> out becomes (x, t, weight, *cond, *uncond).

    out = uncond + weight (cond - uncond), arXiv:2207.12598 eq. 6 with weight = 1 + w; then its
    standard deviation is moved towards cond's by `rescale` in [0, 1] (arXiv:2305.08891, eq. 14-16).
    guide: another network, worse, that gives uncond: autoguidance (arXiv:2406.02507).
    batched: one call of the network with both, or two calls in half the memory.
    """

    def predict(x: Tensor, t: Tensor, weight: Tensor, *both: Tensor) -> Tensor:
        half = len(both) // 2
        cond, uncond = both[:half], both[half:]
        if batched and guide is None:
            twice = (torch.cat(pair) for pair in ((x, x), (t, t), *zip(cond, uncond)))
            out_c, out_u = network(*twice).float().chunk(2)
        else:
            out_c = network(x, t, *cond).float()
            out_u = (guide or network)(x, t, *uncond).float()
        out = out_u + weight * (out_c - out_u)
        if rescale:
            std_c, std = (o.std((1, 2, 3), keepdim=True) for o in (out_c, out))
            out = out * (rescale * std_c / std + (1 - rescale))
        return out

    return predict


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


def matrices(table: Table) -> list[Tensor]:
    """List what makes a row's new tensors, (N, 7) each: A, B unless it is A, and what is kept.

    Nothing is kept where no row uses a history. What is kept is written as a row of A is.
    """
    made = [table.to_x] if torch.equal(table.to_x, table.to_y) else [table.to_x, table.to_y]
    if any(rows[:, D0 + 1 : NOISE].any() for rows in made):
        kept = torch.zeros_like(table.to_x)
        kept[:, [len(made) - 1, D0]] = table.keep  # y's column is X where A = B
        made.append(kept)
    return made


@dataclass(frozen=True)
class Update:
    """Run one row, with those columns only that the table uses.

    clip: x0 to [-1, 1]. columns: those of each of `matrices` that are not zero in some row.
    inputs: the columns of the tensors that a row is given.
    """

    denoise: Callable
    clip: bool
    columns: tuple[tuple[int, ...], ...]
    inputs: tuple[int, ...]

    @classmethod
    def of(cls, made: list[Tensor], two_states: bool, denoise: Callable, clip: bool) -> "Update":
        """Choose what the rows of a table's `matrices` need."""
        columns = [(rows != 0).any(0).nonzero().flatten().tolist() for rows in made]
        inputs = {int(two_states)}.union(*columns) - {D0}  # Y or X, which is evaluated
        return cls(denoise, clip, tuple(map(tuple, columns)), tuple(sorted(inputs)))

    def __call__(self, k: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Give what each of `matrices` makes, and x0.

        k: (M,) on the device: 5 of the denoiser, then the weights of the columns. tensors: those of
        the inputs, and the condition.
        """
        known = dict(zip(self.inputs, tensors))
        y = known[Y] if Y in known else known[X]
        x0 = self.denoise(y, k[:5], *tensors[len(self.inputs) :])
        if self.clip:
            x0 = x0.clamp(-1, 1) + 0 * x0  # infinity becomes NaN: a picture that is none must show
        known[D0] = x0
        weights = list(k[5:])
        made = []
        for columns in self.columns:
            terms = [weights.pop(0) * known[column] for column in columns]
            made.append(sum(terms[1:], terms[0]))
        return (*made, x0)


def differentiable_loop(
    denoise,
    x: Tensor,
    table: Table,
    *,
    cond: tuple[Tensor, ...] = (),
    guided: Callable | None = None,
    uncond: tuple[Tensor, ...] = (),
    noise: Callable[[], Tensor] | None = None,
    clip: bool = True,
    inpaint: Inpaint | None = None,
    capture: Callable | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run a table from x at its first level; yields (y', x0) after each row, with gradients.

    `sample_loop` is the same without them. Backward computes each row again, so that the memory
    holds one at a time (arXiv:1604.06174).

    denoise(x, k, *cond) -> x0, each (B, C, H, W), for a row k of its `coefficients(t, alpha,
        sigma)` (N, 4), which are computed once, in float64 (`objective.Denoiser`), and the weight.
    guided(x, k, *cond, *uncond) -> x0: runs the rows whose guidance weight is not 1.
    noise(): fresh (B, C, H, W) noise on x's device; needed by stochastic tables only.
    capture: makes of a step, a function of tensors, one that does the same (cuda_graph.py); called
        with the step and a name for what it does.
    Raises ValueError if the denoiser says nothing at the table's first level, or noise is missing.
    """
    known = denoise.coefficients(table.t, *table.levels[:-1].T)
    if not known.isfinite().all():
        raise UserError(
            "where alpha is 0, at the end of a zero-terminal-SNR schedule (rescale_betas_zero_snr, "
            "or betas near 1), objective eps or edm says nothing about x0: it needs v, x0 or flow, "
            "or --spacing leading, which leaves that level out"
        )
    two_states = not torch.equal(table.to_x, table.to_y)
    made = matrices(table)
    update = Update.of(made, two_states, denoise, clip)
    if NOISE in update.inputs and noise is None:
        raise ValueError("this table adds noise in its rows; pass noise=")
    # read on the CPU, before the loop
    with_noise = (table.to_x[:, NOISE] != 0).tolist()
    weighted = (table.weight != 1).tolist()
    waits = (table.to_x != table.to_y).any(1).tolist()  # x, at the level of the evaluation
    weights = (rows[:, columns] for rows, columns in zip(made, update.columns))
    k = torch.cat([known, table.weight[:, None], *weights], 1)
    k = k.to(x.device, torch.float32)
    levels = table.levels.to(x.device, torch.float32)
    zero = torch.zeros_like(x)
    runs = {False: (update, cond)}
    if any(weighted):
        if guided is None:
            raise ValueError("this table guides in its rows; pass guided=")
        runs[True] = (replace(update, denoise=guided), cond + uncond)
    if k.requires_grad:
        capture = lambda run, _: partial(checkpoint, run, use_reentrant=False)  # noqa: E731
    if capture is not None:
        runs = {
            key: (capture(run, (key, clip, update.columns)), c) for key, (run, c) in runs.items()
        }
    if inpaint is not None:
        x = inpaint.blend(x, *levels[0])
    y = x
    history = [zero] * HISTORY
    for i in range(len(table)):
        run, condition = runs[weighted[i]]
        state = (x, y, None, *history, noise() if with_noise[i] else zero)
        *new, x0 = run(k[i], *(state[column] for column in update.inputs), *condition)
        x, y = new[0], new[int(two_states)]
        history = [*new[1 + two_states :], *history][:HISTORY]
        if inpaint is not None:
            # the image itself stays in the end, also where the last row leaves some noise
            y = inpaint.blend(y, *(levels[i + 1] if i + 1 < len(table) else (1.0, 0.0)))
            x = inpaint.blend(x, *levels[i]) if waits[i] else y
        yield y, x0


sample_loop = torch.inference_mode()(differentiable_loop)


def sample(denoise, x: Tensor, table: Table, **options) -> Tensor:
    """Give the end of `sample_loop`: (B, C, H, W)."""
    states = sample_loop(denoise, x, table, **options)
    for x, _ in states:  # noqa: B007
        pass
    return x
