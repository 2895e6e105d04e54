"""The pixel U-Net: weight-standardised ResBlocks with FiLM, linear and full attention.

    stem 3x3 -> [ResBlock ResBlock attention down] per level -> ResBlock attention ResBlock
             -> [ResBlock ResBlock attention up] per level -> ResBlock -> 1x1

The resolution halves between levels; attention is linear at the outer levels and full at the
innermost and in the middle. Skips run from each ResBlock on the way down to its twin on the way up.
Shapes: B batch, C channels, H W pixels, N = HW positions, D channels of a head, E embedding.
"""

import math
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cond import NOTHING, Cond
from .layers import Checkpointed, MultiHead, WSConv3x3, sinusoids, to_image, to_tokens, zero_init

SILU_GAIN = 1.68  # 1 / sqrt(E[silu(z)^2]), z standard normal


def unit_variance(dim_in: int, dim_out: int, gain: float) -> nn.Linear:
    """Make a linear layer whose output starts at variance 1, not at PyTorch's third of it.

    Along the path of the time embedding these factors multiply: with the defaults FiLM hardly
    knows t for the first few hundred steps.
    """
    layer = nn.Linear(dim_in, dim_out)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(dim_in))
    nn.init.zeros_(layer.bias)
    return layer


class GroupNorm(nn.GroupNorm):
    """Eight groups: with fewer a network learns less per step (docs/log.md)."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(8, channels), channels, eps=1e-5)


class Block(nn.Module):
    """Weight-standardised conv, GroupNorm, FiLM if given, SiLU."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.conv = WSConv3x3(dim_in, dim_out, bias=False)  # the norm has a bias
        self.norm = GroupNorm(dim_out)

    def forward(self, x: Tensor, film: Tensor | None = None) -> Tensor:
        x = self.norm(self.conv(x)).to(x.dtype)
        if film is not None:
            scale, shift = film[:, :, None, None].to(x.dtype).chunk(2, dim=1)
            x = torch.addcmul(shift, x, scale + 1)
        return F.silu(x, inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """Two Blocks and a skip; the time embedding scales and shifts the first (FiLM)."""

    def __init__(self, dim_in: int, dim_out: int, dim_emb: int, dropout: float = 0.0):
        super().__init__()
        self.film = unit_variance(dim_emb, 2 * dim_out, SILU_GAIN)
        self.block1 = Block(dim_in, dim_out)
        self.dropout = nn.Dropout(dropout)
        self.block2 = Block(dim_out, dim_out)
        self.skip = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.block1(x, self.modulation(emb))
        return self.block2(self.dropout(h)) + self.skip(x)

    def modulation(self, emb: Tensor) -> Tensor:
        """Give scale and shift (B, 2 C) of the embedding (B, E)."""
        return self.film(F.silu(emb))


class Attention(MultiHead):
    """Multi-head softmax attention over all positions: x + to_out(attend(q, k, v))."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__(heads)
        self.norm = nn.GroupNorm(1, dim, eps=1e-5)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = zero_init(nn.Linear(heads * dim_head, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(to_tokens(self.norm(x))).chunk(3, dim=-1)
        return x + to_image(self.to_out(self.attend(q, k, v)), x.shape[2])


class LinearAttention(Attention):
    """Attention of cost N D^2 (arXiv:1812.01243): softmax over D of q, over N of k."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix values, (B, N, heads D) each, in float32 at any autocast: k is about 1/N."""
        with torch.autocast(q.device.type, enabled=False):
            context = self.split(k.float()).softmax(-2).mT @ self.split(v.float())
            out = self.split(q.float()).softmax(-1) @ context  # context: (B, heads, D, D)
        return out.transpose(1, 2).flatten(2).to(q.dtype)


class Upsample(nn.Sequential):
    """Double the size by nearest neighbour, then convolve 3x3."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__(
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(dim_in, dim_out, 3, padding=1)
        )


class TimeEmbedding(nn.Module):
    """Sinusoids of t, then a two-layer MLP: (B,) -> (B, E)."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(
            unit_variance(dim, dim_out, math.sqrt(2)),  # a sinusoid's variance is 1/2
            nn.SiLU(),
            unit_variance(dim_out, dim_out, SILU_GAIN),
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoids(t, self.dim))


