"""The embedded data set: captioned cartoon faces, drawn on the fly with Pillow.

Face i is a function of i alone. Each attribute is one word or phrase of the caption, and its
colour or shape can be read off the pixels, so that conditional models can be scored.
"""

import random

import numpy as np
from PIL import Image, ImageDraw

from .images import to_pixels

COUNT = 12_000
CANVAS = 128  # drawn at this size, then resized

HAIR = {
    "black": (38, 32, 36),
    "brown": (110, 66, 34),
    "blond": (242, 205, 96),
    "red": (205, 56, 38),
    "blue": (62, 104, 222),
    "pink": (245, 130, 186),
    "green": (58, 164, 88),
    "white": (238, 238, 244),
}
SKIN = {
    "pale": (255, 225, 204),
    "tan": (232, 184, 142),
    "brown": (168, 112, 76),
    "dark": (102, 66, 48),
}
BACKGROUND = {
    "blue": (150, 198, 240),
    "yellow": (252, 232, 130),
    "green": (164, 222, 158),
    "pink": (250, 190, 205),
    "purple": (190, 168, 232),
    "gray": (196, 200, 206),
}
IRIS = {"blue": (50, 110, 220), "green": (40, 150, 80), "brown": (105, 62, 30)}
STYLE = ("short", "long", "bob", "spiky", "bald")
MOUTH = ("smile", "grin", "frown", "flat mouth", "open mouth")
GLASSES = ("no glasses", "round glasses", "sunglasses")


def attributes(index: int) -> dict[str, str]:
    """Face `index`'s attributes by name; deterministic. Bald faces have no hair colour."""
    rng = random.Random(f"toy face {index}")
    style = rng.choices(STYLE, weights=(3, 3, 3, 3, 1))[0]
    return {
        "hair_style": style,
        "hair": rng.choice(list(HAIR)) if style != "bald" else "",
        "skin": rng.choice(list(SKIN)),
        "eyes": rng.choice(list(IRIS)),
        "mouth": rng.choice(MOUTH),
        "glasses": rng.choices(GLASSES, weights=(3, 1, 1))[0],
        "background": rng.choice(list(BACKGROUND)),
    }


def caption(index: int) -> str:
    a = attributes(index)
    hair = f"{a['hair_style']} {a['hair']} hair" if a["hair"] else "bald"
    eyes = [] if a["glasses"] == "sunglasses" else [f"{a['eyes']} eyes"]
    glasses = [] if a["glasses"] == "no glasses" else [a["glasses"]]
    parts = [
        hair,
        f"{a['skin']} skin",
        *eyes,
        a["mouth"],
        *glasses,
        f"{a['background']} background",
    ]
    return "a cartoon face, " + ", ".join(parts)


def draw(index: int, size: int) -> np.ndarray:
    """Face `index`: (size, size, 3) uint8."""
    a = attributes(index)
    rng = random.Random(f"toy pose {index}")
    image = Image.new("RGB", (CANVAS, CANVAS), BACKGROUND[a["background"]])
    pen = ImageDraw.Draw(image)
    cx = 64 + rng.uniform(-4, 4)
    cy = 70 + rng.uniform(-3, 3)
    w = 36 + rng.uniform(-3, 3)
    h = 42 + rng.uniform(-3, 3)  # half axes of the head
    skin = SKIN[a["skin"]]
    shade = tuple(int(v * 0.8) for v in skin)

    def ellipse(x, y, rx, ry, **options):
        pen.ellipse((x - rx, y - ry, x + rx, y + ry), **options)

    if a["hair"]:
        _hair_behind(pen, a["hair_style"], HAIR[a["hair"]], cx, cy, w, h)
    pen.rectangle((cx - 12, cy + h - 12, cx + 12, 128), fill=shade)  # neck
    ellipse(cx, 138, 46, 26, fill=tuple(int(v * 0.55) for v in BACKGROUND[a["background"]]))
    for side in (-1, 1):
        ellipse(cx + side * w, cy + 2, 6, 9, fill=shade)  # ears
    ellipse(cx, cy, w, h, fill=skin)
    if a["hair"]:
        _hair_front(pen, a["hair_style"], HAIR[a["hair"]], cx, cy, w, h)
    _eyes(pen, ellipse, a, cx, cy, w)
    pen.line((cx, cy + 4, cx - 3, cy + 13, cx + 2, cy + 14), fill=shade, width=3)  # nose
    _mouth(pen, ellipse, a["mouth"], cx, cy + 25)
    return to_pixels(image, size)


