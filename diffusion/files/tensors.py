"""Reading other programs' weight files: safetensors, whole or sharded, and pickled checkpoints.

Nothing here unpickles code, and nothing is copied: tensors lie in the mapped file until used.
"""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import UserError
from .validate import check_size, read_json

BASES = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


class _Stub:
    """Stands for classes that checkpoints name beside their weights; holds nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class _Fields(_Stub):
    """Stands for classes of which the plain fields are wanted."""

    def __setstate__(self, state):
        self.__dict__.update(state)


# the globals that original checkpoints need, each an inert stub
STUBS = {
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": _Stub,
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping": _Stub,
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint": _Stub,
    "torch.nn.modules.container.ParameterDict": _Fields,  # of textual inversions
}


def find_weights(folder: Path) -> Path:
    """The weight file (or the shards' index) of a component's folder; full precision first.

    Raises UserError if there is none.
    """
    for variant in ("", ".fp16", ".bf16"):
        for base in BASES:
            for ending in ENDINGS:
                # diffusers writes name.fp16.safetensors, and name.safetensors.index.fp16.json
                stem = ending.removesuffix(".json")
                names = (f"{base}{variant}{ending}", f"{base}{stem}{variant}.json")
                for name in names if ending.endswith(".json") else names[:1]:
                    if (folder / name).is_file():
                        return folder / name
    raise UserError(
        f"{folder} holds no weights; expected {BASES[0]}.safetensors, "
        "model.safetensors or a .bin of these names"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, nested dictionaries unpacked. Raises UserError otherwise."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.name.endswith(".json"):
        return _read_shards(path)
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    return _read_pickle(path)


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file holds beside its tensors; none of other files."""
    if path.suffix.lower() != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_names(path: Path) -> set[str]:
    """The names in a single file, whatever they stand for, without its numbers.

    Raises UserError as `read_tensors` does.
    """
    if path.suffix.lower() != ".safetensors":
        return _names(read_object(path))
    check_size(path)
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _broken(path, error) from None


def _names(state, depth: int = 8) -> set[str]:
    """The keys of a dictionary and of the dictionaries called state_dict in it."""
    if not isinstance(state, dict) or not depth:  # a dictionary may hold itself
        return set()
    own = {key for key in state if isinstance(key, str)}
    return own | _names(state.get("state_dict"), depth - 1)


def _broken(path: Path, error: Exception) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return UserError(f"{path} is truncated or no safetensors file: {reason}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    check_size(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise _broken(path, error) from None


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        shards = read_json(index)["weight_map"]
        names = sorted(set(shards.values()))
        inside = all(Path(name).name == name and not name.endswith(".json") for name in names)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is no index of shards: it has no weight_map") from None
    if not inside:
        raise UserError(f"{index} names files outside its folder; it is not to be trusted")
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= read_tensors(index.parent / name)
    if missing := set(shards) - set(tensors):
        raise UserError(
            f"{index} promises {len(missing)} tensors that its shards do not hold, "
            f"such as {min(missing)}"
        )
    return tensors


def _read_pickle(path: Path) -> dict[str, Tensor]:
    state = read_object(path)
    for _ in range(8):  # a dictionary may hold itself
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not weights by name")
    return {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}


def read_object(path: Path):
    """What torch.save was given: tensors in plain containers. Raises UserError otherwise."""
    stubs = [(stub, name) for name, stub in STUBS.items()]
    try:
        check_size(path)
        with torch.serialization.safe_globals(stubs):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                # written before torch 1.6: no zip file, so not to be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"{path} holds more than weights, and is not opened: {reason}; use a "
            ".safetensors version of it"
        ) from None
    except Exception as error:  # torch raises nearly everything on damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path} is truncated or no checkpoint: {reason}") from None
