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
WARPS = 4
MAX_WHOLE = 16384  # elements of a group that a program holds as a whole
PROGRAMS = 1024  # that fill the multiprocessors of a large GPU
MAX_PARTS = 16  # of a group, whose sums are added up where they are used


@triton.jit
def _sums(x, out, N, C, rows, width: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum x - pivot and its square over a part of a group: out (B, G, parts, 2)."""
    group = tl.program_id(0)
    part = tl.program_id(1)
    x += (group // (C // width)).to(tl.int64) * N * C + group % (C // width) * width
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
    out += (group * tl.num_programs(1) + part) * 2
    tl.store(out, tl.sum(tl.sum(total, 1), 0))
    tl.store(out + 1, tl.sum(tl.sum(square, 1), 0))


@triton.jit
def _scale_shift(weight, bias, film, b, column, inside, C, FILM: tl.constexpr):
    """Give a and d of some channels."""
    a = tl.load(weight + column, inside, 0.0).to(tl.float32)
    d = tl.load(bias + column, inside, 0.0).to(tl.float32)
    if FILM:
        film += b * 2 * C + column
        gain = 1 + tl.load(film, inside, 0.0).to(tl.float32)
        a *= gain
        d = d * gain + tl.load(film + C, inside, 0.0).to(tl.float32)
    return a, d


@triton.jit
def _channels(
    x,
    sums,
    weight,
    bias,
    film,
    b,
    column,
    N,
    C,
    width,
    parts,
    eps,
    FILM: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """Give mean, 1 / std, a and d of channels of an image, (BLOCK_C,) each."""
    inside = column < C
    group = column // width
    pivot = tl.load(x + b.to(tl.int64) * N * C + group * width, inside, 0.0).to(tl.float32)
    part = tl.arange(0, MAX_PARTS)[:, None]
    sums += ((b * (C // width) + group)[None, :] * parts + part) * 2
    known = (part < parts) & inside[None, :]
    offset = tl.sum(tl.load(sums, known, 0.0), 0) / (N * width)
    square = tl.sum(tl.load(sums + 1, known, 0.0), 0) / (N * width)
    rstd = 1 / tl.sqrt(tl.maximum(square - offset * offset, 0.0) + eps)
    a, d = _scale_shift(weight, bias, film, b, column, inside, C, FILM)
    return pivot + offset, rstd, a, d


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
    parts,
    rows,
    eps,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """Write y for some rows and columns of an image."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2)
    mean, rstd, a, d = _channels(
        x, sums, weight, bias, film, b, column, N, C, width, parts, eps, FILM, MAX_PARTS
    )
    a *= rstd
    image = b.to(tl.int64) * N * C
    x += image
    y += image
    if RESIDUAL:
        residual += image
    start = tl.program_id(1) * rows
    end = tl.minimum(start + rows, N)
    for first in range(start, end, BLOCK_N):
        row = (first + tl.arange(0, BLOCK_N))[:, None]
        inside = (row < end) & (column < C)[None, :]
        at = row * C + column[None, :]
        z = tl.load(x + at, inside, 0.0).to(tl.float32)
        z = (z - mean[None, :]) * a[None, :] + d[None, :]
        if SILU:
            z *= tl.sigmoid(z)
        if RESIDUAL:
            z += tl.load(residual + at, inside, 0.0).to(tl.float32)
        tl.store(y + at, z.to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    x,
    sums,
    weight,
    bias,
    film,
    dy,
    means,
    out,
    N,
    C,
    width,
    parts,
    rows,
    eps,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """Write for some rows and columns of an image S1 and S2, out (B, parts, 2, C), or dx."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    b = tl.program_id(2)
    mean, rstd, a, d = _channels(
        x, sums, weight, bias, film, b, column, N, C, width, parts, eps, FILM, MAX_PARTS
    )
    if SUMS:
        one = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        two = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    else:
        means += (b * (C // width) + column // width) * 2
        mean_one = tl.load(means, column < C, 0.0)[None, :]
        mean_two = tl.load(means + 1, column < C, 0.0)[None, :]
        out += b.to(tl.int64) * N * C
    x += b.to(tl.int64) * N * C
    dy += b.to(tl.int64) * N * C
    end = tl.minimum(part * rows + rows, N)
    for first in range(part * rows, end, BLOCK_N):
        row = (first + tl.arange(0, BLOCK_N))[:, None]
        inside = (row < end) & (column < C)[None, :]
        at = row * C + column[None, :]
        xhat = (tl.load(x + at, inside, 0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        dz = tl.load(dy + at, inside, 0.0).to(tl.float32)  # 0 outside
        if SILU:
            z = xhat * a[None, :] + d[None, :]
            s = tl.sigmoid(z)
            dz *= s * (1 + z * (1 - s))
        if SUMS:
            one += dz
            two += dz * xhat
        else:
            dx = (dz * a[None, :] - mean_one - xhat * mean_two) * rstd[None, :]
            tl.store(out + at, dx.to(out.dtype.element_ty), inside)
    if SUMS:
        out += (b * tl.num_programs(1) + part) * 2 * C + column
        tl.store(out, tl.sum(one, 0), column < C)
        tl.store(out + C, tl.sum(two, 0), column < C)


@triton.jit
def _forward_whole(
    x,
    stats,
    weight,
    bias,
    film,
    residual,
    y,
    N,
    C,
    eps,
    width: tl.constexpr,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write y for a group of an image that fits into registers; stats (B, G, 2): mean, 1 / std."""
    group = tl.program_id(0)
    b = tl.program_id(1)
    row = tl.arange(0, BLOCK_N)[:, None]
    place = tl.arange(0, BLOCK_C)[None, :]
    inside = (row < N) & (place < width)
    column = group * width + place
    at = row * C + column
    image = b.to(tl.int64) * N * C
    z = tl.load(x + image + at, inside, 0.0).to(tl.float32)
    mean = tl.sum(tl.sum(z, 1), 0) / (N * width)
    z = tl.where(inside, z - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(tl.sum(z * z, 1), 0) / (N * width) + eps)
    stats += (b * tl.num_programs(0) + group) * 2
    tl.store(stats, mean)
    tl.store(stats + 1, rstd)
    a, d = _scale_shift(weight, bias, film, b, column, place < width, C, FILM)
    z = z * (a * rstd) + d
    if SILU:
        z *= tl.sigmoid(z)
    if RESIDUAL:
        z += tl.load(residual + image + at, inside, 0.0).to(tl.float32)
    tl.store(y + image + at, z.to(y.dtype.element_ty), inside)


@triton.jit
def _backward_whole(
    x,
    stats,
    weight,
    bias,
    film,
    dy,
    partial,
    dx,
    N,
    C,
    width: tl.constexpr,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write dx, and S1 and S2, partial (B, 2, C), for a group of an image."""
    group = tl.program_id(0)
    b = tl.program_id(1)
    row = tl.arange(0, BLOCK_N)[:, None]
    place = tl.arange(0, BLOCK_C)[None, :]
    inside = (row < N) & (place < width)
    column = group * width + place
    at = row * C + column
    image = b.to(tl.int64) * N * C
    stats += (b * tl.num_programs(0) + group) * 2
    rstd = tl.load(stats + 1)
    xhat = (tl.load(x + image + at, inside, 0.0).to(tl.float32) - tl.load(stats)) * rstd
    dz = tl.load(dy + image + at, inside, 0.0).to(tl.float32)  # 0 outside
    a, d = _scale_shift(weight, bias, film, b, column, place < width, C, FILM)
    if SILU:
        z = xhat * a + d
        s = tl.sigmoid(z)
        dz *= s * (1 + z * (1 - s))
    one = tl.sum(dz, 0)[None, :]
    two = tl.sum(dz * xhat, 0)[None, :]
    partial += b * 2 * C + column
    tl.store(partial, one, place < width)
    tl.store(partial + C, two, place < width)
    mean_one = tl.sum(tl.sum(a * one, 1), 0) / (N * width)
    mean_two = tl.sum(tl.sum(a * two, 1), 0) / (N * width)
    value = (dz * a - mean_one - xhat * mean_two) * rstd
    tl.store(dx + image + at, value.to(dx.dtype.element_ty), inside)


@triton.jit
def _small(
    partial,
    weight,
    bias,
    film,
    means,
    dfilm,
    daffine,
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

    means (B, G, 2): M1, M2; dfilm (B, 2 C); daffine (blocks of images, 2, C).
    """
    group = tl.program_id(0)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    place = tl.arange(0, BLOCK_C)
    inside = (b < B) & (place < width)[None, :]
    column = group * width + place
    one = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    two = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for part in range(parts):
        at = (b * parts + part) * 2 * C + column[None, :]
        one += tl.load(partial + at, inside, 0.0)
        two += tl.load(partial + at + C, inside, 0.0)
    w = tl.load(weight + column, place < width, 0.0).to(tl.float32)[None, :]
    if FILM:
        at = b * 2 * C + column[None, :]
        beta = tl.load(bias + column, place < width, 0.0).to(tl.float32)[None, :]
        tl.store(dfilm + at, (w * two + beta * one).to(dfilm.dtype.element_ty), inside)
        tl.store(dfilm + at + C, one.to(dfilm.dtype.element_ty), inside)
        gain = 1 + tl.load(film + at, inside, 0.0).to(tl.float32)
        one *= gain
        two *= gain
    if means is not None:
        means += (b * tl.num_programs(0) + group) * 2
        tl.store(means, (tl.sum(w * one, 1) / (N * width))[:, None], b < B)
        tl.store(means + 1, (tl.sum(w * two, 1) / (N * width))[:, None], b < B)
    daffine += tl.program_id(1) * 2 * C + column
    tl.store(daffine, tl.sum(two, 0), place < width)
    tl.store(daffine + C, tl.sum(one, 0), place < width)


def split(units: int, N: int, block: int) -> tuple[int, int]:
    """Choose (parts, rows of a part), so that `units` times parts programs fill the GPU."""
    parts = max(1, min(cdiv(PROGRAMS, units), MAX_PARTS, cdiv(N, block)))
    rows = cdiv(cdiv(N, parts), block) * block
    return cdiv(N, rows), rows


class Call:
    """Hold what the kernels of a call have in common: shapes, and how work is divided."""

    def __init__(self, x: Tensor, groups: int):
        self.B, self.C, H, W = x.shape
        self.N = H * W
        self.width = self.C // groups
        self.group_block = next_power_of_2(self.width)
        rows = next_power_of_2(self.N)
        self.whole = rows * self.group_block <= MAX_WHOLE
        if self.whole:
            self.parts = 1
            warps = min(16, max(4, rows * self.group_block // 1024))
            self.blocks = dict(BLOCK_N=rows, BLOCK_C=self.group_block, num_warps=warps)
            return
        block = min(next_power_of_2(self.C), 128)
        columns = cdiv(self.C, block)
        self.parts, self.rows = split(self.B * columns, self.N, TILE // block)
        self.grid = (columns, self.parts, self.B)
        self.blocks = dict(
            BLOCK_N=TILE // block, BLOCK_C=block, MAX_PARTS=MAX_PARTS, num_warps=WARPS
        )

    def sizes(self, sums: Tensor, eps: float) -> tuple:
        return self.N, self.C, self.width, sums.shape[1], self.rows, eps


class NormAct(torch.autograd.Function):
    """See `norm_act`."""

    @staticmethod
    def forward(ctx, x, weight, bias, film, residual, groups, eps, silu):
        call = Call(x, groups)
        y = torch.empty_like(x)
        flags = (film is not None, silu, residual is not None)
        units = call.B * groups
        if call.whole:
            sums = x.new_empty((units, 1, 2), dtype=torch.float32)  # mean and 1 / std
            tensors = (x, sums, weight, bias, film, residual, y)
            sizes = (call.N, call.C, eps, call.width)
            _forward_whole[(groups, call.B)](*tensors, *sizes, *flags, **call.blocks)
        else:
            block = max(1, TILE // call.group_block)
            parts, rows = split(units, call.N, block)
            sums = x.new_empty((units, parts, 2), dtype=torch.float32)
            sizes = (call.N, call.C, rows, call.width, block, call.group_block)
            _sums[(units, parts)](x, sums, *sizes)
            tensors = (x, sums, weight, bias, film, residual, y)
            _forward[call.grid](*tensors, *call.sizes(sums, eps), *flags, **call.blocks)
        ctx.save_for_backward(x, sums, weight, bias, film)
        ctx.settings = (groups, eps, silu)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, sums, weight, bias, film = ctx.saved_tensors
        groups, eps, silu = ctx.settings
        call = Call(x, groups)
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        given = (x, sums, weight, bias, film, dy)
        flags = (film is not None, silu)
        partial = sums.new_empty((call.B, call.parts, 2, call.C))
        means = None
        if call.whole:
            _backward_whole[(groups, call.B)](
                *given, partial, dx, call.N, call.C, call.width, *flags, **call.blocks
            )
        else:
            means = sums.new_empty((call.B, groups, 2))
            sizes = call.sizes(sums, eps)
            _backward[call.grid](*given, means, partial, *sizes, *flags, True, **call.blocks)
        block = min(next_power_of_2(call.B), max(1, TILE // call.group_block))
        blocks = cdiv(call.B, block)
        daffine = sums.new_empty((blocks, 2, call.C))
        dfilm = None if film is None else torch.empty_like(film)
        _small[(groups, blocks)](
            partial,
            weight,
            bias,
            film,
            means,
            dfilm,
            daffine,
            call.B,
            call.N,
            call.C,
            call.width,
            call.parts,
            film is not None,
            block,
            call.group_block,
        )
        if means is not None:
            _backward[call.grid](*given, means, dx, *sizes, *flags, False, **call.blocks)
        dweight, dbias = daffine[0] if blocks == 1 else daffine.sum(0)
        return dx, dweight, dbias, dfilm, dy if ctx.needs_input_grad[4] else None, None, None, None


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
