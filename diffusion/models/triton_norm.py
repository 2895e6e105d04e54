"""GroupNorm with what follows it, FiLM, SiLU and a sum, as CUDA kernels that keep channels_last.

    xhat = (x - mean) / std over a group of channels and all positions     (arXiv:1803.08494)
    z = xhat a + d,   a = weight (1 + scale),   d = bias (1 + scale) + shift
    y = silu(z) + residual

Backward, with dz = dy silu'(z), S1 = sum_n dz, S2 = sum_n dz xhat of each image and channel, and
M1, M2 = the means of a S1 and a S2 over a group (per element):

    dx = (a dz - M1 - xhat M2) / std
    dshift = S1, dscale = weight S2 + bias S1, dweight = sum_b (1 + scale) S2, dbias likewise of S1

torch's GroupNorm on CUDA wants channels first, and autocast makes it float32: around each norm the
tensor is cast, transposed, cast and transposed back. Forward takes two launches here and reads x
twice, backward three or four. Sums and arithmetic are float32, about a pivot: the group's first
value, so that a mean far from 0 costs no digits.
Shapes: B images, C channels, N = H W positions, G groups of C / G channels. x lies as (B, N, C).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

TILE = 4096  # elements that a program holds at a time
PROGRAMS = 1024  # that fill the multiprocessors of a large GPU
MAX_PARTS = 16  # of an image, whose sums are added up where they are used


@triton.jit
def _sums(
    x,
    out,
    N,
    C,
    rows,
    width: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum x - pivot and its square over a part of a group: out (B, G, parts, 2)."""
    group = tl.program_id(0)
    part = tl.program_id(1)
    groups = C // width
    x += (group // groups).to(tl.int64) * N * C + group % groups * width
    pivot = tl.load(x).to(tl.float32)
    column = tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    end = tl.minimum(part * rows + rows, N)
    for first in range(part * rows, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)[:, None]
        inside = (row < end) & (column < width)
        value = tl.load(x + row * C + column, inside, 0.0).to(tl.float32)
        value = tl.where(inside, value - pivot, 0.0)
        total += value
        square += value * value
    out += (group * PARTS + part) * 2
    tl.store(out, tl.sum(tl.sum(total, 1), 0))
    tl.store(out + 1, tl.sum(tl.sum(square, 1), 0))


@triton.jit
def _affine(
    x,
    sums,
    weight,
    bias,
    film,
    b,
    N,
    C,
    width,
    eps,
    column,
    inside,
    PARTS: tl.constexpr,
    FILM: tl.constexpr,
):
    """Give mean, 1 / std, a and d of an image's channels, (BLOCK_C,) each, and 1 + scale."""
    group = column // width
    pivot = tl.load(x + b.to(tl.int64) * N * C + group * width, inside, 0.0).to(tl.float32)
    sums += (b * (C // width) + group) * PARTS * 2
    total = tl.zeros_like(pivot)
    square = tl.zeros_like(pivot)
    for part in tl.static_range(PARTS):
        total += tl.load(sums + part * 2, inside, 0.0)
        square += tl.load(sums + part * 2 + 1, inside, 0.0)
    count = N * width
    offset = total / count
    rstd = 1 / tl.sqrt(tl.maximum(square / count - offset * offset, 0.0) + eps)
    a = tl.load(weight + column, inside, 0.0).to(tl.float32)
    d = tl.load(bias + column, inside, 0.0).to(tl.float32)
    gain = tl.zeros_like(pivot) + 1
    if FILM:
        film += b * 2 * C
        gain += tl.load(film + column, inside, 0.0).to(tl.float32)
        d = d * gain + tl.load(film + C + column, inside, 0.0).to(tl.float32)
    return pivot + offset, rstd, a * gain, d, gain


@triton.jit
def _forward(
    x,
    sums,
    weight,
    bias,
    film,
    residual,
    y,
    N,
    C,
    width,
    rows,
    eps,
    PARTS: tl.constexpr,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write y for some rows and columns of an image."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    b = tl.program_id(2)
    inside = column < C
    mean, rstd, a, d, _ = _affine(
        x, sums, weight, bias, film, b, N, C, width, eps, column, inside, PARTS, FILM
    )
    a *= rstd
    image = b.to(tl.int64) * N * C
    end = tl.minimum(part * rows + rows, N)
    for first in range(part * rows, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        mask = (row < end)[:, None] & inside[None, :]
        at = image + row[:, None] * C + column[None, :]
        z = tl.load(x + at, mask, 0.0).to(tl.float32)
        z = (z - mean[None, :]) * a[None, :] + d[None, :]
        if SILU:
            z *= tl.sigmoid(z)
        if RESIDUAL:
            z += tl.load(residual + at, mask, 0.0).to(tl.float32)
        tl.store(y + at, z.to(y.dtype.element_ty), mask)


@triton.jit
def _dz(dy, z, SILU: tl.constexpr):
    """Give the gradient before SiLU."""
    if SILU:
        s = tl.sigmoid(z)
        dy *= s * (1 + z * (1 - s))
    return dy


@triton.jit
def _backward_sums(
    x,
    dy,
    sums,
    weight,
    bias,
    film,
    out,
    N,
    C,
    width,
    rows,
    eps,
    PARTS: tl.constexpr,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write S1 and S2 of some rows of an image: out (B, parts, 2, C)."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    b = tl.program_id(2)
    inside = column < C
    mean, rstd, a, d, _ = _affine(
        x, sums, weight, bias, film, b, N, C, width, eps, column, inside, PARTS, FILM
    )
    image = b.to(tl.int64) * N * C
    one = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    two = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    end = tl.minimum(part * rows + rows, N)
    for first in range(part * rows, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        mask = (row < end)[:, None] & inside[None, :]
        at = image + row[:, None] * C + column[None, :]
        xhat = (tl.load(x + at, mask, 0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        dz = tl.load(dy + at, mask, 0.0).to(tl.float32)  # 0 outside
        dz = _dz(dz, xhat * a[None, :] + d[None, :], SILU)
        one += dz
        two += dz * xhat
    out += (b * tl.num_programs(1) + part) * 2 * C
    tl.store(out + column, tl.sum(one, 0), inside)
    tl.store(out + C + column, tl.sum(two, 0), inside)


@triton.jit
def _backward_small(
    weight,
    bias,
    film,
    partial,
    means,
    dfilm,
    dparameters,
    B,
    N,
    C,
    width,
    parts,
    FILM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Make of S1 and S2 what is small, for a group of some images.

    means (B, G, 2): M1, M2; dfilm (B, 2 C); dparameters (blocks of images, 2, C).
    """
    group = tl.program_id(0)
    block = tl.program_id(1)
    b = block * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    place = tl.arange(0, BLOCK_C)[None, :]
    column = group * width + place
    inside = (b < B) & (place < width)
    one = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    two = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for part in range(parts):
        at = (b * parts + part) * 2 * C + column
        one += tl.load(partial + at, inside, 0.0)
        two += tl.load(partial + at + C, inside, 0.0)
    w = tl.load(weight + column, place < width, 0.0).to(tl.float32)
    gain = tl.zeros([BLOCK_B, BLOCK_C], tl.float32) + 1
    if FILM:
        at = b * 2 * C + column
        gain += tl.load(film + at, inside, 0.0).to(tl.float32)
        beta = tl.load(bias + column, place < width, 0.0).to(tl.float32)
        tl.store(dfilm + at, (w * two + beta * one).to(dfilm.dtype.element_ty), inside)
        tl.store(dfilm + at + C, one.to(dfilm.dtype.element_ty), inside)
    one *= gain
    two *= gain
    count = N * width
    means += (b * tl.num_programs(0) + group) * 2
    tl.store(means, (tl.sum(w * one, 1) / count)[:, None], b < B)
    tl.store(means + 1, (tl.sum(w * two, 1) / count)[:, None], b < B)
    at = block * 2 * C + group * width + tl.arange(0, BLOCK_C)
    tl.store(dparameters + at, tl.sum(two, 0), tl.arange(0, BLOCK_C) < width)
    tl.store(dparameters + at + C, tl.sum(one, 0), tl.arange(0, BLOCK_C) < width)


@triton.jit
def _backward(
    x,
    dy,
    sums,
    weight,
    bias,
    film,
    means,
    dx,
    N,
    C,
    width,
    rows,
    eps,
    PARTS: tl.constexpr,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write dx for some rows and columns of an image."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    b = tl.program_id(2)
    inside = column < C
    mean, rstd, a, d, _ = _affine(
        x, sums, weight, bias, film, b, N, C, width, eps, column, inside, PARTS, FILM
    )
    means += (b * (C // width) + column // width) * 2
    m1 = tl.load(means, inside, 0.0)
    m2 = tl.load(means + 1, inside, 0.0)
    image = b.to(tl.int64) * N * C
    end = tl.minimum(part * rows + rows, N)
    for first in range(part * rows, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        mask = (row < end)[:, None] & inside[None, :]
        at = image + row[:, None] * C + column[None, :]
        xhat = (tl.load(x + at, mask, 0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        dz = tl.load(dy + at, mask, 0.0).to(tl.float32)
        dz = _dz(dz, xhat * a[None, :] + d[None, :], SILU)
        value = (dz * a[None, :] - m1[None, :] - xhat * m2[None, :]) * rstd[None, :]
        tl.store(dx + at, value.to(dx.dtype.element_ty), mask)


def split(units: int, N: int, block: int) -> tuple[int, int]:
    """Choose (parts, rows of a part), so that `units` times parts programs fill the GPU."""
    parts = max(1, min(cdiv(PROGRAMS, units), MAX_PARTS, cdiv(N, block)))
    rows = cdiv(cdiv(N, parts), block) * block
    return cdiv(N, rows), rows


class Sizes:
    """Hold the shapes of a call, and how it is divided among programs."""

    def __init__(self, x: Tensor, groups: int):
        self.B, self.C, H, W = x.shape
        self.N = H * W
        self.groups = groups
        self.width = self.C // groups
        self.group_block = next_power_of_2(self.width)
        self.block_c = min(next_power_of_2(self.C), 128)
        self.block_n = TILE // self.block_c
        self.columns = cdiv(self.C, self.block_c)
        self.parts, self.rows = split(self.B * self.columns, self.N, self.block_n)
        self.grid = (self.columns, self.parts, self.B)


def sums(x: Tensor, s: Sizes) -> Tensor:
    """Sum up each group of x, in parts: (B G, parts, 2) float32."""
    block = max(1, TILE // s.group_block)
    parts, rows = split(s.B * s.groups, s.N, block)
    out = x.new_empty((s.B * s.groups, parts, 2), dtype=torch.float32)
    _sums[(s.B * s.groups, parts)](x, out, s.N, s.C, rows, s.width, parts, block, s.group_block)
    return out


class NormAct(torch.autograd.Function):
    """See `norm_act`."""

    @staticmethod
    def forward(ctx, x, weight, bias, film, residual, groups, eps, silu):
        s = Sizes(x, groups)
        total = sums(x, s)
        y = torch.empty_like(x)
        _forward[s.grid](
            x,
            total,
            weight,
            bias,
            film,
            residual,
            y,
            s.N,
            s.C,
            s.width,
            s.rows,
            eps,
            total.shape[1],
            film is not None,
            silu,
            residual is not None,
            s.block_n,
            s.block_c,
        )
        ctx.save_for_backward(x, total, weight, bias, film)
        ctx.settings = (groups, eps, silu)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, total, weight, bias, film = ctx.saved_tensors
        groups, eps, silu = ctx.settings
        s = Sizes(x, groups)
        dy = dy.contiguous(memory_format=torch.channels_last)
        partial = x.new_empty((s.B, s.parts, 2, s.C), dtype=torch.float32)
        sizes = (s.N, s.C, s.width)
        options = (total.shape[1], film is not None, silu, s.block_n, s.block_c)
        _backward_sums[s.grid](
            x, dy, total, weight, bias, film, partial, *sizes, s.rows, eps, *options
        )
        block = min(next_power_of_2(s.B), max(1, TILE // s.group_block))
        blocks = cdiv(s.B, block)
        means = partial.new_empty((s.B, groups, 2))
        dparameters = partial.new_empty((blocks, 2, s.C))
        dfilm = None if film is None else torch.empty_like(film)
        _backward_small[(groups, blocks)](
            weight,
            bias,
            film,
            partial,
            means,
            dfilm,
            dparameters,
            s.B,
            *sizes,
            s.parts,
            film is not None,
            block,
            s.group_block,
        )
        dx = torch.empty_like(x)
        _backward[s.grid](
            x, dy, total, weight, bias, film, means, dx, *sizes, s.rows, eps, *options
        )
        dweight, dbias = dparameters[0] if blocks == 1 else dparameters.sum(0)
        residual = dy if ctx.needs_input_grad[4] else None
        return dx, dweight, dbias, dfilm, residual, None, None, None


def norm_act(
    x: Tensor,
    norm: torch.nn.GroupNorm,
    film: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """Normalise x (B, C, H, W), scale and shift it by film (B, 2 C), SiLU, add the residual.

    The residual has x's shape. All lie in channels_last memory, or are copied to it.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
    film = None if film is None else film.contiguous()
    options = (norm.num_groups, norm.eps, silu)
    return NormAct.apply(x, norm.weight, norm.bias, film, residual, *options)
