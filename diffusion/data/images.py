"""One image file or one Pillow image -> RGB pixels of the size asked for."""

import contextlib
import io
import re
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from .. import shown
from ..config import Size, sides
from ..files.atomic import open_regular, reason
from ..runtime.distributed import log
from . import colour, depth
from .depth import BadImage

# what `to_pixels` makes of a file, part of every cache's key; the number: raise it on any change
TRANSFORM = "exif, sRGB over white, central square, lanczos; 2"

MAX_PIXELS = 100_000_000  # 300 MB as RGB; more is refused from the header, before decoding
MAX_TILE = 1 << 24  # pixels of a TIFF's tile beyond those of the image
MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten
MAX_SCAN = 1 << 14  # bytes in which the mark of a scan may stand by chance, as in a film behind it
TILE = (322, 323)  # TIFF tags: width and length
PNG = b"\x89PNG\r\n\x1a\n"
NO_TEXT = re.compile(rb"(?!tEXt|zTXt|iTXt)")  # chunks of a PNG
NEEDED = re.compile(rb"[A-Z]|tRNS")
HEIF = re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL)

ORIENTATION = 0x0112  # EXIF's tag

ONE_COLOUR = 16  # levels of 255 within which an image is one colour; 12 bits in 16 take no more

# What a folder scan takes for an image. Those that Pillow cannot decode are reported, not dropped.
SUFFIXES = set(
    ".jpg .jpeg .jpe .jfif .png .bmp .dib .gif .webp .tif .tiff .ppm .pgm .pbm .tga .jp2 .avif "
    ".heic .heics .heif .heifs .hif .jxl".split()
)
# Their formats in Pillow, which goes by content and knows others: EPS would start Ghostscript.
FORMATS = set("JPEG MPO PNG BMP DIB GIF WEBP TIFF PPM TGA JPEG2000 AVIF HEIF JXL".split())


Note = Callable[[str], None]


class ImageLog:
    """Reads training images, and logs once what is odd about them or why they are skipped."""

    MAX_LINES = 100

    def __init__(self):
        self.said = set()

    def read(self, name: str, *args) -> np.ndarray | None:
        """Read an image as `read_noting` does; None for one that cannot be used."""
        try:
            pixels, found = read_noting(*args)
        except BadImage as error:
            self.note(f"{name} is skipped: {error}")
            return None
        for text in found:
            self.note(f"{name}: {text}")
        return pixels

    def note(self, line: str) -> None:
        if line not in self.said and len(self.said) < self.MAX_LINES:
            self.said.add(line)
            log(f"warning: {line}")
            if len(self.said) == self.MAX_LINES:
                log("warning: further images that are odd or skipped are not named")


image_log = ImageLog()


def read_image(file: Path | bytes, size: Size | None, note: Note | None = None) -> np.ndarray:
    """Read an image as (size, size, 3) uint8; size None: as large as it is.

    note: called with what is odd about it; else that is logged. Raises BadImage with the reason if
    the file cannot be decoded.
    """
    name = "an image" if isinstance(file, bytes) else shown(str(file), 200)
    with _opened(file) as image:
        return to_pixels(image, size, note or (lambda text: image_log.note(f"{name}: {text}")))


def read_noting(read: Callable[..., np.ndarray], *args) -> tuple[np.ndarray, list[str]]:
    """Read a training image by read(*args, note): its pixels, and what is odd about it.

    Odd is a colour profile that cannot be used, or pixels that are all (nearly) one colour.
    """
    found = []
    pixels = read(*args, found.append)
    sparse = pixels[::8, ::8]  # nearly every image shows its colours in these
    if all(np.ptp(some, (0, 1)).max() <= ONE_COLOUR for some in (sparse, pixels)):
        mean = pixels.mean((0, 1)).round().astype(int).tolist()
        found.append(f"all of it is (nearly) one colour, {tuple(mean)}")
    return pixels, found


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
        mask = np.array(ImageChops.multiply(image.convert("L"), image.getchannel("A")))
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
        with io.BytesIO(file) if isinstance(file, bytes) else open_regular(file) as source:
            with _decoded(source) as image:
                yield image
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(
            "not an image that Pillow can read; save it as PNG, in 8 bits or 16 bits unsigned"
        ) from None
    except Exception as error:  # Pillow raises nearly everything on damaged files
        raise BadImage(reason(error)) from None


