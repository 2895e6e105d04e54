"""Read folders of styles: images, captions and prompts, split into training and held-out images.

A style's name is its trigger word: a caption or prompt without it gets it in front. Held-out images
are never trained on, neither by the adapters nor by the classifier; distances are measured to them.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import UserError, shown
from ..data.captions import read_captions
from ..data.folder import is_inside, scan_split, walk, why_not
from ..data.image_set import digest, file_stamp
from ..evaluation.image_batches import folder_batches
from ..files.atomic import append_text
from ..files.text_files import read_prompt_lines

HELD_OUT_FRACTION = 0.2
MAX_HELD_OUT = 500
MIN_IMAGES = 4
PROMPTS = Path("prompts") / "validation_prompt.txt"


@dataclass(frozen=True, eq=False)
class Split:
    """Some images of a style: their files, captions with the style's name, and pixels.

    pixels: (N, S, S, 3) uint8.
    """

    files: list[Path]
    captions: list[str]
    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True, eq=False)
class Style:
    """slug: the name as part of a file name. prompts: each with the name in it."""

    name: str
    slug: str
    prompts: list[str]
    train: Split
    held_out: Split


def style_folders(root: str) -> list[Path]:
    """List the folders with images, one for each style. Raises UserError if there is none."""
    folders = [f for f in sorted(Path(root).glob("[!.]*")) if f.is_dir() and not why_not(f)]
    found = [f for f in folders if walk(f).images]
    if not found:
        raise UserError(f"--data {root} holds no styles: give a folder with one folder per style")
    if odd := [f.name for f in found if not f.name.isprintable()]:
        raise UserError(f"--data {root}: {shown(odd[0])} is no word of a prompt: rename it")
    return found


def slugs_of(names: list[str]) -> dict[str, str]:
    """Make names parts of file names, each different: {name: slug}."""
    slugs = {}
    for name in names:
        slug = re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-") or "style"
        while slug.lower() in (s.lower() for s in slugs.values()):
            slug += "-2"
        slugs[name] = slug
    return slugs


def find_name(name: str) -> re.Pattern:
    """Match the name as whole words, in any case."""
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)


def with_name(text: str, name: str) -> str:
    """Put the style's name in front of a text that lacks it."""
    if find_name(name).search(text):
        return text
    return f"{name}, {text}" if text else name


def replace_name(text: str, name: str, new: str) -> str:
    """Replace the style's name in a text; an empty one takes its commas with it."""
    text = find_name(name).sub(lambda _: new, text)
    return text if new else " ".join(text.split()).strip(" ,")


def stamp(folder: Path) -> str:
    """Say what changes whenever a file, or one in a folder, may have."""
    if not folder.is_dir():
        return file_stamp(folder)
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    return digest(*(f"{f.relative_to(folder)} {file_stamp(f)}" for f in files))


def read_style(folder: Path, slug: str, size: int) -> Style:
    """Read a style. Raises UserError for fewer than MIN_IMAGES usable images."""
    name = folder.name
    try:
        files = scan_split(folder)
    except UserError as error:
        raise UserError(f"style {name!r}, whose train split is read: {error}") from None
    pixels = {}
    for numbers, _, images in folder_batches(folder, files, size):
        pixels |= zip([files[i] for i in numbers], images)
    if len(pixels) < MIN_IMAGES:
        raise UserError(
            f"{folder} has {len(pixels)} usable images; a style needs at least {MIN_IMAGES}, "
            "of which a fifth is held out to measure against"
        )
    texts = read_captions(walk(folder), files) or [("",)] * len(files)
    captions = {file: with_name(own[0], name) for file, own in zip(files, texts)}

    def split(chosen):
        part = [file for file in pixels if file in chosen]
        return Split(part, [captions[f] for f in part], np.stack([pixels[f] for f in part]))

    order = sorted(pixels, key=lambda file: digest(file.relative_to(folder).as_posix()))
    count = min(MAX_HELD_OUT, max(2, round(HELD_OUT_FRACTION * len(pixels))))
    train, held_out = split(set(order[count:])), split(set(order[:count]))
    # sample.py reads a prompt a line
    prompts = list(dict.fromkeys(" ".join(text.split()) for text in held_out.captions))
    if (file := folder / PROMPTS).exists():
        if not is_inside(file, folder):
            raise UserError(
                f"{file} is a link out of {folder}, and the report shows its text: copy it there"
            )
        prompts = [with_name(" ".join(line.split()), name) for line in read_prompt_lines(file)]
    return Style(name, slug, prompts, train, held_out)


def training_folder(style: Style, folder: Path, word: str | None) -> Path:
    """Make a folder of a style's training images with their captions, from scratch.

    word: replaces the style's name in the captions; {} is where train.py puts a new token.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for n, (file, caption) in enumerate(zip(style.train.files, style.train.captions)):
        target = folder / f"{n:05d}{file.suffix.lower()}"
        shutil.copy2(file, target)  # with its time: what is cached of it stays valid
        text = replace_name(caption, style.name, word) if word else caption
        append_text(target.with_suffix(".txt"), text)
    return folder
