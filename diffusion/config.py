"""Every option of training, and how all scripts read theirs: one row an option.

A row has the option's default, help, bounds and what it requires. `Config` is a frozen dataclass
of such rows; presets are differences from its defaults. Fields marked `free` may differ between a
run and the run that resumes it, and so may PATHS; all others may not. An option that would do nothing is an error.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from . import UserError, printable, shown, some
from .presets import PRESET_OF_DATA, PRESETS, PROCESSES
from .process.names import (
    ALIASES,
    DEFAULT_SAMPLER,
    DEFAULT_STEPS,
    LOSSES,
    NOISE_DISTS,
    OBJECTIVES,
    SCHEDULES,
)
from .process.names import PATHS as NOISE_PATHS
from .process.names import SAMPLERS as SAMPLER_TABLE

SAMPLERS = (*SAMPLER_TABLE, *ALIASES)
AMP = ("auto", "no", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")


class Rule(NamedTuple):
    """Hold a condition on a value (bounds) or on all options (what an option requires).

    typed: asked of the command line only; configurations from before there was the rule are read.
    """

    text: str
    holds: Callable[[typing.Any], bool]
    typed: bool = False

    def __and__(self, other: "Rule") -> "Rule":
        return Rule(f"{self.text} and {other.text}", lambda v: self.holds(v) and other.holds(v))


# --- bounds ---------------------------------------------------------------------------------------


def at_least(low: int) -> Rule:
    return Rule(f"at least {low}", lambda v: v >= low)


def between(low: float, high: float, typed: bool = False) -> Rule:
    return Rule(f"from {low:,} to {high:,}", lambda v: low <= v <= high, typed)


POSITIVE = Rule("above 0", lambda v: v > 0)
NOT_NEGATIVE = Rule("0 or more", lambda v: v >= 0)
FRACTION = between(0, 1)
BELOW_ONE = Rule("from 0 to below 1", lambda v: 0 <= v < 1)
STEPS = between(1, 1_000_000)
SIDE = between(1, 16_384)  # pixels
SIZE = Rule(
    "from 1 to 16,384 pixels, or such a height and width, as in 96x128",
    lambda v: len(sides(v)) == 2 and all(map(SIDE.holds, sides(v))),
)
WIDTH = between(1, 65_536)  # channels
GUIDANCE = between(0, 1000, typed=True)  # far beyond it pictures saturate, then numbers overflow
INTERVAL = Rule("two numbers from 0 on, the lower first", lambda v: not v or 0 <= v[0] <= v[-1])
GUIDED = Rule("a --guidance_scale other than 1", lambda a: a.guidance_scale != 1)
SEED = Rule("from 0 to 2**63 - 1", lambda v: 0 <= v < 2**63, typed=True)
SEEDS = Rule("whole numbers from 0 to 2**63 - 1", lambda v: v and all(map(SEED.holds, v)), True)
COUNTS = Rule("whole numbers above 0, such as 1,2,4,8", lambda v: v and min(v) > 0)
# the shell may pass on other bytes, as half a surrogate each
UTF8 = Rule(
    "text in UTF-8; if it is, set a UTF-8 locale: LC_ALL=C.UTF-8",
    lambda v: not any("\ud800" <= c <= "\udfff" for c in "".join(v)),
)


def check_bounds(
    values: Mapping[str, object], bounds: Mapping[str, Rule | None], typed: bool = True
) -> None:
    """Check values of options against their bounds; None is an option that was not given.

    typed: whether they come from a command line; a stored configuration may hold infinity.
    Raises UserError for the first value out of bounds, and for floats that are not finite.
    """
    for name, value in values.items():
        if isinstance(value, float) and not (math.isfinite(value) or not typed and value == value):
            raise UserError(f"{name} is {value}; it must be a finite number")
        rule = bounds.get(name)
        if not (value is None or rule is None or rule.typed > typed or rule.holds(value)):
            raise UserError(f"{name} is {shown(value, 400)}; it must be {rule.text}")
        if typed and isinstance(value, int) and value >= 2**63:
            raise UserError(f"{name} must be below 2**63")


def check_use(options, defaults: Mapping[str, object], requires: Mapping[str, Rule | None]) -> None:
    """Raise UserError for options that differ from these defaults and would do nothing."""
    useless: dict[str, list[str]] = {}
    for name, default in defaults.items():
        rule = requires.get(name)
        if rule is not None and getattr(options, name) != default and not rule.holds(options):
            useless.setdefault(rule.text, []).append(f"--{name}")
    for text, names in useless.items():
        raise UserError(f"{', '.join(names)}: no effect without {text}")


# --- what options of training require -------------------------------------------------------------

DIFFUSION = Rule("--mode pixel or latent", lambda c: c.mode != "vae")
PIXEL = Rule("--mode pixel", lambda c: c.mode == "pixel")
LATENT = Rule("--mode latent", lambda c: c.mode == "latent")
VAE = Rule("--mode vae", lambda c: c.mode == "vae")
SCRATCH = Rule("a network from scratch", lambda c: c.sd_path is None)
DENOISING = DIFFUSION & Rule("a run without --consistency", lambda c: not c.consistency)
VP = Rule("--path vp", lambda c: c.path == "vp")
EDM = Rule("--path edm", lambda c: c.path == "edm")
PRECONDITIONED = Rule("--path edm or --objective edm", lambda c: "edm" in (c.path, c.objective))
NORMAL = Rule("--noise_dist lognormal or logit_normal", lambda c: c.noise_dist != "uniform")
LOSS_SPACE = Rule("--loss_space", lambda c: c.loss_space is not None)
OTHER_DATA = Rule("--data FOLDER or hf:owner/name, not toy", lambda c: c.data != "toy")
CONDITION = Rule("--condition class or text", lambda c: c.condition != "none")
TEXT = Rule("--condition text, a model that reads prompts", lambda c: c.condition == "text")
SD_PATH = Rule("--sd_path", lambda c: c.sd_path is not None)
SD_FILE = Rule(
    "--sd_path FILE",
    lambda c: (
        c.sd_path and not (Path(c.sd_path).is_dir() or re.fullmatch("hf:[^/]+/[^/]+", c.sd_path))
    ),
)
SD_START = Rule("a start from --sd_path itself", lambda c: c.load_path is None)
WHOLE = Rule("--adapter none", lambda c: c.adapter == "none")
LORA = Rule("--adapter lora", lambda c: c.adapter == "lora")
INVERSION = TEXT & Rule("--adapter textual_inversion", lambda c: c.adapter == "textual_inversion")
DREAMBOOTH = TEXT & Rule("--instance_prompt", lambda c: c.instance_prompt is not None)
TEXT_ENCODER = TEXT & Rule(
    "--adapter lora, or --instance_prompt alone on a model from scratch",
    lambda c: c.adapter == "lora" or c.adapter == "none" and c.adapts and c.sd_path is None,
)
FID = Rule("--fid", lambda c: c.fid)
UNPAIRED = Rule(
    "a run without --streaming and --class_prompt",
    lambda c: not c.streaming and c.class_prompt is None,
)
HUB_NAME = Rule("owner/name", re.compile(r"[\w.-]+/[\w.-]+").fullmatch)
HUB = Rule("a hub set, --data hf:owner/name", lambda c: c.data.startswith("hf:"))
CLASS_PROMPT = Rule("--class_prompt", lambda c: c.class_prompt is not None)


# the first field of each section of --help
SECTIONS = {
    "mode": "run",
    "data": "data",
    "unet_dim": "model",
    "path": "diffusion",
    "adapter": "adapter",
    "batch_size": "optimisation",
    "save_and_sample_every": "output",
}


def opt(
    default,
    help: str,
    allowed: Rule | tuple[str, ...] | None = None,
    requires: Rule | None = None,
    free: bool = False,
):
    """Declare a field. allowed: its bounds, or the texts to choose from."""
    choices = () if allowed is None or isinstance(allowed, Rule) else allowed
    bounds = allowed if isinstance(allowed, Rule) else None
    row = dict(help=help, bounds=bounds, choices=choices, requires=requires, free=free)
    return field(default=default, metadata=row)


@dataclass(frozen=True)
class Config:
    """Hold the options of a training run. Lengths in pixels, `step` means optimizer step, batch sizes are global."""

    # fmt: off
    mode: str = opt("pixel", "what to train: a diffusion model of pixels, one of latents, or the VAE that makes latents", ("pixel", "latent", "vae"))
    save_folder: str = opt("results", "folder of the run; a run found there is resumed")
    overwrite: bool = opt(False, "start from scratch in save_folder, deleting the run found there", free=True)
    load_path: str | None = opt(None, "model.pt or .safetensors file of the weights to start from, at step 0, the folder of a run, or hf:owner/name of the hub")
    sd_path: str | None = opt(None, "Stable Diffusion 1.x to fine-tune: a diffusers folder, a .safetensors or .ckpt file, or hf:owner/name[/file] of the hub", requires=LATENT)
    sd_config: str | None = opt(None, "folder with the configs and the tokenizer of a single file of other sizes than 1.5's", requires=SD_FILE)
    sd_weights: str = opt("raw", "weights of a single file that has both: raw, its plain ones, or ema, its model_ema.*, which merged files carry stale", ("raw", "ema"), SD_FILE & SD_START, free=True)
    vae: str | None = opt(None, "VAE of a latent model trained from scratch: the folder of a run of --mode vae, a diffusers VAE folder, or hf:owner/name", requires=LATENT)
    seed: int = opt(0, "seed of all random numbers", SEED)
    device: str = opt("auto", "device to compute on", DEVICES, free=True)
    amp: str = opt("auto", "mixed precision; auto: bf16 where the hardware has it, fp16 on older CUDA GPUs, else no", AMP)
    compile: bool = opt(False, "torch.compile the network: minutes of start-up, then faster on GPUs")
    cuda_graph: str = opt("auto", "run each training step as one CUDA graph; auto: on one GPU, in bf16 or float32, without checkpointing or consistency", ("auto", "on", "off"), free=True)
    num_workers: int = opt(2, "number of threads that decode images", NOT_NEGATIVE, free=True)
    rank_timeout: float = opt(3600.0, "seconds that ranks wait for one that hangs before all stop", Rule("above 0 and at most 1,000,000", lambda v: 0 < v <= 1_000_000), free=True)
    push_to_hub: str | None = opt(None, "repository owner/name of the Hugging Face hub to upload the model to, with a model card, at each save; it is made, for all to see, unless it is there (pip install huggingface_hub)", HUB_NAME, free=True)
    wandb: bool = opt(False, "log to Weights & Biases, too (pip install wandb)", free=True)

    data: str = opt("toy", "images to train on: toy, a folder, a set's name (looked up under data/, then downloaded) or hf:owner/name")
    data_class: str = opt("all", "the one class folder to use, such as cat, or all")
    split: str | None = opt(None, "part of the data to use: a folder such as valid, a hub set's split, or all (default: train where there are splits)", requires=OTHER_DATA)
    image_column: str | None = opt(None, "column of a hub set's images, or of the file names in a folder's metadata.* (default: image, or the only one)", requires=OTHER_DATA)
    caption_column: str | None = opt(None, "column of a hub set's captions, or of the captions in a folder's metadata.* (default: text, caption or prompt)", requires=OTHER_DATA)
    image_size: int | tuple[int, ...] = opt(64, "height and width of the images, in pixels, or HEIGHTxWIDTH, such as 96x128", SIZE)
    aspect_buckets: bool = opt(False, "train on images in about their own aspect, at sizes of image_size's area, a batch of one size each; held-out images and sample grids are of image_size", requires=LATENT & OTHER_DATA & UNPAIRED)
    default_caption: str = opt("", "caption of images that have none", UTF8)
    flip: bool = opt(True, "never mirror an image (otherwise each is mirrored in half of the steps, at random)")
    augment: float = opt(0.0, "probability of each of mirroring, quarter turns, shifts and scaling of an image, which the network is given as well, so that samples do not show them; for few images, 0.12 (the usual mirroring, without --no_flip, is not shown to the network: samples may be mirrored)", FRACTION, DIFFUSION & SCRATCH)
    cache: bool = opt(True, "decode images at every use (otherwise once, into cache_dir)", free=True)
    cache_dir: str = opt("data/.cache", "folder of the cache of decoded images and latents")
    streaming: bool = opt(False, "read a hub set as a stream instead of downloading it", requires=HUB)

    unet_dim: int = opt(64, "number of channels of the network's first level", WIDTH & Rule("even", lambda v: v % 2 == 0), SCRATCH)
    dim_mults: tuple[int, ...] = opt((1, 2, 4, 8), "number of channels of each level, in units of unet_dim", COUNTS, SCRATCH)
    heads: int = opt(4, "number of attention heads", POSITIVE, PIXEL)
    dropout: float = opt(0.0, "dropout rate inside ResBlocks", BELOW_ONE, PIXEL)
    condition: str = opt("none", "conditioning of the network: none, the class folder's label, or the caption (latent mode)", ("none", "class", "text"), DIFFUSION)
    text_encoder: str = opt("clip", "text encoder: clip, that of a Stable Diffusion model, frozen, or scratch, a small one that is trained too", ("clip", "scratch"), TEXT & SCRATCH)
    text_dim: int = opt(128, "width of a text encoder from scratch", WIDTH, TEXT & SCRATCH)
    text_layers: int = opt(4, "number of layers of a text encoder from scratch", between(1, 1000), TEXT & SCRATCH)
    text_length: int = opt(256, "context length of a text encoder from scratch, in bytes of the caption", between(3, 65_536), TEXT & SCRATCH)
    clip_skip: int = opt(1, "layer of the text encoder to read, counted from the end; 1: the last", POSITIVE, SD_PATH)
    layers_per_block: int = opt(2, "number of ResBlocks of each level of a latent network", POSITIVE, LATENT & SCRATCH)
    latent_channels: int = opt(4, "number of channels of a VAE's latents", POSITIVE, VAE)
    condition_dropout: float = opt(0.1, "probability of dropping the condition of a sample, for classifier-free guidance", FRACTION, DIFFUSION & CONDITION)
    checkpointing: bool = opt(False, "recompute activations in backward: less memory, a third more time", requires=DIFFUSION)

    path: str = opt("vp", "noise path x = alpha x0 + sigma eps: vp, variance-preserving, by a schedule; edm, alpha = 1; flow, alpha = 1 - sigma", NOISE_PATHS, DIFFUSION)
    time_steps: int = opt(1000, "T, the length of the forward process", between(2, 1_000_000), DIFFUSION & SCRATCH)
    schedule: str = opt("cosine", "noise schedule", SCHEDULES, DIFFUSION & SCRATCH & VP)
    zero_snr: bool = opt(False, "rescale the schedule so that x_T is pure noise (objective v, x0 or flow)", requires=DIFFUSION & SCRATCH & VP)
    sigma_min: float = opt(0.002, "lowest sigma of path edm", POSITIVE, DIFFUSION & SCRATCH & EDM)
    sigma_max: float = opt(80.0, "highest sigma of path edm", POSITIVE, DIFFUSION & SCRATCH & EDM)
    sigma_data: float = opt(0.5, "standard deviation of the data, for path or objective edm (about 0.5 for pixels, 1 for latents)", POSITIVE, DIFFUSION & SCRATCH & PRECONDITIONED)
    noise_dist: str = opt("uniform", "distribution of noise levels in training: uniform in t, or ln(sigma / alpha) normal, which is logit-normal in a flow's time and has both names", NOISE_DISTS, DIFFUSION)
    noise_mean: float = opt(0.0, "mean of ln(sigma / alpha) in training", requires=DIFFUSION & NORMAL)
    noise_std: float = opt(1.0, "standard deviation of ln(sigma / alpha) in training", POSITIVE, DIFFUSION & NORMAL)
    noise_shift: float = opt(1.0, "factor on sigma / alpha in training, for large images; a flow's u becomes s u / (1 + (s - 1) u), also in sampling with spacing flow", POSITIVE, DIFFUSION)
    objective: str = opt("v", "what the network predicts", OBJECTIVES, DIFFUSION)
    loss_space: str | None = opt(None, "what the loss compares, whatever the network predicts (default: its objective)", OBJECTIVES, DENOISING)
    t_eps: float = opt(0.05, "least sigma, or alpha, that the error of an x0, or eps, prediction is divided by in another loss_space", POSITIVE, DIFFUSION & LOSS_SPACE)
    loss: str = opt("l1", "distance between prediction and target", LOSSES, DENOISING)
    noise_offset: float = opt(0.0, "standard deviation of noise added to whole channels, for very dark and bright images", NOT_NEGATIVE, DIFFUSION)
    kl_weight: float = opt(1e-6, "weight of the KL term in a VAE's loss", NOT_NEGATIVE, VAE)
    perceptual_weight: float = opt(0.0, "weight of LPIPS in a VAE's loss (pip install lpips)", NOT_NEGATIVE, VAE)
    min_snr_gamma: float = opt(0.0, "gamma of min-SNR loss weights (5 in the paper); 0: equal weights", NOT_NEGATIVE, DENOISING)
    consistency: bool = opt(False, "tune the model of load_path to sample in two evaluations (easy consistency tuning)", requires=DIFFUSION & SCRATCH)
    consistency_stages: int = opt(3, "number of stages of the tuning; in each r comes half as near to t as in the one before", between(1, 16), Rule("--consistency", lambda c: c.consistency))

    adapter: str = opt("none", "adapter to train on the model of load_path or sd_path, which stays as it is", ("none", "lora", "textual_inversion"))
    rank: int = opt(4, "rank of the LoRA", between(1, 4096), LORA)
    alpha: float | None = opt(None, "alpha of the LoRA, its scale times its rank (default: the rank)", POSITIVE, LORA)
    targets: str = opt("attention", "layers that get a LoRA: attention,mlp,conv or all, or a regular expression over module names", requires=LORA)
    lora_dropout: float = opt(0.0, "dropout rate on the LoRA's inputs", BELOW_ONE, LORA)
    train_text_encoder: bool = opt(False, "train the text encoder as well, by LoRA if the U-Net is", requires=TEXT_ENCODER)
    token: str | None = opt(None, "new word that textual inversion learns, such as <my-style>", UTF8, INVERSION)
    init_word: str | None = opt(None, "word whose vectors textual inversion starts from", UTF8, INVERSION)
    vectors: int = opt(1, "number of vectors of textual inversion's word", POSITIVE, INVERSION)
    instance_prompt: str | None = opt(None, "DreamBooth: the caption of all images, such as 'a photo of sks dog'", UTF8, TEXT)
    class_prompt: str | None = opt(None, "DreamBooth's prior preservation: caption of the class images, such as 'a photo of a dog'", UTF8, DREAMBOOTH)
    class_images: int = opt(100, "number of class images; the model samples those that are missing", POSITIVE, CLASS_PROMPT)
    class_data: str | None = opt(None, "folder of the class images (default: one in cache_dir)", requires=CLASS_PROMPT)
    prior_weight: float = opt(1.0, "weight of the class images' loss", NOT_NEGATIVE, CLASS_PROMPT)

    batch_size: int = opt(32, "number of samples per step, over all ranks and micro-batches", POSITIVE)
    train_steps: int = opt(100_000, "length of the run in steps", POSITIVE, free=True)
    epochs: float | None = opt(None, "length of the run in passes over the data, instead of train_steps", POSITIVE, free=True)
    optimizer: str = opt("adamw", "adamw, or muon for matrices and convolutions: fewer steps, each somewhat longer, at two to four times the learning rate", ("adamw", "muon"), WHOLE)
    learning_rate: float = opt(1e-3, "highest learning rate", POSITIVE)
    lr_schedule: str = opt("constant", "course of the learning rate after the warm-up", ("constant", "linear", "cosine"))
    lr_warmup_steps: int = opt(20, "number of steps over which the learning rate rises from 0", NOT_NEGATIVE)
    weight_decay: float = opt(0.0, "weight decay", NOT_NEGATIVE)
    grad_accum: int = opt(1, "number of micro-batches per step and rank", POSITIVE)
    grad_clip: float = opt(1.0, "largest gradient norm; 0: no clipping", NOT_NEGATIVE)
    ema_decay: float = opt(0.9999, "largest decay of the EMA weights; the decay after n steps is at most (1+n)/(10+n)", BELOW_ONE)
    posthoc_ema: bool = opt(False, "keep two more averages of the weights, and snapshots of them, of which python -m diffusion.training.posthoc_ema makes an EMA of any length", requires=DIFFUSION & WHOLE)

    save_and_sample_every: int = opt(1000, "number of steps between checkpoints, held-out losses and sample grids", POSITIVE, free=True)
    log_every: int = opt(10, "number of steps between lines of metrics.jsonl", POSITIVE, free=True)
    keep_last: int = opt(3, "number of checkpoints to keep", POSITIVE, free=True)
    num_samples: int = opt(64, "number of images in a sample grid; 0: no sample grids", NOT_NEGATIVE, free=True)
    sampler: str = opt(DEFAULT_SAMPLER, "sampler of the sample grids", SAMPLERS, DIFFUSION, free=True)
    sample_steps: int = opt(DEFAULT_STEPS, "number of network evaluations per sample of a grid, at most time_steps", POSITIVE, DIFFUSION, free=True)
    fid: bool = opt(False, "measure FID during training", requires=DIFFUSION, free=True)
    fid_every: int = opt(5000, "number of steps between FID measurements", POSITIVE, FID, free=True)
    fid_num_images: int = opt(10_000, "number of samples of an FID measurement", at_least(2), FID, free=True)
    fid_copies: bool = opt(False, "measure with each FID which fraction of its samples are copies of training images", requires=FID, free=True)
    fid_features: str | None = opt(None, "TorchScript network to use instead of Inception; it is a program that is run, and the distance is named after its file; or pixels, the images' own at 16x16", requires=FID)
    validation_prompts: str | None = opt(None, "file with a prompt per line for the sample grids (default: captions of the data)", requires=TEXT)
    guidance_scale: float = opt(1.0, "classifier-free guidance scale of the sample grids; 1: no guidance", GUIDANCE, DIFFUSION, free=True)
    guidance_interval: tuple[float, ...] = opt((), "lowest and highest sigma / alpha that are guided; all other steps call the network once (default: all are guided)", INTERVAL, DIFFUSION & GUIDED, free=True)
    guide: str | None = opt(None, "worse model of the same kind, such as an earlier checkpoint, that guidance leads away from (default: the model without its condition)", requires=DIFFUSION & GUIDED, free=True)
    # fmt: on

    def __post_init__(self):
        for f in fields(self):
            _check_field(f, getattr(self, f.name))
        check_bounds(vars(self), BOUNDS, typed=False)
        self._check_together()

    def _check_together(self) -> None:
        if self.mode != "latent" and self.condition == "text":
            raise UserError("--condition text requires --mode latent: pixel networks read no text")
        if self.sd_path is not None and self.vae is not None and self.mode == "latent":
            raise UserError("give either --sd_path or --vae: both say where the VAE comes from")
        if self.zero_snr and self.objective in ("eps", "edm"):
            raise UserError(
                f"--zero_snr requires --objective v, x0 or flow: where there is only noise, "
                f"{self.objective} says nothing about x0"
            )
        if self.consistency and self.objective == "x0":
            raise UserError(
                "--consistency needs a model of objective eps, v, flow or edm; where there is no "
                "noise, this one's x0 need not be x"
            )
        if self.sigma_min >= self.sigma_max:
            raise UserError(
                f"sigma_min is {self.sigma_min}; it must be below sigma_max, {self.sigma_max}"
            )
        if self.sd_path is not None and self.objective in ("flow", "edm"):
            raise UserError(
                f"--objective {self.objective}: Stable Diffusion predicts eps, v or x0; --path "
                "flow reads that as a flow's velocity"
            )
        if self.space is not None and (self.min_snr_gamma or self.loss == "huber"):
            raise UserError(
                f"--loss_space {self.space}, which Stable Diffusion on another path has by itself, "
                "takes --loss l1 or l2 and no --min_snr_gamma: it is a weight of the loss, as that "
                "is"
            )

    @property
    def adapts(self) -> bool:
        """Tell whether the run starts from a finished model, whose own settings count."""
        return self.adapter != "none" or self.instance_prompt is not None or self.consistency

    @property
    def space(self) -> str | None:
        """Name what the loss compares, if not the objective: Stable Diffusion's path, if changed."""
        if self.loss_space is None and self.sd_path is not None and self.path != "vp":
            return self.path
        return self.loss_space

    # --- JSON and resuming --------------------------------------------------------------------

    def shared(self) -> dict:
        """Give all options as files hold them, which may be shared: no absolute path is in them."""
        own = dataclasses.asdict(self)
        return own | {name: shared_path(own[name]) for name in PATHS}

    def to_json(self) -> str:
        return json.dumps(self.shared(), indent=2)

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Read a stored configuration. Raises UserError for unknown fields and bad values."""
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise UserError(f"configuration has unknown fields: {some(sorted(map(str, unknown)))}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def differences(self, other: "Config") -> dict[str, tuple]:
        """Return {field: (mine, the other's)} of fields that a resumed run may not change."""
        names = [f.name for f in fields(self) if not f.metadata["free"] and f.name not in PATHS]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def check_use(self, given: Iterable[str]) -> None:
        """Raise UserError for options that were given and would do nothing."""
        check_use(self, {n: default for n, default in DEFAULTS.items() if n in given}, REQUIRES)


def shared_path(path: str | None) -> str | None:
    """Name a path without this machine: by its way from the working directory, or its last name."""
    for mark in ("hf:", "@"):
        if path is not None and path.startswith(mark):
            return mark + shared_path(path.removeprefix(mark))
    if path is None or not os.path.isabs(path):
        return path
    way = os.path.relpath(path)
    return os.path.basename(os.path.normpath(path)) if way.startswith("..") else way


DEFAULTS = {f.name: f.default for f in fields(Config)}
# files and folders, which may move: what is in them is compared (training/run_folder.py)
PATHS = (
    "save_folder", "load_path", "sd_path", "sd_config", "vae", "data", "cache_dir", "class_data",
    "fid_features", "validation_prompts", "guide",
)  # fmt: skip
BOUNDS = {f.name: f.metadata["bounds"] for f in fields(Config)}
REQUIRES = {f.name: f.metadata["requires"] for f in fields(Config)}


def _types(f: dataclasses.Field) -> tuple[type, ...]:
    union = isinstance(f.type, types.UnionType)
    kinds = typing.get_args(f.type) if union else (f.type,)
    return tuple(typing.get_origin(kind) or kind for kind in kinds)


def _check_field(f: dataclasses.Field, value) -> None:
    allowed = _types(f)
    ok = isinstance(value, allowed) or (float in allowed and isinstance(value, int))
    if not ok or (isinstance(value, bool) and bool not in allowed):
        raise UserError(
            f"{f.name} is {shown(value)}; expected {' or '.join(t.__name__ for t in allowed)}"
        )
    if isinstance(value, tuple) and not {*map(type, value)} <= {int, *typing.get_args(f.type)}:
        raise UserError(f"{f.name} is {shown(value)}; expected numbers, whole ones in dim_mults")
    if f.metadata["choices"] and value not in (*f.metadata["choices"], f.default):
        raise UserError(f"{f.name} is {shown(value)}; {_choose(value, f.metadata['choices'])}")


def _choose(value, choices) -> str:
    close = difflib.get_close_matches(str(value), choices, 1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}choose one of {', '.join(choices)}"


# our options, and what diffusers, kohya, CompVis, lucidrains and EDM call them
OTHER_NAMES = """
adapter: network_module use_lora lora_type lora
alpha: network_alpha lora_alpha
aspect_buckets: enable_bucket bucketing
amp: mixed_precision fp16 bf16 half precision use_fp16 use_amp dtype
batch_size: train_batch_size eval_batch_size batch bs total_batch_size max_batch_size
checkpointing: gradient_checkpointing use_checkpoint
cache, which latents always have: cache_latents cache_latents_to_disk
class_data: class_data_dir reg_data_dir
class_images: num_class_images
class_label: class class_idx classes label
class_prompt: class_token
config: base original_config
data: train_data_dir instance_data_dir dataset dataset_name dataset_dir data_dir data_root image_dir
default_caption: default_prompt
device: cuda gpu gpus
dim_mults: channel_mult channel_mults block_out_channels ch_mult
ema_decay: ema_rate ema ema_beta ema_halflife
embedding: embeddings embedding_path textual_inversion
epochs: num_train_epochs max_train_epochs num_epochs max_epochs n_epochs
eta: ddim_eta
augment: augment_prob aug
flip: random_flip flip_aug augment_horizontal_flip mirror xflip
grad_accum, the number of micro-batches: microbatch
grad_accum: gradient_accumulation_steps gradient_accumulate_every accumulate_grad_batches
grad_clip: max_grad_norm gradient_clip_val
guidance_scale: cfg_scale scale cfg guidance cond_scale unconditional_guidance_scale
heads: num_heads attn_heads
height: H
height and --width: resolution image_size size
image_column: image_key
image_size: resolution img_size image_resolution res size H W
init_image: init_img image input_image
init_word: initializer_token init_token
instance_prompt: instance_token
learning_rate: lr unet_lr base_lr train_lr base_learning_rate text_encoder_lr
load_path: network network_pkl pretrained transfer model_path
lora: lora_path lora_weights network_weights
lora_dropout: network_dropout
lr_schedule: lr_scheduler scheduler_type
lr_warmup_steps: warmup_steps warmup lr_warmup
mask: mask_image mask_img
negative_prompt: negative neg_prompt n_prompt uc
num_images: n_samples num_samples n_iter num_images_per_prompt samples
num_samples: n_samples num_validation_images
num_workers: dataloader_num_workers max_data_loader_n_workers workers
objective: prediction_type pred_type parameterization v_parameterization
perceptual_weight: lpips_weight
prior_weight: prior_loss_weight with_prior_preservation
prompt: prompts text caption
prompt @FILE: from_file
push_to_hub: hub_model_id push_to_hub_model_id
rank: network_dim lora_rank lora_r
sampler: scheduler sample_sampler solver plms
save_and_sample_every: checkpointing_steps save_every_n_steps validation_steps save_interval save_every
save_folder: output_dir outdir out_dir logdir logging_dir results_folder save_dir output output_name
save_folder, where a run is resumed by its own command: resume resume_from_checkpoint
schedule: noise_schedule beta_schedule
sd_path: pretrained_model_name_or_path base_model
sd_path or --load_path: ckpt checkpoint checkpoint_path ckpt_path model model_id
steps: num_inference_steps ddim_steps sampling_timesteps sampling_steps num_steps sample_steps timestep_respacing
sample_steps: num_inference_steps ddim_steps sampling_timesteps sampling_steps
strength: denoising_strength
targets: target_modules lora_target_modules
time_steps: timesteps num_timesteps num_train_timesteps diffusion_steps T
token: placeholder_token
train_steps: num_train_steps max_train_steps max_steps train_num_steps num_steps iterations num_iterations total_steps steps
unet_dim: dim num_channels model_channels base_channels ch channels cbase
vae: vae_path pretrained_vae_model_name_or_path vae_model
validation_prompts: validation_prompt sample_prompts
vectors: num_vectors
wandb: report_to log_with
weight_decay: adam_weight_decay wd
width: W
"""

# --- command line ---------------------------------------------------------------------------------


# what is typed for an option, by the word that --help shows; a text is taken as it is


def PATH(text: str | Path) -> str:
    """Take a path; shells leave the ~ of --name=~/folder as it is, and unset variables empty."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; expected a file or folder")
    mark = "@" if str(text).startswith("@~") else ""
    return mark + os.path.expanduser(str(text).removeprefix(mark))


def model_path(path: str | Path) -> str:
    """Name the file of a model: of the folder of a run its model.pt."""
    path = PATH(path)
    file = os.path.join(path, "model.pt")
    return file if os.path.isfile(file) else str(path)


Size = int | tuple[int, ...]  # a side, or height and width, in pixels


def sides(size: Size) -> tuple[int, ...]:
    """Give (height, width) of a size, which is a side or both."""
    return size if isinstance(size, tuple) else (size, size)


def size(text: str) -> Size:
    """Read a size: N, or HEIGHTxWIDTH; two equal sides are one."""
    both = tuple(map(int, text.split("x")))
    return both[0] if len({*both}) == 1 else both


def size_text(size: Size) -> str:
    """Write a size as `size` reads it."""
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)


KINDS = {"N": int, "X": float, "MODEL": model_path, "SIZE": size}
KINDS |= dict.fromkeys(("FILE", "FOLDER", "PATH", "STYLES"), PATH)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines, and adds defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str:
        unsaid = action.default in (None, "", False, argparse.SUPPRESS) or action.default == []
        return action.help if unsaid else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse that never guesses an abbreviation, but says which option may have been meant.

    `option` adds an option with its bounds and what it requires, `section` begins a group of
    them, and `check` checks the values of all.
    """

    def __init__(self, **options):
        options = dict(usage="%(prog)s [options]", formatter_class=HelpFormatter) | options
        super().__init__(allow_abbrev=False, **options)
        self.target = self
        self.bounds: dict[str, Rule] = {}
        self.requires: dict[str, Rule | None] = {}

    def section(self, title: str) -> None:
        self.target = self.add_argument_group(title)

    def option(
        self,
        usage: str,
        help: str,
        bounds: Rule | None = None,
        requires: Rule | None = None,
        **settings,
    ) -> None:
        """Add an option. usage: as --help shows it; N is an int, X a float, other words texts.

        One with neither a value nor choices is a flag.
        """
        name, *values = usage.split()
        if len(values) > 1:
            settings |= dict(nargs=len(values), metavar=tuple(values))
        elif values:
            kind = KINDS.get(values[0], str)
            settings = dict(type=kind, metavar=values[0]) | settings
        elif "choices" not in settings:
            settings["action"] = "store_true"
        if requires is not None:
            help += f" (requires {requires.text})"
        action = self.target.add_argument(name, help=help, **settings)
        self.bounds[action.dest] = bounds
        self.requires[action.dest] = requires

    def check(self, values: argparse.Namespace) -> None:
        """Raise UserError for an option out of bounds, and for one that would do nothing."""
        check_use(values, self.defaults, self.requires)
        check_bounds(vars(values), self.bounds)

    def parse_args(self, args=None, namespace=None):
        values, unknown = super().parse_known_args(args, namespace)
        if unknown:
            if not unknown[0].startswith("-"):
                self.error(
                    f"{unknown[0]!r} stands alone: options are --name value, or --name where "
                    "--help, which lists all, shows no value"
                )
            self.error(f"unknown option {unknown[0]}{self.guess(unknown[0])}")
        return values

    def guess(self, option: str) -> str:
        """Say which option may be meant by one that there is not."""
        name = option.split("=")[0].lstrip("-").replace("-", "_")
        own = {s.lstrip("-"): s for a in self._actions for s in a.option_strings}
        known = {}
        for row in OTHER_NAMES.strip().splitlines():
            ours, others = row.split(": ")
            if re.match(r"\w+", ours)[0] in own:
                known |= dict.fromkeys(others.split(), f"--{ours}")
        known |= own
        name = name if name in known else name.lower()
        if name in known:
            return f": here it is {known[name]}"
        if name in DEFAULTS:
            return ": it is an option of train.py"
        close = difflib.get_close_matches(name, own, 1, cutoff=0.75)
        return f"; did you mean {own[close[0]]}?" if close else " (--help lists all)"

    @property
    def defaults(self) -> dict:
        """Return {option: its value where it is not given}."""
        return {a.dest: a.default for a in self._actions if a.default != argparse.SUPPRESS}

    def error(self, message: str):
        line = message.replace("\n", "\\n")  # what was typed may be a name of somebody's file
        self.exit(2, f"error: {printable(line)}\n")


def int_list(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def add_runtime_arguments(
    parser: Parser, weights: str | None = "ema", more: str = "", requires: Rule | None = None
) -> None:
    """Add --weights, --amp and --device. weights, more, requires: default, help, need of --weights."""
    text = "weights to use: the EMA weights, or raw, those of the last step"
    choices = ("ema", "raw")
    parser.option("--weights", text + more, None, requires, default=weights, choices=choices)
    parser.option("--amp", "mixed precision; no: float32", default="auto", choices=AMP)
    parser.option("--device", "device to compute on", default="auto", choices=DEVICES)


def add_guidance_arguments(parser: Parser) -> None:
    """Add --guidance_interval and --guide, which training has as well."""
    # fmt: off
    parser.option("--guidance_interval LO HI", "lowest and highest sigma / alpha that are guided; all other steps call the network once (default: all are guided)", INTERVAL, GUIDED, type=float)
    parser.option("--guide MODEL", "worse model of the same kind, such as an earlier checkpoint, that guidance leads away from; also for models without condition; of the model's own file the raw weights (default: the model without its condition)", requires=GUIDED)
    # fmt: on


def add_config_arguments(parser: Parser) -> None:
    """Add an option per field, by sections; one that is not given is not in the namespace."""
    for f in fields(Config):
        row = f.metadata
        if f.name in SECTIONS:
            section = parser.add_argument_group(SECTIONS[f.name])
        shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        notes = [] if f.default is None or shown == "" or f.type is bool else [f"default: {shown}"]
        notes += [f"requires {row['requires'].text}"] if row["requires"] else []
        text = row["help"].replace("%", "%%") + (f" ({'; '.join(notes)})" if notes else "")
        options = dict(dest=f.name, default=argparse.SUPPRESS)
        if f.type is bool:  # help shows the one that changes the default
            for name, value in ((f"--{f.name}", True), (f"--no_{f.name}", False)):
                options["help"] = argparse.SUPPRESS if value == f.default else text
                section.add_argument(name, action="store_const", const=value, **options)
            continue
        kind = {"dim_mults": int_list, "image_size": size}.get(f.name, _types(f)[0])
        if kind is tuple:  # of guidance_interval
            kind = float
            options["nargs"] = 2
        words = {str: "TEXT", int: "N", float: "X", size: "SIZE"}
        metavar = "|".join(row["choices"]) or words.get(kind, "N,N")
        kind = PATH if f.name in PATHS else kind
        kind = model_path if f.name in ("load_path", "guide") else kind
        names = [f"--{f.name}"] + (["--data_path"] if f.name == "data" else [])
        section.add_argument(*names, type=kind, metavar=metavar, help=text, **options)


def config_from_args(values: dict, preset: str | None = None) -> Config:
    """Build the configuration: defaults, then the preset, then what was given.

    preset: names, the later ones on top. With no preset named, or those of PROCESSES alone,
    --sd_path brings fine_tune, unless an adapter is trained, and --data NAME its own
    (PRESET_OF_DATA); preset "none" prevents that. A preset's Muon, and its learning rate, are for
    pixel models from scratch.
    """
    check_bounds(values, BOUNDS)
    names = preset.split(",") if preset else []
    if set(names) <= set(PROCESSES):
        own = PRESET_OF_DATA.get(values.get("data", "toy"), "none")
        if values.get("sd_path") is not None:
            own = "fine_tune" if values.get("adapter", "none") == "none" else "none"
        names = [own, *names]
    base = {}
    from_scratch = values.get("load_path") is None and values.get("mode", "pixel") == "pixel"
    for name in names:
        if name not in ("none", *PRESETS):
            raise UserError(f"preset {name!r} is unknown; {_choose(name, ('none', *PRESETS))}")
        own = dict(PRESETS.get(name, {}))
        if own.get("optimizer") == "muon":
            if not from_scratch or values.get("optimizer", "muon") != "muon":
                del own["optimizer"], own["learning_rate"]
        base |= own
    if "train_steps" in values and "epochs" in values:
        raise UserError("give either --train_steps or --epochs: both say how long to train")
    if "train_steps" in values:
        base.pop("epochs", None)
    values = base | values
    if values.get("data", "") is None:
        raise UserError(f"preset {preset} has no data of its own: give --data FOLDER")
    return Config.from_dict(values)


def config_from_options(options: dict, preset: str | None = None) -> Config:
    """Build the configuration of options by their names in Python, as `config_from_args` does.

    Raises UserError for one that there is not, with what it may be called here.
    """
    if unknown := [name for name in options if name not in DEFAULTS]:
        parser = Parser()
        add_config_arguments(parser)
        raise UserError(f"unknown option {unknown[0]}{parser.guess(unknown[0])}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    for f in fields(Config):
        value = values.get(f.name)
        if f.name in PATHS and isinstance(value, str | Path):
            if not str(value):
                raise UserError(f"{f.name} is empty; expected a file or folder")
            take = model_path if f.name in ("load_path", "guide") else PATH
            values[f.name] = take(value)
        if f.name in values:
            _check_field(f, values[f.name])
    return config_from_args(values, preset)


PROGRAMS = ("train", "sample", "visualize")


def command_line(program: str, *args, **options) -> str:
    """Write a command that can be pasted; options that are None are left out.

    program: train, sample or visualize, of the clone or as it was installed.
    """
    ranks = os.environ.get("LOCAL_WORLD_SIZE") if program == "train" else None
    start = ["torchrun", f"--nproc_per_node={ranks}"] if ranks else ["python"]
    if Path(sys.argv[0]).stem in PROGRAMS or Path(f"{program}.py").is_file():
        start += [f"{program}.py"]
    else:
        start = [*start, "--no-python"] if ranks else []
        start += [f"diffusion-{program}"]
    given = [(f"--{name}", value) for name, value in options.items() if value is not None]
    return shlex.join(map(str, [*start, *args, *(part for pair in given for part in pair)]))


def fail(text: str) -> typing.NoReturn:
    """End a script with a message; a name with a line end in it begins no line that looks ours."""
    sys.exit("error: " + printable(text).replace("\n", "\n  "))


def run_script(main) -> None:
    """Call a script's main; a user's mistake becomes one line on stderr and exit status 1."""
    for stream in (sys.stdout, sys.stderr):  # file names may hold what the locale cannot write
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        fail(str(error))
    except OSError as error:  # a disk that is full or may not be written, mostly
        if error.errno is None:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        fail(f"{where}{error.strerror}")
    except (RuntimeError, MemoryError) as error:
        from .runtime.machine import explain  # takes torch's seconds

        if (text := explain(error)) is None:
            raise
        fail(text)
    except KeyboardInterrupt:
        sys.exit(130)
