"""How well images go with their prompts, and how much they differ: CLIP score, LPIPS diversity.

    CLIP score       mean of 100 max(cos(image features, text features), 0), arXiv:2104.08718 with
                     w = 100, as torchmetrics counts
    LPIPS diversity  mean LPIPS distance (arXiv:1801.03924) of pairs of generated images

The CLIP is a folder that the user names, as transformers writes it: config.json, weights,
tokenizer, preprocessor_config.json.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .. import UserError
from ..data.captions import read_captions
from ..data.folder import walk
from ..data.images import BadImage, formats, read_image
from ..files.strict import fit
from ..files.tensors import find_weights, read_tensors
from ..files.tokenizer_files import load_tokenizer
from ..files.validate import read_json
from ..models.build import blank
from ..models.clip import IMAGE_MEAN, IMAGE_STD, CLIPModel
from ..models.configs import CLIPConfig
from ..models.tokenizer import Tokenizer
from ..runtime.distributed import gather_object, rank, world_size
from ..runtime.seeding import generator

CLIP_SCORE = (
    "mean of 100 max(cos(CLIP image, CLIP text), 0) over images and their prompts, arXiv:2104.08718"
)
DIVERSITY = (
    "mean LPIPS distance of random pairs of generated images, arXiv:1801.03924; higher differs more"
)
PAIRS = 1000  # of images, at most


def measure(value: float, definition: str, model: str, num_images: int) -> dict:
    """A number as results keep it: with what it is, whose it is and of how many images."""
    return {"value": value, "definition": definition, "model": model, "num_images": num_images}


# --- CLIP score ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ClipScore:
    """Images and prompts -> (N,) scores. side: of the images that the vision tower takes."""

    model: CLIPModel
    tokenizer: Tokenizer
    name: str
    device: torch.device
    mean: tuple[float, ...] = IMAGE_MEAN
    std: tuple[float, ...] = IMAGE_STD

    @property
    def side(self) -> int:
        return self.model.config.vision.image_size

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """(H, W, 3) uint8 each, of any size; prompts too long are cut. float64 on the CPU."""
        pixels = torch.stack(
            [clip_pixels(image, self.side, self.mean, self.std) for image in images]
        )
        ids = self.tokenizer(list(prompts)).to(self.device)
        image = self.model.image_features(pixels.to(self.device))
        text = self.model.text_features(ids)
        return (100 * (image * text).sum(1)).clamp(min=0).double().cpu()


def clip_pixels(image: np.ndarray, side: int, mean=IMAGE_MEAN, std=IMAGE_STD) -> Tensor:
    """(H, W, 3) uint8 -> (3, side, side): the shorter side resized (bicubic), then cut."""
    H, W, _ = image.shape
    short = min(H, W)
    size = tuple(side if v == short else int(side * v / short) for v in (W, H))
    picture = Image.fromarray(image).resize(size, Image.BICUBIC)
    left = (size[0] - side) // 2
    top = (size[1] - side) // 2
    x = torch.from_numpy(np.array(picture.crop((left, top, left + side, top + side))))
    return ((x.permute(2, 0, 1).float() / 255) - column(mean)) / column(std)


def column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


def open_clip(folder: str | Path, device: torch.device) -> ClipScore:
    """From a folder of transformers' CLIPModel, such as openai/clip-vit-large-patch14.

    Raises UserError for what is missing, damaged, or no CLIP of both towers.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"--clip {folder} is no folder; give one with a CLIP's config.json, weights and "
            "tokenizer, such as a download of openai/clip-vit-large-patch14"
        )
    config = read_json(folder / "config.json")
    if "vision_config" not in config and "vision_config_dict" not in config:
        kind = config.get("model_type", "model")
        raise UserError(
            f"--clip {folder} holds a {kind} without vision tower; a CLIP with both "
            "towers is needed"
        )
    try:
        with blank():
            model = CLIPModel(CLIPConfig.from_dict(config))
    except ValueError as error:
        raise UserError(f"--clip {folder}: {error}") from None
    file = find_weights(folder)
    model = fit(model, read_tensors(file), str(file)).float().to(device)
    tokenizer = load_tokenizer(folder)
    text = model.config.text
    if len(tokenizer) > text.vocab_size or tokenizer.context_length > text.max_position_embeddings:
        raise UserError(
            f"--clip {folder}: the tokenizer has {len(tokenizer)} tokens in rows of "
            f"{tokenizer.context_length}, the network {text.vocab_size} in rows of "
            f"{text.max_position_embeddings}"
        )
    about = folder / "preprocessor_config.json"
    about = read_json(about) if about.is_file() else {}
    mean = about.get("image_mean", IMAGE_MEAN)
    std = about.get("image_std", IMAGE_STD)
    return ClipScore(model, tokenizer, folder.resolve().name, device, tuple(mean), tuple(std))


def prompts_of(folder: Path) -> dict[Path, str]:
    """The prompt of each image below a folder: name.txt or metadata.jsonl, or what sample.py wrote
    into the PNG. Raises UserError for images without one."""
    found = walk(folder, sampled=True)
    files = found.images
    texts = read_captions(folder, files, found=found) or [("",)] * len(files)
    found = {file: own[0] or read_parameters(file) for file, own in zip(files, texts)}
    if missing := [file for file, prompt in found.items() if prompt is None]:
        raise UserError(
            f"--clip needs each image's prompt, and {missing[0]} has none: neither "
            "name.txt beside it nor `parameters` in a PNG"
        )
    return found