def read_colours(image: np.ndarray) -> tuple[str, str]:
    """(hair, background) of a face (size, size, 3) uint8, by the nearest colour; not for bald ones.

    Read above the forehead and in the upper corners, so that drawn and generated faces can be
    scored alike.
    """
    size = len(image)

    def nearest(palette: dict, *boxes) -> str:
        parts = [
            image[round(y0 * size) : round(y1 * size), round(x0 * size) : round(x1 * size)]
            for x0, x1, y0, y1 in boxes
        ]
        colour = np.median(np.concatenate([p.reshape(-1, 3) for p in parts]), 0)
        return min(palette, key=lambda name: np.abs(colour - palette[name]).sum())

    hair = nearest(HAIR, (0.44, 0.56, 0.23, 0.29))
    return hair, nearest(BACKGROUND, (0.02, 0.1, 0.02, 0.1), (0.9, 0.98, 0.02, 0.1))


def _hair_behind(pen, style, color, cx, cy, w, h):
    if style == "long":
        pen.rounded_rectangle((cx - w - 11, cy - h + 4, cx + w + 11, 132), 26, fill=color)
    if style == "bob":
        pen.rounded_rectangle((cx - w - 9, cy - h + 2, cx + w + 9, cy + 34), 22, fill=color)
    pen.ellipse((cx - w - 8, cy - h - 12, cx + w + 8, cy + 16), fill=color)
    if style == "spiky":
        for x in range(-3, 4):
            tip = (cx + x * 15, cy - h - 26 + abs(x) * 9)
            pen.polygon(
                [(cx + x * 12 - 13, cy - h + 18), tip, (cx + x * 12 + 13, cy - h + 18)], fill=color
            )


def _hair_front(pen, style, color, cx, cy, w, h):
    box = (cx - w - 3, cy - h - 7, cx + w + 3, cy + h * 0.55)
    if style in ("short", "spiky"):
        pen.chord(box, 200, 340, fill=color)
    else:  # a fringe
        pen.pieslice(box, 180, 360, fill=color)


def _eyes(pen, ellipse, a, cx, cy, w):
    y = cy + 1
    for side in (-1, 1):
        x = cx + side * w * 0.45
        if a["glasses"] == "sunglasses":
            pen.rounded_rectangle((x - 13, y - 9, x + 13, y + 10), 6, fill=(24, 24, 28))
            continue
        ellipse(x, y, 9, 8, fill=(255, 255, 255))
        ellipse(x, y, 6, 6.5, fill=IRIS[a["eyes"]])
        ellipse(x, y, 2.5, 2.5, fill=(16, 16, 20))
        if a["glasses"] == "round glasses":
            ellipse(x, y, 13, 12, outline=(40, 40, 46), width=3)
    if a["glasses"] != "no glasses":
        pen.line((cx - 6, y - 2, cx + 6, y - 2), fill=(32, 32, 36), width=3)


def _mouth(pen, ellipse, mouth, x, y):
    dark = (120, 36, 40)
    red = (196, 60, 66)
    if mouth == "smile":
        pen.arc((x - 14, y - 14, x + 14, y + 8), 20, 160, fill=dark, width=4)
    elif mouth == "grin":
        pen.chord(
            (x - 15, y - 13, x + 15, y + 11), 0, 180, fill=(255, 255, 255), outline=dark, width=2
        )
    elif mouth == "frown":
        pen.arc((x - 13, y - 2, x + 13, y + 18), 200, 340, fill=dark, width=4)
    elif mouth == "flat mouth":
        pen.line((x - 12, y, x + 12, y), fill=dark, width=4)
    else:
        ellipse(x, y, 8, 9, fill=red, outline=dark, width=3)
