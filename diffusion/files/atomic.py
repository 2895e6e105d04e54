"""Open regular files, write files atomically, and lock what two processes may write at once.

The whole package writes through this file (tests/test_walls.py): no link that somebody has laid
into a folder leads a write elsewhere, and a process that is killed leaves no half file.

    atomic, write_text        a file, new or in place of the old one
    create_whole              a new file or folder of several parts
    open_append, append_text  a log
    locked                    a lock
"""

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from .. import UserError, printable
from ..runtime.machine import is_of_gpu, is_out_of_memory

MAX_LOG = 1 << 28  # bytes of a metrics.jsonl: a million lines
Writer = Callable[[Path], None]  # writes a file or folder under the name that it is given

O_BINARY = getattr(os, "O_BINARY", 0)  # of Windows
O_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # of every other system
O_NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # a pipe without another end would be waited for


def reason(error: BaseException) -> str:
    """Shorten the message of a library's error to a line; what it quotes of a file is inert."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return printable(text.splitlines()[0][:200].replace("\t", " "))


@contextmanager
def blame(where: Path | str, advice: str = "", kinds=Exception) -> Iterator[None]:
    """Turn what a library or the system raises into a UserError that names what is at fault."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        if is_of_gpu(error):
            raise
        raise UserError(f"{where}: {reason(error)}{advice}") from None


def open_regular(path: Path, limit: int | None = None) -> BinaryIO:
    """Open a file to read bytes from it; it may be no pipe or device, which may never end.

    limit: the size in bytes above which it is refused.
    Raises UserError for what is no file or too large, and OSError where it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | O_NONBLOCK | O_BINARY)
    about = os.fstat(descriptor)
    if stat.S_ISREG(about.st_mode) and (limit is None or about.st_size <= limit):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISREG(about.st_mode):
        raise UserError(f"{path} has {about.st_size:,} bytes; at most {limit:,} are read")
    kind = "a folder" if stat.S_ISDIR(about.st_mode) else "a pipe or a device"
    raise UserError(f"{path} is {kind}; expected a file")


def name_of(file: BinaryIO, path: Path) -> str:
    """Name an open file for a library that takes a name, in UTF-8; on Linux it gets this one."""
    name = f"/proc/self/fd/{file.fileno()}"
    return name if os.path.exists(name) else str(path)


@contextmanager
def naming(path: Path, instead: Path | None = None) -> Iterator[None]:
    """Let errors of the system name this path, where they name none, or the one `instead` of it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(instead)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def create(path: Path) -> Iterator[BinaryIO]:
    """Create a file to write to. Raises FileExistsError for what exists, also a link."""
    with naming(path), open(path, "xb") as file:
        yield file


def atomic(
    path: Path,
    write: Writer,
    publish: Callable[[Path, Path], None] = os.replace,
    sync: bool = True,
) -> None:
    """Write a file so that `path` is at every moment the old one or the new one, complete.

    `write` gets the path of an empty file in the same folder, of a name that nobody can have
    guessed: no link leads elsewhere from it, and where `path` is a link, the link is replaced and
    not what it leads to. publish: gives the file its name. sync: whether it also outlives a loss of
    power. Raises OSError if it cannot be written; what was there before is then still there.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with naming(path, temporary):
            with create(temporary) as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            write(temporary)
            if sync:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            temporary.chmod(mode)  # safetensors keeps its files from other users
            publish(temporary, path)
    except BaseException as error:
        number = errno.EIO
        with suppress(OSError):
            if shutil.disk_usage(path.parent).free < 1 << 20:  # torch does not say why it failed
                number = errno.ENOSPC
            temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError | SafetensorError) and not (
            is_of_gpu(error) or is_out_of_memory(error)
        ):
            text = reason(error) if number == errno.EIO else os.strerror(number)
            raise OSError(number, text, str(path)) from None
        raise
    if not sync:
        return
    with suppress(OSError):  # the renaming itself; not every system syncs folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_left(folder: Path, of: str) -> None:
    """Delete the half files that killed writers of files have left, of whose names `of` is a regex.

    Only where nobody else writes such files in the folder.
    """
    for left in folder.glob(".*.tmp"):
        # those of earlier versions have a process number in their names, or nothing
        if re.fullmatch(rf"\.({of})(\.[0-9a-f]+)?\.tmp", left.name) and left.is_file():
            left.unlink()


def create_whole(path: Path, write: Writer) -> None:
    """Write a new file or folder by write(path elsewhere): it is there complete or not at all.

    What killed writers of it have left is deleted, unless somebody else writes in the folder.
    Raises FileExistsError where it exists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with locked(path.parent, wait=False) as alone:
        of = re.escape(path.name)
        for left in path.parent.iterdir() if alone else ():
            if re.fullmatch(rf"\.{of}\.[0-9a-f]{{16}}\.tmp", left.name) and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
        try:
            fresh.mkdir()
            write(fresh / path.name)
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            (fresh / path.name).rename(path)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def open_append(path: Path) -> Iterator[BinaryIO]:
    """Open a file to append to it, created if missing. Raises OSError where it is a link."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_BINARY
    with naming(path), open(os.open(path, flags, 0o666), "ab") as file:
        yield file


def append_text(path: Path, text: str) -> None:
    """Append to a UTF-8 text. Raises OSError where it cannot be written, or is a link."""
    with open_append(path) as file:
        file.write(text.encode())


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text atomically."""
    atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    """Read the numbers of a metrics.jsonl: a step and others, or null, by name, from each line.

    A kill may have torn the last line, and another program written anything: lines without a step
    and values that are no finite numbers are left out. Raises UserError for what is no file.
    """
    found = []
    if path.exists():
        with blame(path), open_regular(path, MAX_LOG) as file:
            while text := file.readline(1 << 20):
                with suppress(ValueError, RecursionError, AttributeError):  # damaged, or no object
                    items = json.loads(text).items()
                    line = {k: v for k, v in items if v is None or is_number(v)}
                    if type(line.get("step")) is int and line["step"] >= 0:
                        found.append(line)
    return found


def is_number(value) -> bool:
    """Check for an int or a float that is finite, also as float32."""
    return type(value) in (int, float) and abs(value) < 3.4e38


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool | None]:
    """Hold an advisory lock on a file, which is created if missing, or on a folder.

    Yields True where it is held, False where another process holds it (only with wait=False), and
    None where the system or the file system has no locks. The system takes back the lock of a
    process that dies. Raises OSError if the file cannot be opened.
    """
    try:
        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | O_NOFOLLOW
        descriptor = os.open(path, flags, 0o666)
    except PermissionError:
        if os.name != "nt" or not path.is_dir():  # Windows opens no folders
            raise
        yield None
        return
    held = True
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        held = False
    except (ImportError, OSError):
        held = None
    try:
        yield held
    finally:
        os.close(descriptor)
