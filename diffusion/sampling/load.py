"""A pipeline from what a configuration, a checkpoint or a Stable Diffusion file names.

load               any model, by its path
open_pipeline      the same for the commands, with all their options
open_stack         for training: what of a latent model is not trained
build_network      the network that is
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor, nn

from .. import UserError, shown
from ..config import Config, model_path, sides
from ..data.latents import settings_digest
from ..files.atomic import blame
from ..files.checkpoint import is_own, load_weights
from ..files.hub_files import local
from ..files.sd_files import (
    OBJECTIVES,
    PREDICTIONS,
    find_prediction,
    load_sd,
    load_vae,
    not_taken,
    read_scheduler,
    stated_objective,
)
from ..files.strict import build, load_strict
from ..files.tokenizer_files import check_tokenizer
from ..models import build as networks
from ..models.build import blank
from ..models.configs import CLIPTextConfig
from ..models.sd_unet import SDUNet
from ..models.text_unet import TextUNet
from ..models.tokenizer import byte_level
from ..process.schedule import (
    NoisePath,
    cosine,
    from_betas,
    linear,
    make_path,
    reinterpret,
    scaled_linear,
    spread,
    zero_terminal_snr,
)
from ..runtime.distributed import log
from ..runtime.precision import amp_dtype
from .adapt import adapt
from .codec import LatentCodec
from .conditioning import ClassLabels, Prompts, Unconditional
from .pipeline import Pipeline

SHIPPED = Path(__file__).parents[1] / "shipped" / "toy_faces.safetensors"
TILE = 64  # latent pixels of a tile's side


BETAS = {"linear": linear, "scaled_linear": scaled_linear}


def schedule_of(scheduler: dict) -> NoisePath:
    """Make the noise path of a complete scheduler_config.json, see `complete_scheduler`."""
    T = scheduler["num_train_timesteps"]
    kind = scheduler["beta_schedule"]
    betas = scheduler["trained_betas"]
    if betas is not None:
        schedule = from_betas(torch.tensor(betas, dtype=torch.float64))
    elif kind in BETAS:  # these scale betas by 1000 / T
        ends = (scheduler[name] * T / 1000 for name in ("beta_start", "beta_end"))
        schedule = BETAS[kind](T, *ends)
    else:
        schedule = cosine(T)
    rescale = scheduler.get("rescale_betas_zero_snr", False)
    return zero_terminal_snr(schedule) if rescale else schedule


def path_of(config: Config, base: NoisePath | None = None) -> NoisePath:
    """Make the noise path that a configuration names.

    base: that of a Stable Diffusion model, whose network is read on it.
    """
    c = config
    if base is None:
        path = make_path(
            c.path,
            c.time_steps,
            c.objective,
            schedule=c.schedule,
            zero_snr=c.zero_snr,
            sigma_data=c.sigma_data,
            sigma_min=c.sigma_min,
            sigma_max=c.sigma_max,
        )
    else:
        path = base if c.path == "vp" else reinterpret(base, c.path)
    return spread(path, c.noise_dist, c.noise_mean, c.noise_std, c.noise_shift)


@dataclass(frozen=True, eq=False)
class FrozenStack:
    """Hold what a latent model needs beside the network that is trained.

    scheduler: what a scheduler_config.json says of timesteps; {} without one.
    prompts: what reads texts, of a model with --condition text. text_config: the sizes of a text
    encoder that is trained from scratch.
    unet: Stable Diffusion's, where that is wanted.
    """

    codec: LatentCodec
    schedule: NoisePath
    scheduler: dict = field(default_factory=dict)
    prompts: Prompts | None = None
    text_config: CLIPTextConfig | None = None
    unet: SDUNet | None = None

    @property
    def digests(self) -> dict:
        """Describe what the network depends on that is neither codec nor condition."""
        return {"scheduler configuration": settings_digest(self.scheduler)}


def open_stack(
    config: Config, device: torch.device, tile: int | None = None, **of_sd
) -> FrozenStack:
    """Open what the configuration of a latent model names. of_sd: see `open_sd_stack`.

    Raises UserError for what is missing.
    """
    if config.sd_path is not None:
        return open_sd_stack(config, device, tile, **of_sd)
    try:
        vae = load_vae(config.vae).float().to(device).to(memory_format=torch.channels_last)
    except UserError as error:
        raise UserError(
            f"{error}; --vae takes the folder of a run of --mode vae, or of a diffusers VAE"
        ) from None
    prompts = None
    sizes = None
    if config.condition == "text":
        if config.text_encoder != "scratch":
            raise UserError(
                "--condition text without --sd_path has no text encoder: give "
                "--text_encoder scratch"
            )
        prompts = Prompts(byte_level(config.text_length), None, joint=True, device=device)
        sizes = networks.text_config(config.text_dim, config.text_layers, prompts.tokenizer)
    schedule = path_of(config)
    codec = LatentCodec(vae, device, tile=tile)
    return FrozenStack(codec, schedule, prompts=prompts, text_config=sizes)


def open_sd_stack(
    config: Config,
    device: torch.device,
    tile: int | None,
    vae: str | None = None,
    unet: bool = True,
    override: bool = False,
    inpaints: bool = False,
) -> FrozenStack:
    """Open Stable Diffusion's, VAE and text encoder in float32.

    vae: another one than its own. unet: whether its U-Net is used. override: whether the
    configuration's objective may contradict what the model states. inpaints: see `check_channels`.
    """
    other = None if vae is None else load_vae(vae)
    sd = load_sd(config.sd_path, config.sd_config, config.sd_weights if unet else "raw", other)
    report = [line for line in sd.report if unet or not line.startswith("unet:")]
    if unet:
        report.append(check_objective(config, override))
    scheduler = read_scheduler(
        config.sd_path, config.sd_config, PREDICTIONS.get(config.objective, config.objective)
    )
    if odd := not_taken(scheduler):
        report.append(f"scheduler_config.json: not taken: {', '.join(odd)}")
    layers = sd.text_encoder.config.num_hidden_layers
    if config.clip_skip > layers:
        raise UserError(
            f"clip_skip is {config.clip_skip}; this text encoder has layers 1 (the "
            f"last) to {layers}"
        )
    if unet:
        check_channels(sd.unet, sd.vae.config.latent_channels, config.sd_path, inpaints)
    for line in report:
        log(line)
    joint = config.adapter == "textual_inversion" or config.train_text_encoder
    encoder = sd.text_encoder.float().to(device)
    layout = torch.channels_last
    return FrozenStack(
        LatentCodec(sd.vae.float().to(device).to(memory_format=layout), device, tile=tile),
        path_of(config, schedule_of(scheduler)),
        scheduler if config.path == "vp" else {},  # whose timesteps are of its own path
        Prompts(sd.tokenizer, encoder, config.clip_skip, joint, device=device),
        unet=sd.unet.to(device).to(memory_format=layout) if unet else None,
    )


def conditioning_of(
    config: Config, classes: Sequence[str], device: torch.device, prompts: Prompts | None = None
) -> Unconditional | ClassLabels | Prompts:
    """Choose what the network of a configuration is conditioned on."""
    if config.condition == "text":
        return dataclasses.replace(prompts, classes=classes)
    return ClassLabels(classes, device) if config.condition == "class" else Unconditional(classes)


def build_network(config: Config, num_classes: int, stack: FrozenStack | None = None) -> nn.Module:
    """Build the network that is trained: Stable Diffusion's U-Net of the stack, or a new one.

    stack: of a latent model. With a text encoder that runs along, the two are one module.
    """
    classes = num_classes if config.condition == "class" else 0
    prompts = None if stack is None else stack.prompts
    if stack is None:
        unet = networks.build_pixel_unet(
            config.unet_dim,
            config.dim_mults,
            heads=config.heads,
            dropout=config.dropout,
            num_classes=classes,
        )
    elif stack.unet is not None:
        unet = stack.unet.float().requires_grad_(True).train()
    else:
        codec = stack.codec
        h, w = (side // codec.factor for side in sides(config.image_size))
        sizes = networks.unet_config(
            config.unet_dim,
            config.dim_mults,
            config.layers_per_block,
            channels=codec.channels,
            sample_size=h if h == w else (h, w),
            num_classes=classes,
            text=config.condition == "text",
            text_dim=config.text_dim,
        )
        unet = networks.build("unet", sizes)
    if config.augment:
        unet.read_vector()
    unet = unet.to(memory_format=torch.channels_last)
    unet.checkpointing = config.checkpointing
    if prompts is None or not prompts.joint:
        return unet
    text = prompts.encoder
    if text is None:
        text = networks.build("text_encoder", stack.text_config)
    return TextUNet(unet, text, prompts.skip).train()


def check_objective(config: Config, override: bool) -> str:
    """Say why a Stable Diffusion model is taken to predict what the configuration says.

    Raises UserError if it states otherwise, unless override.
    """
    path = Path(config.sd_path)
    own = config.objective
    found = find_prediction(path, config.sd_config)
    if found.type not in OBJECTIVES:
        return (
            f"warning: prediction_type {shown(found.type)} of {path} ({found.source}) is not "
            f"known; --objective {own} is taken"
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


# by the channels that a U-Net reads beside four of latents
KINDS = {
    1: "depth (depth2img), which is not supported",
    3: "upscaling, which is not supported",
    4: "instruct-pix2pix, which is not supported",
    5: "inpainting: sample.py --init_image --mask samples from it, and nothing trains it",
}


def check_channels(unet: SDUNet, made: int, where: str, inpaints: bool = False) -> None:
    """Raise UserError for a U-Net that does not diffuse latents of `made` channels.

    inpaints: whether it may read a mask and other latents beside them.
    """
    taken = (unet.config.in_channels, unet.config.out_channels)
    if taken == (made, made) or (inpaints and taken == (2 * made + 1, made)):
        return
    kind = KINDS.get(taken[0] - made) if taken[1] == made == 4 else None
    raise UserError(
        f"the U-Net of {where} has {taken[0]} channels in and {taken[1]} out, the "
        f"VAE's latents have {made}{f'; it is a model of {kind}' if kind else ''}"
    )


def check_digests(found: dict, saved: dict | None) -> list[str]:
    """Name the frozen networks that are not those that a checkpoint was trained with."""
    return [name for name, digest in (saved or {}).items() if found.get(name) != digest]


# --- pipelines -----------------------------------------------------------------------------------


def default_model() -> Path:
    """Choose the model where none is named: results/model.pt, else the one of the program."""
    own = Path("results/model.pt")
    if own.exists():
        return own
    log(
        "no results/model.pt yet: these are faces of the model that comes with the program; "
        "python train.py trains your own"
    )
    return SHIPPED


def load(
    path: str | Path | None,
    weights: str | None = None,
    device: str | torch.device = "cpu",
    sd_path: str | None = None,
    **options,
) -> Pipeline:
    """Open any model as a `Pipeline`.

    path: a model.pt or ema.safetensors, the folder of a run, or Stable Diffusion 1.x as a
    diffusers folder or a single file; or one of these on the hub, hf:owner/name[/file]. None: see
    `default_model`.
    weights: "ema" or "raw"; None: EMA weights of a model that was trained here, and the plain ones
    of Stable Diffusion. sd_path: where the one is that the model was trained from.
    options: guide, loras, embeddings, vae, height, ..., see `open_pipeline`.
    Raises UserError for files that are none, and for options that the model has no use for.
    """
    path = default_model() if path is None else model_path(path)
    file = local(path)
    foreign = file.is_dir() or (file.is_file() and not is_own(file))
    where = (None, str(path)) if foreign else (str(path), sd_path)
    return open_pipeline(*where, weights, torch.device(device), **options)


@dataclass(frozen=True)
class Options:
    """Hold the options of sample.py that say how a model is opened; None: the model's own."""

    amp: str = "auto"
    config: str | None = None
    vae: str | None = None
    clip_skip: int | None = None
    height: int | None = None
    width: int | None = None
    vae_tiling: bool = False
    objective: str | None = None

    @property
    def tile(self) -> int | None:
        return TILE if self.vae_tiling else None


