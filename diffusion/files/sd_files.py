"""Stable Diffusion 1.x from the files the world uses, and back to them.

    folder    unet/ vae/ text_encoder/ tokenizer/ scheduler/, as diffusers writes it
    file      one .safetensors or .ckpt, as CompVis wrote it

The names are translated by the tables of rules.py; loading is strict, and tells which tables were
used and what was missing or left over.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import UserError
from ..models.clip import CLIPTextModel
from ..models.configs import UNetConfig, VAEConfig
from ..models.sd_unet import SDUNet
from ..models.tokenizer import Tokenizer
from ..models.vae import AutoencoderKL
from ..runtime.distributed import log
from . import sd_names as rules
from .checkpoint import atomic, write_text
from .strict import PARTS, fit_part
from .tensors import find_weights, read_metadata, read_names, read_tensors
from .tokenizer_files import find_vocabulary, load_tokenizer, save_tokenizer
from .validate import MOST_JSON, read_json, read_text_file

# scheduler_config.json of Stable Diffusion 1.5
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
# what scheduler_config.json calls what a model predicts, and what others call it
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
OBJECTIVES = {theirs: ours for ours, theirs in PREDICTIONS.items()}
SYNONYMS = {
    "v-prediction": "v_prediction",
    "v_pred": "v_prediction",
    "vpred": "v_prediction",
    "velocity": "v_prediction",
    "noise": "epsilon",
}
# tensors that say by their presence that a file predicts v, and that its last step is pure noise
V_MARK = "v_pred"
ZERO_SNR_MARK = "ztsnr"
EDM_MARK = "edm_vpred.sigma_max"
# metadata of a .safetensors file: epsilon or v, as sd-scripts and as ComfyUI call it
MODEL_SPECS = ("modelspec.prediction_type", "modelspec.predict_key")
V_PARAMETERIZATION = "ss_v_parameterization"  # of kohya's metadata: True or False
# of a .yaml beside a file, in CompVis' and A1111's words
YAML_PREDICTION = re.compile(
    r"""(?:^|[{,])[ \t]*["']?parameterization["']?[ \t]*:[ \t]*["']?([\w-]+)""", re.M
)
YAML_ZERO_SNR = re.compile(
    r"^[ \t]*(?:rescale_betas_zero_snr|zero_terminal_snr|zero_snr|ztsnr)[ \t]*:[ \t]*true\b",
    re.M | re.I,
)


@dataclass(frozen=True)
class Prediction:
    """What a model predicts, as scheduler_config.json calls it, and what states that.

    source: None where nothing does, and epsilon is assumed. zero_snr: the last step is pure noise.
    """

    type: str
    source: str | None
    zero_snr: bool = False


@dataclass(eq=False)
class StableDiffusion:
    """The parts of a text-to-image model; scheduler: the contents of scheduler_config.json.

    report: for people, which rules read each part.
    """

    unet: SDUNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: Tokenizer
    scheduler: dict
    report: list[str]

    def __post_init__(self):
        most = len(self.tokenizer)
        rows = self.text_encoder.config.vocab_size
        if most > rows:
            raise UserError(
                f"the tokenizer has {most} tokens, the text encoder vectors of {rows}; "
                "give those of one model"
            )


# --- folders and files ---------------------------------------------------------------------------


def load_part(folder: Path, part: str) -> tuple[nn.Module, str]:
    """A component's folder, config.json and weights. Raises UserError for any other folder."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing")
    config = read_json(folder / "config.json")
    file = find_weights(folder)
    model, used = fit_part(part, config, read_tensors(file), str(file))
    return model, f"{part}: {file.name}, {used}"


def load_part_file(path: Path, part: str) -> nn.Module:
    """From a file of a component's weights or of a whole model; the sizes are those of the
    config.json beside it, or else Stable Diffusion 1.5's. Raises UserError for any other file."""
    beside = path.parent / "config.json"
    config = read_json(beside) if beside.is_file() else {}
    config = config if "_class_name" in config else PARTS[part][0]().to_dict()
    tensors = read_tensors(path)
    return fit_part(part, config, inside(tensors, part) or tensors, str(path))[0]


def inside(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """A part's tensors of an original single file."""
    return {
        k[len(prefix) :]: v
        for prefix in rules.PREFIXES[part]
        for k, v in tensors.items()
        if k.startswith(prefix)
    }


def load_sd(
    path: str | Path,
    config: str | Path | None = None,
    weights: str = "raw",
    vae: AutoencoderKL | None = None,
):
    """A StableDiffusion from a folder or a single file.

    config: a folder with the configs and the tokenizer of a single file whose sizes are not
    Stable Diffusion 1.5's. weights: "ema" takes a file's averaged weights, model_ema.*, where it
    has them (see `check_averaged`); merged files carry stale ones.
    vae: one to take in place of its own.
    Raises UserError for what is missing, damaged or of another architecture.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, vae)
    if not path.exists():
        raise UserError(
            f"--sd_path {path} does not exist; give a diffusers folder, or a "
            ".safetensors or .ckpt file"
        )
    return _load_file(path, None if config is None else Path(config), weights, vae)


def read_scheduler(
    path: str | Path, config: str | Path | None = None, prediction: str | None = None
) -> dict:
    """The contents of scheduler_config.json, Stable Diffusion 1.5's where it says nothing.

    prediction: what the model predicts if that is known, such as v_prediction; None: as
    `find_prediction` says. Raises UserError for files that cannot be read.
    """
    found = find_prediction(path, config)
    scheduler = SCHEDULER | (_scheduler_config(path, config) or {})
    scheduler["prediction_type"] = found.type if prediction is None else prediction
    rescaled = scheduler.get("rescale_betas_zero_snr", False)
    if found.zero_snr and not rescaled and scheduler["prediction_type"] != "epsilon":
        # the schedulers of 2022 know no such schedule, and leading timesteps leave its end out
        scheduler |= {
            "_class_name": "DDIMScheduler",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
    return scheduler


def _scheduler_config(path: str | Path, config: str | Path | None) -> dict | None:
    folder = Path(path) if Path(path).is_dir() else Path(config) if config is not None else None
    file = folder / "scheduler" / "scheduler_config.json" if folder else None
    return read_json(file) if file and file.exists() else None


def find_prediction(path: str | Path, config: str | Path | None = None) -> Prediction:
    """What a model predicts, by its folder, or by a file, its metadata and the .yaml beside it.

    A single file's own statements come before those of config, the folder of its sizes, where
    epsilon states nothing: it may be any folder of Stable Diffusion 1.5. Raises UserError for files
    that cannot be read.
    """
    path, scheduler = Path(path), _scheduler_config(path, config)
    stated = []
    if scheduler is not None:
        value = scheduler.get("prediction_type", "epsilon")
        if path.is_dir() or value != "epsilon":
            stated = [(value, "scheduler_config.json")]
    zero_snr = bool(scheduler and scheduler.get("rescale_betas_zero_snr", False))
    if path.is_file():
        names, metadata = inspect(path)
        beside = []
        for ending in (".yaml", ".yml", ".YAML", ".YML"):
            beside += [path.with_suffix(ending), path.with_name(path.name + ending)]
        own = []
        if EDM_MARK in names:
            own.append(("v of an EDM schedule", f"its key {EDM_MARK}"))
        if V_MARK in names:
            own.append(("v", f"its key {V_MARK}"))
        own += [(metadata[k], f"its metadata {k}") for k in MODEL_SPECS if k in metadata]
        if V_PARAMETERIZATION in metadata:
            value = "v" if metadata[V_PARAMETERIZATION].lower() == "true" else "eps"
            own.append((value, f"its metadata {V_PARAMETERIZATION}"))
        for file in filter(Path.is_file, beside):
            try:
                text = re.sub(r"#.*", "", read_text_file(file, MOST_JSON)[0])
            except UserError as error:
                log(f"warning: {error}; it is not used")
                continue
            own += [(value, file.name) for value in YAML_PREDICTION.findall(text)[:1]]
            zero_snr |= YAML_ZERO_SNR.search(text) is not None
        zero_snr |= ZERO_SNR_MARK in names
        zero_snr |= metadata.get("ss_zero_terminal_snr", "").lower() == "true"
        stated = own + stated
    if not stated:
        return Prediction("epsilon", None, zero_snr)
    value = str(stated[0][0]).lower()
    source = stated[0][1]
    return Prediction(PREDICTIONS.get(value, SYNONYMS.get(value, value)), source, zero_snr)


def stated_objective(path: str | Path, config: str | Path | None = None) -> str:
    """What a model states to predict, as --objective has it; eps where it states nothing.

    Raises UserError for a type that is not known.
    """
    found = find_prediction(path, config)
    if found.type not in OBJECTIVES:
        raise UserError(
            f"prediction_type {found.type!r} of {path} ({found.source}) is not known; "
            f"known: {', '.join(OBJECTIVES)}; say with --objective which it is"
        )
    return OBJECTIVES[found.type]


def has_averaged(path: Path) -> bool:
    """Whether a single file has averaged weights beside the plain ones."""
    return path.is_file() and bool(_averaged(inspect(path)[0]))


def inspect(path: Path) -> tuple[set[str], dict[str, str]]:
    """A single file's names and metadata, without its numbers; read once while it is the same."""
    stat = path.stat()
    return _inspect(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _inspect(path: Path, mtime: int, size: int) -> tuple[set[str], dict[str, str]]:
    return read_names(path), read_metadata(path)


def check_averaged(path: str | Path, option: str) -> None:
    """Raises UserError, which names the option that asks for them, unless a single file has
    averaged weights beside the plain ones."""
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{option} ema: the folder {path} holds one U-Net only; leave {option} "
            "out, or give a .ckpt or .safetensors file with model_ema.*"
        )
    if path.is_file() and not has_averaged(path):
        raise UserError(
            f"{option} ema: {path} holds no averaged weights (model_ema.*), or not all "
            f"of them; leave {option} out"
        )


def read_image_size(path: str | Path, config: str | Path | None = None) -> int:
    """The side of the images that a model was trained for; what is wrong there load_sd tells."""
    folder = Path(path) if Path(path).is_dir() else Path(config) if config is not None else None
    unet = UNetConfig()
    vae = VAEConfig()
    try:
        if folder is not None:
            unet = UNetConfig.from_dict(read_json(folder / "unet" / "config.json"))
            vae = VAEConfig.from_dict(read_json(folder / "vae" / "config.json"))
        size = unet.sample_size or 64
        size = size if isinstance(size, int) else max(size)
        return size * 2 ** (len(vae.block_out_channels) - 1)
    except (ValueError, TypeError, UserError):
        return 512


def _load_folder(path: Path, vae: AutoencoderKL | None) -> StableDiffusion:
    if not (path / "unet").is_dir():
        kind = read_json(path / "model_index.json") if (path / "model_index.json").exists() else {}
        name = f"; its model_index.json says {kind['_class_name']}" if "_class_name" in kind else ""
        raise UserError(f"{path} is no Stable Diffusion folder: it has no unet/{name}")
    loaded = {part: load_part(path / part, part) for part in PARTS if part != "vae" or vae is None}
    loaded.setdefault("vae", (vae, "vae: another one"))
    return StableDiffusion(
        **{part: model for part, (model, _) in loaded.items()},
        tokenizer=load_tokenizer(path / "tokenizer"),
        scheduler=read_scheduler(path),
        report=[used for _, used in loaded.values()],
    )


def _load_file(
    path: Path, folder: Path | None, weights: str, vae: AutoencoderKL | None
) -> StableDiffusion:
    tensors = read_tensors(path)
    if other := rules.family(tensors):
        raise UserError(f"{path} is {other}, not a Stable Diffusion 1.x model")
    if not any(name.startswith(rules.PREFIXES["unet"]) for name in tensors):
        if any(name.startswith("model_ema.") for name in tensors):
            raise UserError(
                f"{path} holds averaged weights (model_ema.*) without the plain ones "
                f"({rules.PREFIXES['unet'][0]}*), which is not supported"
            )
        known = ", ".join(sorted(tensors)[:3])
        raise UserError(
            f"{path} is no Stable Diffusion checkpoint: no tensor of it begins with "
            f"{rules.PREFIXES['unet'][0]}; it has {known} ..."
        )
    averaged = _averaged(tensors)
    if weights == "ema" and averaged:
        tensors |= {name: tensors[other] for name, other in averaged.items()}
    note = ""
    if averaged:
        note = (
            ", averaged weights (model_ema.*)"
            if weights == "ema"
            else "; model_ema.* is in the file and not used: sample.py --weights ema, "
            "train.py --sd_weights ema"
        )
    parts = {}
    report = []
    for part, (make_config, _) in PARTS.items():
        if part == "vae" and vae is not None:
            parts[part] = vae
            continue
        config = read_json(folder / part / "config.json") if folder else make_config().to_dict()
        own = inside(tensors, part)
        if not own:
            hint = "; give --vae" if part == "vae" else ""
            raise UserError(f"{path} holds no {part}{hint}")
        if part == "unet" and folder is None and "input_blocks.0.0.weight" in own:
            config["in_channels"] = own["input_blocks.0.0.weight"].shape[1]  # 9: inpainting
        if part == "text_encoder":
            own = {k: v for k, v in own.items() if not k.startswith(("vision_model", "logit_"))}
        parts[part], used = fit_part(part, config, own, f"{path}, {part}")
        report.append(f"{part}: {path.name}, {used}{note if part == 'unet' else ''}")
    used = tuple(prefix for prefixes in rules.PREFIXES.values() for prefix in prefixes)
    marks = (V_MARK, ZERO_SNR_MARK)
    over = [k for k in tensors if not k.startswith((*used, "model_ema.")) and k not in marks]
    report.append(f"not used: {len(over)} tensors" + (f", such as {over[0]}" if over else ""))
    tokenizer = load_tokenizer(folder / "tokenizer") if folder else find_vocabulary(path)
    return StableDiffusion(
        **parts, tokenizer=tokenizer, scheduler=read_scheduler(path, folder), report=report
    )


def _averaged(names) -> dict[str, str]:
    """{name of a tensor of the U-Net: that of its average}; {} unless all have one.

    CompVis' model_ema.* are the names without their dots.
    """
    plain = [name for name in names if name.startswith(rules.PREFIXES["unet"])]
    found = {n: "model_ema." + n.removeprefix("model.").replace(".", "") for n in plain}
    return found if all(averaged in names for averaged in found.values()) else {}


# --- writing -------------------------------------------------------------------------------------


def save_part(model: nn.Module, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    atomic(folder / name, lambda p: save_file(tensors, p, metadata={"format": "pt"}))
    write_text(folder / "config.json", json.dumps(model.config.to_dict(), indent=2))


def save_sd_folder(sd: StableDiffusion, folder: Path) -> None:
    """A folder that diffusers' from_pretrained reads."""
    save_part(sd.unet, folder / "unet", "diffusion_pytorch_model.safetensors")
    save_part(sd.vae, folder / "vae", "diffusion_pytorch_model.safetensors")
    save_part(sd.text_encoder, folder / "text_encoder", "model.safetensors")
    save_tokenizer(sd.tokenizer, folder / "tokenizer")
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    write_text(folder / "scheduler" / "scheduler_config.json", json.dumps(sd.scheduler, indent=2))
    write_text(
        folder / "model_index.json",
        json.dumps(
            {
                "_class_name": "StableDiffusionPipeline",
                "_diffusers_version": "0.30.0",
                "unet": ["diffusers", "UNet2DConditionModel"],
                "vae": ["diffusers", "AutoencoderKL"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "scheduler": ["diffusers", sd.scheduler["_class_name"]],
                "safety_checker": [None, None],
                "feature_extractor": [None, None],
                "requires_safety_checker": False,
            },
            indent=2,
        ),
    )


def save_sd_file(sd: StableDiffusion, path: Path) -> None:
    """An original single file; its sizes and vocabulary are not in it.

    What it predicts is in its metadata, and v in the key v_pred as well, which A1111 and ComfyUI
    read; so is a zero terminal SNR, in ztsnr.
    """
    tables: dict[str, Callable[[dict], rules.Table]] = {
        "unet": rules.unet_table,
        "vae": rules.vae_table,
        "text_encoder": lambda config: [],
    }
    tensors = {}
    for part, table in tables.items():
        model = getattr(sd, part)
        known = rules.to_theirs(table(model.config.to_dict()))
        for name, value in model.state_dict().items():
            theirs = rules.translate(name, known) or name
            if part == "vae" and ".mid.attn_1." in theirs and value.ndim == 2:
                value = value[:, :, None, None]  # a 1x1 convolution there
            tensors[rules.PREFIXES[part][0] + theirs] = value.detach().cpu().contiguous()
    kind = sd.scheduler["prediction_type"]
    if kind == "v_prediction":
        tensors[V_MARK] = torch.tensor([])
    if sd.scheduler.get("rescale_betas_zero_snr", False):
        tensors[ZERO_SNR_MARK] = torch.tensor([])
    spec = "v" if kind == "v_prediction" else kind
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic(path, lambda p: save_file(tensors, p, metadata={"format": "pt", MODEL_SPECS[0]: spec}))
