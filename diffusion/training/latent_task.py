"""--mode latent: diffusion in a frozen VAE's latents, told nothing, a class or a caption.

Either a Stable Diffusion model is fine-tuned (--sd_path), its text encoder frozen and the captions'
embeddings computed once; or a network is trained from scratch on the latents of --vae, and with
--condition text --text_encoder scratch a small text encoder along with it.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import UserError
from ..config import Config
from ..data.batches import Batch, move, open_batches, to_unit
from ..data.image_set import ImageSet, digest
from ..data.latents import EncodedBatches, caption_embeddings, image_latents
from ..files.validate import read_prompt_lines
from ..models.vae import sample
from ..runtime.distributed import log
from ..runtime.seeding import generator
from ..sampling.conditioning import LatentPipeline, TextIds
from ..sampling.load import Parts, open_parts
from ..sampling.pipeline import amp_dtype
from .recipe import Diffusion
from .steps import draw

MOST_CAPTIONS = 100  # of an image
ENCODE_BATCH = 8  # images or captions that are encoded at a time


class LatentDiffusion(Diffusion):
    """A task as tasks.py describes it."""

    def __init__(self, config: Config, device: torch.device):
        self.config = config
        self.device = device
        self.parts: Parts = open_parts(config, device)
        self.prepare()
        if config.image_size % (f := self.parts.vae.factor):
            raise UserError(
                f"image_size {config.image_size} is no multiple of {f}, what this VAE divides it by"
            )
        self.schedule = self.parts.schedule
        self.levels = self.schedule.to(device)
        source = open_batches(config)
        images = None if config.streaming else source.pixels.images
        described = source.captioned if config.streaming else self.described(images)
        if config.condition == "text" and not described:
            raise UserError(
                f"--condition text: {config.data} has no captions; put name.txt beside "
                "each image, or a metadata.jsonl or .csv, name its column by "
                "--caption_column, or give --default_caption"
            )
        prompts = config.validation_prompts
        prompts = None if prompts is None else read_prompts(Path(prompts))
        self.captions = None
        self.data = source
        if not config.streaming:  # a stream's batches are encoded when they come
            told = described if config.condition == "text" else None
            self.captions = told and [captions[0] for captions in told]
            self.data = EncodedBatches(
                source.pixels,
                config.batch_size,
                config.seed,
                config.flip,
                self._latents(source.pixels),
                *self._text(told),
            )
        self.prompts = self._captions_shown() if prompts is None else prompts

    def prepare(self) -> None:
        """Before captions are read."""

    def described(self, images: ImageSet) -> list[tuple[str, ...]] | None:
        """Each image's captions, of which every step draws one; None if there are none."""
        return images.texts

    # --- what is computed once

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The VAE's mean and log-variance; in float32 where others run in float16."""
        dtype = self._vae_dtype()
        with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.parts.vae.encode(x)

    def _vae_dtype(self) -> torch.dtype | None:
        dtype = amp_dtype(self.config.amp, self.device)
        return None if dtype == torch.float16 else dtype  # its activations overflow float16

    def _latents(self, pixels):
        vae = self.parts.vae
        c = self.config
        side = c.image_size // vae.factor
        key = f"{self.parts.frozen['VAE']} {self._vae_dtype()}"
        shape = (vae.config.latent_channels, side, side)
        return image_latents(
            pixels, self.encode, key, shape, c.flip, Path(c.cache_dir), self.device, ENCODE_BATCH
        )

    def _text(self, told: list[tuple[str, ...]] | None) -> tuple:
        """What is told of each different caption, the empty one last; each image's numbers."""
        if told is None:
            return None, None
        if long := sum(len(captions) > MOST_CAPTIONS for captions in told):
            log(
                f"warning: {long} images have more than {MOST_CAPTIONS} captions; the first "
                "of them are used"
            )
            told = [captions[:MOST_CAPTIONS] for captions in told]
        self.warn_of_long([caption for captions in told for caption in captions])
        every = sorted({caption for captions in told for caption in captions} - {""}) + [""]
        number = {caption: i for i, caption in enumerate(every)}
        text_of = np.full((len(told), max(map(len, told))), -1)
        for row, captions in zip(text_of, told):
            row[: len(captions)] = [number[caption] for caption in captions]
        if isinstance(self.parts.text, TextIds):
            text = self.parts.text(every)  # the encoder runs in the step
            self.empty = text[-1]
            return text, text_of
        encoder = self.parts.text
        tokenizer = self.parts.text.tokenizer
        key = digest(
            self.parts.frozen["text encoder"],
            str(encoder.skip),
            *map(str, tokenizer.merges),
            str(tokenizer.added),
        )
        shape = (tokenizer.context_length, encoder.model.config.hidden_size)
        text = caption_embeddings(
            every, encoder, key, shape, Path(self.config.cache_dir), ENCODE_BATCH
        )
        self.empty = torch.from_numpy(text[np.array([len(every) - 1])])[0]
        return text, text_of

    def warn_of_long(self, captions: list[str]) -> None:
        tokenizer = self.parts.text.tokenizer
        most = tokenizer.context_length - 2
        long = sum(len(tokenizer.encode(caption)) > most for caption in captions)
        if long:
            log(
                f"warning: {long} of {len(captions)} captions are longer than {most} tokens; what "
                "is beyond is not read"
            )

    def _captions_shown(self) -> list[str]:
        """Prompts of the sample grids where none are given: of held-out or training images."""
        if self.config.condition != "text":
            return []
        if self.config.streaming:
            shown = [texts[0] for _, _, texts in self.data.first]
            self.warn_of_long(shown)
            return shown
        chosen = [*self.data.held_out, *self.data.train][: max(1, self.config.num_samples)]
        return [self.captions[i] for i in chosen]

    # --- a task's parts

    def build(self) -> nn.Module:
        return self.parts.build(len(self.data.classes))

    def pipeline(self, model: nn.Module) -> LatentPipeline:
        return self.parts.pipeline(model, self.data.classes)

    def told(self, model: nn.Module) -> dict:
        return {
            "classes": list(self.data.classes),
            "networks": self.parts.networks(model),
            "frozen": self.parts.frozen,
        }

    def recognise(self, checkpoint: dict) -> None:
        if names := self.parts.changed(checkpoint.get("frozen")):
            raise UserError(
                f"the run in {self.config.save_folder} was trained with another "
                f"{' and '.join(names)} than there is now; bring that back, or start "
                "anew with --overwrite"
            )

    def draw(self, step: int, config: Config | None = None) -> tuple[Tensor, ...]:
        """t (B,), eps (B, C, h, w), hidden (B,), and the noise that draws latents from the VAE."""
        c = self.config if config is None else config
        vae = self.parts.vae
        side = c.image_size // vae.factor
        shape = (vae.config.latent_channels, side, side)
        t, eps, hidden = draw(c, step, len(self.schedule), shape, self.device)
        g = generator(c.seed, "latents", step, device=self.device)
        return t, eps, hidden, torch.randn(eps.shape, generator=g, device=self.device)

    def inputs(self, batch: Batch, drawn, low: int, high: int) -> tuple:
        t, eps, hidden, spread = (value[low:high] for value in drawn)
        return self.x0(batch, spread), t, eps, self.condition(batch, hidden)

    def x0(self, batch: Batch, spread: Tensor | None = None) -> Tensor:
        """Scaled latents: drawn from the VAE's distribution, or its mean without noise."""
        if batch.moments is None:
            mean, logvar = (v.float() for v in self.encode(to_unit(batch.pixels, self.device)))
        else:
            mean, logvar = move(batch.moments, self.device).float().unbind(1)
        z = mean if spread is None else sample(mean, logvar, spread)
        return self.parts.vae.scale(z)

    def condition(self, batch: Batch, hidden: Tensor) -> Tensor | None:
        if self.config.condition != "text":
            return super().condition(batch, hidden)
        if batch.text is None:
            told = ["" if hide else c for c, hide in zip(batch.captions, hidden.tolist())]
            text = self.parts.text(told).clone()  # a clone may take part in backward
        else:
            text = batch.text.clone()
            text[hidden] = self.empty
        text = move(text, self.device) if text.device.type == "cpu" else text
        return text.float() if text.is_floating_point() else text

    def frames(self, model: nn.Module, indices):
        if self.config.condition != "text":
            return super().frames(model, indices)
        c = self.config
        pipeline = self.pipeline(model)
        return pipeline.frames(
            indices,
            seed=c.seed,
            sampler=c.sampler,
            amp=c.amp,
            guidance_scale=c.guidance_scale,
            steps=min(c.sample_steps, len(self.schedule)),
            **pipeline.prompted(self.prompts)(indices),
        )


def read_prompts(path: Path) -> list[str]:
    lines = read_prompt_lines(path)
    if not lines:
        raise UserError(f"--validation_prompts {path} holds no prompt")
    return lines
