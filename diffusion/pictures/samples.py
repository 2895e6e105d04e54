"""Sampled pictures as files: numbered PNGs and a grid of them, or a strip from LoRA to LoRA."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ..files.output import drop_others, reserve, write_free
from ..runtime import distributed as dist
from ..sampling.adapt import set_weights
from ..sampling.pipeline import Pipeline
from .grid import grid, strip, to_uint8, write_png

GRID_IMAGES = 100  # at most
SMALL = 64  # pixels; a grid of smaller images is enlarged, for people to see them


def sample_batches(
    pipeline: Pipeline,
    options: Callable[[range], dict],
    count: int,
    batch_size: int,
    title: str | None = None,
) -> Iterator[tuple[range, dict, np.ndarray]]:
    """Sample this rank's part of images 0 ... count - 1: indices, options and (b, H, W, 3) uint8.

    options: indices -> the options of `Pipeline.sample_batch` for these images. Batches go to the
    ranks in turn, so that an image's batch mates never change. title: of a bar that does not stay.
    Raises NonFinite.
    """
    turn = batch_size * dist.world_size()
    with dist.progress(total=count, desc=title, unit="img", leave=title is None) as bar:
        for low in range(dist.rank() * batch_size, count, turn):
            indices = range(low, min(low + batch_size, count))
            given = options(indices)
            yield indices, given, to_uint8(pipeline.sample_batch(indices, **given), indices)
            bar.update(min(turn, count - bar.n))


@contextlib.contextmanager
def behind(function: Callable[..., None], device: torch.device) -> Iterator[Callable[..., None]]:
    """Call a function in a thread while a GPU samples: one call at a time, in their order.

    An error of it is raised at the next call, or in the end, which waits for the last. Where the
    device is the CPU the caller waits: it would only lose the cores that the function takes.
    """
    if device.type == "cpu":
        yield function
        return
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(int)

        def call(*args) -> None:
            nonlocal last
            last.result()
            last = pool.submit(function, *args)

        yield call
        last.result()


@dataclass(frozen=True, eq=False)
class Samples:
    """Sample images 0 to count - 1 of a pipeline, for the folder that they are written to.

    options: indices -> the options of `Pipeline.sample_batch` for these images.
    describe: (options, row of the batch, index, pixels) -> the text of an image's PNG.
    overwrite: whether pictures of earlier calls may be replaced.
    """

    pipeline: Pipeline
    options: Callable[[range], dict]
    describe: Callable[[dict, int, int, np.ndarray], str]
    folder: Path
    count: int
    batch_size: int
    overwrite: bool

    def write(self, name: str, picture: Image.Image, text: dict | None = None) -> Path:
        """Write a picture beside images/, under a free name or in place of ours."""
        path = self.folder / name
        return write_free(path, lambda path: write_png(picture, path, text), self.overwrite)

    def write_images(self) -> None:
        """Write images/, on all ranks, and a grid of the first."""
        folder = self.folder / "images"
        with contextlib.ExitStack() as held:
            numbers = None
            if dist.is_main():
                numbers = held.enter_context(reserve(folder, self.count, self.overwrite))
            numbers = dist.from_main(numbers)
            if numbers.older and not self.overwrite:
                dist.log(
                    f"{folder} holds {numbers.older} pictures from before: these are numbered "
                    f"from {numbers.first}; the same --seed makes the same pictures, another others"
                )

            def save(indices: range, options: dict, images: np.ndarray) -> None:
                for row, (i, image) in enumerate(zip(indices, images)):
                    text = {"parameters": self.describe(options, row, i, image)}
                    numbers.save(i, lambda path: write_png(image, path, text))

            pipeline = self.pipeline
            with behind(save, pipeline.device) as save_batch:
                for batch in sample_batches(pipeline, self.options, self.count, self.batch_size):
                    save_batch(*batch)
            dist.barrier()
            if dist.is_main():
                if self.overwrite and (dropped := numbers.drop_older()):
                    dist.log(f"{dropped} other pictures of earlier calls are deleted")
                    drop_others(self.folder / "grid.png")
                first = [numbers.file(i) for i in range(min(self.count, GRID_IMAGES))]
                images = np.stack([Image.open(file) for file in first])
                times = math.ceil(96 / images.shape[1]) if images.shape[1] < SMALL else 1
                sheet = ImageOps.scale(grid(images), times, Image.Resampling.NEAREST)
                path = self.write("grid.png", sheet)
                last = numbers.file(self.count - 1)
                part = "all" if len(first) == self.count else f"the first {len(first)}"
                dist.log(
                    f"{self.count} images in {folder}, {first[0].name} to {last.name}; {part} of "
                    f"them in {path}"
                )

    def write_interpolation(
        self, loras: Sequence[tuple[str, float]], first: int, points: int
    ) -> None:
        """Write interpolation.png on one rank: row i is image i, columns go from LoRA to LoRA.

        loras: their names and weights, of which they get (1 - w) and w. first: the first one's
        position among the pipeline's LoRAs; the second follows.
        """
        (name_a, weight_a), (name_b, weight_b) = loras
        columns = []
        fractions = np.linspace(0, 1, points)
        starts = range(0, self.count, self.batch_size)
        batches = [range(low, min(low + self.batch_size, self.count)) for low in starts]
        for w in dist.progress(fractions, unit="column"):
            weights = {str(first): (1 - w) * weight_a, str(first + 1): w * weight_b}
            set_weights(self.pipeline, weights)
            sample = self.pipeline.sample_batch
            column = [to_uint8(sample(i, **self.options(i)), i) for i in batches]
            columns.append(np.concatenate(column))
        picture = strip(np.stack(columns, 1), [f"{w:.2g}" for w in fractions])
        text = {"parameters": self.describe(self.options(range(1)), 0, 0, columns[-1][0])}
        path = self.write("interpolation.png", picture, text)
        dist.log(f"{path}: from {name_a} to {name_b}")
