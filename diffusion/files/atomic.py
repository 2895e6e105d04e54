"""Write files atomically, and lock what two processes may write at once."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from .. import UserError


def reason(error: BaseException) -> str:
    """Shorten the message of a library's error to a line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:200]


@contextlib.contextmanager
def blame(where: Path | str, advice: str = "", kinds=Exception) -> Iterator[None]:
    """Turn what a library or the system raises into a UserError that names what is at fault."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{where}: {reason(error)}{advice}") from None


def atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that `path` is at every moment the old one or the new one, complete.

    `write` gets the path of a temporary file beside it. Raises OSError if it cannot be written;
    what was there before is then still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors keeps its files from other users
        os.replace(temporary, path)
    except BaseException as error:
        text = reason(error)
        with contextlib.suppress(OSError):
            if shutil.disk_usage(path.parent).free < 1 << 20:  # torch does not say why it failed
                text = f"no space left on the device ({text})"
            temporary.unlink()
        if isinstance(error, RuntimeError | SafetensorError):
            raise OSError(f"{path} could not be written: {text}") from None
        raise
    with contextlib.suppress(OSError):  # the renaming itself; not every system syncs folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text atomically."""
    atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    """Read the complete lines of a metrics.jsonl; a kill may have torn the last one."""
    found = []
    if path.exists():
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            while text := file.readline(1 << 20):
                with contextlib.suppress(ValueError, RecursionError):
                    found.append(json.loads(text))
    return [x for x in found if isinstance(x, dict) and type(x.get("step")) is int]


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool | None]:
    """Hold an advisory lock on a file, which is created if missing, or on a folder.

    Yields True where it is held, False where another process holds it (only with wait=False), and
    None where the system or the file system has no locks. The system takes back the lock of a
    process that dies. Raises OSError if the file cannot be opened.
    """
    try:
        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        descriptor = os.open(path, flags, 0o666)
    except PermissionError:
        if os.name != "nt" or not path.is_dir():  # Windows opens no folders
            raise
        yield None
        return
    held: bool | None = True
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
