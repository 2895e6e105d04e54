"""Sets that are fetched: named archives, and the Hugging Face hub, downloaded or streamed."""

import os
import shutil
import tarfile
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from .. import UserError
from ..files.validate import TarMember
from ..runtime.distributed import log, progress
from ..runtime.seeding import generator, permutation
from .batches import Batch, StepBatches
from .cache import locked
from .captions import Selection
from .columns import open_hub
from .folder import report
from .image_set import ImageSet, digest, file_stamp, folder_set
from .images import BadImage, OddLog, read_noting

MOST_UNPACKED = 50  # times an archive's size; images hardly shrink


@dataclass(frozen=True)
class Archive:
    url: str


NAMED = {
    "anime_faces": "hf:jlbaker361/anime_faces_dim_128_50k",
    "pokemon": "hf:huggan/pokemon",
    "afhq": Archive("https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1"),
    "cifar10": Archive("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"),
}


def named_set(
    name: str, data_class: str, default_caption: str, selection: Selection | None = None
) -> ImageSet:
    """A set of the table above, fetched to data/NAME if it is not there."""
    source = NAMED[name]
    if isinstance(source, str):
        return hub_set(source[3:], default_caption, selection)
    root = Path("data") / name
    fetch(source.url, root)
    if is_cifar(root):
        return cifar_set(root, selection)
    return folder_set(root, data_class, default_caption, selection)


