"""LoRA files of the programs that write them, as branches of a network's layers, and back.

    kohya        lora_unet_<path with _>.lora_down.weight, .lora_up.weight, .alpha; lora_te_...
                 also with the block names of original files: lora_unet_input_blocks_1_1_...
    diffusers    unet.<path>.lora_A.weight (down), .lora_B.weight (up); text_encoder....
                 and before that .lora.down.weight, .lora_linear_layer.down.weight, and
                 .processor.to_q_lora.down.weight
    peft         a folder: adapter_config.json, adapter_model.safetensors; base_model.model....
    others       the prefixes of DOTTED and FLAT, of the text encoder above all

A file is applied as a whole or refused: what this network has no place for, and what is no plain
LoRA, is named. A branch's scale is alpha / rank; alpha stands in the file, in its metadata, in the
folder's configuration, or nowhere, and then it is the rank. (kohya networks/lora.py, diffusers
loaders/lora_base.py.)
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import UserError
from ..models import lora
from ..models.lora import LowRank
from ..runtime.distributed import log
from . import sd_names as rules
from .checkpoint import atomic
from .tensors import read_metadata, read_tensors
from .validate import check_tensors, parse_json, read_json

Parts = dict[str, dict[str, LowRank]]  # "unet" or "text_encoder" -> module name -> branch

NAMES = {"unet": "U-Net", "text_encoder": "text encoder"}
# before names with `.` and with `_` for `.`; the first is written. An empty one is of files that
# hold one network only; clip_l is what OneTrainer and ComfyUI call the text encoder.
DOTTED = {
    "unet": (
        "unet.",
        "base_model.model.",
        "base_model.model.unet.",
        "diffusion_model.",
        "model.diffusion_model.",
        "lora_unet.",
        "",
    ),
    "text_encoder": (
        "text_encoder.",
        "base_model.model.",
        "base_model.model.text_encoder.",
        "text_encoder_1.",
        "text_encoders.clip_l.",
        "text_encoders.clip_l.transformer.",
        "clip_l.",
        "clip_l.transformer.",
        "cond_stage_model.",
        "cond_stage_model.transformer.",
        "transformer.",
        "te.",
        "te1.",
        "lora_te.",
        "lora_te1.",
        "",
    ),
}
FLAT = {
    "unet": ("lora_unet_", "lycoris_", "lycoris_unet_"),
    "text_encoder": (
        "lora_te_",
        "lora_te1_",
        "lora_prior_te_",
        "lora_clip_l_",
        "lycoris_",
        "lycoris_te_",
        "lycoris_te1_",
    ),
}
WEIGHT = re.compile(
    r"(?P<layer>.+)\.(?:lora_(?P<a>down|up|A|B)|lora(?:_linear_layer)?\.(?P<b>down|up))"
    r"(?:\.[^.]+)?\.weight"
)
DOWN_OR_UP = {"A": "down", "B": "up", "down": "down", "up": "up"}
# diffusers' JSON: unet.r, unet.lora_alpha ...; r, lora_alpha ... from a network's save_lora_adapter
METADATA = "lora_adapter_metadata"
# peft's initialisations that leave the network's own weights as they are; others, such as pissa and
# olora, put the branches' start into the weights, which are then not the base's
INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# settings of peft's LoraConfig that its branches, or tensors in the file, say all about
SETTLED = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_rslora",
}
# what these networks' files call layers that the attention processors of 2023 held
OLD_TEXT = (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out.0", "out_proj"))
OTHERS = {
    "a LoHa": ("hada_w",),
    "a LoKr": ("lokr_w",),
    "a DoRA": ("dora_scale", "lora_magnitude"),
    "a LoRA with a Tucker core": ("lora_mid",),
    "an OFT": ("oft_",),
}
SECOND_TEXT = ("lora_te2_", "text_encoder_2.", "clip_g.")  # Stable Diffusion XL's other one
# what a folder's LoRA may be called: by peft, by diffusers, by a run of train.py
IN_FOLDERS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "adapter.safetensors",
)
USELESS = ("position_ids",)  # a buffer that no network reads


# --- reading -------------------------------------------------------------------------------------


def read_lora(path: str | Path, networks: Mapping[str, nn.Module]) -> Parts:
    """A LoRA's branches of these networks, "unet" and, if there is one, "text_encoder".

    Raises UserError, which names it, for what the networks have no place for; if shapes do not
    fit; and for files that hold no LoRA, or more than a plain one.
    """
    path = Path(path)
    tensors, settings = _open(path)
    pairs, alphas, left = _sort(path, tensors)
    if not pairs:
        raise UserError(f"{path} holds no LoRA: {_what(tensors)}")
    for own in settings.values():
        check_settings(path, own)
    known = _known(networks)
    parts = {part: {} for part in networks}
    layers = {part: lora.layers(network) for part, network in networks.items()}
    left += [f"{layer}.alpha" for layer in alphas if layer not in known and layer not in pairs]
    alphas = {known.get(layer): alpha for layer, alpha in alphas.items()}
    for layer, pair in pairs.items():
        if layer not in known:
            left.append(layer)
            continue
        if pair.keys() != {"down", "up"}:
            raise UserError(f"{path} is incomplete: it holds the {min(pair)} of {layer} alone")
        part, name = known[layer]
        if name in parts[part]:
            raise UserError(f"{path} holds {name} of the {NAMES[part]} twice, once as {layer}")
        down, up = _fit(path, name, layers[part][name], **pair)
        try:
            alpha = alphas.get((part, name)) or None  # kohya's 0 is none
            if alpha is None:
                alpha = _alpha(settings.get(part, {}), name, len(down))
            alpha = float(len(down) if alpha is None else alpha)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{path}: its settings of alpha are unusable: {error!s:.200}") from None
        if not math.isfinite(alpha):
            raise UserError(f"{path}: its alpha of {name} is {alpha}")
        parts[part][name] = LowRank(down, up, alpha)
    if left:
        raise UserError(_refused(path, parts, pairs, sorted(left)))
    found = {part: len(branches) for part, branches in parts.items() if branches}
    ranks = sorted({len(low.down) for branches in parts.values() for low in branches.values()})
    counts = " and ".join(f"{n} of the {NAMES[part]}" for part, n in found.items())
    log(f"{path}: LoRA of rank {', '.join(map(str, ranks))} for {counts} layers")
    return parts


def check_settings(path: Path, settings: Mapping) -> None:
    """Refuse what peft's LoraConfig says of a LoRA that is no plain one beside the base's weights.

    Raises UserError, which names the setting.
    """
    if settings.get("use_dora"):
        raise UserError(f"{path} is a DoRA (use_dora); supported: plain LoRA")
    init = settings.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in INITS:
        raise UserError(
            f"{path}: init_lora_weights is {init!r:.60}, which changes the base's own weights, so "
            "that on the base as it is the LoRA gives another result; save it again with peft's "
            "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL)"
        )
    nothing = (None, False, {}, [], "")
    if odd := [k for k, v in settings.items() if k not in SETTLED and v not in nothing]:
        raise UserError(
            f"{path}: its settings have {odd[0]} {settings[odd[0]]!r:.60}, which is no "
            "plain LoRA's; supported: plain LoRA"
        )


def _what(tensors: Mapping[str, Tensor]) -> str:
    """What a file is that is no LoRA."""
    kind = rules.family(tensors)
    if kind is None:
        return f"no tensor has such a name; it has {', '.join(sorted(tensors)[:3])}"
    return f"it is {kind}" + ("; give it with --embedding" if "inversion" in kind else "")


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """(tensors, peft's settings of each part)."""
    given = path
    if path.is_dir():
        path = next((path / name for name in IN_FOLDERS if (path / name).is_file()), path)
        if path.is_dir():
            raise UserError(f"{path} is a folder without {', '.join(IN_FOLDERS)}: give a file")
    tensors = _tensors(path)
    beside = path.parent / "adapter_config.json"
    peft = path.stem == "adapter_model"  # its settings stand in a file of their own
    if peft and (given.is_dir() or os.path.lexists(beside)):
        config = read_json(beside)
        kind = config.get("peft_type", "LORA")
        if kind != "LORA":
            raise UserError(f"{path.parent} is a peft folder of {kind!s:.60}; supported: LORA")
        return tensors, dict.fromkeys(NAMES, config)
    if peft:
        log(f"warning: {path} has no adapter_config.json beside it: alpha is taken to be the rank")
    values = parse_json(read_metadata(path).get(METADATA, "{}"), f"{path}: its {METADATA}")
    plain = {key: value for key, value in values.items() if "." not in key}
    flat = {key.partition(".")[::2]: value for key, value in values.items() if "." in key}
    own = {part: {k: v for (p, k), v in flat.items() if p == part} for part in NAMES}
    return tensors, {part: plain | found for part, found in own.items()}


def _tensors(path: Path) -> dict[str, Tensor]:
    tensors = read_tensors(path)
    check_tensors(tensors, str(path))
    return tensors


def _sort(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict, dict, list]:
    """({layer: {"down": ..., "up": ...}}, {layer: alpha}, names of neither kind)."""
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas = {}
    left = []
    for name, value in tensors.items():
        for kind, marks in OTHERS.items():
            if any(mark in name for mark in marks):
                raise UserError(f"{path} is {kind} ({name}); supported: plain LoRA")
        plain = re.sub(r"\.processor\.to_(\w+)_lora\.", r".to_\1.lora.", name)
        plain = re.sub(r"\.to_(q|k|v|out)_lora\.", r".to_\1.lora.", plain)
        plain = plain.replace(".to_out.lora.", ".to_out.0.lora.")
        if found := WEIGHT.fullmatch(plain):
            kind = DOWN_OR_UP[found["a"] or found["b"]]
            pair = pairs.setdefault(found["layer"], {})
            if kind in pair:
                raise UserError(
                    f"{path} holds the {kind} of {found['layer']} twice, also as "
                    f"{name}: give a file of one LoRA"
                )
            pair[kind] = value
        elif plain.endswith(".alpha") and value.numel() == 1:
            alphas[plain.removesuffix(".alpha").removesuffix(".lora")] = float(value)
        elif name.split(".")[-1] not in USELESS:
            left.append(name)
    return pairs, alphas, left


def _known(networks: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """What any file may call the layers: {its name: (part, module name)}.

    From the modules to the names: `_` for `.` cannot be undone.
    """
    known: dict[str, tuple[str, str]] = {}
    for part, network in networks.items():
        original = {}
        if part == "unet" and hasattr(network, "config"):
            original = rules.to_theirs(rules.unet_table(network.config.to_dict()))
        for name in lora.layers(network):
            names = {name, name.removeprefix("text_model.")}
            names |= {rules.translate(name, original) or name}
            if part == "text_encoder":
                ends = [(old, new) for old, new in OLD_TEXT if name.endswith(new)]
                names |= {n.removesuffix(new) + old for n in names for old, new in ends}
            dotted = [prefix + n for prefix in DOTTED[part] for n in names]
            flat = [prefix + n.replace(".", "_") for prefix in FLAT[part] for n in names]
            for key in (*dotted, *flat):
                known.setdefault(key, (part, name))
    return known


def _fit(path: Path, name: str, layer: nn.Module, down: Tensor, up: Tensor) -> list[Tensor]:
    """Both in float32 and the layer's shapes; linear layers and 1x1 convolutions take each
    other's. Raises UserError for any other shape."""
    if min(down.ndim, up.ndim) < 2 or 0 in (*down.shape, *up.shape):
        raise UserError(
            f"{path}: its branch of {name} is {tuple(down.shape)} and "
            f"{tuple(up.shape)}, no matrices"
        )
    rank = len(down)
    fitted = []
    wanted = {
        "down": (rank, *layer.weight.shape[1:]),
        "up": (len(layer.weight), rank, *[1] * (layer.weight.ndim - 2)),
    }
    for (kind, shape), value in zip(wanted.items(), (down, up)):
        squeezed = [s for s in value.shape[2:] if s > 1]
        if value.shape[:2] != shape[:2] or squeezed != [s for s in shape[2:] if s > 1]:
            raise UserError(
                f"{path} is for another architecture: its {kind} of {name} is "
                f"{tuple(value.shape)}, this network takes {tuple(shape)}"
            )
        fitted.append(value.float().reshape(shape))
    return fitted


def _alpha(settings: dict, name: str, rank: int) -> float | None:
    """As peft's LoraConfig has it; None where it says nothing. Raises ValueError for patterns that
    are more than names: a file's regular expression could take forever."""
    alpha = settings.get("lora_alpha")
    for pattern, own in (settings.get("alpha_pattern") or {}).items():
        plain = pattern.removeprefix("^").removeprefix(r"(.*\.)?").removesuffix("$")
        plain = plain.replace(r"\.", ".")
        if not re.fullmatch(r"[\w.-]+", plain):
            raise ValueError(f"{pattern!r:.60} is a regular expression; supported: names of layers")
        whole = re.match(r"\^\w", pattern)  # not only its end
        if name == plain or (name.endswith(f".{plain}") and not whole):
            alpha = own
            break
    return alpha and alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


def _refused(path: Path, parts: Parts, pairs: Mapping, left: list[str]) -> str:
    """The message for a file of which `left` has no place here."""
    count = len(left)
    more = " ..." if len(left) > 3 else ""
    names = f"{', '.join(f'{name:.100}' for name in left[:3])}{more}"
    strange = [name for name in left if name in pairs]
    if not strange:
        return (
            f"{path} holds more than a plain LoRA: {count} tensors, such as {names}; "
            "supported: pairs of down and up"
        )
    every = len(pairs) + count - len(strange)
    reason = ""
    if any(mark in name for name in left for mark in SECOND_TEXT):
        reason = " (Stable Diffusion XL's)"
    elif "text_encoder" not in parts and any("text" in n or "_te" in n for n in left):
        reason = " (it has no text encoder of Stable Diffusion)"
    return (
        f"{path} is for another architecture: {count} of its {every} layers are not in this "
        f"model{reason}, such as {names}; half a LoRA is not applied"
    )


# --- writing -------------------------------------------------------------------------------------


def write_diffusers(path: Path, parts: Parts, **about: str) -> None:
    """As diffusers' save_lora_weights does in peft's names, alphas in the metadata."""
    tensors = {}
    settings = {}
    for part, branches in parts.items():
        prefix = DOTTED[part][0]
        for name, low in branches.items():
            tensors[f"{prefix}{name}.lora_A.weight"] = low.down
            tensors[f"{prefix}{name}.lora_B.weight"] = low.up
        first = next(iter(branches.values()))
        rank = len(first.down)
        alpha = first.alpha
        # the text encoder's layers by their last names: transformers 5 lacks `text_model.`
        names = sorted({n.split(".")[-1] for n in branches} if part == "text_encoder" else branches)
        ranks = {n: len(b.down) for n, b in branches.items() if len(b.down) != rank}
        alphas = {n: b.alpha for n, b in branches.items() if b.alpha != alpha}
        own = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": names,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
        }
        settings |= {prefix + key: value for key, value in own.items()}
    save(path, tensors, about | {METADATA: json.dumps(settings)})


def write_kohya(path: Path, parts: Parts, **about: str) -> None:
    """As kohya's scripts do, which A1111 and ComfyUI read."""
    tensors = {}
    lows = []
    for part, branches in parts.items():
        for name, low in branches.items():
            layer = FLAT[part][0] + name.replace(".", "_")
            tensors[f"{layer}.lora_down.weight"] = low.down
            tensors[f"{layer}.lora_up.weight"] = low.up
            tensors[f"{layer}.alpha"] = torch.tensor(float(low.alpha))
            lows.append(low)
    about |= {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(len(lows[0].down)),
        "ss_network_alpha": str(lows[0].alpha),
    }
    save(path, tensors, about)


def save(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    tensors = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic(path, lambda p: save_file(tensors, p, metadata={"format": "pt", **about}))
