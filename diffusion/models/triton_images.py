"""Small things on channels_last tensors that torch does slowly on CUDA: biases, upsampling.

torch repeats pixels, and sums the gradient of a bias over channels_last images, at about a tenth of
the memory's speed (docs/log.md).
Shapes: M rows, positions of all images or tokens, of C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

TILE = 4096  # elements that a program holds at a time
PROGRAMS = 1024  # that fill the multiprocessors of a large GPU


def tile(C: int) -> dict:
    """Choose the rows and channels of a tile."""
    block = min(next_power_of_2(C), 128)
    return dict(BLOCK_N=TILE // block, BLOCK_C=block)


@triton.jit
def _place(rows, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Give a tile's rows (BLOCK_N, 1) and columns (1, BLOCK_C), and what of it is inside."""
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    return row, column, (row < rows) & (column < C)


@triton.jit
def _add(x, bias, y, M, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    row, column, inside = _place(M, C, BLOCK_N, BLOCK_C)
    at = row * C + column
    value = tl.load(x + at, inside).to(tl.float32) + tl.load(bias + column, column < C)
    tl.store(y + at, value.to(y.dtype.element_ty), inside)


@triton.jit
def _column_sums(x, out, M, C, tiles, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum up the columns of some tiles: out (parts, C)."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * tiles * BLOCK_N
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i in range(tiles):
        row = (first + i * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        inside = (row < M) & (column < C)[None, :]
        total += tl.load(x + row * C + column[None, :], inside, 0.0).to(tl.float32)
    tl.store(out + tl.program_id(1) * C + column, tl.sum(total, 0), column < C)


class Add(torch.autograd.Function):
    """See `add`."""

    @staticmethod
    def forward(ctx, x, bias):
        C = len(bias)
        M = x.numel() // C
        y = torch.empty_like(x)
        sizes = tile(C)
        grid = (cdiv(M, sizes["BLOCK_N"]), cdiv(C, sizes["BLOCK_C"]))
        _add[grid](x, bias, y, M, C, **sizes)
        ctx.C = C
        return y

    @staticmethod
    def backward(ctx, dy):
        dbias = None
        if ctx.needs_input_grad[1]:
            dy = dy.contiguous(memory_format=torch.channels_last)
            sizes = tile(ctx.C)
            M = dy.numel() // ctx.C
            columns = cdiv(ctx.C, sizes["BLOCK_C"])
            tiles = cdiv(cdiv(M, sizes["BLOCK_N"]), cdiv(PROGRAMS, columns))
            parts = cdiv(M, tiles * sizes["BLOCK_N"])
            sums = dy.new_empty((parts, ctx.C), dtype=torch.float32)
            _column_sums[(columns, parts)](dy, sums, M, ctx.C, tiles, **sizes)
            dbias = sums.sum(0)
        return dy, dbias


def add(x: Tensor, bias: Tensor) -> Tensor:
    """Add a bias (C,) to channels_last images (B, C, H, W)."""
    return Add.apply(x, bias)


@triton.jit
def _repeat(x, y, rows, W, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write some rows of y, images of twice the height and the width 2 W."""
    row, column, inside = _place(rows, C, BLOCK_N, BLOCK_C)
    line = row // (2 * W)
    source = line // 2 * W + row % (2 * W) // 2
    tl.store(y + row * C + column, tl.load(x + source * C + column, inside), inside)


@triton.jit
def _sum_repeated(dy, dx, rows, W, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write some rows of dx: sums of four."""
    row, column, inside = _place(rows, C, BLOCK_N, BLOCK_C)
    at = dy + (row // W * 4 * W + row % W * 2) * C + column
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for corner in tl.static_range(4):
        place = at + (corner // 2 * 2 * W + corner % 2) * C
        total += tl.load(place, inside).to(tl.float32)
    tl.store(dx + row * C + column, total.to(dx.dtype.element_ty), inside)


def images(like: Tensor, *shape: int) -> Tensor:
    """Make a tensor of another one's type and device, channels_last, without values."""
    options = dict(dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    return torch.empty(shape, **options)


class Upsample(torch.autograd.Function):
    """See `upsample`."""

    @staticmethod
    def forward(ctx, x):
        B, C, H, W = x.shape
        y = images(x, B, C, 2 * H, 2 * W)
        sizes = tile(C)
        rows = 4 * B * H * W
        grid = (cdiv(rows, sizes["BLOCK_N"]), cdiv(C, sizes["BLOCK_C"]))
        _repeat[grid](x, y, rows, W, C, **sizes)
        return y

    @staticmethod
    def backward(ctx, dy):
        B, C, H, W = dy.shape
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = images(dy, B, C, H // 2, W // 2)
        sizes = tile(C)
        rows = dx.numel() // C
        grid = (cdiv(rows, sizes["BLOCK_N"]), cdiv(C, sizes["BLOCK_C"]))
        _sum_repeated[grid](dy, dx, rows, W // 2, C, **sizes)
        return dx


def upsample(x: Tensor) -> Tensor:
    """Repeat each pixel of channels_last images (B, C, H, W) twice along height and width."""
    return Upsample.apply(x.contiguous(memory_format=torch.channels_last))
