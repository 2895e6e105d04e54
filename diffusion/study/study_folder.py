"""Find the folder of a study: the one that is resumed, or a new one.

What is written there may be shown to others: files and folders are named without the way to them.
"""

import contextlib
import json
import re
from datetime import datetime
from pathlib import Path

from .. import UserError, shown
from ..data.image_set import digest
from ..files.atomic import is_number
from ..files.hub_files import local
from ..files.output import names
from ..files.sd_files import has_averaged, write_json
from ..files.text_files import read_json, read_optional
from ..runtime.distributed import log
from .plan import Settings
from .report import definitions, texts_of
from .styles import slugs_of, stamp, style_folders

PATHS = set("data load_path sd_path sd_config vae features clip guide".split())
WAY = re.compile(rf'("({"|".join(PATHS)}|base)": )"[^"]*/')


def describe(s: Settings) -> dict:
    """Describe a study as config.json does; it is resumed where this is equal."""
    base = local(s.load_path or s.sd_path, sd=s.load_path is None)
    settings = dict(vars(s))
    del settings["keep_images"]
    # older studies do not have these: they took the EMA weights of a file that held them
    weights = "ema" if s.load_path is None and has_averaged(base) else "raw"
    new = dict.fromkeys(("objective", "vae", "guidance_interval", "guide"))
    for name, old in (new | {"sd_weights": weights}).items():
        if settings[name] == old:
            del settings[name]
    for name in PATHS & settings.keys():
        if settings[name] is not None:
            path = local(settings[name], sd=name == "sd_path").resolve()
            stamped = name != "data" and path != base.resolve()
            settings[name] = f"{path.name} {stamp(path)}" if stamped else path.name
    found = {
        "settings": settings,
        "base": f"{base.resolve().name} {stamp(base)}",
        "data": {f.name: stamp(f) for f in style_folders(s.data)},
    }
    return json.loads(json.dumps(found))  # lists for tuples


def find(root: Path, description: dict) -> Path | None:
    """Find the newest folder of a study. Of paths the names count: older studies wrote them all."""
    text_of = lambda found: WAY.sub(r'\1"', json.dumps(found, sort_keys=True))
    for file in sorted(root.glob("*/config.json"), reverse=True):
        with contextlib.suppress(UserError):  # another program's
            if text_of(read_json(file)) == text_of(description):
                return file.parent
    return None


def create(root: Path, name: str, description: dict) -> Path:
    """Create <timestamp>_<name>/ with its config.json, under a name that is not taken."""
    stem = f"{datetime.now():%Y-%m-%d_%H%M%S}_{slugs_of([name])[name]}"
    for folder in names(root / stem):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)  # another study may have begun in the same second
            break
    write_json(folder / "config.json", description)
    return folder


def check_links(folder: Path) -> None:
    """Raise UserError for a link in a study's folder: it would write and delete elsewhere."""
    if link := next((path for path in folder.rglob("*") if path.is_symlink()), None):
        raise UserError(
            f"{shown(str(link), 200)} is a link, and a study writes and deletes there: put what it "
            "leads to in its place, or give --new"
        )


def read_metrics(folder: Path) -> dict:
    """Read what is done of a study. Entries that it cannot have written are named and left out."""
    file = folder / "metrics.json"
    found = read_optional(file)
    cells = found.get("cells")
    cells = cells if isinstance(cells, dict) else {}
    usable = {name: entry for name, entry in cells.items() if is_usable(entry)}
    if len(usable) < len(cells):
        log(f"warning: {file}: {len(cells) - len(usable)} entries are damaged; they are done again")
    finished = found.get("finished") is True and len(usable) == len(cells)
    return {"finished": finished, "cells": usable}


def seal(entry: dict) -> str:
    """Digest a cell's entry, which holds it as its sha256; those of older studies hold none."""
    return digest(json.dumps(entry | {"sha256": ""}, sort_keys=True))


def is_usable(entry) -> bool:
    """Check that a study can go on from a cell's entry, and that its report can show it."""
    try:
        if entry.get("sha256", own := seal(entry)) != own:
            return False
        measures = entry.get("measures", {})
        texts_of(entry | {"measures": measures})
        definitions([entry])
        if "measures" in entry:
            "".join(entry["prompts"])
        return all(is_number(m[key]) for m in measures.values() for key in ("value", "num_images"))
    except Exception:  # anything may stand there
        return False
