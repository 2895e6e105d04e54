"""A model from what a configuration, a checkpoint or a Stable Diffusion file names.

open_pipeline      for the scripts: any model, pixel or latent, as something to sample from
open_parts         for training: what of a latent model is not trained, and the network that is
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from .. import UserError
from ..config import Config
from ..data.latents import weights_digest
from ..files.checkpoint import load_weights
from ..files.sd_files import (
    OBJECTIVES,
    PREDICTIONS,
    find_prediction,
    load_sd,
    read_scheduler,
    stated_objective,
)
from ..files.strict import build, fit
from ..files.vae_files import load_vae
from ..models.clip import CLIPTextModel
from ..models.configs import CLIPTextConfig
from ..models.sd_unet import SDUNet
from ..models.tokenizer import byte_level
from ..models.vae import AutoencoderKL
from ..process.schedule import (
    Schedule,
    from_betas,
    linear,
    make_schedule,
    scaled_linear,
    zero_terminal_snr,
)
from ..runtime.distributed import log
from .adapt import adapt
from .conditioning import LatentPipeline, TextConditioned, TextEncoder, TextIds
from .pipeline import Pipeline, amp_dtype
from .sizes import text_config, unet_config

TILE = 64  # latent pixels of a tile's side


def schedule_of(scheduler: dict) -> Schedule:
    """The noise schedule of a scheduler_config.json. Raises UserError for one not known here."""
    T = scheduler["num_train_timesteps"]
    kind = scheduler["beta_schedule"]
    first = scheduler["beta_start"]
    last = scheduler["beta_end"]
    betas = scheduler.get("trained_betas")
    given = [first, last] if betas is None else betas
    usable = type(T) is int and 2 <= T <= 1_000_000 and isinstance(given, list)
    if not usable or not all(isinstance(b, float | int) and 0 < b < 1 for b in given):
        raise UserError(
            f"scheduler_config.json has {T!r:.40} steps with betas {given!r:.80}; "
            "expected a whole number, and betas in (0, 1)"
        )
    if betas is not None:
        schedule = from_betas(torch.tensor(betas, dtype=torch.float64))
    elif kind in ("linear", "scaled_linear"):
        make = {"linear": linear, "scaled_linear": scaled_linear}[kind]
        schedule = make(T, first * T / 1000, last * T / 1000)  # these scale betas by 1000 / T
    else:
        raise UserError(
            f"beta_schedule {kind!r} of scheduler_config.json is not known; supported: "
            "linear, scaled_linear"
        )
    rescale = scheduler.get("rescale_betas_zero_snr", False)
    return zero_terminal_snr(schedule) if rescale else schedule


@dataclass(eq=False)
class Parts:
    """What a latent model consists of beside the network that is trained."""

    config: Config
    device: torch.device
    vae: AutoencoderKL
    schedule: Schedule
    scheduler: dict = field(default_factory=dict)
    text: TextEncoder | TextIds | None = None
    unet: SDUNet | None = None  # Stable Diffusion's
    text_config: CLIPTextConfig | None = None  # of one that is trained along
    reader: CLIPTextModel | None = None  # Stable Diffusion's, where it runs in the step

    @cached_property
    def frozen(self) -> dict:
        """What a checkpoint remembers of the networks that are not in it, by digest."""
        scale = [self.vae.config.scaling_factor, self.vae.config.shift_factor]
        found = {"VAE": weights_digest(self.vae), "VAE's scale": scale}
        if isinstance(self.text, TextEncoder):
            found["text encoder"] = weights_digest(self.text.model)
        return found

    def changed(self, frozen: dict | None) -> list[str]:
        """Which of them are not those that a checkpoint remembers."""
        return [name for name, kept in (frozen or {}).items() if self.frozen.get(name) != kept]

    def compare(self, frozen: dict | None, other_vae: bool, where: str) -> None:
        """Warn of what the model was not trained with, unless another VAE was asked for."""
        names = [n for n in self.changed(frozen) if not (other_vae and n.startswith("VAE"))]
        if names:
            log(
                f"warning: {where} was trained with another {' and '.join(names)} than is there "
                "now, its pictures will be wrong: give --vae or --sd_path"
            )

    def build(self, num_classes: int) -> nn.Module:
        """The network that is trained: Stable Diffusion's U-Net, or a new one."""
        c = self.config
        if self.unet is not None:
            self.unet.checkpointing = c.checkpointing
            unet = self.unet.float().requires_grad_(True)
            text = self.reader
            return (unet if text is None else TextConditioned(unet, text, c.clip_skip)).train()
        classes = num_classes if c.condition == "class" else 0
        unet = SDUNet(unet_config(c, self.vae, classes), c.checkpointing)
        unet = unet.to(memory_format=torch.channels_last)
        if self.text_config is None:
            return unet
        return TextConditioned(unet, CLIPTextModel(self.text_config))

    def networks(self, model: nn.Module) -> dict:
        """What a checkpoint must tell to build the network again."""
        if isinstance(model, TextConditioned):
            return {"unet": model.unet.config.to_dict(), "text": model.text.config.to_dict()}
        return {"unet": model.config.to_dict()}

    def pipeline(self, model: nn.Module, classes: list[str], **options) -> LatentPipeline:
        return LatentPipeline(
            self.config,
            model,
            self.schedule,
            classes,
            self.device,
            vae=self.vae,
            text=self.text,
            scheduler=self.scheduler,
            **options,
        )


