"""Find the folder of a study: the one that is resumed, or a new one."""

import contextlib
import json
from datetime import datetime
from pathlib import Path

from ..files.atomic import write_text
from ..files.output import names
from ..files.sd_files import has_averaged
from .plan import Settings
from .styles import file_stamp, slugs_of, stamp, style_folders


def describe(s: Settings) -> dict:
    """Describe a study as config.json does; it is resumed where this is equal."""
    base = Path(s.load_path or s.sd_path)
    mark = stamp(base) if base.is_dir() else file_stamp(base)
    settings = dict(vars(s))
    # older studies do not have these: they took the EMA weights of a file that held them
    weights = "ema" if s.sd_path is not None and has_averaged(base) else "raw"
    for name, old in (("sd_weights", weights), ("objective", None)):
        if settings[name] == old:
            del settings[name]
    found = {
        "settings": settings,
        "base": f"{base.resolve()} {mark}",
        "data": {f.name: stamp(f) for f in style_folders(s.data)},
    }
    return json.loads(json.dumps(found))  # lists for tuples


def find(root: Path, description: dict) -> Path | None:
    """Find the newest folder of a study."""
    for file in sorted(root.glob("*/config.json"), reverse=True):
        try:
            if json.loads(file.read_text(encoding="utf-8")) == description:
                return file.parent
        except (OSError, ValueError):
            continue  # another program's
    return None


def create(root: Path, name: str, description: dict) -> Path:
    """Create <timestamp>_<name>/ with its config.json, under a name that is not taken."""
    root.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.now():%Y-%m-%d_%H%M%S}_{slugs_of([name])[name]}"
    for folder in names(root / stem):
        with contextlib.suppress(FileExistsError):
            folder.mkdir()  # another study may have begun in the same second
            break
    write_text(folder / "config.json", json.dumps(description, indent=2))
    return folder


def read_metrics(folder: Path) -> dict:
    file = folder / "metrics.json"
    if not file.is_file():
        return {"finished": False, "cells": {}}
    return json.loads(file.read_text(encoding="utf-8"))
