"""Read and write Stable Diffusion 1.x as the files the world uses.

    folder    unet/ vae/ text_encoder/ tokenizer/ scheduler/, as diffusers writes it
    file      one .safetensors or .ckpt, as CompVis wrote it

The tables of sd_names.py translate the names; loading is strict, and a report says which names were
found and what was left over. Readers raise UserError for what is missing, damaged or of another
architecture.
"""

import itertools
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
from torch import nn

from .. import UserError, shown, some
from ..config import Rule, model_path
from ..models.build import NETWORKS
from ..models.clip import CLIPTextModel
from ..models.configs import MAX_SIDE
from ..models.sd_unet import SDUNet
from ..models.tokenizer import Tokenizer
from ..models.vae import AutoencoderKL
from ..runtime.distributed import log
from .atomic import blame, write_text
from .checkpoint import is_own, load_weights
from .hub_files import local
from .sd_names import PREFIXES, family, tables, translate
from .strict import PARTS, load_part
from .tensors import find_weights, inspect, read_tensors, write_tensors
from .text_files import read_json, read_optional, read_text_file
from .tokenizer_files import check_tokenizer, find_vocabulary, load_tokenizer, save_tokenizer

AnyPath = str | Path

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
# what diffusers takes where a scheduler_config.json says nothing, by its class
USUAL = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "set_alpha_to_one": True,
}
EVEN = USUAL | {"timestep_spacing": "linspace"}
CLASSES = {
    "PNDMScheduler": USUAL | {"set_alpha_to_one": False, "skip_prk_steps": False},
    "DDIMScheduler": USUAL,
    "DDPMScheduler": USUAL,
    **dict.fromkeys(
        """DPMSolverMultistepScheduler DPMSolverSinglestepScheduler DEISMultistepScheduler
        UniPCMultistepScheduler SASolverScheduler EulerDiscreteScheduler
        EulerAncestralDiscreteScheduler LMSDiscreteScheduler""".split(),
        EVEN,
    ),
    **dict.fromkeys(
        """HeunDiscreteScheduler KDPM2DiscreteScheduler KDPM2AncestralDiscreteScheduler
        DPMSolverSDEScheduler""".split(),
        EVEN | {"beta_start": 0.00085, "beta_end": 0.012},
    ),
}
OTHER_PATHS = re.compile("Flow|EDM|KarrasVe|ScoreSde|Consistency|VQ")
# whose Karras and exponential sigmas lie between the ends of the spaced timesteps
ENDS_OF_SPACED = re.compile("Euler|LMS|Heun|KDPM2|DPMSolverSDE")
# settings that choose real-valued timesteps, and the names of these here
SIGMAS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "logsnr",
    "use_lu_lambdas": "logsnr",
}


def whole(low: int, high: int) -> Rule:
    text = f"a whole number from {low} to {high:,}"
    return Rule(text, lambda v: type(v) is int and low <= v <= high)


def one_of(*names: str) -> Rule:
    return Rule(" or ".join(names), lambda v: v in names)


