"""Samples of any depth to 8 bits, scaled by the range that the file declares.

    unsigned 12 and 16 bits     0 ... 2^bits - 1, or the TIFF tags SMinSampleValue, SMaxSampleValue
    float                       0 ... 1, or those tags
    signed, and all of 32 bits  those tags, or MinSampleValue and MaxSampleValue; refused without

A guess from an image's own values would give two images of one folder two scales: what declares
no range is refused by name. Mended too is what Pillow gets wrong: WhiteIsZero in deep greys, 16-bit
planes stored one after the other, compressed samples of the other byte order, and the transparent
colour of a PNG of other than 8 bits.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

PHOTOMETRIC = 262
BITS = 258
PLANAR = 284
SAMPLE_FORMAT = 339  # TIFF tags
LOWEST = (340, 280)
HIGHEST = (341, 281)  # S(igned) ones first
SAMPLES_PER_PIXEL = 277
EXTRA_SAMPLES = 338
SUBSAMPLING = 530
SAMPLES = {1: "unsigned integer", 2: "signed integer", 3: "floating point"}
NATIVE = {"F;32BF": "F;32NF", "I;32BS": "I;32NS", "I;16BS": "I;16NS"}
OVERSHOOT = 0.5  # of floats beyond 0 ... 1, as sharpening makes it; cut off


def prepare(image: Image.Image, source: Path | io.BytesIO) -> Image.Image:
    """Note in image.info what the file declares of its samples, before they are read.

    Mends how Pillow would read them. Raises ValueError, which names the kind, for one that has no
    certain meaning.
    """
    if image.format == "TIFF":
        _prepare_tiff(image)
    if image.format == "PNG" and "transparency" in image.info:
        return _prepare_transparent(image, source)
    return image


def _prepare_tiff(image: Image.Image) -> None:
    tags = image.tag_v2
    bits = max(tags.get(BITS, (1,)))
    kind = max(tags.get(SAMPLE_FORMAT, (1,)))
    white_is_zero = tags.get(PHOTOMETRIC, 0) == 0
    is_raw = all(tile[0] == "raw" for tile in image.tile)
    in_planes = tags.get(PLANAR) == 2 and tags.get(SAMPLES_PER_PIXEL, 1) > 1
    # of compressed ones without alpha, libtiff reads the first plane
    if in_planes and image.mode in (("1", "L", "P") if is_raw else ()) + ("LA", "La", "PA"):
        raise ValueError(
            f"a TIFF of {bits}-bit {image.mode} planes, which Pillow misreads; store "
            "it interleaved, or as PNG"
        )
    if not is_raw:
        # libtiff gives the machine's byte order, Pillow expects the file's
        _read_as(image, lambda raw: NATIVE.get(raw, raw))
    elif in_planes and bits == 16:
        if image.mode not in ("RGB", "RGBA"):
            raise ValueError(
                f"a TIFF of 16-bit {image.mode} planes, which Pillow misreads; store it interleaved"
            )
        order = "L" if tags.prefix == b"II" else "B"
        _read_as(image, lambda raw: f"{raw};16{order}")
    elif image.mode == "YCbCr" and tuple(tags.get(SUBSAMPLING, (2, 2))) != (1, 1):
        raise ValueError(
            "an uncompressed TIFF of subsampled YCbCr, which Pillow misreads; convert it to RGB"
        )
    if _is_deep(image):
        declared = _declared_range(tags, bits, kind)
        low, high = declared or (0.0, 1.0)
        image.info["sample_range"] = (high, low) if white_is_zero else (low, high)
        image.info["sample_declared"] = declared is not None
        image.info["sample_unsigned"] = kind == 1
    elif kind == 2:
        raise ValueError(
            f"a TIFF of {bits}-bit signed integers, which Pillow misreads; convert "
            "it to 8 or 16 bit unsigned"
        )


def _declared_range(tags, bits: int, kind: int) -> tuple[float, float] | None:
    """(low, high) of grey samples; None for floats of undeclared range."""
    has_type_range = kind == 1 and bits <= 16

    def declared(names: tuple[int, int]) -> float | None:
        # MinSampleValue and MaxSampleValue are statistics, better than nothing
        known = names[:1] if has_type_range else names
        return next((float(np.min(tags[name])) for name in known if name in tags), None)

    low = declared(LOWEST)
    high = declared(HIGHEST)
    low = 0.0 if low is None and kind == 1 else low
    if low is not None and high is not None and -np.inf < low < high < np.inf:
        return low, high
    if has_type_range:
        return 0.0, float((1 << bits) - 1)
    if kind == 3:
        return None
    raise ValueError(
        f"a TIFF of {bits}-bit {SAMPLES.get(kind, 'sample')}s that declares no range (tags "
        "SMinSampleValue and SMaxSampleValue); convert it to 8 or 16 bit unsigned"
    )


def _prepare_transparent(image: Image.Image, source: Path | io.BytesIO) -> Image.Image:
    """Bring tRNS, which is in the file's depth, to that of the pixels."""
    key = image.info["transparency"]
    raw = image.tile[0][3] if image.tile else ""
    if raw in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if raw == "L;2" else 17)
    if raw != "RGB;16B":
        return image
    # Pillow keeps the high bytes of 16 bits; read as if it were little-endian, the low ones
    if not isinstance(source, Path):
        source.seek(0)
        source = io.BytesIO(source.read())
    with Image.open(source, formats=("PNG",)) as again:
        _read_as(again, lambda raw: "RGB;16L")
        low = np.asarray(again)
    del image.info["transparency"]
    image = image.copy()
    key = np.array(key, ">u2").view(np.uint8).reshape(3, 2)
    alpha = np.empty((image.height, image.width), np.uint8)
    for band, high in _bands(image):
        same = (high == key[:, 0]) & (low[band] == key[:, 1])
        alpha[band] = np.where(same.all(-1), 0, 255)
    image.putalpha(Image.fromarray(alpha))
    return image


