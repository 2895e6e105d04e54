"""Draw the pictures of viz/: a data set's images on the way to noise, a model's on the way back.

Everything here is made from `Pipeline.frames`, the path's levels and `Pipeline.decode`.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import UserError
from ..config import Config
from ..data.batches import to_unit
from ..data.captions import Selection
from ..data.images import BadImage
from ..data.sources import configured, open_data
from ..files.atomic import read_lines
from ..files.output import is_ours, write_new
from ..process.names import SAMPLERS
from ..process.samplers import Table
from ..process.schedule import NoisePath
from ..runtime.distributed import log, progress
from ..runtime.seeding import ImageNoise
from ..sampling.pipeline import Pipeline
from .grid import (
    Picked,
    Trajectory,
    enlarge,
    grid,
    save_animation,
    strip,
    to_uint8,
    with_heading,
    write_png,
)
from .page import write_page
from .plot import Line, distance_title, line_plot, stack

PERCENT = (0, 25, 50, 75, 99)
MAX_FRAMES = 51  # of a trajectory, besides those at PERCENT
WEIGHTS = torch.linspace(0, 1, 8).tolist()  # of an interpolation
MAX_PLOTS = 8  # of a log's curves, beneath each other
DISTANCE = re.compile(r"\w{1,80}")  # a name of one, as `name_of` makes it
COPIES = "copies"  # of --fid_copies
OTHERS = ("step", "fid_seconds", "fid_num_images")  # numbers beside it
LOSSES = {"loss": "training loss", "heldout_loss": "held-out loss"}
# what the page compares with the chosen sampler, from the same noise
PAGE_RUNS = (("ddpm", 50), ("ddim", 50), ("ddim", 10), ("dpmpp_2m", 20), ("dpmpp_2m", 10))


def pick_images(data: str | None, config: Config, count: int) -> Picked:
    """Pick usable images from all over a data set; data None: the configuration's own.

    Raises UserError if the set cannot be opened or has no usable image.
    """
    other = (data, "all", "", Selection(captions=config.condition == "text"))
    source = open_data(*(configured(config) if data is None else other))
    found = []
    for i in np.random.default_rng(0).permutation(len(source)).tolist():
        try:
            caption = source.captions[i] if source.captions else ""
            found.append((source.read(i, config.image_size), source.names[i], caption))
        except BadImage as error:
            log(f"warning: {source.names[i]!r} is skipped: {error}")
        if len(found) == count:
            break
    if not found:
        raise UserError(f"none of the images of {source.name} can be used")
    pixels, names, captions = map(list, zip(*found))
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return Picked(to_unit(images, torch.device("cpu")), names, captions)


# --- the two processes ---------------------------------------------------------------------------


def visible(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Divide x_t by sqrt(alpha^2 + sigma^2) where that is above 1, as it is on EDM's path."""
    return x / torch.hypot(alpha, sigma).clamp(min=1)


def forward(pipeline: Pipeline, images: Tensor, seed: int) -> Trajectory:
    """Noise images (B, 3, H, W) in [-1, 1] as q_sample does, each with one noise for every t."""
    x0 = pipeline.encode(images)
    eps = ImageNoise(seed, range(len(images)), pipeline.shape)(pipeline.device)
    schedule = pipeline.schedule
    times = choose_frames(range(len(schedule)), len(schedule))
    pictures = []
    for t in times:
        alpha = schedule.alpha[t]
        sigma = schedule.sigma[t]
        x_t = visible(alpha * x0 + sigma * eps, alpha, sigma)
        pictures.append(to_uint8(pipeline.decode(x_t)))
    return Trajectory("forward", list(map(float, times)), np.stack(pictures))


def reverse(pipeline: Pipeline, indices, sampler: str, steps: int, seed=0, **options) -> Trajectory:
    """Follow a sampler from noise; each x with the x0 predicted from it, the last with itself."""
    table = pipeline.table(sampler, steps)
    times = table.t.tolist()
    chosen = choose_frames(times, len(pipeline.schedule))
    name = f"{sampler}, {steps} steps"
    x = ImageNoise(seed, indices, pipeline.shape)(pipeline.device)
    x = pipeline.schedule.prior_std(*table.levels[0].tolist()) * x  # where `frames` starts
    pairs = []
    frames = pipeline.frames(indices, seed=seed, table=table, **options)
    for i, (x_next, x0) in enumerate(progress(frames, total=steps, desc=name, leave=False)):
        if i in chosen:
            pairs.append((visible(x, *table.levels[i]), x0))
        x = x_next
    pairs.append((x, x))
    xs, x0s = (np.stack([to_uint8(pipeline.decode(x)) for x in states]) for states in zip(*pairs))
    return Trajectory(name, [*(times[i] for i in chosen), -1.0], xs, x0s)


