"""One image file or one Pillow image -> RGB pixels of the size asked for."""

import contextlib
import io
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..runtime.distributed import log
from . import colour, depth

MAX_PIXELS = 100_000_000  # 300 MB as RGB; more is refused from the header, before decoding

ORIENTATION = 0x0112  # EXIF's tag

# Most levels of 255 by which a picture may differ from one colour; 12 bits in 16 take up no more
ONE_COLOUR = 16

# What a folder scan takes for an image. Those that Pillow cannot decode are reported, not dropped.
SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".bmp",
    ".dib",
    ".gif",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".tga",
    ".jp2",
    ".avif",
    ".heic",
    ".heif",
    ".jxl",
}


# Their formats in Pillow, which goes by content and knows others: EPS would start Ghostscript.
FORMATS = {
    "JPEG",
    "MPO",
    "PNG",
    "BMP",
    "DIB",
    "GIF",
    "WEBP",
    "TIFF",
    "PPM",
    "TGA",
    "JPEG2000",
    "AVIF",
    "HEIF",
    "JXL",
}


class BadImage(Exception):
    """The file cannot be used; the message says why."""


def read_image(file: Path | bytes, size: int | None) -> np.ndarray:
    """Read an image as (size, size, 3) uint8; size None: as large as it is.

    Raises BadImage with the reason if the file cannot be decoded.
    """
    with notes() as found, _opened(file) as image:
        pixels = to_pixels(image, size)
    for text in found:
        _note(text, "an image" if isinstance(file, bytes) else repr(str(file)))
    return pixels


def read_mask(file: Path | bytes) -> np.ndarray:
    """Read an inpainting mask as (H, W) uint8 at its own size: 255 repaint, 0 keep.

    White is what to repaint; what is transparent is to keep, whatever its colour. Colour profiles
    do not matter here. Raises BadImage if the file cannot be decoded, or if it has transparency
    and nothing visible in it is white: the strokes were painted in another colour, or erased.
    """
    with _opened(file) as image:
        image = depth.to_8_bit(_upright(image))
        if not image.has_transparency_data:
            return np.array(image.convert("L"))
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
        white = np.asarray(image.convert("L")).astype(np.uint16)
        mask = ((white * alpha + 127) // 255).astype(np.uint8)
        if mask.max(initial=0) < 128:
            raise BadImage(
                "a mask with transparency in which nothing visible is white, so that nothing would "
                "be repainted; paint white what to repaint (transparent and black are to keep)"
            )
        return mask


@contextlib.contextmanager
def _opened(file: Path | bytes) -> Iterator[Image.Image]:
    """Open an image; whatever goes wrong while it is open becomes a BadImage with a reason."""
    try:
        source = io.BytesIO(file) if isinstance(file, bytes) else file
        if isinstance(file, Path) and file.exists() and not file.is_file():
            raise BadImage("no regular file")  # from a pipe there may never come anything
        with Image.open(source, formats=formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width}x{image.height} is above {MAX_PIXELS:,} pixels")
            colour.prepare(image)
            yield depth.prepare(image, source)
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(f"its header declares more than {MAX_PIXELS:,} pixels") from None
    except FileNotFoundError:
        raise BadImage("no such file (a broken link?)") from None
    except UnidentifiedImageError:
        reason = depth.describe_tiff(source) or "not an image that Pillow can read"
        raise BadImage(reason) from None
    except Exception as error:  # Pillow raises nearly everything on damaged files
        reason = str(error)
        raise BadImage(reason.splitlines()[0] if reason else type(error).__name__) from None


@lru_cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow, with the plug-ins that are loaded, can read."""
    Image.init()
    return tuple(sorted(FORMATS & Image.OPEN.keys()))


def to_pixels(image: Image.Image, size: int | None) -> np.ndarray:
    """Turn by EXIF, cut the central square, make RGB, resize (LANCZOS): (size, size, 3) uint8.

    size None: neither cut nor resized, (H, W, 3).
    """
    image = _upright(image)
    if size is None or image.mode == "F":  # the whole of a float image is asked for its range
        image = to_rgb(image)
    if size is None:
        return np.array(image)
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    return np.array(to_rgb(image).resize((size, size), Image.LANCZOS))


def _upright(image: Image.Image) -> Image.Image:
    """The image turned by EXIF; itself where there is nothing to turn, for a copy takes memory."""
    image.load()
    return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB in sRGB: samples scaled, colour profiles applied, alpha over white."""
    try:
        image = colour.to_srgb(image)
    except colour.BadProfile as error:
        _note(f"{error}; it is read as sRGB")
        image = colour.to_srgb(image, ignore=True)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


# --- what is to be said of images that are used all the same -------------------------------------

_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)
_logged: set[str] = set()


@contextlib.contextmanager
def notes() -> Iterator[list[str]]:
    """Collect what this thread finds odd about usable images; outside of it that is logged once."""
    found: list[str] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


def _note(text: str, name: str = "an image") -> None:
    found = _collected.get()
    if found is not None:
        found.append(text)
    elif text not in _logged:
        _logged.add(text)
        log(f"warning: {name}: {text}")


def read_noting(read: Callable[[], np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """Read a training image: its pixels (size, size, 3), and what is odd about it.

    Odd is a colour profile that cannot be used, or pixels that are all (nearly) one colour.
    """
    with notes() as found:
        pixels = read()
    sparse = pixels[::8, ::8]  # nearly every image is told by these
    if _spread(sparse) <= ONE_COLOUR and _spread(pixels) <= ONE_COLOUR:
        mean = pixels.mean((0, 1)).round().astype(int).tolist()
        found.append(f"all of it is (nearly) one colour, {tuple(mean)}")
    return pixels, found


class OddLog:
    """Logs what `read_noting` finds where images are read again and again: each line once."""

    def __init__(self, most: int = 20):
        self.lines: set[str] = set()
        self.most = most

    def __call__(self, name: str, found: list[str]) -> None:
        for line in (f"warning: {name}: {text}" for text in found):
            if line not in self.lines and len(self.lines) < self.most:
                self.lines.add(line)
                log(line)
                if len(self.lines) == self.most:
                    log("warning: further images like these are not named")


def _spread(pixels: np.ndarray) -> int:
    """The largest difference within one of the channels."""
    return int((pixels.max((0, 1)).astype(int) - pixels.min((0, 1))).max())
