"""--adapter and --instance_prompt: training beside, or on, a finished model.

    lora               low-rank branches of the U-Net, and with --train_text_encoder of the text
                       encoder; pixel models too (models/lora.py)
    textual_inversion  the vectors of a new token (models/textual_inversion.py)
    DreamBooth         --instance_prompt is every image's caption (arXiv:2208.12242); with
                       --class_prompt images that the model itself draws of it are learnt as well,
                       so that it does not forget them

The last goes with either, or with neither: then the U-Net itself is trained. The loop is the one
of trainer.py: what differs is which parameters train, which batches come and what is written.
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import UserError
from ..config import Config
from ..data.batches import open_batches
from ..data.folder import scan
from ..data.image_set import ImageSet, digest
from ..data.latents import EncodedBatches, weights_digest
from ..files import adapter_files as adapters
from ..files import embedding_files as embeddings
from ..files import output, owned
from ..files.checkpoint import load_weights
from ..files.sd_files import OBJECTIVES, find_prediction
from ..models import lora
from ..models.textual_inversion import extend, initial_rows, new_rows
from ..pictures.grid import NonFinite, save_png, to_uint8
from ..runtime import distributed as dist
from ..runtime.seeding import seed_of
from ..sampling.adapt import parts_of
from .latent_task import ENCODE_BATCH, LatentDiffusion
from .recipe import Diffusion, Task, start_from

# captions of textual inversion where the data has none, after the paper's
TEMPLATES = (
    "a photo of {}",
    "a rendering of {}",
    "a picture of {}",
    "an image of {}",
    "a depiction of {}",
    "a good photo of {}",
    "a cropped photo of {}",
    "a close-up photo of {}",
    "a bright photo of {}",
    "a dark photo of {}",
)

CLASS_PROMPT = "class_prompt"  # the text of a PNG that says what a class image was sampled for


# --- the tasks -----------------------------------------------------------------------------------


class Adapted(Task):
    """Before a task's own class: what trains, and what is kept and written of it."""

    def start(self, model: nn.Module, fresh: bool) -> None:
        """The base's weights, then what is trained: the rest takes no gradients."""
        c = self.config
        if c.load_path is not None:
            start_from(model, *load_weights(Path(c.load_path))[:2])
        self.before(model)
        self.base = weights_digest(model) if c.adapter != "none" else None
        model.requires_grad_(False)
        if c.adapter == "lora":
            for part, names in self.targets(model).items():
                network = self.networks(model)[part]
                lora.inject(network, names, c.rank, c.alpha, c.lora_dropout)
        elif c.adapter == "textual_inversion":
            text = self.networks(model)["text_encoder"]
            try:
                extend(text, initial_rows(text, self.word, c.vectors), self.first)
            except ValueError as error:
                raise UserError(f"--token: {error}") from None
        else:
            self.networks(model)["unet"].requires_grad_(True)
            if c.train_text_encoder:
                model.text.requires_grad_(True)
        self.trained = [name for name, p in model.named_parameters() if p.requires_grad]

    def before(self, model: nn.Module) -> None:
        """While the model is still the base."""

    def networks(self, model: nn.Module) -> dict[str, nn.Module]:
        return parts_of(model)

    def targets(self, model: nn.Module) -> dict[str, list[str]]:
        """The layers that a LoRA is put on, by part. Raises UserError if there are none."""
        parts = self.networks(model)
        if not self.config.train_text_encoder:
            parts = {"unet": parts["unet"]}
        try:
            found = {p: lora.find(network, self.config.targets) for p, network in parts.items()}
        except ValueError as error:
            raise UserError(f"--targets: {error}") from None
        if (skipped := self.config.clip_skip - 1) and "text_encoder" in found:
            # layers behind the one that is read: no gradient reaches them
            used = parts["text_encoder"].config.num_hidden_layers - skipped
            layer = lambda name: int(re.search(r"layers\.(\d+)", name)[1])  # noqa: E731
            found["text_encoder"] = [n for n in found["text_encoder"] if layer(n) < used]
        return found

    # --- what is kept and written

    def told(self, model: nn.Module) -> dict:
        if self.config.adapter == "none":
            return super().told(model)
        return super().told(model) | {"base": self.base}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        if self.config.adapter == "none":
            return super().state(model)
        values = model.state_dict()
        return {name: values[name] for name in self.trained}

    def restore(self, model: nn.Module, kept: dict[str, Tensor], checkpoint: dict) -> None:
        if self.config.adapter == "none":
            return super().restore(model, kept, checkpoint)
        if checkpoint["base"] != self.base:
            raise UserError(
                f"the model that the run in {self.config.save_folder} began with has "
                "changed since; bring it back (--sd_weights ema, if it is a file with "
                "model_ema.* and the run is of an earlier version, which took these), "
                "or start from scratch with --overwrite"
            )
        assert kept.keys() == set(self.trained)
        model.load_state_dict(kept, strict=False)

    def write(self, folder: Path, model: nn.Module, step: int, told: dict, improved: bool) -> None:
        """adapter.safetensors, and adapter_kohya.safetensors where other programs have a use."""
        c = self.config
        about = {"config": self.config.to_json(), "step": str(step)}
        own = folder / "adapter.safetensors"
        other = folder / "adapter_kohya.safetensors"
        if c.adapter == "none":
            super().write(folder, model, step, told, improved)
        elif c.adapter == "textual_inversion":
            rows = new_rows(self.networks(model)["text_encoder"])
            embeddings.write_diffusers(own, c.token, rows, **about)
            embeddings.write_a1111(other, c.token, rows, **about)
        else:
            states = {part: lora.state(network) for part, network in self.networks(model).items()}
            states = {part: branches for part, branches in states.items() if branches}
            adapters.write_diffusers(own, states, **about)
            if c.mode == "latent":
                adapters.write_kohya(other, states, **about)

    def result(self, folder: Path) -> str:
        c = self.config
        if c.adapter == "none":
            return super().result(folder)
        base = f"--sd_path {c.sd_path}" if c.load_path is None else f"--load_path {c.load_path}"
        if c.load_path is None:
            stated = OBJECTIVES.get(find_prediction(c.sd_path, c.sd_config).type)
            base += f" --config {c.sd_config}" if c.sd_config is not None else ""
            base += " --weights ema" if c.sd_weights == "ema" else ""
            base += f" --clip_skip {c.clip_skip}" if c.clip_skip > 1 else ""
            base += "" if stated == c.objective else f" --objective {c.objective}"
        option = "--lora" if c.adapter == "lora" else "--embedding"
        file = folder / "adapter.safetensors"
        return f"{file}; python sample.py {base} {option} {file}"