def open_pipeline(
    load_path: str | None,
    sd_path: str | None,
    weights: str | None,
    device: torch.device,
    *,
    loras: Sequence[tuple[str | Path, float]] = (),
    embeddings: Sequence[str | Path] = (),
    merged: bool = True,
    guide: str | None = None,
    **options,
) -> Pipeline:
    """Open a trained model, pixel or latent, or Stable Diffusion itself, with adapters put in.

    weights: see `load`. loras, embeddings, merged: see `adapt`. options: see `Options`.
    guide: the path of another model, see `Pipeline`, which is opened with these options, too; that
    of the model itself means its raw weights.
    Raises UserError for options that the model has no use for.
    """
    wanted = Options(**options)
    if load_path is None and sd_path is not None:
        pipeline = load_stable_diffusion(sd_path, weights or "raw", device, wanted)
    else:
        pipeline = load_own(Path(load_path), sd_path, weights or "ema", device, wanted)
    guide = guide and model_path(guide)
    raw = "raw" if guide == load_path else None
    pipeline.guide = guide and load(guide, raw, device, sd_path, **options)
    return adapt(pipeline, loras, embeddings, merged)


def load_own(
    path: Path, sd_path: str | None, weights: str, device: torch.device, wanted: Options
) -> Pipeline:
    """Make the pipeline of a model that was trained here. sd_path: where its model is now."""
    tensors, config, metadata = load_weights(path, weights)
    if wanted.objective is not None:
        raise UserError(
            f"--objective {wanted.objective}: {path} predicts what it was trained on, "
            f"{config.objective}: leave that out"
        )
    if config.mode == "vae":
        raise UserError(
            f"{path} is a VAE, which samples nothing by itself: train a model on its "
            f"latents, python train.py --mode latent --vae {quote(str(path.parent))}"
        )
    if config.mode == "latent":
        return load_latent(path, tensors, config, metadata, device, sd_path, wanted)
    named = {"sd_path": sd_path} | vars(wanted) | {"amp": None}
    if given := [f"--{name}" for name, value in named.items() if value not in (None, False)]:
        raise UserError(f"{', '.join(given)}: {path} is a pixel model, which has no use for that")
    classes = metadata["classes"]
    # what a file claims costs nothing until it fits
    with blame(f"{path} has a configuration of no network"), blank():
        model = build_network(config, len(classes))
    own = {k: v.to(torch.float32, copy=True) for k, v in tensors.items()}  # of no file
    model = load_strict(model, own, str(path)).to(device).to(memory_format=torch.channels_last)
    schedule = path_of(config)
    conditioning = conditioning_of(config, classes, device)
    return Pipeline(config, model, schedule, conditioning=conditioning, device=device)


