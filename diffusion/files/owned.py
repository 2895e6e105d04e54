"""Tell what this program has written from what is somebody else's.

A folder is ours if it holds the config.json of a run or of a study, or the small file MARKER,
which whatever writes pictures puts beside it: .images.diffusion beside images/, so that nothing
but pictures is in there. A picture is ours if its `Software` text says so.
Nothing is deleted or replaced without such proof, and a scan for images to train on leaves these
folders and pictures out.
"""

import contextlib
import os
from pathlib import Path

from PIL import Image

from .. import UserError
from .atomic import create
from .text_files import read_json

MARKER = ".diffusion"
SOFTWARE = "diffusion (PyTorch)"  # the `Software` text of every PNG and WebP that is written
SOFTWARE_TAG = 0x0131  # its number in EXIF, where WebP has it
RUN_KEYS = set("mode save_folder data train_steps batch_size seed".split())
STUDY_KEYS = {"settings", "base", "data"}


def mark(folder: Path) -> None:
    """Create a folder for output, and put the proof that it is ours beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError), create(marker_of(folder)) as file:
        file.write(b"Written by the diffusion codebase; not training data.\n")


def is_run(folder: Path) -> bool:
    """Check for the config.json of a training run in a folder."""
    return RUN_KEYS <= _config_keys(folder)


def is_marked(folder: Path) -> bool:
    """Check for the proof that `mark` leaves: a folder of pictures that this program wrote."""
    return marker_of(folder).is_file()


def is_ours(folder: Path) -> bool:
    """Check whether this program wrote a folder: a run's, a study's, or one of pictures."""
    if is_marked(folder):
        return True
    keys = _config_keys(folder)
    return keys >= RUN_KEYS or keys == STUDY_KEYS


def is_our_picture(file: Path) -> bool:
    """Check whether this program wrote a PNG or WebP, by its `Software` text."""
    # from a pipe there may never come anything
    return file.is_file() and picture_text(file, "Software") == SOFTWARE


def picture_text(file: Path, key: str) -> str | None:
    """Read one of a PNG's texts, of a WebP only `Software`; None where there is none."""
    value = None
    with contextlib.suppress(Exception):  # Pillow raises nearly everything on damaged files
        with Image.open(file, formats=("PNG", "WEBP")) as image:
            texts = image.info
            if image.format == "WEBP":
                texts = {"Software": image.getexif().get(SOFTWARE_TAG)}
            value = texts.get(key)
    return value if isinstance(value, str) else None


def marker_of(folder: Path) -> Path:
    """Name the file that says that a folder is ours; it lies beside the folder."""
    folder = Path(os.path.abspath(folder))  # "." has no name
    return folder.parent / f".{folder.name}{MARKER}"


def _config_keys(folder: Path) -> set[str]:
    """Read the keys of a folder's config.json; none where there is no usable one."""
    with contextlib.suppress(UserError):
        return set(read_json(folder / "config.json"))
    return set()
