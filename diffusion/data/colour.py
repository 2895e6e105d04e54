"""Colours to sRGB: by the ICC profile, or by what PNG, AVIF and EXIF say in numbers.

Which one counts, first of all (PNG, third edition): cICP, ICC profile, sRGB, gAMA and cHRM; and of
photographs without any of them, EXIF's R03 (DCF: Adobe RGB). Numbers are made into a profile, so
that there is one way: relative colorimetric with black point compensation, by LittleCMS.
Under a profile that moves no colour by more than SAME levels the pixels stay what they are.
"""

import contextlib
import io
import struct
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from .depth import to_8_bit

DARK = 32  # of 255: a profile with which a full colour is darker than that is broken
SAME = 2  # of 255: what one maker's sRGB profile differs from another's
INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
SPACES = {  # a profile's, and the modes in which Pillow has such pixels
    "RGB": ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "YCbCr"),
    "CMYK": ("CMYK",),
    "LAB": ("LAB",),
}
MAX_PROFILE = 1 << 22  # bytes
D65 = (0.3127, 0.3290)
D50 = (0.9642, 1.0, 0.8249)  # xy; XYZ of the profile connection space
SRGB = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # x and y of red, green and blue
ADOBE = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
ADOBE_GAMMA = 563 / 256
GAMMA_SAME = 0.05  # gAMA within 5 % of 1/2.2 means sRGB, as libpng takes it
PRIMARIES = {  # ITU-T H.273: white and primaries
    1: (*D65, *SRGB),
    2: (*D65, *SRGB),
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    22: (*D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}
TRANSFERS = {1: None, 2: None, 4: 2.2, 5: 2.8, 6: None, 8: 1.0, 13: None, 14: None, 15: None}
LESSER = ("icc_profile", "srgb", "gamma", "chromaticity")  # in info, after cICP
HDR = {16: "PQ", 18: "HLG"}
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


class BadProfile(ValueError):
    """What a file says of its colours cannot be used; the message says why."""


def prepare(image: Image.Image) -> None:
    """Note in image.info what the file says of its colours and Pillow passes over.

    Raises ValueError for HDR, whose values mean nothing in sRGB.
    """
    look = {"PNG": _png, "AVIF": _avif, "JPEG2000": _jpeg2000, "GIF": _gif, "BMP": _bmp}
    if image.format in look:
        position = image.fp.tell()
        try:
            look[image.format](image)
        finally:
            image.fp.seek(position)
    elif b"R03\0" in (image.info.get("exif") or b"") and "icc_profile" not in image.info:
        with contextlib.suppress(Exception):  # Pillow raises nearly everything on damaged EXIF
            exif = image.getexif()
            interop = exif.get_ifd(0xA005).get(1)
            colour_space = exif.get_ifd(0x8769).get(0xA001)
            image.info["adobe_rgb"] = interop == "R03" and colour_space != 1
    transfer = image.info.get("cicp", (1, 1))[1]
    if transfer in HDR:
        raise ValueError(f"an HDR image ({HDR[transfer]}); convert it to sRGB")


def _png(image: Image.Image) -> None:
    image.fp.seek(8)
    while len(head := image.fp.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"IDAT", b"IEND"):
            return
        if kind == b"cICP" and length == 4:
            image.info["cicp"] = tuple(image.fp.read(4))
            if image.info["cicp"][3] != 1:
                raise ValueError("a PNG of narrow range (cICP); convert it to full range")
            return
        image.fp.seek(length + 4, io.SEEK_CUR)


def _avif(image: Image.Image) -> None:
    image.fp.seek(0)
    head = image.fp.read(1 << 16)
    at = head.find(b"colrnclx")
    if at >= 0 and len(head) >= at + 12 and "icc_profile" not in image.info:
        image.info["cicp"] = struct.unpack(">HH", head[at + 8 : at + 12])


def _jpeg2000(image: Image.Image) -> None:
    image.fp.seek(0)
    head = image.fp.read(MAX_PROFILE).partition(b"jp2c")[0]
    at = head.find(b"colr\x02")
    if at >= 4 and "icc_profile" not in image.info:
        (length,) = struct.unpack(">I", head[at - 4 : at])
        image.info["icc_profile"] = head[at + 7 : at - 4 + length]


def _gif(image: Image.Image) -> None:
    image.fp.seek(0)
    head = image.fp.read(1 << 20)
    at = head.find(b"\x21\xff\x0bICCRGBG1012")  # an application's block, then pieces with lengths
    if at < 0:
        return
    at = at + 14
    profile = b""
    while at < len(head) and head[at]:
        profile += head[at + 1 : at + 1 + head[at]]
        at += 1 + head[at]
    image.info["icc_profile"] = profile


def _bmp(image: Image.Image) -> None:
    image.fp.seek(0)
    head = image.fp.read(138)
    if len(head) == 138 and head[14:18] == b"\x7c\0\0\0" and head[70:74] == b"DEBM":  # V5, embedded
        start, size = struct.unpack("<II", head[126:134])
        image.fp.seek(14 + start)
        image.info["icc_profile"] = image.fp.read(min(size, MAX_PROFILE))


def to_srgb(image: Image.Image, ignore: bool = False) -> Image.Image:
    """Convert to 8 bits per channel in sRGB, of any mode that Pillow converts to RGB; alpha stays.

    ignore: as if the file said nothing of its colours. Raises BadProfile, or ValueError as
    `depth.to_8_bit` does.
    """
    profile = None if ignore else _profile(image)
    if profile is None:
        return to_8_bit(image)
    space = _space(profile)
    if _is_grey(image) and space in ("GRAY", "RGB"):
        return to_8_bit(image, _grey_curve(profile))
    if image.mode not in SPACES.get(space, ()):
        raise BadProfile(
            f"its colour profile is for {space or 'nothing known'}, its pixels are {image.mode}"
        )
    if space == "RGB":
        image, mode = to_8_bit(image), "RGBA" if image.has_transparency_data else "RGB"
        image = image if image.mode == mode else image.convert(mode)
    transform = _transform(profile, image.mode)
    return image if transform is None else ImageCms.applyTransform(image, transform)


def _is_grey(image: Image.Image) -> bool:
    return image.mode[0] in "1LIF" and image.mode != "LAB"


def _profile(image: Image.Image) -> bytes | None:
    """The profile of the image's colours; None where it is sRGB or nothing is said."""
    info = image.info
    grey = _is_grey(image)
    if "cicp" in info:
        primaries, transfer = info["cicp"][:2]
        if primaries in PRIMARIES and transfer in TRANSFERS:
            return make_profile(PRIMARIES[primaries], TRANSFERS[transfer], grey)
        if not any(info.get(other) is not None for other in LESSER):
            raise BadProfile(f"its colours are of an unknown kind (cICP {primaries}, {transfer})")
    if info.get("icc_profile"):
        return info["icc_profile"]
    if "srgb" in info:
        return None
    if "gamma" in info or "chromaticity" in info:
        gamma = info.get("gamma", 1 / 2.2)
        if not 0.05 <= gamma <= 20:
            raise BadProfile(f"its gAMA is {gamma:g}")
        same = abs(gamma * 2.2 - 1) <= GAMMA_SAME
        chromaticity = tuple(info.get("chromaticity", (*D65, *SRGB)))
        return make_profile(chromaticity, None if same else 1 / gamma, grey)
    if info.get("adobe_rgb"):
        return make_profile((*D65, *ADOBE), ADOBE_GAMMA, grey)
    return None


@lru_cache
def make_profile(chromaticity: tuple, gamma: float | None, grey: bool = False) -> bytes:
    """Build an ICC profile of 8 numbers, x and y of white, red, green and blue, and a power law.

    gamma None: sRGB's curve. grey: the curve only. Raises BadProfile for impossible primaries.
    """
    xy = np.array(chromaticity, np.float64).reshape(4, 2)
    if not (xy[:, 1] > 0).all():
        raise BadProfile("its cHRM is impossible")
    xyz = np.stack([xy[:, 0], xy[:, 1], 1 - xy.sum(1)]) / xy[:, 1]  # (3, 4) of luminance 1
    white = xyz[:, 0]
    primaries = xyz[:, 1:]
    if abs(np.linalg.det(primaries)) < 1e-6:
        raise BadProfile("its cHRM is impossible")
    with np.errstate(all="ignore"):
        cones = (BRADFORD @ D50) / (BRADFORD @ white)
        adapt = np.linalg.solve(BRADFORD, cones[:, None] * BRADFORD)  # from this white to D50
        columns = adapt @ (primaries * np.linalg.solve(primaries, white))
    if not (abs(columns) < 100).all():
        raise BadProfile("its cHRM is impossible")

    def fixed(values) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(65536 * float(v)) for v in values))

    # a parametric curve: Y = X^g, or sRGB's (aX + b)^g above d, cX below
    if gamma is not None:
        curve = b"para\0\0\0\0\0\0\0\0" + fixed([gamma])
    else:
        srgb = [2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045]
        curve = b"para\0\0\0\0\0\3\0\0" + fixed(srgb)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(D50)}
    if grey:
        tags[b"kTRC"] = curve
    else:
        for name, column in zip("rgb", columns.T):
            tags[f"{name}XYZ".encode()] = b"XYZ \0\0\0\0" + fixed(column)
            tags[f"{name}TRC".encode()] = curve
    at = 132 + 12 * len(tags)
    table = struct.pack(">I", len(tags))
    data = b""
    for name, value in tags.items():
        table += struct.pack(">4sII", name, at + len(data), len(value))
        data += value
    head = struct.pack(
        ">I4xI4s4s4s12x4s28x",
        at + len(data),
        0x04200000,
        b"mntr",
        b"GRAY" if grey else b"RGB ",
        b"XYZ ",
        b"acsp",
    ) + fixed(D50)
    return head.ljust(128, b"\0") + table + data


