"""Read and write LoRA files of the programs that have them, as branches of a network's layers.

    kohya        lora_unet_<path with _>.lora_down.weight, .lora_up.weight, .alpha; lora_te_...
                 also with the block names of original files: lora_unet_input_blocks_1_1_...
    diffusers    unet.<path>.lora_A.weight (down), .lora_B.weight (up); text_encoder....
                 and before that .lora.down.weight, .lora_linear_layer.down.weight, and
                 .processor.to_q_lora.down.weight
    peft         a folder: adapter_config.json, adapter_model.safetensors; base_model.model....
    others       the prefixes of PREFIX, of the text encoder above all

A file is applied completely or refused: what this network has no layer for, and what is no plain
LoRA, is named. A branch's scale is alpha / rank; alpha is in the file, in its metadata, in the
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
from torch import Tensor, nn

from .. import UserError
from ..models import lora
from ..models.lora import LowRank
from ..runtime.distributed import log
from . import sd_names
from .atomic import blame
from .strict import UNUSED, as_shape, some
from .tensors import read_metadata, read_tensors, write_tensors
from .text_files import parse_json, read_json
from .validate import Tensors, check_tensors

Parts = dict[str, dict[str, LowRank]]  # "unet" or "text_encoder" -> module name -> branch

NAMES = {"unet": "U-Net", "text_encoder": "text encoder"}
# what stands before a layer's name, with `_` for `.`. Nothing does in files that hold one network
# only; clip_l is what OneTrainer and ComfyUI call the text encoder.
PREFIX = {
    "unet": re.compile("(lora_|lycoris_|base_model_model_|model_)?(unet_|diffusion_model_)?"),
    "text_encoder": re.compile(
        "(lora_|lycoris_|base_model_model_)?(prior_)?"
        "((text_encoders_)?clip_l_|text_encoder_(1_)?|te1?_|cond_stage_model_)?(transformer_)?"
    ),
}
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
WEIGHT = re.compile(
    r"(?P<layer>.+)\.lora(?:_|\.|_linear_layer\.)(?P<kind>down|up|A|B)(?:\.[^.]+)?\.weight"
)
ALPHA = re.compile(r"(?P<layer>.+?)(?:\.lora)?\.(?P<kind>alpha)")
# diffusers' JSON: unet.r, unet.lora_alpha ...; r, lora_alpha ... from a network's save_lora_adapter
METADATA = "lora_adapter_metadata"
# peft's initialisations that leave the network's own weights as they are; others, such as pissa and
# olora, put the branches' start into the weights, which are then not the base's
INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# settings of peft's LoraConfig that its branches, or tensors in the file, say all about
SETTLED = set(
    """alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying
    eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern
    layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config
    megatron_config megatron_core modules_to_save peft_version qalora_group_size r rank_pattern
    revision runtime_config target_modules task_type trainable_token_indices
    use_rslora""".split()
)
# what these networks' files call layers that the attention processors of 2023 held
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}
# what a folder's LoRA may be called: by peft, by diffusers, by a run of train.py
IN_FOLDERS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "adapter.safetensors",
)


# --- reading -------------------------------------------------------------------------------------


def read_lora(path: str | Path, networks: Mapping[str, nn.Module]) -> Parts:
    """Read a LoRA's branches of these networks, "unet" and, if there is one, "text_encoder".

    Raises UserError, which names it, for what the networks have no layer for; if shapes do not
    fit; and for files that hold no LoRA, or more than a plain one.
    """
    path = Path(path)
    tensors, settings = _open(path)
    kind = sd_names.family(tensors)
    if kind not in ("a LoRA", None):
        hint = "give it with --embedding" if "inversion" in kind else "supported: plain LoRA"
        raise UserError(f"{path} is {kind}; {hint}")
    known = _layer_names(networks)
    found: dict[tuple[str, str], Tensors] = {}  # layer -> its down, up and alpha
    unknown = set()  # layers
    more = []  # tensors of no LoRA
    for name, value in tensors.items():
        plain = re.sub(r"(\.processor)?\.to_(q|k|v|out)_lora\.", r".to_\2.lora.", name)
        plain = plain.replace(".to_out.lora.", ".to_out.0.lora.")
        match = WEIGHT.fullmatch(plain) or (value.numel() == 1 and ALPHA.fullmatch(plain))
        layer = _find(match["layer"], known) if match else None
        if layer:
            kind = {"A": "down", "B": "up"}.get(match["kind"], match["kind"])
            if kind in found.setdefault(layer, {}):
                raise UserError(
                    f"{path} holds the {kind} of {match['layer']} twice, also as {layer[1]} of "
                    f"the {NAMES[layer[0]]}: give a file of one LoRA"
                )
            found[layer][kind] = value
        elif match and match["kind"] != "alpha":
            unknown.add(match["layer"])
        elif name.split(".")[-1] not in UNUSED:
            more.append(name)
    pairs = {layer: pair for layer, pair in found.items() if pair.keys() != {"alpha"}}
    if not pairs and not unknown:
        raise UserError(f"{path} holds no LoRA: it has {some(sorted(tensors))}")
    if unknown:
        raise UserError(
            f"{path} is for another architecture: {len(unknown)} of its "
            f"{len(unknown) + len(pairs)} layers are not in this model's "
            f"{' and '.join(NAMES[part] for part in networks)}, such as {some(sorted(unknown))}; "
            "half a LoRA is not applied"
        )
    if more:
        raise UserError(
            f"{path} holds more than a plain LoRA: {len(more)} tensors, such as "
            f"{some(sorted(more))}; supported: pairs of down and up"
        )
    layers = {part: lora.layers(network) for part, network in networks.items()}
    parts: Parts = {part: {} for part in networks}
    for (part, name), pair in pairs.items():
        alpha = pair.pop("alpha", None)
        if len(pair) < 2:
            raise UserError(f"{path} is incomplete: it holds the {min(pair)} of {name} alone")
        weight = layers[part][name].weight
        rank = len(pair["down"]) if pair["down"].ndim else 0
        shapes = {
            "down": (rank, *weight.shape[1:]),
            "up": (len(weight), rank, *[1] * (weight.ndim - 2)),
        }
        for kind, shape in shapes.items():
            pair[kind] = as_shape(pair[kind], shape).float()
            if pair[kind].shape != shape or not rank:
                raise UserError(
                    f"{path} is for another architecture: its {kind} of {name} is "
                    f"{tuple(pair[kind].shape)}, this network takes {shape}"
                )
        if not alpha:  # kohya's 0 is no alpha
            alpha = _alpha(path, settings[part], name, rank)
        parts[part][name] = LowRank(**pair, alpha=float(alpha))
    counts = [f"{len(own)} of the {NAMES[part]}" for part, own in parts.items() if own]
    ranks = sorted({len(low.down) for branches in parts.values() for low in branches.values()})
    log(f"{path}: LoRA of rank {', '.join(map(str, ranks))} for {' and '.join(counts)} layers")
    return parts


def _open(path: Path) -> tuple[Tensors, dict[str, dict]]:
    """Read (tensors, peft's settings of each network)."""
    folder = path.is_dir()
    if folder:
        path = next((path / name for name in IN_FOLDERS if (path / name).is_file()), path)
        if path.is_dir():
            raise UserError(f"{path} is a folder without {', '.join(IN_FOLDERS)}: give a file")
    tensors = read_tensors(path)
    check_tensors(tensors, str(path))
    beside = path.parent / "adapter_config.json"
    peft = path.stem == "adapter_model"  # its settings are in a file of their own
    if peft and (folder or os.path.lexists(beside)):
        settings = dict.fromkeys(NAMES, read_json(beside))
    else:
        if peft:
            log(f"warning: {path} has no adapter_config.json beside it: alpha is set to the rank")
        found = parse_json(read_metadata(path).get(METADATA, "{}"), f"{path}: its {METADATA}")
        settings = {
            part: {
                key.removeprefix(f"{part}."): value
                for key, value in found.items()
                if key.startswith(f"{part}.") or "." not in key
            }
            for part in NAMES
        }
    for own in settings.values():
        check_settings(path, own)
    return tensors, settings


def check_settings(path: Path, settings: Mapping) -> None:
    """Refuse settings of peft's LoraConfig that a plain LoRA on the unchanged base does not have.

    Raises UserError, which names the setting.
    """
    init = settings.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in INITS:
        raise UserError(
            f"{path}: init_lora_weights is {init!r:.60}, which changes the base's own weights, so "
            "that on the unchanged base the LoRA gives another result; save it again with peft's "
            "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL)"
        )
    for key, value in settings.items():
        if key not in SETTLED and value not in (None, False, {}, [], "", "LORA"):
            raise UserError(f"{path}: its settings have {key} {value!r:.60}; supported: plain LoRA")


def _layer_names(networks: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
    """Map, for each network, every name that a file may have for a layer to the module's name.

    From the modules to the names, with `_` for `.`, which cannot be undone.
    """
    known: dict[str, dict[str, str]] = {}
    for part, network in networks.items():
        config = getattr(network, "config", None)  # of Stable Diffusion's
        original = sd_names.tables(part, config.to_dict())[0] if config else {}
        known[part] = {}
        for name in lora.layers(network):
            names = {name, name.removeprefix("text_model."), sd_names.translate(name, original)}
            if part == "text_encoder":
                for old, new in OLD_TEXT.items():
                    names |= {n.removesuffix(new) + old for n in names if n.endswith(new)}
            known[part] |= {n.replace(".", "_"): name for n in names}
    return known


def _find(layer: str, known: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """Find (part, module name) of a layer by its name in a file."""
    flat = layer.replace(".", "_")
    for part, names in known.items():
        if name := names.get(PREFIX[part].sub("", flat, count=1)):
            return part, name
    return None


def _alpha(path: Path, settings: dict, name: str, rank: int) -> float:
    """Find the alpha of a layer in peft's settings; the rank where they say nothing.

    Raises UserError for unusable settings, and for patterns that are more than names: a file's
    regular expression could take forever.
    """
    with blame(f"{path}: its settings of alpha are unusable"):
        alpha = settings.get("lora_alpha")
        for pattern, own in (settings.get("alpha_pattern") or {}).items():
            found = re.fullmatch(r"(\^?)(\(\.\*\\\.\)\?)?([\w.\\-]+)\$?", pattern)
            if not found:
                raise ValueError(f"{pattern!r:.60} is a regular expression; supported: layer names")
            plain = found[3].replace("\\", "")
            complete = found[1] and not found[2]  # not only the end of a name
            if name == plain or (name.endswith(f".{plain}") and not complete):
                alpha = own
                break
        scale = math.sqrt(rank) if settings.get("use_rslora") else 1
        alpha = float(rank if alpha is None else alpha * scale)
        if not math.isfinite(alpha):
            raise ValueError(f"{name} has {alpha}")
        return alpha


# --- writing -------------------------------------------------------------------------------------


def write_diffusers(path: Path, parts: Parts, **about: str) -> None:
    """Write a LoRA as diffusers' save_lora_weights does: peft's names, alphas in the metadata."""
    tensors = {}
    settings = {}
    for part, branches in parts.items():
        for name, low in branches.items():
            tensors[f"{part}.{name}.lora_A.weight"] = low.down
            tensors[f"{part}.{name}.lora_B.weight"] = low.up
        first = next(iter(branches.values()))
        rank = len(first.down)
        # the text encoder's layers by their last names: transformers 5 lacks `text_model.`
        names = {n.split(".")[-1] for n in branches} if part == "text_encoder" else branches
        settings |= {
            f"{part}.r": rank,
            f"{part}.lora_alpha": first.alpha,
            f"{part}.target_modules": sorted(names),
            f"{part}.rank_pattern": {
                n: len(b.down) for n, b in branches.items() if len(b.down) != rank
            },
            f"{part}.alpha_pattern": {
                n: b.alpha for n, b in branches.items() if b.alpha != first.alpha
            },
        }
    save(path, tensors, about | {METADATA: json.dumps(settings)})


def write_kohya(path: Path, parts: Parts, **about: str) -> None:
    """Write a LoRA as kohya's scripts do, which A1111 and ComfyUI read."""
    tensors = {}
    for part, branches in parts.items():
        for name, low in branches.items():
            layer = KOHYA[part] + name.replace(".", "_")
            tensors[f"{layer}.lora_down.weight"] = low.down
            tensors[f"{layer}.lora_up.weight"] = low.up
            tensors[f"{layer}.alpha"] = torch.tensor(float(low.alpha))
    first = next(low for branches in parts.values() for low in branches.values())
    about |= {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(len(first.down)),
        "ss_network_alpha": str(first.alpha),
    }
    save(path, tensors, about)


def save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write tensors in float32 and texts beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {k: v.float() for k, v in tensors.items()}, about)
