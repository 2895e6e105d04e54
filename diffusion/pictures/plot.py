"""Line plots with Pillow: axes, ticks, legend; enough for curves, schedules and tables.

Pillow's own font knows ASCII only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours, told apart by everyone
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
INK = "#333333"
PALE = "#dddddd"
SCALE = 3  # drawn this much larger and reduced: smooth lines


@dataclass(frozen=True)
class Line:
    """x, y: as many numbers each; those that are not finite are left out."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    dots: bool = False  # mark the points
    line: bool = True  # join them


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in [low, high], a power of ten times 1, 2 or 5 apart."""
    raw = (high - low) / most
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Of an axis of log10: 1, 2, 5 in each decade, or the decades alone where they are many."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    digits = (1, 2, 5) if high - low < 3 else (1,)
    values = [math.log10(m) + d for d in decades for m in digits]
    return [v for v in values if low - 1e-9 <= v <= high + 1e-9]


def told(value: float) -> str:
    """Short and exact: 0.05, 1200, 3e-05."""
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.4g}"


@dataclass
class Axis:
    """Data to pixels along one direction; from, to: the pixels of the ends."""

    values: list[float]
    start: float
    end: float
    log: bool = False

    def __post_init__(self):
        values = [math.log10(v) for v in self.values] if self.log else self.values
        low = min(values)
        high = max(values)
        margin = (high - low) * 0.04 or abs(high) * 0.1 or 1
        self.low = low - margin
        self.high = high + margin

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Values to mark."""
        if not self.log:
            return ticks(self.low, self.high)
        marks = [10**v for v in log_ticks(self.low, self.high)]
        return marks if len(marks) > 2 else ticks(10**self.low, 10**self.high)


def usable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def line_plot(
    lines: list[Line],
    title: str,
    xlabel: str,
    ylabel: str = "",
    *,
    log_x: bool = False,
    log_y: bool = False,
    size: tuple[int, int] = (640, 400),
) -> Image.Image:
    """A plot of size pixels. Raises ValueError where no point can be drawn."""
    points = [
        [(x, y) for x, y in zip(line.x, line.y) if usable(x, log_x) and usable(y, log_y)]
        for line in lines
    ]
    if not any(points):
        raise ValueError(f"plot {title!r} has no finite point")
    width, height = (v * SCALE for v in size)
    unit = SCALE  # one pixel of the result
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    small = font(13 * unit)
    large = font(16 * unit)
    left = 64 * unit
    right = width - 16 * unit
    top = 40 * unit
    bottom = height - 48 * unit
    x_axis = Axis([x for p in points for x, _ in p], left, right, log_x)
    y_axis = Axis([y for p in points for _, y in p], bottom, top, log_y)

    # frame
    draw.text((left, 10 * unit), title, INK, large)
    draw.text(((left + right) / 2, height - 8 * unit), xlabel, INK, small, anchor="mb")
    draw.text((right, 12 * unit), ylabel, INK, small, anchor="ra")
    for value in x_axis.ticks():
        x = x_axis(value)
        draw.line([(x, top), (x, bottom)], PALE, unit)
        draw.text((x, bottom + 6 * unit), told(value), INK, small, anchor="ma")
    for value in y_axis.ticks():
        y = y_axis(value)
        draw.line([(left, y), (right, y)], PALE, unit)
        draw.text((left - 6 * unit, y), told(value), INK, small, anchor="rm")
    draw.rectangle([left, top, right, bottom], outline=INK, width=unit)

    # lines
    for i, (line, pairs) in enumerate(zip(lines, points)):
        colour = COLOURS[i % len(COLOURS)]
        at = [(x_axis(x), y_axis(y)) for x, y in pairs]
        if line.line and len(at) > 1:
            draw.line(at, colour, 2 * unit, joint="curve")
        if line.dots or len(at) == 1:
            for x, y in at:
                draw.ellipse([x - 3 * unit, y - 3 * unit, x + 3 * unit, y + 3 * unit], colour)
    legend(draw, lines, points, x_axis, y_axis, small)
    return sheet.resize(size, Image.LANCZOS)


def legend(draw, lines: list[Line], points, x_axis: Axis, y_axis: Axis, small) -> None:
    """In the place that covers the fewest points."""
    shown = [(i, line) for i, line in enumerate(lines) if line.label]
    if not shown:
        return
    u = SCALE
    wide = max(draw.textlength(line.label, small) for _, line in shown) + 40 * u
    high = (18 * len(shown) + 8) * u
    left = x_axis.start
    right = x_axis.end
    top = y_axis.end
    bottom = y_axis.start

    def covered(corner: tuple[float, float]) -> int:
        x0, y0 = corner
        return sum(
            x0 <= x_axis(x) <= x0 + wide and y0 <= y_axis(y) <= y0 + high
            for pairs in points
            for x, y in pairs
        )

    xs = (right - wide - 6 * u, left + 6 * u, (left + right - wide) / 2)
    ys = (top + 6 * u, bottom - high - 6 * u, (top + bottom - high) / 2)
    x0, y0 = min(((x, y) for x in xs for y in ys), key=covered)
    draw.rectangle([x0, y0, x0 + wide, y0 + high], "white", PALE, u)
    for row, (i, line) in enumerate(shown):
        y = y0 + (13 + 18 * row) * u
        colour = COLOURS[i % len(COLOURS)]
        if line.line:
            draw.line([(x0 + 8 * u, y), (x0 + 28 * u, y)], colour, 3 * u)
        if line.dots:
            draw.ellipse([x0 + 15 * u, y - 3 * u, x0 + 21 * u, y + 3 * u], colour)
        draw.text((x0 + 34 * u, y), line.label, INK, small, anchor="lm")


def stack(plots: list[Image.Image]) -> Image.Image:
    """One above the other."""
    sheet = Image.new("RGB", (max(p.width for p in plots), sum(p.height for p in plots)), "white")
    y = 0
    for plot in plots:
        sheet.paste(plot, (0, y))
        y += plot.height
    return sheet
