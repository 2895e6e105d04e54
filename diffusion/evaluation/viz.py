"""Pictures: tensors to PNG files and grids."""

import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def to_uint8(x: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    x = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return x.permute(0, 2, 3, 1).cpu().numpy()


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> Image.Image:
    """(N, H, W, 3) uint8 -> one picture, row by row; as square as possible by default."""
    n, H, W, _ = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (H + gap) + gap, columns * (W + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (H + gap) + gap, (i % columns) * (W + gap) + gap
        sheet[y : y + H, x : x + W] = image
    return Image.fromarray(sheet)


def save_png(image: Image.Image | np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, format="PNG")
