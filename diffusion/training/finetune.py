"""--adapter and --instance_prompt: training beside, or on, a finished model.

    lora               low-rank branches of the U-Net, and with --train_text_encoder of the text
                       encoder; pixel models too (models/lora.py)
    textual_inversion  the vectors of a new token (models/textual_inversion.py)
    DreamBooth         --instance_prompt is every image's caption (arXiv:2208.12242); with
                       --class_prompt images that the model itself samples of it are trained on as
                       well, so that it does not forget them

The last goes with either, or with neither: then the U-Net itself is trained. The loop is the one
of trainer.py: what differs is which parameters train, which batches come and what is written.
"""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import UserError, shown
from ..config import Config, command_line
from ..data.batches import Batches, open_batches
from ..data.folder import scan
from ..data.image_set import ImageSet, digest
from ..data.latents import ENCODE_BATCH, EncodedBatches, weights_digest
from ..files import adapter_files, embedding_files, output, owned
from ..files.atomic import blame, locked, remove_left
from ..files.checkpoint import save_weights
from ..files.sd_files import OBJECTIVES, find_prediction
from ..files.strict import some
from ..models import lora
from ..models.text_unet import TextUNet, networks_of
from ..models.textual_inversion import extend, initial_rows, new_rows
from ..pictures.grid import save_png, to_uint8
from ..runtime import distributed as dist
from ..runtime.machine import is_of_gpu
from ..runtime.seeding import seed_of
from ..sampling.image_tensor import NonFinite
from ..sampling.load import FrozenStack, build_network
from .finetune_config import NETWORK, Base
from .latent_batches import encode_images

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


# --- the finished model that training begins with


def start_from(model: nn.Module, base: Base, config: Config) -> None:
    """Take the weights of another run. Raises UserError if they are of another architecture.

    config: of the model, which may differ.
    """
    complete = any(name.startswith("unet.") for name in base.weights)
    if isinstance(model, TextUNet) and not complete:
        model = model.unet  # fine-tuned Stable Diffusion, whose text encoder was not
    try:
        model.load_state_dict(base.weights)
    except RuntimeError as error:
        if is_of_gpu(error):
            raise
        theirs = {n: getattr(base.config, n) for n in NETWORK}
        other = [
            f"--{n} {','.join(map(str, v)) if n == 'dim_mults' else v}"
            for n, v in theirs.items()
            if v != getattr(config, n)
        ]
        raise UserError(
            f"--load_path {config.load_path} does not fit this network: it was trained with "
            f"{' '.join(other) or 'other classes'}; give the same"
        ) from None


