"""Read and write LoRA files of the programs that have them, as branches of a network's layers.

    kohya        lora_unet_<path with _>.lora_down.weight, .lora_up.weight, .alpha; lora_te_...
                 also with the block names of original files: lora_unet_input_blocks_1_1_...
    diffusers    unet.<path>.lora_A.weight (down), .lora_B.weight (up); text_encoder....
                 and before that .lora.down.weight, .lora_linear_layer.down.weight, and
                 .processor.to_q_lora.down.weight
    peft         a folder: adapter_config.json, adapter_model.safetensors; base_model.model....
    LyCORIS      kohya's names, with the tensors of the kinds below
    cloneofsimo  .pt: a list of up, down, up ... in the order of the layers; .safetensors: the same
                 as unet:0:up, unet:0:down ..., also with vectors of new tokens
    others       the prefixes of PREFIX, of the text encoder above all

A plain LoRA stays a pair of factors. Of every other kind it is computed what the weights W change
by (x: Kronecker product, *: element by element, s: alpha / rank):

    LoHa         s (w1_a w1_b) * (w2_a w2_b)
    LoKr         s w1 x w2, each of which may be a product of two; s is 1 if neither is
    Tucker       a product as above with a core between its factors: LoCon, LoHa, LoKr
    DoRA         m V / |V| - W, where V is W and the change so far; m and the norms are one for each
                 output, in some files of LyCORIS for each input
    full         diff, diff_b; of norms w_norm, b_norm

A file is applied completely or refused: what this network has no layer for, and what is of another
kind, is named. alpha is in the file, in its metadata, in the folder's configuration, or nowhere,
and then it is the rank. (kohya networks/lora.py, diffusers loaders/lora_base.py, LyCORIS
functional/, cloneofsimo/lora lora_diffusion/lora.py.)
"""

import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import UserError, shown
from ..models import lora
from ..models.lora import Delta, LowRank
from ..runtime.distributed import log
from . import sd_names
from .atomic import blame, write_text
from .hub_files import local
from .strict import UNUSED, some
from .tensors import read_content, read_metadata, read_tensors, write_tensors
from .text_files import parse_json, read_json
from .validate import Tensors, check_tensors

Networks = Mapping[str, nn.Module]  # by "unet" or "text_encoder"
Parts = dict[str, dict[str, LowRank | Delta]]  # "unet" or "text_encoder" -> module name -> branch

NAMES = {"unet": "U-Net", "text_encoder": "text encoder"}
# what stands before a layer's name, with `_` for `.`. Nothing does in files that hold one network
# only; clip_l is what OneTrainer and ComfyUI call the text encoder.
PREFIX = {
    "unet": re.compile(
        "(lora_|lycoris_|model_)?(unet_|diffusion_model_)?(base_model_model_)?(unet_)?"
    ),
    "text_encoder": re.compile(
        "(lora_|lycoris_|base_model_model_)?(prior_)?"
        "((text_encoders_)?clip_l_|text_encoder_(1_)?|te1?_|cond_stage_model_)?"
        "(base_model_model_)?(transformer_)?"
    ),
}
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
# the U-Net's layers in the classes of kohya's UNET_TARGET_REPLACE_MODULE and its like
KOHYA_UNET = re.compile("attentions|resnets|samplers")
# what sd_names.family calls the files that are read
KINDS = ("a LoRA", "a LoHa", "a LoKr", "a DoRA", "a LoRA with a Tucker core", None)
SUPPORTED = "LoRA, LoCon, LoHa, LoKr, DoRA and full differences"
WEIGHT = re.compile(
    r"(?P<layer>.+)\.lora(?:_|\.|_linear_layer\.)(?P<kind>down|up|mid|A|B)(?:\.[^.]+)?\.weight"
)
OTHER = re.compile(
    r"(?P<layer>.+)\.(?P<kind>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|diff(?:_b)?"
    r"|[wb]_norm|dora_scale|lora_magnitude_vector)(?:\.[^.]+)?(?:\.weight)?"
)
NUMBERED = re.compile(r"(\w*):(\d{1,6}):(up|down)")  # cloneofsimo's
ALPHA = re.compile(r"(?P<layer>.+?)(?:\.lora)?\.(?P<kind>alpha)")
# diffusers' JSON: unet.r, unet.lora_alpha ...; r, lora_alpha ... from a network's save_lora_adapter
METADATA = "lora_adapter_metadata"
# peft's initialisations that leave the network's own weights as they are; others, such as pissa and
# olora, put the branches' start into the weights, which are then not the base's
INITS = "true false none gaussian orthogonal eva mica".split()
# settings of peft's LoraConfig that its branches, or tensors in the file, say all about
SETTLED = set(
    """alpha alpha_pattern auto_mapping base_model_name_or_path bias corda_config decompose_both
    decompose_factor ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode
    init_lora_weights init_weights layers_pattern layers_to_transform loftq_config lora_alpha
    lora_bias lora_dropout lora_ga_config megatron_config megatron_core module_dropout
    modules_to_save peft_version qalora_group_size r rank_dropout rank_dropout_scale rank_pattern
    revision runtime_config target_modules task_type trainable_token_indices use_dora
    use_effective_conv2d use_rslora""".split()
)
# what these networks' files call layers that the attention processors of 2023 held
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}
# what a folder's LoRA may be called: by a run of train.py, by peft, by diffusers; a run's comes
# first, since what a run has for peft is of the U-Net alone
IN_FOLDERS = """adapter.safetensors adapter_model.safetensors adapter_model.bin
    pytorch_lora_weights.safetensors pytorch_lora_weights.bin""".split()
