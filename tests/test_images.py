"""Pixels mean what their file says: masks, colour profiles, depth."""

import io
import json
import re
import struct
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import warm
from PIL import Image, ImageCms, features

from diffusion.data.images import TRANSFORM, BadImage, formats, read_image, read_mask
from diffusion.data.pixels import Pixels
from diffusion.data.sources import folder_set

# --- files, written by hand ----------------------------------------------------------------------


def tiff(
    samples, photometric, *, order="<", kind=1, bits=None, planar=1, extra=(), zip=False, tags=None
):
    """An uncompressed or deflated TIFF of samples (H, W) or (H, W, C), one strip a plane."""
    samples = np.asarray(samples)
    h, w, c = samples.shape if samples.ndim == 3 else (*samples.shape, 1)
    planes = [samples[..., i] for i in range(c)] if planar == 2 else [samples]
    strips = [p.astype(p.dtype.newbyteorder(order)).tobytes() for p in planes]
    if bits == 12:
        strips = ["".join(f"{v:012b}" for v in samples.ravel())]
        strips = [int(strips[0], 2).to_bytes(len(strips[0]) // 8, "big")]
    strips = [zlib.compress(s) for s in strips] if zip else strips
    bits = bits or samples.dtype.itemsize * 8
    fields = {256: ("I", [w]), 257: ("I", [h]), 258: ("H", [bits] * c), 259: ("H", [8 if zip else 1]),
              262: ("H", [photometric]), 273: ("I", [0] * len(strips)), 277: ("H", [c]),
              278: ("I", [h]), 279: ("I", [len(s) for s in strips]), 284: ("H", [planar]),
              339: ("H", [kind] * c), **(tags or {})}  # fmt: skip
    if extra:
        fields[338] = ("H", list(extra))
    types = {"B": 1, "H": 3, "I": 4, "h": 8, "i": 9, "f": 11, "d": 12}

    def packed(value):
        return struct.pack(f"{order}{len(value[1])}{value[0]}", *value[1])

    start = 8 + 2 + 12 * len(fields) + 4
    at = start + sum(len(packed(v)) for v in fields.values() if len(packed(v)) > 4)
    fields[273] = ("I", [at + sum(map(len, strips[:i])) for i in range(len(strips))])
    entries = more = b""
    for tag, value in sorted(fields.items()):
        data = packed(value)
        entries += struct.pack(f"{order}HHI", tag, types[value[0]], len(value[1]))
        entries += (
            data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(f"{order}I", start + len(more))
        )
        more += data if len(data) > 4 else b""
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return (
        head + struct.pack(f"{order}H", len(fields)) + entries + bytes(4) + more + b"".join(strips)
    )


def png(rows, depth, kind, width, *chunks):
    """A PNG of packed rows; chunks: (name, content)."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + r for r in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*c) for c in ((b"IHDR", head), *chunks, (b"IDAT", data), (b"IEND", b""))
    )


def png16(values, kind, *chunks):
    values = np.asarray(values)
    rows = [row.astype(">u2").tobytes() for row in values]
    return png(rows, 16, kind, values.shape[1], *chunks)


def icc(space, tags, device=b"mntr", pcs=b"XYZ "):
    """An ICC profile, version 2.4."""
    at, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += struct.pack(">4sII", name, at + len(data), len(value))
        data += value
    head = struct.pack(
        ">I4xI4s4s4s12x4s28x", at + len(data), 0x02400000, device, space, pcs, b"acsp"
    )
    return (head + s15(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + data


def s15(*values):
    return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))


def xyz(*values):
    return b"XYZ " + bytes(4) + s15(*values)


def power(gamma):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


SRGB_CURVE = np.array([v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
                       for v in np.linspace(0, 1, 4096)])  # fmt: skip
TABLE = b"curv" + bytes(4) + struct.pack(">I4096H", 4096, *(65535 * SRGB_CURVE).round().astype(int))
WHITE = xyz(0.9642, 1, 0.8249)
# colourants as Apple's and Adobe's profiles have them, adapted to D50
P3 = icc(b"RGB ", {b"wtpt": WHITE, b"rTRC": TABLE, b"gTRC": TABLE, b"bTRC": TABLE,
                   b"rXYZ": xyz(0.51512, 0.24120, -0.00105), b"gXYZ": xyz(0.29198, 0.69225, 0.04189),
                   b"bXYZ": xyz(0.15710, 0.06657, 0.78407)})  # fmt: skip
ADOBE = icc(b"RGB ", {b"wtpt": WHITE, b"rTRC": power(2.19921875), b"gTRC": power(2.19921875),
                      b"bTRC": power(2.19921875), b"rXYZ": xyz(0.60974, 0.31111, 0.01947),
                      b"gXYZ": xyz(0.20528, 0.62567, 0.06087), b"bXYZ": xyz(0.14919, 0.06322, 0.74457)})  # fmt: skip
LINEAR_GREY = icc(b"GRAY", {b"wtpt": WHITE, b"kTRC": power(1.0)})
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encode(linear):
    """sRGB's curve: linear light of 0 ... 1 as 0 ... 255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def decode(value):
    v = np.asarray(value) / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


# linear light of Display P3 -> of sRGB (both D65), as the CSS colour specification gives it
P3_TO_SRGB = np.array([[1.2249401762, -0.2249401762, 0.0], [-0.0420569547, 1.0420569547, 0.0],
                       [-0.0196375546, -0.0786360456, 1.0982736001]])  # fmt: skip


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def near(found, expected, tolerance=1):
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    assert abs(found - expected).max() <= tolerance, (found, expected)


GREEN = (80, 180, 60)
KINDS = [
    ("PNG", {}, 1),
    ("JPEG", {"quality": 100}, 2),
    ("WEBP", {"lossless": True}, 1),
    ("TIFF", {}, 1),
]
if features.check("avif"):
    KINDS.append(("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 8))

# --- colour --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, options, tolerance", KINDS, ids=[k[0] for k in KINDS])
@pytest.mark.parametrize("profile, expected", [
    (P3, (0, 183, 29)), (ADOBE, (0, 181, 42)), (SRGB, GREEN), (None, GREEN),
], ids=["P3", "Adobe RGB", "sRGB", "none"])  # fmt: skip
def test_profiles_of_all_formats(tmp_path, kind, options, tolerance, profile, expected):
    data = saved(Image.new("RGB", (16, 16), GREEN), kind, icc_profile=profile, **options)
    near(read_image(data, None), expected, tolerance)
    (tmp_path / "image").write_bytes(data)
    near(read_image(tmp_path / "image", 8), expected, tolerance)


def test_a_profile_by_the_matrix_of_its_specification():
    """All that stays inside sRGB; beyond it the nearest value of each channel."""
    colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    expected = encode(decode(colours) @ P3_TO_SRGB.T)
    near(read_image(saved(Image.fromarray(colours), "PNG", icc_profile=P3), None), expected, 2)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "I;16"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_an_srgb_profile_changes_no_bit(mode, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode if mode != "I;16" else "L")
    if mode == "I;16":
        image = Image.fromarray(pixels[..., :2].copy().view(np.uint16)[..., 0])
    plain, tagged = (read_image(saved(image, kind, **o), None) for o in ({}, {"icc_profile": SRGB}))
    assert np.array_equal(plain, tagged)


def test_colours_are_converted_before_they_are_laid_over_white():
    found = read_image(saved(Image.new("RGBA", (4, 4), (*GREEN, 128)), "PNG", icc_profile=P3), None)
    near(found, np.array([0, 183, 29]) * 128 / 255 + 127)


def test_profiles_of_palettes_and_greys():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, *GREEN])
    near(read_image(saved(palette, "PNG", icc_profile=P3), None), (0, 183, 29))
    near(read_image(saved(palette, "PNG", icc_profile=P3, transparency=1), None), 255)
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    expected = encode(np.arange(256).reshape(16, 16, 1) / 255) + np.zeros(3)
    for kind in ("PNG", "TIFF", "JPEG"):
        options = {"quality": 100} if kind == "JPEG" else {}
        found = read_image(saved(grey, kind, icc_profile=LINEAR_GREY, **options), None)
        near(found, expected, 1 if kind != "JPEG" else 16)  # linear darks are steep
    near(read_image(saved(Image.new("LA", (2, 2), (55, 255)), "PNG", icc_profile=LINEAR_GREY), None),
         encode(55 / 255))  # fmt: skip


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_greys_are_converted_at_their_depth(kind):
    """Of 8 bits, linear darks would be a few steps."""
    values = np.linspace(0, 2000, 256).astype(np.uint16).reshape(16, 16)
    found = read_image(saved(Image.fromarray(values), kind, icc_profile=LINEAR_GREY), None)
    near(found[..., 0], encode(values / 65535))
    assert len(np.unique(found)) > 45


def lab_to_srgb(lightness, a, b):
    fy = (lightness + 16) / 116
    f = np.array([fy + a / 500, fy, fy - b / 200])
    d50 = np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2) * [0.9642, 1, 0.8249]
    to_srgb = [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540],
               [0.0719453, -0.2289914, 1.4052427]]  # Bradford, of D50  # fmt: skip
    return encode(np.array(to_srgb) @ d50)


