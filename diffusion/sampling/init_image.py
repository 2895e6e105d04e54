"""Images to start from: an init image and its mask, read as `Pipeline.frames` takes them."""

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate

from .. import UserError
from ..config import SIDE, check_bounds, sides
from ..data.images import BadImage, read_image, read_mask
from ..runtime.distributed import log

if TYPE_CHECKING:
    from .pipeline import Pipeline

INPAINTS = "this model repaints a part of an image (inpainting): give --init_image and --mask"
Picture = str | Path | Image.Image


def read_init_image(
    pipeline: "Pipeline",
    init_image: Picture | None,
    mask: Picture | None = None,
    height: int | None = None,
    width: int | None = None,
) -> dict:
    """Read init (1, C, H, W) and mask (1, 1, H, W); {} where there is no init image.

    For a model that inpaints, also kept (1, C, H, W); its mask is cut at a half before it is made
    smaller, by nearest neighbours, as diffusers does.
    A latent pipeline takes the image's aspect where height and width do not say otherwise.
    Raises UserError for files that cannot be read, and for a mask of another size than the image.
    """
    if init_image is None:
        return {}
    if pipeline.inpaints and mask is None:
        raise UserError(INPAINTS)
    image = _read(init_image, lambda path: read_image(path, None))
    if pipeline.codec.factor > 1:
        pipeline.set_size(*size_like(image, pipeline, height, width))
    H = pipeline.height
    W = pipeline.width
    scale = max(W / image.width, H / image.height)
    kept = f"{round(W / scale)}x{round(H / scale)}"
    name = "the init image" if isinstance(init_image, Image.Image) else init_image
    log(f"{name}: {image.width}x{image.height}, cut to {kept}, becomes {W}x{H}")
    x = torch.from_numpy(_crop(image, W, H)).permute(2, 0, 1)[None].float() / 127.5 - 1
    start = {"init": pipeline.encode(x)}
    if mask is None:
        return start
    white = _read_mask(mask, image, init_image, (W, H))
    grid = start["init"].shape[-2:]
    if pipeline.inpaints:
        white = (white >= 0.5).float()
        start["kept"] = pipeline.encode(x * (1 - white))
        start["mask"] = interpolate(white, grid)
    else:
        start["mask"] = (interpolate(white, grid, mode="area") > 0.5).float()
    if not start["mask"].any():
        raise UserError(
            f"--mask {mask} repaints nothing: it is white nowhere, or in spots too "
            "small for this model; paint white what to repaint"
        )
    return start


def _read_mask(
    mask: Picture, image: Image.Image, init_image: Picture, size: tuple[int, int]
) -> torch.Tensor:
    """Read a mask (1, 1, H, W) from 0 to 1, cut as its image is, to (W, H) = size."""
    strokes = _read(mask, read_mask)
    w, h = image.size
    w_mask, h_mask = strokes.size
    if min(abs(w * h_mask / h - w_mask), abs(h * w_mask / w - h_mask)) > 1:  # beyond rounding
        raise UserError(
            f"--mask {mask} has {w_mask}x{h_mask} pixels, and --init_image {init_image} "
            f"{w}x{h}: give a mask of the image's size, or of its aspect"
        )
    white = _crop(strokes.resize(image.size, Image.LANCZOS), *size)
    return torch.from_numpy(white).float()[None, None] / 255


def _read(picture: Picture, reader) -> Image.Image:
    """Read a file; what is a picture already, as if it were one."""
    if isinstance(picture, Image.Image):
        file = io.BytesIO()
        upright = ImageOps.exif_transpose(picture)
        kept = upright.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # which a PNG can be
        (upright if kept else upright.convert("RGB")).save(file, "PNG")
        source = file.getvalue()
    else:
        source = Path(picture)
    try:
        return Image.fromarray(reader(source))
    except BadImage as error:
        raise UserError(f"{picture}: {error}") from None


def _crop(picture: Image.Image, W: int, H: int) -> np.ndarray:
    return np.array(ImageOps.fit(picture, (W, H), Image.LANCZOS))


def size_like(image, pipeline, height: int | None, width: int | None) -> tuple[int, int]:
    """Choose (height, width) in the aspect of an image, of about as many pixels as the model's own.

    One that is given stays; sides are multiples of the VAE's factor.
    """
    aspect = image.width / image.height
    factor = pipeline.codec.factor
    side = math.sqrt(math.prod(sides(pipeline.config.image_size)))
    h = side / aspect**0.5 if width is None else width / aspect
    w = side * aspect**0.5 if height is None else height * aspect
    if height is None:
        height = max(factor, round(h / factor) * factor)
    if width is None:
        width = max(factor, round(w / factor) * factor)
    check_bounds({"height": height, "width": width}, {"height": SIDE, "width": SIDE})
    return height, width
