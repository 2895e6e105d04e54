"""Sampled images: a tensor that is also pictures, for notebooks and files."""

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from .. import UserError


class NonFinite(UserError):
    """Says that pictures have values that are NaN or infinite."""

    def __init__(self, names: str):
        super().__init__(
            f"{names} would not be finite: the network's numbers have overflowed. Try a smaller "
            "--guidance_scale or LoRA weight, or --amp no; a model of a diverged training "
            "cannot be sampled"
        )


def to_uint8(x: Tensor, indices: Sequence[int] | None = None) -> np.ndarray:
    """Convert images (B, 3, H, W) in [-1, 1] to pixels (B, H, W, 3) uint8.

    indices: the images' numbers, for the message. Raises NonFinite where a value is not finite.
    """
    rows = (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if rows:
        shown = ", ".join(str(row if indices is None else indices[row]) for row in rows[:8])
        raise NonFinite(f"{len(rows)} of {len(x)} pictures ({shown})")
    x = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return x.permute(0, 2, 3, 1).cpu().numpy()


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> Image.Image:
    """Arrange (N, H, W, 3) uint8 row by row in one picture, by default as square as possible."""
    n, H, W, _ = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cells = np.full((rows * columns, gap + H, gap + W, 3), 255, np.uint8)
    cells[:n, gap:, gap:] = images
    table = rearrange(cells, "(row column) H W C -> (row H) (column W) C", column=columns)
    return Image.fromarray(np.pad(table, ((0, gap), (0, gap), (0, 0)), constant_values=255))


class Images(Tensor):
    """Hold images (N, 3, H, W) float32 in [-1, 1]; what is computed from them is a plain Tensor.

    In a notebook they show themselves, as a grid.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    def pil(self) -> list[Image.Image]:
        """Make a picture of each. Raises NonFinite where a value is not finite."""
        return [Image.fromarray(image) for image in to_uint8(self)]

    def grid(self, columns: int | None = None) -> Image.Image:
        """Make one picture of all, by default as square as possible."""
        return grid(to_uint8(self), columns)

    def __reduce_ex__(self, protocol):  # files of them are files of tensors
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return self.clone().as_subclass(Images)

    def _repr_png_(self) -> bytes | None:
        out = io.BytesIO()
        self.grid().save(out, "PNG")
        return out.getvalue()