def open_parts(config: Config, device: torch.device) -> Parts:
    """What the configuration of a latent model names. Raises UserError for what does not fit."""
    if config.sd_path is not None:
        return sd_parts(config, device)
    if config.vae is None:
        raise UserError(
            "--mode latent needs latents: give --sd_path, or the --vae of a model from "
            "scratch (python train.py --mode vae)"
        )
    try:
        vae = load_vae(config.vae).float().to(device).to(memory_format=torch.channels_last)
    except UserError as error:
        if not config.adapts:
            raise
        raise UserError(f"{error}; say with --vae where the one of --load_path is now") from None
    schedule = make_schedule(config.schedule, config.time_steps, config.zero_snr)
    parts = Parts(config, device, vae, schedule)
    if config.condition == "text":
        if config.text_encoder != "scratch":
            raise UserError(
                "--condition text without --sd_path has no text encoder: give "
                "--text_encoder scratch"
            )
        tokenizer = byte_level(config.text_length)
        parts.text = TextIds(tokenizer)
        parts.text_config = text_config(config, tokenizer)
    return parts


def sd_parts(
    config: Config,
    device: torch.device,
    vae: str | None = None,
    unet: bool = True,
    override: bool = False,
) -> Parts:
    """Stable Diffusion's, VAE and text encoder in float32.

    vae: another one than its own. unet: whether its U-Net is used. override: whether the
    configuration's objective may contradict what the model states.
    """
    other = None if vae is None else load_vae(vae)
    sd = load_sd(config.sd_path, config.sd_config, config.sd_weights if unet else "raw", other)
    if unet:
        sd.report.append(check_objective(config, override))
    else:
        sd.report = [line for line in sd.report if not line.startswith("unet:")]
    sd.scheduler = read_scheduler(config.sd_path, config.sd_config, PREDICTIONS[config.objective])
    layers = sd.text_encoder.config.num_hidden_layers
    if config.clip_skip > layers:
        raise UserError(
            f"clip_skip is {config.clip_skip}; this text encoder has layers 1 (the "
            f"last) to {layers}"
        )
    layout = torch.channels_last
    text = TextEncoder(sd.tokenizer, sd.text_encoder.float().to(device), config.clip_skip)
    own = sd.vae.float().to(device).to(memory_format=layout)
    network = sd.unet.to(device).to(memory_format=layout) if unet else None
    if unet:
        check_channels(network, own, config.sd_path)
    for line in sd.report:
        log(line)
    parts = Parts(config, device, own, schedule_of(sd.scheduler), sd.scheduler, text, network)
    if config.adapter == "textual_inversion" or config.train_text_encoder:
        parts.text = TextIds(text.tokenizer)
        parts.reader = text.model
    return parts


def check_objective(config: Config, override: bool) -> str:
    """Why a Stable Diffusion model is taken to predict what the configuration says, for people.

    Raises UserError if it states otherwise, unless override.
    """
    path = Path(config.sd_path)
    own = config.objective
    found = find_prediction(path, config.sd_config)
    if found.type not in OBJECTIVES:
        return (
            f"warning: prediction_type {found.type!r} of {path} ({found.source}) is not known; "
            f"--objective {own} is taken"
        )
    stated = OBJECTIVES[found.type]
    if found.source is None:
        hint = "; give --objective v if the pictures are noise" if own == "eps" else ""
        return f"prediction type: {own}, which {path.name} does not state{hint}"
    if stated == own:
        return f"prediction type: {own} ({found.source})"
    if not override:
        raise UserError(f"{path} predicts {stated} ({found.source}): give --objective {stated}")
    return f"warning: --objective {own} overrides {stated}, which {path} states ({found.source})"


def check_channels(unet: SDUNet, vae: AutoencoderKL, where: str) -> None:
    made = vae.config.latent_channels
    taken = (unet.config.in_channels, unet.config.out_channels)
    if taken != (made, made):
        kind = "; 9 are those of an inpainting model: sample.py --mask inpaints with any other"
        raise UserError(
            f"the U-Net of {where} has {taken[0]} channels in and {taken[1]} out, the "
            f"VAE's latents have {made}{kind if taken[0] == 9 else ''}"
        )