def _read_as(image: Image.Image, change: Callable[[str], str]) -> None:
    """Have Pillow take a file's bytes for another raw mode; it names one per tile."""
    tiles = []
    for codec, extents, offset, args in image.tile:
        args = change(args) if isinstance(args, str) else (change(args[0]), *args[1:])
        tiles.append((codec, extents, offset, args))
    tile_type = getattr(ImageFile, "_Tile", None)  # since Pillow 11
    image.tile = [tile_type(*tile) for tile in tiles] if tile_type else tiles


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

    def scaled(band: np.ndarray) -> np.ndarray:
        fraction = ((band.astype(np.float64) - low) / (high - low)).clip(0, 1)
        return 255 * fraction if curve is None else curve[(65535 * fraction).round().astype(int)]

    grey = _in_bands(image, scaled)
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return grey
    alpha = _in_bands(image, lambda band: np.where(band == key, 0, 255))
    return Image.merge("LA", [grey, alpha])


def _in_bands(image: Image.Image, scaled: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    """8-bit grey by `scaled`, in bands: in floating point all at once would be 8 times more."""
    out = np.empty((image.height, image.width), np.uint8)
    for band, values in _bands(image):
        out[band] = scaled(values).round()
    return Image.fromarray(out)


def _bands(image: Image.Image) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of about a quarter of a million pixels, and their values."""
    rows = max(1, (1 << 18) // max(1, image.width))
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        values = np.asarray(image.crop((0, top, image.width, bottom)))
        if image.info.get("sample_unsigned") and values.dtype == np.int32:
            values = values.view(np.uint32)
        yield slice(top, bottom), values


def _check_floats(image: Image.Image) -> None:
    ends = [(values.min(), values.max()) for _, values in _bands(image)]
    low = float(np.min(ends))
    high = float(np.max(ends))  # NaN if one is
    if not np.isfinite([low, high]).all():
        raise ValueError("floating point values that are NaN or infinite; replace them")
    declared = image.info.get("sample_declared", False)
    if not declared and (low < -OVERSHOOT or high > 1 + OVERSHOOT):
        raise ValueError(
            f"floating point values from {low:g} to {high:g}, expected 0 to 1 or a declared range "
            "(TIFF tags SMinSampleValue and SMaxSampleValue); scale them, or convert to 16 bit"
        )


def describe_tiff(source: Path | io.BytesIO) -> str | None:
    """Say what samples a TIFF has that Pillow does not open; None if it is none."""
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
        file = stack.enter_context(open(source, "rb")) if isinstance(source, Path) else source
        file.seek(0)
        head = file.read(8)
        if head[:4] not in (b"II*\0", b"MM\0*"):
            return None
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
        bits = tags.get(BITS, (1,))
        kind = SAMPLES.get(max(tags.get(SAMPLE_FORMAT, (1,))))
        if kind is None or max(bits) > 64:
            return None
        samples = tags.get(SAMPLES_PER_PIXEL, 1)
        photometric = tags.get(PHOTOMETRIC, 0)
        about = [f"photometric {photometric}" + (", WhiteIsZero" if photometric == 0 else "")]
        about += ["with alpha"] if EXTRA_SAMPLES in tags else []
        about += ["in planes"] if tags.get(PLANAR) == 2 and samples > 1 else []
        about += ["big-endian"] if head[:2] == b"MM" else []
        # what has a common depth already is only laid out in a rare way
        usual = max(bits) in (8, 16) and tags.get(SAMPLE_FORMAT, (1,))[0] == 1
        return (
            f"a TIFF of {samples} x {max(bits)}-bit {kind} ({', '.join(about)}), which Pillow "
            f"cannot read; {'save it as PNG' if usual else 'convert it to 8 or 16 bit'}"
        )
    return None