def load_latent(
    path: Path,
    tensors: dict[str, Tensor],
    config: Config,
    metadata: dict,
    device: torch.device,
    sd_path: str | None,
    wanted: Options,
) -> Pipeline:
    """Make the pipeline of a model of --mode latent from what its file holds.

    sd_path, and vae of wanted: where what the model needs is now.
    """
    given = {"sd_path": sd_path, "sd_config": wanted.config, "clip_skip": wanted.clip_skip}
    given = {name: value for name, value in given.items() if value is not None}
    needed = "--vae" if config.sd_path is None else "--sd_path"
    if config.sd_path is None:
        if given:
            useless = ", ".join(f"--{name.replace('sd_config', 'config')}" for name in given)
            raise UserError(f"{useless}: {path} was trained from scratch and needs none")
        given = {"vae": wanted.vae or config.vae}
    config = dataclasses.replace(config, **given)
    try:
        stack = open_stack(config, device, wanted.tile, vae=wanted.vae, unet=False)
    except UserError as error:
        raise UserError(
            f"{error}; {path} was trained with it: say with {needed} where it is now"
        ) from None
    sizes = metadata["networks"]
    model = build("unet", sizes.get("unet"), str(path))
    check_channels(model, stack.codec.channels, str(path))
    if config.augment:
        model.read_vector()
    prompts = stack.prompts
    if "text" in sizes:
        model = TextUNet(model, build("text_encoder", sizes["text"], str(path)))
        check_tokenizer(prompts.tokenizer, model.text.config, str(path))
    model = load_strict(model, tensors, str(path)).to(device).to(memory_format=torch.channels_last)
    if "text" in sizes:
        prompts = dataclasses.replace(prompts, encoder=model.text)
    conditioning = conditioning_of(config, metadata["classes"], device, prompts)
    found = stack.codec.digests | conditioning.digests | stack.digests
    changed = check_digests(found, metadata.get("frozen"))
    if names := [n for n in changed if wanted.vae is None or not n.startswith("VAE")]:
        log(
            f"warning: {path} was trained with another {' and '.join(names)} than is there "
            "now, its pictures will be wrong: give --vae or --sd_path"
        )
    parts = (stack.schedule, stack.codec, conditioning, device, stack.scheduler)
    return Pipeline(config, model, *parts, wanted.height, wanted.width)


