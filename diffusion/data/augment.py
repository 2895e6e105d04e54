"""Augment images without leaking: the network is given what was done (EDM, arXiv:2206.00364, F.2).

    a pixel of the result at p is that of the image at A (p, 1)     p in half sides from the centre
    vector = A - (1 0 0, 0 1 0), row by row                         0: nothing is done
    A      = (mirror quarter-turns / scale, shift)

As A is an input of the network, what it makes where A is the identity, as in sampling, is like the
images as they are. Of EDM's set this leaves out turns by other angles and stretching; what comes in
at the sides is the image, reflected.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def augmentations(count: int, probability: float, H: int, W: int, g: torch.Generator) -> Tensor:
    """Sample vectors (count, 6) float32 for images, or latents, of H x W pixels.

    probability: with it each of four things is done, independently: mirroring, in half of the
    cases; 0 to 3 quarter turns, or 0 or 2 where H is not W; scaling by 2^(n / 5), n standard
    normal, as in EDM; a shift by whole pixels, uniform up to an eighth of a side, as its code has.
    """
    u = torch.rand(8, count, generator=g)
    mirrored, turned, scaled, shifted = u[:4] < probability
    flip = 1 - 2 * mirrored * u[4].round()
    angle = turned * (4 * u[5]).floor() * (math.pi / 2 if H == W else math.pi)
    zoom = torch.exp2(scaled * torch.randn(count, generator=g) / -5)
    cos, sin = zoom * angle.cos().round(), zoom * angle.sin().round()
    sides = torch.tensor([[W], [H]])
    right, down = shifted * ((2 * u[6:] - 1) * sides / 8).round() * 2 / sides
    return torch.stack([flip * cos - 1, -flip * sin, -right, sin, cos - 1, -down], 1)


def augment(x: Tensor, vector: Tensor) -> Tensor:
    """Shift, mirror, turn and scale images (B, C, H, W), in this order, by vectors (B, 6).

    What has a vector of zeros stays as it is, bit for bit. Only scales blur.
    """
    there = vector.view(-1, 2, 3) + torch.eye(2, 3, device=x.device)
    grid = F.affine_grid(there, x.shape, align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return torch.where(vector.any(1)[:, None, None, None], moved, x)
