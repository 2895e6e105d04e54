"""Textual-inversion files: the vectors of new tokens, as the programs that read them write them.

    diffusers     {"<token>": (n, D)}, .safetensors or .bin
    A1111, kohya  {"emb_params": (n, D)}, .safetensors; the token is the file's name
    A1111 .pt     {"string_to_param": {"*": (n, D)}, "name": token}, also as a ParameterDict
    bare          a tensor; the token is the file's name

(diffusers loaders/textual_inversion.py, kohya train_textual_inversion.py.)
"""

from pathlib import Path

from torch import Tensor

from .. import UserError
from . import rules
from .adapters import save
from .files import read_metadata, read_object, read_tensors
from .guards import check_tensors


def read_embedding(path: str | Path, width: int) -> dict[str, Tensor]:
    """{token: (n, width) float32}. Raises UserError for another width and for other files."""
    path = Path(path)
    if path.suffix == ".safetensors":
        held, name = read_tensors(path), read_metadata(path).get("name")
    elif path.is_file():
        held, name = read_object(path), None
    else:
        raise UserError(f"{path} does not exist")
    name = name or path.stem
    if isinstance(held, dict) and "string_to_param" in held:
        name, held = held.get("name") or name, held["string_to_param"]
        held = getattr(held, "_parameters", held)
        name = name if isinstance(name, str) else repr(name)[:60]
        found = {name: next(iter(held.values()), None)} if isinstance(held, dict) else {}
    elif isinstance(held, dict) and "emb_params" in held:
        found = {name: held["emb_params"]}
    else:
        found = held if isinstance(held, dict) else {name: held}
    usable = all(isinstance(v, Tensor) and v.ndim in (1, 2) and v.numel() for v in found.values())
    if not found or not usable:
        kind = rules.family(map(str, found))
        raise UserError(f"{path} is no textual inversion" + (f": it is {kind}" if kind else ""))
    check_tensors(found, str(path))
    if odd := [t for t in found if not isinstance(t, str) or not t.strip() or not t.isprintable()]:
        raise UserError(f"{path} is no textual inversion: a token is {odd[0]!r:.60}")
    for token, vectors in found.items():
        if vectors.shape[-1] != width or token in ("clip_l", "clip_g"):
            raise UserError(f"{path} is for another text encoder: {token!r:.60} is "
                            f"{vectors.shape[-1]} wide, this one's is {width}")  # fmt: skip
    return {token: v.detach().float().reshape(-1, width) for token, v in found.items()}


def write_diffusers(path: Path, token: str, vectors: Tensor, **about: str) -> None:
    """For diffusers' load_textual_inversion."""
    save(path, {token: vectors}, about)


def write_a1111(path: Path, token: str, vectors: Tensor, **about: str) -> None:
    """For A1111, ComfyUI and kohya, which take the file's name for the token."""
    save(path, {"emb_params": vectors}, about | {"name": token})
