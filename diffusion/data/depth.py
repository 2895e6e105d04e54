"""Samples of any depth to 8 bits, scaled by the range of their type.

    unsigned 12 and 16 bits     0 ... 2^bits - 1
    float                       0 ... 1
    signed, and all of 32 bits  refused by name, as is what declares another range

A guess from an image's own values would give two images of one folder two scales. Mended too is
what Pillow gets wrong: WhiteIsZero in deep greys, and the transparent grey of a PNG of less than 8
bits. The rest of what it gets wrong is refused.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

BITS = 258  # TIFF tags
PHOTOMETRIC = 262
SAMPLES_PER_PIXEL = 277
PLANAR = 284
SAMPLE_FORMAT = 339
SUBSAMPLING = 530
RANGE = (340, 341)  # SMinSampleValue, SMaxSampleValue
KINDS = {1: "unsigned integers", 2: "signed integers", 3: "floats"}
OTHER_ORDER = ("F;32BF", "I;32BS", "I;16BS")  # of bytes
DEEP = "IF"  # first letters of the modes of more than 8 bits
OVERSHOOT = 0.5  # of floats beyond 0 ... 1, as sharpening makes it; cut off


class BadImage(Exception):
    """Says why a file cannot be used."""


def prepare(image: Image.Image) -> None:
    """Note in image.info what the file declares of its samples, before they are read.

    Raises BadImage, which names the kind, for one that has no certain meaning or is misread.
    """
    if image.format == "TIFF":
        _prepare_tiff(image)
    if image.format == "PNG" and "transparency" in image.info:
        raw = image.tile[0][3] if image.tile else ""
        if raw == "RGB;16B":  # of the pixels it keeps 8 bits, of the colour 16
            raise BadImage("a PNG of 16 bits with a transparent colour; save it with alpha")
        image.info["transparency"] *= {"L;2": 85, "L;4": 17}.get(raw, 1)


def _prepare_tiff(image: Image.Image) -> None:
    tags = image.tag_v2
    mode = image.mode
    bits = max(tags.get(BITS, (1,)))
    kind = max(tags.get(SAMPLE_FORMAT, (1,)))
    in_planes = tags.get(PLANAR) == 2 and tags.get(SAMPLES_PER_PIXEL, 1) > 1
    high = (1 << bits) - 1 if kind == 1 else 1
    misread = kind == 2
    # of compressed planes without alpha, libtiff reads the first
    misread |= in_planes and mode in ("LA", "La", "PA")
    if any(tile[0] != "raw" for tile in image.tile):
        # libtiff gives the machine's byte order, Pillow expects the file's
        misread |= image.tile[0][3][0] in OTHER_ORDER
    else:
        misread |= in_planes and (bits == 16 or mode in ("1", "L", "P"))
        misread |= mode == "YCbCr" and tuple(tags.get(SUBSAMPLING, (2, 2))) != (1, 1)
    if mode[0] in DEEP:
        declared = {float(np.min(tags[name])) for name in RANGE if name in tags}
        misread |= bool(declared - {0, high}) or (kind == 1 and bits > 16)
        image.info["sample_range"] = (high, 0) if tags.get(PHOTOMETRIC, 0) == 0 else (0, high)
    if misread:
        raise BadImage(
            f"a TIFF of {bits}-bit {KINDS.get(kind, 'samples')}, {mode}"
            f"{' in planes' if in_planes else ''}, which Pillow misreads, or whose range is not "
            "that of its type; save it as PNG, or in 8 or 16 bit unsigned"
        )


def to_8_bit(image: Image.Image, curve: np.ndarray | None = None) -> Image.Image:
    """Scale deep greys to 8 bits, L or, with a transparent value, LA; other modes stay.

    curve (65536,) uint8: the 8-bit value of each 65535th of the range, for deep greys and for L
    and LA. Raises BadImage for floats beyond 0 ... 1, and NaN.
    """
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.mode in ("1", "L", "LA") and curve is not None:
        grey, *alpha = image.convert("LA" if image.has_transparency_data else "L").split()
        return Image.merge("LA" if alpha else "L", [grey.point(curve[::257].tolist()), *alpha])
    if image.mode[0] not in DEEP:
        return image
    low, high = image.info.get("sample_range", (0, 1 if image.mode == "F" else 65535))
    if image.mode == "F":
        _check_floats(image)

    def scaled(band):
        fraction = ((band.astype(np.float64) - low) / (high - low)).clip(0, 1)
        return 255 * fraction if curve is None else curve[(65535 * fraction).round().astype(int)]

    grey = _in_bands(image, scaled)
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return grey
    alpha = _in_bands(image, lambda band: np.where(band == key, 0, 255))
    return Image.merge("LA", [grey, alpha])


def _in_bands(image: Image.Image, scaled: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    """Make 8-bit grey by `scaled`, in bands: floating point all at once would be 8 times more."""
    out = np.empty((image.height, image.width), np.uint8)
    rows = max(1, (1 << 18) // max(1, image.width))  # of about a quarter of a million pixels
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        values = np.asarray(image.crop((0, top, image.width, bottom)))
        out[top:bottom] = scaled(values).round()
    return Image.fromarray(out)


def _check_floats(image: Image.Image) -> None:
    values = np.asarray(image)
    low = values.min()
    high = values.max()  # NaN if one value is
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
        raise BadImage(
            f"floating point values from {low:g} to {high:g}, expected 0 to 1; scale them, or "
            "convert to 16 bit"
        )