EMBEDDING = "<embed>"  # cloneofsimo's mark, in the metadata, of a token's vectors
# The layers that cloneofsimo's trainers put branches beside: attention alone at first, then GEGLU
# and, if asked for, ResBlocks. Their order is that of the classes that diffusers and transformers
# had then, in which `ff` came before, later after `attn2`.
TRAINED = {
    "unet": (
        r"attn[12]\.",
        r"attn[12]\.|ff\.net\.0\.",
        r"attn[12]\.|ff\.net\.0\.|resnets\.",
    ),
    "text_encoder": (r"self_attn\.",),
}
ORDERS = tuple(
    f"""down_blocks up_blocks mid_block attentions resnets {blocks} to_q to_k to_v to_out conv1
    time_emb_proj conv2 conv_shortcut k_proj v_proj q_proj out_proj"""
    for blocks in ("attn1 ff attn2", "attn1 attn2 ff")
)
MAX_CHANGE = 1e6  # of a weight; those of networks are below 100


# --- reading -------------------------------------------------------------------------------------


def read_lora(path: str | Path, networks: Networks) -> Parts:
    """Read a LoRA's branches of these networks, "unet" and, if there is one, "text_encoder".

    Raises UserError, which names it, for what the networks have no layer for; if shapes do not
    fit; and for files that hold no adapter, or one of a kind that is not read.
    """
    folder = Path(path).is_dir()
    path = _find_file(path)
    tensors = _name_layers(path, _open(path), networks)
    settings = _settings(path, folder)
    family = sd_names.family(tensors)
    if family not in KINDS:
        hint = "give it with --embedding" if "inversion" in family else f"supported: {SUPPORTED}"
        raise UserError(f"{path} is {family}; {hint}")
    known = _layer_names(networks)
    found = {}  # layer -> its down, up, alpha ...
    unknown = set()  # layers
    more = []  # tensors of no kind that is read
    for name, value in tensors.items():
        plain = re.sub(r"(\.processor)?\.to_(q|k|v|out)_lora\.", r".to_\2.lora.", name)
        plain = plain.replace(".to_out.lora.", ".to_out.0.lora.")
        match = WEIGHT.fullmatch(plain) or OTHER.fullmatch(plain)
        match = match or (value.numel() == 1 and ALPHA.fullmatch(plain))
        layer = _find(match["layer"], known) if match else None
        if layer:
            kind = {"A": "down", "B": "up"}.get(match["kind"], match["kind"])
            if kind in found.setdefault(layer, {}):
                raise UserError(
                    f"{path} holds the {kind} of {shown(match['layer'])} twice, also as {layer[1]}"
                )
            found[layer][kind] = value
        elif match and match["kind"] != "alpha":
            unknown.add(match["layer"])
        elif name.split(".")[-1] not in UNUSED:
            more.append(name)
    layers = {layer: own for layer, own in found.items() if own.keys() != {"alpha"}}
    if not layers and not unknown:
        raise UserError(f"{path} holds no LoRA: it has {some(sorted(tensors))}")
    if unknown:
        raise UserError(
            f"{path} is for another architecture: {len(unknown)} of its "
            f"{len(unknown) + len(layers)} layers are not in this model's "
            f"{' and '.join(NAMES[part] for part in networks)}, such as {some(sorted(unknown))}; "
            "half a LoRA is not applied"
        )
    if more:
        held = f"{len(more)} tensors, such as {some(sorted(more))}"
        raise UserError(f"{path} holds more than a LoRA: {held}; supported: {SUPPORTED}")
    parts = {part: {} for part in networks}
    for (part, name), own in layers.items():
        layer = networks[part].get_submodule(name)
        parts[part][name] = _branch(path, name, own, layer, settings[part])
    counts = [f"{len(own)} of the {NAMES[part]}" for part, own in parts.items() if own]
    log(f"{path}: {family or 'full differences'} for {' and '.join(counts)} layers")
    return parts


