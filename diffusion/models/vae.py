"""The VAE of Stable Diffusion (arXiv:2112.10752, section 3.1): images to latents and back.

    encoder: conv_in -> [ResBlock x 2, down] per level -> ResBlock attention ResBlock -> conv_out
             -> quant_conv -> mean, logvar
    decoder: post_quant_conv -> conv_in -> ResBlock attention ResBlock -> [ResBlock x 3, up] per
             level -> conv_out

Run it in float32 or bfloat16: its activations exceed float16's range of 65,504.
Shapes: B batch, H W image pixels, h w latent pixels, H = h f with f = 2^(levels-1), Z channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .configs import VAEConfig
from .sd_blocks import (
    AttnBlock,
    Downsample2D,
    Level,
    ResnetBlock2D,
    Upsample2D,
    norm_silu,
)

EPS = 1e-6  # of every norm; the U-Net's ResBlocks have 1e-5


def middle(dim: int, groups: int) -> Level:
    """Make the blocks of the lowest resolution: ResBlock, attention, ResBlock."""
    resnets = [ResnetBlock2D(dim, dim, groups, EPS) for _ in range(2)]
    return Level(resnets, [AttnBlock(dim, 1, groups, EPS)])


class Encoder(nn.Module):
    """Encode images (B, 3, H, W) to (B, 2 Z, h, w)."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        dims = c.block_out_channels
        groups = c.norm_num_groups
        x = dims[0]
        self.conv_in = nn.Conv2d(c.in_channels, x, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, d in enumerate(dims):
            ins = [x] + [d] * (c.layers_per_block - 1)
            down = [Downsample2D(d, padding=0)] if i < len(dims) - 1 else []
            resnets = [ResnetBlock2D(n, d, groups, EPS) for n in ins]
            self.down_blocks.append(Level(resnets, downsamplers=down))
            x = d
        self.mid_block = middle(x, groups)
        self.conv_norm_out = nn.GroupNorm(groups, x, eps=EPS)
        self.conv_out = nn.Conv2d(x, 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in (*self.down_blocks, self.mid_block):
            x = level(x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class Decoder(nn.Module):
    """Decode latents (B, Z, h, w) to images (B, 3, H, W)."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        dims = c.block_out_channels
        groups = c.norm_num_groups
        x = dims[-1]
        self.conv_in = nn.Conv2d(c.latent_channels, x, 3, padding=1)
        self.mid_block = middle(x, groups)
        self.up_blocks = nn.ModuleList()
        for i, d in reversed(list(enumerate(dims))):
            ins = [x] + [d] * c.layers_per_block
            up = [Upsample2D(d)] if i else []
            resnets = [ResnetBlock2D(n, d, groups, EPS) for n in ins]
            self.up_blocks.append(Level(resnets, upsamplers=up))
            x = d
        self.conv_norm_out = nn.GroupNorm(groups, x, eps=EPS)
        self.conv_out = nn.Conv2d(x, c.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.conv_in(z)
        for level in (self.mid_block, *self.up_blocks):
            z = level(z)
        return self.conv_out(norm_silu(self.conv_norm_out, z))


class AutoencoderKL(nn.Module):
    """`encode` and `decode`; images are in [-1, 1], latents unscaled.

    tile: None, or the side in latent pixels of overlapping tiles that are run one after the other
        and blended, so that memory does not grow with the image. Each tile has its own norms and
        attention: the result is close to that without tiles, not equal to it.
    slicing: one image after the other.
    Sides are cut to multiples of f.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        Z = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * Z, 2 * Z, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(Z, Z, 1) if config.use_post_quant_conv else nn.Identity()

    def encode(self, x: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        """Encode images (B, 3, H, W) to the mean and log-variance of latents, (B, Z, h, w) each."""
        run = lambda x: self.quant_conv(self.encoder(x))
        h = run(x) if tile is None else tiled(run, x, tile, self.factor, 1)
        mean, logvar = h.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor, tile: int | None = None, slicing: bool = False) -> Tensor:
        """Decode latents (B, Z, h, w) to images (B, 3, H, W), which may leave [-1, 1] a little."""
        if slicing:
            return torch.cat([self.decode(one, tile) for one in z.split(1)])
        run = lambda z: self.decoder(self.post_quant_conv(z))
        return run(z) if tile is None else tiled(run, z, tile, 1, self.factor)

    def scale(self, z: Tensor) -> Tensor:
        """Scale latents to what is diffused, of standard deviation about 1."""
        shift = self.config.shift_factor
        return (z if shift is None else z - shift) * self.config.scaling_factor

    def unscale(self, z: Tensor) -> Tensor:
        """Undo `scale`."""
        shift = self.config.shift_factor
        z = z / self.config.scaling_factor
        return z if shift is None else z + shift


def sample(mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """Sample a latent from its mean, its log-variance and standard normal noise, of one shape."""
    return mean + (0.5 * logvar).exp() * eps


# --- tiles ---------------------------------------------------------------------------------------


def tiled(
    run: Callable[[Tensor], Tensor], x: Tensor, tile: int, unit_in: int, unit_out: int
) -> Tensor:
    """Compute run(x) on overlapping tiles, blended linearly where they overlap.

    tile: a tile's side in units, of which neighbours share a quarter or more. A unit is unit_in
    pixels of x and unit_out pixels of run(x).
    """
    B, _, H, W = x.shape
    rows, columns = (cuts(side // unit_in, tile, unit_out, x.device) for side in (H, W))
    out = None
    for top, weight_y in rows:
        for left, weight_x in columns:
            y0 = top * unit_in
            x0 = left * unit_in
            part = run(x[:, :, y0 : y0 + tile * unit_in, x0 : x0 + tile * unit_in])
            if out is None:
                sides = H // unit_in * unit_out, W // unit_in * unit_out
                out = part.new_zeros(B, part.shape[1], *sides, dtype=torch.float32)
            y0 = top * unit_out
            x0 = left * unit_out
            weight = weight_y[:, None] * weight_x
            out[:, :, y0 : y0 + len(weight_y), x0 : x0 + len(weight_x)] += part.float() * weight
    return out.to(part.dtype)


def cuts(n: int, tile: int, unit: int, device: torch.device) -> list[tuple[int, Tensor]]:
    """Cut a side of n units into tiles: where each begins, and the weights of its pixels.

    Weights fall linearly from the middle to the borders; at each pixel their sum is 1.
    """
    tile = min(tile, n)
    starts = [*range(0, n - tile, tile - tile // 4), n - tile]
    i = torch.arange(tile * unit, device=device) + 0.5
    weight = torch.minimum(i, i.flip(0))
    pixels = [slice(start * unit, (start + tile) * unit) for start in starts]
    total = torch.zeros(n * unit, device=device)
    for span in pixels:
        total[span] += weight
    return [(start, weight / total[span]) for start, span in zip(starts, pixels)]
