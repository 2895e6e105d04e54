"""Sets that are archives: download, unpack, and CIFAR-10's binary files.

torchvision reads CIFAR-10 by unpickling; and what the standard library unpacks may leave the
folder, or never end, by the version of Python. So the members are read here one by one: files of
a data set are written, under names that were checked, and nothing else of what an archive says.
"""

import bz2
import contextlib
import gzip
import hashlib
import http.client
import io
import os
import re
import shutil
import stat
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from .. import UserError, shown
from ..files.atomic import locked, open_regular
from ..files.text_files import read_bytes
from ..files.validate import TarMember
from ..runtime.distributed import log, progress
from .cache import check_space
from .captions import EVERYTHING, Selection
from .folder import counted, is_inside
from .image_set import ImageSet, digest, file_stamp
from .images import SUFFIXES, first_line, to_pixels

MAX_DOWNLOAD = 1 << 30  # bytes; the largest file that is fetched has 0.7 GB
MAX_UNPACKED = 50  # times an archive's size; images hardly shrink
MAX_MEMBERS = 1 << 20
MAX_NAME = 1000  # characters of a path
MAX_DIRECTORY = 32 << 20  # bytes of a zip's directory, which zipfile holds in memory
# what a data set may consist of: images, their captions and tables, and CIFAR-10
WANTED = SUFFIXES | {".txt", ".caption", ".jsonl", ".csv", ".parquet", ".bin"}
UNPACKERS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}
DAMAGES = (
    *(OSError, RuntimeError, EOFError, ValueError, zlib.error, http.client.HTTPException),
    *(zipfile.BadZipFile, tarfile.TarError),
)
Member = tuple[str, int, BinaryIO | None]  # path, bytes, what to read; None for what is no file


def fetch(url: str, target: Path, sha256: str | None = None) -> None:
    """Download an archive and unpack it to the folder `target`, completely or not at all."""

    def get(work: Path) -> Path:
        download(url, work / "archive", sha256)
        return work / "archive"

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _build(target, get)
    except DAMAGES as error:
        raise UserError(
            f"{url} could not be fetched: {first_line(error)}; download it elsewhere and "
            f"unpack it to {target}, or give --data a folder of images"
        ) from None


def unpacked(archive: Path, cache_dir: Path) -> Path:
    """Unpack an archive of the user's below the cache's folder, once; give the folder."""
    try:
        with open_regular(archive) as file:
            target = cache_dir / f"archive_{_digest(file)[:32]}"
        cache_dir.mkdir(parents=True, exist_ok=True)
        _build(target, lambda work: archive)
    except DAMAGES as error:
        raise UserError(
            f"--data {archive}: {first_line(error)}; expected a folder, or a zip or tar of images"
        ) from None
    log(f"data: {archive} is unpacked to {target}")
    return target


def _digest(file: BinaryIO) -> str:
    h = hashlib.sha256()
    while chunk := file.read(1 << 20):
        h.update(chunk)
    return h.hexdigest()