def _find_file(path: str | Path) -> Path:
    """Find the LoRA of a folder; a file is itself. Raises UserError if there is no or no one."""
    path = local(path)
    if not path.is_dir():
        return path
    for name in IN_FOLDERS:
        if (path / name).is_file():
            return path / name
    others = sorted(path.glob("[!.]*.safetensors"))
    if len(others) != 1:
        held = some(file.name for file in others) or "no other"
        known = ", ".join(IN_FOLDERS)
        raise UserError(f"{path} is a folder without {known}; it holds {held}: give a file")
    return others[0]


def _open(path: Path) -> Tensors:
    """Read all tensors but the vectors of tokens."""
    content, marks = read_content(path)
    if isinstance(content, list):  # cloneofsimo's
        tensors = {f":{i // 2}:{('up', 'down')[i % 2]}": value for i, value in enumerate(content)}
    else:
        tensors = read_tensors(path)
    check_tensors(tensors, path)
    return {name: value for name, value in tensors.items() if marks.get(name) != EMBEDDING}


def read_tokens(path: str | Path, width: int) -> Tensors:
    """Read the vectors (n, width) of tokens that cloneofsimo's trainers put into a LoRA's file.

    Raises UserError for another width.
    """
    path = _find_file(path)
    tokens = [name for name, mark in read_metadata(path).items() if mark == EMBEDDING]
    with blame(f"{path}: its vectors of {some(tokens)} are for another text encoder"):
        tensors = read_tensors(path) if tokens else {}
        return {token: tensors[token].float().reshape(-1, width) for token in tokens}


def _settings(path: Path, folder: bool) -> dict[str, dict]:
    """Read peft's settings of each network. folder: the file was found in one that was given."""
    beside = path.parent / "adapter_config.json"
    peft = path.stem == "adapter_model"  # its settings are in a file of their own
    if peft and (folder or os.path.lexists(beside)):
        found = read_json(beside)
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
    return settings


def _name_layers(path: Path, tensors: Tensors, networks: Networks) -> Tensors:
    """Name the tensors of cloneofsimo's files, which are numbered, after their layers.

    Raises UserError if this model does not have these layers.
    """
    numbered = {}  # network, "": not said -> (number, "down" or "up") -> tensor
    named = {}
    for name, value in tensors.items():
        if match := NUMBERED.fullmatch(name):
            numbered.setdefault(match[1], {})[int(match[2]), match[3]] = value
        else:
            named[name] = value
    for said, own in numbered.items():
        values = [own[place] for place in sorted(own)]
        sides = [v.shape[:1] if i % 2 else v.shape[1:] for i, v in enumerate(values)]
        fitting = [
            (part, names)
            for part in networks
            if said in (part, "")
            for names in _trained(part, networks[part], sides)
        ]
        if not fitting:
            raise UserError(
                f"{path} is for another architecture: its {len(own)} numbered tensors fit no "
                f"layers of this model's {' and '.join(map(NAMES.get, networks))}"
            )
        part, names = fitting[0]
        for i, value in enumerate(values):
            named[f"{part}.{names[i // 2]}.lora_{('down', 'up')[i % 2]}.weight"] = value
    return named


def _trained(part: str, network: nn.Module, sides: list[torch.Size]) -> Iterator[list[str]]:
    """Find the layers, in the order of cloneofsimo's trainers, that have these sides."""
    layers = lora.layers(network)
    for pattern, order in itertools.product(TRAINED[part], ORDERS):
        rank = {word: i for i, word in enumerate(order.split())}
        names = [name for name in layers if re.search(pattern, name)]
        names.sort(key=lambda n: [rank.get(word, word.zfill(4)) for word in n.split(".")])  # noqa: B023
        shapes = [layers[name].weight.shape for name in names]
        if sides == [side for shape in shapes for side in (shape[1:], shape[:1])]:
            yield names


