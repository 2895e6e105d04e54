"""Run a network faster on CPUs: `install` replaces forwards of its layers by these.

A network computes the same without them, and on other devices they do nothing.

A CPU's convolution brings the weights into its own order at every call, and the gradient of the
weights it sums slowly where an image has few positions. In bfloat16 a product of 3x3 patches then
takes less: with AMX for all wide layers on small images ((16, 448, 4, 4) half the time forward,
(2, 2560, 8, 8) a quarter), with avx512_bf16 for few positions in all only ((2, 1280, 8, 8) four
fifths with backward, (1, 448, 4, 4) three fifths). In float32 it takes longer on the one CPU on
which that was measured (docs/log.md).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.precision import bf16_products
from . import unet
from .layers import Conv3x3, MultiHead, replace_methods
from .sd_unet import FeedForward

AMX = bf16_products() == "amx"  # a constant: torch.compile cannot ask the CPU


def install(network: nn.Module) -> nn.Module:
    """Replace the forwards of a network's layers; returns the network."""
    return replace_methods(network, FAST)


def convolve(conv: Conv3x3, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve by a product of patches where that is faster."""
    channels_last = weight.permute(0, 2, 3, 1).is_contiguous()
    if x.device.type == "cpu" and channels_last and in_bfloat16(x) and patches_pay(x, weight):
        return product_of_patches(x, weight, bias)
    return type(conv)._conv_forward(conv, x, weight, bias)


def in_bfloat16(x: Tensor) -> bool:
    """Tell whether a layer that is given x computes in bfloat16."""
    autocast = torch.is_autocast_enabled("cpu")
    return (torch.get_autocast_dtype("cpu") if autocast else x.dtype) == torch.bfloat16


def patches_pay(x: Tensor, weight: Tensor) -> bool:
    """Tell whether patches take less time than this CPU's convolution in bfloat16."""
    B, _, H, W = x.shape
    narrowest = 64 * math.sqrt(H * W)
    return len(weight) >= narrowest and (AMX or B * H * W <= 128)


def product_of_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve x (B, C, H, W) with weight (C_out, C, 3, 3); all are channels_last, out too."""
    H, W = x.shape[-2:]
    h = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    patches = torch.cat([h[:, i : i + H, j : j + W] for i in range(3) for j in range(3)], 3)
    return F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


def group_norm(norm: unet.GroupNorm, x: Tensor) -> Tensor:
    """Normalise in float32: bfloat16 is slow where a group is narrower than a vector."""
    narrow = norm.num_channels < 16 * norm.num_groups
    if x.device.type == "cpu" and narrow:
        return type(norm).forward(norm, x.float()).to(x.dtype)
    return type(norm).forward(norm, x)


def attend(layer: MultiHead, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend in float32 where the backward of bfloat16 is slow to start.

    77 tokens of 12 x 64 channels take 10 ms against 4 in float32, 4096 of 8 x 40 take 904 against
    1044. Forward, bfloat16 is always faster.
    """
    training = any(x.requires_grad for x in (q, k, v))
    short = q[0].numel() // layer.heads <= 2**14
    if q.device.type == "cpu" and training and short:
        return attend_in_float32(layer, q, k, v)
    return type(layer).attend(layer, q, k, v)


def attend_in_float32(layer: MultiHead, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type != "cpu":
        return type(layer).attend(layer, q, k, v)
    with torch.autocast("cpu", enabled=False):
        out = type(layer).attend(layer, q.float(), k.float(), v.float())
    return out.to(q.dtype)


def feed_forward(layer: FeedForward, x: Tensor) -> Tensor:
    """Run 1024 tokens at a time, so that the wide layer stays in the cache.

    With AMX (2, 4096, 320) takes 35 ms instead of 62; with avx512_bf16 it takes no less. In
    training backward needs all of it anyway.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or not AMX:
        return type(layer).forward(layer, x)
    chunks = x.flatten(0, 1).split(1024)
    return torch.cat([layer.net(chunk) for chunk in chunks]).view_as(x)


FAST = [  # what is replaced: the layer, its method, and by what; the last that applies counts
    (Conv3x3, "_conv_forward", convolve),
    (unet.GroupNorm, "forward", group_norm),
    (MultiHead, "attend", attend),
    (unet.Attention, "attend", attend_in_float32),
    (FeedForward, "forward", feed_forward),
]
