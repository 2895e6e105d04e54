"""Check tensors before a network takes them, and digest them."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from .. import UserError, shown

Tensors = dict[str, Tensor]  # by name

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
PLAIN = FLOATS | {torch.float8_e4m3fn, torch.float8_e5m2, torch.bool}
PLAIN |= {getattr(torch, f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)}


def check_tensors(tensors: Tensors, where: Path | str) -> None:
    """Refuse what is no tensor, complex and quantized numbers, NaN and infinity.

    The readers build no sparse or nested tensors, and none that claims more than is stored.
    Raises UserError.
    """
    bad = []
    for name, value in tensors.items():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        if kind not in PLAIN:
            raise UserError(
                f"{where}: {shown(name)} is {kind}; expected plain numbers, such as float32"
            )
        if value.numel() and value.is_floating_point() and not is_finite(value):
            bad.append(name)
    if bad:
        raise UserError(
            f"{where} holds NaN or infinity in {len(bad)} of {len(tensors)} tensors, "
            f"such as {shown(bad[0])}: the training that made it diverged"
        )


def is_finite(value: Tensor) -> bool:
    """Check for NaN and infinity without a copy: they show in the minimum or the maximum."""
    known = value.dtype in FLOATS
    return bool(torch.stack(torch.aminmax(value if known else value.float())).isfinite().all())


def digest_tensors(tensors: Tensors) -> str:
    """Compute the SHA-256 of names, types, shapes and bytes, whatever their order."""
    h = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        h.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        h.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return h.hexdigest()