def fetch(url: str, target: Path) -> None:
    """Download an archive and unpack it to the folder `target`, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f".{target.name}.lock")):
        if target.is_dir():
            return
        part = target.with_name(f".{target.name}.part")
        unpacked = target.with_name(f".{target.name}.unpacked")
        try:
            download(url, part)
            shutil.rmtree(unpacked, ignore_errors=True)
            unpacked.mkdir()
            _unpack(part, unpacked)
            inner = [p for p in unpacked.iterdir() if not p.name.startswith((".", "__MACOSX"))]
            whole = inner[0] if len(inner) == 1 and inner[0].is_dir() else unpacked
            os.replace(whole, target)
        except (
            OSError,
            zipfile.BadZipFile,
            tarfile.TarError,
            RuntimeError,
            EOFError,
            zlib.error,
            NotImplementedError,
        ) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{url} could not be fetched: {reason}; download it elsewhere and unpack it to "
                f"{target}, or give --data a folder of images"
            ) from None
        finally:
            part.unlink(missing_ok=True)
            shutil.rmtree(unpacked, ignore_errors=True)


def download(url: str, part: Path) -> None:
    """Fetch a file. Raises OSError if the disk is too small or the connection breaks."""
    with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as out:
        total = int(response.headers.get("Content-Length", 0))
        free = shutil.disk_usage(part.parent).free
        if 2 * total > free:  # the archive, and what it holds
            raise OSError(f"{2 * total / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
        with progress(
            desc=f"fetching {url.split('/')[-1]}", total=total or None, unit="B", unit_scale=True
        ) as bar:
            while chunk := response.read(1 << 20):
                out.write(chunk)
                bar.update(len(chunk))
        if total and out.tell() != total:
            raise OSError(f"the connection broke after {out.tell()} of {total} bytes")


def _unpack(archive: Path, target: Path) -> None:
    """Raises OSError if it holds more than the disk, or than an archive of images can."""
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
    free = shutil.disk_usage(archive.parent).free
    if not total:
        raise OSError("it holds nothing")
    if total > max(MOST_UNPACKED * size, 1 << 24):
        raise OSError(f"its {size:,} bytes would become {total:,}: not an archive of images")
    if total > free:
        raise OSError(f"{total / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def is_cifar(folder: Path) -> bool:
    return (folder / "data_batch_1.bin").is_file()


def cifar_set(folder: Path, selection: Selection | None = None) -> ImageSet:
    """CIFAR-10's training images from its binary archive: per image a label and 3072 bytes."""
    if selection not in (None, Selection()):
        raise UserError(
            f"{folder} holds CIFAR-10 in binary, whose training images are read: drop "
            "--split, --image_column and --caption_column"
        )
    files = sorted(folder.glob("data_batch_*.bin"))
    for file in files:
        size = file.stat().st_size if file.is_file() else 0
        if not 0 < size <= 10_000 * 3073 or size % 3073:
            raise UserError(f"{file} has {size} bytes, not 3073 an image: fetch it again")
    rows = [np.fromfile(f, np.uint8) for f in files]
    if not files:
        raise UserError(f"{folder} holds no data_batch_1.bin: fetch it again")
    table = np.concatenate(rows).reshape(-1, 3073)
    labels = table[:, 0]
    pixels = table[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    names = (folder / "batches.meta.txt").read_text().split()
    if labels.max() >= len(names):
        raise UserError(
            f"{folder} has labels up to {labels.max()} for {len(names)} classes: it is "
            "damaged, fetch it again"
        )

    def read(i: int, size: int) -> np.ndarray:
        from PIL import Image

        from .images import to_pixels

        return to_pixels(Image.fromarray(np.ascontiguousarray(pixels[i])), size)

    return ImageSet(
        name="cifar10",
        names=[f"cifar10/{i:05d}" for i in range(len(table))],
        read=read,
        labels=labels.astype(int).tolist(),
        classes=names,
        texts=[(f"a photo of a {names[i]}",) for i in labels],
        stamp=digest(str(folder.resolve()), *map(file_stamp, files)),
    )


# --- the hub ------------------------------------------------------------------------------------


def hub_set(path: str, default_caption: str = "", selection: Selection | None = None) -> ImageSet:
    """A split of a hub set (or a local folder of parquet files), downloaded."""
    hub = open_hub(path, False, selection, default_caption)
    data = hub.data
    texts = [(default_caption,)] * len(hub.data) if default_caption else None
    if hub.text:
        texts = []
        bad = []
        for i, value in enumerate(data[hub.text]):
            try:
                texts.append(hub.captions(value, i))
            except UserError as error:
                if hub.strict:
                    raise
                bad.append((f"row {i}", str(error)))
                texts.append((default_caption,))
        report(f"captions of hf:{path} cannot be used", bad, len(data))
        if not default_caption and not any(own[0] for own in texts):
            texts = None
    return ImageSet(
        name=f"hf:{path}",
        names=[f"{path}/{i:08d}" for i in range(len(data))],
        read=lambda i, size: hub.pixels(data[i], size),
        labels=[hub.number(v) for v in data[hub.label]] if hub.label else [-1] * len(data),
        classes=hub.classes,
        texts=texts,
        stamp=digest(*(f["filename"] for f in data.cache_files), str(len(data)), *hub.key),
    )


class StreamBatches(StepBatches):
    """`Batches` over a stream that is never stored.

    Every rank reads the whole stream and decodes its share. Block b of epoch e is shuffled by
    (seed, e, b), so that resuming means to open the stream at the block in question. How many
    samples an epoch has is known once one has been read (`length`, which a checkpoint keeps).
    The stream's first images are held out.
    """

    BLOCK = 1024
    HELD_OUT = 128

    def __init__(
        self,
        path: str,
        size: int,
        batch_size: int,
        seed: int,
        flip: bool = True,
        default_caption: str = "",
        selection: Selection | None = None,
    ):
        super().__init__()
        self.hub = open_hub(path, True, selection, default_caption)
        self.data = self.hub.data
        self.classes = self.hub.classes
        self.path = path
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self.captioned = bool(self.hub.text or default_caption)
        self.odd = OddLog()
        self.length: int | None = None
        self.blocks: dict[int, list] = {}
        self.reader = None
        self.next_block = -1
        self.skipped: set[int] = set()
        first = [self._decode(row, i) for i, row in enumerate(self.data.take(self.HELD_OUT))]
        if len(first) < self.HELD_OUT:
            raise UserError(f"hf:{path} streams only {len(first)} images: drop --streaming")
        self.first = [row for row in first if row is not None]
        self.held_out = range(len(self.first))

    def __len__(self) -> int:
        return self.length or 0

    def describe(self) -> str:
        return f"a stream, its first {self.HELD_OUT} images held out"

    def order_key(self) -> str:
        return digest(self.path)

    def _decode(self, row: dict, number: int):
        """(pixels, label, captions); None, and a warning, for a row without a usable image."""
        hub = self.hub
        try:
            pixels, found = read_noting(lambda: hub.pixels(row, self.size))
        except BadImage as error:
            if number not in self.skipped:
                self.skipped.add(number)
                log(
                    f"warning: row {number} of hf:{self.path} is skipped: {error} "
                    f"({len(self.skipped)} so far)"
                )
            return None
        self.odd(f"row {number} of hf:{self.path}", found)
        texts = hub.captions(row[hub.text] if hub.text and hub.strict else None, number)
        return pixels, hub.number(row[hub.label]) if hub.label else -1, texts

    def _block(self, b: int) -> list[dict]:
        """Block b of the stream, up to BLOCK rows, images still encoded."""
        if b not in self.blocks:
            if b != self.next_block:
                self.reader = iter(self.data.skip(self.HELD_OUT + b * self.BLOCK))
            self.next_block = b + 1
            rows = list(islice(self.reader, self.BLOCK))
            if len(rows) < self.BLOCK and self.length is None:
                # an empty block may lie anywhere beyond the end: the one before it knows
                if rows or b == 0 or len(self._block(b - 1)) == self.BLOCK:
                    self.length = b * self.BLOCK + len(rows)
                if self.length == 0:
                    raise UserError(f"hf:{self.path} streams nothing beyond its held-out images")
            self.blocks = {b: rows}
        return self.blocks[b]

    def _sample(self, position: int) -> tuple[np.ndarray, int, tuple[str, ...]]:
        """The sample at a position of the endless sequence of epochs."""
        epoch, offset = divmod(position, self.length) if self.length else (0, position)
        b, place = divmod(offset, self.BLOCK)
        block = self._block(b)
        if place >= len(block):  # the stream has just ended here: length is known now
            return self._sample(position)
        first = int(permutation(len(block), self.seed, "order", epoch, b)[place])
        for i in range(first, first + len(block)):  # in place of a bad image, the next good one
            i %= len(block)
            number = self.HELD_OUT + b * self.BLOCK + i
            if (row := self._decode(block[i], number)) is not None:
                return row
        raise UserError(f"hf:{self.path}: no image of block {b} can be used")

    def _load(self, step: int, low: int, high: int) -> Batch:
        rows = [self._sample(step * self.batch_size + j) for j in range(low, high)]
        g = generator(self.seed, "flip", step)
        flips = torch.randint(2, (self.batch_size,), generator=g).bool().tolist()[low:high]
        g = generator(self.seed, "caption", step)
        fractions = torch.rand(self.batch_size, generator=g, dtype=torch.float64).tolist()[low:high]
        return self._batch(
            [
                (
                    pixels[:, ::-1] if flip and self.flip else pixels,
                    label,
                    texts[int(fraction * len(texts)) :],
                )
                for (pixels, label, texts), flip, fraction in zip(rows, flips, fractions)
            ]
        )

    def held_out_batch(self, low: int, high: int) -> Batch:
        return self._batch(self.first[low:high])

    def _batch(self, rows: list) -> Batch:
        """Of (pixels, label, captions), the first of which counts."""
        images, labels, texts = zip(*rows)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        captions = [own[0] for own in texts] if self.captioned else None
        return Batch(pixels, torch.tensor(labels), captions=captions)