def load_stable_diffusion(
    path: str, weights: str, device: torch.device, wanted: Options
) -> Pipeline:
    """Make the pipeline of Stable Diffusion as it is, its weights in the precision of --amp."""
    if wanted.config is not None and local(path, sd=True).is_dir():
        raise UserError(f"--config describes a single file; the folder {path} has its own")
    dtype = amp_dtype(wanted.amp, device)
    config = Config(
        mode="latent",
        condition="text",
        sd_path=path,
        sd_config=wanted.config,
        sd_weights=weights,
        objective=wanted.objective or stated_objective(path, wanted.config),
        clip_skip=1 if wanted.clip_skip is None else wanted.clip_skip,
    )
    override = wanted.objective is not None
    stack = open_sd_stack(config, device, wanted.tile, wanted.vae, override=override, inpaints=True)
    side = stack.unet.config.side * stack.codec.factor
    config = dataclasses.replace(config, image_size=side)
    stack.unet.to(dtype or torch.float32)
    if dtype is not None:
        stack.prompts.encoder.to(dtype)
    if dtype == torch.bfloat16:  # float16 is too narrow for the VAE's activations
        stack.codec.vae.to(dtype)
    parts = (stack.schedule, stack.codec, stack.prompts, device, stack.scheduler)
    return Pipeline(config, stack.unet, *parts, wanted.height, wanted.width)