@lru_cache(maxsize=16)
def _space(profile: bytes) -> str:
    return _open(profile).profile.xcolor_space.strip().upper()


def _open(profile: bytes) -> ImageCms.ImageCmsProfile:
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except (OSError, ImageCms.PyCMSError, ImportError) as error:
        raise BadProfile(f"its colour profile cannot be read ({error})") from None


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str, flags: int = FLAGS):
    """What ImageCms.applyTransform takes, to be shared by threads; None where nothing changes."""
    out = "RGBA" if mode == "RGBA" else "RGB"
    try:
        transform = ImageCms.buildTransform(
            _open(profile), ImageCms.createProfile("sRGB"), mode, out, INTENT, flags
        )
    except (OSError, ImageCms.PyCMSError, ImportError) as error:
        raise BadProfile(f"its colour profile cannot be used ({error})") from None
    if mode == "CMYK" and _brightest(Image.new(mode, (1, 1)), transform) < DARK:
        raise BadProfile("its colour profile turns white black")
    if mode not in ("RGB", "RGBA"):
        return transform
    # white and full red, green and blue; nothing of a usable profile is black there
    corners = Image.fromarray(255 * np.uint8([[[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]]))
    if _brightest(corners.convert(mode), transform) < DARK:
        raise BadProfile("its colour profile turns white or a primary colour black")
    steps = np.round(np.linspace(0, 255, 9)).astype(np.uint8)
    lattice = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)
    before = Image.fromarray(lattice).convert(mode)
    after = np.asarray(ImageCms.applyTransform(before, transform))[..., :3].astype(int)
    return None if abs(after - lattice).max() <= SAME else transform


def _brightest(image: Image.Image, transform) -> int:
    """The largest channel of each pixel, of that pixel where it is least."""
    pixels = np.asarray(ImageCms.applyTransform(image, transform))[..., :3]
    return int(pixels.max(-1).min())


@lru_cache(maxsize=16)
def _grey_curve(profile: bytes) -> np.ndarray | None:
    """(65536,) uint8: sRGB's grey of each 65535th; None where nothing changes.

    Through a table, since LittleCMS's own ones for grey are coarse; an RGB profile's greys are
    those of equal red, green and blue.
    """
    if _space(profile) == "RGB":
        ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2))
    else:
        ramp = Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256))
    transform = _transform(profile, ramp.mode, FLAGS | ImageCms.Flags.NOOPTIMIZE)
    if transform is None:
        return None
    green = np.asarray(ImageCms.applyTransform(ramp, transform))[..., 1].reshape(-1)
    if len(green) == 256:
        green = np.interp(np.arange(65536) / 257, np.arange(256), green).round().astype(np.uint8)
    if green.max() < DARK:
        raise BadProfile("its colour profile turns white black")
    same = abs(green[::257].astype(int) - np.arange(256)).max() <= SAME
    return None if same else green
