"""GroupNorm with what follows it, FiLM, SiLU and a sum, as CUDA kernels that keep channels_last.

    xhat = (x - mean) / std over a group of channels and all positions     (arXiv:1803.08494)
    z = xhat a + d,   a = weight (1 + scale),   d = bias (1 + scale) + shift
    y = silu(z) + residual

Backward, with dz = dy silu'(z), S1 = sum_n dz, S2 = sum_n dz xhat of each image and channel, and
M1, M2 = the means of a S1 and a S2 over a group (per element):

    dx = (a dz - M1 - xhat M2) / std
    dshift = S1, dscale = weight S2 + bias S1, dweight = sum_b (1 + scale) S2, dbias likewise of S1

torch's GroupNorm on CUDA wants channels first, and autocast makes it float32: around each norm the
tensor is cast, transposed, cast and transposed back. Here a program goes through a group of an
image twice, the second time mostly in the cache or, of a small group, in registers; forward and
backward are one launch each. Sums and arithmetic are float32, about a pivot: the group's first
value, so that a mean far from 0 costs no digits.
Shapes: B images, C channels, N = H W positions, G groups of C / G channels. x lies as (B, N, C).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

TILE = 8192  # elements that a program holds at a time


@triton.jit
def _scale_shift(weight, bias, film, C, column, inside):
    """Give a, d and 1 + scale of an image's channels."""
    a = tl.load(weight + column, inside, 0.0).to(tl.float32)
    d = tl.load(bias + column, inside, 0.0).to(tl.float32)
    gain = tl.zeros_like(a) + 1
    if film is not None:
        gain += tl.load(film + column, inside, 0.0).to(tl.float32)
        d = d * gain + tl.load(film + C + column, inside, 0.0).to(tl.float32)
    return a * gain, d, gain


