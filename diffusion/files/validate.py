"""Check files before a library reads them, and tensors before a network takes them.

The libraries refuse code (weights_only) and overlapping tensors (safetensors). What is left is
that a small file may ask for much memory, and that numbers may be none.
"""

import hashlib
import re
import tarfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from .. import UserError

Tensors = dict[str, Tensor]  # by name

MAX_HEADER = 32 << 20  # bytes of a safetensors header; Stable Diffusion's has 0.2 MB
MAX_PICKLE = 8 << 20  # names, shapes and settings; a training state of SDXL has 2 MB
# what weights_only lets a pickle call and takes any memory, whatever the size of the file
ALLOCATING = re.compile(
    rb"c(_codecs\n|(builtins|__builtin__)\nbytearray\n|torch[\w.]*\n(\w*Tensor|TypedStorage)\n"
    rb"|torch\._utils\n_rebuild_(?!tensor|parameter)\w*\n)"
)
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
PLAIN = FLOATS | {torch.float8_e4m3fn, torch.float8_e5m2, torch.bool}
PLAIN |= {getattr(torch, f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)}


def check_size(path: Path) -> bool:
    """Refuse a file that would take more memory than it has bytes; return whether it is a zip file.

    Raises UserError, and what zipfile raises for a damaged file.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file in it")
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix.lower() == ".safetensors":
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER:
            raise UserError(f"{path} is not to be trusted: its header has {header:,} bytes")
        return False
    if not zipfile.is_zipfile(path):
        end = b""
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                _check_calls(path, end + chunk)
                end = chunk[-100:]  # a name may lie across two chunks
        return False
    size = path.stat().st_size
    with zipfile.ZipFile(path) as z:
        entries = z.infolist()
        total = sum(entry.file_size for entry in entries)
        # torch and NumPy never compress
        if total > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UserError(
                f"{path} is not to be trusted: {size:,} bytes would become {total:,}; expected "
                "entries that are not compressed"
            )
        # torch finds data.pkl by its name in small letters
        for entry in (e for e in entries if e.filename.lower().endswith(".pkl")):
            if entry.file_size > MAX_PICKLE:
                raise UserError(
                    f"{path} is not to be trusted: what it holds beside its tensors is more "
                    f"than {MAX_PICKLE >> 20} MB"
                )
            _check_calls(path, z.read(entry))
    return True


def _check_calls(path: Path, pickled: bytes) -> None:
    if found := ALLOCATING.search(pickled):
        name = ".".join(found[0][1:].decode().split())
        raise UserError(
            f"{path} holds more than weights and is not opened: it calls {name}; give a "
            ".safetensors version of it"
        )


def check_tensors(tensors: Tensors, where: str) -> None:
    """Refuse tensors that claim more than is stored, that no network has, NaN and infinity.

    No network has sparse, quantized, complex or nested tensors, or tensors without storage.
    Raises UserError.
    """
    bad = []
    for name, value in tensors.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided
        if not plain or value.is_nested or value.device.type != "cpu" or value.dtype not in PLAIN:
            kind = f"{value.dtype} on {value.device}" if plain else type(value).__name__
            raise UserError(
                f"{where}: {name!r:.200} is {kind}; expected plain numbers, such as float32"
            )
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(
                f"{where} is not to be trusted: {name!r:.200} claims "
                f"{value.numel():,} values, more than the file holds"
            )
        if value.numel() and value.is_floating_point() and not is_finite(value):
            bad.append(name)
    if bad:
        raise UserError(
            f"{where} holds NaN or infinity in {len(bad)} of {len(tensors)} tensors, "
            f"such as {bad[0]!r}: the training that made it diverged"
        )


def is_finite(value: Tensor) -> bool:
    """Check for NaN and infinity without a copy: they show in the minimum or the maximum."""
    known = value.dtype in FLOATS
    return bool(torch.stack(torch.aminmax(value if known else value.float())).isfinite().all())


class TarMember(tarfile.TarInfo):
    """Refuse headers that hold more than a name: tarfile reads them before anyone can check."""

    @classmethod
    def frombuf(cls, *args, **kwargs):
        found = super().frombuf(*args, **kwargs)
        plain = found.isreg() or found.isdir() or found.issym() or found.islnk()
        if not plain and found.size > 1 << 16:
            raise tarfile.ReadError(f"a header of {found.size:,} bytes")
        return found


def digest_tensors(tensors: Tensors) -> str:
    """Compute the SHA-256 of names, types, shapes and bytes, whatever their order."""
    h = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        h.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        h.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return h.hexdigest()