def _branch(path: Path, name: str, own: Tensors, layer: nn.Module, settings: dict):
    """Turn what a file holds of a layer into its branch: a LowRank, or a Delta of any other kind.

    Raises UserError for tensors that are missing, do not fit or do not go together.
    """
    weight = layer.weight.detach().cpu().float()
    left = {kind: value.float() for kind, value in own.items()}
    alpha = left.pop("alpha", None)
    bias = None
    with blame(
        f"{path} is incomplete or for another architecture: {name} is {tuple(weight.shape)} in "
        f"this network, the file has its {some(sorted(own))}; wrong or missing"
    ):
        change, rank = _multiply(left, weight.shape)
        if rank is None and "lokr_w1" in own:  # in peft's settings, or nowhere
            rank = _pattern(settings, "rank_pattern", name, settings.get("r"))
        if rank is not None:
            # kohya's 0 is no alpha
            alpha = float(alpha) if alpha else _alpha(path, settings, name, rank)
            change = change * (alpha / rank)
        if "lora_magnitude_vector" in left:  # (1, outputs, 1, 1) of convolutions
            left["dora_scale"] = left.pop("lora_magnitude_vector").flatten()
        if "dora_scale" in left:
            change = _decompose(weight, change, left.pop("dora_scale"))
        elif settings.get("use_dora"):
            raise ValueError("lora_magnitude_vector, which its settings with use_dora ask for")
        for kind in {"diff_b", "b_norm"} & left.keys() if layer.bias is not None else ():
            bias = left.pop(kind).reshape(layer.bias.shape)
        if left:
            raise ValueError(", ".join(left))
        if not change.abs().max() < MAX_CHANGE:
            raise UserError(
                f"{path} changes {name} by {change.abs().max():g}, which no network survives: the "
                "training that made it diverged"
            )
        if own.keys() - {"alpha"} == {"down", "up"}:
            down = own["down"].float().reshape(rank, *weight.shape[1:])
            up = own["up"].float().reshape(len(weight), rank, *[1] * (weight.ndim - 2))
            return LowRank(down, up, alpha)
        return Delta(change, bias)


def _multiply(own: Tensors, shape: torch.Size) -> tuple[Tensor, int | None]:
    """Multiply a layer's factors: (what weights of this shape change by, the factors' rank if any).

    Takes what it uses from `own`. Raises KeyError and others for factors that are missing or do not
    fit.
    """
    rank = None

    def factor(name, core="", ends=("_a", "_b")):  # (rows, columns)
        nonlocal rank
        if name in own:
            return own.pop(name).flatten(1)
        left, right = (own.pop(name + end).flatten(1) for end in ends)
        rank = len(right)
        middle = own.pop(core, None)
        if middle is not None and core != "mid":
            left = left.T  # LyCORIS has it so beside a core
        kernel = 1 if middle is None else middle.shape[2:].numel()
        if not rank or len(left) * right.shape[1] * kernel > shape.numel():  # before it is computed
            raise ValueError(f"{name or 'lora'} of {tuple(left.shape)} and {tuple(right.shape)}")
        if middle is None:
            return left @ right
        return torch.einsum("ij...,pi,jr->pr...", middle, left, right).flatten(1)

    names = " ".join(own)
    change = torch.zeros(shape[0], shape[1:].numel())
    if {"down", "up", "mid"} & own.keys():
        change = factor("", "mid", ("up", "down"))
    elif "hada" in names:
        both = factor("hada_w1", "hada_t1"), factor("hada_w2", "hada_t2")
        change = torch.stack(both).prod(0)  # other shapes are no product
    elif "lokr" in names:
        w1, w2 = factor("lokr_w1"), factor("lokr_w2", "lokr_t2")
        if w1.numel() * w2.numel() > shape.numel():
            raise ValueError(f"lokr of {tuple(w1.shape)} and {tuple(w2.shape)}")
        change = torch.kron(w1, w2)
    elif {"diff", "w_norm"} & own.keys():
        change = own.pop("diff" if "diff" in own else "w_norm")
        change = change.reshape(len(change), -1)
    if change.shape != (shape[0], shape[1:].numel()):
        raise ValueError(f"a product of {tuple(change.shape)}")
    return change.view(shape), rank


