"""Where pictures go: what is there stays, what two processes write at once does not collide.

A folder of numbered pictures is continued after its highest number; a single picture or folder
whose name is taken gets the next free one, grid_2.png beside grid.png. --overwrite replaces what
this program has written, by the proof in weights/owned.py, and nothing else.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import UserError
from . import owned

TEMPORARY = re.compile(r"\.\d{6,}\.png\.\d+\.tmp")
PICTURES = (".png", ".webp")
# other files that are written, and how these begin
QUALITY = re.compile(r"quality(_\d+)?\.json")
PAGE_HEAD = f'<head>\n<meta name="generator" content="{owned.SOFTWARE}">\n'
QUALITY_HEAD = f'{{\n  "software": {json.dumps(owned.SOFTWARE)},\n'
# what file managers put into any folder, beside hidden files
CLUTTER = ("thumbs.db", "desktop.ini")


def is_ours(file: Path) -> bool:
    """Check whether this program wrote a file: a picture, a film, a page or quality.json.

    What merely mentions the program, such as somebody's notes, is not.
    """
    if file.suffix in PICTURES:
        return owned.is_our_picture(file)
    try:
        if not file.is_file():
            return False
        with open(file, encoding="utf-8", errors="replace") as text:
            head = text.read(256)
    except OSError:
        return False
    if file.name == "index.html":
        before, mark, _ = head.partition(PAGE_HEAD)
        return bool(mark) and re.fullmatch(r"<!doctype html>\n<html[^<>]*>\n", before) is not None
    return QUALITY.fullmatch(file.name) is not None and head.startswith(QUALITY_HEAD)


def create(folder: Path) -> None:
    """Create a folder for pictures, marked as ours unless somebody's files are in it.

    Raises UserError if it, or a folder above it, is a link that leads nowhere.
    """
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, which does not exist: "
                "create that folder, or delete the link"
            )
    folder.mkdir(parents=True, exist_ok=True)
    names = (file.name for file in folder.iterdir())
    if all(name.startswith(".") or name.lower() in CLUTTER for name in names):
        owned.mark(folder)


def write_new(path: Path, write: Callable[[Path], None], replace: bool = False) -> bool:
    """Write a file whole or not at all; False, and nothing written, if the name is taken.

    replace: a file of that name that is ours is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        if replace and is_ours(path):
            os.replace(temporary, path)
            return True
        try:
            os.link(temporary, path)  # unlike a renaming, never over another file
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if path.exists():
                return False
            os.replace(temporary, path)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def names(path: Path) -> Iterator[Path]:
    """Yield grid.png, grid_2.png, grid_3.png, ..."""
    yield path
    n = 2
    while True:
        yield path.with_name(f"{path.stem}_{n}{path.suffix}")
        n += 1


def write_free(path: Path, write: Callable[[Path], None], overwrite: bool = False) -> Path:
    """Write a file under the first free name, and return it. overwrite: ours of that name goes."""
    return next(name for name in names(path) if write_new(name, write, replace=overwrite))


def drop_others(path: Path) -> None:
    """Delete grid_2.png, grid_3.png, ..., for path grid.png, that are ours."""
    for file in path.parent.glob(f"{path.stem}_*{path.suffix}"):
        if file.stem[len(path.stem) + 1 :].isdigit() and is_ours(file):
            file.unlink()


# --- a folder of numbered pictures ----------------------------------------------------------------


@dataclass(frozen=True)
class Numbers:
    """The file numbers of one call: first, first + 1, ...

    older: how many pictures the folder held before. replace: whether ours of them may go.
    """

    folder: Path
    first: int
    count: int
    older: int
    replace: bool

    def file(self, i: int) -> Path:
        """Name the file of the i-th picture of this call."""
        return self.folder / f"{self.first + i:06d}.png"

    def save(self, i: int, write: Callable[[Path], None]) -> Path:
        """Write the i-th picture. Raises UserError if somebody has taken its name meanwhile."""
        path = self.file(i)
        if not write_new(path, write, replace=self.replace):
            raise UserError(
                f"{path} has come into being meanwhile; nothing is written over: give "
                "another --save_folder"
            )
        return path

    def drop_older(self) -> int:
        """Delete the pictures of earlier calls that are ours; how many."""
        mine = {self.file(i) for i in range(self.count)}
        old = [f for f in numbered(self.folder).values() if f not in mine and is_ours(f)]
        for file in old:
            file.unlink()
        return len(old)