def read_parameters(file: Path) -> str | None:
    """Read the prompt in a PNG's `parameters` text (viz.parameters_text), None without one."""
    lines = _parameters(file).split("\n")
    # the settings are the last such line: a prompt may have one that looks like them
    last = max(
        (i for i, line in enumerate(lines) if line.startswith("Steps: ")), default=len(lines)
    )
    end = next(
        (i for i, line in enumerate(lines[:last]) if line.startswith("Negative prompt: ")), last
    )
    return "\n".join(lines[:end]) if end and lines != [""] else None


def count_calls(files: Sequence[Path]) -> int:
    """Count the calls of sample.py that pictures are of, by their `parameters`.

    Pictures of one call have the same settings and another index each.
    """
    found: dict[str, list[str]] = {}
    for file in files:
        settings = _parameters(file).rsplit("\n", 1)[-1]
        if index := re.search(r", Image: (\d+)", settings):
            same = re.sub(r', (Image: \d+|Class: ("[^"]*"|[^,]*))', "", settings)
            found.setdefault(same, []).append(index[1])
    return sum(max(map(indices.count, {*indices})) for indices in found.values())


def _parameters(file: Path) -> str:
    """The `parameters` text of a picture; empty without one."""
    try:
        if not file.is_file():
            return ""
        with Image.open(file, formats=formats()) as image:
            text = image.info.get("parameters")
    except Exception:  # Pillow raises nearly everything on damaged files
        return ""  # an unreadable image; who reads it for its pixels says so
    return text if isinstance(text, str) else ""


# --- LPIPS ---------------------------------------------------------------------------------------


def open_lpips(device: torch.device, net: str, needs: str) -> nn.Module:
    """The LPIPS network of the lpips package. needs: what asks for it, in messages.

    Raises UserError where the package or its weights (torchvision's) are missing.
    """
    try:
        import lpips
    except ImportError:
        raise UserError(f"{needs} needs LPIPS: pip install lpips") from None
    try:
        return lpips.LPIPS(net=net, verbose=False).to(device).requires_grad_(False).eval()
    except Exception as error:  # its network is downloaded on first use
        raise UserError(
            f"LPIPS could not load its network: {error}; leave out {needs}, or put "
            f"torchvision's {net} into the torch hub cache"
        ) from None


@torch.inference_mode()
def diversity(images: np.ndarray, distance: Callable, device: torch.device, seed: int = 0) -> float:
    """Mean distance of pairs of (N, H, W, 3) uint8 images, N > 1: all pairs, or PAIRS random ones.

    distance(a, b): of (B, 3, H, W) in [-1, 1], with B values.
    """
    pairs = torch.combinations(torch.arange(len(images)))
    if len(pairs) > PAIRS:
        pairs = pairs[torch.randperm(len(pairs), generator=generator(seed, "pairs"))[:PAIRS]]
    total = 0.0
    for some in pairs.split(16):
        a, b = (
            torch.from_numpy(images[some[:, k].numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
            for k in (0, 1)
        )
        total += float(distance(a.to(device), b.to(device)).double().sum())
    return total / len(pairs)


# --- both, of images that come in pieces ---------------------------------------------------------


@dataclass(eq=False)
class TextImage:
    """Collects images with their prompts; `result` measures what --clip and --lpips ask for."""

    clip: ClipScore | None = None
    lpips: Callable | None = None
    device: torch.device = torch.device("cpu")
    scores: list[tuple[int, float]] = field(default_factory=list)
    kept: list[tuple[int, np.ndarray]] = field(default_factory=list)  # for pairs

    def add(self, numbers: Sequence[int], images: Sequence[np.ndarray], prompts) -> None:
        """prompts: None where only diversity is asked for."""
        if self.clip is not None:
            self.scores += zip(numbers, self.clip(images, prompts).tolist())
        if self.lpips is not None:
            self.kept += [(n, image) for n, image in zip(numbers, images) if n < PAIRS]
            if len(shapes := {image.shape[:2] for _, image in self.kept}) > 1:
                (h, w), (H, W) = sorted(shapes)[:2]
                raise UserError(
                    f"LPIPS compares images of one size, and here are {w}x{h} and "
                    f"{W}x{H}: give --size"
                )

    def result(self) -> dict[str, dict] | None:
        """{name: measure} over all ranks on rank 0, None elsewhere; begins anew."""
        ranks = gather_object((self.scores, self.kept))
        self.scores = []
        self.kept = []
        if ranks is None:
            return None
        scores = [value for _, value in sorted(s for scores, _ in ranks for s in scores)]
        kept = sorted((k for _, kept in ranks for k in kept), key=lambda k: k[0])
        found = {}
        if scores:
            found["clip_score"] = measure(
                float(np.mean(scores)), CLIP_SCORE, self.clip.name, len(scores)
            )
        if self.lpips is not None:
            images = np.stack([image for _, image in kept])
            value = diversity(images, self.lpips, self.device)
            found["lpips_diversity"] = measure(value, DIVERSITY, "lpips 0.1, alex", len(images))
        return found


def open_text_image(clip: str | None, lpips: bool, device: torch.device) -> TextImage | None:
    """What --clip FOLDER and --lpips ask for; None where neither is given."""
    if clip is None and not lpips:
        return None
    network = open_lpips(device, "alex", "--lpips") if lpips else None
    return TextImage(clip and open_clip(clip, device), network, device)


def measure_folder(found: TextImage, folder: Path, size: int | None) -> dict[str, dict] | None:
    """Of all usable images below a folder, with their prompts, shared out among the ranks.

    Raises UserError without prompts.
    """
    prompts = prompts_of(folder) if found.clip is not None else {}
    for number, file in list(enumerate(walk(folder, sampled=True).images))[rank() :: world_size()]:
        try:
            image = read_image(file, size)
        except BadImage:
            continue  # told where the distances are measured
        found.add([number], [image], [prompts[file]] if prompts else None)
    return found.result()
