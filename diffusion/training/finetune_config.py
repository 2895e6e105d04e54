"""Resolve the configuration of a run that begins with a finished model."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .. import UserError
from ..config import DEFAULTS, Config
from ..files.checkpoint import load_weights
from ..files.sd_files import check_averaged, read_image_size, stated_objective
from ..files.validate import digest_tensors

# what a base model's own configuration decides: its network, and more; USUAL unless it is given
NETWORK = (
    "mode",
    "condition",
    "text_encoder",
    "text_dim",
    "text_layers",
    "text_length",
    "layers_per_block",
    "unet_dim",
    "dim_mults",
    "heads",
    "latent_channels",
    "augment",
)
DECIDED = (
    *NETWORK,
    "clip_skip",
    "time_steps",
    "schedule",
    "zero_snr",
    "path",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "objective",
)
USUAL = (
    "image_size",
    "loss",
    "loss_space",
    "t_eps",
    "noise_dist",
    "noise_mean",
    "noise_std",
    "noise_shift",
    "dropout",
    "vae",
    "sd_path",
    "sd_config",
    "sampler",
    "sample_steps",
    "guidance_scale",
)

# of --consistency, unless given: levels of arXiv:2406.14548, float32 as its code
TUNING = {
    "noise_dist": "lognormal",
    "noise_mean": -1.1,
    "noise_std": 2.0,
    "learning_rate": 1e-3,
    "lr_schedule": "linear",
    "amp": "no",
    "sampler": "lcm",
    "sample_steps": 2,
}


class Base(NamedTuple):
    """Hold the finished model that training begins with: what `load_weights` reads."""

    weights: dict[str, Tensor]
    config: Config
    metadata: dict

    def digest(self) -> str:
        """Digest the weights, by which a file that has moved is known again."""
        return digest_tensors(self.weights)[:32]


def open_base(config: Config) -> Base | None:
    """Read the model of --load_path, once for all that asks. Raises UserError if it cannot be."""
    return None if config.load_path is None else Base(*load_weights(Path(config.load_path)))


def resolve_config(
    config: Config, given: set[str] | None = None, base: Base | None = None
) -> Config:
    """Fill in what the base model, or Stable Diffusion, decides of a configuration.

    given: names of the options that were given; None: those that differ from the defaults.
    base: the model of config.load_path. Captions are not dropped (condition_dropout 0) unless
    asked for: without a caption the model is to stay what it is.
    Raises UserError for options that contradict the base or each other.
    """
    if given is None:
        given = {name for name, usual in DEFAULTS.items() if getattr(config, name) != usual}
    if config.mode == "latent" and not (config.sd_path or config.vae or config.load_path):
        raise UserError(
            "--mode latent needs latents: give --sd_path, or the --vae of a model from scratch "
            "(python train.py --mode vae)"
        )
    own = own_settings(config, given)
    asked = "condition" in given or not config.adapts
    if config.sd_path is not None and asked and config.condition != "text":
        raise UserError("--sd_path is trained on captions: give --condition text")
    if not config.adapts:
        config = dataclasses.replace(config, **own)
        config.check_use(given)
        return config
    values: dict = {"condition_dropout": 0.0}
    if config.load_path is not None:
        theirs = base.config
        if theirs.mode == "vae":
            raise UserError(f"--load_path {config.load_path} is a VAE: give a model on its latents")
        against = [
            f"--{n} {getattr(config, n)} (it has {getattr(theirs, n)})"
            for n in DECIDED
            if n in given and getattr(config, n) != getattr(theirs, n)
        ]
        if theirs.sd_path is None and config.sd_path is not None:
            against.append(f"--sd_path {config.sd_path} (it was trained from scratch)")
        if against:
            raise UserError(
                f"--load_path {config.load_path} contradicts {', '.join(against)}: leave that out"
            )
        values |= {n: getattr(theirs, n) for n in USUAL}
        if config.consistency:
            values |= TUNING | {"condition_dropout": theirs.condition_dropout}
        decided = {n: getattr(theirs, n) for n in DECIDED}
    elif config.sd_path is not None:
        values |= {"condition": "text", "loss": "l2", "guidance_scale": 7.5}
        values |= own
        decided = {"mode": "latent"}
    else:
        raise UserError(
            "an adapter, --instance_prompt or --consistency needs a model to start from: give "
            "--load_path FILE, or --sd_path PATH"
        )
    values = {n: v for n, v in values.items() if n not in given}
    config = dataclasses.replace(config, **values | decided)
    check(config)
    config.check_use(given)
    return config


def own_settings(config: Config, given: set[str]) -> dict:
    """Give what a Stable Diffusion model predicts and its training size, unless given."""
    if config.sd_path is None:
        return {}
    if config.sd_weights == "ema" and config.load_path is None:
        check_averaged(config.sd_path, "--sd_weights")
    own = {}
    if "objective" not in given:
        own["objective"] = stated_objective(config.sd_path, config.sd_config)
    if "image_size" not in given and config.image_size == DEFAULTS["image_size"]:
        own["image_size"] = read_image_size(config.sd_path, config.sd_config)
    return own


def check(config: Config) -> None:
    """Raise UserError for options that do not go together."""
    inverts = config.adapter == "textual_inversion"
    if inverts and not (config.token and config.init_word):
        raise UserError(
            "--adapter textual_inversion needs --token, the new word, and --init_word, "
            "the one it starts from"
        )
    if config.class_data:
        folder = Path(config.class_data).resolve()
        for data in (Path(config.data), Path("data") / config.data):
            if data.is_dir() and data.resolve().is_relative_to(folder):
                same = "is --data itself" if data.resolve() == folder else f"holds --data {data}"
                raise UserError(
                    f"--class_data {config.class_data} {same}: class images and instance images "
                    "would be one set; give another folder"
                )
    prompt = config.instance_prompt
    if inverts and prompt is not None and config.token.lower() not in prompt.lower():
        raise UserError(
            f"--instance_prompt {prompt!r} has no {config.token!r}, the --token that is trained"
        )
    if config.streaming and (inverts or prompt is not None or config.condition == "class"):
        raise UserError("captions and classes are replaced before training: drop --streaming")