def numbered(folder: Path) -> dict[int, Path]:
    """Find the pictures of a folder that have a number for a name."""
    files = folder.iterdir() if folder.is_dir() else ()
    return {int(f.stem): f for f in sorted(files) if f.stem.isascii() and f.stem.isdigit()}


@contextlib.contextmanager
def reserve(folder: Path, count: int, overwrite: bool) -> Iterator[Numbers]:
    """Reserve numbers for `count` pictures, which no other process gets meanwhile.

    Each process holds a locked file with its range for as long as it runs, beside the folder.
    overwrite: numbers start again, after the highest one of a picture that is not ours.
    Raises UserError if the folder cannot be written, or with overwrite, if another one writes.
    """
    try:
        create(folder)
        with contextlib.ExitStack() as held:
            _lock_folder(held, folder)
            there = numbered(folder)
            busy = _ranges(folder)
            if overwrite and busy:
                raise UserError(
                    f"another process writes pictures to {folder}: wait, or give "
                    "another --save_folder"
                )
            taken = [n for n, file in there.items() if not (overwrite and is_ours(file))]
            first = max([n + 1 for n in taken] + busy, default=0)
            if not busy:
                for left in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                    if TEMPORARY.fullmatch(left.name) and left.is_file():
                        left.unlink()
            claim = folder.with_name(f".{folder.name}_{first}_{first + count}")
            claimed = contextlib.ExitStack()
            _lock(claimed, os.open(claim, os.O_RDWR | os.O_CREAT, 0o666))
    except OSError as error:
        raise UserError(
            f"--save_folder: {folder} cannot be written: {error.strerror or error}"
        ) from None
    with claimed:
        try:
            yield Numbers(folder, first, count, len(there), overwrite)
        finally:
            with contextlib.suppress(OSError):  # Windows keeps open files
                claim.unlink(missing_ok=True)


def _ranges(folder: Path) -> list[int]:
    """The ends of the ranges of processes that run; what others have left is deleted."""
    ends = []
    claim = re.compile(rf"\.{re.escape(folder.name)}_\d+_\d+")
    for file in folder.parent.iterdir():
        if not (claim.fullmatch(file.name) and file.is_file()):
            continue
        with contextlib.ExitStack() as held:
            if _lock(held, os.open(file, os.O_RDWR), wait=False):
                file.unlink(missing_ok=True)
            else:
                ends.append(int(file.name.rsplit("_", 1)[1]))
    return ends


def _lock_folder(held: contextlib.ExitStack, folder: Path, wait: bool = True) -> bool:
    """Lock a folder as `_lock` does, where the system opens folders: Windows does not."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        if os.name != "nt":
            raise
        return True
    return _lock(held, descriptor, wait)


def _lock(held: contextlib.ExitStack, descriptor: int, wait: bool = True) -> bool:
    """Lock an open file or folder until `held` ends; False if another process has it."""
    held.callback(os.close, descriptor)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass  # a system, or a file system, without locks
    return True


# --- a folder of named files ----------------------------------------------------------------------


@contextlib.contextmanager
def output_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Create the folder to write to: `path`, or path_2, path_3, ... where that holds files.

    No other process gets it meanwhile. overwrite: `path` itself, if all that it holds is ours.
    Raises UserError if it cannot be written.
    """
    for folder in names(path):
        with contextlib.ExitStack() as held:
            try:
                create(folder)
                free = _lock_folder(held, folder, wait=False)
                there = [f for f in folder.iterdir() if not f.name.startswith(".")]
            except FileExistsError:
                continue  # a file
            except OSError as error:
                raise UserError(
                    f"--save_folder: {folder} cannot be written: {error.strerror or error}"
                ) from None
            if free and (not there or overwrite and all(map(is_ours, there))):
                yield folder
                return
