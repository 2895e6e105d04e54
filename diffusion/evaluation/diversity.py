"""Compute LPIPS diversity: the mean distance (arXiv:1801.03924) of pairs of generated images."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from .. import UserError
from ..data.batch import channels_first
from ..data.batches import to_unit
from ..runtime.seeding import generator

DIVERSITY = (
    "mean LPIPS distance of random pairs of generated images, arXiv:1801.03924; higher differs more"
)
MAX_PAIRS = 1000  # and of so many images at most


def open_lpips(device: torch.device, net: str, needs: str) -> nn.Module:
    """Open an LPIPS network of the lpips package. needs: the option that asks for it.

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
def diversity(images: np.ndarray, distance: Callable, device: torch.device) -> float:
    """Average the distances of all pairs of (N, H, W, 3) uint8 images, or of MAX_PAIRS random ones.

    distance(a, b): of (B, 3, H, W) in [-1, 1], with B values. There must be at least 2 images.
    """
    pairs = torch.combinations(torch.arange(len(images)))
    if len(pairs) > MAX_PAIRS:
        order = torch.randperm(len(pairs), generator=generator(0, "pairs"))
        pairs = pairs[order[:MAX_PAIRS]]
    x = channels_first(images)
    total = 0.0
    for chunk in pairs.split(16):
        a, b = (to_unit(x[side], device) for side in chunk.T)
        total += float(distance(a, b).double().sum())
    return total / len(pairs)
