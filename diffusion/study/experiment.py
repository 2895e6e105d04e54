"""Run a study: the cells that are missing, their measures, the report.

results/<timestamp>_<name>/
    config.json    settings, and stamps of the base model and the data: what makes it the same study
    metrics.json   every cell's measures and costs, written after each step: what is done is here
    checkpoints/   the classifier, and what each cell's training has written
    inference/     each cell's images, grid.png and prompts
    thumbnails/    rows of images    logs.txt    report.html
    data/          while it runs, or with --keep_images: the training images
"""

import dataclasses
import shutil
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from .. import UserError, printable
from ..data.images import BadImage, read_image
from ..files.atomic import append_text, read_lines, write_text
from ..files.output import is_ours, numbered
from ..files.sd_files import write_json
from ..files.text_files import read_json
from ..pictures.grid import grid, save_png, strip
from ..runtime.distributed import log, progress
from ..training.run_folder import claim
from .judge import Judge
from .plan import Cell, Plan, Settings
from .report import write_report
from .runner import run_child, sample_arguments, token_of, train_arguments
from .study_folder import seal
from .styles import Style, replace_name, training_folder

SHOWN = 8  # images of a thumbnail
THUMBNAIL_HEIGHT = 160


# --- one cell ------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Study:
    """Run a study in its folder. run_child: see runner.py; tests replace it."""

    settings: Settings
    folder: Path
    judge: Judge
    metrics: dict
    run_child: Callable = run_child

    def __post_init__(self):
        self.plan = Plan(self.settings, {s.name: s.slug for s in self.styles.values()})
        self.cells = self.plan.cells()

    @property
    def styles(self) -> dict[str, Style]:
        return self.judge.styles

    def save(self) -> None:
        for entry in self.metrics["cells"].values():
            entry["sha256"] = seal(entry)
        write_json(self.folder / "metrics.json", self.metrics)

    def note(self, message: str) -> None:
        log(message)
        stamped = f"[{datetime.now():%Y-%m-%d %H:%M:%S}] {message}\n"
        append_text(self.folder / "logs.txt", printable(stamped))

    def entry(self, cell: Cell) -> dict:
        """Return a cell's part of metrics.json; what a cell is, is the plan's to say."""
        found = self.metrics["cells"].setdefault(cell.name, {})
        found |= dataclasses.asdict(cell)
        return found

    def done(self, cell: Cell) -> bool:
        return "measures" in self.metrics["cells"].get(cell.name, {})

    def count_images(self, cell: Cell) -> int:
        return self.settings.mix_images if cell.kind == "mix" else self.settings.num_images

    def work(self, cell: Cell) -> int:
        """Estimate network evaluations: a training image counts for three, guidance takes two."""
        s = self.settings
        return 3 * cell.steps * s.batch_size + 2 * self.count_images(cell) * s.sample_steps

    def result_file(self, cell: Cell) -> Path:
        """Name the file that a cell's training is for, in the folder of its run."""
        name = "ema.safetensors" if cell.kind == "dreambooth" else "adapter.safetensors"
        return self.folder / "checkpoints" / cell.name / name

    def thumbnail(self, name: str) -> Path:
        return self.folder / "thumbnails" / f"{name}.png"

    def prompts(self, cell: Cell) -> list[str]:
        """List the prompts of a cell's images, in order."""
        style = self.styles[cell.style]
        found = style.prompts
        if cell.kind == "textual_inversion":
            token = token_of(style.slug)
            found = [replace_name(prompt, style.name, token) for prompt in found]
        elif cell.kind == "mix":  # of both, without either's name
            other = self.styles[cell.other]
            both = [prompt for pair in zip(style.prompts, other.prompts) for prompt in pair]
            bare = [replace_name(replace_name(p, style.name, ""), other.name, "") for p in both]
            found = [p for p in bare if p] or [f"{style.name}, {other.name}"]
        return [found[i % len(found)] for i in range(self.count_images(cell))]

    def train(self, cell: Cell) -> None:
        """Run train.py for a cell, and keep what it cost in the cell's entry."""
        style = self.styles[cell.style]
        word = "{}" if cell.kind == "textual_inversion" else None
        data = training_folder(style, self.folder / "data" / style.slug, word)
        entry = self.entry(cell)
        entry["attempts"] = entry.get("attempts", 0) + 1
        self.save()
        file = self.result_file(cell)
        target = file.parent
        if not (target / "checkpoints").exists():  # nothing to resume: its entry was damaged
            shutil.rmtree(target, ignore_errors=True)
        args = train_arguments(self.settings, cell, style.slug, data, target, self.folder / "cache")
        cost = self.run_child("train.py", args, self.folder / "logs.txt")
        step = read_json(target / "metadata.json")["step"]
        if step != cell.steps or not file.is_file():
            raise UserError(
                f"the training in {target} was stopped at step {step} of {cell.steps}. "
                "Run the same command to resume the study."
            )
        lines = read_lines(target / "metrics.jsonl")
        rates = [rate for line in lines if (rate := line.get("img_per_s"))]
        entry["cost"] = cost | {
            "file": str(file.relative_to(self.folder)),
            "file_bytes": file.stat().st_size,
            "images_per_second": median(rates) if rates else None,
        }
        self.save()
        for name in ("checkpoints", "tensorboard", "samples"):  # it will not be resumed again
            shutil.rmtree(target / name, ignore_errors=True)
        for name in ("model.pt", "best.safetensors"):
            (target / name).unlink(missing_ok=True)

    def sample(self, cell: Cell) -> np.ndarray:
        """Run sample.py for a cell: (N, H, W, 3) uint8."""
        target = self.folder / "inference" / cell.name
        target.mkdir(parents=True, exist_ok=True)
        prompts = target / "prompts.txt"
        write_text(prompts, "\n".join(self.prompts(cell)) + "\n")
        trained = [self.result_file(c) for c in self.plan.trained(cell)]
        args = sample_arguments(self.settings, cell, trained, prompts, target)
        self.run_child("sample.py", args, self.folder / "logs.txt")
        images = read_images(target / "images")
        save_png(thumbnail(images), self.thumbnail(cell.name))
        return images

    def run(self, cell: Cell) -> None:
        began = time.perf_counter()
        entry = self.entry(cell)
        if cell.steps and "cost" not in entry:
            self.train(cell)
        images = self.sample(cell)
        prompts = self.prompts(cell)
        entry["measures"] = self.judge(images, prompts, cell.style, cell.other)
        entry["prompts"] = prompts[:SHOWN]
        entry["seconds"] = time.perf_counter() - began
        self.save()
        values = [f"{name} {m['value']:.3g}" for name, m in entry["measures"].items()]
        self.note(f"{cell.name}: {', '.join(values)}; {entry['seconds']:.0f} s")


