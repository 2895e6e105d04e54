"""Our own checkpoints: complete, atomic, and safe to open.

    checkpoints/step_00000500.pt   everything needed to resume; the last few are kept
    model.pt                       the newest of them (a hard link where possible)
    ema.safetensors                EMA weights only, configuration in the metadata
    best.safetensors               the same, from the step of the lowest held-out loss

Nothing here unpickles code (files/torch_files.py). A flipped bit is found: in a .pt file by the CRC
that its zip format has for every record, in a .safetensors file by the digest of the tensors in its
metadata.
"""

import contextlib
import dataclasses
import filecmp
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import UserError, shown
from ..config import Config
from .atomic import atomic
from .hub_files import local
from .tensors import (
    Unreadable,
    kind_of,
    read_content,
    read_levels,
    read_safetensors,
    write_tensors,
)
from .text_files import parse_json, read_optional
from .validate import Tensors, check_tensors, digest_tensors

FORMAT = "diffusion-checkpoint-1"
NETWORKS = ("vae", "sd_path", "sd_config")  # paths of what a model needs beside its own file
MODEL = "model.pt ema.safetensors config.json unet vae".split()  # what a folder of it holds
KINDS = {"step": int, "config": dict, "classes": list, "model": dict, "ema": dict}
RESUMED = {  # what only resuming reads
    "best_loss": float | None,
    "data": dict,
    "optimizer": dict,
    "ranks": int,
    "scaler": dict,
    "tally": Tensor,
}


def save(folder: Path, state: dict, keep_last: int) -> Path:
    """Write a checkpoint of `state["step"]`, make model.pt point to it, delete the oldest.

    Raises OSError if the disk is full; what was there before is then still there.
    """
    path = step_file(folder, state["step"])
    path.parent.mkdir(exist_ok=True)
    atomic(path, lambda p: torch.save({"format": FORMAT, **state}, p))
    atomic(folder / "model.pt", lambda p: _link(path, p))
    files = step_files(folder)
    newest = files.index(path)  # what lies beyond it could not be read when the run was resumed
    for old in files[:newest]:
        old.replace(old.with_suffix(".damaged"))
    for old in files[newest + keep_last :]:
        old.unlink(missing_ok=True)
    return path


def complete(folder: Path, step: int, keep_last: int) -> None:
    """Do what `save` does after it has written the checkpoint of this step, unless that is done."""
    path = step_file(folder, step)
    model = folder / "model.pt"
    if not path.is_file():
        return
    # of hard links the times are the same: nothing is read
    if not (model.is_file() and filecmp.cmp(path, model)):
        with contextlib.suppress(UserError):
            if read(model)["step"] >= step:  # a copy, and the step's own file may be damaged
                return
        atomic(model, lambda p: _link(path, p))
    files = step_files(folder)
    for old in files[files.index(path) + keep_last :]:
        old.unlink(missing_ok=True)


def step_file(folder: Path, step: int) -> Path:
    """Name the checkpoint of a step."""
    return folder / "checkpoints" / f"step_{step:08d}.pt"


def step_files(folder: Path, names: str = "checkpoints/step_*.pt") -> list[Path]:
    """List a run's checkpoints, or other files of steps, newest first."""
    files = folder.glob(names)
    steps = {int(file.stem[5:]): file for file in files if re.fullmatch(r"step_\d{8,}", file.stem)}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def check_format(path: Path, about: dict) -> None:
    """Refuse a file of other programs, or of another version."""
    if about.get("format") != FORMAT:
        raise UserError(
            f"{path} is no model of this version of train.py: its format is "
            f"{shown(about.get('format'))}, expected {FORMAT!r}; a Stable Diffusion model is given "
            "with --sd_path, an adapter with --lora or --embedding beside its model"
        )


def read(path: Path) -> dict:
    """Read a checkpoint on the CPU; its tensors lie in the mapped file until used.

    Raises Unreadable where the disk is at fault, else UserError for a file that is no checkpoint
    of ours or is damaged.
    """
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give another model.pt or ema.safetensors. python train.py "
            "makes results/model.pt; sample.py without --load_path has a model of its own"
        )
    state, _ = read_content(path, check_crc=True)
    check_format(path, state if isinstance(state, dict) else {})
    check_parts(path, state, KINDS)
    return state


def check_parts(path: Path, state: dict, kinds: dict) -> None:
    """Refuse a checkpoint in which a part is missing or of another kind."""
    odd = [name for name, kind in kinds.items() if not isinstance(state.get(name, ...), kind)]
    threads = state.get("threads")  # none in older ones
    if threads is not None and (type(threads) is not int or threads < 1):
        odd.append("threads")
    if odd:
        raise UserError(f"{path} is damaged: it has no usable {', '.join(odd)}")


def is_own(path: Path) -> bool:
    """Check whether a file is a run's: model.pt, ema.safetensors and the like."""
    levels, about = read_levels(path, check=False)
    return str((about or levels[0]).get("format")).startswith("diffusion-checkpoint")