def load_latent(
    path: Path,
    weights: str,
    device: torch.device,
    *,
    sd_path: str | None = None,
    sd_config: str | None = None,
    vae: str | None = None,
    clip_skip: int | None = None,
    **options,
) -> LatentPipeline:
    """A latent model that was trained here. sd_path, vae: where those that it needs are now."""
    tensors, config, metadata = load_weights(path, weights)
    foreign = config.sd_path is not None
    new = {"vae": vae}
    if foreign:
        new = {"sd_path": sd_path, "sd_config": sd_config, "clip_skip": clip_skip}
    given = {"--sd_path": sd_path, "--config": sd_config, "--clip_skip": clip_skip}
    if not foreign and (useless := [k for k, v in given.items() if v is not None]):
        raise UserError(f"{path} was trained from scratch: {', '.join(useless)} have no meaning")
    config = dataclasses.replace(config, **{k: v for k, v in new.items() if v is not None})
    try:
        if foreign:
            parts = sd_parts(config, device, vae=vae, unet=False)
        else:
            parts = open_parts(config, device)
    except UserError as error:
        needed = "--sd_path" if foreign else "--vae"
        raise UserError(
            f"{error}; {path} was trained with it: say with {needed} where it is now"
        ) from None
    networks = metadata["networks"]
    unet = build("unet", networks["unet"], str(path))
    check_channels(unet, parts.vae, str(path))
    parts.compare(metadata.get("frozen"), vae is not None, str(path))
    model = unet
    if "text" in networks:
        model = TextConditioned(unet, build("text_encoder", networks["text"], str(path)))
    model = fit(model, tensors, str(path)).to(device).to(memory_format=torch.channels_last)
    return parts.pipeline(model, metadata["classes"], **options)


def open_pipeline(
    load_path: str | None,
    sd_path: str | None,
    weights: str | None,
    device: torch.device,
    *,
    loras: Sequence[tuple[str | Path, float]] = (),
    embeddings: Sequence[str | Path] = (),
    merged: bool = True,
    **options,
) -> Pipeline:
    """The pipeline of a trained model, pixel or latent, or of Stable Diffusion itself.

    weights: "ema" or "raw"; None: averaged ones of a model that was trained here, and the plain
    ones of Stable Diffusion. loras, embeddings, merged: adapters, see `adapt`. options: see
    `open_base`.
    Raises UserError for options that the model has no use for.
    """
    pipeline = open_base(load_path, sd_path, weights, device, **options)
    return adapt(pipeline, loras, embeddings, merged)


def open_base(
    load_path: str | None,
    sd_path: str | None,
    weights: str | None,
    device: torch.device,
    *,
    amp: str = "auto",
    config: str | None = None,
    vae: str | None = None,
    clip_skip: int | None = None,
    height: int | None = None,
    width: int | None = None,
    tiling: bool = False,
    objective: str | None = None,
) -> Pipeline:
    """`open_pipeline` without adapters."""
    options = {"height": height or 0, "width": width or 0, "tile": TILE if tiling else None}
    if load_path is None and sd_path is not None:
        return load_stable_diffusion(
            sd_path, device, amp, config, weights or "raw", vae, clip_skip, objective, options
        )
    weights = weights or "ema"
    path = Path("results/model.pt" if load_path is None else load_path)
    trained = load_weights(path, weights)[1]
    if objective is not None:
        raise UserError(
            f"--objective {objective}: {path} predicts what it was trained on, "
            f"{trained.objective}: leave that out"
        )
    mode = trained.mode
    if mode == "latent":
        return load_latent(
            path,
            weights,
            device,
            sd_path=sd_path,
            sd_config=config,
            vae=vae,
            clip_skip=clip_skip,
            **options,
        )
    if mode == "vae":
        raise UserError(
            f"{path} is a VAE, which draws nothing by itself: train a model on its "
            f"latents, python train.py --mode latent --vae {path.parent}"
        )
    named = {
        "sd_path": sd_path,
        "vae": vae,
        "clip_skip": clip_skip,
        "height": height,
        "width": width,
        "vae_tiling": tiling or None,
        "config": config,
    }
    if given := [f"--{name}" for name, value in named.items() if value is not None]:
        raise UserError(f"{path} is a pixel model: {', '.join(given)}: nothing of that is in it")
    return Pipeline.load(path, weights, device)


def load_stable_diffusion(path, device, amp, config, weights, vae, clip_skip, objective, options):
    """As it is, its weights in the precision of --amp."""
    if config is not None and Path(path).is_dir():
        raise UserError(f"--config describes a single file; the folder {path} has its own")
    dtype = amp_dtype(amp, device)
    override = objective is not None
    objective = objective if override else stated_objective(path, config)
    settings = Config(
        mode="latent",
        condition="text",
        sd_path=str(path),
        sd_config=config,
        sd_weights=weights,
        objective=objective,
        clip_skip=1 if clip_skip is None else clip_skip,
    )
    parts = sd_parts(settings, device, vae, override=override)
    size = parts.unet.config.sample_size or 64
    size = (size if isinstance(size, int) else max(size)) * parts.vae.factor
    parts.config = dataclasses.replace(settings, image_size=size)
    parts.unet.to(dtype or torch.float32)
    if dtype is not None:
        parts.text.model.to(dtype)
    if dtype == torch.bfloat16:  # float16 is too narrow for the VAE's activations
        parts.vae.to(dtype)
    return parts.pipeline(parts.unet, [], **options)
