"""Pictures: tensors to PNG files, grids, labelled strips and films."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .. import UserError
from ..files.owned import SOFTWARE, SOFTWARE_TAG
from .plot import INK, font


class NonFinite(UserError):
    """Pictures with values that are NaN or infinite. rows: which of the batch."""

    def __init__(self, rows: list[int], names: str):
        super().__init__(
            f"{names} would not be finite: the network's numbers have overflowed. Try a smaller "
            "--guidance_scale or LoRA weight, or --amp no; a model of a diverged training "
            "cannot be sampled"
        )
        self.rows = rows


def to_uint8(x: Tensor, indices: Sequence[int] | None = None) -> np.ndarray:
    """Make pixels, (B, H, W, 3) uint8, of images (B, 3, H, W) in [-1, 1].

    indices: the images' numbers, for the message. Raises NonFinite where a value is none.
    """
    rows = (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if rows:
        bad = rows if indices is None else [int(indices[row]) for row in rows]
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise NonFinite(rows, f"{len(bad)} of {len(x)} pictures ({shown})")
    x = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return x.permute(0, 2, 3, 1).cpu().numpy()


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> Image.Image:
    """(N, H, W, 3) uint8 -> one picture, row by row; as square as possible by default."""
    n, H, W, _ = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (H + gap) + gap, columns * (W + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y = (i // columns) * (H + gap) + gap
        x = (i % columns) * (W + gap) + gap
        sheet[y : y + H, x : x + W] = image
    return Image.fromarray(sheet)


def save_png(
    image: Image.Image | np.ndarray, path: Path, text: dict[str, str] | None = None
) -> None:
    """Write a PNG, whole or not at all. text: for the file's text chunks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_png(image, temporary, text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_png(image, path: Path, text: dict[str, str] | None = None) -> None:
    """Write the bytes of a PNG, with this program as its `Software`."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    info = PngInfo()
    for key, value in {"Software": SOFTWARE, **(text or {})}.items():
        value = value.encode("utf-8", "backslashreplace").decode()  # names of files may be no text
        info.add_itxt(key, value) if not value.isascii() else info.add_text(key, value)
    image.save(path, format="PNG", pnginfo=info)


# what other programs call the samplers
SAMPLER_NAMES = {
    "ddpm": "DDPM",
    "ddpm_large": "DDPM large",
    "ddim": "DDIM",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
}


def parameters_text(prompt: str | None, negative: str, settings: dict) -> str:
    """The `parameters` text that AUTOMATIC1111 writes into a PNG and many programs read.

    settings: by their names there, such as Steps, Sampler, CFG scale, Seed, Size.
    """
    lines = [] if prompt is None else [prompt]
    lines += [f"Negative prompt: {negative}"] if negative else []
    shown = ", ".join(f"{k}: {quoted(v)}" for k, v in settings.items() if v is not None)
    return "\n".join([*lines, shown])


def quoted(value) -> str:
    """Values with commas or colons stand in quotes there."""
    text = str(value)
    special = any(c in text for c in ",:\n")
    return json.dumps(text, ensure_ascii=False) if special else text


def enlarge(images: np.ndarray, least: int = 96) -> np.ndarray:
    """(..., H, W, 3) with each pixel repeated until the height is at least `least`."""
    times = max(1, math.ceil(least / images.shape[-3]))
    return images.repeat(times, -3).repeat(times, -2)


def with_heading(picture: Image.Image, text: str, height: int = 26) -> Image.Image:
    """The picture below a line of text; as wide as the wider of them."""
    width = max(picture.width, math.ceil(font(15).getlength(text)) + 12 if text else 0)
    sheet = Image.new("RGB", (width, picture.height + height), "white")
    sheet.paste(picture, (0, height))
    ImageDraw.Draw(sheet).text((6, height / 2), text, INK, font(15), anchor="lm")
    return sheet


def strip(rows: np.ndarray, labels: list[str], heading: str = "") -> Image.Image:
    """(R, C, H, W, 3) uint8 -> a table of pictures, a label above each column."""
    rows = enlarge(rows)
    R, C, H, W, _ = rows.shape
    sheet = with_heading(grid(rows.reshape(R * C, H, W, 3), columns=C, gap=4), "")
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(labels):
        draw.text((4 + i * (W + 4) + W / 2, 13), label, INK, font(14), anchor="mm")
    return with_heading(sheet, heading) if heading else sheet


def save_film(frames: list[Image.Image], path: Path, ms: int = 80, last_ms: int = 1500) -> None:
    """An animated WebP, `ms` milliseconds a frame; the last one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[SOFTWARE_TAG] = SOFTWARE
    size = (max(f.width for f in frames), max(f.height for f in frames))
    frames = [
        ImageOps.pad(f, size, color="white", centering=(0, 0)) if f.size != size else f
        for f in frames
    ]
    durations = [ms] * (len(frames) - 1) + [last_ms]
    frames[0].save(
        path,
        "WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        quality=80,
        method=4,
        exif=exif,
    )