@triton.jit
def _forward(
    x,
    stats,
    weight,
    bias,
    film,
    residual,
    y,
    N,
    C,
    film_row,
    eps,
    width: tl.constexpr,
    SILU: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write y, and mean and 1 / std, stats (B, G, 2), of a group of an image."""
    group = tl.program_id(0)
    b = tl.program_id(1)
    image = b.to(tl.int64) * N * C
    x += image
    y += image
    place = tl.arange(0, BLOCK_C)[None, :]
    column = group * width + place
    pivot = tl.load(x + group * width).to(tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    value = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(0, N, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)[:, None]
        inside = (row < N) & (place < width)
        value = tl.load(x + row * C + column, inside, 0.0).to(tl.float32) - pivot
        value = tl.where(inside, value, 0.0)
        total += value
        square += value * value
    offset = tl.sum(tl.sum(total, 1), 0) / (N * width)
    square_mean = tl.sum(tl.sum(square, 1), 0) / (N * width)
    rstd = 1 / tl.sqrt(tl.maximum(square_mean - offset * offset, 0.0) + eps)
    stats += (b * tl.num_programs(0) + group) * 2
    tl.store(stats, pivot + offset)
    tl.store(stats + 1, rstd)
    if film is not None:
        film += b * film_row
    a, d, _ = _scale_shift(weight, bias, film, C, column, place < width)
    for first in range(0, N, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)[:, None]
        inside = (row < N) & (place < width)
        at = row * C + column
        if not ONE:
            value = tl.load(x + at, inside, 0.0).to(tl.float32) - pivot
        z = (value - offset) * (a * rstd) + d
        if SILU:
            z *= tl.sigmoid(z)
        if residual is not None:
            z += tl.load(residual + image + at, inside, 0.0).to(tl.float32)
        tl.store(y + at, z.to(y.dtype.element_ty), inside)


@triton.jit
def _gradient(x, dy, at, inside, mean, rstd, a, d, SILU: tl.constexpr):
    """Give dz, which is 0 outside, and xhat."""
    xhat = (tl.load(x + at, inside, 0.0).to(tl.float32) - mean) * rstd
    dz = tl.load(dy + at, inside, 0.0).to(tl.float32)
    if SILU:
        z = xhat * a + d
        s = tl.sigmoid(z)
        dz *= s * (1 + z * (1 - s))
    return dz, xhat


@triton.jit
def _backward(
    x,
    stats,
    weight,
    bias,
    film,
    dy,
    dx,
    dfilm,
    daffine,
    N,
    C,
    film_row,
    width: tl.constexpr,
    SILU: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write for a group of an image dx, dfilm (B, 2 C), and its part of daffine (B, 2, C)."""
    group = tl.program_id(0)
    b = tl.program_id(1)
    image = b.to(tl.int64) * N * C
    x += image
    dy += image
    dx += image
    place = tl.arange(0, BLOCK_C)[None, :]
    column = group * width + place
    stats += (b * tl.num_programs(0) + group) * 2
    mean = tl.load(stats)
    rstd = tl.load(stats + 1)
    if film is not None:
        film += b * film_row
    a, d, gain = _scale_shift(weight, bias, film, C, column, place < width)
    one = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    two = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    dz = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    xhat = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(0, N, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)[:, None]
        inside = (row < N) & (place < width)
        dz, xhat = _gradient(x, dy, row * C + column, inside, mean, rstd, a, d, SILU)
        one += dz
        two += dz * xhat
    one = tl.sum(one, 0)[None, :]
    two = tl.sum(two, 0)[None, :]
    mean_one = tl.sum(tl.sum(a * one, 1), 0) / (N * width)
    mean_two = tl.sum(tl.sum(a * two, 1), 0) / (N * width)
    daffine += b * 2 * C + column
    tl.store(daffine, gain * two, place < width)
    tl.store(daffine + C, gain * one, place < width)
    if film is not None:
        w = tl.load(weight + column, place < width, 0.0)
        beta = tl.load(bias + column, place < width, 0.0)
        dfilm += b * 2 * C + column
        tl.store(dfilm, (w * two + beta * one).to(dfilm.dtype.element_ty), place < width)
        tl.store(dfilm + C, one.to(dfilm.dtype.element_ty), place < width)
    for first in range(0, N, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)[:, None]
        inside = (row < N) & (place < width)
        at = row * C + column
        if not ONE:
            dz, xhat = _gradient(x, dy, at, inside, mean, rstd, a, d, SILU)
        value = (dz * a - mean_one - xhat * mean_two) * rstd
        tl.store(dx + at, value.to(dx.dtype.element_ty), inside)


def blocks(N: int, width: int) -> dict:
    """Choose the tile of a program, for groups of a width; ONE: whether it holds a whole group."""
    block = next_power_of_2(width)
    rows = min(next_power_of_2(N), max(1, TILE // block))
    warps = min(16, max(4, rows * block // 512))
    return dict(ONE=N <= rows, BLOCK_N=rows, BLOCK_C=block, num_warps=warps)


class NormAct(torch.autograd.Function):
    """See `norm_act`."""

    @staticmethod
    def forward(ctx, x, weight, bias, film, residual, groups, eps, silu):
        B, C, H, W = x.shape
        N = H * W
        width = C // groups
        y = torch.empty_like(x)
        stats = x.new_empty((B, groups, 2), dtype=torch.float32)
        tensors = (x, stats, weight, bias, film, residual, y)
        sizes = (N, C, row_of(film))
        _forward[(groups, B)](*tensors, *sizes, eps, width, silu, **blocks(N, width))
        ctx.save_for_backward(x, stats, weight, bias, film)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, stats, weight, bias, film = ctx.saved_tensors
        B, C, H, W = x.shape
        N = H * W
        groups = stats.shape[1]
        width = C // groups
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        dfilm = None if film is None else film.new_empty(film.shape)
        daffine = stats.new_empty((B, 2, C))
        tensors = (x, stats, weight, bias, film, dy, dx, dfilm, daffine)
        sizes = (N, C, row_of(film))
        _backward[(groups, B)](*tensors, *sizes, width, ctx.silu, **blocks(N, width))
        dweight, dbias = daffine.sum(0)
        return dx, dweight, dbias, dfilm, dy if ctx.needs_input_grad[4] else None, None, None, None


def row_of(film: Tensor | None) -> int:
    """Give the numbers from one image's scales to the next one's."""
    return 0 if film is None else film.stride(0)


def norm_act(
    x: Tensor,
    norm: torch.nn.GroupNorm,
    film: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """Normalise x (B, C, H, W), scale and shift it by film (B, 2 C), SiLU, add the residual.

    The residual has x's shape. Both lie in channels_last memory, or are copied to it. Rows of film
    may be parts of longer ones.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
    options = (norm.num_groups, norm.eps, silu)
    return NormAct.apply(x, norm.weight, norm.bias, film, residual, *options)
