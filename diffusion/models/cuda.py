"""Run a network faster on CUDA GPUs: `install` replaces forwards of its layers by these.

A network computes the same without them, and elsewhere they do nothing. Most time that is not
convolutions goes into what moves memory: each kernel here reads and writes channels_last tensors
once where torch's chain of operations casts and transposes them. They are written in Triton, which
comes with torch for CUDA. torch.compile leaves them as they are, and fuses what is between them.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cpu, unet
from .layers import Conv3x3, WSConv3x3, replace_methods, to_image, to_tokens
from .sd_blocks import ResnetBlock2D, Upsample2D


def install(network: nn.Module) -> nn.Module:
    """Replace the forwards of a network's layers; returns the network."""
    return replace_methods(network, FAST)


WORKING: dict[int, bool] = {}  # whether kernels run, by the number of the GPU
COMPILABLE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)  # as was tried


def works(device: torch.device) -> bool:
    """Tell whether kernels can be compiled for a GPU and run, by trying one.

    To be called before torch.compile, which goes the way that is known by then.
    """
    if device.index not in WORKING:
        WORKING[device.index] = device.type == "cuda" and tried(device)
    return WORKING[device.index]


def tried(device: torch.device) -> bool:
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from .triton_norm import norm_act

        norm_act(torch.zeros(1, 8, 1, 1, device=device), nn.GroupNorm(1, 8, device=device))
    except Exception as error:  # no triton, no compiler, no Python.h ...
        warnings.warn(
            f"training and sampling are slower without Triton's kernels: {error}", stacklevel=1
        )
        return False
    return True


def fits(x: Tensor) -> bool:
    """Tell whether a kernel takes this tensor. They compute in float32."""
    takes = x.is_cuda and x.dtype != torch.float64
    return takes and (COMPILABLE or not torch.compiler.is_compiling()) and works(x.device)


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Normalise without leaving channels_last."""
    if fits(x) and x.dim() == 4:
        from .triton_norm import norm_act

        return norm_act(x, norm, silu=False)
    if isinstance(norm, unet.GroupNorm):
        return cpu.group_norm(norm, x)
    return type(norm).forward(norm, x)


def block(
    layer: unet.Block, x: Tensor, film: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Normalise, FiLM, SiLU, and add a residual, in one go."""
    if not fits(x):
        return type(layer).forward(layer, x, film)
    from .triton_norm import norm_act

    return norm_act(layer.conv(x), layer.norm, film, residual)


def res_block(layer: unet.ResBlock, x: Tensor, emb: Tensor) -> Tensor:
    """Let the second block add the skip."""
    if not fits(x):
        return type(layer).forward(layer, x, emb)
    h = layer.block1(x, layer.modulation(emb))
    return layer.block2(layer.dropout(h), None, layer.skip(x))


def ws_conv(layer: WSConv3x3, x: Tensor) -> Tensor:
    """Standardise and cast the weights in one go."""
    if not fits(x):
        return type(layer).forward(layer, x)
    from .triton_weights import standardised

    return layer._conv_forward(x, standardised(layer.weight, x.dtype), layer.bias)


def linear_attention(layer: unet.LinearAttention, x: Tensor) -> Tensor:
    """Attend without a copy of q, k and v."""
    if not fits(x):
        return type(layer).forward(layer, x)
    from . import triton_attention

    qkv = layer.to_qkv(to_tokens(layer.norm(x)))
    if triton_attention.fits(qkv, layer.heads):
        out = triton_attention.linear_attention(qkv, layer.heads)
    else:
        out = layer.attend(*qkv.chunk(3, -1))
    return x + to_image(layer.to_out(out), x.shape[2])


def resnet_block(layer: ResnetBlock2D, x: Tensor, emb: Tensor | None = None) -> Tensor:
    """Run Stable Diffusion's block with SiLU as a part of its norms."""
    if not fits(x):
        return type(layer).forward(layer, x, emb)
    from .triton_norm import norm_act

    h = layer.conv1(norm_act(x, layer.norm1))
    if emb is not None:
        h = h + layer.time_emb_proj(emb)[:, :, None, None]
    return layer.conv_shortcut(x) + layer.conv2(norm_act(h, layer.norm2))


def upsample(layer: nn.Upsample, x: Tensor) -> Tensor:
    """Repeat pixels in their own type, of which autocast makes float32."""
    if not fits(x):
        return type(layer).forward(layer, x)
    from . import triton_images

    return triton_images.upsample(x)


def upsample_2d(layer: Upsample2D, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Repeat pixels in their own type."""
    if not fits(x) or size not in (None, (2 * x.shape[2], 2 * x.shape[3])):
        return type(layer).forward(layer, x, size)
    from . import triton_images

    return layer.conv(triton_images.upsample(x))


def convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Add the bias, and sum its gradient, by kernels for channels_last images.

    A convolution by 1x1 that needs no gradients is one matrix product, bias and all.
    """
    if bias is None or not fits(x):
        if isinstance(layer, Conv3x3):
            return cpu.convolve(layer, x, weight, bias)
        return type(layer)._conv_forward(layer, x, weight, bias)
    pointwise = layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)
    if pointwise and layer.groups == 1 and not torch.is_grad_enabled():
        return to_image(F.linear(to_tokens(x), weight.flatten(1), bias), x.shape[2])
    from . import triton_images

    y = type(layer)._conv_forward(layer, x, weight, None)
    return triton_images.add(y.contiguous(memory_format=torch.channels_last), bias)


FAST = [  # what is replaced: the layer, its method, and by what
    (nn.Conv2d, "_conv_forward", convolve),
    (nn.GroupNorm, "forward", group_norm),
    (unet.Block, "forward", block),
    (unet.ResBlock, "forward", res_block),
    (WSConv3x3, "forward", ws_conv),
    (unet.LinearAttention, "forward", linear_attention),
    (ResnetBlock2D, "forward", resnet_block),
    (nn.Upsample, "forward", upsample),
    (Upsample2D, "forward", upsample_2d),
]
