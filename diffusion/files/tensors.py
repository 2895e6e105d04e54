"""Read and write weight files: safetensors, in one file or in shards, and what torch.save wrote.

What a file is, its first bytes say and not its name. Nothing here unpickles code, and nothing is
copied: tensors lie in the mapped file until used. Each reader raises UserError for files that are
missing, damaged or no weights.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import UserError, shown, some
from .atomic import atomic, blame, name_of, open_regular, reason
from .text_files import parse_json, read_json, stand_in
from .torch_files import LEGACY, Stub, read_legacy, read_zip
from .validate import Tensors, digest_tensors

MAX_HEADER = 8 << 20  # bytes of a safetensors header, which take 30 times more to read
DIGEST = "diffusion.sha256"  # the text in which a file that we write has its digests
# what stands in the names of networks that were wrapped to train or to compile
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
BASES = ("diffusion_pytorch_model", "model", "pytorch_model")


class Unreadable(UserError):
    """Report a file that may be intact, but cannot be read now."""


def find_weights(folder: Path) -> Path:
    """Find the weight file, or the index of the shards, of a network's folder.

    Full precision comes first. Raises UserError if there is none.
    """
    for variant in ("", ".fp16", ".bf16"):
        for base in BASES:
            for ending in (".safetensors", ".bin"):
                name = f"{base}{variant}{ending}"
                # diffusers writes the index of a variant in the second way
                for file in (name, f"{name}.index.json", f"{base}{ending}.index{variant}.json"):
                    if (folder / file).is_file():
                        return folder / file
    raise UserError(
        f"{folder} holds no weights; expected {BASES[0]}.safetensors, "
        "model.safetensors or a .bin of these names"
    )


def kind_of(path: Path) -> str:
    """Tell "safetensors", "zip", "legacy" (before torch 1.6) or "index" (of shards) by content.

    Raises UserError, which says what it is instead, for everything else.
    """
    with _open(path) as file:
        head = file.read(512)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < 1 << 40:
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(LEGACY):
        return "legacy"
    if head.lstrip().startswith(b"{"):
        return "index"
    if what := stand_in(head):
        raise UserError(f"{path} {what}")
    raise UserError(
        f"{path} is truncated, damaged or no weights: it begins with {shown(head[:24])}; expected "
        "safetensors, or what torch.save has written"
    )


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file, and turn what the libraries raise for it into a UserError that names it."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        with open_regular(path) as file:
            yield file
    except UserError:
        raise
    except Exception as error:  # the libraries raise nearly everything on damaged files
        text = reason(error)
        # a disk, a network or a permission may be back in a minute; EINVAL: zipfile seeks nowhere
        passing = getattr(error, "errno", None) not in (None, errno.EINVAL)
        if passing or isinstance(error, MemoryError) or "allocate memory" in text:
            raise Unreadable(f"{path} could not be read: {text}") from None
        raise UserError(f"{path} is truncated, damaged or no weights: {text}") from None


def read_safetensors(path: Path, check: bool = True) -> tuple[Tensors, dict[str, str]]:
    """Read (tensors, metadata) of a safetensors file.

    check: compare it with the digests that we wrote into it.
    """
    with _open(path) as file:
        header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER:
            raise UserError(f"{path} is not to be trusted: its header has {header:,} bytes")
        with safe_open(name_of(file, path), "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            about = opened.metadata() or {}
    if DIGEST in about and check:
        written = parse_json(about.pop(DIGEST), f"{path}: its {DIGEST}")
        found = _digests(tensors, about)
        changed = [name for name in {"": None} | written if written.get(name) != found.get(name)]
        if changed:
            raise UserError(
                f"{path} is damaged, or was edited: {some(n or 'tensors' for n in changed)} in it "
                "do not have their SHA-256; if another program did that on purpose, let it remove "
                f"{DIGEST} as well"
            )
    return tensors, about


def _digests(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> dict[str, str]:
    """Digest the tensors, under "", and each text beside them."""
    texts = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in about.items()}
    return texts | {"": digest_tensors(tensors)}


def read_metadata(path: Path) -> dict[str, str]:
    """Read the texts that a safetensors file holds beside its tensors; {} of other files."""
    return read_content(path, check=False)[1]


def read_tensors(path: Path) -> Tensors:
    """Read all tensors of a file by name, from within state_dict where there is one.

    What wraps a network in training is not in the names.
    """
    innermost = read_levels(path)[0][-1]
    named = {k: v for k, v in innermost.items() if isinstance(k, str) and isinstance(v, Tensor)}
    for name in [k for k in innermost if str(k).endswith(".alpha") and k not in named]:
        with blame(f"{path}: {shown(name)} is no number, but {shown(innermost[name])}"):
            named[name] = torch.tensor(float(innermost[name]))
    if not named:
        raise UserError(f"{path} holds no weights, but {some(innermost) or 'nothing'}")
    unwrapped = {_unwrapped(name): value for name, value in named.items()}
    if len(unwrapped) < len(named):
        wrapped = some(sorted(named.keys() - unwrapped))
        raise UserError(f"{path} holds tensors twice, as {wrapped} and without what wraps them")
    return unwrapped


def inspect(path: Path) -> tuple[set[str], dict[str, str]]:
    """Read all names in a single file, also those beside state_dict, and its metadata."""
    levels, metadata = read_levels(path, check=False)
    return {_unwrapped(k) for level in levels for k in level if isinstance(k, str)}, metadata


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def read_levels(path: Path, check: bool = True) -> tuple[list[dict], dict[str, str]]:
    """Read (a file's dictionary, what that has under state_dict, and so on; its metadata).

    Where that is the only dictionary, and there is no tensor beside it, it may have any name.
    check: as of `read_safetensors`.
    """
    state, metadata = read_content(path, check)
    if not isinstance(state, dict) or (isinstance(state, Stub) and not state):
        kind = state.name if isinstance(state, Stub) else type(state).__name__
        raise UserError(f"{path} holds a {shown(kind)[1:-1]}; expected weights by name")
    levels = []
    while isinstance(state, dict) and len(levels) < 8:  # a dictionary may hold itself
        levels.append(state)
        inner = [value for value in state.values() if isinstance(value, dict | Tensor)]
        state = state.get("state_dict", inner[0] if len(inner) == 1 else None)
    return levels, metadata


def read_content(
    path: Path, check: bool = True, check_crc: bool = False
) -> tuple[object, dict[str, str]]:
    """Read (what a file of any kind holds, its metadata).

    check: as of `read_safetensors`. check_crc: compare every record of a zip file with the CRC that
    was written with it.
    Raises Unreadable where the disk or the memory is at fault, else UserError.
    """
    kind = kind_of(path)
    if kind == "safetensors":
        return read_safetensors(path, check)
    if kind == "index":
        return _read_shards(path), {}
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if kind == "legacy":
            return read_legacy(path, file, size), {}
        return read_zip(path, file, size, check_crc), {}


def _read_shards(index: Path) -> Tensors:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{index} is no weights, and no index of shards: it has no weight_map")
    names = set(map(str, shards.values()))
    tensors = {}
    for name in sorted(names):
        shard = index.parent / name
        if shard.name != name or kind_of(shard) == "index":
            raise UserError(
                f"{index} is not to be trusted: it names {shown(name)}; expected files beside it"
            )
        tensors |= read_tensors(shard)
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] = {}) -> None:
    """Write a safetensors file atomically, with these texts, and digests, as its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    about = {"format": "pt", **about}
    if "sha256" not in about:  # of our checkpoints
        about[DIGEST] = json.dumps(_digests(plain, about))
    atomic(path, lambda p: save_file(plain, p, metadata=about))
