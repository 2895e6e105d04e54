"""Textual-inversion files: the vectors of new tokens, as the programs that read them write them.

    diffusers     {"<token>": (n, D)}, .safetensors or .bin
    A1111, kohya  {"emb_params": (n, D)}, .safetensors; the token is the file's name
    A1111 .pt     {"string_to_param": {"*": (n, D)}, "name": token}, also as a ParameterDict
    bare          a tensor; the token is the file's name

A token answers to its file's name, as in A1111 and ComfyUI, and to the name inside.

(diffusers loaders/textual_inversion.py, kohya train_textual_inversion.py.)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .. import UserError
from ..models.tokenizer import plain
from . import sd_names as rules
from .adapter_files import save
from .tensors import read_metadata, read_object, read_tensors
from .validate import check_tensors


@dataclass(frozen=True, eq=False)
class Embedding:
    """The vectors (n, D) of one token, and the names that it answers to in prompts."""

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
    claims: list[tuple[Path, dict[str, str], Tensor]] = []  # names: "file" or "inside" -> name
    for path in map(Path, paths):
        held = read_embedding(path, width)
        for token, vectors in held.items():
            names = {"file": path.stem, "inside": token} if len(held) == 1 else {"inside": token}
            claims.append((path, names, vectors))
    found = []
    for i, (path, names, vectors) in enumerate(claims):
        others = claims[:i] + claims[i + 1 :]
        good = {}
        rivals = []
        for kind, name in names.items():
            ranks = ("file",) if kind == "file" else ("file", "inside")
            taken = [
                other
                for other, theirs, _ in others
                for rank in ranks
                if plain(theirs.get(rank, "")) == plain(name)
            ]
            if taken:
                rivals.append((name, taken[0]))
            else:
                good.setdefault(plain(name), name)
        if not good:
            known = ", ".join(dict.fromkeys(repr(name) for name, _ in rivals))
            raise UserError(
                f"{rivals[0][1]} and {path}: {known} exists already: give a file once, "
                "and rename one of two files of the same name"
            )
        for name, other in rivals:
            if plain(name) not in good:
                warn(
                    f"{path}: {name!r} is also a name of {other}; use {next(iter(good.values()))!r}"
                )
        found.append(Embedding(path, tuple(good.values()), vectors))
    return found


def read_embedding(path: str | Path, width: int) -> dict[str, Tensor]:
    """{name inside, or else the file's: (n, width) float32}.

    Raises UserError for another width and for other files.
    """
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        held = read_tensors(path)
        name = read_metadata(path).get("name")
    elif path.is_file():
        held = read_object(path)
        name = None
    else:
        raise UserError(
            f"{path} is a folder: give a file in it" if path.is_dir() else f"{path} does not exist"
        )
    found = _tokens(held, name or path.stem)
    usable = all(
        isinstance(v, Tensor) and v.numel() and v.squeeze().ndim <= 2 for v in found.values()
    )
    if not found or not usable:
        kind = rules.family(map(str, found)) if "emb_params" not in found else None
        keys = ", ".join(f"{key!s:.40}" for key in list(found)[:3])
        what = f"it is {kind}" if kind else f"it holds {keys or 'no vectors'}"
        raise UserError(f"{path} is no textual inversion: {what}")
    check_tensors(found, str(path))
    if odd := [t for t in found if not isinstance(t, str) or not t.strip() or not t.isprintable()]:
        raise UserError(f"{path} is no textual inversion: a token is {odd[0]!r:.60}")
    for token, vectors in found.items():
        if token in ("clip_l", "clip_g", "t5xxl"):
            raise UserError(
                f"{path} is for a model of several text encoders, such as Stable "
                f"Diffusion XL: it has {token!r}; expected one token"
            )
        if vectors.shape[-1] != width:
            raise UserError(
                f"{path} is for another text encoder: {token!r:.60} is "
                f"{vectors.shape[-1]} wide, this one's is {width}"
            )
    return {token: v.detach().float().reshape(-1, width) for token, v in found.items()}


def _tokens(held, name: str) -> dict:
    """{token: vectors} of what a file holds, unchecked. name: of a token that has none inside."""
    if not isinstance(held, dict):
        return {name: held}
    if "emb_params" in held:
        others = {key: value for key, value in held.items() if isinstance(value, Tensor)}
        return {name: held["emb_params"]} if len(others) == 1 else dict.fromkeys(held)
    if "string_to_param" not in held:
        return held
    if isinstance(held.get("name"), str) and held["name"]:
        name = held["name"]
    params = getattr(held["string_to_param"], "_parameters", held["string_to_param"])
    if not isinstance(params, dict):
        return {}
    if len(params) == 1 and "name" in held:
        return {name: next(iter(params.values()))}
    return {name if key == "*" else key: value for key, value in params.items()}


def write_diffusers(path: Path, token: str, vectors: Tensor, **about: str) -> None:
    """For diffusers' load_textual_inversion."""
    save(path, {token: vectors}, about)


def write_a1111(path: Path, token: str, vectors: Tensor, **about: str) -> None:
    """For A1111, ComfyUI and kohya, which take the file's name for the token."""
    save(path, {"emb_params": vectors}, about | {"name": token})
