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
    D = width // 3 // heads
    simple = qkv.dtype.itemsize == 2 and qkv.is_contiguous()
    return simple and D in (16, 32, 64, 128) and N <= 256 * B * heads


def linear_attention(qkv: Tensor, heads: int) -> Tensor:
    """Attend from contiguous qkv (B, N, 3 heads D) -> (B, N, heads D), of its dtype."""
    return LinearAttention.apply(qkv, heads)


class LinearAttention(torch.autograd.Function):
    """Keep qkv and, of each head, the context ks^T v and the log sums of k's exponentials."""

    @staticmethod
    def forward(ctx, qkv: Tensor, heads: int) -> Tensor:
        B, N, width = qkv.shape
        D = width // 3 // heads
        out = qkv.new_empty(B, N, heads * D)
        kept = qkv.new_empty(B * heads, D + 1, D, dtype=torch.float32)  # log sums last
        ctx.options = {"N": N, "HEADS": heads, "D": D, "BLOCK": min(4096 // D, 128)}
        ctx.options |= {"num_warps": 8, "num_stages": 2}
        attend[(B * heads,)](*qkv.chunk(3, 2), out, kept, **ctx.options)
        ctx.save_for_backward(qkv, kept)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        qkv, kept = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        tensors = *qkv.chunk(3, 2), *grad_qkv.chunk(3, 2), grad.contiguous(), kept
        attend_backward[(len(kept),)](*tensors, **ctx.options)
        return grad_qkv, None


@triton.jit
def softmax(q):
    """Take the softmax over D, in float32."""
    q = q.to(tl.float32)
    q = tl.exp(q - tl.max(q, 1)[:, None])
    return q / tl.sum(q, 1)[:, None]


@triton.jit
def attend(
    q,
    k,
    v,
    out,
    kept,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the context with an online softmax over the tiles of N, then multiply each q by it."""
    head = tl.program_id(0).to(tl.int64)
    start = (head // HEADS * 3 * N * HEADS + head % HEADS) * D
    q += start
    k += start
    v += start
    out += (head // HEADS * N * HEADS + head % HEADS) * D
    channels = tl.arange(0, D)
    tile = tl.arange(0, BLOCK)[:, None]
    highest = tl.full((D,), float("-inf"), tl.float32)
    total = tl.zeros((D,), tl.float32)
    context = tl.zeros((D, D), tl.float32)
    for first in range(0, N, BLOCK):
        row = first + tile
        at = row * 3 * HEADS * D + channels
        key = tl.load(k + at, row < N, float("-inf")).to(tl.float32)
        value = tl.load(v + at, row < N, 0.0)
        higher = tl.maximum(highest, tl.max(key, 0))
        key = tl.exp(key - higher).to(value.dtype)  # the total is of what is multiplied
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(key.to(tl.float32), 0)
        context = tl.dot(tl.trans(key), value, context * shrink[:, None], input_precision="ieee")
        highest = higher
    kept += head * (D + 1) * D + channels
    context /= total[:, None]
    tl.store(kept + channels[:, None] * D, context)
    tl.store(kept + D * D, highest + tl.log(total))
    context = context.to(q.dtype.element_ty)
    for first in range(0, N, BLOCK):
        row = first + tile
        query = softmax(tl.load(q + row * 3 * HEADS * D + channels, row < N, 0.0))
        mixed = tl.dot(query.to(context.dtype), context, input_precision="ieee")
        tl.store(out + row * HEADS * D + channels, mixed, row < N)


@triton.jit
def attend_backward(
    q,
    k,
    v,
    dq,
    dk,
    dv,
    grad,
    kept,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the context's gradient, then write those of q, k and v.

    ks is about 1/N, and the context's gradient a sum over N. They are multiplied and divided by
    N, so that float16 holds both. For dq only differences of the context's rows count, and they
    may be far smaller than what rows have in common: that is taken off before they are rounded.
    """
    head = tl.program_id(0).to(tl.int64)
    start = (head // HEADS * 3 * N * HEADS + head % HEADS) * D
    q += start
    k += start
    v += start
    dq += start
    dk += start
    dv += start
    grad += (head // HEADS * N * HEADS + head % HEADS) * D
    channels = tl.arange(0, D)
    tile = tl.arange(0, BLOCK)[:, None]
    change = tl.zeros((D, D), tl.float32)
    for first in range(0, N, BLOCK):
        row = first + tile
        query = softmax(tl.load(q + row * 3 * HEADS * D + channels, row < N, 0.0))
        g = tl.load(grad + row * HEADS * D + channels, row < N, 0.0)
        change = tl.dot(tl.trans(query.to(g.dtype)), g, change, input_precision="ieee")
    kept += head * (D + 1) * D + channels
    context = tl.load(kept + channels[:, None] * D)
    log_sum = tl.load(kept + D * D)
    change = (change / N).to(q.dtype.element_ty)
    centre = tl.sum(change.to(tl.float32) * context, 1)
    context = (context - tl.sum(context, 0) / D).to(change.dtype)
    for first in range(0, N, BLOCK):
        row = first + tile
        at = row * 3 * HEADS * D + channels
        g = tl.load(grad + row * HEADS * D + channels, row < N, 0.0)
        query = softmax(tl.load(q + at, row < N, 0.0))
        along = query * tl.dot(g, tl.trans(context), input_precision="ieee")
        tl.store(dq + at, along - query * tl.sum(along, 1)[:, None], row < N)
        key = tl.exp(tl.load(k + at, row < N, 0.0).to(tl.float32) - log_sum) * N
        value = tl.load(v + at, row < N, 0.0)
        along = tl.dot(value, tl.trans(change), input_precision="ieee") - centre
        tl.store(dk + at, key * along, row < N)
        key = key.to(value.dtype)
        tl.store(dv + at, tl.dot(key, change, input_precision="ieee"), row < N)