def newest(folder: Path, warn: Callable[[str], None]) -> dict | None:
    """Read the newest checkpoint of a run that is intact; None if the run has none.

    Raises UserError if there are some and none can be read, and Unreadable if one may be read
    later: a run that resumed from an older one would write over it.
    """
    files = step_files(folder)
    if (folder / "model.pt").is_file():
        files.append(folder / "model.pt")
    for file in files:
        try:
            state = read(file)
            check_parts(file, state, RESUMED)
            for part in ("model", "ema"):
                check_tensors(state[part], f"{file}, {part}")
        except Unreadable:
            raise
        except UserError as error:
            warn(f"warning: {error}")
            continue
        if file != files[0]:
            warn(f"using {file}, the newest that is intact")
        return state
    if files:
        raise UserError(
            f"none of the {len(files)} checkpoints in {folder} can be read; start from scratch "
            "with --overwrite or another --save_folder"
        )
    return None


def save_weights(path: Path, weights: Tensors, config: Config, **metadata) -> None:
    """Write a safetensors file whose metadata holds everything needed to use the weights."""
    text = {"format": FORMAT, "config": config.to_json(), "metadata": json.dumps(metadata)}
    text["sha256"] = _digest(digest_tensors(weights), text)
    write_tensors(path, weights, text)


def _digest(tensors: str, text: dict[str, str]) -> str:
    """Compute the digest of the tensors' digest and of the texts beside them."""
    joined = "\n".join([tensors, text["config"], text["metadata"]])
    return hashlib.sha256(joined.encode()).hexdigest()


def load_weights(path: Path, which: str = "ema") -> tuple[Tensors, Config, dict]:
    """Read (weights, configuration, metadata) of a model.pt or a .safetensors file, each once.

    which: "ema" or "raw"; a .safetensors file holds EMA weights only. metadata: step and classes.
    Raises UserError for foreign, damaged or unsuitable files.
    """
    path = local(path)
    if path.is_dir():
        raise UserError(
            f"{path} is a folder without a model.pt; a Stable Diffusion model is given with "
            "--sd_path"
        )
    if not path.is_file() or kind_of(path) != "safetensors":
        state = read(path)
        weights = state["ema" if which == "ema" else "model"]
        config = state["config"]
        metadata = {k: state[k] for k in ("step", "classes", "networks", "frozen") if k in state}
    elif which != "ema":
        raise UserError(f"{path} holds EMA weights only; --weights raw needs a model.pt")
    else:
        weights, config, metadata = _read_shared(path)
    check_tensors(weights, path)
    metadata = {"networks": {}, "frozen": {}} | metadata
    check_parts(path, metadata, {"classes": list, "networks": dict, "frozen": dict})
    if not all(isinstance(name, str) for name in metadata["classes"]):
        raise UserError(f"{path} is damaged: it has no usable classes")
    try:
        config = Config.from_dict(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if config.adapter != "none":
        raise UserError(
            f"{path} is a run of --adapter {config.adapter}, not a model: give the model "
            "that it was trained from, and its adapter.safetensors"
        )
    return weights, locate(config, path), metadata


def locate(config: Config, file: Path) -> Config:
    """Find the networks and the data that the configuration in a model's file names.

    Networks are looked for where the run's own config.json says, beside the file and in the three
    folders around it, and from the working directory; one found nowhere is named by where it was.
    """
    folder = file.resolve().parent
    private = {}
    with contextlib.suppress(UserError):
        private = read_optional(folder / "config.json")
    found = {}
    for name in NETWORKS:
        if path := getattr(config, name):
            own = str(private.get(name))
            own = own if Path(own).name == Path(path).name else path
            places = [own] if os.path.isabs(own) else []
            around = [f for f in (folder, *folder.parents[:3]) if f != f.parent]
            places += [*(str(f / path) for f in around), path]
            there = [p for p in places if _is_model(Path(p)) and Path(p).resolve() != folder]
            found[name] = [*there, own][0]
    data = str(private.get("data"))
    if os.path.isabs(data) and Path(data).name == config.data:
        found["data"] = data
    return dataclasses.replace(config, **found)


def _is_model(path: Path) -> bool:
    return path.is_file() or any((path / name).exists() for name in MODEL)


def _read_shared(path: Path) -> tuple[Tensors, dict, dict]:
    weights, about = read_safetensors(path)
    check_format(path, about)
    texts = {k: about.get(k, "") for k in ("config", "metadata")}
    if "sha256" in about or about.keys() - {"format", *texts}:
        own = digest_tensors(weights)  # all that files of earlier versions have
        if about.get("sha256") not in (own, _digest(own, texts)):
            raise UserError(f"{path} is damaged: SHA-256 mismatch")
    return weights, *(parse_json(text, f"{path}, {k}") for k, text in texts.items())
