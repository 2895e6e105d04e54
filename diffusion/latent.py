"""Latent diffusion put together: prompts -> text encoder -> U-Net on latents -> VAE -> images.

pipeline = LatentPipeline.from_sd("path/to/stable-diffusion")
images = pipeline.sample(range(4), prompts=["a red fox"] * 4, guidance_scale=7.5)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from . import UserError
from .config import Config
from .models.clip import CLIPTextModel, encode_chunks
from .models.tokenizer import Tokenizer
from .models.vae import AutoencoderKL
from .pipeline import Pipeline, amp_dtype
from .process.samplers import SAMPLERS, Table, guided, make_table
from .process.schedule import Schedule, from_betas, linear, scaled_linear, zero_terminal_snr
from .weights.loader import load_sd

TILE = 64  # latent pixels of a tile's side
OBJECTIVES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def schedule_of(scheduler: dict) -> Schedule:
    """The noise schedule of a scheduler_config.json. Raises UserError for one not known here."""
    T, kind = scheduler["num_train_timesteps"], scheduler["beta_schedule"]
    first, last = scheduler["beta_start"], scheduler["beta_end"]
    if scheduler.get("trained_betas") is not None:
        schedule = from_betas(torch.tensor(scheduler["trained_betas"], dtype=torch.float64))
    elif kind in ("linear", "scaled_linear"):
        make = {"linear": linear, "scaled_linear": scaled_linear}[kind]
        schedule = make(T, first * T / 1000, last * T / 1000)  # these scale betas by 1000 / T
    else:
        raise UserError(f"beta_schedule {kind!r} of scheduler_config.json is not known; supported: "
                        "linear, scaled_linear")  # fmt: skip
    rescale = scheduler.get("rescale_betas_zero_snr", False)
    return zero_terminal_snr(schedule) if rescale else schedule


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
        self.height, self.width = self.height or size, self.width or size
        factor = self.factor
        for name in ("height", "width"):
            if getattr(self, name) % factor or getattr(self, name) < factor:
                low = max(factor, getattr(self, name) // factor * factor)
                raise UserError(f"{name} is {getattr(self, name)}; it must be a multiple of "
                                f"{factor}, such as {low} or {low + factor}")  # fmt: skip

    @classmethod
    def from_sd(cls, path: str | Path, *, config: str | None = None, weights: str = "ema",
                device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
                skip: int = 1, **options):  # fmt: skip
        """From a Stable Diffusion folder or file; dtype: cast all but a float16 VAE to it.

        Raises UserError for what is no Stable Diffusion 1.x model.
        """
        device = torch.device(device)
        sd = load_sd(path, config, weights)
        kind = sd.scheduler["prediction_type"]
        if kind not in OBJECTIVES:
            raise UserError(f"prediction_type {kind!r} of {path} is not known; supported: "
                            f"{', '.join(OBJECTIVES)}")  # fmt: skip
        layers = len(sd.text_encoder.text_model.encoder.layers)
        if not 1 <= skip <= layers:
            raise UserError(f"clip_skip is {skip}; this text encoder has layers 1 (the last) to "
                            f"{layers}")  # fmt: skip
        size = sd.unet.config.sample_size or 64
        size = (size if isinstance(size, int) else max(size)) * 2 ** (len(sd.vae.config.block_out_channels) - 1)  # fmt: skip
        settings = Config(mode="latent", condition="text", sd_path=str(path), image_size=size,
                          objective=OBJECTIVES[kind], schedule="scaled_linear")  # fmt: skip
        unet, text = (m.to(device, dtype) for m in (sd.unet, sd.text_encoder))
        # the VAE's activations overflow float16
        vae = sd.vae.to(device, None if dtype == torch.float16 else dtype)
        if dtype == torch.float16:
            vae = vae.float()
        layout = torch.channels_last
        made = cls(settings, unet.to(memory_format=layout), schedule_of(sd.scheduler), [], device,
                   vae=vae.to(memory_format=layout), text=TextEncoder(sd.tokenizer, text, skip),
                   scheduler=sd.scheduler, **options)  # fmt: skip
        made.report = sd.report
        return made

    @property
    def image_hw(self) -> tuple[int, int]:
        return (self.height, self.width)

    @property
    def factor(self) -> int:
        """Image pixels of a latent pixel."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        c, f = self.vae.config, self.factor
        return (c.latent_channels, self.height // f, self.width // f)

    def table(self, sampler="ddim", steps=None, spacing=None, eta=None, strength=1.0) -> Table:
        """As the model's own scheduler spaces its timesteps, unless a spacing is given."""
        steps = min(50, len(self.schedule)) if steps is None else steps
        options = {"strength": strength, "eta": eta, "spacing": spacing}
        if spacing is None and self.scheduler:
            options["spacing"] = self.scheduler["timestep_spacing"]
        if self.scheduler and options["spacing"] == "leading":
            options["offset"] = self.scheduler["steps_offset"]
        ends_early = self.scheduler and not self.scheduler["set_alpha_to_one"]
        if ends_early and sampler in SAMPLERS and SAMPLERS[sampler].extra == 0:
            options["final"] = "alpha_bar_0"  # as CompVis; diffusers' DPM-Solver ends at 0
        return make_table(self.schedule, sampler, steps, **options)

    def denoiser(
        self, n: int, amp: str, labels: Tensor | None = None, guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0, prompts: Sequence[str] | None = None,
        negative_prompts: Sequence[str] | None = None, batched: bool = True,
    ):  # fmt: skip
        """(x, t) -> the network's output, for n images with a prompt each.

        batched: evaluate with and without the prompt in one call; else in two, in half the memory.
        """
        if self.text is None:
            if prompts is not None:
                raise UserError("this model was trained without captions: it takes no prompt")
            return super().denoiser(n, amp, labels, guidance_scale, guidance_rescale)
        if labels is not None:
            raise UserError("this model reads prompts: it takes no class label")
        prompts = [""] * n if prompts is None else list(prompts)
        negative = [""] * n if negative_prompts is None else list(negative_prompts)
        chunks = self.text.chunks([*prompts, *negative])
        model = self.autocast(amp)
        cond = self.told(prompts, chunks)
        uncond = self.told(negative, chunks) if guidance_scale != 1 else None
        return guided(model, cond, uncond, guidance_scale, guidance_rescale, batched)

    def told(self, prompts: Sequence[str], chunks: int) -> Tensor:
        """What the network takes beside x and t, for these prompts."""
        return self.text(prompts, chunks)

    def autocast(self, amp: str):
        """The network under mixed precision, or in its own where that is not float32."""
        dtype = next(self.model.parameters()).dtype
        if dtype == torch.float32:
            return super().autocast(amp)

        def call(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            cond = cond.to(dtype) if cond is not None and cond.is_floating_point() else cond
            return self.model(x.to(dtype), t, cond)

        return call

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to the mean of their latents, scaled."""
        mean, _ = self._vae(partial(self.vae.encode, tile=self.tile), images)
        return mean.float() * self.vae.config.scaling_factor

    @torch.inference_mode()
    def decode(self, x: Tensor) -> Tensor:
        z = x / self.vae.config.scaling_factor
        return self._vae(partial(self.vae.decode, tile=self.tile), z).float()

    def _vae(self, function, x: Tensor):
        weight: nn.Parameter = next(self.vae.parameters())
        return function(x.to(weight.device, weight.dtype))


def open_pipeline(
    load_path: str | None, sd_path: str | None, weights: str, device: torch.device, *,
    amp: str = "auto", config: str | None = None, vae: str | None = None,
    clip_skip: int | None = None, height: int | None = None, width: int | None = None,
    tiling: bool = False,
) -> Pipeline:  # fmt: skip
    """The pipeline of a Stable Diffusion model (sd_path) or of a trained one, pixel or latent.

    Raises UserError for options that the model has no use for.
    """
    latent_only = {"vae": vae, "clip_skip": clip_skip, "height": height, "width": width,
                   "vae_tiling": tiling or None, "config": config}  # fmt: skip
    if sd_path is None:
        load_path = "results/model.pt" if load_path is None else load_path
        pipeline = Pipeline.load(load_path, weights, device)
        given = [f"--{name}" for name, value in latent_only.items() if value is not None]
        if given:
            raise UserError(f"{load_path} is a pixel model: {', '.join(given)} have no meaning")
        return pipeline
    options = {"height": height or 0, "width": width or 0, "tile": TILE if tiling else None}
    made = LatentPipeline.from_sd(sd_path, config=config, weights=weights, device=device,
                                  dtype=amp_dtype(amp, device),
                                  skip=1 if clip_skip is None else clip_skip, **options)  # fmt: skip
    return made
