"""Compute the CLIP score: how well images go with their prompts.

    mean of 100 max(cos(image features, text features), 0), arXiv:2104.08718 with w = 100,
    as torchmetrics counts

The CLIP is a folder that the user names, as transformers writes it: config.json, weights,
tokenizer, preprocessor_config.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import UserError, shown
from ..data.batch import channels_first
from ..data.captions import read_captions
from ..data.folder import Scan
from ..files.atomic import is_number
from ..files.strict import build, load_strict
from ..files.tensors import find_weights, read_tensors
from ..files.text_files import read_json, read_optional
from ..files.tokenizer_files import check_tokenizer, load_tokenizer
from ..models.clip import IMAGE_MEAN, IMAGE_STD, CLIPModel
from ..models.tokenizer import Tokenizer
from ..pictures.grid import read_parameters

CLIP_SCORE = (
    "mean of 100 max(cos(CLIP image, CLIP text), 0) over images and their prompts, arXiv:2104.08718"
)


def measure(value: float, definition: str, model: str, num_images: int) -> dict:
    """Make the record of a number: what it is, in which network, of how many images."""
    return {"value": value, "definition": definition, "model": model, "num_images": num_images}


@dataclass(frozen=True, eq=False)
class ClipScore:
    """Score images with their prompts. mean, std: of the pixels that the vision tower takes."""

    model: CLIPModel
    tokenizer: Tokenizer
    name: str
    device: torch.device
    mean: Sequence[float] = IMAGE_MEAN
    std: Sequence[float] = IMAGE_STD

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """Return (N,) scores, float64 on the CPU. Prompts too long are cut.

        images: (H, W, 3) uint8 each, of any size.
        """
        image = self.model.image_features(self.pixels(images).to(self.device))
        text = self.model.text_features(self.tokenizer(list(prompts)).to(self.device))
        return (100 * (image * text).sum(1)).clamp(min=0).double().cpu()

    def pixels(self, images: Sequence[np.ndarray]) -> Tensor:
        """Make the vision tower's input, (N, 3, side, side)."""
        from torchvision.transforms.functional import normalize

        side = self.model.config.vision.image_size
        x = channels_first(np.stack([central_square(image, side) for image in images]))
        return normalize(x.float() / 255, self.mean, self.std)


def central_square(image: np.ndarray, side: int) -> np.ndarray:
    """Resize the shorter side of (H, W, 3) uint8 (bicubic), then cut: (side, side, 3)."""
    H, W, _ = image.shape
    width, height = (side * v // min(H, W) for v in (W, H))
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.BICUBIC))
    left = (width - side) // 2
    top = (height - side) // 2
    return resized[top : top + side, left : left + side]


def open_clip(folder: str | Path, device: torch.device) -> ClipScore:
    """Open a folder of transformers' CLIPModel, such as openai/clip-vit-large-patch14.

    Raises UserError for what is missing, damaged, or no CLIP of both towers.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if "vision_config" not in config and "vision_config_dict" not in config:
        raise UserError(
            f"--clip {folder} holds {shown(config.get('model_type'))} without vision tower; a CLIP "
            "with both towers is needed"
        )
    model = build("clip", config, f"--clip {folder}")
    file = find_weights(folder)
    model = load_strict(model, read_tensors(file), file).float().to(device)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, model.config.text, f"--clip {folder}")
    file = folder / "preprocessor_config.json"
    pixels = read_optional(file)
    mean = pixels.get("image_mean", IMAGE_MEAN)
    std = pixels.get("image_std", IMAGE_STD)
    for name, values, low in (("image_mean", mean, 0), ("image_std", std, 1e-3)):
        given = values if isinstance(values, Sequence) else ()
        if [is_number(v) and low <= v <= 1 for v in given] != [True] * 3:
            raise UserError(f"{file}: {name} is {shown(values)}; expected 3 numbers up to 1")
    return ClipScore(model, tokenizer, folder.resolve().name, device, mean, std)


def read_prompts(found: Scan) -> list[str]:
    """Read the prompt of each image of a scan: a caption, or what sample.py wrote into the PNG.

    Raises UserError for images without one.
    """
    texts = read_captions(found, found.images) or [("",)] * len(found.images)
    prompts = [own[0] or read_parameters(file) for file, own in zip(found.images, texts)]
    if None in prompts:
        name = shown(str(found.images[prompts.index(None)]), 1000)
        raise UserError(
            f"--clip needs each image's prompt, and {name} has none: neither name.txt beside it "
            "nor `parameters` in a PNG"
        )
    return prompts
