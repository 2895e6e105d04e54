"""Image diffusion in plain PyTorch: train, sample, look, measure.

model = diffusion.load()              # results/model.pt, else the model that comes with the package
images = model.sample(16, steps=20)   # (16, 3, H, W) in [-1, 1]; images.pil(), images.grid()
folder = diffusion.train(data="FOLDER", train_steps=5000)
"""

from __future__ import annotations

import itertools
import reprlib
import typing

if typing.TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .sampling.pipeline import Pipeline

    File = str | Path
    Lora = File | tuple[File, float]

__version__ = "0.1.0"


class UserError(ValueError):
    """Report a mistake of the user's in one line: what was got, what was expected, what to do.

    The scripts print it without a traceback; in a notebook it is an ordinary ValueError.
    """


def shown(value, limit: int = 80) -> str:
    """Show a value that a file holds, for a message: bounded, on one line, without control codes.

    Texts are shown as Python writes them, everything else by its first items.
    """
    short = reprlib.Repr()
    short.maxlevel = 3
    short.maxstring = short.maxother = limit
    text = short.repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def some(names, count: int = 3) -> str:
    """Show the first few of some names that a file holds, without quotes."""
    first = [shown(str(name), 100)[1:-1] for name in itertools.islice(names, count + 1)]
    return ", ".join(first[:count]) + (" ..." if len(first) > count else "")


def printable(text: str) -> str:
    """Replace what a terminal would obey, or could not show, by Python's escapes.

    Line ends and tabs stay: a message of several lines is ours, and `shown` leaves none in theirs.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def load(
    path: File | None = None,
    *,
    lora: Lora | list[Lora] = (),
    embedding: File | Sequence[File] = (),
    guide: File | None = None,
    weights: str | None = None,
    device: str = "auto",
    sd_path: File | None = None,
    config: File | None = None,
    vae: File | None = None,
    height: int | None = None,
    width: int | None = None,
    **options,
) -> Pipeline:
    """Open any model as something to sample from.

    path: a model.pt or ema.safetensors, the folder of a run, or Stable Diffusion 1.x as a diffusers
    folder or a single file; None: results/model.pt, and where there is none, the model that comes
    with the package. lora: a file, (file, weight), or a list of these. embedding: files of textual
    inversions. guide: a worse model of the same kind, which guidance leads away from. weights:
    "ema" or "raw". device: "cpu", "cuda", "mps" or "auto". sd_path, vae: where the networks are now
    that a latent model was trained with; config: the configs of a single file of other sizes.
    height, width: of a latent model's images, in pixels. options: amp, clip_skip, objective,
    vae_tiling, as for sample.py; merged=False leaves LoRAs beside the weights, see `adapt`.
    Raises UserError for files that are no models, and for options that the model has no use for.
    """
    from pathlib import Path

    from .runtime import distributed  # torch takes seconds to import
    from .sampling.load import load

    one = isinstance(lora, tuple) and len(lora) == 2 and isinstance(lora[1], int | float)
    loras = [lora] if one or isinstance(lora, str | Path) else lora or []
    embeddings = [embedding] if isinstance(embedding, str | Path) else embedding or []
    if path is None:
        path, sd_path = sd_path, None
    places = {"guide": guide, "config": config, "vae": vae}
    return load(
        path,
        weights,
        distributed.prepare(distributed.find_device(device)),
        sd_path and str(sd_path),
        loras=[pair if isinstance(pair, tuple) else (pair, 1.0) for pair in loras],
        embeddings=embeddings,
        **{name: place and str(place) for name, place in places.items()},
        height=height,
        width=width,
        **options,
    )


def train(*, preset: str | None = None, **options) -> Path:
    """Train a model, or go on with the run in save_folder; return this folder, for `load`.

    options: those of train.py, by the same names: data, image_size, train_steps, save_folder, ...
    preset: a recipe to start from, or several with commas; None: that of the data, as train.py.
    Ctrl-C (in a notebook: stop) saves the step that was reached, and the same call resumes it.
    Raises UserError for mistakes in the options.
    """
    from pathlib import Path

    from .config import config_from_options
    from .training.trainer import train

    config = config_from_options(options, preset)
    train(config, set(options))
    return Path(config.save_folder)
