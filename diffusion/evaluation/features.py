"""Feature networks, uint8 images -> (N, D), and the features of folders and of models.

FID proper is clean-fid's (arXiv:2104.11222): each image resized to 299x299 in floating point,
then the Inception network of 2015. Any other network gives a Fréchet distance that carries the
network's own name.
"""

import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import UserError
from ..data.folder import report, scan
from ..data.hub import download
from ..data.images import BadImage, read_image
from ..pictures.grid import to_uint8
from ..runtime.distributed import (
    any_rank,
    gather_object,
    is_main,
    log,
    progress,
    rank,
    world_size,
)
from ..sampling.pipeline import Pipeline

INCEPTION = "inception-2015-12-05.pt"
# what else stands beside a distance in results and logs; no network may be called so
RESERVED = {
    "fid",
    "kid",
    "precision",
    "recall",
    "inception_score",
    "inception_score_std",
    "features",
    "num_real",
    "num_fake",
    "sampler",
    "steps",
    "evaluations",
    "seconds",
    "step",
    "loss",
    "heldout_loss",
    "lr",
    "grad_norm",
    "skipped",
    "img_per_s",
    "fid_seconds",
    "fid_num_images",
}


def cache_folder() -> Path:
    """Of this user: nobody else can lay another network there."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "diffusion"


@dataclass(frozen=True, eq=False)
class Features:
    """A network as a function of images.

    name: of the Fréchet distance in its features: "fid", or after the file.
    about: what it is, for people. key: of cached statistics.
    classifier: (K, D) weights of the same network's class scores, or None.
    """

    name: str
    about: str
    key: str
    network: nn.Module
    device: torch.device
    classifier: Tensor | None = None

    @property
    def is_inception(self) -> bool:
        return self.name == "fid"

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, D) float64 on the CPU. Raises UserError for a bad network."""
        x = torch.from_numpy(clean_resize(images) if self.is_inception else images)
        x = x.permute(0, 3, 1, 2).contiguous().to(self.device)
        try:
            out = self.network(x)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"the feature network {self.about} cannot use images of "
                f"{tuple(x.shape[1:])} {x.dtype}: {reason}"
            ) from None
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(images):
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UserError(
                f"the feature network {self.about} returned {got} for "
                f"{len(images)} images; expected a tensor (N, D)"
            )
        return out.cpu().double()  # MPS has no float64

    def probabilities(self, features: Tensor) -> Tensor | None:
        """(N, D) -> (N, K) class probabilities, as Inception Score uses them: without biases."""
        if self.classifier is None:
            return None
        return (features @ self.classifier.T.to(features)).softmax(1)


def clean_resize(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (N, 299, 299, 3) float32 in 0 ... 255, by clean-fid's filter."""
    from cleanfid.resize import build_resizer

    resize = build_resizer("clean")
    return np.stack([resize(image) for image in images])


def name_of(path: str | None) -> str:
    """What a distance in these features is called."""
    if path is None:
        return "fid"
    stem = re.sub(r"\W+", "_", Path(path).stem).strip("_") or "features"  # a tag of TensorBoard's
    return f"{stem}_features" if stem.lower() in RESERVED else stem


def open_features(path: str | None, device: torch.device) -> Features:
    """clean-fid's Inception (path None), or a TorchScript file of one's own.

    The file's network takes uint8 (N, 3, H, W) at the images' own size and returns (N, D).
    Raises UserError if it is missing and cannot be fetched, or is no TorchScript file.
    """
    if path is None:
        return _inception(device)
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"--fid_features {file} does not exist; give a TorchScript file, written "
            "by torch.jit.script(network).save(FILE)"
        )
    network = _load(
        file,
        lambda: torch.jit.load(file, map_location=device),
        "write one by torch.jit.script(network).save(FILE)",
    )
    stat = file.stat()
    key = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return Features(name_of(path), file.name, key, network, device)


def _load(file: Path, load, what_to_do: str) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript's days are counted
            return load().eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{file} cannot be read as TorchScript ({reason}); {what_to_do}") from None


def _inception(device: torch.device) -> Features:
    try:
        from cleanfid.inception_torchscript import InceptionV3W
    except ImportError:
        raise UserError("FID needs clean-fid: pip install clean-fid") from None
    file = cache_folder() / INCEPTION
    error = None
    if is_main() and not file.is_file():
        try:
            _fetch(file)
        except UserError as failure:
            error = failure
    if any_rank(error is not None):  # no rank waits for a file that will not come
        raise error or UserError("rank 0 could not fetch the Inception network")
    network = _load(
        file,
        lambda: InceptionV3W(str(file.parent), download=False),
        "delete it, and it is fetched again",
    )
    classifier = network.base.state_dict().get("output.weight")
    about = "clean-fid's Inception (mode clean)"
    return Features("fid", about, INCEPTION, network.to(device), device, classifier)


