"""Sets that are archives: download, unpack, and CIFAR-10's binary files.

torchvision reads CIFAR-10 by unpickling; and what the standard library unpacks may leave the
folder, or never end, by the version of Python. So the members are read here one by one: files of
a data set are written, under names that were checked, and nothing else of what an archive says.
"""

import bz2
import contextlib
import gzip
import hashlib
import os
import re
import shutil
import tarfile
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from .. import UserError, shown
from ..files.atomic import blame, create_whole, locked, open_regular
from ..files.torch_files import Bounded
from ..runtime.distributed import log, progress
from .cache import check_space
from .captions import EVERYTHING, Selection
from .folder import counted
from .image_set import ImageSet, digest, file_stamp
from .images import SUFFIXES, to_pixels

MAX_DOWNLOAD = 1 << 30  # bytes; the largest file that is fetched has 0.7 GB
MAX_UNPACKED = 50  # times an archive's size; images hardly shrink
MAX_MEMBERS = 1 << 20
MAX_NAME = 1000  # characters of a path
MAX_DIRECTORY = 32 << 20  # bytes of a zip's directory, which zipfile holds in memory
# what a data set may consist of: images, their captions and tables, and CIFAR-10
WANTED = SUFFIXES | set(".txt .caption .jsonl .csv .parquet .bin".split())
CIFAR = "airplane automobile bird cat deer dog frog horse ship truck".split()
UNPACKERS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}


def fetch(url: str, target: Path, sha256: str | None = None) -> None:
    """Download an archive and unpack it to the folder `target`, completely or not at all."""
    advice = f"; download it elsewhere and unpack it to {target}, or give --data a folder of images"
    with blame(f"{url} could not be fetched", advice):
        _build(target, lambda work: download(url, work / ".archive", sha256))


def unpacked(archive: Path, cache_dir: Path) -> Path:
    """Unpack an archive of the user's below the cache's folder, once; give the folder."""
    target = cache_dir / f"archive_{digest(archive.resolve(), file_stamp(archive))}"
    advice = "; expected a folder of images, or a zip or tar of one: unpack any other archive"
    with blame(f"--data {archive}", advice):
        _build(target, lambda work: archive)
    log(f"data: {archive} is unpacked to {target}")
    return target


def _build(target: Path, get: Callable[[Path], Path]) -> None:
    """Unpack the archive that get(a new folder) gives to `target`, unless that is there."""

    def write(path):
        folder = path.with_name(".unpacked")
        folder.mkdir()
        _unpack(get(path.parent), folder)
        inner = list(folder.iterdir())
        if len(inner) == 1 and inner[0].is_dir():  # around all others: no class
            suffixes = {path.suffix.lower() for path in inner[0].iterdir()}
            folder = folder if suffixes & SUFFIXES else inner[0]
        folder.rename(path)

    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f".{target.name}.lock")):
        if not target.is_dir():
            create_whole(target, write)


def download(url: str, part: Path, sha256: str | None = None) -> Path:
    """Fetch a file to `part`, and return that.

    Raises OSError if the disk is too small or it is not what was expected.
    """
    h = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as out:
        length = response.headers.get("Content-Length", "")
        total = int(length) if re.fullmatch("[0-9]{1,18}", length) else 0
        check_space(part.parent, 2 * total)  # the archive, and what it holds
        about = f"fetching {url.split('/')[-1]}"
        with progress(desc=about, total=total or None, unit="B", unit_scale=True) as bar:
            while chunk := response.read(1 << 20):
                h.update(chunk)
                out.write(chunk)
                bar.update(len(chunk))
                if out.tell() > MAX_DOWNLOAD:
                    raise OSError(f"it has more than {MAX_DOWNLOAD:,} bytes")
        if total and out.tell() != total:
            raise OSError(f"the connection broke after {out.tell()} of {total} bytes")
    if sha256 and h.hexdigest() != sha256:
        raise OSError(f"its SHA-256 is {h.hexdigest()}, expected {sha256}: it is another file")
    return part


