"""What turns images into what is diffused, x0, and back: training encodes, sampling decodes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.batches import move, to_unit
from ..data.latents import settings_digest, weights_digest
from ..models.vae import AutoencoderKL, sample


@dataclass(frozen=True, eq=False)
class PixelCodec:
    """Diffuse the images themselves: x0 (B, 3, H, W) in [-1, 1]."""

    device: torch.device = torch.device("cpu")
    channels = 3
    factor = 1  # pixels of a side of x0's
    clip = True  # x0 is known to lie in [-1, 1]
    digests = {}  # of frozen networks that x0 depends on

    def x0(self, batch: Batch, noise: Tensor | None = None) -> Tensor:
        """Encode a batch of training images."""
        return to_unit(batch.pixels, self.device)

    def encode(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) in [-1, 1] into x0."""
        return images.to(self.device)

    def decode(self, x: Tensor) -> Tensor:
        """Turn x0 into images (B, 3, H, W) float32."""
        return x


@dataclass(frozen=True, eq=False)
class LatentCodec:
    """Diffuse the latents of a frozen VAE: x0 (B, C, H / factor, W / factor), about N(0, 1).

    amp: autocast type of training's encoding, None for float32.
    tile: None, or the side in latent pixels of overlapping tiles that are coded one by one.
    """

    vae: AutoencoderKL
    device: torch.device = torch.device("cpu")
    amp: torch.dtype | None = None
    tile: int | None = None
    clip = False

    @property
    def channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def factor(self) -> int:
        return self.vae.factor

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give mean and log-variance of the latents of images in [-1, 1], each (B, C, h, w)."""
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, self.amp, enabled=self.amp is not None),
        ):
            return self.vae.encode(x)

    def x0(self, batch: Batch, noise: Tensor | None = None) -> Tensor:
        """Sample the latents of a batch from the VAE's distribution; its mean without noise."""
        if batch.moments is None:
            mean, logvar = (v.float() for v in self.moments(to_unit(batch.pixels, self.device)))
        else:
            mean, logvar = move(batch.moments, self.device).float().unbind(1)
        return self.vae.scale(mean if noise is None else sample(mean, logvar, noise))

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) in [-1, 1] into the mean of their latents, scaled."""
        mean, _ = self._run(self.vae.encode, images, tile=self.tile)
        return self.vae.scale(mean.float())

    @torch.inference_mode()
    def decode(self, x: Tensor) -> Tensor:
        """Turn scaled latents into images (B, 3, H, W) float32, large ones one by one."""
        large = x.shape[-2] * x.shape[-1] * self.factor**2 >= 512**2  # a batch needs gigabytes
        z = self.vae.unscale(x)
        return self._run(self.vae.decode, z, tile=self.tile, slicing=large).float()

    def _run(self, function: Callable, x: Tensor, **options):
        weight = next(self.vae.parameters())
        return function(x.to(weight.device, weight.dtype), **options)

    @cached_property
    def digests(self) -> dict:
        """Describe the frozen networks that x0 depends on."""
        c = self.vae.config
        return {
            "VAE": weights_digest(self.vae),
            "VAE's scale": [c.scaling_factor, c.shift_factor],
            "VAE configuration": settings_digest(c.to_dict()),
        }