def _fetch(file: Path) -> None:
    """Download the Inception network to `file`, whole or not at all."""
    from cleanfid.downloads_helper import inception_url

    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        download(inception_url, part)
        os.replace(part, file)
    except OSError as error:
        raise UserError(
            f"FID needs the Inception network, and {inception_url} could not be fetched "
            f"({error}); download it elsewhere and put it at {file}, or give another network "
            "with --fid_features FILE"
        ) from None
    finally:
        part.unlink(missing_ok=True)


# --- features of folders and models --------------------------------------------------------------


def folder_features(
    folder: Path, size: int | None, features: Features, files: list[Path] | None = None
):
    """((N, D) on rank 0, None elsewhere; the images' (H, W) as a set).

    files: those below the folder that count (default: all).
    size: cut and resize to it as training does; None: as they are. Raises UserError for a folder
    without usable images, or of several sizes where the network does not resize them itself.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of images")
    files = scan(folder) if files is None else files
    if not files:
        raise UserError(f"no images below {folder}")
    found = []
    sizes = set()
    bad = []  # found: (numbers of the files, features)
    mine = range(len(files))[rank() :: world_size()]
    for start in progress(range(0, len(mine), 64), desc=folder.name or str(folder), leave=False):
        groups: dict[tuple, list] = {}
        for i in mine[start : start + 64]:
            try:
                image = read_image(files[i], size)
            except BadImage as error:
                bad.append((str(files[i]), str(error)))
                continue
            groups.setdefault(image.shape[:2], []).append((i, image))
        sizes |= set(groups)
        found += [
            ([i for i, _ in group], features(np.stack([image for _, image in group])))
            for group in groups.values()
        ]
    ranks = gather_object((sizes, bad))
    if ranks is not None:
        sizes = set().union(*(s for s, _ in ranks))
        bad = sorted(entry for _, entries in ranks for entry in entries)
        report(f"images of {folder} cannot be used and are skipped", bad, len(files))
        check_sizes(sizes, features, str(folder))
    return gathered(found, folder), sizes


def check_sizes(sizes: set[tuple[int, int]], features: Features, what: str) -> None:
    """Inception's images are all resized to its own size, for others the size is their own."""
    if len(sizes) < 2:
        return
    told = ", ".join(sorted(f"{w}x{h}" for h, w in sizes)[:4])
    if not features.is_inception:
        raise UserError(
            f"{what}: images of {len(sizes)} sizes ({told}); give --size N to bring all to N pixels"
        )
    log(
        f"warning: {what}: images of {len(sizes)} sizes ({told}), compared as they are; --size N "
        "brings all to N pixels"
    )


def gathered(parts: list[tuple[list[int], Tensor]], what) -> Tensor | None:
    """All ranks' features on rank 0, in the order of their numbers; None elsewhere.

    Raises UserError if there are none.
    """
    ranks = gather_object(parts)
    if ranks is None:
        return None
    parts = [part for rank_parts in ranks for part in rank_parts]
    if not parts:
        raise UserError(f"none of the images of {what} can be used")
    order = np.argsort(np.concatenate([numbers for numbers, _ in parts]))
    return torch.cat([features for _, features in parts])[order]


def sampled(
    pipeline: Pipeline, count: int, batch: int, told=None, **options
) -> Iterator[tuple[range, np.ndarray]]:
    """This rank's share of images 0 ... count-1: their numbers and (b, H, W, 3) uint8.

    told(indices): what the network is told of these images, as options of `Pipeline.frames`; by
    default a class-conditional model's classes take turns. Raises NonFinite for what is no picture.
    """
    told = told or (lambda indices: {"labels": pipeline.labels_in_turn(indices)})
    starts = range(0, count, batch)
    # every rank takes as many turns: those that have none left yield nothing
    for turn in range(0, len(starts), world_size()):
        mine = turn + rank()
        low = starts[mine] if mine < len(starts) else count
        indices = range(low, min(low + batch, count))
        H, W = pipeline.image_hw
        yield (
            indices,
            (
                to_uint8(pipeline.sample(indices, **told(indices), **options), indices)
                if len(indices)
                else np.empty((0, H, W, 3), np.uint8)
            ),
        )