INKS = {(0, 0, 0): (100, 0, 0), (1, 0, 0): (60, -20, -30), (0, 1, 0): (55, 40, 0), (0, 0, 1): (85, 0, 50),
        (1, 1, 0): (35, 10, -30), (1, 0, 1): (50, -30, 20), (0, 1, 1): (50, 35, 30), (1, 1, 1): (0, 0, 0)}  # fmt: skip


def cmyk_profile():
    """Ink's corners -> Lab, linear between; black is black."""
    table = b""
    for i in range(16):
        c, m, y, k = (i >> 3) & 1, (i >> 2) & 1, (i >> 1) & 1, i & 1
        lightness, a, b = (0, 0, 0) if k else INKS[c, m, y]
        table += bytes([round(lightness * 2.55), a + 128, b + 128])
    one = s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    ramp = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + one + ramp * 4 + table + ramp * 3
    return icc(b"CMYK", {b"wtpt": WHITE, b"A2B0": lut, b"A2B1": lut}, b"prtr", b"Lab ")


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
@pytest.mark.parametrize("inks", INKS, ids=str)
def test_cmyk_by_its_profile(kind, inks):
    """Pillow's JPEGs are inverted, as Photoshop's are."""
    image = Image.new("CMYK", (16, 16), tuple(255 * i for i in inks) + (0,))
    options = {"quality": 100} if kind == "JPEG" else {}
    data = saved(image, kind, icc_profile=cmyk_profile(), **options)
    near(read_image(data, None), lab_to_srgb(*INKS[inks]), 5)
    near(read_image(saved(image, kind, **options), None), 255 * (1 - np.array(inks)), 1)


