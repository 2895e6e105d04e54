"""Our own checkpoints: complete, atomic, and safe to open.

    checkpoints/step_00000500.pt   everything needed to resume; the last few are kept
    model.pt                       the newest of them (a hard link where possible)
    ema.safetensors                averaged weights only, configuration in the metadata
    best.safetensors               the same, from the step of the lowest held-out loss

Nothing here unpickles code: .pt files are opened with weights_only=True. Each file carries a digest
of its bytes, or of its tensors' bytes, which is compared when it is read.
"""

import contextlib
import errno
import filecmp
import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import UserError
from ..config import Config
from .validate import (
    check_seal,
    check_size,
    check_tensors,
    digest_tensors,
    parse_json,
    seal,
)

FORMAT = "diffusion-checkpoint-1"
# a disk, a network or a permission that may be back in a minute: no damage
PASSING = (
    errno.EIO,
    errno.ENOMEM,
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENODEV,
)
KINDS = {"step": int, "config": dict, "classes": list, "model": dict, "ema": dict}


class Unreadable(UserError):
    """A file that may be whole, but cannot be read now."""


def passing(error: Exception) -> bool:
    return (
        getattr(error, "errno", None) in PASSING
        or isinstance(error, MemoryError)
        or "allocate memory" in str(error)
    )


def atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that `path` is at every moment the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors keeps its files from other users
        os.replace(temporary, path)
    except BaseException as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        with contextlib.suppress(OSError):
            if shutil.disk_usage(path.parent).free < 1 << 20:  # torch does not tell
                reason = f"no space left on the device ({reason})"
            temporary.unlink()
        if isinstance(error, RuntimeError | SafetensorError):
            raise OSError(f"{path} could not be written: {reason}") from None
        raise
    with contextlib.suppress(OSError):  # the rename itself; not every system syncs folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a metrics.jsonl; a kill may have torn the last one."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        found = map(_line, iter(lambda: file.readline(1 << 20), ""))
        return [line for line in found if line is not None]


def _line(text: str) -> dict | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def save(folder: Path, state: dict, keep_last: int) -> Path:
    """Write a checkpoint of `state["step"]`, make model.pt point to it, delete the oldest.

    Raises OSError if the disk is full; what was there before is then still there.
    """
    path = folder / "checkpoints" / f"step_{state['step']:08d}.pt"
    path.parent.mkdir(exist_ok=True)
    atomic(path, lambda p: (torch.save({"format": FORMAT, **state}, p), seal(p)))
    atomic(folder / "model.pt", lambda p: _link(path, p))
    files = step_files(folder)
    newest = files.index(path)  # what lies beyond it could not be read when the run was continued
    for old in files[:newest]:
        old.replace(old.with_suffix(".damaged"))
    for old in files[newest + keep_last :]:
        old.unlink(missing_ok=True)
    return path


def point_model_to(folder: Path, step: int) -> None:
    """Make model.pt the checkpoint of this step: a kill may have come between the two."""
    path = folder / "checkpoints" / f"step_{step:08d}.pt"
    model = folder / "model.pt"
    if not path.is_file() or (model.is_file() and os.path.samefile(path, model)):
        return
    if not (model.is_file() and filecmp.cmp(path, model, shallow=False)):
        atomic(model, lambda p: _link(path, p))


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def save_weights(path: Path, weights: dict[str, torch.Tensor], config: Config, **metadata) -> None:
    """A safetensors file whose metadata tells everything needed to use the weights."""
    weights = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    text = {"format": FORMAT, "config": config.to_json(), "metadata": json.dumps(metadata)}
    text["sha256"] = _digest(weights, text)
    atomic(path, lambda p: save_file(weights, p, metadata=text))


def _digest(weights: dict[str, torch.Tensor], text: dict[str, str]) -> str:
    """Of the tensors and of what is told with them."""
    whole = "\n".join([digest_tensors(weights), text["config"], text["metadata"]])
    return hashlib.sha256(whole.encode()).hexdigest()


def step_files(folder: Path) -> list[Path]:
    """A run's checkpoints, newest first."""
    found = (folder / "checkpoints").glob("step_*.pt")
    numbered = [path for path in found if re.fullmatch(r"step_\d{8,}\.pt", path.name)]
    return sorted(numbered, key=lambda path: int(path.stem.removeprefix("step_")), reverse=True)


