"""viz/index.html: one file, without network or framework, that plays with the samplers' frames.

The page is page.html with the frames put in as data: a JSON object in which every image is a
film strip, its frames one below the other, as a WebP data URI.
"""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from ..files.checkpoint import write_text
from ..sampling.pipeline import Pipeline
from .views import Picked, Trajectory

MOST_BYTES = 9_500_000
# (largest side, WebP options), the best first; the page takes the first that fits
LOSSLESS = (64, {"lossless": True})  # small pictures are worth it, and noise suffers from the rest
QUALITIES = (
    (256, {"quality": 85}),
    (192, {"quality": 75}),
    (128, {"quality": 75}),
    (96, {"quality": 60}),
    (64, {"quality": 50}),
    (32, {"quality": 40}),
)


def film_strip(frames: np.ndarray, side: int, options: dict) -> str:
    """(F, H, W, 3) uint8 -> data URI of a WebP, F frames of at most `side` pixels below another."""
    F, H, W, _ = frames.shape
    if H > side:
        small = [Image.fromarray(f).resize((side, side), Image.BOX) for f in frames]
        frames = np.stack([np.asarray(f) for f in small])
    picture = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))
    out = io.BytesIO()
    picture.save(out, "WEBP", method=4, **options)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def encode(process: Trajectory, side: int, options: dict) -> dict:
    strips = {"x": process.x, "x0": process.x0}
    return {"name": process.name, "t": process.t} | {
        key: [film_strip(pictures[:, i], side, options) for i in range(pictures.shape[1])]
        for key, pictures in strips.items()
        if pictures is not None
    }


def page_data(pipeline: Pipeline, forward: Trajectory, data: Picked, runs, side, options) -> dict:
    T = len(pipeline.schedule)
    at = np.unique(np.linspace(0, T - 1, min(T, 201)).round().astype(int))
    snr = 2 * pipeline.schedule.lam[at]
    size = forward.x.shape[2]
    return {
        "T": T,
        "size": min(size, side),
        "schedule": {
            "t": at.tolist(),
            "alpha_bar": pipeline.schedule.alpha_bar[at].tolist(),
            "log_snr": snr.clamp(-30, 30).tolist(),
            "name": pipeline.config.schedule,
        },
        "forward": encode(forward, side, options),
        "names": data.names[: forward.x.shape[1]],
        "captions": data.captions[: forward.x.shape[1]],
        "runs": [encode(run, side, options) for run in runs],
        "about": f"{Path(pipeline.config.data).name}, {pipeline.config.image_size} px, T = {T}",
    }


def embed(values: dict) -> str:
    """JSON that is inert inside a script element, whatever stands in names and captions."""
    text = json.dumps(values, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def write_page(path: Path, pipeline: Pipeline, forward: Trajectory, data: Picked, runs) -> None:
    """Write the page below 10 MB, with as good pictures as that allows."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    small = forward.x.shape[2] <= LOSSLESS[0]
    for side, options in (*([LOSSLESS] if small else []), *QUALITIES):
        values = page_data(pipeline, forward, data, runs, side, options)
        text = template.replace("@@DATA@@", embed(values))
        if len(text) <= MOST_BYTES:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
