"""A VAE from wherever it is: a run of ours, a folder, or a file of any known layout."""

from pathlib import Path

from safetensors import SafetensorError

from .. import UserError
from ..models.vae import AutoencoderKL
from .checkpoint import load_weights
from .sd_files import load_part, load_part_file
from .strict import build, fit
from .tensors import read_metadata
from .validate import check_size, read_json


def load_vae(path: str) -> AutoencoderKL:
    """From a run of --mode vae (its folder, or a file of it), a diffusers folder, or a file of
    weights in any known layout, of the sizes of its config.json or else Stable Diffusion 1.5's."""
    root = Path(path)
    for folder in (root, root / "vae"):
        if (folder / "config.json").is_file() and "_class_name" in read_json(
            folder / "config.json"
        ):
            return load_part(folder, "vae")[0]
    if not root.exists():
        raise UserError(
            f"--vae {path} does not exist; give a run of --mode vae (train.py --preset "
            "sd_tiny_vae makes results/vae) or a diffusers folder"
        )
    file = root
    if root.is_dir():
        file = (
            root / "ema.safetensors" if (root / "ema.safetensors").is_file() else root / "model.pt"
        )
    if foreign(file):
        return load_part_file(file, "vae")
    tensors, config, metadata = load_weights(file)
    if config.mode != "vae":
        raise UserError(
            f"--vae {path} is a model of --mode {config.mode}; train one with --mode vae"
        )
    model = build("vae", metadata["networks"]["vae"], str(file))
    return fit(model, {k.removeprefix("vae."): v for k, v in tensors.items()}, str(file))


def foreign(file: Path) -> bool:
    """Whether another program wrote it; of what cannot be read load_weights tells why."""
    if file.suffix.lower() != ".safetensors" or not file.is_file():
        return file.suffix in (".ckpt", ".bin")
    check_size(file)
    try:
        return "config" not in read_metadata(file)
    except (SafetensorError, OSError):
        return False
