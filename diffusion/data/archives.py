"""Sets that are fetched as archives: download, unpack, and CIFAR-10's binary files.

torchvision reads CIFAR-10 by unpickling, and unpacks tar files without a filter where Python has
none of its own (before 3.14): nothing here runs or writes what an archive says.
"""

import os
import shutil
import tarfile
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from .. import UserError
from ..files.validate import TarMember
from ..runtime.distributed import progress
from .cache import check_space, locked
from .captions import EVERYTHING, Selection
from .image_set import ImageSet, digest, file_stamp
from .images import first_line, to_pixels

MAX_UNPACKED = 50  # times an archive's size; images hardly shrink
DAMAGES = (OSError, RuntimeError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError)


def fetch(url: str, target: Path) -> None:
    """Download an archive and unpack it to the folder `target`, completely or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.fetch")
    archive = work / "archive"
    unpacked = work / "unpacked"
    with locked(target.with_name(f".{target.name}.lock")):
        if target.is_dir():
            return
        shutil.rmtree(work, ignore_errors=True)
        try:
            unpacked.mkdir(parents=True)
            download(url, archive)
            _unpack(archive, unpacked)
            inner = [p for p in unpacked.iterdir() if not p.name.startswith((".", "__MACOSX"))]
            alone = len(inner) == 1 and inner[0].is_dir()
            os.replace(inner[0] if alone else unpacked, target)
        except DAMAGES as error:
            raise UserError(
                f"{url} could not be fetched: {first_line(error)}; download it elsewhere and "
                f"unpack it to {target}, or give --data a folder of images"
            ) from None
        finally:
            shutil.rmtree(work, ignore_errors=True)


def download(url: str, part: Path) -> None:
    """Fetch a file. Raises OSError if the disk is too small or the connection breaks."""
    with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as out:
        total = int(response.headers.get("Content-Length", 0))
        check_space(part.parent, 2 * total)  # the archive, and what it holds
        about = f"fetching {url.split('/')[-1]}"
        with progress(desc=about, total=total or None, unit="B", unit_scale=True) as bar:
            while chunk := response.read(1 << 20):
                out.write(chunk)
                bar.update(len(chunk))
        if total and out.tell() != total:
            raise OSError(f"the connection broke after {out.tell()} of {total} bytes")


def _unpack(archive: Path, target: Path) -> None:
    """Unpack a zip or tar file. Raises OSError if it holds more than an archive of images can."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as z:
            _check_total(archive, sum(entry.file_size for entry in z.infolist()))
            z.extractall(target)
    else:
        with tarfile.open(archive, tarinfo=TarMember) as t:
            _check_total(archive, sum(member.size for member in t))
            t.extractall(target, filter="data")


def _check_total(archive: Path, total: int) -> None:
    size = archive.stat().st_size
    if not total:
        raise OSError("it holds nothing")
    if total > max(MAX_UNPACKED * size, 1 << 24):
        raise OSError(f"its {size:,} bytes would become {total:,}: not an archive of images")
    check_space(archive.parent, total)


# --- CIFAR-10 ------------------------------------------------------------------------------------


def cifar_set(folder: Path, selection: Selection = EVERYTHING) -> ImageSet:
    """Read CIFAR-10's training images from its binary files: per image a label and 3072 bytes."""
    if selection != EVERYTHING:
        raise UserError(
            f"{folder} holds CIFAR-10 in binary, whose training images are read: drop "
            "--split, --image_column and --caption_column"
        )
    files = sorted(file for file in folder.glob("data_batch_*.bin") if file.is_file())
    try:
        names = (folder / "batches.meta.txt").read_text().split()
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