# --- what trains, and what is written of it ------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Everything:
    """Train whole networks. parts: by name, those that train; None: all that there is."""

    config: Config
    parts: tuple[str, ...] | None = None

    def freeze(self, model: nn.Module) -> None:
        """Freeze what does not train."""
        if self.parts is not None:
            model.requires_grad_(False)
            networks = networks_of(model)
            for part in self.parts:
                networks[part].requires_grad_(True)

    def prepare(self, model: nn.Module) -> None:
        self.freeze(model)

    def metadata(self) -> dict:
        return {}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Give what a checkpoint keeps of the network."""
        return model.state_dict()

    def restore(self, model: nn.Module, state: dict[str, Tensor], checkpoint: dict) -> None:
        """Undo `state`. checkpoint: all that it holds."""
        model.load_state_dict(state)

    def write(self, folder: Path, model: nn.Module, step: int, metadata: dict, best: bool) -> None:
        """Write the EMA weights, to share: ema.safetensors, and best.safetensors if they are."""
        for name in ("ema", *(["best"] if best else [])):
            path = folder / f"{name}.safetensors"
            save_weights(path, model.state_dict(), self.config, step=step, **metadata)

    def result(self, folder: Path) -> str:
        """Say where the result is, and how to use it."""
        file = folder / "model.pt"
        if self.config.mode == "vae":
            other = f"{folder}_latent"
            options = {"vae": folder, "data": self.config.data, "save_folder": other}
            return f"{file}; next: {command_line('train', mode='latent', **options)}"
        options = {"load_path": file}
        if self.config.condition == "text":
            options["prompt"] = self.config.instance_prompt or "a picture"
        if folder != Path("results"):
            options["save_folder"] = folder
        return f"{file}; next: {command_line('sample', **options)}"


class Adapter:
    """Train a small part of a frozen model, and save that part only.

    kind: a row of ADAPTERS. stack: of a latent model.
    Raises UserError for options that do not fit the model.
    """

    def __init__(self, config: Config, stack: FrozenStack | None):
        self.config = config
        self.attach, self.save = ADAPTERS[config.adapter](config, stack)

    def freeze(self, model: nn.Module) -> None:
        """Freeze the model and put in what trains."""
        model.requires_grad_(False)
        self.attach(networks_of(model))

    def prepare(self, model: nn.Module) -> None:
        """Digest the model, so that another one is noticed, and `freeze` it."""
        self.base = weights_digest(model)
        self.freeze(model)
        self.trained = [name for name, p in model.named_parameters() if p.requires_grad]

    def metadata(self) -> dict:
        return {"base": self.base}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        values = model.state_dict()
        return {name: values[name] for name in self.trained}

    def restore(self, model: nn.Module, state: dict[str, Tensor], checkpoint: dict) -> None:
        if checkpoint["base"] != self.base:
            raise UserError(
                f"the model that the run in {self.config.save_folder} began with has "
                "changed since; bring it back (--sd_weights ema, if it is a file with "
                "model_ema.* and the run is of an earlier version, which took these), "
                "or train in another --save_folder (--overwrite deletes this run)"
            )
        assert state.keys() == set(self.trained)
        model.load_state_dict(state, strict=False)

    def write(self, folder: Path, model: nn.Module, step: int, metadata: dict, best: bool) -> None:
        """Write adapter.safetensors, and files for other programs beside it."""
        about = {"config": self.config.to_json(), "step": str(step)}
        files = (folder / "adapter.safetensors", folder / "adapter_kohya.safetensors")
        self.save(*files, networks_of(model), about)

    def result(self, folder: Path) -> str:
        c = self.config
        base = {"load_path": c.load_path}
        if c.load_path is None:
            stated = OBJECTIVES.get(find_prediction(c.sd_path, c.sd_config).type)
            base = {
                "sd_path": c.sd_path,
                "config": c.sd_config,
                "weights": "ema" if c.sd_weights == "ema" else None,
                "clip_skip": c.clip_skip if c.clip_skip > 1 else None,
                "objective": c.objective if stated != c.objective else None,
            }
        file = folder / "adapter.safetensors"
        options = base | {"lora" if c.adapter == "lora" else "embedding": file}
        if c.condition == "text":
            options["prompt"] = c.token if c.adapter == "textual_inversion" else "a picture"
        return f"{file}; next: {command_line('sample', **options)}"


def open_trainable(config: Config, stack: FrozenStack | None = None) -> Everything | Adapter:
    """Choose what trains. stack: of a latent model. Raises UserError for what does not fit it."""
    if config.adapter != "none":
        return Adapter(config, stack)
    parts = ("unet", "text_encoder") if config.train_text_encoder else ("unet",)
    return Everything(config, parts if config.adapts else None)


def open_lora(config: Config, stack: FrozenStack | None) -> tuple[Callable, Callable]:
    """Make (attach, save) of low-rank branches. Raises UserError if no layer is a target."""

    def targets(networks: dict[str, nn.Module]) -> dict[str, list[str]]:
        """Find the layers that get branches, by network."""
        if not config.train_text_encoder:
            networks = {"unet": networks["unet"]}
        try:
            found = {part: lora.find(net, config.targets) for part, net in networks.items()}
        except ValueError as error:
            raise UserError(f"--targets: {error}") from None
        if (skipped := config.clip_skip - 1) and "text_encoder" in found:
            # layers behind the one that is read: no gradient reaches them
            used = networks["text_encoder"].config.num_hidden_layers - skipped
            number = re.compile(r"layers\.(\d+)")
            found["text_encoder"] = [
                name for name in found["text_encoder"] if int(number.search(name)[1]) < used
            ]
        return found

    def attach(networks: dict[str, nn.Module]) -> None:
        for part, names in targets(networks).items():
            lora.inject(networks[part], names, config.rank, config.alpha, config.lora_dropout)

    def save(own: Path, other: Path, networks: dict[str, nn.Module], about: dict) -> None:
        states = {part: lora.state(network) for part, network in networks.items()}
        states = {part: branches for part, branches in states.items() if branches}
        adapter_files.write_diffusers(own, states, **about)
        adapter_files.write_peft(own.parent, states["unet"])
        if config.mode == "latent":
            adapter_files.write_kohya(other, states, **about)

    with torch.device("meta"):  # mistakes show before images are encoded
        found = targets(networks_of(build_network(config, 0, stack)))
    known = adapter_files.in_kohya
    lost = [name for part, names in found.items() for name in names if not known(part, name)]
    if lost and config.mode == "latent":
        dist.log(
            f"adapter_kohya.safetensors is without {len(lost)} layers that kohya has no names "
            f"for: {some(lost)}"
        )
    return attach, save


def open_token(config: Config, stack: FrozenStack) -> tuple[Callable, Callable]:
    """Make (attach, save) of a new token's vectors, and add it to the vocabulary."""
    tokenizer = stack.prompts.tokenizer
    first = len(tokenizer)
    word = tokenizer.encode(config.init_word)
    if not word:
        raise UserError(f"--init_word {config.init_word!r} is blank; give a word, such as face")
    if len(tokenizer.encode(config.token)) == 1:
        raise UserError(f"--token: {shown(config.token)} exists already; choose another name")
    with blame("--token", kinds=ValueError):
        tokenizer.add_embedding([config.token], config.vectors)

    def attach(networks: dict[str, nn.Module]) -> None:
        text = networks["text_encoder"]
        with blame("--token", kinds=ValueError):
            extend(text, initial_rows(text, word, config.vectors), first)

    def save(own: Path, other: Path, networks: dict[str, nn.Module], about: dict) -> None:
        rows = new_rows(networks["text_encoder"])
        embedding_files.write_diffusers(own, config.token, rows, **about)
        embedding_files.write_a1111(other, config.token, rows, **about)

    return attach, save


