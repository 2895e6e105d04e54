"""Compute features of images by a network: uint8 images -> (N, D).

FID proper is clean-fid's (arXiv:2104.11222): each image resized to 299x299 in floating point,
then the Inception network of 2015. Any other network gives a Fréchet distance that carries the
network's own name.
"""

import hashlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import UserError, shown
from ..data.archives import download
from ..data.batch import channels_first
from ..data.image_set import file_stamp
from ..files.atomic import atomic, blame, open_regular
from ..runtime.distributed import any_rank, is_main
from ..runtime.machine import is_of_gpu
from ..runtime.user_cache import cache_folder

INCEPTION = "inception-2015-12-05.pt"
# of NVIDIA's file, whose address clean-fid has; k-diffusion and others compare with it, too
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
# what else stands beside a distance in results and logs; no network may be called so
RESERVED = set(
    "fid kid precision recall inception_score inception_score_std features num_real num_fake "
    "sampler steps evaluations seconds step loss heldout_loss lr grad_norm skipped img_per_s "
    "fid_seconds fid_num_images copies".split()
)


@dataclass(frozen=True, eq=False)
class Features:
    """Apply a network to images.

    name: of the Fréchet distance in its features, "fid" or after the file. about: the network in
    words. key: part of the name of cached statistics. classifier: (K, D) weights of the same
    network's class scores, or None.
    """

    name: str
    about: str
    key: str
    network: Callable[[Tensor], Tensor]
    device: torch.device
    classifier: Tensor | None = None

    @property
    def is_inception(self) -> bool:
        return self.name == "fid"

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Tensor:
        """Map (N, H, W, 3) uint8 to (N, D) float64 on the CPU. Raises UserError for no features."""
        x = channels_first(clean_resize(images) if self.is_inception else images)
        x = x.to(self.device).contiguous()
        try:
            out = self.network(x)
        except (RuntimeError, torch.jit.Error) as error:
            if is_of_gpu(error):
                raise
            raise UserError(
                f"the feature network {self.about} cannot use images of "
                f"{tuple(x.shape[1:])} {x.dtype}: {shown(str(error).strip().splitlines()[-1], 200)}"
            ) from None
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(images):
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UserError(
                f"the feature network {self.about} returned {got} for "
                f"{len(images)} images; expected a tensor (N, D)"
            )
        return out.cpu().double()  # MPS has no float64

    def probabilities(self, features: Tensor) -> Tensor | None:
        """Map (N, D) to (N, K) class probabilities without biases, as Inception Score uses them."""
        if self.classifier is None:
            return None
        return (features @ self.classifier.T.to(features)).softmax(1)


def clean_resize(images: np.ndarray) -> np.ndarray:
    """Resize (N, H, W, 3) uint8 to (N, 299, 299, 3) float32 in 0 ... 255, by clean-fid's filter."""
    from cleanfid.resize import build_resizer

    resize = build_resizer("clean")
    return np.stack([resize(image) for image in images])


def name_of(path: str | None) -> str:
    """Name the distance in the features of a network file; None is Inception."""
    if path is None:
        return "fid"
    stem = re.sub(r"\W+", "_", Path(path).stem).strip("_") or "features"  # a tag of TensorBoard's
    return f"{stem}_features" if stem.lower() in RESERVED else stem


def open_features(path: str | None, device: torch.device) -> Features:
    """Open clean-fid's Inception (path None), "pixels", or a TorchScript file of one's own.

    pixels: 16x16 of the image, 0 to 1, which need no file and know nothing of pictures.
    A file's network takes uint8 (N, 3, H, W) at the images' own size and returns (N, D).
    Raises UserError if it is missing and cannot be fetched, or is no TorchScript file.
    """
    if path == "pixels":
        scaled = lambda x: F.adaptive_avg_pool2d(x / 255, 16).flatten(1)
        return Features("pixels", "16x16 pixels", "16x16 pixels", scaled, device)
    file = inception_file() if path is None else Path(path)
    advice = "; give a file that torch.jit.script(network).save(FILE) has written"
    with blame(f"{file} cannot be read as TorchScript", advice), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript's days are counted
        with open_regular(file) as opened:
            if path is None and hashlib.sha256(opened.read()).hexdigest() != INCEPTION_SHA256:
                raise UserError(
                    f"{file} is not the published network, or damaged (its SHA-256 is another): "
                    "delete it, and it is fetched again"
                )
        network = torch.jit.load(file, map_location=device).eval()
    if path is None:
        classifier = network.state_dict().get("output.weight")
        layers = lambda x: network.layers((x - 128) / 128).flatten(1)
        about = "clean-fid's Inception (mode clean)"
        return Features("fid", about, INCEPTION, layers, device, classifier)
    key = f"{file.resolve()} {file_stamp(file)}"
    return Features(name_of(path), file.name, key, network, device)


def inception_file() -> Path:
    """Find the Inception network in the user's cache, or download it to there."""
    file = cache_folder() / INCEPTION
    error = None
    if is_main() and not file.is_file():
        try:
            _fetch(file)
        except UserError as failure:
            error = failure
    if any_rank(error is not None):  # no rank waits for a file that will not come
        raise error or UserError("rank 0 could not fetch the Inception network")
    return file


def _fetch(file: Path) -> None:
    """Download the Inception network to `file`, complete or not at all."""
    from cleanfid.downloads_helper import inception_url

    what = f"FID needs the Inception network, and {inception_url} could not be fetched"
    advice = f"; download it elsewhere and put it at {file}, or give another by --fid_features FILE"
    with blame(what, advice, OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic(file, lambda part: download(inception_url, part))
