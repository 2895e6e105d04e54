"""What visualize.py shows: the forward and reverse process, interpolations, plots of a run.

Everything here is made from `Pipeline.frames`, q_sample and `Pipeline.decode`.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import UserError
from ..config import Config
from ..data.captions import Selection
from ..data.image_set import configured, open_data
from ..data.images import BadImage
from ..files.checkpoint import read_lines
from ..process.objective import q_sample
from ..process.samplers import SAMPLERS, Table
from ..process.schedule import NoisePath
from ..runtime.distributed import log, progress
from ..runtime.seeding import ImageNoise
from ..sampling.pipeline import Pipeline
from .grid import enlarge, grid, strip, to_uint8, with_heading
from .plot import Line, line_plot, stack

PERCENT = (0, 25, 50, 75, 99)
MOST_FRAMES = 51  # of a trajectory that are kept, besides those at PERCENT


def timestep_at(p: int, T: int) -> int:
    return round(p / 100 * (T - 1))


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A process as pictures. t: (F,) the frames' timesteps, -1 where the image is clean.

    x: (F, B, H, W, 3) uint8; x0: the same, what is predicted at each; None for the forward process.
    """

    name: str
    t: list[float]
    x: np.ndarray
    x0: np.ndarray | None = None

    def nearest(self, t: float) -> int:
        """The frame whose timestep is nearest."""
        return min(range(len(self.t)), key=lambda i: abs(self.t[i] - t))


@dataclass(frozen=True, eq=False)
class Picked:
    """Images of a data set: (B, 3, H, W) in [-1, 1], with their names and captions."""

    images: Tensor
    names: list[str]
    captions: list[str]


def pick_images(data: str | None, config: Config, count: int) -> Picked:
    """Usable images from all over a data set; data None: the configuration's own.

    Raises UserError if the set cannot be opened or has no usable image.
    """
    if data is None and config.streaming:
        raise UserError(
            f"the model was trained on a stream, {config.data}: say with --data which "
            "images to show"
        )
    other = (data, "all", "", Selection(captions=config.condition == "text"))
    try:
        source = open_data(*(configured(config) if data is None else other))
    except UserError as error:
        hint = "; the model was trained on it, give another with --data" if data is None else ""
        raise UserError(f"{error}{hint}") from None
    order = np.random.default_rng(0).permutation(len(source))
    pixels = []
    names = []
    captions = []
    for i in map(int, order):
        try:
            pixels.append(source.read(i, config.image_size))
        except BadImage as error:
            log(f"warning: {source.names[i]!r} is skipped: {error}")
            continue
        names.append(source.names[i])
        captions.append(source.captions[i] if source.captions else "")
        if len(pixels) == count:
            break
    if not pixels:
        raise UserError(f"none of the images of {source.name} can be used")
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Picked(images, names, captions)


def forward(pipeline: Pipeline, images: Tensor, timesteps: list[int], seed: int = 0) -> Trajectory:
    """q_sample of images (B, 3, H, W) in [-1, 1], each with one noise for all timesteps."""
    x0 = pipeline.encode(images)
    eps = ImageNoise(seed, range(len(images)), pipeline.shape)(pipeline.device)
    frames = []
    for t in timesteps:
        x_t = q_sample(
            pipeline.schedule, x0, torch.full((len(x0),), t, device=pipeline.device), eps
        )
        frames.append(to_uint8(pipeline.decode(x_t)))
    return Trajectory("forward", [float(t) for t in timesteps], np.stack(frames))


def reverse(pipeline: Pipeline, indices, sampler: str, steps: int, seed=0, **options) -> Trajectory:
    """A sampler's way from noise; each x with the x0 predicted from it, the last with itself."""
    times = pipeline.table(sampler, steps).t.tolist()
    keep = kept_frames(times, len(pipeline.schedule))
    x = ImageNoise(seed, indices, pipeline.shape)(pipeline.device)  # where `frames` starts
    xs = []
    x0s = []
    name = f"{sampler}, {steps} steps"
    frames = pipeline.frames(indices, seed=seed, sampler=sampler, steps=steps, **options)
    for i, (x_next, x0) in enumerate(progress(frames, total=steps, desc=name, leave=False)):
        if i in keep:
            xs.append(to_uint8(pipeline.decode(x)))
            x0s.append(to_uint8(pipeline.decode(x0)))
        x = x_next
    last = to_uint8(pipeline.decode(x))
    return Trajectory(
        name,
        [*(times[i] for i in sorted(keep)), -1.0],
        np.stack([*xs, last]),
        np.stack([*x0s, last]),
    )


def kept_frames(times: list[float], T: int) -> set[int]:
    """Of many frames, those that a film and the strips need."""
    n = len(times)
    even = np.linspace(0, n - 1, min(n, MOST_FRAMES)).round().astype(int).tolist()
    near = [min(range(n), key=lambda i: abs(times[i] - timestep_at(p, T))) for p in PERCENT]
    return {*even, *near}


def at_percents(trajectory: Trajectory, T: int) -> list[int]:
    """The frame for each of PERCENT; at 0 the reverse process shows its result."""
    chosen = [trajectory.nearest(timestep_at(p, T)) for p in PERCENT]
    return chosen if trajectory.x0 is None else [len(trajectory.t) - 1, *chosen[1:]]


def labelled(trajectory: Trajectory, chosen: list[int], pictures: np.ndarray) -> Image.Image:
    """A strip of the chosen frames, an image per row."""
    times = [trajectory.t[i] for i in chosen]
    labels = [f"t = {t:.4g}" if t >= 0 else "clean" for t in times]
    return strip(pictures[chosen].swapaxes(0, 1), labels, trajectory.name)