def read(path: Path, mmap: bool = False) -> dict:
    """A checkpoint's state on the CPU. Raises UserError for any file that is none, or damaged.

    mmap: read from disk only what is used, for as long as it is used.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file in it, such as {path / 'model.pt'}")
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; train first (python train.py), or give the path "
            "of a model.pt or ema.safetensors"
        )
    try:
        with open(path, "rb") as file:
            cut = file.read(2) == b"PK" and not zipfile.is_zipfile(path)
        if cut:
            raise ValueError("the end of the file is missing")
        check_size(path)
        check_seal(path)
        mmap = mmap and zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is not a checkpoint of this program: it is no such file at all, or a pickle "
            "that would run code, which is never loaded"
        ) from None
    except Exception as error:  # torch raises nearly everything on damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        if passing(error):
            raise Unreadable(f"{path} could not be read: {reason}") from None
        raise UserError(
            f"{path} is damaged or incomplete ({reason}); use an older one from checkpoints/"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UserError(
            f"{path} was not written by this version of train.py: its format is "
            f"{found!r:.60}, expected {FORMAT!r}"
        )
    if odd := [k for k, kind in KINDS.items() if not isinstance(state.get(k), kind)]:
        raise UserError(f"{path} is damaged: it has no usable {', '.join(odd)}")
    for part in ("model", "ema"):
        if not all(isinstance(v, torch.Tensor) for v in state[part].values()):
            raise UserError(f"{path} is damaged: its {part} holds other things than tensors")
    return state


def newest(folder: Path, warn: Callable[[str], None]) -> dict | None:
    """The newest checkpoint of a run that can be read; None if the run has none.

    Raises UserError if there are some and none can be read, or one may be read later.
    """
    files = step_files(folder)
    if (folder / "model.pt").is_file():
        files.append(folder / "model.pt")
    for file in files:
        try:
            state = read(file, mmap=True)
            for part in ("model", "ema"):
                check_tensors(state[part], f"{file}, {part}")
        except Unreadable:
            raise  # else the run would go on from an older one, over this one
        except UserError as error:
            warn(f"warning: {error}")
            continue
        if file != files[0]:
            warn(f"using {file}, the newest that is whole")
        return state
    if files:
        raise UserError(
            f"none of the {len(files)} checkpoints in {folder} can be read; start anew "
            "with --overwrite or another --save_folder"
        )
    return None


def load_weights(path: Path, which: str = "ema") -> tuple[dict[str, torch.Tensor], Config, dict]:
    """(weights, configuration, metadata) of a model.pt or a .safetensors file.

    which: "ema" or "raw"; a .safetensors file holds averaged weights only.
    metadata: step and classes. Raises UserError for foreign, damaged or unsuitable files.
    """
    if path.suffix.lower() != ".safetensors":
        state = read(path, mmap=True)
        weights = state["ema" if which == "ema" else "model"]
        config = state["config"]
        metadata = {k: state[k] for k in ("step", "classes", "networks", "frozen") if k in state}
    elif which != "ema":
        raise UserError(f"{path} holds averaged weights only; --weights raw needs a model.pt")
    else:
        weights, config, metadata = _read_shared(path)
    check_tensors(weights, str(path))
    if not isinstance(metadata.get("classes"), list):
        raise UserError(f"{path} is damaged: it has no usable classes")
    config = Config.from_dict(config)
    if config.adapter != "none":
        raise UserError(
            f"{path} is a run of --adapter {config.adapter}, no model: give the model "
            "it began with, and its adapter.safetensors"
        )
    return weights, config, metadata


def _read_shared(path: Path) -> tuple[dict[str, torch.Tensor], dict, dict]:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    check_size(path)
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            weights = {k: file.get_tensor(k) for k in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path} is damaged or no safetensors file: {reason}") from None
    if told.get("format") != FORMAT:
        raise UserError(
            f"{path} was not written by this version of train.py: its metadata has no "
            f"format {FORMAT!r}"
        )
    texts = {k: told.get(k, "") for k in ("config", "metadata")}
    # of the tensors alone in files of earlier versions
    known = (_digest(weights, texts), digest_tensors(weights))
    if told.get("sha256", known[0]) not in known or told.keys() - {"format", "sha256", *texts}:
        raise UserError(f"{path} is damaged: it has not the digest that was written with it")
    return weights, *(parse_json(text, f"{path}, {k}") for k, text in texts.items())
