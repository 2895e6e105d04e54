"""--mode vae: the network that turns images into latents and back, trained from scratch.

    loss = |x - decode(z)| + kl_weight KL(q(z|x) || N(0, 1)) [+ perceptual_weight LPIPS]

per value of the image, z sampled from q (arXiv:2112.10752, section 3.1 and appendix G).
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .. import UserError
from ..config import Config, sides, size_text
from ..data.batch import Batch
from ..data.batches import open_batches, to_unit
from ..evaluation.diversity import open_lpips
from ..models.build import build, vae_config
from ..models.configs import VAEConfig
from ..models.vae import sample
from ..pictures.grid import grid, to_uint8
from ..runtime import distributed as dist
from ..runtime.precision import amp_dtype
from ..runtime.seeding import generator
from .finetune import Everything, start_from
from .finetune_config import Base
from .recipe import heldout_noise

SCALE_IMAGES = 256  # images whose latents' standard deviation becomes the scaling factor


class KLAutoencoder(nn.Module):
    """Run the VAE as one call: x (B, 3, H, W), eps (B, Z, h, w) -> decoded image, mean, logvar."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.vae = build("vae", config)

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.vae.encode(x)
        return self.vae.decode(sample(mean.float(), logvar.float(), eps)), mean, logvar


def build_autoencoder(c: Config) -> KLAutoencoder:
    """Build the network that is trained, with new weights."""
    return KLAutoencoder(vae_config(c.unet_dim, c.dim_mults, c.latent_channels, c.image_size))


class Images(NamedTuple):
    """Hold images x (b, 3, H, W) and the noise of their latents, (b, Z, h, w)."""

    x: Tensor
    eps: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """List both."""
        return tuple(self)

    def refilled(self, tensors: tuple[Tensor, ...]) -> "Images":
        """Hold others."""
        return Images(*tensors)


class AutoencoderRecipe:
    """Train, by a recipe as in recipe.py, the network that others have for a codec."""

    def __init__(self, config: Config, device: torch.device):
        self.config = config
        self.device = device
        self.factor = 2 ** (len(config.dim_mults) - 1)
        if any(side % self.factor for side in sides(config.image_size)):
            raise UserError(
                f"image_size {size_text(config.image_size)} is no multiple of {self.factor}, what "
                f"a VAE of {len(config.dim_mults)} levels divides it by"
            )
        self.batches = open_batches(config)
        self.trainable = Everything(config)
        weight = config.perceptual_weight
        self.perceptual = open_lpips(device, "vgg", "perceptual_weight") if weight else None

    # --- the network

    def build(self) -> nn.Module:
        return build_autoencoder(self.config).to(memory_format=torch.channels_last)

    def start(self, model: nn.Module, base: Base | None, fresh: bool) -> None:
        if base is not None and fresh:
            start_from(model, base, self.config)

    def check(self, model: nn.Module) -> None:
        """Do nothing: a VAE has no sampler that could be set wrongly."""

    def check_checkpoint(self, state: dict) -> None:
        """Do nothing: a VAE needs no frozen networks."""

    def metadata(self, model: nn.Module) -> dict:
        """Describe the network, with the factor that scales its latents to a deviation of 1."""
        networks = {"vae": model.vae.config.to_dict() | {"scaling_factor": self.scale(model)}}
        return {"classes": list(self.batches.classes), "networks": networks}

    @torch.inference_mode()
    def scale(self, model: nn.Module) -> float:
        z = []
        n = min(SCALE_IMAGES, len(self.batches.held_out) or SCALE_IMAGES)
        for low in range(0, n, 32):
            mean, logvar = model.vae.encode(self.shown(low, min(low + 32, n)))
            eps = torch.randn(mean.shape, generator=generator(self.config.seed, "scale", low))
            z.append(sample(mean.float().cpu(), logvar.float().cpu(), eps))
        return 1 / float(torch.cat(z).std())

    def shown(self, low: int, high: int) -> Tensor:
        """Give images to look at, (b, 3, H, W): held-out ones, else training images."""
        if len(self.batches.held_out):
            pixels = self.batches.held_out_batch(low, high).pixels
        else:
            B = self.config.batch_size
            rows = [self.batches(i // B, i % B, i % B + 1).pixels for i in range(low, high)]
            pixels = torch.cat(rows)
        return to_unit(pixels, self.device)

    # --- a step

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        h, w = sides(self.config.image_size)
        return (self.config.latent_channels, h // self.factor, w // self.factor)

    def draw(self, step: int) -> Tensor:
        """Sample the noise of a step's latents, (B, Z, h, w)."""
        shape = (self.config.batch_size, *self.latent_shape)
        g = generator(self.config.seed, "noise", step, device=self.device)
        return torch.randn(shape, generator=g, device=self.device)

    def inputs_of(self, step: int, batch: Batch, draw: Tensor, low: int, high: int) -> "Images":
        """Put together what the loss of samples low ... high-1 of a step, in batch, needs."""
        return Images(to_unit(batch.pixels, self.device), draw[low:high])

    def loss(self, network, inputs: "Images") -> Tensor:
        """Give the loss of each image, (b,)."""
        x, eps = inputs
        decoded, mean, logvar = (v.float() for v in network(x, eps))
        values = x[0].numel()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1) / values
        loss = (x - decoded).abs().flatten(1).mean(1) + self.config.kl_weight * kl
        if self.perceptual is not None:
            loss = loss + self.config.perceptual_weight * self.perceptual(x, decoded).flatten()
        return loss

    # --- every few hundred steps

    def heldout_losses(self, network, low: int, high: int) -> Tensor:
        x = to_unit(self.batches.held_out_batch(low, high).pixels, self.device)
        eps = heldout_noise(self.config.seed, low, high, self.latent_shape)
        return self.loss(network, Images(x, eps.to(self.device)))

    @torch.inference_mode()
    def sample_grid(self, model: nn.Module, micro: int) -> Image.Image | None:
        """Draw rows of images, each above what becomes of it, on rank 0."""
        if not dist.is_main():
            return None
        dtype = amp_dtype(self.config.amp, self.device)
        n = min(self.config.num_samples, len(self.batches.held_out) or SCALE_IMAGES)
        columns = min(8, n)
        rows = []
        for low in range(0, n, columns):
            x = self.shown(low, min(low + columns, n))
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                mean, _ = model.vae.encode(x)
                decoded = model.vae.decode(mean)
            blank = np.full((columns - len(x), *x.shape[2:], 3), 255, np.uint8)
            rows += [to_uint8(x), blank, to_uint8(decoded), blank]
        return grid(np.concatenate(rows), columns)
