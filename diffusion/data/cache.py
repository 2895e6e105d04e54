"""Arrays that are computed once: decoded images, latents, embeddings of captions.

    <cache_dir>/<key>/00000.npy ...    as many entries as `shard` says in each
    <cache_dir>/<key>/00000.json       notes on some of these entries, by index

The key is a digest of all that the numbers depend on: whatever changes makes another cache. A shard
is written atomically, and computed by whoever locks it first: the ranks of a run, and other runs,
build at the same time. A build that was killed resumes with the shards that are missing.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import UserError
from ..files.atomic import atomic, write_text
from ..files.text_files import read_json
from ..runtime.distributed import barrier, log, progress, rank, world_size


@dataclass(eq=False)
class Cache:
    """Keeps (count, *shape) numbers on disk; computes a shard that is missing or unreadable.

    compute(indices): (n, *shape) array of at most `chunk` entries. notes: what compute has to say
    of single entries, {index: JSON value}; it puts them there, and a shard's are stored beside it.
    Raises UserError if the folder cannot be written.
    """

    folder: Path
    count: int
    shape: tuple[int, ...]
    dtype: type
    compute: Callable[[range], np.ndarray]
    chunk: int
    what: str
    notes: dict[int, object] = field(default_factory=dict)
    shard: int = 1024

    def __post_init__(self):
        shards = range(-(-self.count // self.shard))
        self.built = [s for s in shards if self._open(s) is None]  # by this start of the program
        try:
            self._build(self.built[rank() :: world_size()])
            barrier()
            self._build(self.built)  # of other ranks: on a disk of theirs, or not there in time
        except OSError as error:
            raise UserError(
                f"{self.what} cannot be cached in {self.folder}: {error}; free some space, choose "
                "another --cache_dir, or give --no_cache, by which decoded images are not cached"
            ) from None
        self.arrays = [self._open(s) for s in shards]
        if any(array is None for array in self.arrays):
            raise UserError(f"{self.folder} changed while it was read; start again")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Read (n, *shape) entries. Raises UserError for damaged ones."""
        out = np.empty((len(indices), *self.shape), self.dtype)
        for row, i in enumerate(indices):
            out[row] = self.arrays[i // self.shard][i % self.shard]
            if not np.isfinite(out[row]).all():
                raise UserError(
                    f"{self._file(i // self.shard)} is damaged: it holds NaN or infinity; delete "
                    "it, and it is computed again"
                )
        return out

    def _file(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.npy"

    def _entries(self, shard: int) -> range:
        return range(self.count)[shard * self.shard : (shard + 1) * self.shard]

    def _open(self, shard: int) -> np.ndarray | None:
        """Map a shard into memory and take in its notes; None where it is missing or damaged."""
        entries = self._entries(shard)
        file = self._file(shard)
        beside = file.with_suffix(".json")
        with contextlib.suppress(Exception):  # a damaged header can be wrong in many ways
            array = np.load(file, mmap_mode="r", allow_pickle=False)
            found = read_json(beside) if beside.exists() else {}
            notes = {int(i): note for i, note in found.items()}
            right = (len(entries), *self.shape) == array.shape and array.dtype == self.dtype
            if right and notes.keys() <= set(entries):
                self.notes |= notes
                return array
        return None

    def _build(self, shards: list[int]) -> None:
        shards = [s for s in shards if self._open(s) is None]
        if not shards:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        count = sum(len(self._entries(s)) for s in shards)
        check_space(self.folder, count * math.prod(self.shape) * np.dtype(self.dtype).itemsize)
        log(f"{self.what}: {count:,} of {self.count:,} are computed, once")
        with progress(total=count, desc=self.what, unit="", leave=False) as bar:
            for shard in shards:
                lock = self._file(shard).with_suffix(".lock")
                with locked(lock):
                    if self._open(shard) is None:  # else another process was faster
                        atomic(self._file(shard), lambda path: self._write(path, shard, bar))
                    lock.unlink(missing_ok=True)  # who still waits for it finds the shard

    def _write(self, path: Path, shard: int, bar) -> None:
        entries = self._entries(shard)
        descr = np.lib.format.dtype_to_descr(np.dtype(self.dtype))
        header = dict(descr=descr, fortran_order=False, shape=(len(entries), *self.shape))
        with open(path, "wb") as out:
            np.lib.format.write_array_header_1_0(out, header)
            for low in range(0, len(entries), self.chunk):
                values = self.compute(entries[low : low + self.chunk])
                values = values.astype(self.dtype, copy=False)
                if not np.isfinite(values).all():
                    raise UserError(
                        f"{self.what}: the network made non-finite numbers; try --amp no"
                    )
                out.write(values.tobytes())
                bar.update(len(values))
        notes = {i: self.notes[i] for i in entries if i in self.notes}
        beside = self._file(shard).with_suffix(".json")
        beside.unlink(missing_ok=True)
        if notes:
            write_text(beside, json.dumps(notes))


def check_space(folder: Path, need: int) -> None:
    """Raise OSError if the disk of a folder has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(f"{need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock, which the system takes back if we die; none where it has none."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
