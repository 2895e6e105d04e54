"""Linear attention in two Triton kernels, one forward, one backward, that copy nothing.

With qs the softmax of q over D and ks that of k over N, it is out = qs (ks^T v). A program goes
through the tiles of a head twice: first it sums a (D, D) matrix over N, then it writes with it.
All sums and exponentials are float32; products have operands of the input's dtype.
Shapes: B batch, N positions, D channels of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def fits(qkv: Tensor, heads: int) -> bool:
    """Tell whether the kernels take qkv (B, N, 3 heads D), and are faster than the plain layer.

    float32 and D > 128 need more registers than there are. A program goes through its tiles one
    after the other, about a microsecond each, while the plain layer's dozen launches use all of
    the chip: they are faster for one image of more than 32 px, four of more than 64.
    """
    B, N, width = qkv.shape
    narrow = width // 3 // heads in (16, 32, 64, 128)
    return narrow and qkv.dtype.itemsize == 2 and N <= 256 * B * heads


def linear_attention(qkv: Tensor, heads: int) -> Tensor:
    """Attend from qkv (B, N, 3 heads D) -> (B, N, heads D), of its dtype."""
    return LinearAttention.apply(qkv.contiguous(), heads)


class LinearAttention(torch.autograd.Function):
    """Keep qkv and, of each head, the context ks^T v and the log sums of k's exponentials."""

    @staticmethod
    def forward(ctx, qkv: Tensor, heads: int) -> Tensor:
        B, N, width = qkv.shape
        D = width // 3 // heads
        out = qkv.new_empty(B, N, heads * D)
        kept = qkv.new_empty(B, D + 1, heads * D, dtype=torch.float32)  # log sums last
        ctx.options = {"D": D, "BLOCK": min(4096 // D, 128), "num_stages": 2}
        ctx.options["num_warps"] = 4 if D == 64 else 8  # with 8 of D = 64 Triton 3.2 aborts
        attend[heads, B](qkv, out, kept, N, heads * D, **ctx.options)
        ctx.save_for_backward(qkv, kept)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        qkv, kept = ctx.saved_tensors
        out = torch.empty_like(qkv)
        B, N, width = grad.shape
        grid = width // ctx.options["D"], B
        attend_backward[grid](qkv, grad.contiguous(), kept, out, N, width, **ctx.options)
        return out, None


@triton.jit
def softmax(q):
    """Take the softmax over D, in float32."""
    q = q.to(tl.float32)
    q = tl.exp(q - tl.max(q, 1)[:, None])
    return q / tl.sum(q, 1)[:, None]


@triton.jit
def attend(
    qkv,
    out,
    kept,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the context with an online softmax over the tiles of N, then multiply each q by it."""
    batch = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * D
    qkv += batch * N * WIDTH * 3 + head
    out += batch * N * WIDTH + head
    channels = tl.arange(0, D)
    tile = tl.arange(0, BLOCK)[:, None]
    highest = tl.full((D,), float("-inf"), tl.float32)
    total = tl.zeros((D,), tl.float32)
    context = tl.zeros((D, D), tl.float32)
    for first in range(0, N, BLOCK):
        row = first + tile
        at = qkv + row * WIDTH * 3 + channels
        key = tl.load(at + WIDTH, row < N, float("-inf")).to(tl.float32)
        value = tl.load(at + WIDTH * 2, row < N, 0.0)
        higher = tl.maximum(highest, tl.max(key, 0))
        key = tl.exp(key - higher).to(value.dtype)  # the total is of what is multiplied
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(key.to(tl.float32), 0)
        context = tl.dot(tl.trans(key), value, context * shrink[:, None])
        highest = higher
    kept += batch * (D + 1) * WIDTH + head + channels
    context /= total[:, None]
    tl.store(kept + channels[:, None] * WIDTH, context)
    tl.store(kept + D * WIDTH, highest + tl.log(total))
    context = context.to(qkv.dtype.element_ty)
    for first in range(0, N, BLOCK):
        row = first + tile
        query = softmax(tl.load(qkv + row * WIDTH * 3 + channels, row < N, 0.0))
        mixed = tl.dot(query.to(context.dtype), context)
        tl.store(out + row * WIDTH + channels, mixed, row < N)


@triton.jit
def attend_backward(
    qkv,
    grad,
    kept,
    out,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the context's gradient, then write those of q, k and v.

    ks is about 1/N, and the context's gradient a sum over N. They are multiplied and divided by
    N, so that float16 holds both. For dq only differences of the context's rows count, and they
    may be far smaller than what rows have in common: that is taken off before they are rounded.
    """
    batch = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * D
    qkv += batch * N * WIDTH * 3 + head
    out += batch * N * WIDTH * 3 + head
    grad += batch * N * WIDTH + head
    channels = tl.arange(0, D)
    tile = tl.arange(0, BLOCK)[:, None]
    change = tl.zeros((D, D), tl.float32)
    for first in range(0, N, BLOCK):
        row = first + tile
        query = softmax(tl.load(qkv + row * WIDTH * 3 + channels, row < N, 0.0))
        g = tl.load(grad + row * WIDTH + channels, row < N, 0.0)
        change = tl.dot(tl.trans(query.to(g.dtype)), g, change)
    kept += batch * (D + 1) * WIDTH + head + channels
    context = tl.load(kept + channels[:, None] * WIDTH)
    log_sum = tl.load(kept + D * WIDTH)
    change = (change / N).to(qkv.dtype.element_ty)
    centre = tl.sum(change.to(tl.float32) * context, 1)
    context = (context - tl.sum(context, 0) / D).to(change.dtype)
    for first in range(0, N, BLOCK):
        row = first + tile
        at = row * WIDTH * 3 + channels
        g = tl.load(grad + row * WIDTH + channels, row < N, 0.0)
        query = softmax(tl.load(qkv + at, row < N, 0.0))
        along = query * tl.dot(g, tl.trans(context))
        tl.store(out + at, along - query * tl.sum(along, 1)[:, None], row < N)
        at += WIDTH
        key = tl.exp(tl.load(qkv + at, row < N, 0.0).to(tl.float32) - log_sum) * N
        value = tl.load(qkv + at + WIDTH, row < N, 0.0)
        along = tl.dot(value, tl.trans(change)) - centre
        tl.store(out + at, key * along, row < N)
        tl.store(out + at + WIDTH, tl.dot(key.to(value.dtype), change), row < N)
