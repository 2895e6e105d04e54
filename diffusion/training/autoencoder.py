"""--mode vae: the network that turns images into latents and back, trained from scratch.

    loss = |x - decode(z)| + kl_weight KL(q(z|x) || N(0, 1)) [+ perceptual_weight LPIPS]

per value of the image, z drawn from q (arXiv:2112.10752, section 3.1 and appendix G).
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .. import UserError
from ..config import Config
from ..data.batches import Batch, open_batches, to_unit
from ..evaluation.clip_score import open_lpips
from ..models.configs import VAEConfig
from ..models.vae import AutoencoderKL, sample
from ..pictures.grid import grid, to_uint8
from ..runtime import distributed as dist
from ..runtime.seeding import generator
from ..sampling.pipeline import amp_dtype
from ..sampling.sizes import vae_config
from .recipe import Task

MEASURED = 256  # images whose latents' deviation becomes the scaling factor


class KLAutoencoder(nn.Module):
    """The VAE as one call: x (B, 3, H, W), eps (B, Z, h, w) -> decoded image, mean, logvar."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.vae = AutoencoderKL(config)

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.vae.encode(x)
        return self.vae.decode(sample(mean.float(), logvar.float(), eps)), mean, logvar


class Autoencoding(Task):
    """A task as tasks.py describes it."""

    def __init__(self, config: Config, device: torch.device):
        factor = 2 ** (len(config.dim_mults) - 1)
        if config.image_size % factor:
            raise UserError(
                f"image_size {config.image_size} is no multiple of {factor}, what a "
                f"VAE of {len(config.dim_mults)} levels divides it by"
            )
        self.config = config
        self.device = device
        self.factor = factor
        self.data = open_batches(config)
        self.perceptual = (
            open_lpips(device, "vgg", "perceptual_weight") if config.perceptual_weight else None
        )

    def build(self) -> nn.Module:
        return KLAutoencoder(vae_config(self.config)).to(memory_format=torch.channels_last)

    def result(self, folder: Path) -> str:
        return f"{folder / 'model.pt'}; python train.py --mode latent --vae {folder} --data ..."

    def told(self, model: nn.Module) -> dict:
        """With the scaling factor that brings the latents' deviation to 1."""
        networks = {"vae": model.vae.config.to_dict() | {"scaling_factor": self.scale(model)}}
        return {"classes": list(self.data.classes), "networks": networks}

    @torch.inference_mode()
    def scale(self, model: nn.Module) -> float:
        z = []
        for low in range(0, min(MEASURED, len(self.shown())), 32):
            x = to_unit(self.pixels(range(low, min(low + 32, len(self.shown())))), self.device)
            mean, logvar = model.vae.encode(x)
            eps = torch.randn(mean.shape, generator=generator(self.config.seed, "scale", low))
            z.append(sample(mean.float().cpu(), logvar.float().cpu(), eps))
        return 1 / float(torch.cat(z).std())

    def shown(self):
        """Images that are looked at: the held-out ones, or training images where there are none."""
        return self.data.held_out if len(self.data.held_out) else range(MEASURED)

    def pixels(self, places: range) -> Tensor:
        """(b, 3, H, W) uint8 of `shown`."""
        if len(self.data.held_out):
            return self.data.held_out_batch(places.start, places.stop).pixels
        rows = [
            self.data(
                i // self.config.batch_size,
                i % self.config.batch_size,
                i % self.config.batch_size + 1,
            ).pixels
            for i in places
        ]
        return torch.cat(rows)

    # --- a step

    def draw(self, step: int) -> tuple[Tensor]:
        side = self.config.image_size // self.factor
        shape = (self.config.batch_size, self.config.latent_channels, side, side)
        g = generator(self.config.seed, "noise", step, device=self.device)
        return (torch.randn(shape, generator=g, device=self.device),)

    def loss(self, model, batch: Batch, drawn, low: int, high: int) -> Tensor:
        return self.terms(model, to_unit(batch.pixels, self.device), drawn[0][low:high])

    def terms(self, model, x: Tensor, eps: Tensor) -> Tensor:
        """(B,) losses."""
        decoded, mean, logvar = (v.float() for v in model(x, eps))
        values = x[0].numel()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1) / values
        loss = (x - decoded).abs().flatten(1).mean(1) + self.config.kl_weight * kl
        if self.perceptual is not None:
            loss = loss + self.config.perceptual_weight * self.perceptual(x, decoded).flatten()
        return loss

    # --- every few hundred steps

    @torch.no_grad()
    def heldout_loss(self, model: nn.Module, micro: int) -> float:
        n = len(self.data.held_out)
        total = torch.zeros((), device=self.device)
        pieces = [(low, min(low + micro, n)) for low in range(0, n, micro)]
        for low, high in pieces[dist.rank() :: dist.world_size()]:
            x = to_unit(self.data.held_out_batch(low, high).pixels, self.device)
            side = x.shape[-1] // self.factor
            shape = (self.config.latent_channels, side, side)
            rows = [
                torch.randn(shape, generator=generator(self.config.seed, "held out", i))
                for i in range(low, high)
            ]
            with self.autocast():
                total += self.terms(model, x, torch.stack(rows).to(self.device)).sum()
        return float(dist.all_reduce_sum(total)) / n

    def autocast(self):
        dtype = amp_dtype(self.config.amp, self.device)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def check(self, model: nn.Module) -> None:
        pass  # a VAE has no sampler that could be set wrongly

    @torch.inference_mode()
    def sheet(self, model: nn.Module, micro: int) -> Image.Image | None:
        """Rows of images, each above what becomes of it."""
        if not dist.is_main():
            return None
        n = min(self.config.num_samples, len(self.shown()))
        rows = []
        columns = min(8, n)
        for low in range(0, n, columns):
            x = to_unit(self.pixels(range(low, min(low + columns, n))), self.device)
            with self.autocast():
                mean, _ = model.vae.encode(x)
                again = model.vae.decode(mean)
            blank = [np.full((columns - len(x), *x.shape[2:], 3), 255, np.uint8)]
            rows += [to_uint8(x), *blank, to_uint8(again), *blank]
        return grid(np.concatenate(rows), columns)
