"""One image file or one Pillow image -> RGB pixels of the size asked for."""

import contextlib
import io
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 100_000_000  # 300 MB as RGB; more is refused from the header, before decoding

# What a folder scan takes for an image. Those that Pillow cannot decode are reported, not dropped.
SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".tga", ".jp2", ".avif", ".heic", ".heif", ".jxl",
}  # fmt: skip


# Their formats in Pillow, which goes by content and knows others: EPS would start Ghostscript.
FORMATS = {
    "JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF",
    "HEIF", "JXL",
}  # fmt: skip


class BadImage(Exception):
    """The file cannot be used; the message says why."""


def read_image(file: Path | bytes, size: int | None) -> np.ndarray:
    """Read an image as (size, size, 3) uint8; size None: as large as it is.

    Raises BadImage with the reason if the file cannot be decoded.
    """
    with _opened(file) as image:
        return to_pixels(image, size)


def read_mask(file: Path | bytes) -> np.ndarray:
    """Read an inpainting mask as (H, W) uint8 at its own size: 255 repaint, 0 keep.

    White is what to repaint; what is transparent is to keep, whatever its colour. Colour profiles
    do not matter here. Raises BadImage if the file cannot be decoded, or if it has transparency
    and nothing visible in it is white: the strokes were painted in another colour, or erased.
    """
    with _opened(file) as image:
        image = to_8_bit(ImageOps.exif_transpose(image))
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
            yield image
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(f"its header declares more than {MAX_PIXELS:,} pixels") from None
    except FileNotFoundError:
        raise BadImage("no such file (a broken link?)") from None
    except Exception as error:  # Pillow raises nearly everything on damaged files
        reason = "not an image that Pillow can read" if "identify" in str(error) else str(error)
        raise BadImage(reason.splitlines()[0] if reason else type(error).__name__) from None


@lru_cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow, with the plug-ins that are loaded, can read."""
    Image.init()
    return tuple(sorted(FORMATS & Image.OPEN.keys()))


def to_pixels(image: Image.Image, size: int | None) -> np.ndarray:
    """Turn by EXIF, make RGB, cut the central square, resize (LANCZOS): (size, size, 3) uint8.

    size None: neither cut nor resized, (H, W, 3).
    """
    image = to_rgb(ImageOps.exif_transpose(image))
    if size is None:
        return np.array(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.array(image.resize((size, size), Image.LANCZOS))


def _to_grey(image: Image.Image, scaled: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    """8-bit grey by `scaled`, some rows at a time: in floating point all would be 8 times more."""
    values = np.asarray(image)
    out = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), 64):
        band = slice(top, top + 64)
        out[band] = scaled(values[band]).clip(0, 255).round()
    return Image.fromarray(out)


def to_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit and float greys to 8 bits; other modes come back as they are."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it
        return _to_grey(image, lambda band: band.astype(np.float64) / 257)
    if image.mode == "F":
        most = max((np.nan_to_num(row).max(initial=0) for row in np.asarray(image)), default=0)
        scale = 255 if most <= 1 else 1
        return _to_grey(image, lambda band: np.nan_to_num(band) * scale)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: alpha over white, 16-bit and float grey scaled, CMYK converted."""
    image = to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
