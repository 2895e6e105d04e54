"""Read and write weight files: safetensors, in one file or in shards, and what torch.save wrote.

Nothing here unpickles code, and nothing is copied: tensors lie in the mapped file until used. Each
reader raises UserError for files that are missing, damaged or no weights.
"""

import contextlib
import errno
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import UserError
from .atomic import atomic, reason
from .text_files import read_json
from .validate import Tensors, check_size

BASES = ("diffusion_pytorch_model", "model", "pytorch_model")


class Unreadable(UserError):
    """Report a file that may be intact, but cannot be read now."""


class Stub:
    """Stand for a class that a checkpoint names; hold the fields of its instances, and no code."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {})


# the classes that the world's checkpoints name
STUBS = [
    (Stub, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (Stub, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
    (Stub, "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint"),
    (Stub, "torch.nn.modules.container.ParameterDict"),  # of textual inversions
]


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


def is_safetensors(path: Path) -> bool:
    """Check a file's suffix, in any letter case."""
    return path.suffix.lower() == ".safetensors"


@contextlib.contextmanager
def _name_faults(path: Path) -> Iterator[None]:
    """Turn what the libraries raise for a file into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is no checkpoint, or holds more than weights, such as code, and is not "
            "opened; give a .safetensors version of it"
        ) from None
    except Exception as error:  # torch raises nearly everything on damaged files
        text = reason(error)
        # a disk, a network or a permission may be back in a minute; EINVAL: zipfile seeks nowhere
        passing = getattr(error, "errno", None) not in (None, errno.EINVAL)
        if passing or isinstance(error, MemoryError) or "allocate memory" in text:
            raise Unreadable(f"{path} could not be read: {text}") from None
        raise UserError(f"{path} is truncated, damaged or no weights: {text}") from None


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Read (tensors, metadata) of a safetensors file."""
    with _name_faults(path):
        check_size(path)
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def read_metadata(path: Path) -> dict[str, str]:
    """Read the texts that a safetensors file holds beside its tensors; {} of other files."""
    return read_safetensors(path)[1] if is_safetensors(path) else {}


def read_tensors(path: Path) -> Tensors:
    """Read all tensors of a file by name, from within state_dict where there is one."""
    if path.name.endswith(".json"):
        return _read_shards(path)
    innermost = _read(path)[0][-1]
    return {k: v for k, v in innermost.items() if isinstance(k, str) and isinstance(v, Tensor)}


def inspect(path: Path) -> tuple[set[str], dict[str, str]]:
    """Read all names in a single file, also those beside state_dict, and its metadata."""
    levels, metadata = _read(path)
    return {key for level in levels for key in level if isinstance(key, str)}, metadata


def _read(path: Path) -> tuple[list[dict], dict[str, str]]:
    """Read (a file's dictionary, what that has under state_dict, and so on; its metadata)."""
    if is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        return [tensors], metadata
    state = read_object(path)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}; expected weights by name")
    levels = []
    while isinstance(state, dict) and len(levels) < 8:  # a dictionary may hold itself
        levels.append(state)
        state = state.get("state_dict")
    return levels, {}


def _read_shards(index: Path) -> Tensors:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{index} is no index of shards: it has no weight_map")
    names = set(map(str, shards.values()))
    if outside := [n for n in names if Path(n).name != n or n.endswith(".json")]:
        raise UserError(
            f"{index} is not to be trusted: it names {min(outside):.100}; expected files of its "
            "folder"
        )
    tensors = {}
    for name in sorted(names):
        tensors |= read_tensors(index.parent / name)
    if missing := shards.keys() - tensors:
        raise UserError(
            f"{index} lists {len(missing)} tensors that its shards do not hold, "
            f"such as {min(missing)}"
        )
    return tensors


def read_object(path: Path, check_crc: bool = False):
    """Read what torch.save was given: tensors in plain containers.

    check_crc: also compare every record with the CRC that was written with it.
    Raises Unreadable where the disk or the memory is at fault, else UserError.
    """
    with _name_faults(path):
        zipped = check_size(path)
        if zipped and check_crc:
            with zipfile.ZipFile(path) as z:
                if damaged := z.testzip():
                    raise UserError(f"{path} is damaged: {damaged} does not have its CRC")
        left = path.stat().st_size

        def limited(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
            # torch calls it before it writes to a storage: nothing but addresses was taken
            nonlocal left
            left -= storage.nbytes()
            if left < 0:
                raise UserError(
                    f"{path} is not to be trusted: its tensors claim more than its bytes"
                )
            return storage

        with torch.serialization.safe_globals(STUBS):
            # files from before torch 1.6 are no zip files and cannot be mapped
            return torch.load(path, map_location=limited, weights_only=True, mmap=zipped)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, with these texts as its metadata."""
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    atomic(path, lambda p: save_file(plain, p, metadata={"format": "pt", **about}))
