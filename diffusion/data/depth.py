"""Samples of any depth to 8 bits, scaled by the range that the file declares.

    unsigned 12 and 16 bits     0 ... 2^bits - 1, or the TIFF tags SMinSampleValue, SMaxSampleValue
    float                       0 ... 1, or those tags
    signed, and all of 32 bits  those tags, or MinSampleValue and MaxSampleValue; refused without

A guess from an image's own values would give two images of one folder two scales: what declares
no range is refused by name. Mended too is what Pillow gets wrong: WhiteIsZero in deep greys, and
the transparent grey of a PNG of less than 8 bits. The rest of what it gets wrong is refused.
"""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

BITS = 258  # TIFF tags
PHOTOMETRIC = 262
SAMPLES_PER_PIXEL = 277
PLANAR = 284
SAMPLE_FORMAT = 339
SUBSAMPLING = 530
LOWEST = (340, 280)  # SMinSampleValue, MinSampleValue
HIGHEST = (341, 281)
KINDS = {1: "unsigned integers", 2: "signed integers", 3: "floats"}
OTHER_ORDER = ("F;32BF", "I;32BS", "I;16BS")  # of bytes
OVERSHOOT = 0.5  # of floats beyond 0 ... 1, as sharpening makes it; cut off


def prepare(image: Image.Image) -> None:
    """Note in image.info what the file declares of its samples, before they are read.

    Raises ValueError, which names the kind, for one that has no certain meaning, or that Pillow
    would misread.
    """
    if image.format == "TIFF":
        _prepare_tiff(image)
    if image.format == "PNG" and "transparency" in image.info:
        raw = image.tile[0][3] if image.tile else ""
        if raw == "RGB;16B":  # of the pixels it keeps 8 bits, of the colour 16
            raise ValueError("a PNG of 16 bits with a transparent colour; save it with alpha")
        image.info["transparency"] *= {"L;2": 85, "L;4": 17}.get(raw, 1)


def _prepare_tiff(image: Image.Image) -> None:
    tags = image.tag_v2
    mode = image.mode
    bits = max(tags.get(BITS, (1,)))
    kind = max(tags.get(SAMPLE_FORMAT, (1,)))
    samples = f"{bits}-bit {KINDS.get(kind, 'samples')}"
    is_raw = all(tile[0] == "raw" for tile in image.tile)
    in_planes = tags.get(PLANAR) == 2 and tags.get(SAMPLES_PER_PIXEL, 1) > 1
    misread = kind == 2 and not _is_deep(image)
    # of compressed planes without alpha, libtiff reads the first
    misread |= in_planes and (mode in ("LA", "La", "PA") or (is_raw and mode in ("1", "L", "P")))
    misread |= in_planes and is_raw and bits == 16
    if not is_raw:
        # libtiff gives the machine's byte order, Pillow expects the file's
        misread |= image.tile[0][3][0] in OTHER_ORDER
    elif mode == "YCbCr":
        misread |= tuple(tags.get(SUBSAMPLING, (2, 2))) != (1, 1)
    if misread:
        raise ValueError(
            f"a TIFF of {samples}, {mode}{' in planes' if in_planes else ''}, which Pillow "
            "misreads; save it as PNG, or in 8 or 16 bit unsigned"
        )
    if _is_deep(image):
        has_type_range = kind == 1 and bits <= 16

        def declared(names, default):
            # MinSampleValue and MaxSampleValue are statistics, better than nothing
            known = names[:1] if has_type_range else names
            return next((float(np.min(tags[name])) for name in known if name in tags), default)

        low = declared(LOWEST, 0.0 if kind == 1 else np.nan)
        high = declared(HIGHEST, np.nan)
        is_declared = -np.inf < low < high < np.inf
        if not is_declared:
            if not has_type_range and kind != 3:
                raise ValueError(
                    f"a TIFF of {samples} that declares no range (tags SMinSampleValue and "
                    "SMaxSampleValue); convert it to 8 or 16 bit unsigned"
                )
            low = 0.0
            high = float((1 << bits) - 1) if has_type_range else 1.0
        white_is_zero = tags.get(PHOTOMETRIC, 0) == 0
        image.info["sample_range"] = (high, low) if white_is_zero else (low, high)
        image.info["sample_declared"] = is_declared
        image.info["sample_unsigned"] = kind == 1


def _is_deep(image: Image.Image) -> bool:
    return image.mode[0] in "IF"


def to_8_bit(image: Image.Image, curve: np.ndarray | None = None) -> Image.Image:
    """Scale deep greys to 8 bits, L or, with a transparent value, LA; other modes stay.

    curve (65536,) uint8: the 8-bit value of each 65535th of the range, for deep greys and for L
    and LA. Raises ValueError for floats beyond 0 ... 1 of undeclared range.
    """
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.mode in ("1", "L", "LA") and curve is not None:
        grey, *alpha = image.convert("LA" if image.has_transparency_data else "L").split()
        return Image.merge("LA" if alpha else "L", [grey.point(curve[::257].tolist()), *alpha])
    if not _is_deep(image):
        return image
    is_float = image.mode == "F"
    low, high = image.info.get("sample_range", (0.0, 1.0 if is_float else 65535.0))
    if is_float:
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
    for band, values in _bands(image):
        out[band] = scaled(values).round()
    return Image.fromarray(out)


def _bands(image: Image.Image) -> Iterator[tuple[slice, np.ndarray]]:
    """Give rows of about a quarter of a million pixels, and their values."""
    rows = max(1, (1 << 18) // max(1, image.width))
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        values = np.asarray(image.crop((0, top, image.width, bottom)))
        if image.info.get("sample_unsigned") and values.dtype == np.int32:
            values = values.view(np.uint32)
        yield slice(top, bottom), values


def _check_floats(image: Image.Image) -> None:
    values = np.asarray(image)
    low = float(values.min())
    high = float(values.max())
    if not np.isfinite([low, high]).all():  # NaN if one value is
        raise ValueError("floating point values that are NaN or infinite; replace them")
    if not image.info.get("sample_declared") and (low < -OVERSHOOT or high > 1 + OVERSHOOT):
        raise ValueError(
            f"floating point values from {low:g} to {high:g}, expected 0 to 1 or a declared range "
            "(TIFF tags SMinSampleValue and SMaxSampleValue); scale them, or convert to 16 bit"
        )
