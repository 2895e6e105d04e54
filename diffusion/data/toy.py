"""The embedded data set: captioned cartoon faces, drawn on the fly with Pillow.

Face i is a function of i alone. Each attribute is one word or phrase of the caption, and its
colour or shape can be read off the pixels, so that conditional models can be scored.
"""

import random

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from .images import to_pixels

COUNT = 12_000
VERSION = "bbfffb2cc2f86ab63f318821e12c236c"  # part of the cache's key; change it with any pixel
CANVAS = 128  # drawn at this size, then resized


def palette(colours: str) -> dict[str, tuple[int, int, int]]:
    pairs = (colour.split("=") for colour in colours.split())
    return {name: ImageColor.getrgb(code) for name, code in pairs}


HAIR = palette(
    "black=#262024 brown=#6e4222 blond=#f2cd60 red=#cd3826 blue=#3e68de pink=#f582ba green=#3aa458 "
    "white=#eeeef4"
)
SKIN = palette("pale=#ffe1cc tan=#e8b88e brown=#a8704c dark=#664230")
BACKGROUND = palette(
    "blue=#96c6f0 yellow=#fce882 green=#a4de9e pink=#fabecd purple=#bea8e8 gray=#c4c8ce"
)
IRIS = palette("blue=#326edc green=#289650 brown=#693e1e")
STYLE = "short long bob spiky bald".split()
MOUTH = ("smile", "grin", "frown", "flat mouth", "open mouth")
GLASSES = ("no glasses", "round glasses", "sunglasses")


def attributes(index: int) -> dict[str, str]:
    """Sample the attributes of face `index`, a function of it alone; bald faces have no hair."""
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
    """Describe face `index`, naming only what is to be seen."""
    a = attributes(index)
    parts = [
        f"{a['hair_style']} {a['hair']} hair" if a["hair"] else "bald",
        f"{a['skin']} skin",
        f"{a['eyes']} eyes" if a["glasses"] != "sunglasses" else "",
        a["mouth"],
        a["glasses"] if a["glasses"] != "no glasses" else "",
        f"{a['background']} background",
    ]
    return "a cartoon face, " + ", ".join(part for part in parts if part)


def draw(index: int, size: int) -> np.ndarray:
    """Draw face `index` from back to front: (size, size, 3) uint8."""
    a = attributes(index)
    rng = random.Random(f"toy pose {index}")
    image = Image.new("RGB", (CANVAS, CANVAS), BACKGROUND[a["background"]])
    pen = ImageDraw.Draw(image)
    cx = 64 + rng.uniform(-4, 4)
    cy = 70 + rng.uniform(-3, 3)
    w = 36 + rng.uniform(-3, 3)
    h = 42 + rng.uniform(-3, 3)  # half axes of the head
    style = a["hair_style"]
    hair = HAIR.get(a["hair"])
    skin = SKIN[a["skin"]]
    shade = tuple(int(v * 0.8) for v in skin)
    shirt = tuple(int(v * 0.55) for v in BACKGROUND[a["background"]])

    def at(*offsets):
        """Add the centre of the head to x, y, x, y, ..."""
        return [v + (cx, cy)[i % 2] for i, v in enumerate(offsets)]

    def ellipse(x, y, rx, ry, **options):
        pen.ellipse(at(x - rx, y - ry, x + rx, y + ry), **options)

    # hair behind the head
    if style == "long":
        pen.rounded_rectangle(at(-w - 11, 4 - h, w + 11, 132 - cy), 26, fill=hair)
    if style == "bob":
        pen.rounded_rectangle(at(-w - 9, 2 - h, w + 9, 34), 22, fill=hair)
    if hair:
        pen.ellipse(at(-w - 8, -h - 12, w + 8, 16), fill=hair)
    for i in range(-3, 4) if style == "spiky" else ():
        x = i * 12
        tip = (i * 15, abs(i) * 9 - h - 26)
        pen.polygon(at(x - 13, 18 - h, *tip, x + 13, 18 - h), fill=hair)

    # neck, shirt, ears, head
    pen.rectangle(at(-12, h - 12, 12, 128 - cy), fill=shade)
    ellipse(0, 138 - cy, 46, 26, fill=shirt)
    for side in (-1, 1):
        ellipse(side * w, 2, 6, 9, fill=shade)
    ellipse(0, 0, w, h, fill=skin)

    # hair in front: parted to the side, or a fringe
    front = at(-w - 3, -h - 7, w + 3, h * 0.55)
    if style in ("short", "spiky"):
        pen.chord(front, 200, 340, fill=hair)
    elif hair:
        pen.pieslice(front, 180, 360, fill=hair)

    # eyes and glasses
    for x in (-w * 0.45, w * 0.45):
        if a["glasses"] == "sunglasses":
            pen.rounded_rectangle(at(x - 13, -8, x + 13, 11), 6, fill="#18181c")
            continue
        ellipse(x, 1, 9, 8, fill="#ffffff")
        ellipse(x, 1, 6, 6.5, fill=IRIS[a["eyes"]])
        ellipse(x, 1, 2.5, 2.5, fill="#101014")
        if a["glasses"] == "round glasses":
            ellipse(x, 1, 13, 12, outline="#28282e", width=3)
    if a["glasses"] != "no glasses":
        pen.line(at(-6, -1, 6, -1), fill="#202024", width=3)

    # nose and mouth
    pen.line(at(0, 4, -3, 13, 2, 14), fill=shade, width=3)
    lips = "#782428"
    match a["mouth"]:
        case "smile":
            pen.arc(at(-14, 11, 14, 33), 20, 160, fill=lips, width=4)
        case "grin":
            pen.chord(at(-15, 12, 15, 36), 0, 180, fill="#ffffff", outline=lips, width=2)
        case "frown":
            pen.arc(at(-13, 23, 13, 43), 200, 340, fill=lips, width=4)
        case "flat mouth":
            pen.line(at(-12, 25, 12, 25), fill=lips, width=4)
        case "open mouth":
            ellipse(0, 25, 8, 9, fill="#c43c42", outline=lips, width=3)
    return to_pixels(image, size)
