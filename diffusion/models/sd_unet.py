"""The U-Net of Stable Diffusion 1.x and 2.x (arXiv:2112.10752), for latents and a text's tokens.

    conv_in -> [ResBlock transformer] x 2, down      per level; the last has no transformers
            -> ResBlock transformer ResBlock
            -> [ResBlock transformer] x 3, up        per level -> norm, SiLU, conv_out

Skips run from conv_in, each layer and each downsampling to the layers on the way up. A transformer
attends among the positions, then to the context, and ends with a gated MLP.
Shapes: B batch, C channels, H W latent pixels, N = HW positions, L tokens, D their width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cond import NOTHING, Cond
from .configs import UNetConfig
from .layers import Checkpointed, sinusoids, to_image, to_tokens, zero_init
from .sd_blocks import (
    Attention,
    AttnBlock,
    Downsample2D,
    Level,
    ResnetBlock2D,
    Upsample2D,
    norm_silu,
)


class GEGLU(nn.Module):
    """a gelu(gate) of a projection twice as wide (arXiv:2002.05202); a is its first half."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        a, gate = self.proj(x).chunk(2, dim=-1)
        return a * F.gelu(gate)


class FeedForward(nn.Module):
    """Run a gated MLP on tokens (B, N, C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Tokens (B, N, C): self-attention, attention to the context (B, L, D), gated MLP; pre-norm."""

    def __init__(self, dim: int, heads: int, dim_context: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn1 = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.attn2 = Attention(dim, heads, dim_context)
        self.norm3 = nn.LayerNorm(dim, eps=1e-5)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """Run a transformer block on the positions of an image (B, C, H, W), added to it.

    linear: SD 2's projections in and out are linear layers, SD 1's 1x1 convolutions.
    """

    def __init__(self, dim: int, heads: int, dim_context: int, groups: int, linear: bool):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)  # the ResBlocks' is 1e-5
        self.proj_in = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(dim, heads, dim_context)])
        self.proj_out = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        H = x.shape[2]
        h = self.norm(x)
        h = self.proj_in(to_tokens(h)) if self.linear else to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + (to_image(self.proj_out(h), H) if self.linear else self.proj_out(to_image(h, H)))


class TimestepEmbedding(nn.Module):
    """Embed the sinusoids of t by a two-layer MLP."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, dim_out)
        self.linear_2 = nn.Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class SDUNet(Checkpointed):
    """Predict from x (B, C, H, W), t (B,) real and cond -> (B, out_channels, H, W).

    cond: the context (B, L, D) of a network with cross-attention; the labels (B,) int64 of one
        with classes, None means the null label; the image of one that inpaints.
    Any H and W: odd sides are rounded up on the way down.
    A new network's output is zero, and so is every branch beside a skip: as LDM starts training.
    Raises ValueError for a missing context.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = c = config
        self.null_label = c.num_classes
        kinds = (*c.down_block_types, c.mid_block_type, *c.up_block_types)
        self.takes_context = any("CrossAttn" in kind for kind in kinds)
        dims = c.block_out_channels
        last = len(c.block_out_channels) - 1
        groups = c.norm_num_groups
        self.dim_emb = E = 4 * dims[0]

        def res(dim_in: int, dim_out: int) -> ResnetBlock2D:
            return ResnetBlock2D(dim_in, dim_out, groups, c.norm_eps, E)

        def attention(kind: str, level: int, layers: int) -> list[nn.Module]:
            d = dims[level]
            n = c.heads[level]
            if "CrossAttn" in kind:
                options = (d, n, c.cross_attention_dim, groups, c.use_linear_projection)
                return [Transformer2DModel(*options) for _ in range(layers)]
            if "Attn" in kind:
                return [AttnBlock(d, d // n, groups, c.norm_eps) for _ in range(layers)]
            return []

        self.time_embedding = TimestepEmbedding(dims[0], E)
        self.class_embedding = nn.Embedding(c.num_classes + 1, E) if c.num_classes else None
        self.conv_in = nn.Conv2d(c.in_channels, dims[0], 3, padding=1)

        x = dims[0]
        skips = [dims[0]]
        L = c.layers_per_block  # x, skips: numbers of channels
        self.down_blocks = nn.ModuleList()
        for i, d in enumerate(dims):
            resnets = [res(x, d), *(res(d, d) for _ in range(L - 1))]
            down = [Downsample2D(d)] if i < last else []
            attentions = attention(c.down_block_types[i], i, L)
            self.down_blocks.append(Level(resnets, attentions, downsamplers=down))
            x = d
            skips = skips + [d] * (L + len(down))

        resnets = [res(x, x)] if c.mid_block_type == "UNetMidBlock2D" else [res(x, x), res(x, x)]
        self.mid_block = Level(resnets, attention(c.mid_block_type, last, 1))

        self.up_blocks = nn.ModuleList()
        for i, d in reversed(list(enumerate(dims))):
            resnets = [res(x + skips.pop(), d), *(res(d + skips.pop(), d) for _ in range(L))]
            up = [Upsample2D(d)] if i else []
            attentions = attention(c.up_block_types[last - i], i, L + 1)
            self.up_blocks.append(Level(resnets, attentions, upsamplers=up))
            x = d

        self.conv_norm_out = nn.GroupNorm(groups, x, eps=c.norm_eps)
        self.conv_out = nn.Conv2d(x, c.out_channels, 3, padding=1)
        self.start_at_zero()

    def start_at_zero(self) -> None:
        """Set the last layer and that of each branch to zero."""
        zero_init(self.conv_out)
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                zero_init(module.conv2)
            elif isinstance(module, Transformer2DModel):
                zero_init(module.proj_out)
            elif isinstance(module, AttnBlock):
                zero_init(module.to_out[0])

    def forward(self, x: Tensor, t: Tensor, cond: Cond = NOTHING) -> Tensor:
        context = cond.context if self.takes_context else None
        if self.takes_context and context is None:
            raise ValueError(
                f"this network attends to a context: give one (B, L, "
                f"{self.config.cross_attention_dim}), got None"
            )
        emb = self.embed(x, t, cond)

        if cond.image is not None:
            x = torch.cat([x, cond.image], 1)
        x = self.conv_in(x)

        skips = [x]
        for level in self.down_blocks:
            for layer in level.layers():
                x = self.layer(layer, x, emb, context)
                skips.append(x)
            for down in level.downsamplers:
                x = down(x)
                skips.append(x)

        for layer in self.mid_block.layers():
            x = self.layer(layer, x, emb, context)

        for level in self.up_blocks:
            for layer in level.layers():
                x = self.layer(layer, torch.cat([x, skips.pop()], 1), emb, context)
            for up in level.upsamplers:
                x = up(x, skips[-1].shape[-2:])

        return self.conv_out(norm_silu(self.conv_norm_out, x))

    def embed(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Embed time, class and vector, with the SiLU that all ResBlocks would apply: (B, E)."""
        c = self.config
        waves = sinusoids(t, c.block_out_channels[0], c.freq_shift)
        if c.flip_sin_to_cos:
            waves = torch.cat(waves.chunk(2, dim=1)[::-1], 1)
        emb = self.time_embedding(waves.to(x.dtype))
        return F.silu(self.conditioned(emb, t, cond, self.class_embedding))

    def layer(self, layer, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        """Run a ResBlock and, if there, the attention after it."""
        resnet, attention = layer
        x = self.run(resnet, x, emb)
        return x if attention is None else self.run(attention, x, context)