class AdaptedDiffusion(Adapted, Diffusion):
    """A pixel model and a LoRA. Classes are the base's: of images in other folders it is told
    none."""

    def __init__(self, config: Config, device: torch.device):
        super().__init__(config, device)
        use_classes(self.data, load_weights(Path(config.load_path))[2]["classes"])
        with torch.device("meta"):
            self.targets(self.build())


class AdaptedLatents(Adapted, LatentDiffusion):
    """A latent model and any of them."""

    prior: EncodedBatches | None = None

    def __init__(self, config: Config, device: torch.device):
        super().__init__(config, device)
        if config.condition == "class":
            use_classes(self.data, load_weights(Path(config.load_path))[2]["classes"])
        if self.captions is not None:  # for what else looks at them
            images = self.data.pixels.images
            self.data.pixels.images = replace(images, texts=[(text,) for text in self.captions])

    def prepare(self) -> None:
        """What can be wrong is looked at before images are encoded; the token is added."""
        c = self.config
        tokenizer = getattr(self.parts.text, "tokenizer", None)
        if c.adapter == "lora":
            with torch.device("meta"):
                self.targets(self.parts.build(0))
        if c.adapter != "textual_inversion":
            return
        self.first = len(tokenizer)
        self.word = tokenizer.encode(c.init_word)
        if not self.word:
            raise UserError(f"--init_word {c.init_word!r} is blank; give a word, such as face")
        try:
            tokenizer.add_tokens([c.token], c.vectors)
        except ValueError as error:
            raise UserError(f"--token: {error}") from None

    def described(self, images: ImageSet) -> list[tuple[str, ...]] | None:
        """The instance prompt; or with a new token in front of each caption, in its place where it
        has a {}, and in templates where there are no captions."""
        c = self.config
        if c.instance_prompt is not None:
            return [(c.instance_prompt,)] * len(images)
        if c.adapter != "textual_inversion":
            return super().described(images)
        if images.texts is None:
            return [tuple(template.format(c.token) for template in TEMPLATES)] * len(images)
        put = lambda text: text if "{}" in text else f"{{}}, {text}".rstrip(", ")  # noqa: E731
        return [tuple(put(text).replace("{}", c.token) for text in own) for own in images.texts]

    # --- prior preservation

    def before(self, model: nn.Module) -> None:
        c = self.config
        if c.class_prompt is None:
            return
        folder = class_images(self, model)
        own = dict(
            data=str(folder), data_class="all", split="all", image_column=None, caption_column=None
        )
        images = open_batches(replace(c, **own)).pixels
        told = [(c.class_prompt,)] * len(images)
        self.prior = EncodedBatches(
            images,
            c.batch_size,
            seed_of(c.seed, "class"),
            c.flip,
            self._latents(images),
            *self._text(told),
        )

    def draw(self, step: int, config: Config | None = None):
        if self.config.class_prompt is None:
            return super().draw(step, config)
        other = replace(self.config, seed=seed_of(self.config.seed, "class"))
        return super().draw(step), super().draw(step, other), step

    def loss(self, model, batch, drawn, low: int, high: int) -> Tensor:
        """(high - low,): with prior preservation a class image stands beside each sample."""
        if self.prior is None:
            return super().loss(model, batch, drawn, low, high)
        own, prior, step = drawn
        both = zip(
            self.inputs(batch, own, low, high),
            self.inputs(self.prior(step, low, high), prior, low, high),
        )
        losses = self.diffusion_loss(model, *(torch.cat(pair) for pair in both))
        instance, kept = losses.chunk(2)
        return instance + self.config.prior_weight * kept


