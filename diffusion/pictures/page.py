"""Write viz/index.html: one file, without network or framework, to play with the samplers' frames.

The page is page.html with the frames put in as data: a JSON object in which every image is a
strip, its frames one below the other, as a WebP data URI; and with the samplers' tables, which
laboratory.js runs on 2-D points of a mixture of Gaussians, as their exact x0 is known.
"""

import json
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from ..config import size_text
from ..process.names import SAMPLERS, SPACINGS
from ..sampling.pipeline import Pipeline
from .grid import Picked, Trajectory, data_uri

MAX_BYTES = 9_500_000
# (largest side, WebP options), the best first; the page takes the first that fits
LOSSLESS = (64, {"lossless": True})  # small pictures are worth it, and noise suffers from the rest
QUALITIES = (
    (256, {"quality": 85}),
    (128, {"quality": 75}),
    (64, {"quality": 50}),
    (32, {"quality": 40}),
)
STEPS = (1, 2, 3, 5, 8, 10, 15, 20, 50)  # of the laboratory's tables
EXACT = ("adams4", 200, "logsnr")  # its end is within 2e-5 of that of 1,600 steps


def frame_strip(frames: np.ndarray, side: int, options: dict) -> str:
    """Make the data URI of a WebP of (F, H, W, 3) uint8, reduced to `side`, below each other."""
    height, width = reduced(*frames.shape[1:3], side)
    small = [Image.fromarray(frame).resize((width, height), Image.BOX) for frame in frames]
    return data_uri(Image.fromarray(np.concatenate(small)), "WEBP", **options)


def reduced(height: int, width: int, side: int) -> tuple[int, int]:
    """Give the size of a picture whose longer side is at most `side`."""
    scale = min(1.0, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def embed(values: dict) -> str:
    """Write JSON that is inert in a script element, whatever stands in names and captions."""
    text = json.dumps(values, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def tables(pipeline: Pipeline) -> list[list]:
    """List EXACT and every table that can be chosen: [options, start, levels, keep, to_x, to_y].

    start: the deviation of the noise that a table starts from. No to_y where it is to_x.
    """
    choices = [EXACT]
    for name, kind in SAMPLERS.items():
        etas = np.unique(np.linspace(*kind.etas, 3)).tolist()
        choices += product([name], STEPS, SPACINGS, etas)
    found = []
    for options in choices:
        table = pipeline.table(*options)
        columns = [k.tolist() for k in (table.levels, table.keep, table.to_x, table.to_y)]
        start = pipeline.schedule.prior_std(*columns[0][0])
        if columns[2] == columns[3]:
            columns.pop()
        found.append([options, start, *columns])
    return found


def write_page(path: Path, pipeline: Pipeline, forward: Trajectory, data: Picked, runs) -> None:
    """Write the page below 10 MB, with as good pictures as that allows."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    script = Path(__file__).with_name("laboratory.js").read_text(encoding="utf-8")
    schedule = pipeline.schedule
    T = len(schedule)
    at = np.unique(np.linspace(0, T - 1, min(T, 201)).round().astype(int))
    count, height, width = forward.x.shape[1:4]
    laboratory = tables(pipeline)
    px = size_text(pipeline.config.image_size)
    for side, options in QUALITIES if max(height, width) > LOSSLESS[0] else (LOSSLESS, *QUALITIES):

        def encode(process: Trajectory) -> dict:
            """Make the page's data of a process: a strip of frames for each image."""
            found = {"name": process.name, "t": process.t}
            for key, pictures in (("x", process.x), ("x0", process.x0)):
                if pictures is not None:
                    strips = pictures.swapaxes(0, 1)
                    found[key] = [frame_strip(frames, side, options) for frames in strips]
            return found

        values = {
            "T": T,
            "size": reduced(height, width, side),
            "schedule": {
                "t": at.tolist(),
                "log_snr": (2 * schedule.lam[at]).clamp(-30, 30).tolist(),
                "path": pipeline.config.path,
                "name": pipeline.config.schedule,
            },
            "forward": encode(forward),
            "names": data.names[:count],
            "captions": data.captions[:count],
            "runs": list(map(encode, runs)),
            "laboratory": laboratory,
            "about": f"{Path(pipeline.config.data).name}, {px} px, T = {T}",
        }
        text = template.replace("@@LABORATORY@@", script).replace("@@DATA@@", embed(values))
        if len(text) <= MAX_BYTES:
            break
    path.write_text(text, encoding="utf-8")
