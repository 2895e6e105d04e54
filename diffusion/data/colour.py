"""Colours to sRGB: by the ICC profile, or by what PNG, AVIF, HEIC and EXIF say in numbers.

Which one counts, first of all (PNG, third edition): cICP, ICC profile, sRGB, gAMA and cHRM; and of
photographs without any of them, EXIF's R03 (DCF: Adobe RGB). Numbers are made into a profile, so
that there is one way: relative colorimetric with black point compensation, by LittleCMS.
Under a profile that moves no colour by more than SAME levels the pixels stay what they are.
"""

import contextlib
import io
import re
import struct
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from .depth import BadImage, to_8_bit

DARK = 32  # of 255: a profile with which a full colour is darker than that is broken
SAME = 2  # of 255: what one maker's sRGB profile differs from another's
INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
MODES = {  # in which Pillow has pixels of a profile's space
    "RGB": "RGB RGBA RGBa RGBX P PA YCbCr",
    "CMYK": "CMYK",
    "LAB": "LAB",
}
MAX_HEAD = 1 << 22  # bytes of a file that are looked through, or of a profile
# what formats have that Pillow passes over: numbers (cICP), or where a profile is
EMBEDDED = {
    "PNG": rb"\0\0\0\x04cICP(.)(.)(.)(.)",
    "AVIF": rb"colrnclx(..)(..)",
    "HEIF": rb"colrnclx(..)(..)",
    "JPEG2000": rb"....colr\x02..",  # of these the profile is not read
    "GIF": rb"!\xff\x0bICCRGBG1012",
    "BMP": rb"^BM.{12}\x7c\0\0\0.{52}DEBM",
}
D50 = (0.9642, 1.0, 0.8249)  # XYZ of the profile connection space
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # (aX + b)^g above d, cX below
ADOBE = (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
ADOBE_GAMMA = 563 / 256
GAMMA_SAME = 0.05  # gAMA within 5 % of 1/2.2 means sRGB, as libpng takes it
PRIMARIES = {  # ITU-T H.273: x and y of white, red, green and blue
    int(number): tuple(map(float, xy))
    for number, *xy in map(
        str.split,
        """
    1   0.3127 0.3290   0.640 0.330   0.300 0.600   0.150 0.060
    2   0.3127 0.3290   0.640 0.330   0.300 0.600   0.150 0.060
    4   0.310  0.316    0.67  0.33    0.21  0.71    0.14  0.08
    5   0.3127 0.3290   0.64  0.33    0.29  0.60    0.15  0.06
    6   0.3127 0.3290   0.630 0.340   0.310 0.595   0.155 0.070
    7   0.3127 0.3290   0.630 0.340   0.310 0.595   0.155 0.070
    9   0.3127 0.3290   0.708 0.292   0.170 0.797   0.131 0.046
    11  0.314  0.351    0.680 0.320   0.265 0.690   0.150 0.060
    12  0.3127 0.3290   0.680 0.320   0.265 0.690   0.150 0.060
    22  0.3127 0.3290   0.630 0.340   0.295 0.605   0.155 0.077
    """.strip().splitlines(),
    )
}
TRANSFERS = dict.fromkeys((1, 2, 6, 13, 14, 15)) | {4: 2.2, 5: 2.8, 8: 1.0}  # None: sRGB's
LESSER = {"icc_profile", "srgb", "gamma", "chromaticity"}  # in info, after cICP
HDR = {16: "PQ", 18: "HLG"}
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


LATTICE = np.stack(np.meshgrid(*[np.linspace(0, 255, 9).round()] * 3), -1).reshape(-1, 3)
# white and full red, green and blue, then colours from all over the cube
COLOURS = np.uint8([[[255] * 3, [255, 0, 0], [0, 255, 0], [0, 0, 255], *LATTICE]])


class BadProfile(ValueError):
    """Says why a file's statement about its colours cannot be used."""


# what `to_srgb` raises where an image can still be read as sRGB
BAD_PROFILE = (BadProfile, OSError, ImageCms.PyCMSError, ImportError, np.linalg.LinAlgError)


def prepare(image: Image.Image) -> None:
    """Note in image.info what the file says of its colours and Pillow passes over.

    Raises BadImage for HDR, whose values mean nothing in sRGB.
    """
    info = image.info
    if image.format in EMBEDDED:
        position = image.fp.tell()
        _find_embedded(image)
        image.fp.seek(position)
    elif b"R03\0" in (info.get("exif") or b"") and "icc_profile" not in info:
        with contextlib.suppress(Exception):  # Pillow raises nearly everything on damaged EXIF
            exif = image.getexif()
            interop = exif.get_ifd(0xA005).get(1)
            info["adobe_rgb"] = interop == "R03" and exif.get_ifd(0x8769).get(0xA001) != 1
    transfer = info.get("cicp", (1, 1))[1]
    if transfer in HDR:
        raise BadImage(f"an HDR image ({HDR[transfer]}); convert it to sRGB")


def _find_embedded(image: Image.Image) -> None:
    image.fp.seek(0)
    head = image.fp.read(MAX_HEAD).partition(b"jp2c")[0]  # where JPEG 2000's pixels begin
    found = re.search(EMBEDDED[image.format], head, re.DOTALL)
    if not found or (image.format != "PNG" and "icc_profile" in image.info):
        return
    numbers = [int.from_bytes(group, "big") for group in found.groups()]
    if not numbers:
        image.info["unread"] = f"Pillow reads none from a {image.format}"
    elif numbers[3:] not in ([], [1]):
        raise BadImage("a PNG of narrow range (cICP); convert it to full range")
    else:
        image.info["cicp"] = numbers


def to_srgb(image: Image.Image, ignore: bool = False) -> Image.Image:
    """Convert to 8 bits per channel in sRGB, of any mode that Pillow converts to RGB; alpha stays.

    ignore: as if the file said nothing of its colours. Raises BadProfile, or BadImage as
    `depth.to_8_bit` does.
    """
    profile = None if ignore else _profile(image)
    if profile is None:
        return to_8_bit(image)
    space = _space(profile)
    is_grey = image.mode[0] in "1LIF" and image.mode != "LAB"
    if is_grey and space in ("GRAY", "RGB"):
        return to_8_bit(image, _grey_curve(profile))
    if image.mode not in MODES.get(space, "").split():
        raise BadProfile(
            f"its colour profile is for {space or 'nothing known'}, its pixels are {image.mode}"
        )
    if space == "RGB":
        mode = "RGBA" if image.has_transparency_data else "RGB"
        image = to_8_bit(image)
        image = image if image.mode == mode else image.convert(mode)
    transform = _transform(profile, image.mode)
    return image if transform is None else ImageCms.applyTransform(image, transform)


def _profile(image: Image.Image) -> bytes | None:
    """Find the profile of the image's colours; None where it is sRGB or nothing is said."""
    info = image.info
    if "unread" in info:
        raise BadProfile(info["unread"])
    if "cicp" in info:
        primaries, transfer = info["cicp"][:2]
        if primaries in PRIMARIES and transfer in TRANSFERS:
            return make_profile(PRIMARIES[primaries], TRANSFERS[transfer])
        if not LESSER & info.keys():
            raise BadProfile(f"its colours are of an unknown kind (cICP {primaries}, {transfer})")
    if info.get("icc_profile") or "srgb" in info:
        return info.get("icc_profile") or None
    if "gamma" in info or "chromaticity" in info:
        gamma = info.get("gamma", 1 / 2.2)
        if not 0.05 <= gamma <= 20:
            raise BadProfile(f"its gAMA is {gamma:g}")
        same = abs(gamma * 2.2 - 1) <= GAMMA_SAME
        chromaticity = tuple(info.get("chromaticity", PRIMARIES[1]))
        return make_profile(chromaticity, None if same else 1 / gamma)
    return make_profile(ADOBE, ADOBE_GAMMA) if info.get("adobe_rgb") else None


@lru_cache
def make_profile(chromaticity: tuple, gamma: float | None) -> bytes:
    """Build an ICC profile of 8 numbers, x and y of white, red, green and blue, and a power law.

    gamma None: sRGB's curve. Raises BadProfile for impossible primaries.
    """
    xy = np.array(chromaticity, np.float64).reshape(4, 2)
    with np.errstate(all="ignore"):
        xyz = np.stack([xy[:, 0], xy[:, 1], 1 - xy.sum(1)]) / xy[:, 1]  # (3, 4) of luminance 1
        white = xyz[:, 0]
        primaries = xyz[:, 1:]
        cones = (BRADFORD @ D50) / (BRADFORD @ white)
        adapt = np.linalg.solve(BRADFORD, cones[:, None] * BRADFORD)  # from this white to D50
        columns = adapt @ (primaries * np.linalg.solve(primaries, white))
    if not (abs(columns) < 100).all():
        raise BadProfile("its cHRM is impossible")

    def fixed(values):
        return np.round(65536 * np.asarray(values)).astype(">i4").tobytes()

    # a parametric curve of type 3
    curve = b"para\0\0\0\0\0\3\0\0" + fixed(SRGB_CURVE if gamma is None else [gamma, 1, 0, 0, 0])
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(D50)}
    for name, column in zip((b"r", b"g", b"b"), columns.T):
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(column)
        tags[name + b"TRC"] = curve
    at = 132 + 12 * len(tags)
    table = struct.pack(">I", len(tags))
    data = b""
    for name, value in tags.items():
        table += struct.pack(">4sII", name, at + len(data), len(value))
        data += value
    kind = b"mntrRGB XYZ "
    head = struct.pack(">I4xI12s12x4s28x", at + len(data), 0x04200000, kind, b"acsp") + fixed(D50)
    return head.ljust(128, b"\0") + table + data


