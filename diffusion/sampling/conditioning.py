"""Latent diffusion: prompts -> text encoder -> U-Net on latents -> VAE -> images.

pipeline = assemble.open_pipeline(None, "path/to/stable-diffusion", "ema", torch.device("cpu"))
images = pipeline.sample(range(4), prompts=["a red fox"] * 4, guidance_scale=7.5)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from .. import UserError
from ..models.clip import CLIPTextModel, encode_chunks
from ..models.sd_unet import SDUNet
from ..models.tokenizer import Tokenizer
from ..models.vae import AutoencoderKL
from ..process.samplers import Table, guided, make_table
from .pipeline import Pipeline, amp_dtype


@dataclass(eq=False)
class TextEncoder:
    """Prompts to what the U-Net attends to.

    skip: 1 takes the last layer's output, n the n-th from the end (A1111's and kohya's clip skip).
    """

    tokenizer: Tokenizer
    model: CLIPTextModel
    skip: int = 1

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], chunks: int = 1) -> Tensor:
        """(B, chunks (L - 2) + 2, D); a prompt is cut into `chunks` pieces, each read alone."""
        ids = self.tokenizer(prompts, chunks=chunks)
        return encode_chunks(self.model, ids.to(self.device), skip=self.skip)

    def chunks(self, prompts: Sequence[str]) -> int:
        """How many pieces the longest of the prompts needs."""
        return self.tokenizer.count_chunks(prompts)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass(eq=False)
class TextIds:
    """Prompts to ids, for a network that reads them itself; what is too long is cut off."""

    tokenizer: Tokenizer

    def __call__(self, prompts: Sequence[str], chunks: int = 1) -> Tensor:
        return self.tokenizer(prompts)

    def chunks(self, prompts: Sequence[str]) -> int:
        return 1


class TextConditioned(nn.Module):
    """A U-Net and a text encoder that runs with it: (x, t, ids (B, L)) -> out. skip: its layer."""

    def __init__(self, unet: SDUNet, text: CLIPTextModel, skip: int = 1):
        super().__init__()
        self.unet = unet
        self.text = text
        self.skip = skip

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x, t, self.read(ids))

    def read(self, ids: Tensor) -> Tensor:
        return self.text(ids, self.skip)


@dataclass(eq=False)
class LatentPipeline(Pipeline):
    """A network on latents, the VAE that decodes them, and what reads prompts.

    scheduler: what of scheduler_config.json decides on timesteps. height, width: of the images.
    """

    vae: AutoencoderKL = None
    text: TextEncoder | None = None
    scheduler: dict = field(default_factory=dict)
    height: int = 0
    width: int = 0
    tile: int | None = None  # latent pixels; decode and encode in overlapping tiles
    clip = False

    def __post_init__(self):
        size = self.config.image_size
        self.set_size(self.height or size, self.width or size)

    def set_size(self, height: int, width: int) -> None:
        """Choose the images' size in pixels. Raises UserError for what the VAE cannot make."""
        self.height = height
        self.width = width
        factor = self.vae.factor
        for name in ("height", "width"):
            if getattr(self, name) % factor or getattr(self, name) < factor:
                low = max(factor, getattr(self, name) // factor * factor)
                raise UserError(
                    f"{name} is {getattr(self, name)}; it must be a multiple of "
                    f"{factor}, such as {low} or {low + factor}"
                )

    @property
    def image_hw(self) -> tuple[int, int]:
        return (self.height, self.width)

    @property
    def clip_skip(self) -> int | None:
        reader = self.text if isinstance(self.text, TextEncoder) else self.model
        skip = getattr(reader, "skip", 1)
        return skip if skip > 1 else None

    @property
    def shape(self) -> tuple[int, int, int]:
        f = self.vae.factor
        return (self.vae.config.latent_channels, self.height // f, self.width // f)

    def table(self, sampler="ddim", steps=None, spacing=None, eta=None, strength=1.0) -> Table:
        """As the model's own scheduler spaces its timesteps, unless a spacing is given."""
        steps = min(50, len(self.schedule)) if steps is None else steps
        options = {"strength": strength, "eta": eta, "spacing": spacing}
        if spacing is None and self.scheduler:
            options["spacing"] = self.scheduler["timestep_spacing"]
        if self.scheduler and options["spacing"] == "leading":
            options["offset"] = self.scheduler["steps_offset"]
        if sampler == "ddim" and self.scheduler and not self.scheduler["set_alpha_to_one"]:
            options["final"] = "alpha_bar_0"  # as CompVis; diffusers' others end at 0
        return make_table(self.schedule, sampler, steps, **options)

    def denoiser(
        self,
        n: int,
        amp: str,
        labels: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        prompts: Sequence[str] | None = None,
        negative_prompts: Sequence[str] | None = None,
        batched: bool = True,
        chunks: int | None = None,
    ):
        """(x, t, *inputs) -> the network's output, for n images with a prompt each; the inputs.

        chunks: the pieces that every prompt is read in; None: as many as the longest here needs.
        """
        if self.text is None:
            other = {} if prompts is None else {"prompts": prompts}
            return super().denoiser(
                n, amp, labels, guidance_scale, guidance_rescale, batched, **other
            )
        if labels is not None:
            raise UserError("this model reads prompts: it takes no class label")
        prompts = [""] * n if prompts is None else list(prompts)
        negative = [""] * n if negative_prompts is None else list(negative_prompts)
        chunks = self.text.chunks([*prompts, *negative]) if chunks is None else chunks
        model = self.autocast(amp)
        told = [prompts] if guidance_scale == 1 else [prompts, negative]
        inputs = tuple(self.told(texts, chunks, amp) for texts in told)
        return guided(model, guidance_scale, guidance_rescale, batched), inputs

    def prompted(self, prompts: Sequence[str], negative: str = ""):
        if self.text is None:
            return super().prompted(prompts, negative)
        chunks = self.text.chunks([*prompts, negative])
        return lambda indices: {
            "prompts": [prompts[i % len(prompts)] for i in indices],
            "negative_prompts": [negative] * len(indices),
            "chunks": chunks,
        }

    @torch.inference_mode()
    def told(self, prompts: Sequence[str], chunks: int, amp: str) -> Tensor:
        """What the U-Net attends to, for these prompts."""
        told = self.text(prompts, chunks).to(self.device)
        if not isinstance(self.model, TextConditioned):
            return told
        dtype = amp_dtype(amp, self.device)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.model.read(told)

    @property
    def stepped(self) -> nn.Module:
        return self.model.unet if isinstance(self.model, TextConditioned) else self.model

    def autocast(self, amp: str):
        """The network under mixed precision, or in its own where that is not float32."""
        dtype = next(self.model.parameters()).dtype
        if dtype == torch.float32:
            return super().autocast(amp)

        network = self.network(None)

        def call(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            cond = cond.to(dtype) if cond is not None and cond.is_floating_point() else cond
            return network(x.to(dtype), t, cond)

        return call

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to the mean of their latents, scaled."""
        mean, _ = self._vae(partial(self.vae.encode, tile=self.tile), images)
        return self.vae.scale(mean.float())

    @torch.inference_mode()
    def decode(self, x: Tensor) -> Tensor:
        # large images one by one: a batch of them would need gigabytes
        options = {"tile": self.tile, "slicing": self.height * self.width >= 512**2}
        return self._vae(partial(self.vae.decode, **options), self.vae.unscale(x)).float()

    def _vae(self, function, x: Tensor):
        weight: nn.Parameter = next(self.vae.parameters())
        return function(x.to(weight.device, weight.dtype))