def read_images(folder: Path) -> np.ndarray:
    """Read the images that sample.py has written to a folder, (N, H, W, 3) uint8, in order.

    Raises UserError if they are none, damaged or of several sizes.
    """
    files = [file for _, file in sorted(numbered(folder).items()) if file.suffix == ".png"]
    files = list(filter(is_ours, files)) or files  # older versions did not mark them
    try:
        return np.stack([read_image(file, None) for file in files])
    except (BadImage, ValueError) as error:
        raise UserError(
            f"{folder} holds no samples that can be used: {error}; run the study again with --new"
        ) from None


def thumbnail(images: np.ndarray) -> Image.Image:
    """Put the first images in a row, larger ones reduced."""
    shown = images[:SHOWN]
    picture = grid(shown, columns=len(shown))
    picture.thumbnail((picture.width, THUMBNAIL_HEIGHT), Image.LANCZOS)
    return picture


# --- all cells -----------------------------------------------------------------------------------


def run_study(study: Study) -> Path:
    """Run all cells that are missing; the report is written after each, and at the end."""
    bar = progress(
        total=sum(map(study.work, study.cells)),
        initial=sum(map(study.work, filter(study.done, study.cells))),
        bar_format="{desc} |{bar:20}| {elapsed}<{remaining}",
        smoothing=0,
    )
    with claim(study.folder), bar:
        count = study.settings.num_images
        study.metrics["real"] = {name: study.judge.real(name, count) for name in study.styles}
        for style in study.styles.values() if study.settings.keep_images else ():
            save_png(thumbnail(style.held_out.pixels), study.thumbnail(f"real_{style.slug}"))
        study.save()
        try:
            for i, cell in enumerate(study.cells):
                bar.set_description_str(f"study {i}/{len(study.cells)} {cell.name}")
                if not study.done(cell):
                    study.run(cell)
                    write_report(study)
                    bar.update(study.work(cell))
        except KeyboardInterrupt:
            study.note(f"Stopped. Run the same command to resume in {study.folder}.")
            raise
        finally:
            if not study.settings.keep_images:
                shutil.rmtree(study.folder / "data", ignore_errors=True)
        mixtures = [cell for cell in study.cells if cell.kind == "mix"]
        if mixtures:  # a row for each of a few noises
            folder = study.folder / "inference"
            columns = [read_images(folder / cell.name / "images")[:4] for cell in mixtures]
            picture = strip(np.stack(columns, 1), [f"{cell.share:.2f}" for cell in mixtures])
            save_png(picture, study.thumbnail("interpolation"))
        study.metrics["finished"] = True
        study.save()
        shutil.rmtree(study.folder / "cache", ignore_errors=True)
        return write_report(study)