def _unpack(archive: Path, target: Path) -> None:
    """Write the files of a data set from a zip or tar to a new folder, and count the others.

    Raises OSError if it is damaged, or holds more than an archive of images can.
    """
    left_out = Counter()
    total = 0
    with open_regular(archive) as file:
        size = os.fstat(file.fileno()).st_size
        most = max(MAX_UNPACKED * size, 1 << 24)
        for number, (name, length, source) in enumerate(_members(file, most + (1 << 20))):
            total += length
            if number >= MAX_MEMBERS or total > most:
                raise OSError(
                    f"its {size:,} bytes would become {total:,}, in {number + 1:,} files: not an "
                    "archive of images"
                )
            parts = _parts(name)
            if parts is None or source is None:
                left_out["links, devices and names that lead outside"] += 1
                continue
            if not parts or parts[-1].startswith(".") or parts[0] == "__MACOSX":
                continue
            path = target.joinpath(*parts)
            suffix = path.suffix.lower()
            if suffix not in WANTED or not length:
                left_out[suffix or path.name] += 1
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
                if out.tell() != length:
                    raise OSError(f"{shown(name)} ends too early")
    if not total:
        raise OSError("it holds nothing")
    if left_out:
        log(f"left out of {archive.name}: {counted(left_out)}")


def _parts(name: str) -> list[str] | None:
    """Split a member's path; None for one that leads out of the folder, or is absurd."""
    path = name.replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    is_absolute = path.startswith("/") or re.match("[A-Za-z]:", path)
    is_odd = is_absolute or len(path) > MAX_NAME or "\0" in path
    return None if is_odd or ".." in parts else parts


def _members(file: BinaryIO, most: int) -> Iterator[tuple[str, int, BinaryIO | None]]:
    """Read (path, bytes, what to read) of what an archive holds; None for what is no file.

    most: the bytes that may come out of its compression.
    """
    magic = file.read(2)
    file.seek(0)
    if magic == b"PK":
        with zipfile.ZipFile(Bounded(file, MAX_DIRECTORY)) as z:
            for entry in z.infolist():
                if not entry.is_dir():
                    with z.open(entry) as source:
                        yield entry.filename, entry.file_size, source
        return
    unpacker = UNPACKERS.get(magic)
    with unpacker(file) if unpacker else contextlib.nullcontext(file) as stream:
        tar = _Limited(stream, most)
        # as a stream: nothing that lies about lengths leads back in it
        with tarfile.open(fileobj=tar, mode="r|", tarinfo=_TarMember) as members:
            while member := members.next():
                members.members.clear()
                if member.size < 0:
                    raise OSError(f"{shown(member.name)} claims {member.size} bytes")
                if not member.isdir():
                    source = members.extractfile(member) if member.isreg() else None
                    yield member.name, member.size, source
            if members.fileobj.tell() == members.offset:  # else a block of zeros was read
                raise OSError("it ends too early")
        while tar.read(1 << 20):  # gzip's check of all that was read stands at the end
            pass


class _TarMember(tarfile.TarInfo):
    """Refuse headers that hold more than a name: tarfile reads them before anyone can check."""

    @classmethod
    def frombuf(cls, *args, **kwargs):
        found = super().frombuf(*args, **kwargs)
        plain = found.isreg() or found.isdir() or found.issym() or found.islnk()
        if not plain and found.size > 1 << 16:
            raise tarfile.ReadError(f"a header of {found.size:,} bytes")
        return found


class _Limited:
    """Reads a stream, of which so many bytes may come out: zeros shrink to a millionth."""

    def __init__(self, stream: BinaryIO, left: int):
        self.stream = stream
        self.left = left

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise OSError("more comes out of it than an archive of images holds")
        return data


# --- CIFAR-10 ------------------------------------------------------------------------------------


def cifar_set(folder: Path, selection: Selection = EVERYTHING) -> ImageSet:
    """Read CIFAR-10's training images from its binary files: per image a label and 3072 bytes."""
    if selection != EVERYTHING:
        raise UserError(
            f"{folder} holds CIFAR-10 in binary, whose training images are read: drop "
            "--split, --image_column and --caption_column"
        )
    files = sorted(file for file in folder.glob("data_batch_*.bin") if file.is_file())
    with blame(f"{folder} is no intact CIFAR-10 in binary", ": fetch it again"):
        # a byte more than there may be is no row of the table
        rows = [np.fromfile(file, np.uint8, 10_000 * 3073 + 1).reshape(-1, 3073) for file in files]
        table = np.concatenate(rows)
        labels = table[:, 0].tolist()
        texts = [(f"a photo of a {CIFAR[label]}",) for label in labels]
        if not labels:
            raise ValueError("no images")

    def read(i, size, *_):
        return to_pixels(Image.fromarray(table[i, 1:].reshape(3, 32, 32).transpose(1, 2, 0)), size)

    return ImageSet(
        name="cifar10",
        names=[f"cifar10/{i:05d}" for i in range(len(table))],
        read=read,
        labels=labels,
        classes=CIFAR,
        texts=texts,
        stamp=digest(folder.resolve(), *map(file_stamp, files)),
    )
