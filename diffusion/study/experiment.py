"""The study: finds its folder, runs the cells that are missing, measures, reports.

results/<timestamp>_<name>/
    config.json    settings, and stamps of the base and the data: what makes it the same study
    metrics.json   every cell's measures and costs, written after each step: what is done is here
    checkpoints/   the classifier, and per cell what its training left
    inference/     per cell the images, grid.png and the prompts
    thumbnails/    strips        logs.txt    report.html
"""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import median

import numpy as np

from .. import UserError
from ..files.checkpoint import read_lines, write_text
from ..files.output import is_ours, numbered
from ..files.validate import read_json
from ..pictures.grid import grid, save_png, strip
from ..runtime.distributed import log, progress
from ..training.run_folder import claim
from . import runner
from .judge import Judge, read_images
from .plan import Cell, Settings, cells_of
from .report import write_report
from .runner import Base, result_file
from .styles import Style, replaced, training_folder

SHOWN = 8  # images of a strip


# --- one cell ------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Study:
    """run_child: see runner.py; tests put another in its place."""

    settings: Settings
    base: Base
    folder: Path
    styles: list[Style]
    judge: Judge
    metrics: dict
    run_child: Callable = runner.run_child

    def __post_init__(self):
        self.by_name = {style.name: style for style in self.styles}
        slugs = {style.name: style.slug for style in self.styles}
        self.cells = list(cells_of(self.settings, slugs))

    def save(self) -> None:
        write_text(self.folder / "metrics.json", json.dumps(self.metrics, indent=2))

    def note(self, message: str) -> None:
        log(message)
        with open(self.folder / "logs.txt", "a", encoding="utf-8") as file:
            file.write(f"[{datetime.now():%Y-%m-%d %H:%M:%S}] {message}\n")

    def entry(self, cell: Cell) -> dict:
        """A cell's part of metrics.json."""
        return self.metrics["cells"].setdefault(cell.name, dataclasses.asdict(cell))

    def done(self, cell: Cell) -> bool:
        return "measures" in self.metrics["cells"].get(cell.name, {})

    def images_of(self, cell: Cell) -> int:
        return self.settings.mix_images if cell.kind == "mix" else self.settings.num_images

    def work(self, cell: Cell) -> int:
        """In network evaluations: a training image counts for three, guidance takes two."""
        drawn = self.images_of(cell) * self.settings.sample_steps * 2
        return cell.steps * self.settings.batch_size * 3 + drawn

    def trained(self, cell: Cell) -> Path:
        return self.folder / "checkpoints" / cell.name

    def files(self, cell: Cell) -> list[Path]:
        """What the cell is drawn with: its own training's result, or those of two LoRAs."""
        if cell.kind == "mix":
            loras = {c.style: c for c in self.cells if self.is_centre(c)}
            return [result_file(self.trained(c), c) for c in (loras[cell.style], loras[cell.other])]
        return [result_file(self.trained(cell), cell)]

    def is_centre(self, cell: Cell) -> bool:
        s = self.settings
        return (
            cell.kind == "lora"
            and cell.rank == s.rank
            and cell.steps == s.steps
            and cell.learning_rate == float(f"{s.learning_rate:.2g}")
        )

    def prompts(self, cell: Cell) -> list[str]:
        """For all of its images, in order."""
        style = self.by_name[cell.style]
        found = style.prompts
        if cell.kind == "textual_inversion":
            token = runner.token_of(style.slug)
            found = [replaced(p, style.name, token) for p in found]
        elif cell.kind == "mix":  # of both, without either's name
            other = self.by_name[cell.other]
            both = [p for pair in zip(style.prompts, other.prompts) for p in pair]
            bare = [replaced(replaced(p, style.name, ""), other.name, "") for p in both]
            found = [p for p in bare if p] or [f"{style.name}, {other.name}"]
        return [found[i % len(found)] for i in range(self.images_of(cell))]

    def train(self, cell: Cell, tick) -> None:
        """Runs train.py; what the cell costs goes into its entry."""
        style = self.by_name[cell.style]
        target = self.trained(cell)
        inverts = cell.kind == "textual_inversion"
        name = f"{style.slug}_token" if inverts else style.slug
        data = training_folder(style, self.folder / "data" / name, "{}" if inverts else None)
        entry = self.entry(cell)
        entry["attempts"] = entry.get("attempts", 0) + 1
        self.save()
        args = runner.train_arguments(
            self.settings, self.base, cell, style.slug, data, target, self.folder / "cache"
        )
        cost = self.run_child("train.py", args, self.folder / "logs.txt", tick)
        file = result_file(target, cell)
        step = read_json(target / "metadata.json")["step"]
        if step != cell.steps or not file.is_file():
            raise UserError(
                f"the training in {target} was stopped at step {step} of {cell.steps}; "
                "the same command continues the study"
            )
        entry["cost"] = cost | {
            "file": str(file.relative_to(self.folder)),
            "file_bytes": file.stat().st_size,
        }
        rates = [
            line["img_per_s"]
            for line in read_lines(target / "metrics.jsonl")
            if line.get("img_per_s")
        ]
        entry["cost"]["images_per_second"] = median(rates) if rates else None
        self.save()
        for name in ("checkpoints", "tensorboard", "samples"):  # nobody continues it any more
            shutil.rmtree(target / name, ignore_errors=True)
        for name in ("model.pt", "best.safetensors"):
            (target / name).unlink(missing_ok=True)

    def draw(self, cell: Cell, tick) -> np.ndarray:
        """Runs sample.py: (N, H, W, 3) uint8."""
        target = self.folder / "inference" / cell.name
        prompts = self.prompts(cell)
        target.mkdir(parents=True, exist_ok=True)
        left = [*numbered(target / "images").values(), *target.glob("grid*.png")]
        for file in filter(is_ours, left):  # of a call that was stopped, and nobody else's
            file.unlink()
        write_text(target / "prompts.txt", "\n".join(prompts) + "\n")
        what = runner.drawn_with(self.settings, cell, self.files(cell))
        args = runner.sample_arguments(
            self.settings, self.base, what, target / "prompts.txt", len(prompts), target
        )
        self.run_child("sample.py", args, self.folder / "logs.txt", tick)
        images = read_images(target / "images")
        if len(images) != len(prompts):
            raise UserError(
                f"{target / 'images'} holds {len(images)} images; expected {len(prompts)}"
            )
        save_png(thumbnails(images[:SHOWN]), self.folder / "thumbnails" / f"{cell.name}.png")
        return images

    def run(self, cell: Cell, tick) -> None:
        began = time.perf_counter()
        entry = self.entry(cell)
        if cell.trains and "cost" not in entry:
            self.train(cell, tick)
        images = self.draw(cell, tick)
        entry["measures"] = self.judge(images, self.prompts(cell), cell.style, cell.other)
        entry["prompts"] = self.prompts(cell)[:SHOWN]
        entry["seconds"] = time.perf_counter() - began
        self.save()
        told = {k: m["value"] for k, m in entry["measures"].items()}
        self.note(
            f"{cell.name}: {', '.join(f'{k} {v:.3g}' for k, v in told.items())}; "
            f"{entry['seconds']:.0f} s"
        )


