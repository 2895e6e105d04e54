"""Weight standardisation in one Triton kernel: a launch forward, one backward, a program a filter.

A filter stays in registers: 4 bytes of a weight are read, 2 are written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def standardised(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Standardise weights (C_out, C_in, 3, 3) as WSConv3x3 does: channels_last, of dtype.

    Weights in another memory format are copied first.
    """
    return Standardised.apply(weight.contiguous(memory_format=torch.channels_last), dtype)


class Standardised(torch.autograd.Function):
    """Keep the weights only; what is made of them is made again in backward."""

    @staticmethod
    def forward(ctx, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        return launch(weight, None, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return launch(weight, grad.contiguous(memory_format=torch.channels_last)), None


def launch(weight: Tensor, grad: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standardise weights, or with the gradient of the result return theirs."""
    out = torch.empty_like(weight, dtype=dtype)
    fan_in = weight[0].numel()
    block = triton.next_power_of_2(fan_in)
    warps = min(max(block // 1024, 4), 32)
    standardise[(len(weight),)](weight, grad, out, fan_in, block, num_warps=warps)
    return out


@triton.jit
def standardise(weight, grad, out, FAN_IN, BLOCK: tl.constexpr):
    """Divide a filter, less its mean, by its length: its variance is then 1 / FAN_IN."""
    at = tl.program_id(0) * FAN_IN + tl.arange(0, BLOCK)
    mask = tl.arange(0, BLOCK) < FAN_IN
    w = tl.load(weight + at, mask, 0.0).to(tl.float32)
    w = tl.where(mask, w - tl.sum(w) / FAN_IN, 0.0)
    scale = tl.rsqrt(tl.sum(w * w) + 1e-5)
    w *= scale
    if grad is not None:
        g = tl.load(grad + at, mask, 0.0).to(tl.float32)
        w = scale * (g - tl.sum(g) / FAN_IN - w * tl.sum(w * g))
    tl.store(out + at, w, mask)