BETA = Rule("a number between 0 and 1", lambda v: type(v) in (int, float) and 0 < v < 1)
BETAS = Rule(
    "null, or numbers between 0 and 1",
    lambda v: v is None or isinstance(v, list) and all(map(BETA.holds, v)),
)
SETTINGS = {  # what is taken from a scheduler_config.json
    "num_train_timesteps": whole(2, 1_000_000),
    "beta_schedule": one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": BETAS,
    "timestep_spacing": one_of("leading", "linspace", "trailing"),
    "steps_offset": whole(0, 1000),
    "beta_start": BETA,
    "beta_end": BETA,
    **dict.fromkeys(
        ("_class_name", "prediction_type"), Rule("a text", lambda v: isinstance(v, str))
    ),
    **dict.fromkeys(
        ("rescale_betas_zero_snr", "set_alpha_to_one", *SIGMAS),
        Rule("true or false", lambda v: isinstance(v, bool)),
    ),
}
# values of the other settings, beside null, that change nothing here
HARMLESS = {
    "skip_prk_steps": True,
    "lower_order_final": True,
    "predict_x0": True,
    "interpolation_type": "linear",
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "clip_sample_range": 1.0,
    "flow_shift": 1.0,
    "time_shift_type": "exponential",
    "lambda_min_clipped": -inf,
    "solver_order": 2,
    "solver_type": "midpoint",
    "algorithm_type": "dpmsolver++",
    "final_sigmas_type": "zero",
    "timestep_type": "discrete",
    "variance_type": "fixed_small",
}
# our objectives and the words of scheduler_config.json
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
OBJECTIVES = {theirs: ours for ours, theirs in PREDICTIONS.items()}
SYNONYMS = PREDICTIONS | {
    "v-prediction": "v_prediction",
    "v_pred": "v_prediction",
    "vpred": "v_prediction",
    "velocity": "v_prediction",
    "noise": "epsilon",
    "true": "v_prediction",  # of V_PARAMETERIZATION
    "false": "epsilon",
}
# tensors that say by their presence that a file predicts v, and that its last step is pure noise
V_MARK = "v_pred"
ZERO_SNR_MARK = "ztsnr"
MARKS = {"edm_vpred.sigma_max": "v of an EDM schedule", V_MARK: "v"}
MODEL_SPEC = "modelspec.prediction_type"
# metadata of a .safetensors file that say epsilon or v: of sd-scripts, ComfyUI and kohya
METADATA = (MODEL_SPEC, "modelspec.predict_key", "ss_v_parameterization")
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
    """Hold a model's prediction type, in scheduler_config.json's words, and what states it.

    source: None where nothing does, and epsilon is assumed. zero_snr: the last step is pure noise.
    scheduler: the contents of scheduler_config.json; {} where there is none.
    """

    type: str
    source: str | None
    zero_snr: bool
    scheduler: dict


@dataclass(eq=False)
class StableDiffusion:
    """Hold the networks of a text-to-image model and what goes with them.

    scheduler: the contents of scheduler_config.json. report: lines for people on what was read.
    """

    unet: SDUNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: Tokenizer
    scheduler: dict
    report: list[str]

    def __post_init__(self):
        text = self.text_encoder.config
        check_tokenizer(self.tokenizer, text, "Stable Diffusion")
        width = self.unet.config.cross_attention_dim
        if self.unet.takes_context and width != text.hidden_size:
            raise UserError(
                f"the U-Net reads texts of width {width}, the text encoder makes {text.hidden_size}"
            )


# --- loading -------------------------------------------------------------------------------------


def load_sd(
    path: AnyPath,
    config: AnyPath | None = None,
    weights: str = "raw",
    vae: AutoencoderKL | None = None,
) -> StableDiffusion:
    """Load Stable Diffusion from a folder or a single file.

    config: a folder with the configs and the tokenizer of a single file whose sizes are not
    Stable Diffusion 1.5's. weights: "ema" takes a file's EMA weights, model_ema.*, where it
    has them (see `check_averaged`); merged files carry stale ones. vae: one to take in place of
    the model's own.
    """
    path = local(path, sd=True)
    folder = _config_folder(path, config)
    tensors = {} if path.is_dir() else read_tensors(path)
    if kind := family(tensors):
        raise UserError(f"{path} is {kind}, not a Stable Diffusion 1.x model")
    note = ""
    if averaged := _averaged(tensors):
        note = "; its model_ema.* are not used: sample.py --weights ema, train.py --sd_weights ema"
        if weights == "ema":
            tensors |= {name: tensors[ema] for name, ema in averaged.items()}
            note = ", EMA weights (model_ema.*)"
    networks = {}
    report = []
    for part in PARTS:
        if part == "vae" and vae is not None:
            networks[part] = vae
            report.append("vae: another one")
            continue
        file = find_weights(path / part) if path.is_dir() else path
        own = read_tensors(file) if path.is_dir() else part_of(tensors, part)
        if not own:
            hint = "; give --vae" if part == "vae" else ""
            raise UserError(
                f"{file} holds no {part}{hint}: no tensor begins with "
                f"{PREFIXES[part][0]}; it has {some(sorted(tensors))}"
            )
        sizes = _part_config(folder, part)
        first = own.get("input_blocks.0.0.weight")
        if first is not None and first.ndim == 4:
            sizes["in_channels"] = first.shape[1]  # 9: inpainting
        networks[part], used = load_part(part, sizes, own, f"{file}, {part}")
        report.append(f"{part}: {file.name}, {used}" + (note if part == "unet" else ""))
    if tensors:
        known = (*itertools.chain(*PREFIXES.values()), "model_ema.", V_MARK, ZERO_SNR_MARK)
        over = [name for name in tensors if not name.startswith(known)]
        such = f", such as {some(over[:1])}" if over else ""
        report.append(f"not used: {len(over)} tensors{such}")
    return StableDiffusion(
        **networks,
        tokenizer=load_tokenizer(folder / "tokenizer") if folder else find_vocabulary(path),
        scheduler=read_scheduler(path, config),
        report=report,
    )


