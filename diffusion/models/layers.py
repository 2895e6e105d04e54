"""Layers that the networks share: convolutions, attention, the embedding of time.

Plain definitions only; cpu.py replaces some forwards by faster ones for CPUs.
Shapes: B batch, C channels, H W pixels, N tokens (the H W positions of an image), E embedding.
"""

import math
from types import MethodType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cond import VECTOR, Cond


def zero_init(layer: nn.Module) -> nn.Module:
    """Set a layer to zero: a branch that ends in it leaves its block the identity at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def replace_methods(network: nn.Module, table) -> nn.Module:
    """Replace methods of a network's layers by rows (kind of layer, name, function); return it."""
    for module in network.modules():
        for kind, name, function in table:
            if isinstance(module, kind):
                setattr(module, name, MethodType(function, module))
    return network


def sinusoids(t: Tensor, dim: int, shift: float = 0) -> Tensor:
    """Embed t (B,) as sines, then cosines (DDPM appendix B): (B, dim) float32.

    shift: DDPM's code has 1 and ends at frequency 1e-4; with 0 the last one is a bit higher.
    """
    half = dim // 2
    i = torch.arange(half, device=t.device, dtype=torch.float32)
    angle = t.float()[:, None] * torch.exp(-math.log(10_000) / (half - shift) * i)
    return torch.cat([angle.sin(), angle.cos()], 1)


class Checkpointed(nn.Module):
    """Run a network's blocks, with gradient checkpointing if `checkpointing` is set.

    dim_emb: width of the embedding. vector: the layer that `read_vector` makes.
    """

    checkpointing = False

    def run(self, block: nn.Module, *args) -> Tensor:
        """Call a block; with checkpointing, keep only its inputs and recompute it in backward."""
        if self.checkpointing and self.training:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def read_vector(self) -> None:
        """Let the network read cond.vector, which at first changes nothing."""
        self.vector = nn.Linear(VECTOR, self.dim_emb, bias=False)
        nn.init.zeros_(self.vector.weight)

    def conditioned(
        self, emb: Tensor, t: Tensor, cond: Cond, classes: nn.Embedding | None
    ) -> Tensor:
        """Add class and vector to the embedding (B, E) of t (B,)."""
        if classes is not None:
            labels = cond.labels
            if labels is None:
                labels = torch.full_like(t, self.null_label, dtype=torch.long)
            emb = emb + classes(labels)
        return emb if cond.vector is None else emb + self.vector(cond.vector)


# --- convolutions --------------------------------------------------------------------------------


class Conv3x3(nn.Conv2d):
    """Convolve by 3x3 and keep the size."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True):
        super().__init__(dim_in, dim_out, 3, padding=1, bias=bias)


class WSConv3x3(Conv3x3):
    """Convolve with standardised weights (arXiv:1903.10520).

    Each filter has mean 0 and variance 1 / fan_in, so that activations keep their scale: without
    the gain a 3x3 convolution of 512 channels multiplies it by 68 and float16 overflows. One eps
    for all dtypes, and float32 throughout: the function does not change under autocast.
    """

    def reset_parameters(self) -> None:
        """Initialise the weights, whose scale sets how far a step of Adam turns them.

        The output does not depend on it. 0.01 is the same for all widths, and fast enough for a
        learning rate of 1e-3.
        """
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardised().to(x.dtype), self.bias)

    def standardised(self) -> Tensor:
        """Return the weights that convolve: (C_out, C_in, 3, 3) float32, channels_last."""
        w = self.weight.float().permute(0, 2, 3, 1)  # no copy where weights are channels_last
        fan_in = w[0].numel()
        gain = w.new_full((fan_in,), fan_in**-0.5)
        w = F.layer_norm(w.flatten(1), (fan_in,), gain, eps=1e-5 / fan_in).view(w.shape)
        return w.permute(0, 3, 1, 2)


# --- attention -----------------------------------------------------------------------------------


def to_tokens(x: Tensor) -> Tensor:
    """Flatten an image (B, C, H, W) to tokens (B, N, C); no copy where it is channels_last."""
    return rearrange(x, "b c h w -> b (h w) c")


def to_image(x: Tensor, H: int) -> Tensor:
    """Undo `to_tokens`, without a copy: the image is channels_last."""
    return rearrange(x, "b (h w) c -> b c h w", h=H)


class MultiHead(nn.Module):
    """Attend with several heads. The layers' projections differ as the names in files do."""

    def __init__(self, heads: int, causal: bool = False):
        super().__init__()
        self.heads = heads
        self.causal = causal

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix values by softmax(q k^T / sqrt(D)): q (B, N, C), k and v (B, M, C) -> (B, N, C)."""
        q, k, v = map(self.split, (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return out.transpose(1, 2).flatten(2)

    def split(self, x: Tensor) -> Tensor:
        """Split channels into heads: (B, N, C) -> (B, heads, N, D)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
