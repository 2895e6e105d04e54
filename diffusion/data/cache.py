"""Arrays that are computed once: decoded images, latents, embeddings of captions.

    <cache_dir>/<key>/00000.npy ...    as many entries as `shard` says in each
    <cache_dir>/<key>/00000.json       notes on some of these entries, by index; the digest of all

The key is a digest of all that the numbers depend on: whatever changes makes another cache. A shard
is written atomically, and computed by whoever locks it first: the ranks of a run, and other runs,
build at the same time. A build that was killed resumes with the shards that are missing. The digest
is compared when a shard is opened: what is damaged, or older than digests are, is computed again.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import UserError
from ..files.atomic import atomic, locked, remove_left, write_text
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
        self.arrays = [self._open(s) for s in shards]
        self.built = [s for s in shards if self.arrays[s] is None]  # by this start of the program
        if damaged := sum(os.path.lexists(self._file(s)) for s in self.built):
            log(
                f"warning: {self.what}: {damaged} files in {self.folder} are damaged or of an "
                "earlier version, and computed again"
            )
        try:
            self._build(self.built[rank() :: world_size()])
            barrier()
            self._build(self.built)  # of other ranks: on a disk of theirs, or not there in time
        except OSError as error:
            raise UserError(
                f"{self.what} cannot be cached in {self.folder}: {error}; free some space, choose "
                "another --cache_dir, or give --no_cache, by which decoded images are not cached"
            ) from None
        if any(array is None for array in self.arrays):
            raise UserError(f"{self.folder} changed while it was read; start again")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Read (n, *shape) entries."""
        return np.stack([self.arrays[i // self.shard][i % self.shard] for i in indices])

    def _file(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.npy"

    def _entries(self, shard: int) -> range:
        return range(self.count)[shard * self.shard : (shard + 1) * self.shard]

    def _open(self, shard: int) -> np.ndarray | None:
        """Map a shard into memory and take in its notes; None where it is missing or damaged."""
        file = self._file(shard)
        with contextlib.suppress(Exception):
            about = read_json(file.with_suffix(".json"))
            array = np.load(file, "r") if file.is_file() else np.empty(0)  # a pipe has no end
            seal = hashlib.sha256(array)
            seal.update(self._described(shard, about["notes"]))
            expected = (self._shape(shard), self.dtype, seal.hexdigest())
            if (array.shape, array.dtype, about["sha256"]) == expected:
                self.notes |= {int(i): note for i, note in about["notes"].items()}
                return array
        return None

    def _shape(self, shard: int) -> tuple[int, ...]:
        return (len(self._entries(shard)), *self.shape)

    def _described(self, shard: int, notes: dict) -> bytes:
        """Give what is digested beside the numbers of a shard."""
        return f"{self.folder.name} {shard} {json.dumps(notes)}".encode()

    def _is_there(self, shard: int) -> bool:
        if self.arrays[shard] is None:
            self.arrays[shard] = self._open(shard)
        return self.arrays[shard] is not None

    def _build(self, shards: list[int]) -> None:
        shards = [s for s in shards if not self._is_there(s)]
        if not shards:
            return
        if self.folder.is_symlink():  # whose files might be replaced?
            raise OSError(f"it is a link to {os.readlink(self.folder)}")
        self.folder.mkdir(parents=True, exist_ok=True)
        count = sum(len(self._entries(s)) for s in shards)
        check_space(self.folder, count * math.prod(self.shape) * np.dtype(self.dtype).itemsize)
        log(f"{self.what}: {count:,} of {self.count:,} are computed, once")
        with progress(total=count, desc=self.what, unit="", leave=False) as bar:
            for shard in shards:
                lock = self._file(shard).with_suffix(".lock")
                with locked(lock) as held:
                    if held:
                        remove_left(self.folder, rf"{shard:05d}\.(npy|json)")
                    if not self._is_there(shard):  # else another process was faster
                        atomic(self._file(shard), lambda path: self._write(path, shard, bar))
                        self._is_there(shard)
                    lock.unlink(missing_ok=True)  # who still waits for it finds the shard

    def _write(self, path: Path, shard: int, bar) -> None:
        entries = self._entries(shard)
        seal = hashlib.sha256()
        with open(path, "wb") as out:
            np.lib.format.write_array_header_1_0(
                out,
                dict(descr=np.dtype(self.dtype).str, fortran_order=False, shape=self._shape(shard)),
            )
            for low in range(0, len(entries), self.chunk):
                values = self.compute(entries[low : low + self.chunk])
                values = values.astype(self.dtype, copy=False)
                if not np.isfinite(values).all():
                    raise UserError(
                        f"{self.what}: the network made non-finite numbers; try --amp no"
                    )
                seal.update(values.tobytes())
                out.write(values.tobytes())
                bar.update(len(values))
        notes = {str(i): self.notes[i] for i in entries if i in self.notes}
        seal.update(self._described(shard, notes))
        about = json.dumps(dict(sha256=seal.hexdigest(), notes=notes))
        write_text(self._file(shard).with_suffix(".json"), about)


def check_space(folder: Path, need: int) -> None:
    """Raise OSError if the disk of a folder has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(f"{need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
