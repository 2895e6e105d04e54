"""Images decoded once into a uint8 memory map.

    <key>.u8     (N, size, size, 3) uint8, the usable images in order
    <key>.json   which ones they are; written last, so that its presence means completeness

The key is a digest of the set's stamp, its names and the transform. Several processes may ask at
once: one builds under a file lock while the others wait; a killed build leaves a temporary file
that the next one removes.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .. import UserError
from ..runtime.distributed import barrier, is_main, log, progress
from .folder import report
from .image_set import ImageSet, digest
from .images import BadImage, read_noting

TRANSFORM = "exif, sRGB over white, central square, lanczos; 2"  # the number: raise on any change

MOST_REASON = 5000  # characters; a path has at most 4096


def decode_all(
    images: ImageSet, size: int, workers: int
) -> Iterator[tuple[np.ndarray | BadImage, list[str]]]:
    """Each image, or why it cannot be used, and what is odd about it; in order.

    Decoded in threads, few held at a time.
    """

    def one(i: int) -> tuple[np.ndarray | BadImage, list[str]]:
        try:
            return read_noting(lambda: images.read(i, size))
        except BadImage as error:
            return error, []

    with ThreadPoolExecutor(max(1, workers)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's on large images: MAX_PIXELS decides
        for start in range(0, len(images), 256):
            yield from pool.map(one, range(start, min(start + 256, len(images))))


def cached(
    images: ImageSet, size: int, folder: Path, workers: int = 2
) -> tuple[np.ndarray, list[int]]:
    """(N, size, size, 3) uint8 memory map of the usable images, and their indices in the set.

    Raises UserError if no image is usable or the disk is too small.
    """
    if not is_main():
        barrier()  # rank 0 comes first: it shows progress and tells what is skipped
    try:
        pixels, kept, skipped = _open_or_build(images, size, folder, workers)
    except OSError as error:
        raise UserError(
            f"the image cache in {folder} cannot be written: {error}; free some space, choose "
            "another --cache_dir, or give --no_cache"
        ) from None
    if is_main():
        barrier()
    report("images cannot be used and are skipped", skipped, len(images))
    return pixels, kept


def _open_or_build(images: ImageSet, size: int, folder: Path, workers: int) -> tuple:
    key = digest(images.stamp, TRANSFORM, str(size), *images.names)
    data = folder / f"{key}.u8"
    index = folder / f"{key}.json"
    known = (data, index, size, len(images))
    unusable = (OSError, ValueError, KeyError, TypeError, RecursionError)
    with contextlib.suppress(*unusable):
        return _open(*known)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f"{key}.lock") as alone:
        with contextlib.suppress(*unusable):
            return _open(*known)  # another process built it meanwhile
        _build(images, size, data, index, workers, alone)
        return _open(*known)


def _open(data: Path, index: Path, size: int, count: int) -> tuple[np.ndarray, list[int], list]:
    if index.stat().st_size > (1 << 20) + 1000 * count:
        raise ValueError("an index of more than there is")
    found = json.loads(index.read_text())
    kept = found["kept"]
    skipped = found["skipped"]
    if not all(type(i) is int and 0 <= i < count for i in kept) or sorted(set(kept)) != kept:
        raise ValueError("an index of images that the set has not")
    pairs = [(name, why) for name, why in skipped]
    told = all(isinstance(t, str) and len(t) < MOST_REASON for pair in pairs for t in pair)
    if not told or len(kept) + len(pairs) != count or any("\n" in why for _, why in pairs):
        raise ValueError("not the reasons why images are skipped")
    pixels = np.memmap(data, np.uint8, mode="r").reshape(len(kept), size, size, 3)
    return pixels, kept, pairs


def _build(images: ImageSet, size: int, data: Path, index: Path, workers: int, alone: bool) -> None:
    if alone:
        for stale in data.parent.glob(f"{data.stem}.*.tmp"):
            stale.unlink()
    need = len(images) * size * size * 3
    free = shutil.disk_usage(data.parent).free
    if need > free:
        raise OSError(f"{need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    kept = []
    problems = []
    odd = []
    temporary = data.with_suffix(f".{os.getpid()}.u8.tmp")
    with open(temporary, "wb") as out:
        bar = progress(
            decode_all(images, size, workers),
            desc=f"decoding {images.name}",
            total=len(images),
            unit="img",
            leave=False,
        )
        for i, (pixels, found) in enumerate(bar):
            odd += [(images.names[i], text) for text in found]
            if isinstance(pixels, BadImage):
                problems.append((images.names[i], " ".join(str(pixels).split())[:500]))
            else:
                out.write(pixels.tobytes())
                kept.append(i)
        out.flush()
        os.fsync(out.fileno())
    if not kept:
        report("images cannot be used", problems, len(images))
        temporary.unlink()
        raise UserError(f"none of the {len(images)} images of {images.name} can be used")
    report("images are used, but may not be what was meant", odd, len(images))
    os.replace(temporary, data)
    temporary = index.with_suffix(f".{os.getpid()}.json.tmp")
    temporary.write_text(json.dumps({"kept": kept, "skipped": problems}))
    os.replace(temporary, index)
    log(f"decoded {len(kept)} images of {images.name} to {size} px")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an advisory lock, which the system takes back if we die; False where there are none.

    Without it two builders do the work twice, each in files of its own.
    """
    with open(path, "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except (ImportError, OSError):
            alone = False
        yield alone