def test_lab():
    lab = np.uint8([[[128, 10, 256 - 20], [255, 0, 0], [0, 0, 0]]])
    expected = [lab_to_srgb(128 / 2.55, 10, -20), (255,) * 3, (0,) * 3]
    near(read_image(tiff(lab, 8), None)[0], expected, 2)


# --- colour in numbers ---------------------------------------------------------------------------

P3_XY = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
SRGB_XY = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


def gama(gamma):
    return b"gAMA", struct.pack(">I", round(gamma * 100000))


def chrm(xy):
    return b"cHRM", struct.pack(">8I", *xy)


def iccp(profile):
    return b"iCCP", b"p\0\0" + zlib.compress(profile)


def cicp(primaries, transfer, full=1):
    return b"cICP", bytes([primaries, transfer, 0, full])


SRGB_CHUNK = (b"sRGB", b"\0")
P3_GREEN, LINEAR_GREEN = (0, 183, 29), encode(np.array(GREEN) / 255)


@pytest.mark.parametrize("chunks, expected", [
    ([], GREEN), ([gama(1.0)], LINEAR_GREEN), ([gama(0.45455)], GREEN), ([gama(0.4545)], GREEN),
    ([gama(1 / 1.8)], encode((np.array(GREEN) / 255) ** 1.8)),
    ([gama(1.0), SRGB_CHUNK], GREEN), ([gama(0.45455), chrm(SRGB_XY)], GREEN),
    ([gama(0.45455), chrm(P3_XY)], P3_GREEN), ([chrm(P3_XY)], P3_GREEN),
    ([gama(1.0), chrm(P3_XY)], encode(P3_TO_SRGB @ np.array(GREEN) / 255)),
    ([chrm(P3_XY), SRGB_CHUNK], GREEN), ([gama(1.0), iccp(P3)], P3_GREEN),
    ([cicp(12, 13)], P3_GREEN), ([cicp(1, 13)], GREEN), ([cicp(2, 2)], GREEN),
    ([cicp(1, 8)], LINEAR_GREEN), ([cicp(12, 13), iccp(ADOBE)], P3_GREEN),
    ([cicp(1, 13), gama(1.0)], GREEN), ([cicp(12, 13), SRGB_CHUNK], P3_GREEN),
    ([chrm([0] * 8)], GREEN), ([chrm([40000, 30000] * 4)], GREEN), ([gama(0.00001)], GREEN),
], ids=lambda c: " ".join(n.decode() for n, _ in c) if isinstance(c, list) else "")  # fmt: skip
def test_what_a_png_says_of_its_colours(chunks, expected):
    near(read_image(png([bytes(GREEN)], 8, 2, 1, *chunks), None)[0, 0], expected)
    palette = png([b"\0"], 8, 3, 1, *chunks, (b"PLTE", bytes(GREEN)))
    near(read_image(palette, None)[0, 0], expected)
    clear = png([bytes([*GREEN, 0])], 8, 6, 1, *chunks)
    near(read_image(clear, None)[0, 0], 255)


def test_greys_of_a_linear_png():
    values = np.arange(0, 65536, 257)[None]
    expected = encode(values[0, :, None] / 65535)
    near(read_image(png16(values, 0, gama(1.0)), None)[0], expected)
    near(read_image(png([bytes(range(256))], 8, 0, 256, gama(1.0)), None)[0], expected)
    near(
        read_image(png([bytes(range(256))], 8, 0, 256, chrm(P3_XY)), None)[0, :, 0],
        np.arange(256),
        0,
    )


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_by_name(transfer, name):
    with pytest.raises(BadImage, match=f"HDR.*{name}"):
        read_image(png([bytes(GREEN)], 8, 2, 1, cicp(9, transfer)), None)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_what_an_avif_says_of_its_colours():
    data = saved(Image.new("RGB", (16, 16), GREEN), "AVIF", quality=100, subsampling="4:4:4")
    at = data.index(b"colrnclx") + 8
    near(read_image(data, None), GREEN, 8)
    near(read_image(data[:at] + struct.pack(">HH", 12, 13) + data[at + 4 :], None), P3_GREEN, 10)


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow reads no JPEG 2000")
def test_a_profile_in_jpeg_2000_is_not_used_and_named():
    data = saved(Image.new("RGB", (16, 16), GREEN), "JPEG2000", irreversible=False)
    at = data.index(b"colr") - 4
    (length,) = struct.unpack(">I", data[at : at + 4])
    box = struct.pack(">I4sBBB", 11 + len(P3), b"colr", 2, 0, 0) + P3
    head = data.index(b"jp2h") - 4
    (whole,) = struct.unpack(">I", data[head : head + 4])
    grown = struct.pack(">I", whole + len(box) - length)
    changed = data[:head] + grown + data[head + 4 : at] + box + data[at + length :]
    near(read_image(data, None), GREEN)
    said = []
    near(read_image(changed, None, said.append), GREEN)
    assert len(said) == 1 and "profile cannot be used" in said[0]


