"""Tensors of any known file put into the networks of Stable Diffusion, strictly."""

from torch import Tensor, nn

from .. import UserError
from ..models.build import blank
from ..models.clip import CLIPTextModel
from ..models.configs import CLIPTextConfig, UNetConfig, VAEConfig
from ..models.sd_unet import SDUNet
from ..models.vae import AutoencoderKL
from . import sd_names as rules
from .validate import check_tensors

PARTS = {
    "unet": (UNetConfig, SDUNet),
    "vae": (VAEConfig, AutoencoderKL),
    "text_encoder": (CLIPTextConfig, CLIPTextModel),
}
USELESS = ("position_ids",)  # buffers that old files hold and no network reads


def build(part: str, config: dict, where: str) -> nn.Module:
    """A part's network without memory (meta device). Raises UserError for another family's."""
    make_config, network = PARTS[part]
    giant = [
        k
        for k, v in config.items()
        if isinstance(v, int) and v > (1000 if "layers" in k else 1 << 24)
    ]
    if giant:
        raise UserError(f"{where}: {giant[0]} is {config[giant[0]]}, as in no network")
    try:
        with blank():
            return network(make_config.from_dict(config))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    except (TypeError, AttributeError, RuntimeError, ArithmeticError, LookupError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{where}: its config.json describes no network: {reason}") from None


def fit(model: nn.Module, tensors: dict[str, Tensor], where: str) -> nn.Module:
    """Put tensors into a network on the meta device, without copying them.

    1x1 convolutions and linear layers take each other's weights. Raises UserError, which names
    what is missing, left over, or of another shape.
    """
    expected = model.state_dict()
    tensors = {k: v for k, v in tensors.items() if k.split(".")[-1] not in USELESS}
    for name, value in tensors.items():
        want = expected.get(name)
        if want is not None and value.shape != want.shape and value.numel() == want.numel():
            if tuple(s for s in value.shape if s > 1) == tuple(s for s in want.shape if s > 1):
                tensors[name] = value.reshape(want.shape)
    missing = sorted(expected.keys() - tensors)
    over = sorted(tensors.keys() - expected)
    odd = [
        f"{k} is {tuple(tensors[k].shape)}, expected {tuple(v.shape)}"
        for k, v in expected.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    if missing or over or odd:
        found = {"missing": missing, "left over": over, "of another shape": odd}
        parts = [
            f"{what} {len(names)}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for what, names in found.items()
            if names
        ]
        advice = "; for sizes other than Stable Diffusion 1.5's give --config FOLDER" if odd else ""
        raise UserError(f"{where} does not fit: {'; '.join(parts)}{advice}")
    check_tensors(tensors, where)
    floats = {k: v if v.is_floating_point() else v.float() for k, v in tensors.items()}
    model.load_state_dict(floats, assign=True)
    return model.requires_grad_(False).eval()


def renamed(tensors: dict[str, Tensor], table: rules.Table) -> dict[str, Tensor]:
    """With the names of an original file turned into ours; unknown ones stay as they are."""
    known = rules.to_ours(table)
    return {rules.translate(k, known) or k: v for k, v in tensors.items()}


def old_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The VAE's attention as it was named before 2023, in diffusers' folders."""
    known = dict((old, new) for new, old in rules.OLD_ATTENTION)
    out = {}
    for name, value in tensors.items():
        head, mark, tail = name.partition("attentions.0.")
        layer = next((o for o in known if tail.startswith(f"{o}.")), None) if mark else None
        out[head + mark + known[layer] + tail[len(layer) :] if layer else name] = value
    return out


def with_text_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 writes a text encoder without the prefix that published files have."""
    if any(name.startswith("text_model.") for name in tensors):
        return tensors
    return {f"text_model.{name}": value for name, value in tensors.items()}


def fit_part(part: str, config: dict, tensors: dict[str, Tensor], where: str):
    """(network, the rules used). tensors: of this part, in the names of any known file."""
    model = build(part, config, where)
    config = model.config.to_dict()
    used = "its own names"
    if part == "vae" and any(".mid.attn_1." in name or ".mid.block_1." in name for name in tensors):
        tensors = renamed(tensors, rules.vae_table(config))
        used = "original names"
    elif part == "vae" and any(".query." in name for name in tensors):
        tensors = old_attention(tensors)
        used = "names of before 2023"
    elif part == "unet" and any(name.startswith("input_blocks.") for name in tensors):
        tensors = renamed(tensors, rules.unet_table(config))
        used = "original names"
    elif part == "text_encoder" and with_text_model(tensors) is not tensors:
        tensors = with_text_model(tensors)
        used = "names without text_model."
    return fit(model, tensors, where), used