def use_classes(data, classes: list[str]) -> None:
    """Label the images by a model's classes, by name; by its null label where it has no such."""
    null = len(classes)
    names = [classes.index(name) if name in classes else null for name in data.classes] + [null]
    data.labels = np.array([names[label] for label in data.labels], np.int64)  # -1: the last
    data.classes = classes


def class_images(task: AdaptedLatents, model: nn.Module) -> Path:
    """The folder of prior preservation; what is missing of its images is drawn, on all ranks."""
    c = task.config
    wanted = c.class_prompt.strip()
    key = digest(
        "class",
        weights_digest(model),
        wanted,
        str(c.image_size),
        str(c.seed),
        c.sampler,
        str(c.sample_steps),
        str(c.guidance_scale),
    )
    folder = Path(c.class_data) if c.class_data is not None else Path(c.cache_dir) / f"class-{key}"
    try:
        output.create(folder)
    except OSError as error:
        raise UserError(f"--class_data {folder} cannot be written: {error}") from None
    present = scan(folder, sampled=True)
    made_for = [owned.picture_text(file, CLASS_PROMPT) for file in present]
    if others := {p for p in made_for if p is not None and p.strip() != wanted}:
        raise UserError(
            f"--class_data {folder} holds images that were sampled for the class prompt "
            f"{min(others)!r}; this run's is {c.class_prompt!r}: give another --class_data"
        )
    if unknown := made_for.count(None):
        dist.log(
            f"{folder}: {unknown} images from elsewhere are used for the class prompt "
            f"{c.class_prompt!r}"
        )
    missing = max(0, c.class_images - len(present))
    # nothing that is there is written over
    free = [i for i in range(2 * c.class_images) if not image_of(folder, i).exists()][:missing]
    dist.barrier()  # all ranks have counted
    if free:
        dist.log(f"{folder}: {len(free)} of {c.class_images} class images are drawn")
    pipeline = task.pipeline(model)
    bad = None
    for low in range(0, len(free), ENCODE_BATCH)[dist.rank() :: dist.world_size()]:
        indices = free[low : low + ENCODE_BATCH]
        images = pipeline.sample(
            indices,
            seed=c.seed,
            sampler=c.sampler,
            amp=c.amp,
            guidance_scale=c.guidance_scale,
            steps=min(c.sample_steps, len(task.schedule)),
            prompts=[wanted] * len(indices),
        )
        try:
            pictures = to_uint8(images, indices)
        except NonFinite as error:  # the other ranks wait below
            bad = error
            break
        for i, image in zip(indices, pictures):
            save_png(image, image_of(folder, i), {CLASS_PROMPT: wanted})
    if dist.any_rank(bad is not None):
        raise bad or NonFinite([], "class images of another rank")
    return folder


def image_of(folder: Path, i: int) -> Path:
    return folder / f"{i:05d}.png"


ADAPTED = {"pixel": AdaptedDiffusion, "latent": AdaptedLatents}