def test_a_profile_in_gif_is_not_used_and_named():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *GREEN])
    data = saved(image, "GIF")
    at = 13 + 3 * 2 ** ((data[10] & 7) + 1)  # after the palette
    pieces = b"".join(
        bytes([len(P3[i : i + 255])]) + P3[i : i + 255] for i in range(0, len(P3), 255)
    )
    near(read_image(data, None), GREEN)
    tagged = data[:at] + b"\x21\xff\x0bICCRGBG1012" + pieces + b"\0" + data[at:]
    said = []
    near(read_image(tagged, None, said.append), GREEN)
    assert len(said) == 1 and "profile cannot be used" in said[0]


@pytest.mark.parametrize("embedded", [True, False])
def test_a_profile_in_bmp_is_not_used_and_named(embedded):
    pixels = bytes([*reversed(GREEN), 0])  # a row is filled up to four bytes
    head = struct.pack("<IiiHHIIiiII", 124, 1, 1, 1, 24, 0, 4, 0, 0, 0, 0) + bytes(16)
    head += b"DEBM" if embedded else b"BGRs"
    head = (head + bytes(48) + struct.pack("<IIII", 4, 124 + len(pixels), len(P3), 0)).ljust(
        124, b"\0"
    )
    data = b"BM" + struct.pack("<IHHI", 138 + len(pixels) + len(P3), 0, 0, 138) + head + pixels + P3
    said = []
    near(read_image(data, None, said.append), GREEN)
    assert len(said) == embedded and all("profile cannot be used" in line for line in said)


@pytest.mark.parametrize("interop, colour_space, expected", [
    ("R03", 65535, (0, 181, 42)), ("R98", 1, GREEN), ("R03", 1, GREEN), ("THM", 65535, GREEN),
])  # fmt: skip
@pytest.mark.parametrize("turned", [1, 6])
def test_adobe_rgb_of_a_camera(interop, colour_space, expected, turned):
    exif = Image.Exif()
    exif[0x0112] = turned
    exif[0x8769] = {0xA001: colour_space, 0xA005: {1: interop}}
    image = Image.new("RGB", (16, 16), GREEN)
    near(read_image(saved(image, "JPEG", quality=100, exif=exif.tobytes()), None), expected, 2)
    tagged = saved(image, "JPEG", quality=100, exif=exif.tobytes(), icc_profile=SRGB)
    near(read_image(tagged, None), GREEN, 2)


def test_a_plug_in_without_exif(monkeypatch):
    """pillow_heif says None where there is none."""
    open_image = Image.open

    def opened(*args, **options):
        image = open_image(*args, **options)
        image.info["exif"] = None
        return image

    monkeypatch.setattr(Image, "open", opened)
    near(read_image(saved(Image.new("RGB", (4, 4), GREEN), "TIFF", icc_profile=P3), 4), P3_GREEN)


def test_a_heic_photograph():
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    formats.cache_clear()
    image = Image.new("RGB", (64, 64), GREEN)
    for profile, expected in ((P3, P3_GREEN), (None, GREEN)):
        data = saved(image, "HEIF", quality=-1, icc_profile=profile)
        near(read_image(data, None), expected, 2)
        with pytest.raises(BadImage, match="^(?!.*pip install)"):
            read_image(data[:200], None)
    # what it says in numbers
    for primaries, transfer, expected in ((12, 13, P3_GREEN), (1, 8, LINEAR_GREEN), (9, 16, None)):
        numbers = dict(color_primaries=primaries, transfer_characteristics=transfer)
        data = saved(image, "HEIF", quality=-1, save_nclx_profile=True, **numbers)
        if expected is None:
            with pytest.raises(BadImage, match="HDR.*PQ"):
                read_image(data, None)
        else:
            near(read_image(data, None), expected, 3)
    # depth, transparency, and a camera held upright
    deep = heif.from_bytes("RGB;16", (64, 64), np.full((64, 64, 3), 180 * 257, "u2").tobytes())
    file = io.BytesIO()
    deep.save(file, quality=-1)
    near(read_image(file.getvalue(), None), 180, 2)
    near(read_image(saved(Image.new("RGBA", (64, 64), (*GREEN, 0)), "HEIF", quality=-1), None), 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.paste((200, 30, 90), (0, 0, 64, 32))  # above: turned to the right
    found = read_image(saved(image, "HEIF", quality=-1, exif=exif.tobytes()), None)
    near(found[4:-4, 40:-4], (200, 30, 90), 4)
    near(found[4:-4, 4:24], GREEN, 4)


def test_heic_without_its_plug_in_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    formats.cache_clear()
    with pytest.raises(BadImage, match="pip install pillow-heif"):
        read_image(tmp_path / "a.heic", 8)
    with pytest.raises(BadImage, match="pip install pillow-heif"):
        read_image((tmp_path / "a.heic").read_bytes(), 8)
    formats.cache_clear()


@pytest.mark.parametrize(
    "kind, place",
    [
        (b"zTXt", "before"),
        (b"zTXt", "after"),
        (b"iTXt", "before"),
        (b"iTXt", "after"),
        (b"", "many"),
    ],
)
def test_much_text_in_a_png_does_not_hide_its_pixels(tmp_path, kind, place):
    """Pillow refuses it for the text, which may stand on either side of the pixels."""
    text = zlib.compress(bytes(1 << 22))
    body = b"k\0\0" + text if kind == b"zTXt" else b"k\0\1\0\0\0" + text
    rows = [bytes([200, 30, 90] * 8)] * 8
    plain = png(rows, 8, 2, 8)
    chunk = png(rows, 8, 2, 8, (kind, body))[33 : -(len(plain) - 33)]
    data = {"before": plain[:33] + chunk + plain[33:], "after": plain[:-12] + chunk + plain[-12:]}
    if place == "many":
        data["many"] = png(rows, 8, 2, 8, *[(b"tEXt", b"k\0" + b"x" * 900_000)] * 80)
    (tmp_path / "a.png").write_bytes(data[place])
    for source in (tmp_path / "a.png", data[place]):
        assert (read_image(source, 8) == [200, 30, 90]).all()
    with pytest.raises(ValueError):
        Image.open(tmp_path / "a.png").load()


@pytest.mark.parametrize(
    "chunk, named",
    [
        ((b"zTXt", b"k\0\5" + zlib.compress(b"x")), False),
        ((b"iCCP", b"k\0\5" + zlib.compress(P3)), True),
        ((b"iCCP", b"k\0\0" + zlib.compress(P3 + bytes(1 << 21))), True),
        ((b"pHYs", b"\0"), True),
        ((b"gAMA", b"\0"), True),
        ((b"eXIf", b"MM\0*\0\0"), False),
    ],
    ids=lambda value: value[0].decode() if isinstance(value, tuple) else "",
)
def test_damaged_chunks_of_a_png_do_not_hide_its_pixels(chunk, named):
    data = png([bytes([*GREEN, 0, 0, 0])], 8, 2, 2, (b"tRNS", bytes(6)), chunk)
    said = []
    near(read_image(data, None, said.append)[0], [GREEN, (255,) * 3])
    assert len(said) == named and all("profile cannot be used" in line for line in said)
    for wrong in (data.replace(chunk[0], b"xxxx"), data):  # its sum is wrong, too
        at = wrong.index(b"IDAT")
        with pytest.raises(BadImage):
            read_image(wrong[: at + 4] + bytes(8) + wrong[at + 12 :], None)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"Exif\0\0ExifExif", bytes(40), b"Exif\0\0MM\0*\0\0"])