def film(trajectory: Trajectory) -> list[Image.Image]:
    """All images side by side; the predicted x0 below, where there is one."""
    frames = []
    for i, t in enumerate(trajectory.t):
        rows = [trajectory.x[i]] + ([trajectory.x0[i]] if trajectory.x0 is not None else [])
        pictures = np.concatenate(rows)
        told = f"t = {t:.4g}" if t >= 0 else "clean"
        sheet = grid(enlarge(pictures), columns=len(trajectory.x[i]), gap=4)
        frames.append(with_heading(sheet, f"{trajectory.name}   {told}"))
    return frames


# --- interpolation -------------------------------------------------------------------------------


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation of two (C, H, W) noises: their norm stays that of noise."""
    cos = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.acos(cos.clamp(-1, 1))
    if angle.sin().abs() < 1e-4:
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / angle.sin()


def deterministic(sampler: str) -> str:
    """The sampler itself, or ddim in place of one that adds noise."""
    return sampler if SAMPLERS[sampler].eta == 0 else "ddim"


def between_seeds(
    pipeline: Pipeline, seed: int, rows: int, *, points: int, options, **sampling
) -> np.ndarray:
    """(rows, points, H, W, 3): image i of seed, slerped to image i of seed + 1.

    options(indices): those of `Pipeline.frames` that belong to the images, such as labels.
    """
    a, b = (ImageNoise(s, range(rows), pipeline.shape)() for s in (seed, seed + 1))
    shares = torch.linspace(0, 1, points).tolist()
    out = []
    for i in range(rows):
        eps = torch.stack([slerp(a[i], b[i], share) for share in shares])
        out.append(last(pipeline, [i] * points, options, eps=eps, **sampling))
    return np.stack(out)


def between_images(
    pipeline: Pipeline, a: Tensor, b: Tensor, seed: int, *, points: int, options, **sampling
) -> np.ndarray:
    """(rows, points + 2, H, W, 3): the images, and between them their mixtures after q_sample.

    All of a row get the same noise, so mixing x_t mixes x0 (DDPM section 4.3 and appendix D).
    """
    out = []
    for i in range(len(a)):
        ends = pipeline.encode(torch.stack([a[i], b[i]]))
        init = torch.stack([torch.lerp(*ends, s) for s in torch.linspace(0, 1, points).tolist()])
        eps = ImageNoise(seed, [i] * points, pipeline.shape)()
        start = {"eps": eps, "init": init, "strength": max(0.5, 1 / sampling["steps"])}
        middle = last(pipeline, [i] * points, options, **start, **sampling)
        out.append(np.concatenate([to_uint8(a[i : i + 1]), middle, to_uint8(b[i : i + 1])]))
    return np.stack(out)


def last(pipeline: Pipeline, indices, options, **sampling) -> np.ndarray:
    [(x, _)] = deque(pipeline.frames(indices, **options(indices), **sampling), maxlen=1)
    return to_uint8(pipeline.decode(x))


# --- plots ---------------------------------------------------------------------------------------


def schedule_plot(
    schedule: NoisePath, table: Table | None = None, sampler: str = ""
) -> Image.Image:
    """alpha_bar and log-SNR over t; a table's steps as dots on both."""
    t = list(range(len(schedule)))
    bars = [Line(t, schedule.alpha_bar.tolist(), "alpha_bar")]
    snrs = [Line(t, (2 * schedule.lam).tolist(), "log-SNR")]
    if table is not None:
        alpha, sigma = table.levels[:-1].T
        name = f"{sampler}, {len(table)} steps"
        bars.append(Line(table.t.tolist(), (alpha**2).tolist(), name, dots=True, line=False))
        snr = 2 * (alpha.log() - sigma.log())
        snrs.append(Line(table.t.tolist(), snr.tolist(), name, dots=True, line=False))
    return stack(
        [
            line_plot(bars, "What is left of the image: alpha_bar", "timestep t"),
            line_plot(snrs, "log(alpha_bar / (1 - alpha_bar))", "timestep t"),
        ]
    )


def table_plot(table: Table, sampler: str) -> Image.Image:
    """A sampler's coefficients, row by row (process/samplers.py)."""
    rows = list(range(len(table)))
    lines = [
        Line(rows, k.tolist(), name, dots=len(rows) < 60)
        for name, k in zip(("k_x", "k_x0", "k_prev", "k_eps"), table.rows.T)
    ]
    return line_plot(lines, f"Coefficients of {sampler}, {len(table)} steps", "row")


def curves(metrics: Path) -> Image.Image | None:
    """Loss, held-out loss and measured distances over steps; None where nothing is logged."""
    lines = read_lines(metrics)
    measured = [line for line in lines if "fid_seconds" in line]
    names = dict.fromkeys(k for line in measured for k in line)

    def series(name: str, label: str, dots: bool, among: list[dict]) -> list[Line]:
        pairs = [(line["step"], line[name]) for line in among if line.get(name) is not None]
        return [Line(*zip(*pairs), label, dots)] if pairs else []

    loss = [
        *series("loss", "training loss", False, lines),
        *series("heldout_loss", "held-out loss", True, lines),
    ]
    plots = [line_plot(loss, "Loss", "step", log_y=True)] if loss else []
    for name in [n for n in names if n not in ("step", "fid_seconds", "fid_num_images")]:
        found = []
        for n in sorted({m.get("fid_num_images", 0) for m in measured}):
            # distances of other numbers of samples are another curve
            same = [m for m in measured if m.get("fid_num_images", 0) == n]
            found += series(name, f"{n} samples" if n else "", True, same)
        if found:
            title = "FID" if name == "fid" else f"Frechet distance ({name})"
            plots.append(line_plot(found, title, "step"))
    return stack(plots) if plots else None
