"""Read and write textual-inversion files: the vectors of new tokens, in every known layout.

    diffusers     {"<token>": (n, D)}, .safetensors or .bin
    A1111, kohya  {"emb_params": (n, D)}, .safetensors; the token is the file's name
    A1111 .pt     {"string_to_param": {"*": (n, D)}, "name": token}, also as a ParameterDict
    bare          a tensor; the token is the file's name

A token answers to its file's name, as in A1111 and ComfyUI, and to the name inside.

(diffusers loaders/textual_inversion.py, kohya train_textual_inversion.py.)
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .. import UserError, shown, some
from ..models.tokenizer import plain
from . import sd_names
from .hub_files import local
from .tensors import read_content, write_tensors
from .torch_files import Stub
from .validate import Tensors, check_tensors


class Embedding(NamedTuple):
    """Hold the vectors (n, D) of one token, and the names that it answers to in prompts."""

    path: Path
    names: tuple[str, ...]
    vectors: Tensor


def read_embeddings(
    paths: Iterable[str | Path], width: int, warn: Callable[[str], None]
) -> list[Embedding]:
    """Read the tokens of several files. Each answers to its file's name and to the name inside.

    Where two files have the same name inside, or one has the name of another file, the files' names
    win; a file of several tokens has those only. `warn` is called with each name that is dropped.
    Raises UserError where a token is left without a name, and as `read_embedding` does.
    """
    tokens = []  # (file, "file" or "inside" -> name, vectors)
    for path in map(local, paths):
        inside = read_embedding(path, width)
        for token, vectors in inside.items():
            names = {"file": path.stem, "inside": token} if len(inside) == 1 else {"inside": token}
            tokens.append((path, names, vectors))
    found = []
    for path, names, vectors in tokens:
        free = {}
        taken = {}
        for kind, name in names.items():
            rivals = [
                other
                for other, theirs, _ in tokens
                for theirs_kind, theirs_name in theirs.items()
                # a file's name is lost to another file's name only
                if theirs is not names
                and (theirs_kind == "file" or kind == "inside")
                and plain(theirs_name) == plain(name)
            ]
            if rivals:
                taken.setdefault(name, rivals[0])
            else:
                free.setdefault(plain(name), name)
        if not free:
            known = ", ".join(map(shown, taken))
            raise UserError(
                f"{next(iter(taken.values()))} and {path}: {known} exists already: give a file "
                "once, and rename one of two files of the same name"
            )
        for name, other in taken.items():
            if plain(name) not in free:
                use = next(iter(free.values()))
                warn(f"{path}: {shown(name)} is also a name of {other}; use {shown(use)}")
        found.append(Embedding(path, tuple(free.values()), vectors))
    return found


def read_embedding(path: str | Path, width: int) -> Tensors:
    """Read {name inside, or else the file's: (n, width) float32}.

    Raises UserError for another width and for other files.
    """
    path = Path(path)
    content, about = read_content(path)
    found = _tokens(content, about.get("name") or path.stem)
    usable = found and all(
        isinstance(v, Tensor) and v.numel() and v.squeeze().ndim <= 2 for v in found.values()
    )
    if not usable:
        kind = None if "emb_params" in found else sd_names.family(map(str, found))
        what = f"it is {kind}" if kind else f"it holds {some(found) or 'no vectors'}"
        raise UserError(f"{path} is no textual inversion: {what}")
    check_tensors(found, path)
    for token, vectors in found.items():
        if not isinstance(token, str) or not token.strip() or not token.isprintable():
            raise UserError(f"{path} is no textual inversion: a token is {shown(token)}")
        if token in ("clip_l", "clip_g", "t5xxl"):
            raise UserError(
                f"{path} is for a model of several text encoders, such as Stable "
                f"Diffusion XL: it has {shown(token)}; expected one token"
            )
        if vectors.shape[-1] != width:
            raise UserError(
                f"{path} is for another text encoder: {shown(token)} is "
                f"{vectors.shape[-1]} wide, this one's is {width}"
            )
    return {token: v.detach().float().reshape(-1, width) for token, v in found.items()}


def _tokens(content, name: str) -> dict:
    """Find {token: vectors} in a file, unchecked. name: of a token that has none inside."""
    if not isinstance(content, dict):
        return {name: content}
    if "emb_params" in content:
        alone = sum(isinstance(value, Tensor) for value in content.values()) == 1
        return {name: content["emb_params"]} if alone else dict.fromkeys(content)
    if "string_to_param" not in content:
        return content
    inner = content.get("name")
    name = inner if isinstance(inner, str) and inner else name
    params = content["string_to_param"]
    if isinstance(params, Stub) and isinstance(params.state, dict):  # a ParameterDict
        params = params.state.get("_parameters")
    if not isinstance(params, dict):
        return {}
    if len(params) == 1 and "name" in content:
        return {name: next(iter(params.values()))}
    return {name if key == "*" else key: value for key, value in params.items()}


def write_diffusers(path: Path, token: str, vectors: Tensor, **about: str) -> None:
    """Write a file for diffusers' load_textual_inversion."""
    write_tensors(path, {token: vectors}, about)


def write_a1111(path: Path, token: str, vectors: Tensor, **about: str) -> None:
    """Write a file for A1111, ComfyUI and kohya, which take the file's name for the token."""
    write_tensors(path, {"emb_params": vectors}, about | {"name": token})