class UNet(Checkpointed):
    """Predict from x (B, channels, H, W), t (B,) real and cond.labels -> (B, channels, H, W).

    dim: channels of the first level; dim_mults: each level's multiple of it.
    heads: of every attention; each has dim / heads channels, at least min_dim_head.
    num_classes: 0 for an unconditional network; else labels are 0 ... num_classes, of which
        the last, `null_label`, and None mean no label.
    Any H and W: padded to a multiple of 2^(levels-1), and cropped again.
    """

    def __init__(
        self,
        dim: int = 64,
        dim_mults: tuple[int, ...] = (1, 2, 4, 8),
        channels: int = 3,
        num_classes: int = 0,
        heads: int = 4,
        min_dim_head: int = 16,
        dropout: float = 0.0,
    ):
        super().__init__()
        dims = [dim * m for m in dim_mults]
        last = len(dims) - 1
        self.dim_emb = E = 4 * dim
        self.factor = 2**last
        self.null_label = num_classes

        def attention(level: int) -> nn.Module:
            kind = Attention if level == last else LinearAttention
            return kind(dims[level], heads, max(dims[level] // heads, min_dim_head))

        def res(dim_in: int, dim_out: int) -> ResBlock:
            return ResBlock(dim_in, dim_out, E, dropout)

        self.time = TimeEmbedding(dim, E)
        self.label = nn.Embedding(num_classes + 1, E) if num_classes else None
        self.stem = nn.Conv2d(channels, dim, 3, padding=1)

        self.down = nn.ModuleList()
        for i, d in enumerate(dims):
            down = nn.Conv2d(d, dims[i + 1], 3, 2, padding=1) if i < last else nn.Identity()
            self.down.append(nn.ModuleList([res(d, d), res(d, d), attention(i), down]))

        d = dims[-1]
        self.mid = nn.ModuleList([res(d, d), attention(last), res(d, d)])

        self.up = nn.ModuleList()
        for i, d in reversed(list(enumerate(dims))):
            up = Upsample(d, dims[i - 1]) if i else nn.Identity()
            self.up.append(nn.ModuleList([res(2 * d, d), res(2 * d, d), attention(i), up]))

        self.last = res(2 * dim, dim)
        self.out = zero_init(nn.Conv2d(dim, channels, 1))

    def forward(self, x: Tensor, t: Tensor, cond: Cond = NOTHING) -> Tensor:
        H, W = x.shape[-2:]
        pad_h = -H % self.factor
        pad_w = -W % self.factor
        if pad_h or pad_w:
            x = F.pad(x, (0, pad_w, 0, pad_h), mode="replicate")
        emb = self.embed(t, cond)

        x = stem = self.stem(x)

        skips = []
        for res1, res2, attention, down in self.down:
            x = self.run(res1, x, emb)
            skips.append(x)
            x = self.run(attention, self.run(res2, x, emb))
            skips.append(x)
            x = down(x)

        res1, attention, res2 = self.mid
        x = self.run(res2, self.run(attention, self.run(res1, x, emb)), emb)

        for res1, res2, attention, up in self.up:
            x = self.run(res1, torch.cat([x, skips.pop()], 1), emb)
            x = self.run(res2, torch.cat([x, skips.pop()], 1), emb)
            x = up(self.run(attention, x))

        x = self.out(self.run(self.last, torch.cat([x, stem], 1), emb))
        return x[..., :H, :W]

    def embed(self, t: Tensor, cond: Cond) -> Tensor:
        """Give what the ResBlocks read of t (B,) and the condition: (B, E)."""
        return self.conditioned(self.time(t), t, cond, self.label)


def embed_for_all(network: UNet, t: Tensor, cond: Cond) -> Tensor:
    """Give the scales and shifts of all ResBlocks, side by side."""
    return network.films(F.silu(UNet.embed(network, t, cond)))


def join_films(network: UNet) -> None:
    """Compute the scales and shifts of all ResBlocks by one product, of copies of their weights.

    Nothing is done where one of them has hooks, such as a LoRA's.
    """
    blocks = [module for module in network.modules() if isinstance(module, ResBlock)]
    films = [block.film for block in blocks]
    if any(film._forward_hooks or film._forward_pre_hooks for film in films):
        return
    weight, bias = (
        nn.Parameter(torch.cat([getattr(film, name) for film in films]), requires_grad=False)
        for name in ("weight", "bias")
    )
    with torch.device("meta"):
        network.films = nn.Linear(*weight.shape[::-1])
    network.films.weight = weight
    network.films.bias = bias
    network.embed = MethodType(embed_for_all, network)
    first = 0
    for block, film in zip(blocks, films):
        block.modulation = partial(torch.narrow, dim=1, start=first, length=film.out_features)
        first += film.out_features
