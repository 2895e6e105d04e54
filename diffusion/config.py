"""Everything one can set: a frozen dataclass, presets as differences, command line, JSON.

A field is declared once, with its default, its help and what it does to a run that is continued:
fields marked `free` may differ between a run and its continuation, all others may not.
"""

import argparse
import dataclasses
import difflib
import json
import sys
import types
import typing
from dataclasses import dataclass, field, fields

from . import UserError
from .presets import PRESET_OF_DATA, PRESETS
from .rules import SAMPLERS, check_bounds


def opt(default, group: str, help: str, choices: tuple[str, ...] = (), free: bool = False):
    metadata = {"group": group, "help": help, "choices": choices, "free": free}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """A training run. Lengths in pixels, `step` means optimizer step, batch sizes are global."""

    # fmt: off
    mode: str = opt("pixel", "run", "what is diffused, or vae: the network that makes latents is trained", ("pixel", "latent", "vae"))
    save_folder: str = opt("results", "run", "where the run lives; a run found there is continued", free=True)
    overwrite: bool = opt(False, "run", "start anew in save_folder, deleting the run found there", free=True)
    load_path: str | None = opt(None, "run", "start from these weights, at step 0")
    sd_path: str | None = opt(None, "run", "Stable Diffusion 1.x to fine-tune: a diffusers folder, or a .safetensors or .ckpt file", free=True)
    sd_config: str | None = opt(None, "run", "folder with the configs and tokenizer of a single file of other sizes", free=True)
    sd_weights: str = opt("raw", "run", "of a single file with both: its plain weights, or its averaged ones (model_ema.*), which merged files carry stale", ("raw", "ema"), free=True)
    vae: str | None = opt(None, "run", "VAE of a latent model trained from scratch: a run of --mode vae, or a diffusers VAE folder", free=True)
    seed: int = opt(0, "run", "of everything random")
    device: str = opt("auto", "run", "where to compute", ("auto", "cpu", "cuda", "mps"), free=True)
    amp: str = opt("auto", "run", "mixed precision; auto: bf16 where the hardware has it, fp16 on older CUDA, else no", ("auto", "no", "bf16", "fp16"))
    compile: bool = opt(False, "run", "torch.compile the network (minutes of start-up, then faster on GPUs)")
    num_workers: int = opt(2, "run", "threads that decode images", free=True)
    rank_timeout: float = opt(3600.0, "run", "seconds that ranks wait for one before it is named and all stop", free=True)
    wandb: bool = opt(False, "run", "sync TensorBoard to Weights & Biases (pip install wandb)", free=True)

    data: str = opt("toy", "data", "toy, a folder, a set's name (looked up under data/, then fetched) or hf:owner/name")
    data_class: str = opt("all", "data", "use one class folder only, such as cat")
    split: str | None = opt(None, "data", "part of the data: a folder such as valid, a hub set's split, or all (default: train where there are splits)")
    image_column: str | None = opt(None, "data", "column of a hub set's images, or of the file names in a folder's metadata.* (default: image, or the only one)")
    caption_column: str | None = opt(None, "data", "column of a hub set's captions, or of those in metadata.* (default: text, caption or prompt)")
    image_size: int = opt(64, "data", "height and width")
    default_caption: str = opt("", "data", "caption of images that have none")
    flip: bool = opt(True, "data", "mirror half of the images, drawn anew at each step")
    cache: bool = opt(True, "data", "decode images once, into cache_dir, not at every use", free=True)
    cache_dir: str = opt("data/.cache", "data", "where decoded images are kept", free=True)
    streaming: bool = opt(False, "data", "read a hub set as a stream instead of downloading it")

    unet_dim: int = opt(64, "model", "channels of the first level")
    dim_mults: tuple[int, ...] = opt((1, 2, 4, 8), "model", "channels of each level, in units of unet_dim")
    heads: int = opt(4, "model", "attention heads")
    dropout: float = opt(0.0, "model", "inside ResBlocks")
    condition: str = opt("none", "model", "what the network is told: nothing, the class folder, or the caption (latent mode)", ("none", "class", "text"))
    text_encoder: str = opt("clip", "model", "of captions: that of sd_path, frozen, or scratch: a small one trained along", ("clip", "scratch"))
    text_dim: int = opt(128, "model", "width of a text encoder from scratch")
    text_layers: int = opt(4, "model", "its layers")
    text_length: int = opt(256, "model", "its context length, in bytes of the caption")
    clip_skip: int = opt(1, "model", "text encoder layer that is used, from the end; 1: the last")
    layers_per_block: int = opt(2, "model", "ResBlocks of a level (latent mode, from scratch)")
    latent_channels: int = opt(4, "model", "channels of a VAE's latents (mode vae)")
    condition_dropout: float = opt(0.1, "model", "share of samples whose condition is hidden, for guidance")
    checkpointing: bool = opt(False, "model", "recompute activations in backward: less memory, a third more time")

    time_steps: int = opt(1000, "diffusion", "T, the length of the forward process")
    schedule: str = opt("cosine", "diffusion", "noise schedule", ("cosine", "linear", "sigmoid", "scaled_linear"))
    zero_snr: bool = opt(False, "diffusion", "rescale the schedule so that x_T is pure noise (needs objective v or x0)")
    objective: str = opt("v", "diffusion", "what the network predicts", ("eps", "x0", "v"))
    loss: str = opt("l1", "diffusion", "distance to the target", ("l1", "l2", "huber"))
    noise_offset: float = opt(0.0, "diffusion", "noise added to whole channels, for very dark and bright images")
    kl_weight: float = opt(1e-6, "diffusion", "of the KL term of a VAE (mode vae)")
    perceptual_weight: float = opt(0.0, "diffusion", "of LPIPS in a VAE's loss (mode vae; pip install lpips)")
    min_snr_gamma: float = opt(0.0, "diffusion", "min-SNR loss weights (5 in the paper); 0: equal weights")

    adapter: str = opt("none", "adapter", "what is trained beside the model of load_path or sd_path, which is left as it is", ("none", "lora", "textual_inversion"))
    rank: int = opt(4, "adapter", "of a LoRA's branches")
    alpha: float | None = opt(None, "adapter", "a LoRA's scale times its rank (default: the rank)")
    targets: str = opt("attention", "adapter", "a LoRA's layers: attention,mlp,conv or all, or a regular expression over module names")
    lora_dropout: float = opt(0.0, "adapter", "of what a LoRA's branches see")
    train_text_encoder: bool = opt(False, "adapter", "train the text encoder as well, by LoRA too where the U-Net is")
    token: str | None = opt(None, "adapter", "the word that textual inversion adds, such as <my-style>")
    init_word: str | None = opt(None, "adapter", "the word whose vectors it starts from")
    vectors: int = opt(1, "adapter", "how many vectors the token has")
    instance_prompt: str | None = opt(None, "adapter", "DreamBooth: the caption of all images, such as 'a photo of sks dog'")
    class_prompt: str | None = opt(None, "adapter", "prior preservation: what the images are cases of, such as 'a photo of a dog'")
    class_images: int = opt(100, "adapter", "its images, drawn by the model itself where they are missing")
    class_data: str | None = opt(None, "adapter", "folder for them (default: one in cache_dir)")
    prior_weight: float = opt(1.0, "adapter", "of their loss")

    batch_size: int = opt(32, "optimisation", "samples per step, over all ranks and accumulation")
    train_steps: int = opt(100_000, "optimisation", "length of the run", free=True)
    epochs: float | None = opt(None, "optimisation", "length of the run in passes over the data, instead of train_steps", free=True)
    learning_rate: float = opt(1e-3, "optimisation", "of AdamW, at its highest")
    lr_schedule: str = opt("constant", "optimisation", "after the warm-up", ("constant", "linear", "cosine"))
    lr_warmup_steps: int = opt(20, "optimisation", "steps over which the learning rate rises from 0")
    weight_decay: float = opt(0.0, "optimisation", "of AdamW")
    grad_accum: int = opt(1, "optimisation", "micro-batches per step and rank")
    grad_clip: float = opt(1.0, "optimisation", "largest gradient norm; 0: no clipping")
    ema_decay: float = opt(0.9999, "optimisation", "largest decay of the averaged weights; (1+n)/(10+n) before")

    save_and_sample_every: int = opt(1000, "output", "steps between checkpoints, held-out losses and sample grids", free=True)
    log_every: int = opt(10, "output", "steps between lines of metrics.jsonl", free=True)
    keep_last: int = opt(3, "output", "checkpoints kept", free=True)
    num_samples: int = opt(64, "output", "images in a sample grid; 0: none", free=True)
    sampler: str = opt("ddim", "output", "for sample grids", SAMPLERS, free=True)
    sample_steps: int = opt(50, "output", "network evaluations per sample, at most time_steps", free=True)
    fid: bool = opt(False, "output", "measure FID during training (evaluation/metrics.py)", free=True)
    fid_every: int = opt(5000, "output", "steps between FID measurements", free=True)
    fid_num_images: int = opt(10_000, "output", "samples of an FID measurement", free=True)
    fid_features: str | None = opt(None, "output", "TorchScript network instead of Inception, a program that is run; the distance is named after the file", free=True)
    validation_prompts: str | None = opt(None, "output", "file with a prompt per line for sample grids (default: captions of the data)", free=True)
    guidance_scale: float = opt(1.0, "output", "classifier-free guidance of sample grids; 1: none", free=True)
    # fmt: on

    def __post_init__(self):
        for f in fields(self):
            _check_field(f, getattr(self, f.name))
        self._check_together()

    def _check_together(self) -> None:
        check_bounds(vars(self))
        if self.mode != "latent" and self.condition == "text":
            raise UserError(
                "condition text needs --mode latent: the pixel network reads no captions"
            )
        if self.sd_path is not None and self.vae is not None and self.mode == "latent":
            raise UserError("give either --sd_path or --vae: both say where the VAE comes from")
        if self.mode == "vae" and (self.fid or self.condition != "none"):
            raise UserError("--mode vae trains no sampler: it takes no --fid and no --condition")
        if self.sd_path is not None and self.condition != "text" and not self.adapts:
            raise UserError("--sd_path fine-tunes on captions: give --condition text")
        if self.zero_snr and self.objective == "eps":
            raise UserError("zero_snr needs objective v or x0: where there is only noise, eps says "
                            "nothing about x0")  # fmt: skip
        if self.fid_features is not None and not self.fid:
            raise UserError("fid_features is the network of --fid: give --fid as well")
        if self.streaming and not self.data.startswith("hf:"):
            raise UserError("streaming reads hub sets only; give --data hf:owner/name")

    @property
    def adapts(self) -> bool:
        """Whether a finished model is the start, whose own settings count (training/adapters.py)."""
        return self.adapter != "none" or self.instance_prompt is not None

    # --- JSON and continuation ---------------------------------------------------------------

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Raises UserError for fields that this version does not know or cannot use."""
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise UserError(f"configuration has unknown fields: {', '.join(sorted(unknown))}")
        values = dict(values)
        if isinstance(values.get("dim_mults"), list):
            values["dim_mults"] = tuple(values["dim_mults"])
        return cls(**values)

    def differences(self, other: "Config") -> dict[str, tuple]:
        """{field: (mine, the other's)} for fields that a continued run may not change."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name))
                 for f in fields(self) if not f.metadata["free"]}  # fmt: skip
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _types(f: dataclasses.Field) -> tuple[type, ...]:
    if isinstance(f.type, types.UnionType):
        return typing.get_args(f.type)
    return (typing.get_origin(f.type) or f.type,)


def _check_field(f: dataclasses.Field, value) -> None:
    allowed = _types(f)
    ok = isinstance(value, allowed) or (float in allowed and isinstance(value, int))
    if not ok or (isinstance(value, bool) and bool not in allowed):
        raise UserError(
            f"{f.name} is {value!r}; expected {' or '.join(t.__name__ for t in allowed)}"
        )
    if f.metadata["choices"] and value not in f.metadata["choices"]:
        raise UserError(f"{f.name} is {value!r}; {_choose(value, f.metadata['choices'])}")


def _choose(value, choices) -> str:
    close = difflib.get_close_matches(str(value), choices, 1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}choose one of {', '.join(choices)}"


# --- command line -----------------------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines, and adds defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str:
        unsaid = action.default in (None, "", False, argparse.SUPPRESS)
        return action.help if unsaid else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse that never guesses an abbreviation, but says which option may have been meant."""

    def __init__(self, **options):
        options = dict(usage="%(prog)s [options]", formatter_class=HelpFormatter) | options
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        values, unknown = super().parse_known_args(args, namespace)
        if unknown:
            if not unknown[0].startswith("-"):
                self.error(
                    f"{unknown[0]!r} stands alone: options are --name value (--help lists all)"
                )
            names = [s for a in self._actions for s in a.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], names, 1)
            guess = f"; did you mean {close[0]}?" if close else " (--help lists all)"
            self.error(f"unknown option {unknown[0]}{guess}")
        return values

    @property
    def defaults(self) -> dict:
        """{option: what it is where it is not given}."""
        return {action.dest: action.default for action in self._actions}

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def int_list(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def add_config_arguments(parser: Parser) -> None:
    """One option per field, grouped; an option not given does not appear in the namespace."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in fields(Config):
        group = f.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        text = f.metadata["help"].replace("%", "%%")
        options = dict(dest=f.name, default=argparse.SUPPRESS)
        if f.type is bool:  # help shows the one that changes the default
            for name, value in ((f"--{f.name}", True), (f"--no_{f.name}", False)):
                line = text if value else f"do not {text}"
                options["help"] = argparse.SUPPRESS if value == f.default else line
                groups[group].add_argument(name, action="store_const", const=value, **options)
            continue
        kind = int_list if f.name == "dim_mults" else _types(f)[0]
        shown = ",".join(map(str, f.default)) if f.name == "dim_mults" else f.default
        if f.metadata["choices"]:
            options["metavar"] = "|".join(f.metadata["choices"])
        else:
            options["metavar"] = {str: "TEXT", int: "N", float: "X"}.get(kind, "N,N")
        names = [f"--{f.name}"] + (["--data_path"] if f.name == "data" else [])
        default = "" if f.default is None or f.default == "" else f" (default: {shown})"
        groups[group].add_argument(*names, type=kind, help=text + default, **options)


def config_from_args(values: dict, preset: str | None = None) -> Config:
    """Defaults, then the preset, then what was given.

    With no preset named, --sd_path brings fine_tune, unless an adapter is trained, and --data NAME
    its own (PRESET_OF_DATA); preset "none" prevents that.
    """
    check_bounds(values, "train")
    if preset is None and values.get("sd_path") is not None:
        preset = "fine_tune" if values.get("adapter", "none") == "none" else "none"
    if preset is None:
        preset = PRESET_OF_DATA.get(values.get("data", "toy"), "none")
    if preset != "none" and preset not in PRESETS:
        raise UserError(f"preset {preset!r} is unknown; {_choose(preset, ('none', *PRESETS))}")
    if "train_steps" in values and "epochs" in values:
        raise UserError("give either --train_steps or --epochs: both say how long to train")
    base = dict(PRESETS.get(preset, {}))
    if "train_steps" in values:
        base.pop("epochs", None)
    return Config(**base | values)


def run_script(main) -> None:
    """Call a script's main; a user's mistake becomes one line on stderr and exit status 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