def _decompose(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """Compute DoRA's change (arXiv:2402.09353): V = W + change gets norms of these magnitudes.

    They are one for each output, or, as their shape tells, (1, inputs, ...), one for each input.
    """
    moved = weight + change
    axis = 0 if len(magnitude) == len(weight) else 1
    others = [i for i in range(weight.ndim) if i != axis]
    norm = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
    eps = torch.finfo(torch.float32).eps  # LyCORIS'
    return moved * (magnitude.reshape(norm.shape) / (norm + eps)) - weight


def check_settings(path: Path, settings: Mapping) -> None:
    """Refuse peft's settings of adapters that are not read, or not on the unchanged base.

    Raises UserError, which names the setting.
    """
    init = settings.get("init_lora_weights")
    if str(init).lower() not in INITS:
        raise UserError(
            f"{path}: init_lora_weights is {shown(init)}, which changes the base's own weights, so "
            "that on the unchanged base the LoRA gives another result; save it again with peft's "
            "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL)"
        )
    for key, value in settings.items():
        if value and key not in SETTLED and value not in ("LORA", "LOHA", "LOKR"):
            raise UserError(f"{path} sets {shown(key)} {shown(value)}; supported: {SUPPORTED}")


def _layer_names(networks: Networks) -> dict[str, dict[str, str]]:
    """Map, for each network, every name that a file may have for a layer to the module's name.

    From the modules to the names, with `_` for `.`, which cannot be undone.
    """
    known = {}
    for part, network in networks.items():
        config = getattr(network, "config", None)  # of Stable Diffusion's
        original = sd_names.tables(part, config.to_dict())[0] if config else {}
        known[part] = {}
        for name in lora.layers(network, lora.LINEAR):
            names = {name, name.removeprefix("text_model."), sd_names.translate(name, original)}
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


def _pattern(settings: dict, key: str, name: str, default):
    """Find a layer's own value in peft's settings, else the default.

    Raises ValueError for patterns that are more than names: a file's regular expression could take
    forever.
    """
    for pattern, own in (settings.get(key) or {}).items():
        found = re.fullmatch(r"(\^?)(\(\.\*\\\.\)\?)?([\w.\\-]+)\$?", pattern)
        if not found:
            raise ValueError(f"{shown(pattern)} is a regular expression; supported: layer names")
        plain = found[3].replace("\\", "")
        complete = found[1] and not found[2]  # not only the end of a name
        if name == plain or (name.endswith(f".{plain}") and not complete):
            return own
    return default


def _alpha(path: Path, settings: dict, name: str, rank: int) -> float:
    """Find the alpha of a layer in peft's settings; the rank where they say nothing.

    Raises UserError for unusable settings.
    """
    with blame(f"{path}: its settings of alpha are unusable"):
        default = settings.get("lora_alpha", settings.get("alpha"))
        alpha = _pattern(settings, "alpha_pattern", name, default)
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
        named, own = _as_peft(branches, part)
        if part == "text_encoder":  # by their last names: transformers 5 lacks `text_model.`
            own["target_modules"] = sorted({name.split(".")[-1] for name in branches})
        tensors |= named
        settings |= {f"{part}.{key}": value for key, value in own.items()}
    write_tensors(path, tensors, about | {METADATA: json.dumps(settings)})


def write_peft(folder: Path, branches: Mapping[str, LowRank]) -> None:
    """Write one network's LoRA as a folder that peft's PeftModel.from_pretrained reads."""
    tensors, settings = _as_peft(branches, "base_model.model")
    settings |= {"peft_type": "LORA", "inference_mode": True}
    write_text(folder / "adapter_config.json", json.dumps(settings, indent=2))
    write_tensors(folder / "adapter_model.safetensors", tensors)


def _as_peft(branches: Mapping[str, LowRank], prefix: str) -> tuple[Tensors, dict]:
    """Give branches their names in peft, and list what its LoraConfig says of them."""
    tensors = {}
    for name, low in branches.items():
        tensors[f"{prefix}.{name}.lora_A.weight"] = low.down
        tensors[f"{prefix}.{name}.lora_B.weight"] = low.up
    first = next(iter(branches.values()))
    rank = len(first.down)
    return tensors, {
        "r": rank,
        "lora_alpha": first.alpha,
        "target_modules": sorted(branches),
        "rank_pattern": {n: len(b.down) for n, b in branches.items() if len(b.down) != rank},
        "alpha_pattern": {n: b.alpha for n, b in branches.items() if b.alpha != first.alpha},
    }


def in_kohya(part: str, name: str) -> bool:
    """Check whether kohya's LoRAs may have a layer."""
    return part != "unet" or bool(KOHYA_UNET.search(name))


def write_kohya(path: Path, parts: Parts, **about: str) -> None:
    """Write a LoRA as kohya's scripts do, which A1111 and ComfyUI read.

    Layers that kohya has no names for are left out; nothing is written if there are no others.
    """
    tensors = {}
    for part, branches in parts.items():
        for name, low in branches.items():
            if not in_kohya(part, name):
                continue
            layer = KOHYA[part] + name.replace(".", "_")
            tensors[f"{layer}.lora_down.weight"] = low.down
            tensors[f"{layer}.lora_up.weight"] = low.up
            tensors[f"{layer}.alpha"] = torch.tensor(float(low.alpha))
    if not tensors:
        return
    first = next(low for branches in parts.values() for low in branches.values())
    about |= {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(len(first.down)),
        "ss_network_alpha": str(first.alpha),
    }
    write_tensors(path, tensors, about)
