"""Load tensors of any known file into the networks of Stable Diffusion, strictly."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from .. import UserError, shown, some
from ..models.build import NETWORKS, blank
from ..models.build import build as build_network
from . import sd_names
from .atomic import blame
from .validate import Tensors, check_tensors

PARTS = ("unet", "vae", "text_encoder")
UNUSED = ("position_ids",)  # buffers that old files hold and no network reads
# what a file has beside a network: the rest of CLIP; what a VAE was trained with
BESIDE = {
    "text_encoder": ("vision_model", "visual", "logit_", "text_projection"),
    "vae": ("loss.", "model_ema.", "discriminator."),
}


def build(part: str, config: dict, where: Path | str) -> nn.Module:
    """Build a network without memory (meta device). Raises UserError for another family's."""
    make_config, _ = NETWORKS[part]
    with blame(f"{where}: its config.json is not supported"), blank():
        return build_network(part, make_config.from_dict(config))


def load_strict(
    model: nn.Module, tensors: Tensors, where: Path | str, advice: str = ""
) -> nn.Module:
    """Put tensors into a network on the meta device, without copying them.

    1x1 convolutions and linear layers take each other's weights. Raises UserError, which names
    what is missing, left over, or of another shape, and then gives the advice.
    """
    expected = model.state_dict()
    found = {
        name: as_shape(value, expected[name].shape) if name in expected else value
        for name, value in zip(map(str, tensors), tensors.values())  # a pickle's keys are anything
        if name.split(".")[-1] not in UNUSED
    }
    problems = {
        "missing": sorted(expected.keys() - found),
        "left over": sorted(found.keys() - expected),
        "of another shape": [
            f"{name} is {shown(tuple(found[name].shape))}, expected {tuple(value.shape)}"
            for name, value in expected.items()
            if name in found and found[name].shape != value.shape
        ],
    }
    named = [f"{kind} {len(names)}: {some(names)}" for kind, names in problems.items() if names]
    if named:
        advice = advice if problems["of another shape"] else ""
        raise UserError(f"{where} does not fit: {'; '.join(named)}{advice}")
    check_tensors(found, where)
    floats = {k: v if v.is_floating_point() else v.float() for k, v in found.items()}
    model.load_state_dict(floats, assign=True)
    return model.requires_grad_(False).eval()


def as_shape(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape where only sides of 1 differ, as of linear layers and 1x1 convolutions."""
    same = [size for size in value.shape if size > 1] == [size for size in shape if size > 1]
    return value.reshape(shape) if same and value.shape != shape else value


def load_part(
    part: str, config: dict, tensors: Tensors, where: Path | str
) -> tuple[nn.Module, str]:
    """Build a network from its tensors in the names of any known file: (network, which names)."""
    model = build(part, config, where)
    tensors = {k: v for k, v in tensors.items() if not k.startswith(BESIDE.get(part, ()))}
    if part == "text_encoder" and not any("text_model." in name for name in tensors):
        # transformers 5 leaves out the prefix that published files have
        tensors = {f"text_model.{name}": value for name, value in tensors.items()}
    _, known = sd_names.tables(part, model.config.to_dict())
    expected = model.state_dict()
    while True:
        named = {sd_names.translate(name, known): value for name, value in tensors.items()}
        # `model.` of Lightning, `unet.` and the like, which all names begin with
        starts = {name[: name.find(".") + 1] for name in tensors}
        if named.keys() & expected or len(starts) > 1 or not any(starts):
            break
        tensors = {name.partition(".")[2]: value for name, value in tensors.items()}
    used = "its own names" if named.keys() == tensors.keys() else "original names"
    advice = "; for sizes other than Stable Diffusion 1.5's give --config FOLDER"
    return load_strict(model, named, where, advice), used
