"""Folders of styles: images, captions, prompts; split into what is trained on and what is kept.

A style's name is the word for it: a caption or prompt without it gets it in front. Held-out images
are never trained on, neither by the adapters nor by the classifier; distances are taken to them.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import UserError
from ..data.captions import read_captions
from ..data.folder import report, scan, scan_split, walk, why_not
from ..data.image_set import digest, file_stamp
from ..data.images import BadImage, read_image
from ..files.checkpoint import write_text
from ..files.validate import read_prompt_lines

HELD_OUT = 0.2
HELD_OUT_MOST = 500
LEAST = 4
PROMPTS = Path("prompts") / "validation_prompt.txt"


@dataclass(eq=False)
class Style:
    """slug: the name as part of a file name. captions: a text for each file, with the name in it.

    train, held_out: indices of usable images. pixels: (N, S, S, 3) uint8, of all files; those of
    unusable ones are black.
    """

    name: str
    slug: str
    files: list[Path]
    captions: list[str]
    prompts: list[str]
    train: np.ndarray
    held_out: np.ndarray
    pixels: np.ndarray

    def images(self, which: str) -> np.ndarray:
        """(n, S, S, 3) uint8 of "train" or "held_out"."""
        return self.pixels[getattr(self, which)]


def style_folders(root: str) -> list[Path]:
    """Folders with images, one for each style. Raises UserError if there is none."""
    base = Path(root)
    if not base.is_dir():
        raise UserError(f"--data {root} is no folder; give one with a folder of images per style")
    folders = [f for f in sorted(base.iterdir()) if f.is_dir() and not f.name.startswith(".")]
    found = [f for f in folders if not why_not(f) and walk(f).images]
    if not found:
        why = "its images belong into one folder per style" if scan(base) else "it has no images"
        raise UserError(f"--data {root} holds no styles: {why}")
    return found


def slugs_of(names: list[str]) -> dict[str, str]:
    """{name: part of a file name}, each different."""
    slugs: dict[str, str] = {}
    for name in names:
        slug = re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-") or "style"
        while slug.lower() in (s.lower() for s in slugs.values()):
            slug += "-2"
        slugs[name] = slug
    return slugs


def word(name: str) -> re.Pattern:
    """The name as whole words, in capitals or not."""
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)


def with_name(text: str, name: str) -> str:
    """The text with the style's name in it, in front where it is missing."""
    if word(name).search(text):
        return text
    return f"{name}, {text}" if text else name


def replaced(text: str, name: str, by: str) -> str:
    """The text with `by` for the style's name; nothing remains of its commas for an empty one."""
    text = word(name).sub(lambda _: by, text)
    return text if by else " ".join(text.split()).strip(" ,")


def stamp(folder: Path) -> str:
    """Changes whenever a style's images, captions or prompts may have."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    return digest(*(f"{f.relative_to(folder)} {file_stamp(f)}" for f in files))


def read_style(folder: Path, slug: str, size: int) -> Style:
    """Raises UserError for fewer than LEAST usable images."""
    name = folder.name
    try:
        files = scan_split(folder)
    except UserError as error:
        raise UserError(
            f"style {name!r}: {error} (train.py's options; a style is read by its "
            "train split: rename its folder)"
        ) from None
    pixels = np.zeros((len(files), size, size, 3), np.uint8)
    bad = []
    for i, file in enumerate(files):
        try:
            pixels[i] = read_image(file, size)
        except BadImage as error:
            bad.append((i, str(error)))
    report(
        f"images of {folder} cannot be used and are skipped",
        [(str(files[i]), reason) for i, reason in bad],
        len(files),
    )
    broken = {i for i, _ in bad}
    usable = [i for i in range(len(files)) if i not in broken]
    if len(usable) < LEAST:
        raise UserError(
            f"{folder} has {len(usable)} usable images; a style needs at least {LEAST},"
            " of which a fifth is kept to measure against"
        )
    order = sorted(usable, key=lambda i: digest(files[i].relative_to(folder).as_posix()))
    count = min(HELD_OUT_MOST, max(2, round(HELD_OUT * len(usable))))
    held_out = np.sort(order[:count])
    train = np.sort(order[count:])
    texts = read_captions(folder, files) or [("",)] * len(files)
    captions = [with_name(own[0], name) for own in texts]
    prompts = read_prompts(folder / PROMPTS, name)
    # a prompt is a line of the file that sample.py reads
    prompts = prompts or list(dict.fromkeys(" ".join(captions[i].split()) for i in held_out))
    return Style(name, slug, files, captions, prompts, train, held_out, pixels)


def read_prompts(file: Path, name: str) -> list[str]:
    """A prompt a line, with the style's name; empty where there is no file."""
    if not file.is_file():
        return []
    found = [with_name(" ".join(line.split()), name) for line in read_prompt_lines(file)]
    if not found:
        raise UserError(f"{file} holds no prompt; write one a line, or delete it")
    return found


def training_folder(style: Style, folder: Path, name: str | None = None) -> Path:
    """The style's training images with their captions, as a folder of its own, made once.

    name: stands in the captions for the style's name; {} is where train.py puts a new token.
    """
    done = folder / ".complete"
    if done.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for n, i in enumerate(style.train):
        target = folder / f"{n:05d}{style.files[i].suffix.lower()}"
        try:
            os.link(style.files[i].resolve(), target)
        except OSError:
            shutil.copyfile(style.files[i], target)  # another file system
        text = style.captions[i]
        text = replaced(text, style.name, name) if name else text
        target.with_suffix(".txt").write_text(text, encoding="utf-8")
    write_text(done, "")
    return folder
