"""Choose where pictures go: existing files stay, and two processes at once do not collide.

A folder of numbered pictures is continued after its highest number; a single picture or folder
whose name is taken gets the next free one, grid_2.png beside grid.png. --overwrite replaces what
this program has written, by the proof in owned.py, and nothing else.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .. import UserError
from . import owned
from .atomic import Writer, atomic, locked, remove_left

# the names of our other files, and how these begin
HEADS = {
    r"index\.html": "<!doctype html>\n<html[^<>]*>\n<head>\n"
    + re.escape(f'<meta name="generator" content="{owned.SOFTWARE}">\n'),
    r"quality(_\d+)?\.json": re.escape(f'{{\n  "software": {json.dumps(owned.SOFTWARE)},\n'),
}
# what file managers put into any folder, beside hidden files
CLUTTER = ("thumbs.db", "desktop.ini")


def is_ours(file: Path) -> bool:
    """Check whether this program wrote a file: a picture, an animation, a page or quality.json.

    What merely mentions the program, such as somebody's notes, is not.
    """
    if file.suffix in (".png", ".webp"):
        return owned.is_our_picture(file)
    for name, head in HEADS.items():
        if re.fullmatch(name, file.name) and file.is_file():
            with suppress(OSError), open(file, encoding="utf-8", errors="replace") as text:
                return re.match(head, text.read(256)) is not None
    return False


def create(folder: Path, overwrite: bool = False) -> None:
    """Create a folder for pictures, marked as ours unless somebody's files are in it.

    overwrite: files in it may go. Raises UserError if it, or a folder above it, is a link that
    leads nowhere, and with overwrite for any link: somebody else may have laid it.
    """
    for path in (folder, *folder.parents):
        if path.is_symlink() and (overwrite and path == folder or not path.exists()):
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, which does not exist, or which "
                "--overwrite does not follow: delete the link, or give another --save_folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    if all(file.name[0] == "." or file.name.lower() in CLUTTER for file in folder.iterdir()):
        owned.mark(folder)


def write_new(path: Path, write: Writer, replace: bool) -> bool:
    """Write a file completely or not at all; False, and nothing written, if the name is taken.

    replace: a file of that name that is ours is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)

    def publish(temporary, path):
        if not (replace and is_ours(path)):
            try:
                os.link(temporary, path)  # unlike a renaming, never over another file
                temporary.unlink()
                return
            except OSError:  # taken, or a file system without links
                if os.path.lexists(path):
                    raise FileExistsError(path) from None
        os.replace(temporary, path)

    try:
        atomic(path, write, publish, sync=False)
    except FileExistsError:
        return False
    return True


def names(path: Path) -> Iterator[Path]:
    """Yield grid.png, grid_2.png, grid_3.png, ..."""
    yield path
    for n in itertools.count(2):
        yield path.with_name(f"{path.stem}_{n}{path.suffix}")


def write_free(path: Path, write: Writer, overwrite: bool) -> Path:
    """Write a file under the first free name, and return it. overwrite: ours of that name goes."""
    return next(name for name in names(path) if write_new(name, write, replace=overwrite))


def drop_others(path: Path) -> None:
    """Delete grid_2.png, grid_3.png, ..., for path grid.png, that are ours."""
    for file in path.parent.glob(f"{path.stem}_*{path.suffix}"):
        if file.stem.removeprefix(f"{path.stem}_").isdigit() and is_ours(file):
            file.unlink()


# --- a folder of numbered pictures ----------------------------------------------------------------


@dataclass(frozen=True)
class Numbers:
    """Hold the file numbers of one call: first, first + 1, ...

    older: the number of pictures that the folder held before. replace: ours of them may go.
    """

    folder: Path
    first: int
    count: int
    older: int
    replace: bool

    def file(self, i: int) -> Path:
        """Name the file of the i-th picture of this call."""
        return self.folder / f"{self.first + i:06d}.png"

    def save(self, i: int, write: Writer) -> None:
        """Write the i-th picture. Raises UserError if somebody has taken its name meanwhile."""
        path = self.file(i)
        if not write_new(path, write, replace=self.replace):
            raise UserError(
                f"{path} was created by another process meanwhile and is not overwritten: give "
                "another --save_folder"
            )

    def drop_older(self) -> int:
        """Delete the pictures of earlier calls that are ours, and return how many."""
        mine = {self.file(i) for i in range(self.count)}
        old = [f for f in numbered(self.folder).values() if f not in mine and is_ours(f)]
        for file in old:
            file.unlink()
        return len(old)


def numbered(folder: Path) -> dict[int, Path]:
    """Find the pictures of a folder that have a number for a name."""
    files = folder.iterdir() if folder.is_dir() else ()
    return {int(f.stem): f for f in sorted(files) if f.stem.isascii() and f.stem.isdigit()}


@contextmanager
def reserve(folder: Path, count: int, overwrite: bool) -> Iterator[Numbers]:
    """Reserve numbers for `count` pictures, which no other process gets meanwhile.

    Each process holds a locked file with its range for as long as it runs, beside the folder.
    overwrite: numbers start again, after the highest one of a picture that is not ours.
    Raises UserError if another process writes, with overwrite, and OSError if it cannot be written.
    """
    with ExitStack() as claimed:
        create(folder, overwrite)
        with locked(folder):
            existing = numbered(folder)
            busy = _busy_ranges(folder)
            if overwrite and busy:
                raise UserError(
                    f"another process writes pictures to {folder}: wait, or give "
                    "another --save_folder"
                )
            taken = [n for n, file in existing.items() if not (overwrite and is_ours(file))]
            first = max([n + 1 for n in taken] + busy, default=0)
            if not busy:
                remove_left(folder, r"\d{6,}\.png")
                remove_left(folder.parent, r"grid(_\d+)?\.png")
            claim = folder.with_name(f".{folder.name}_{first}_{first + count}")
            claimed.enter_context(locked(claim))
        try:
            yield Numbers(folder, first, count, len(existing), overwrite)
        finally:
            with suppress(OSError):  # Windows keeps open files
                claim.unlink(missing_ok=True)


def _busy_ranges(folder: Path) -> list[int]:
    """List the ends of the ranges of running processes; delete what others have left."""
    ends = []
    claim = re.compile(rf"\.{re.escape(folder.name)}_\d+_\d+")
    for file in folder.parent.iterdir():
        if not claim.fullmatch(file.name):
            continue
        with suppress(FileNotFoundError):  # that process has just ended
            # a claim is an empty file; a link or anything else of such a name is somebody's
            if file.is_file() and file.lstat().st_size == 0:
                with locked(file, wait=False) as free:
                    if free is False:
                        ends.append(int(file.name.rsplit("_", 1)[1]))
                    else:
                        file.unlink()
    return ends


# --- a folder of named files ----------------------------------------------------------------------


@contextmanager
def output_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Create the folder to write to: `path`, or path_2, path_3, ... where that holds files.

    No other process gets it meanwhile. overwrite: `path` itself, if all that it holds is ours.
    Raises OSError if it cannot be written.
    """
    for folder in names(path):
        with ExitStack() as held:
            try:
                create(folder, overwrite)
            except FileExistsError:
                continue  # a file
            free = held.enter_context(locked(folder, wait=False))
            existing = [file for file in folder.iterdir() if not file.name.startswith(".")]
            replaced = overwrite and all(map(is_ours, existing))
            if free is not False and (not existing or replaced):
                remove_left(folder, r"\w+\.(png|webp)|index\.html")
                yield folder
                return