@lru_cache(maxsize=16)
def _space(profile: bytes) -> str:
    return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip().upper()


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str, flags: int = FLAGS):
    """Build what ImageCms.applyTransform takes, shared by threads; None where nothing changes."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    target = ImageCms.createProfile("sRGB")
    out = "RGBA" if mode == "RGBA" else "RGB"
    transform = ImageCms.buildTransform(source, target, mode, out, INTENT, flags)
    if mode not in ("RGB", "RGBA", "CMYK"):
        return transform
    sample = Image.fromarray(COLOURS).convert(mode)
    after = np.asarray(ImageCms.applyTransform(sample, transform))[..., :3].astype(int)
    full = after[0, : 1 if mode == "CMYK" else 4]  # nothing of a usable profile is black there
    if full.max(-1).min() < DARK:
        raise BadProfile("its colour profile turns white or a primary colour black")
    return None if mode != "CMYK" and abs(after - COLOURS).max() <= SAME else transform


@lru_cache(maxsize=16)
def _grey_curve(profile: bytes) -> np.ndarray | None:
    """Tabulate sRGB's grey of each 65535th: (65536,) uint8; None where nothing changes.

    Through a table, since LittleCMS's own ones for grey are coarse; an RGB profile's greys are
    those of equal red, green and blue.
    """
    if _space(profile) == "RGB":
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None]).convert("RGB")
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