def _part_config(folder: Path | None, part: str) -> dict:
    """Read the config.json of a network; without a folder, take Stable Diffusion 1.5's.

    Raises UserError for one that is not supported.
    """
    if folder is None:
        return NETWORKS[part][0]().to_dict()
    file = folder / part / "config.json"
    config = read_json(file)
    with blame(f"{file} is not supported"):
        NETWORKS[part][0].from_dict(config)
    return config


def part_of(tensors: Mapping, part: str) -> dict:
    """Take a network's tensors from those of an original single file."""
    return {
        name.removeprefix(prefix): value
        for prefix in PREFIXES[part]
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def load_vae(path: AnyPath) -> AutoencoderKL:
    """Load a VAE from wherever it is.

    path: a run of --mode vae (its folder, or a file in it), a diffusers folder, or a file of
    weights in any known layout, of the sizes of the config.json beside it or else Stable
    Diffusion 1.5's.
    """
    path = local(path)
    if not path.exists():
        raise UserError(
            f"--vae {path} does not exist; give a run of --mode vae (train.py --preset "
            "sd_tiny_vae makes results/vae) or a diffusers folder"
        )
    folders = [folder for folder in (path, path / "vae") if _network_config(folder)]
    file = path
    if folders:
        file = find_weights(folders[0])
    elif path.is_dir():
        ema = path / "ema.safetensors"
        file = ema if ema.is_file() else path / "model.pt"
    if folders or not is_own(file):
        tensors = read_tensors(file)
        sizes = _network_config(file.parent) or _part_config(None, "vae")
    else:
        tensors, config, metadata = load_weights(file)
        if config.mode != "vae":
            raise UserError(
                f"--vae {path} is a model of --mode {config.mode}; train one with --mode vae"
            )
        sizes = metadata["networks"].get("vae")
    return load_part("vae", sizes, part_of(tensors, "vae") or tensors, file)[0]


def _network_config(folder: Path) -> dict | None:
    """Read the config.json of a network's folder; None if it is missing or a run's."""
    config = read_optional(folder / "config.json")
    return config if "_class_name" in config else None


def _config_folder(path: AnyPath, config: AnyPath | None) -> Path | None:
    """Find the folder with a model's configs: the model itself, --config, or none."""
    folder = path if Path(path).is_dir() else config
    return None if folder is None else Path(folder)


# --- what a model states about itself ------------------------------------------------------------


def read_scheduler(
    path: AnyPath, config: AnyPath | None = None, prediction: str | None = None
) -> dict:
    """Read scheduler_config.json, with Stable Diffusion 1.5's values where it says nothing.

    prediction: the prediction type if it is known, such as v_prediction; None: what
    `find_prediction` finds.
    """
    found = find_prediction(path, config)
    scheduler = SCHEDULER | found.scheduler
    scheduler["prediction_type"] = found.type if prediction is None else prediction
    rescaled = scheduler.get("rescale_betas_zero_snr")
    if found.zero_snr and not rescaled and scheduler["prediction_type"] != "epsilon":
        # the schedulers of 2022 know no such schedule, and leading timesteps leave its end out
        scheduler |= {
            "_class_name": "DDIMScheduler",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
    return scheduler


def complete_scheduler(found: dict, where: AnyPath) -> dict:
    """Check the contents of a scheduler_config.json, and add what its class takes for the rest.

    Raises UserError for a wrong value, and for a noise path that is not Stable Diffusion's.
    """
    for key, rule in SETTINGS.items():
        if key in found and not rule.holds(found[key]):
            raise UserError(f"{where}: {key} is {shown(found[key])}; expected {rule.text}")
    name = found.get("_class_name", "")
    if OTHER_PATHS.search(name) or found.get("use_flow_sigmas"):
        raise UserError(
            f"{where}: {shown(name)}, use_flow_sigmas {shown(found.get('use_flow_sigmas'))}: not "
            "the noise path of Stable Diffusion 1.x"
        )
    betas = found.get("trained_betas")
    if betas is not None and len(betas) != found.get("num_train_timesteps", 1000):
        raise UserError(f"{where}: trained_betas has {len(betas)} numbers; expected one a timestep")
    return CLASSES.get(name, {}) | found


def not_taken(scheduler: dict) -> list[str]:
    """List the settings of a scheduler_config.json that change pictures, and are not taken."""
    name = scheduler["_class_name"]
    odd = [] if name in CLASSES else ["_class_name"]
    for key, value in scheduler.items():
        harmless = value in (None, HARMLESS[key]) if key in HARMLESS else not value
        if not harmless and key not in SETTINGS and not key.startswith("_"):
            odd.append(key)
    if any(map(scheduler.get, SIGMAS)):  # between the ends of all timesteps here
        if ENDS_OF_SPACED.match(name) and scheduler["timestep_spacing"] != "linspace":
            odd.append("timestep_spacing")
        if scheduler.get("rescale_betas_zero_snr"):
            odd.append("rescale_betas_zero_snr")
    return [f"{shown(key)} ({shown(scheduler[key])})" for key in odd]


def spacing_of(scheduler: dict) -> str:
    """Choose how a model's own scheduler spaces timesteps, as --spacing names it."""
    own = [name for key, name in SIGMAS.items() if scheduler.get(key)]
    return [*own, scheduler["timestep_spacing"]][0]


def find_prediction(path: AnyPath, config: AnyPath | None = None) -> Prediction:
    """Find a model's prediction type by its folder, or by a file, its metadata and a .yaml beside.

    A single file's own statements come before those of config, the folder of its sizes, where
    epsilon states nothing: it may be any folder of Stable Diffusion 1.5.
    """
    path = local(path, sd=True)
    if not path.exists():
        raise UserError(
            f"--sd_path {path} does not exist; give a diffusers folder, a .safetensors or .ckpt "
            "file, or hf:owner/name of huggingface.co"
        )
    own = Path(model_path(path))
    if own.is_file() and is_own(own):
        raise UserError(f"--sd_path {path} is a model of train.py: give it with --load_path")
    stated = []
    zero_snr = False
    if path.is_file():
        names, facts = inspect(path)
        facts |= {mark: prediction for mark, prediction in MARKS.items() if mark in names}
        stated += [(facts[key], f"its {key}") for key in (*MARKS, *METADATA) if key in facts]
        zero_snr = facts.get("ss_zero_terminal_snr", "").lower() == "true"
        zero_snr |= ZERO_SNR_MARK in names
        endings = (".yaml", ".yml", ".YAML", ".YML")
        beside = [file for e in endings for file in (path.with_suffix(e), Path(f"{path}{e}"))]
        for file in filter(Path.is_file, beside):
            try:
                text = re.sub(r"#.*", "", read_text_file(file)[0])
            except UserError as error:
                log(f"warning: {error}; it is not used")
                continue
            stated += [(value, file.name) for value in YAML_PREDICTION.findall(text)[:1]]
            zero_snr |= YAML_ZERO_SNR.search(text) is not None
    folder = _config_folder(path, config)
    file = folder and folder / "scheduler" / "scheduler_config.json"
    scheduler = complete_scheduler(read_optional(file), file) if file else {}
    if scheduler:
        zero_snr |= bool(scheduler.get("rescale_betas_zero_snr"))
        value = scheduler.get("prediction_type", "epsilon")
        if path.is_dir() or value != "epsilon":
            stated.append((value, "scheduler_config.json"))
    value, source = [*stated, ("epsilon", None)][0]
    value = value.lower()
    return Prediction(SYNONYMS.get(value, value), source, zero_snr, scheduler)


def stated_objective(path: AnyPath, config: AnyPath | None) -> str:
    """Find what a model states to predict, as --objective has it; eps where it states nothing.

    Raises UserError for a type that is not known.
    """
    found = find_prediction(path, config)
    if found.type not in OBJECTIVES:
        raise UserError(
            f"prediction_type {shown(found.type)} of {path} ({found.source}) is not known; "
            f"known: {', '.join(OBJECTIVES)}; say with --objective which it is"
        )
    return OBJECTIVES[found.type]


def has_averaged(path: Path) -> bool:
    """Check whether a single file has EMA weights beside the plain ones."""
    return path.is_file() and bool(_averaged(inspect(path)[0]))


def _averaged(names: Collection[str]) -> dict[str, str]:
    """Map each tensor of the U-Net to its EMA; {} unless all have one.

    CompVis' model_ema.* are the names without their dots.
    """
    plain = [name for name in names if name.startswith(PREFIXES["unet"])]
    found = {n: "model_ema." + n.removeprefix("model.").replace(".", "") for n in plain}
    return found if all(ema in names for ema in found.values()) else {}


def check_averaged(path: AnyPath, option: str) -> None:
    """Refuse an option that asks for EMA weights, unless a single file has them."""
    path = local(path, sd=True)
    if path.exists() and not has_averaged(path):
        raise UserError(
            f"{option} ema: {path} holds no EMA weights (model_ema.*), or not all of them; leave "
            f"{option} out"
        )


def read_image_size(path: AnyPath, config: AnyPath | None) -> int:
    """Find the side of the images that a model was trained for; 512 if its configs are unusable."""
    folder = _config_folder(local(path, sd=True), config)
    try:
        unet, vae = (NETWORKS[part][0].from_dict(_part_config(folder, part)) for part in PARTS[:2])
    except UserError:
        return 512
    side = unet.side * 2 ** (len(vae.block_out_channels) - 1)
    return side if side <= MAX_SIDE else 512


# --- writing -------------------------------------------------------------------------------------


def save_part(model: nn.Module, folder: Path, name: str) -> None:
    """Write a network's folder, config.json and weights."""
    write_json(folder / "config.json", model.config.to_dict())
    write_tensors(folder / name, model.state_dict())


def write_json(path: Path, content: dict) -> None:
    """Write a JSON object atomically, and the folder around it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2))


def save_sd_folder(sd: StableDiffusion, folder: Path) -> None:
    """Write a folder that diffusers' from_pretrained reads."""
    for part in PARTS:
        name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save_part(getattr(sd, part), folder / part, f"{name}.safetensors")
    save_tokenizer(sd.tokenizer, folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", sd.scheduler)
    kind = "Inpaint" if sd.unet.config.in_channels == 9 else ""
    index = {
        "_class_name": f"StableDiffusion{kind}Pipeline",
        "_diffusers_version": "0.30.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", sd.scheduler["_class_name"]],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    write_json(folder / "model_index.json", index)


def save_sd_file(sd: StableDiffusion, path: Path) -> None:
    """Write an original single file, which holds neither sizes nor vocabulary.

    The prediction type is in its metadata, and v in the key v_pred as well, which A1111 and
    ComfyUI read; a zero terminal SNR is in ztsnr.
    """
    tensors = {}
    for part in PARTS:
        network = getattr(sd, part)
        table, _ = tables(part, network.config.to_dict())
        for name, value in network.state_dict().items():
            theirs = translate(name, table)
            if part == "vae" and ".mid.attn_1." in theirs and value.ndim == 2:
                value = value[:, :, None, None]  # a 1x1 convolution there
            tensors[PREFIXES[part][0] + theirs] = value
    spec = sd.scheduler["prediction_type"]
    if spec == "v_prediction":
        tensors[V_MARK] = torch.tensor([])
        spec = "v"
    if sd.scheduler.get("rescale_betas_zero_snr"):
        tensors[ZERO_SNR_MARK] = torch.tensor([])
    write_tensors(path, tensors, {MODEL_SPEC: spec})
