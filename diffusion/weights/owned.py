"""Tell what this program has written from what is somebody else's.

A folder is ours if it holds the config.json of a run or of a study, or the small file MARKER,
which whatever writes pictures puts beside them. A picture is ours if its `Software` text says so.
Nothing is deleted or replaced without such proof, and a scan for images to train on leaves these
folders and pictures out.
"""

import json
from pathlib import Path

from PIL import Image

MARKER = ".diffusion"
SOFTWARE = "diffusion (PyTorch)"  # the `Software` text of every PNG that is written
RUN_KEYS = {"mode", "save_folder", "data", "train_steps", "batch_size", "seed"}
STUDY_KEYS = {"settings", "base", "data"}
MAX_CONFIG = 1 << 20  # bytes; a run's has 3 kB


def mark(folder: Path) -> None:
    """Create a folder for output, and put the proof that it is ours into it."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / MARKER
    if not marker.exists():
        marker.write_text("Written by the diffusion codebase; not training data.\n")


def is_run(folder: Path) -> bool:
    """Whether the folder holds the config.json of a training run."""
    return RUN_KEYS <= _config_keys(folder)


def is_ours(folder: Path) -> bool:
    """Whether the folder is one that this program wrote: a run's, a study's, or of pictures."""
    if (folder / MARKER).is_file():
        return True
    keys = _config_keys(folder)
    return keys >= RUN_KEYS or keys == STUDY_KEYS


def is_our_picture(file: Path) -> bool:
    """Whether a PNG was written by this program, by its `Software` text."""
    return picture_text(file, "Software") == SOFTWARE


def picture_text(file: Path, key: str) -> str | None:
    """Read one of a PNG's texts; None where there is none, or no PNG."""
    try:
        with Image.open(file, formats=("PNG",)) as image:
            value = image.info.get(key)
    except Exception:  # Pillow raises nearly everything on damaged files
        return None
    return value if isinstance(value, str) else None


def _config_keys(folder: Path) -> set[str]:
    """The keys of a folder's config.json; none where there is no usable one."""
    file = folder / "config.json"
    try:
        if not file.is_file() or file.stat().st_size > MAX_CONFIG:
            return set()
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    return set(found) if isinstance(found, dict) else set()
