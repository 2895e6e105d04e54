"""Blocks of Stable Diffusion's U-Net and VAE: ResBlocks, attention, changes of size.

Modules bear the names that the published weight files give them, here and in sd_unet.py, vae.py
and clip.py, so that those files load without renaming.
Shapes: B batch, C channels, H W pixels, N = HW positions, E time embedding.
"""

from collections.abc import Iterator
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Conv3x3, MultiHead, to_image, to_tokens


class Attention(MultiHead):
    """Multi-head attention of tokens (B, N, dim) to themselves or a context (B, M, dim_context)."""

    def __init__(self, dim: int, heads: int, dim_context: int | None = None, bias: bool = False):
        super().__init__(heads)
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim_context or dim, dim, bias=bias)
        self.to_v = nn.Linear(dim_context or dim, dim, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return self.to_out(self.attend(self.to_q(x), self.to_k(context), self.to_v(context)))


class AttnBlock(Attention):
    """Attention among the positions of an image (B, C, H, W), added to it. It takes no context."""

    def __init__(self, dim: int, heads: int, groups: int, eps: float):
        super().__init__(dim, heads, bias=True)
        self.group_norm = nn.GroupNorm(groups, dim, eps=eps)

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return x + to_image(super().forward(to_tokens(self.group_norm(x))), x.shape[2])


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Normalise, then apply SiLU; in inference in place: half the time at the VAE's wide levels."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class ResnetBlock2D(nn.Module):
    """Two times norm, SiLU, 3x3 convolution, and a skip; the time embedding is added between them.

    emb: SiLU of the time embedding, (B, E); None in the VAE.
    """

    def __init__(self, dim_in: int, dim_out: int, groups: int, eps: float, dim_emb: int = 0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, dim_in, eps=eps)
        self.conv1 = Conv3x3(dim_in, dim_out)
        if dim_emb:
            self.time_emb_proj = nn.Linear(dim_emb, dim_out)
        self.norm2 = nn.GroupNorm(groups, dim_out, eps=eps)
        self.conv2 = Conv3x3(dim_out, dim_out)
        self.conv_shortcut = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        if emb is not None:
            h = h + self.time_emb_proj(emb)[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(norm_silu(self.norm2, h))


class Downsample2D(nn.Module):
    """3x3 convolution of stride 2. The U-Net pads all sides by 1, the VAE right and below only."""

    def __init__(self, dim: int, padding: int = 1):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Nearest neighbour to twice the size, or to `size` (H, W), then a 3x3 convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = Conv3x3(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        H, W = x.shape[-2:]
        return self.conv(F.interpolate(x, size or (2 * H, 2 * W), mode="nearest"))


class Level(nn.Module):
    """Hold a resolution's blocks: ResBlocks, each followed by attention if any, and a resize.

    The VAE calls a level; the U-Net, which has skips, goes through its blocks.
    """

    def __init__(self, resnets, attentions=(), downsamplers=(), upsamplers=()):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList(downsamplers)
        self.upsamplers = nn.ModuleList(upsamplers)

    def layers(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """Go through the ResBlocks, each with the attention after it, None if there is none."""
        return zip_longest(self.resnets, self.attentions)

    def forward(self, x: Tensor) -> Tensor:
        for resnet, attention in self.layers():
            x = resnet(x)
            x = x if attention is None else attention(x)
        for resize in (*self.downsamplers, *self.upsamplers):
            x = resize(x)
        return x
