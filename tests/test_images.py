"""Pixels mean what their file says: masks, colour profiles, depth."""

import numpy as np
import pytest
from PIL import Image

from diffusion.data.images import BadImage, read_mask

# --- masks ---------------------------------------------------------------------------------------

KEEP, PAINT = 0, 255


def strokes(mode: str, ground, stroke) -> Image.Image:
    """A stroke over columns 2 and 3 of 6x4 pixels."""
    image = Image.new(mode, (6, 4), ground)
    image.paste(stroke, (2, 0, 4, 4))
    return image


STROKE = np.tile(np.uint8([KEEP, KEEP, PAINT, PAINT, KEEP, KEEP]), (4, 1))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("image", [
    strokes("L", 0, 255), strokes("RGB", "black", "white"), strokes("1", 0, 1), strokes("P", 0, 1),
    strokes("RGBA", (0, 0, 0, 0), "white"),  # white strokes on a transparent layer
    strokes("RGBA", (255, 255, 255, 0), "white"),  # the same, as many editors write it
    strokes("RGBA", "black", "white"),
    strokes("LA", (255, 0), (255, 255)), strokes("LA", (0, 255), (255, 255)),
    Image.fromarray(np.uint16(STROKE) * 257),
], ids=lambda i: i.mode)  # fmt: skip
def test_white_is_repainted_and_transparent_is_not(tmp_path, image, suffix):
    if image.mode == "P":
        image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(tmp_path / f"m.{suffix}")
    assert np.array_equal(read_mask(tmp_path / f"m.{suffix}"), STROKE)


def test_a_palette_s_transparent_entry_is_not_repainted(tmp_path):
    image = strokes("P", 0, 1)
    image.putpalette([255, 255, 255, 255, 255, 255])
    image.save(tmp_path / "m.png", transparency=0)
    assert np.array_equal(read_mask(tmp_path / "m.png"), STROKE)


def test_a_soft_brush_is_luminance_times_alpha(tmp_path):
    Image.new("LA", (2, 2), (200, 240)).save(tmp_path / "m.png")
    assert (read_mask(tmp_path / "m.png") == round(200 * 240 / 255)).all()


def test_a_mask_is_turned_by_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    strokes("L", 0, 255).save(tmp_path / "m.png", exif=exif)
    assert np.array_equal(read_mask(tmp_path / "m.png"), STROKE.T)


@pytest.mark.parametrize("image", [
    strokes("RGBA", (0, 0, 0, 0), "black"), strokes("LA", (0, 0), (0, 255)),
    strokes("RGBA", (255, 255, 255, 0), "black"), Image.new("RGBA", (6, 4), (255, 255, 255, 0)),
], ids=range(4))  # fmt: skip
def test_a_mask_that_says_only_by_transparency(tmp_path, image):
    image.save(tmp_path / "m.png")
    with pytest.raises(BadImage, match="transparency.*white"):
        read_mask(tmp_path / "m.png")


def test_a_mask_that_cannot_be_read(tmp_path):
    (tmp_path / "m.png").write_bytes(b"none")
    with pytest.raises(BadImage, match="not an image"):
        read_mask(tmp_path / "m.png")