def choose_frames(times: Sequence[float], T: int) -> list[int]:
    """Choose the frames that an animation and the strips need, of many, in order."""
    even = np.linspace(0, len(times) - 1, MAX_FRAMES).round().astype(int).tolist()
    return sorted({*even, *at_percents(times, T)})


def at_percents(times: Sequence[float], T: int) -> list[int]:
    """Find the frame nearest to each of PERCENT of the time."""
    return [int(abs(np.array(times) - round(p / 100 * (T - 1))).argmin()) for p in PERCENT]


# --- the folder ----------------------------------------------------------------------------------


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolate two (C, H, W) noises spherically: their norm stays that of noise."""
    cos = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.acos(cos.clamp(-1, 1))
    if angle.sin().abs() < 1e-4:
        return torch.lerp(a, b, weight)
    return (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / angle.sin()


@dataclass(eq=False)
class Gallery:
    """Draw in a folder: `count` of the data's images and of the model's.

    options: indices -> the options of `Pipeline.frames` for these images.
    conditioned: whether the images of the data get this conditioning, too.
    replace: whether pictures of an earlier call may be replaced.
    """

    path: Path
    replace: bool
    pipeline: Pipeline
    data: Picked
    table: Table
    count: int
    seed: int
    options: Callable[[Sequence[int]], dict]
    conditioned: bool
    names: list[str] = field(default_factory=list)

    def draw(self, model: Path, html: bool) -> None:
        """Draw everything, and the curves of the run that the model's file lies in."""
        T = len(self.pipeline.schedule)
        runs = []
        # first: a model whose pictures are not finite replaces nothing
        chosen = [(self.table.sampler, self.table.steps)]
        compared = [(name, min(steps, T)) for name, steps in PAGE_RUNS] if html else []
        indices = range(self.count)
        for run in dict.fromkeys(chosen + compared):
            runs.append(reverse(self.pipeline, indices, *run, **self.options(indices)))
        self.process("backward", runs[0])
        heading = f"between the noise of seeds {self.seed} and {self.seed + 1}, {self.sampler}"
        labels = [f"{w:.2g}" for w in WEIGHTS]
        self.png("interpolate_seeds", strip(self.between_seeds(), labels, heading))
        if len(self.data.images) > 1:
            heading = f"between two images, noised for half of the steps, {self.sampler}"
            labels = ["image", *labels, "image"]
            self.png("interpolate_images", strip(self.between_images(), labels, heading))
        if (picture := curves(model.parent / "metrics.jsonl")) is not None:
            self.png("curves", picture)
        noised = forward(self.pipeline, self.data.images[: self.count], self.seed)
        self.process("forward", noised)
        self.png("schedule", schedule_plot(self.pipeline.schedule, self.table))
        self.png("table", table_plot(self.table))
        if html:
            shown = (self.pipeline, noised, self.data, runs)
            self.write("index.html", lambda path: write_page(path, *shown))
        for file in self.path.iterdir() if self.replace else ():  # of an earlier call
            if file.name not in self.names and file.is_file() and is_ours(file):
                file.unlink()
        log(f"{self.path}: {', '.join(sorted(self.names))}")

    def process(self, name: str, process: Trajectory) -> None:
        """Write a picture at each fraction of the time, strips of them all, and an animation."""
        at = at_percents(process.t, len(self.pipeline.schedule))
        if process.x0 is not None:
            at[0] = len(process.t) - 1  # its result
        for p, i in zip(PERCENT, at):
            self.png(f"{name}_t{p:02d}", grid(enlarge(process.x[i]), len(process.x[i])))
        strips = {name: process.x}
        if process.x0 is not None:
            at = at[::-1]  # as time goes
            strips[f"{name}_x0"] = process.x0
        for file, pictures in strips.items():
            labels = [process.caption(i) for i in at]
            self.png(file, strip(pictures[at].swapaxes(0, 1), labels, process.name))
        frames = []
        for i, pictures in enumerate(np.concatenate(list(strips.values()), 1)):
            picture = grid(enlarge(pictures), columns=process.x.shape[1], gap=4)
            frames.append(with_heading(picture, f"{process.name}   {process.caption(i)}"))
        self.write(f"{name}.webp", lambda path: save_animation(frames, path))

    @property
    def sampler(self) -> str:
        """Name the sampler of interpolations: the chosen one, or ddim for one that adds noise."""
        name = self.table.sampler
        return name if SAMPLERS[name].eta == 0 else "ddim"

    def row(self, i: int, options: Callable, **given) -> np.ndarray:
        """Sample image i from each of the noises or images that are given, (W, H, W, 3) uint8."""
        indices = [i] * len(WEIGHTS)
        given |= options(indices) | {"sampler": self.sampler, "steps": self.table.steps}
        return to_uint8(self.pipeline.sample_batch(indices, **given))

    def between_seeds(self) -> np.ndarray:
        """Interpolate each image's noise to the next seed's by slerp: (count, W, H, W, 3)."""
        shape = self.pipeline.shape
        ends = [ImageNoise(self.seed + i, range(self.count), shape)() for i in (0, 1)]
        noises = [torch.stack([slerp(a, b, w) for w in WEIGHTS]) for a, b in zip(*ends)]
        return np.stack([self.row(i, self.options, eps=eps) for i, eps in enumerate(noises)])

    def between_images(self) -> np.ndarray:
        """Mix pairs of the data's images after q_sample, with these at both ends.

        All of a row get the same noise, so mixing x_t mixes x0 (DDPM section 4.3 and appendix D).
        """

        def options(indices) -> dict:
            given = self.options(indices)
            if not self.conditioned:  # the images have classes and captions of their own
                given |= {"labels": None, "prompts": None, "guidance_scale": 1.0}
            return given

        strength = max(0.5, 1 / self.table.steps)
        half = len(self.data.images) // 2
        rows = []
        for i, pair in enumerate(zip(*self.data.images[: 2 * half].split(half))):
            ends = self.pipeline.encode(torch.stack(pair))
            init = torch.stack([torch.lerp(*ends, w) for w in WEIGHTS])
            eps = ImageNoise(self.seed, [i] * len(WEIGHTS), self.pipeline.shape)()
            first, last = to_uint8(torch.stack(pair))
            rows.append([first, *self.row(i, options, eps=eps, init=init, strength=strength), last])
        return np.array(rows)

    def png(self, name: str, picture: Image.Image) -> None:
        self.write(f"{name}.png", lambda path: write_png(picture, path))

    def write(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file by write(path). Raises UserError if another program has its name."""
        if not write_new(self.path / name, write, self.replace):
            raise UserError(
                f"another program has written {self.path / name} meanwhile, which stays: give "
                "another --save_folder"
            )
        self.names.append(name)


# --- plots ---------------------------------------------------------------------------------------


def schedule_plot(schedule: NoisePath, table: Table) -> Image.Image:
    """Plot the image's fraction of the power, and log-SNR, over t; a table's steps as dots."""
    alpha, sigma = table.levels[:-1].T
    steps = f"{table.sampler}, {len(table)} steps"
    plots = []
    for name, title, of in (
        ("image", "alpha^2 / (alpha^2 + sigma^2)", torch.sigmoid),
        ("log-SNR", "log(alpha^2 / sigma^2)", torch.clone),
    ):
        curve = Line(range(len(schedule)), of(2 * schedule.lam), name)
        dots = Line(table.t, of(2 * (alpha / sigma).log()), steps, joined=False)
        plots.append(line_plot([curve, dots], title, "timestep t"))
    return stack(plots)


def table_plot(table: Table) -> Image.Image:
    """Plot a sampler's coefficients, row by row (process/samplers.py)."""
    names = ("x", "y", "d0", "d1", "d2", "d3", "noise")
    used = zip(names, table.to_y.T)
    lines = [Line(range(len(table)), k, name) for name, k in used if (k != 0).any()]
    return line_plot(lines, f"Coefficients of {table.sampler}, {len(table)} steps", "row")


def curves(metrics: Path) -> Image.Image | None:
    """Plot loss, held-out loss, distances and copies over steps; None where nothing is logged.

    Of the distances, those with names as `name_of` makes them, the first few of them.
    """
    found = {}  # by title and label
    for entry in read_lines(metrics):
        # distances of other numbers of samples are another curve
        samples = f"{entry['fid_num_images']} samples" if "fid_num_images" in entry else ""
        for name, value in entry.items():
            if name in LOSSES:
                curve = ("Loss", LOSSES[name])
            elif name == COPIES:
                curve = ("Fraction of copies", samples)
            elif "fid_seconds" in entry and name not in OTHERS and DISTANCE.fullmatch(name):
                curve = (distance_title(name), samples)
            else:
                continue
            if value is not None:
                found.setdefault(curve, []).append((entry["step"], value))
    plots = []
    for title in list(dict.fromkeys(title for title, _ in found))[:MAX_PLOTS]:
        lines = [Line(*zip(*xy), label) for (name, label), xy in found.items() if name == title]
        with contextlib.suppress(ValueError):  # no loss is positive
            plots.append(line_plot(lines, title, "step", log_y=title == "Loss"))
    return stack(plots) if plots else None
