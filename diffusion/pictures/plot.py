"""Draw line plots with Pillow: axes, ticks, legend; enough for curves, schedules and tables.

Pillow's own font knows ASCII only.
"""

import math
from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours, distinct also for the colour-blind
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
INK = "#333333"
PALE = "#dddddd"
SIZE = (640, 400)  # a third of what is drawn, for smooth lines
MAX = 1e100
MAX_DOTS = 60  # a line of more points is drawn without dots


class Line(NamedTuple):
    """Describes a curve. x, y: as many numbers each; those that are not below MAX are left out."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    joined: bool = True  # False: dots alone


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Choose round numbers in [low, high]: 1, 2 or 5 times a power of ten, or such steps apart.

    log: low and high are log10 of numbers.
    """
    if log:
        exponents = range(math.floor(low), math.ceil(high) + 1)
        digits = (1, 2, 5) if len(exponents) < 5 else (1,)
        low = 10**low
        high = 10**high
        values = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        values = [value for value in values if low <= value <= high]
        if len(values) > 2:
            return values
    unit = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = unit * next(digit for digit in (1, 2, 5, 10) if 6.001 * digit * unit >= high - low)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def line_plot(
    lines: Sequence[Line], title: str, xlabel: str, log_x: bool = False, log_y: bool = False
) -> Image.Image:
    """Draw a plot of SIZE. Raises ValueError where no point can be drawn."""
    logs = [log_x, log_y]
    curves = []
    for line in lines:
        xy = np.stack([line.x, line.y], 1).astype(float)
        with np.errstate(divide="ignore", invalid="ignore"):
            xy[:, logs] = np.log10(xy[:, logs])
        curves.append(xy[(abs(xy) < MAX).all(1)])
    every = np.concatenate(curves)
    if not len(every):
        raise ValueError(f"plot {title!r} has no finite point")
    span = np.ptp(every, 0)
    span[span == 0] = 1
    span = np.maximum(span, 1e-6 * abs(every).max(0))  # less is no room for ticks
    low = every.min(0) - span / 25
    high = every.max(0) + span / 25

    def pixels(xy: np.ndarray) -> np.ndarray:
        return (192, 1056) + (xy - low) / (high - low) * (1680, -882)

    image = Image.new("RGB", (1920, 1200), "white")
    draw = ImageDraw.Draw(image)
    small = font(39)
    draw.text((192, 30), title, INK, font(48))
    draw.text((1032, 1176), xlabel, INK, small, anchor="mb")
    for axis, offset, anchor in ((0, (0, 18), "ma"), (1, (-18, 0), "rm")):
        for value in ticks(low[axis], high[axis], logs[axis]):
            ends = np.stack([low, high])
            ends[:, axis] = math.log10(value) if logs[axis] else value
            start, end = pixels(ends)
            draw.line([*start, *end], PALE, 3)
            draw.text(tuple(start + offset), f"{value:.6g}", INK, small, anchor=anchor)
    draw.rectangle((192, 174, 1872, 1056), outline=INK, width=3)
    key = 201  # of the legend, a row between title and frame
    for line, curve, colour in zip(lines, map(pixels, curves), cycle(COLOURS)):
        points = list(map(tuple, curve))
        if line.joined and points:
            draw.line(points, colour, 6, joint="curve")
        if len(points) < MAX_DOTS or not line.joined:
            for point in points:
                draw.circle(point, 9, colour)
        if line.label:
            draw.circle((key, 138), 9, colour)
            draw.text((key + 21, 138), line.label, INK, small, anchor="lm")
            key += draw.textlength(line.label, small) + 84
    return image.resize(SIZE, Image.LANCZOS)


def distance_title(name: str) -> str:
    return "FID" if name == "fid" else f"Frechet distance ({name})"


def stack(plots: Sequence[Image.Image]) -> Image.Image:
    """Put plots of one width below each other."""
    return Image.fromarray(np.concatenate([np.asarray(plot) for plot in plots]))