def _decoded(source: BinaryIO) -> Image.Image:
    """Decode an image; a PNG whatever its texts, and if need be all but its pixels, may hold."""
    head = source.read(12)
    source.seek(0)
    try:
        return _loaded(source)
    except BadImage:
        raise
    except Exception:
        if HEIF.match(head) and "HEIF" not in formats():
            raise BadImage("HEIC is read with pillow-heif: pip install pillow-heif") from None
        if not head.startswith(PNG):
            raise
    source.seek(0)
    data = source.read()
    with contextlib.suppress(Exception):
        return _loaded(_with_chunks(data, NO_TEXT))
    image = _loaded(_with_chunks(data, NEEDED))
    image.info["unread"] = "the PNG has damaged chunks"
    return image


def _loaded(source: BinaryIO) -> Image.Image:
    image = Image.open(source, formats=formats())
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise BadImage(f"{image.width}x{image.height} is above {MAX_PIXELS:,} pixels")
    if image.format == "TIFF":
        width, length = (image.tag_v2.get(tag, 0) for tag in TILE)
        if width * length > pixels + MAX_TILE:
            raise BadImage(f"{image.width}x{image.height} in tiles of {width}x{length}")
    if image.info.get("progressive"):  # each scan takes as long as decoding the whole
        source.seek(0)
        data = source.read()
        if data.count(b"\xff\xda") > MAX_SCANS + len(data) // MAX_SCAN:
            raise BadImage("a progressive JPEG of more scans than any encoder writes")
    colour.prepare(image)
    depth.prepare(image)
    image.load()
    return image


def _with_chunks(data: bytes, kinds: re.Pattern) -> BinaryIO:
    """Copy a PNG with its chunks of some kinds."""
    kept = [PNG]
    at = len(PNG)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kinds.match(kind):
            kept.append(data[at : at + length + 12])
        at += length + 12
    return io.BytesIO(b"".join(kept))


@lru_cache
def formats() -> tuple[str, ...]:
    """List those of FORMATS that this Pillow, with the plug-ins that there are, can read."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(sorted(FORMATS & Image.OPEN.keys()))


def to_pixels(image: Image.Image, size: Size | None, note: Note = image_log.note) -> np.ndarray:
    """Turn by EXIF, cut the central square, make RGB, resize (LANCZOS): (size, size, 3) uint8.

    size: a side, or (height, width), whose aspect is cut; None: neither cut nor resized, (H, W, 3).
    """
    image = _upright(image)
    if size is None or image.mode == "F":  # the whole of a float image is asked for its range
        image = to_rgb(image, note)
    if size is None:
        return np.array(image)
    height, width = sides(size)
    W = min(image.width, max(1, round(image.height * width / height)))
    H = min(image.height, max(1, round(image.width * height / width)))
    left = (image.width - W) // 2
    top = (image.height - H) // 2
    if image.size != (W, H):
        image = image.crop((left, top, left + W, top + H))
    return np.array(to_rgb(image, note).resize((width, height), Image.LANCZOS))


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image by readable EXIF; it is itself where nothing is: a copy takes memory."""
    image.load()
    turned = False
    with contextlib.suppress(Exception):  # Pillow raises nearly everything on damaged EXIF
        turned = image.getexif().get(ORIENTATION, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def to_rgb(image: Image.Image, note: Note = image_log.note) -> Image.Image:
    """Make 8-bit RGB in sRGB: samples scaled, colour profiles applied, alpha over white."""
    try:
        image = colour.to_srgb(image)
    except colour.BAD_PROFILE as error:
        note(f"its colour profile cannot be used ({error}); it is read as sRGB")
        image = colour.to_srgb(image, ignore=True)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
