"""Turn tensors into pictures: PNG files, grids, labelled strips and animations."""

import base64
import io
import json
import math
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..files.atomic import atomic
from ..files.owned import SOFTWARE, SOFTWARE_TAG, picture_text
from ..runtime import distributed as dist
from ..sampling.image_tensor import grid, to_uint8
from .plot import INK, font

MAX_PROMPT = 1 << 16  # characters of a picture's text; no prompt is longer


class Trajectory(NamedTuple):
    """Holds a process as pictures. t: (F,) the frames' timesteps, -1 where the image is clean.

    x: (F, B, H, W, 3) uint8; x0: the same, what is predicted at each; None for the forward process.
    """

    name: str
    t: list[float]
    x: np.ndarray
    x0: np.ndarray | None = None

    def caption(self, frame: int) -> str:
        return f"t = {self.t[frame]:.4g}" if self.t[frame] >= 0 else "clean"


class Picked(NamedTuple):
    """Holds images of a data set: (B, 3, H, W) in [-1, 1], with their names and captions."""

    images: Tensor
    names: list[str]
    captions: list[str]


def save_png(
    image: Image.Image | np.ndarray, path: Path, text: dict[str, str] | None = None
) -> None:
    """Write a PNG, complete or not at all. text: for the file's text chunks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic(path, lambda file: write_png(image, file, text))


def write_png(image, path: Path, text: dict[str, str] | None = None) -> None:
    """Write the bytes of a PNG, with this program as its `Software`."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    info = PngInfo()
    for key, value in {"Software": SOFTWARE, **(text or {})}.items():
        value = value.encode("utf-8", "backslashreplace").decode()  # names of files may be no text
        info.add_itxt(key, value) if not value.isascii() else info.add_text(key, value)
    image.save(path, format="PNG", pnginfo=info)


def parameters_text(prompt: str | None, negative: str, settings: dict) -> str:
    """Write the `parameters` text as AUTOMATIC1111 puts it into a PNG and many programs read it.

    settings: by their names there, such as Steps, Sampler, CFG scale, Seed, Size.
    """
    lines = [] if prompt is None else [prompt]
    lines += [f"Negative prompt: {negative}"] if negative else []
    shown = ", ".join(f"{k}: {quoted(v)}" for k, v in settings.items() if v is not None)
    return "\n".join([*lines, shown])


def quoted(value) -> str:
    """Quote a value with commas or colons, as AUTOMATIC1111 does."""
    text = str(value)
    special = any(c in text for c in ",:\n")
    return json.dumps(text, ensure_ascii=False) if special else text


def read_parameters(file: Path) -> str | None:
    """Read the prompt in a picture's `parameters` text; None without one."""
    text = parameters_of(file)
    # the settings are the last such line: a prompt may have one that looks like them
    prompt = f"\n{text}".rsplit("\nSteps: ", 1)[0].split("\nNegative prompt: ", 1)[0]
    return prompt[1:MAX_PROMPT] if text and prompt else None


def count_calls(files: Iterable[Path]) -> int:
    """Count the calls of sample.py that pictures are of: each has an image 0."""
    settings = (parameters_of(file).rsplit("\n", 1)[-1] for file in files)  # may be megabytes
    return sum(", Image: 0, " in text for text in settings)


def parameters_of(file: Path) -> str:
    """Read the `parameters` text of a picture; empty without one."""
    return (picture_text(file, "parameters") if file.is_file() else None) or ""


def enlarge(images: np.ndarray) -> np.ndarray:
    """Repeat each pixel of (..., H, W, 3) until the height is at least 96."""
    times = math.ceil(96 / images.shape[-3])
    return images.repeat(times, -3).repeat(times, -2)


def with_heading(picture: Image.Image, text: str) -> Image.Image:
    """Put a line of text above a picture."""
    width = max(picture.width, math.ceil(font(15).getlength(text)) + 12)
    canvas = Image.new("RGB", (width, picture.height + 26), "white")
    canvas.paste(picture, (0, 26))
    ImageDraw.Draw(canvas).text((6, 13), text, INK, font(15), anchor="lm")
    return canvas


def strip(rows: np.ndarray, labels: list[str], heading: str = "") -> Image.Image:
    """Arrange (R, C, H, W, 3) uint8 as a table, with a label above each column."""
    rows = enlarge(rows)
    R, C, H, W, _ = rows.shape
    table = with_heading(grid(rows.reshape(R * C, H, W, 3), columns=C, gap=4), "")
    draw = ImageDraw.Draw(table)
    for i, label in enumerate(labels):
        draw.text((4 + i * (W + 4) + W / 2, 13), label, INK, font(14), anchor="mm")
    return with_heading(table, heading) if heading else table


def save_animation(frames: list[Image.Image], path: Path) -> None:
    """Write an animated WebP, 80 ms a frame; the last one stays."""
    exif = Image.Exif()
    exif[SOFTWARE_TAG] = SOFTWARE
    size = tuple(map(max, zip(*(frame.size for frame in frames))))  # headings differ in length
    first, *rest = (ImageOps.pad(frame, size, color="white", centering=(0, 0)) for frame in frames)
    duration = [80] * len(rest) + [1500]
    first.save(path, "WEBP", save_all=True, append_images=rest, duration=duration, exif=exif)


def data_uri(picture: Image.Image, kind: str, **options) -> str:
    """Encode a picture as a file of a kind, such as PNG, to be embedded in a page."""
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def grid_of_ranks(
    sample: Callable[[list[int]], Tensor], count: int, batch: int
) -> Image.Image | None:
    """Draw a grid of images 0 ... count - 1 on rank 0, which all ranks sample; None elsewhere.

    sample(indices): (b, 3, H, W) in [-1, 1], of up to `batch` images. Raises NonFinite on rank 0.
    """
    mine = np.array_split(np.arange(count), dist.world_size())[dist.rank()].tolist()
    images = [sample(mine[low : low + batch]).cpu() for low in range(0, len(mine), batch)]
    ranks = dist.gather_object(images)
    return grid(to_uint8(torch.cat(list(chain(*ranks))))) if ranks is not None else None