def _build(target: Path, get: Callable[[Path], Path]) -> None:
    """Unpack the archive that get(a new folder) gives to `target`, unless that is there."""
    with locked(target.with_name(f".{target.name}.lock")) as held:
        if target.is_dir():
            return
        for left in target.parent.glob(f".{target.name}.*fetch") if held else ():
            if not left.is_symlink():  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(".fetch", f".{target.name}.", target.parent))
        try:
            folder = work / "unpacked"
            folder.mkdir()
            _unpack(get(work), folder)
            inner = list(folder.iterdir())
            # a folder around all others is no class
            if len(inner) == 1 and inner[0].is_dir():
                below = {path.suffix.lower() for path in inner[0].iterdir() if path.is_file()}
                folder = folder if below & SUFFIXES else inner[0]
            os.replace(folder, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def download(url: str, part: Path, sha256: str | None = None) -> None:
    """Fetch a file. Raises OSError if the disk is too small or it is not what was expected."""
    h = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as out:
        length = response.headers.get("Content-Length", "")
        total = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else 0
        check_space(part.parent, 2 * total)  # the archive, and what it holds
        about = f"fetching {url.split('/')[-1]}"
        with progress(desc=about, total=total or None, unit="B", unit_scale=True) as bar:
            while chunk := response.read(1 << 20):
                if out.tell() + len(chunk) > MAX_DOWNLOAD:
                    raise OSError(f"it has more than {MAX_DOWNLOAD:,} bytes")
                h.update(chunk)
                out.write(chunk)
                bar.update(len(chunk))
        if total and out.tell() != total:
            raise OSError(f"the connection broke after {out.tell()} of {total} bytes")
    if sha256 and h.hexdigest() != sha256:
        raise OSError(f"its SHA-256 is {h.hexdigest()}, expected {sha256}: it is another file")


def _unpack(archive: Path, target: Path) -> None:
    """Write the files of a data set from a zip or tar to a new folder, and count the others.

    Raises OSError if it is damaged, or holds more than an archive of images can.
    """
    left_out = Counter()
    total = 0
    with open_regular(archive) as file:
        size = os.fstat(file.fileno()).st_size
        most = max(MAX_UNPACKED * size, 1 << 24)
        for number, (name, length, source) in enumerate(_members(file)):
            total += length
            if number >= MAX_MEMBERS or total > most:
                raise OSError(
                    f"its {size:,} bytes would become {total:,} in {number + 1:,} files: not an "
                    "archive of images"
                )
            parts = _parts(name)
            if parts is None or source is None:
                left_out["names that lead outside" if parts is None else "links and devices"] += 1
                continue
            if not parts or parts[-1].startswith(".") or parts[0] == "__MACOSX":
                continue
            suffix = Path(parts[-1]).suffix.lower()
            if suffix not in WANTED:
                left_out[suffix or parts[-1]] += 1
                continue
            path = target.joinpath(*parts)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "xb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
            except (FileExistsError, NotADirectoryError):
                left_out["names that are there twice"] += 1
                continue
            if path.stat().st_size != length:
                raise OSError("it ends too early")
    if not total:
        raise OSError("it holds nothing")
    if left_out:
        log(f"left out of the archive: {counted(sorted(left_out.items()))}")


def _parts(name: str) -> list[str] | None:
    """Split a member's path; None for one that leads out of the folder, or is absurd."""
    path = name.replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    is_absolute = path.startswith("/") or re.match("[A-Za-z]:", path)
    too_long = len(path) > MAX_NAME or max(map(len, map(os.fsencode, parts)), default=0) > 255
    return None if is_absolute or ".." in parts or "\0" in path or too_long else parts


def _members(file: BinaryIO) -> Iterator[Member]:
    """Read what an archive holds, one after the other; folders are left out."""
    if zipfile.is_zipfile(file):
        yield from _zip_members(file)
        return
    file.seek(0)
    unpacker = UNPACKERS.get(file.read(2))
    file.seek(0)
    with unpacker(file) if unpacker else contextlib.nullcontext(file) as tar:
        yield from _tar_members(tar)


class _Bounded(io.BufferedReader):
    """Refuses the read by which zipfile takes in the whole directory, if that is large."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise OSError(f"its directory has {size:,} bytes")
        return super().read(size)


def _zip_members(file: BinaryIO) -> Iterator[Member]:
    with zipfile.ZipFile(_Bounded(file.raw)) as z:
        for entry in z.infolist():
            if entry.is_dir():
                continue
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise OSError(f"{shown(entry.filename)} is not compressed as zip files usually are")
            if stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG):
                with z.open(entry) as source:
                    yield entry.filename, entry.file_size, source
            else:
                yield entry.filename, 0, None


def _tar_members(tar: BinaryIO) -> Iterator[Member]:
    """Read a tar as a stream: nothing that lies about lengths leads back in it."""
    with tarfile.open(fileobj=tar, mode="r|", tarinfo=TarMember) as members:
        while member := members.next():
            members.members.clear()
            if member.size < 0:
                raise OSError(f"{shown(member.name)} claims {member.size} bytes")
            if (member.issym() or member.islnk()) and _parts(member.linkname) is None:
                raise OSError(f"its link {shown(member.name)} leads outside")
            if not member.isdir():
                source = members.extractfile(member) if member.isreg() else None
                yield member.name, member.size, source
    while tar.read(1 << 20):  # gzip's check of all that was read stands at the end
        pass


# --- CIFAR-10 ------------------------------------------------------------------------------------


def cifar_set(folder: Path, selection: Selection = EVERYTHING) -> ImageSet:
    """Read CIFAR-10's training images from its binary files: per image a label and 3072 bytes."""
    if selection != EVERYTHING:
        raise UserError(
            f"{folder} holds CIFAR-10 in binary, whose training images are read: drop "
            "--split, --image_column and --caption_column"
        )
    files = sorted(file for file in folder.glob("data_batch_*.bin") if file.is_file())
    meta = folder / "batches.meta.txt"
    try:
        if not is_inside(meta, folder):  # its words become the model's
            raise ValueError("batches.meta.txt leads out of the folder")
        names = read_bytes(meta, MAX_NAME).decode("ascii").split()
        if len(set(names)) != 10 or not all(re.fullmatch(r"\w{1,20}", name) for name in names):
            raise ValueError("batches.meta.txt holds other than ten words")
        # a byte more than there may be is no row of the table
        rows = [np.fromfile(file, np.uint8, 10_000 * 3073 + 1).reshape(-1, 3073) for file in files]
        table = np.concatenate(rows)
        labels = table[:, 0].tolist()
        classes = [names[label] for label in labels]
        if not labels:
            raise ValueError("no images")
    except (OSError, ValueError, IndexError) as error:
        raise UserError(
            f"{folder} is no intact CIFAR-10 in binary ({error}): fetch it again"
        ) from None

    def read(i, size, *_):
        pixels = table[i, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
        return to_pixels(Image.fromarray(np.ascontiguousarray(pixels)), size)

    return ImageSet(
        name="cifar10",
        names=[f"cifar10/{i:05d}" for i in range(len(table))],
        read=read,
        labels=labels,
        classes=names,
        texts=[(f"a photo of a {name}",) for name in classes],
        stamp=digest(str(folder.resolve()), *map(file_stamp, files)),
    )
