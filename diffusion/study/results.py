"""A study's folder: which one is continued, what a new one is called."""

import dataclasses
import json
from datetime import datetime
from pathlib import Path

from ..files.checkpoint import write_text
from ..files.output import names
from ..files.sd_files import has_averaged
from .plan import Settings
from .styles import file_stamp, slugs_of, stamp, style_folders


def describe(s: Settings) -> dict:
    """What makes a study the same one, as JSON gives it back."""
    base = Path(s.load_path or s.sd_path)
    mark = stamp(base) if base.is_dir() else file_stamp(base)
    settings = dataclasses.asdict(s)
    # studies of before do not say: they took averaged weights where there were some
    weights = "ema" if s.sd_path is not None and has_averaged(base) else "raw"
    for name, usual in (("sd_weights", weights), ("objective", None)):
        if settings[name] == usual:
            del settings[name]
    told = {
        "settings": settings,
        "base": f"{base.resolve()} {mark}",
        "data": {f.name: stamp(f) for f in style_folders(s.data)},
    }
    return json.loads(json.dumps(told))


def find(root: Path, about: dict) -> Path | None:
    """The newest folder of the same study."""
    for file in sorted(root.glob("*/config.json"), reverse=True):
        try:
            if json.loads(file.read_text(encoding="utf-8")) == about:
                return file.parent
        except (OSError, ValueError):
            continue  # another program's
    return None


def create(root: Path, name: str, about: dict) -> Path:
    stem = f"{datetime.now():%Y-%m-%d_%H%M%S}_{slugs_of([name])[name]}"
    root.mkdir(parents=True, exist_ok=True)
    for folder in names(root / stem):
        try:
            folder.mkdir()  # never one that is there, of a study begun in the same second
            break
        except FileExistsError:
            continue
    write_text(folder / "config.json", json.dumps(about, indent=2))
    return folder


def read_metrics(folder: Path) -> dict:
    file = folder / "metrics.json"
    if not file.is_file():
        return {"finished": False, "cells": {}}
    return json.loads(file.read_text(encoding="utf-8"))
