"""What a file is asked before a library reads it, and its tensors before a network takes them.

The libraries refuse code (weights_only) and overlapping tensors (safetensors). What is left is
that a small file may ask for much memory, and that numbers may be none.
"""

import hashlib
import json
import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from .. import UserError

MOST_HEADER = 32 << 20  # bytes; Stable Diffusion's is 0.2 MB
MOST_TEXT = 64 << 20  # of a JSON or vocabulary file; the largest known has 4 MB
MARK = b"sha256:"


def check_size(path: Path) -> None:
    """Raises UserError if reading the file would take more memory than it has bytes."""
    with open(path, "rb") as file:
        head = file.read(8)
        size = file.seek(0, os.SEEK_END)
    if path.suffix == ".safetensors" and int.from_bytes(head, "little") > min(size, MOST_HEADER):
        raise UserError(f"{path} is damaged or not to be trusted: its header would have "
                        f"{int.from_bytes(head, 'little'):,} bytes")  # fmt: skip
    try:
        packed = zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged or incomplete: {error}") from None
    if packed:
        check_zip(path, size)
    elif size and path.suffix != ".safetensors":
        with open(path, "rb") as file:  # of before torch 1.6
            for start in range(0, size, 1 << 20):
                file.seek(start)
                check_pickle(path, file.read((1 << 20) + 16))


def check_zip(path: Path, size: int) -> None:
    """torch and NumPy store, and never compress; so entries cannot be more than the file."""
    try:
        with zipfile.ZipFile(path) as z:
            entries = z.infolist()
            small = [e for e in entries if e.file_size < min(MOST_HEADER, size + 1)]
            pickles = [z.read(e) for e in small if e.filename.endswith(".pkl")]
    except Exception as error:  # a zip file can be damaged in many ways
        raise UserError(f"{path} is damaged or incomplete: {str(error)[:200]}") from None
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    total = sum(entry.file_size for entry in entries)
    if packed or total > size:
        raise UserError(f"{path} is not to be trusted: {size:,} bytes would become {total:,}, and "
                        "weight files are never compressed")  # fmt: skip
    for text in pickles:
        check_pickle(path, text)


def check_pickle(path: Path, text: bytes) -> None:
    """Of all that weights_only calls, a bytearray alone takes memory that no file has filled."""
    if b"bytearray" in text:
        raise UserError(f"{path} is not to be trusted: it asks for memory beside its tensors")


def check_tensors(tensors: dict[str, Tensor], where: str) -> None:
    """Raises UserError for tensors that claim more than is stored, and for NaN and infinity."""
    bad = []
    for name, value in tensors.items():
        if not value.is_meta and value.numel():
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UserError(f"{where} is not to be trusted: {name} claims {value.numel():,} "
                                "values, more than the file holds")  # fmt: skip
            if value.is_floating_point() and not finite(value):
                bad.append(name)
    if bad:
        raise UserError(f"{where} holds NaN or infinity in {len(bad)} of {len(tensors)} tensors, "
                        f"such as {bad[0]!r}: the training that made it diverged")  # fmt: skip


def finite(value: Tensor) -> bool:
    """Without a copy: minimum and maximum are NaN where one value is."""
    known = value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return bool(torch.stack(torch.aminmax(value if known else value.float())).isfinite().all())


def read_text(path: Path) -> str:
    """Raises UserError if it is missing, of absurd size or not UTF-8."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MOST_TEXT + 1) if path.is_file() else None
        if raw is None or len(raw) > MOST_TEXT:
            raise UserError(f"{path} is no text file of at most {MOST_TEXT >> 20} MB")
        return raw.decode("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error.reason}") from None


def read_json(path: Path) -> dict:
    """Raises UserError if it is missing or no JSON object."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> dict:
    """Raises UserError for what is no JSON object, as for one too deep to be read."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{where} is no JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{where} holds a {type(values).__name__}; expected an object")
    return values


# --- digests -------------------------------------------------------------------------------------


def seal(path: Path) -> None:
    """Put the digest of a zip file's bytes at its end, as the comment that zip files may have."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        digest = _digest(file, size - 2)
        comment = MARK + digest
        file.seek(size - 2)  # the comment's length, 0 until now
        file.write(len(comment).to_bytes(2, "little") + comment)


def check_seal(path: Path) -> None:
    """Raises UserError if the file is not what was written. One without a digest passes."""
    tail = len(MARK) + 64
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - tail))
        comment = file.read()
        if comment.startswith(MARK) and _digest(file, size - tail - 2) != comment[len(MARK) :]:
            raise UserError(f"{path} is damaged: its bytes have not the digest that was written "
                            "with them")  # fmt: skip


def _digest(file, size: int) -> bytes:
    file.seek(0)
    h, left = hashlib.sha256(), size
    while left > 0 and (chunk := file.read(min(left, 1 << 22))):
        h.update(chunk)
        left -= len(chunk)
    return h.hexdigest().encode()


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """Of names, types, shapes and bytes, whatever their order."""
    h = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        h.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        h.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return h.hexdigest()