ADAPTERS = {"lora": open_lora, "textual_inversion": open_token}


# --- the data ------------------------------------------------------------------------------------


def relabelled(config: Config, batches: Batches, base: Base | None) -> Batches:
    """Give the images the base's classes, by name, and the captions that fine-tuning uses.

    An image of no such class has none.
    """
    images = batches.pixels.images
    if base is not None and (config.mode == "pixel" or config.condition == "class"):
        classes = base.metadata["classes"]
        names = [images.classes[label] if label >= 0 else None for label in images.labels]
        labels = [classes.index(name) if name in classes else -1 for name in names]
        images = replace(images, labels=labels, classes=classes)
    if config.condition == "text":
        images = replace(images, texts=texts_of(config, images))
    pixels = batches.pixels.with_images(images)
    return Batches(pixels, config.batch_size, config.seed, config.flip)


def texts_of(config: Config, images: ImageSet) -> list[tuple[str, ...]] | None:
    """Give each image's captions: the instance prompt, or with a new token in front of each.

    The token goes where a caption has a {}; templates stand in where there are no captions.
    """
    if config.instance_prompt is not None:
        return [(config.instance_prompt,)] * len(images)
    if config.adapter != "textual_inversion":
        return images.texts
    if images.texts is None:
        return [tuple(template.format(config.token) for template in TEMPLATES)] * len(images)

    def with_token(text: str) -> str:
        text = text if "{}" in text else f"{{}}, {text}".rstrip(", ")
        return text.replace("{}", config.token)

    return [tuple(map(with_token, own)) for own in images.texts]


# --- prior preservation --------------------------------------------------------------------------


def prior_batches(recipe, model: nn.Module) -> EncodedBatches:
    """Sample the class images that are missing, and encode all of them."""
    c = recipe.config
    own = dict(
        data=str(sample_class_images(recipe, model)),
        data_class="all",
        split="all",
        image_column=None,
        caption_column=None,
    )
    pixels = open_batches(replace(c, **own)).pixels
    images = replace(pixels.images, texts=[(c.class_prompt,)] * len(pixels))
    pixels = pixels.with_images(images)
    prompts = recipe.stack.prompts
    return encode_images(c, pixels, recipe.codec, prompts, seed_of(c.seed, "class"))


def sample_class_images(recipe, model: nn.Module) -> Path:
    """Fill the folder of class images up, on all ranks, and give its path."""
    c = recipe.config
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
    with blame(f"--class_data {folder} cannot be written", kinds=OSError):
        output.create(folder)
    with contextlib.ExitStack() as held:
        if dist.is_main():  # another run may sample into the same cache
            held.enter_context(locked(folder))
            remove_left(folder, r"\d{5,}\.png")
        dist.barrier()
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
        sampled = {file for file, prompt in zip(present, made_for) if prompt is not None}
        # nothing of somebody's is written over; after a kill the batches are those of before it,
        # since in another one an image would be another by rounding
        names = {i: folder / f"{i:05d}.png" for i in range(2 * c.class_images)}
        ours = [i for i, file in names.items() if file in sampled or not file.exists()]
        elsewhere = len(set(present) - {names[i] for i in ours})
        ours = ours[: max(0, c.class_images - elsewhere)]
        missing = {i for i in ours if not names[i].exists()}
        dist.barrier()  # all ranks have counted
        if missing:
            dist.log(f"{folder}: {len(missing)} of {c.class_images} class images are sampled")
        pipeline = recipe.pipeline(model)
        bad = None
        batches = [ours[low : low + ENCODE_BATCH] for low in range(0, len(ours), ENCODE_BATCH)]
        batches = [indices for indices in batches if missing.intersection(indices)]
        for indices in batches[dist.rank() :: dist.world_size()]:
            images = pipeline.sample_batch(
                indices,
                seed=c.seed,
                sampler=c.sampler,
                amp=c.amp,
                guidance_scale=c.guidance_scale,
                steps=min(c.sample_steps, len(recipe.schedule)),
                prompts=[wanted] * len(indices),
                plain_prompts=True,
            )
            try:
                pictures = to_uint8(images, indices)
            except NonFinite as error:  # the other ranks wait below
                bad = error
                break
            for i, image in zip(indices, pictures):
                if i in missing:
                    save_png(image, names[i], {CLASS_PROMPT: wanted})
        if dist.any_rank(bad is not None):
            raise bad or NonFinite("class images of another rank")
    return folder