def test_damaged_exif_is_as_none(kind, exif):
    image = Image.new("RGB", (16, 16), GREEN)
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    near(read_image(saved(image, kind, exif=exif, **options), None), GREEN, 2)


def test_a_giant_tile_is_refused_before_it_is_decoded(tmp_path):
    """16x16 pixels in a tile of 11000x11000: a gigabyte."""
    file = tmp_path / "a.tiff"
    data = bytearray(saved(Image.new("RGB", (16, 16)), "TIFF"))
    tiles = {273: 324, 279: 325, 278: 322, 284: 323}  # of a strip's tags, those of a tile
    (start,) = struct.unpack_from("<I", data, 4)
    for at in range(start + 2, start + 2 + 12 * data[start], 12):
        tag = tiles.get(struct.unpack_from("<H", data, at)[0])
        if tag in (322, 323):
            struct.pack_into("<HHII", data, at, tag, 4, 1, 11_000)
        elif tag:
            struct.pack_into("<H", data, at, tag)
    file.write_bytes(data)
    with pytest.raises(BadImage, match="11000x11000"):
        read_image(file, 8)


def test_a_jpeg_of_very_many_scans_is_refused(tmp_path):
    """A few kB that take minutes; other progressive ones are read, also with a film behind them."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    plain = saved(image, "JPEG", progressive=True, quality=80)
    film = plain + b"\xff\xda".join([bytes(1 << 15)] * 200)
    for data in (plain, film):
        assert np.array_equal(read_image(data, None), np.asarray(Image.open(io.BytesIO(plain))))
    end = plain.rindex(b"\xff\xd9")
    scan = plain[plain.rindex(b"\xff\xda") : end]
    head = plain[: end - len(scan)]
    small = head + b"\xff\xda".join([b"", *[b"\0\x0c"] * 150]) + plain[end:]
    with pytest.raises(BadImage, match="scans"):
        read_image(small, None)
    (tmp_path / "a.jpg").write_bytes(small)
    with pytest.raises(BadImage, match="scans"):
        read_image(tmp_path / "a.jpg", 8)


def test_an_unknown_cicp_leaves_it_to_the_profile():
    rows, unknown = [bytes(GREEN * 4)], cicp(200, 200)
    near(read_image(png(rows, 8, 2, 4, unknown, iccp(P3)), 1), P3_GREEN)
    near(
        read_image(png(rows, 8, 2, 4, cicp(12, 13), iccp(SRGB)), 1), P3_GREEN
    )  # a known one counts
    near(read_image(png(rows, 8, 2, 4, unknown), 1), GREEN)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("dark", ["rgb", "b"])
def test_a_profile_that_turns_colours_black_is_broken(mode, dark):
    tags = {b"wtpt": WHITE, b"rXYZ": xyz(0.436, 0.222, 0.014), b"gXYZ": xyz(0.385, 0.717, 0.097),
            b"bXYZ": xyz(0.143, 0.061, 0.714)}  # fmt: skip
    tags |= {f"{c}TRC".encode(): power(2.2) for c in "rgb"}
    tags |= {f"{c}XYZ".encode(): xyz(0, 0, 0) for c in dark}
    image = Image.new("RGB", (4, 4), (200, 120, 40)).convert(mode)
    found = []
    pixels = read_image(saved(image, "PNG", icc_profile=icc(b"RGB ", tags)), 4, found.append)
    near(pixels, np.asarray(image.convert("RGB")), 0)
    assert len(found) == 1 and "black" in found[0]


def test_threads_share_a_profile():
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    data = [saved(Image.fromarray(np.roll(pixels, i)), "PNG", icc_profile=P3) for i in range(4)]
    alone = [read_image(d, None) for d in data]
    with ThreadPoolExecutor(8) as pool:
        for i, found in enumerate(pool.map(lambda i: read_image(data[i % 4], None), range(40))):
            assert np.array_equal(found, alone[i % 4])


# --- depth ---------------------------------------------------------------------------------------

GREYS = np.array([[0, 64, 128, 255]])


@pytest.mark.parametrize("zip", [False, True], ids=["raw", "deflate"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype, scale, shift, options", [
    ("u1", 1, 0, {}), ("u2", 257, 0, {}), ("f4", 1 / 255, 0, {"kind": 3}),
    ("u2", 16.0588, 0, {"bits": 12}), ("u2", 257, 0, {"tags": {341: ("H", [65535]), 281: ("H", [4095])}}),
    ("f4", 1 / 255, 0, {"kind": 3, "tags": {340: ("f", [0]), 341: ("d", [1])}}),
], ids=str)  # fmt: skip
def test_greys_are_scaled_by_the_range_of_their_type(dtype, scale, shift, options, order, zip):
    """Or refused by name, where Pillow cannot read them (some of the other byte order)."""
    values = (
        (GREYS * scale + shift).astype(dtype)
        if dtype == "f4"
        else (GREYS * scale + shift).round().astype(dtype)
    )
    try:
        found = read_image(tiff(values, 1, order=order, zip=zip, **options), None)
    except BadImage as error:
        bits = options.get("bits", values.dtype.itemsize * 8)
        misread = bits in (12, 32) or (zip and "kind" in options)
        assert order == ">" and misread and "save it as PNG" in str(error)
        return
    near(found[..., 0], GREYS)


@pytest.mark.parametrize("zip", [False, True], ids=["raw", "deflate"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype, most, kind", [("u1", 255, 1), ("u2", 65535, 1), ("f4", 1, 3)])
def test_white_is_zero(dtype, most, kind, order, zip):
    values = (most - GREYS / 255 * most).astype(dtype)
    if order == ">" and (dtype == "u2" or (dtype == "f4" and zip)):
        with pytest.raises(BadImage, match="Pillow.*PNG"):
            read_image(tiff(values, 0, kind=kind, order=order, zip=zip), None)
    else:
        near(read_image(tiff(values, 0, kind=kind, order=order, zip=zip), None)[..., 0], GREYS)


RGBA = np.array([[[0, 64, 128, 255], [255, 128, 64, 255], [9, 99, 199, 0]]])


@pytest.mark.parametrize("zip", [False, True], ids=["raw", "deflate"])
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype, scale", [("u1", 1), ("u2", 257), ("u2", 256)])
@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_a_tiff(dtype, scale, channels, order, planar, zip):
    values = (RGBA[..., :channels] * scale + (scale == 256) * 7).astype(dtype)
    data = tiff(values, 2, order=order, planar=planar, zip=zip, extra=(2,) * (channels - 3))
    if dtype == "u2" and planar == 2 and not zip:
        with pytest.raises(BadImage, match="16-bit.*in planes.*PNG"):
            read_image(data, None)
        return
    expected = RGBA[..., :3].copy()
    if channels == 4:
        expected[0, 2] = 255
    near(read_image(data, None), expected)


@pytest.mark.parametrize("data, match", [
    (tiff(GREYS.astype("i4"), 1, kind=2), "32-bit signed integer.*range"),
    (tiff(GREYS.astype("i4") * 257, 1, kind=2), "32-bit signed integer.*range"),
    (tiff(GREYS.astype("u4"), 1), "32-bit unsigned integer.*range"),
    (tiff(GREYS.astype("i2"), 1, kind=2), "16-bit signed integer.*range"),
    (tiff(GREYS.astype("i1"), 1, kind=2), "8-bit signed integer"),
    (tiff(GREYS.astype("f4"), 1, kind=3), "from 0 to 255.*0 to 1"),
    (tiff(-GREYS.astype("f4"), 1, kind=3), "from -255 to (-)?0.*0 to 1"),
    (tiff(np.float32([[0, np.nan]]), 1, kind=3), "nan"), (tiff(np.float32([[0, np.inf]]), 1, kind=3), "inf"),
    (tiff(GREYS.astype("u2"), 1, tags={341: ("H", [4095])}), "16-bit.*range"),
    (tiff(GREYS.astype("f4"), 1, kind=3, tags={341: ("f", [255])}), "32-bit floats.*range"),
    (tiff(GREYS.astype("i2"), 1, kind=2, tags={340: ("h", [-32768]), 341: ("h", [32767])}), "16-bit.*range"),
    (tiff(GREYS.astype("u4"), 1, tags={341: ("I", [255])}), "32-bit.*range"),
    (tiff(GREYS / 255, 1, kind=3), "Pillow can read.*PNG"),
    (tiff((GREYS / 255).astype("f2"), 1, kind=3), "Pillow can read.*PNG"),
    (tiff((RGBA[..., :3] / 255).astype("f4"), 2, kind=3), "Pillow can read.*PNG"),
    (tiff(RGBA.astype("u2"), 5, planar=2), "16-bit.*CMYK in planes"),
    (tiff(np.zeros((4, 6), "u1"), 6, tags={258: ("H", [8] * 3), 277: ("H", [3])}), "YCbCr"),
    (b"Pf 2 1 -1.0\n" + struct.pack("<2f", 0, 255), "from 0 to 255"),
    (tiff(RGBA[..., :2].astype("u1"), 1, planar=2, extra=(2,)), "8-bit.*LA in planes"),
    (tiff(RGBA[..., :2].astype("u1"), 1, planar=2, extra=(2,), zip=True), "8-bit.*LA in planes"),
    (tiff(RGBA[..., :2].astype("u1"), 0, planar=2, extra=(0,)), "8-bit.*L in planes"),
    (tiff(RGBA[..., :2].astype("u1"), 0, extra=(2,)), "Pillow can read.*PNG"),
    (tiff(GREYS.astype("u2"), 0, order=">"), "Pillow can read.*PNG"),
], ids=range(24))  # fmt: skip
def test_what_has_no_certain_range_is_refused_by_name(data, match):
    with pytest.raises(BadImage, match=match):
        read_image(data, 8)


def test_floats_a_little_beyond_white_are_cut_off():
    near(read_image(tiff(np.float32([[-0.1, 0.5, 1.2]]), 1, kind=3), None)[0, :, 0], [0, 128, 255])


@pytest.mark.parametrize("most", [1, 15, 100, 255, 1023, 4095, 65535])
@pytest.mark.parametrize("magic", [b"P5", b"P6", b"P2", b"P3"])
def test_netpbm_of_any_maximum(magic, most):
    values = [0, most // 2, most]
    binary = np.array(values).astype("u1" if most < 256 else ">u2").tobytes()
    plain = " ".join(map(str, values)).encode()
    size = b"3 1" if magic in (b"P5", b"P2") else b"1 1"
    data = magic + b" " + size + b" %d\n" % most + (binary if magic in (b"P5", b"P6") else plain)
    found = read_image(data, None)[0]
    near(found[:, 0] if len(found) == 3 else found[0], np.array(values) * 255 / most)


TRNS = b"tRNS"


@pytest.mark.parametrize("data, clear", [
    (png([bytes([0, 64, 128, 255])], 8, 0, 4, (TRNS, struct.pack(">H", 64))), 1),
    (png([bytes([0b00011011])], 2, 0, 4, (TRNS, struct.pack(">H", 2))), 2),
    (png([bytes([0x04, 0x8F])], 4, 0, 4, (TRNS, struct.pack(">H", 4))), 1),
    (png([bytes([0b01010000])], 1, 0, 4, (TRNS, struct.pack(">H", 0))), (0, 2)),
    (png16(GREYS * 257, 0, (TRNS, struct.pack(">H", 64 * 257))), 1),
    (png16(GREYS * 257 + [[0, 1, 0, 0]], 0, (TRNS, struct.pack(">H", 64 * 257))), ()),
], ids=range(6))  # fmt: skip
def test_the_transparent_grey_of_a_png(data, clear):
    opaque = data.replace(TRNS, b"tRNs")  # not known: passed over
    at = opaque.find(b"tRNs")
    length = struct.unpack(">I", opaque[at - 4 : at])[0]
    crc = struct.pack(">I", zlib.crc32(opaque[at : at + 4 + length]))
    opaque = opaque[: at + 4 + length] + crc + opaque[at + 8 + length :]
    expected = read_image(opaque, None)
    expected[0, list(clear) if isinstance(clear, tuple) else clear] = 255
    assert np.array_equal(read_image(data, None), expected)


def test_deep_images_of_one_column_take_no_time():
    """Bands of so many rows would be as many as there are rows."""
    column = np.zeros((8_000_000, 1), np.uint16)
    began = time.process_time()
    read_image(saved(Image.fromarray(column), "TIFF"), 1)
    assert time.process_time() - began < 2


def test_the_transparent_colour_of_a_deep_png_is_refused_by_name():
    """Pillow keeps 8 bits of the pixels, which would be others than the colour is."""
    colours = np.array([[[0, 64, 128], [255, 0, 0]]]) * 257
    near(read_image(png16(colours, 2), None)[0], [(0, 64, 128), (255, 0, 0)])
    with pytest.raises(BadImage, match="16 bits.*transparent"):
        read_image(png16(colours, 2, (TRNS, struct.pack(">HHH", *colours[0, 0]))), None)


def test_premultiplied_alpha():
    for values, photometric in ([[[0, 32, 64, 128]]], 2), ([[[64, 128]]], 1):
        found = read_image(tiff(np.uint8(values), photometric, extra=(1,)), None)
        near(found[0, 0], np.array(values[0][0][:-1]) + 127, 2)


# --- what is said --------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path):
    """Twelve ordinary images, and some that deserve a word."""
    folder = tmp_path / "odd"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"good{i:02d}.png")
    Image.fromarray(noise[0]).save(folder / "junk.jpg", icc_profile=b"junk" * 50)
    Image.fromarray(noise[0]).save(folder / "other.png", icc_profile=LINEAR_GREY)
    Image.new("RGB", (24, 24), (250, 10, 20)).save(folder / "red.png")
    Image.fromarray(noise[0, ..., 0] // 16 + np.uint8(100)).save(folder / "faint.png")
    Image.fromarray(noise[0, ..., 0].astype(np.uint16) * 16).save(folder / "12in16.png")
    Image.new("RGBA", (24, 24), (9, 9, 9, 0)).save(folder / "clear.png")
    (folder / "deep.tiff").write_bytes(tiff(noise[0, ..., 0].astype("i4"), 1, kind=2))
    return folder


ODD = {"junk.jpg": "profile", "other.png": "profile.*GRAY", "red.png": "one colour, .250, 10, 20",
       "faint.png": "one colour", "12in16.png": "one colour", "clear.png": "one colour, .255, 255, 255"}  # fmt: skip


def test_odd_images_are_used_counted_and_named(odd, tmp_path, capsys):
    kept = Pixels(folder_set(odd), 16, tmp_path / "cache")
    said = "".join(capsys.readouterr())
    assert len(kept) == 18 and f"{len(ODD)} of 19 images are used" in said
    for name, why in ODD.items():
        assert said.count(repr(name)) == 1
        assert any(re.search(why, line) for line in said.splitlines() if repr(name) in line), name
    assert "1 of 19 images cannot be used" in said and "'deep.tiff'" in said and "good" not in said


def test_odd_images_are_named_once_without_a_cache(odd, capsys):
    pixels = Pixels(folder_set(odd), 16, None)
    for _ in range(2):
        pixels[np.arange(len(pixels))]
    said = "".join(capsys.readouterr())
    for name in [*ODD, "deep.tiff"]:
        assert said.count(repr(name)) == 1, name
    assert "good" not in said


def test_the_command_says_it_and_trains(odd, tmp_path):
    options = ("--image_size", 16, "--unet_dim", 8, "--dim_mults", "1,2", "--heads", 2, "--batch_size", 4,
               "--train_steps", 6, "--save_and_sample_every", 6, "--num_samples", 0, "--time_steps", 10,
               "--device", "cpu", "--amp", "no", "--save_folder", "run")  # fmt: skip
    for more in ((), ("--no_cache", "--overwrite")):
        done = warm.script("train.py", "--data", odd, *options, *more, cwd=tmp_path)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert "one colour" in said and "'red.png'" in said
        assert json.loads((tmp_path / "run" / "metadata.json").read_text())["step"] == 6


def test_old_caches_are_not_used(odd, tmp_path):
    """A picture decoded by what read pixels before would be another one."""
    assert int(TRANSFORM.rpartition(";")[2]) >= 2


# --- masks ---------------------------------------------------------------------------------------

KEEP, PAINT = 0, 255


def strokes(mode: str, ground, stroke) -> Image.Image:
    """A stroke over columns 2 and 3 of 6x4 pixels."""
    image = Image.new(mode, (6, 4), ground)
    image.paste(stroke, (2, 0, 4, 4))
    return image


STROKE = np.tile(np.uint8([KEEP, KEEP, PAINT, PAINT, KEEP, KEEP]), (4, 1))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("image", [
    strokes("L", 0, 255), strokes("RGB", "black", "white"), strokes("1", 0, 1), strokes("P", 0, 1),
    strokes("RGBA", (0, 0, 0, 0), "white"),  # white strokes on a transparent layer
    strokes("RGBA", (255, 255, 255, 0), "white"),  # the same, as many editors write it
    strokes("RGBA", "black", "white"),
    strokes("LA", (255, 0), (255, 255)), strokes("LA", (0, 255), (255, 255)),
    Image.fromarray(np.uint16(STROKE) * 257),
], ids=lambda i: i.mode)  # fmt: skip
def test_white_is_repainted_and_transparent_is_not(tmp_path, image, suffix):
    if image.mode == "P":
        image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(tmp_path / f"m.{suffix}")
    assert np.array_equal(read_mask(tmp_path / f"m.{suffix}"), STROKE)


def test_a_palette_s_transparent_entry_is_not_repainted(tmp_path):
    image = strokes("P", 0, 1)
    image.putpalette([255, 255, 255, 255, 255, 255])
    image.save(tmp_path / "m.png", transparency=0)
    assert np.array_equal(read_mask(tmp_path / "m.png"), STROKE)


def test_a_soft_brush_is_luminance_times_alpha(tmp_path):
    Image.new("LA", (2, 2), (200, 240)).save(tmp_path / "m.png")
    assert (read_mask(tmp_path / "m.png") == round(200 * 240 / 255)).all()


def test_a_mask_is_turned_by_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    strokes("L", 0, 255).save(tmp_path / "m.png", exif=exif)
    assert np.array_equal(read_mask(tmp_path / "m.png"), STROKE.T)


@pytest.mark.parametrize("image", [
    strokes("RGBA", (0, 0, 0, 0), "black"), strokes("LA", (0, 0), (0, 255)),
    strokes("RGBA", (255, 255, 255, 0), "black"), Image.new("RGBA", (6, 4), (255, 255, 255, 0)),
], ids=range(4))  # fmt: skip
def test_a_mask_that_says_only_by_transparency(tmp_path, image):
    image.save(tmp_path / "m.png")
    with pytest.raises(BadImage, match="transparency.*white"):
        read_mask(tmp_path / "m.png")


def test_a_mask_that_cannot_be_read(tmp_path):
    (tmp_path / "m.png").write_bytes(b"none")
    with pytest.raises(BadImage, match="not an image"):
        read_mask(tmp_path / "m.png")