def thumbnails(images: np.ndarray, most: int = 160):
    """A row of pictures, the larger ones reduced."""
    from PIL import Image

    if images.shape[1] > most:
        width = round(images.shape[2] * most / images.shape[1])
        small = [Image.fromarray(i).resize((width, most), Image.LANCZOS) for i in images]
        images = np.stack([np.asarray(i) for i in small])
    return grid(images, columns=len(images), gap=2)


# --- all of them ---------------------------------------------------------------------------------


class Progress:
    """A bar over the cells, with the seconds that are left by what the finished ones have taken."""

    def __init__(self, study: Study):
        self.study = study
        self.cell = None
        self.last = 0.0
        done = sum(map(study.done, study.cells))
        self.pause = 1 if sys.stderr.isatty() else 30  # seconds between two lines
        self.bar = progress(
            total=len(study.cells),
            initial=done,
            unit="cell",
            desc="study",
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed}{postfix}",
            mininterval=0,
            miniters=1,
        )

    def left(self) -> float | None:
        """Seconds, or None before anything is finished."""
        study = self.study
        done = [c for c in study.cells if study.done(c)]
        if not done:
            return None
        seconds = sum(study.metrics["cells"][c.name]["seconds"] for c in done)
        rate = seconds / sum(map(study.work, done))
        rest = sum(study.work(c) for c in study.cells if not study.done(c))
        return rate * (rest - self.share() * study.work(self.cell) if self.cell else rest)

    def share(self) -> float:
        """Of the running cell's training that is done."""
        if self.cell is None or not self.cell.trains:
            return 0.0
        lines = read_lines(self.study.trained(self.cell) / "metrics.jsonl")
        return lines[-1]["step"] / self.cell.steps if lines else 0.0

    def __call__(self, cell: Cell | None = None) -> None:
        if cell is None and time.monotonic() - self.last < self.pause:
            return
        self.cell = cell or self.cell
        self.last = time.monotonic()
        left = self.left()
        told = "" if left is None else f", about {left:.0f} s left"
        step = f" {self.share():.0%}" if self.cell.trains else ""
        self.bar.set_postfix_str(f"{self.cell.name}{step}{told}")

    def finished(self) -> None:
        self.bar.update()


def run_study(study: Study) -> Path:
    """All cells that are missing; the report is written after each, and at the end."""
    lock = claim(study.folder)
    study.metrics.setdefault("experiments", list(study.settings.experiments))
    real_images(study)
    study.save()
    bar = Progress(study)
    try:
        for cell in study.cells:
            if study.done(cell):
                continue
            bar(cell)
            study.run(cell, bar)
            bar.finished()
            write_report(study)
    except KeyboardInterrupt:
        study.note(f"stopped; the same command goes on in {study.folder}")
        raise
    finally:
        bar.bar.close()
    if any(c.kind == "mix" for c in study.cells):
        save_png(mixture_strip(study), study.folder / "thumbnails" / "interpolation.png")
    study.metrics["finished"] = True
    study.save()
    report = write_report(study)
    shutil.rmtree(study.folder / "cache", ignore_errors=True)
    if lock is not None:
        lock.close()
    return report


def real_images(study: Study) -> None:
    """What real images measure, and strips of them."""
    count = study.settings.num_images
    study.metrics["real"] = {s.name: study.judge.real(s.name, count) for s in study.styles}
    for style in study.styles:
        picture = thumbnails(style.images("held_out")[:SHOWN])
        save_png(picture, study.folder / "thumbnails" / f"real_{style.slug}.png")


def mixture_strip(study: Study):
    """A row for each of a few noises, a column for each share."""
    cells = [c for c in study.cells if c.kind == "mix"]
    columns = [read_images(study.folder / "inference" / c.name / "images")[:4] for c in cells]
    return strip(np.stack(columns, 1), [f"{c.share:.2f}" for c in cells])
