"""Faults at the n-th thing that a process does to the disk: killed before it, after it or half-way,
or refused by the system from there on.

What is counted are the calls of which all writing consists: files created, finished (half of the
bytes are there) and synced, lines appended, names given and taken away, folders made. `install` is
called in the child (child.py) by the environment variable FAULT_PLAN, made by `plan`.
"""

import builtins
import errno
import io
import json
import os
import signal
from pathlib import Path

KILL = 0  # instead of an error's number


def plan(root: Path, n: int, error: int = KILL, rank: int = 0) -> dict[str, str]:
    """The environment of a process with a fault at its n-th event below root, on one rank."""
    values = dict(root=str(root), n=n, error=error, rank=rank, hit=str(hit_file(root)))
    return {"FAULT_PLAN": json.dumps(values)}


def hit_file(root: Path) -> Path:
    """Where the process notes what was hit."""
    return Path(root).with_name(Path(root).name + ".hit")


def install() -> None:
    values = json.loads(os.environ["FAULT_PLAN"])
    if values["rank"] != int(os.environ.get("RANK", 0)):
        return
    real = {name: getattr(os, name) for name in
            ("open", "replace", "rename", "link", "unlink", "mkdir", "rmdir", "chmod", "fsync", "write")}  # fmt: skip
    real_open = builtins.open
    left = [values["n"]]

    def below(path) -> str | None:
        try:
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")
            path = os.path.abspath(os.fsdecode(path))
        except (OSError, TypeError):
            return None
        return path if path.startswith(values["root"] + os.sep) else None

    def event(name: str, path, half=None, refusable: bool = True) -> None:
        """Count an event; half: does half of it."""
        path = below(path)
        if path is None or values["error"] and not refusable:
            return
        left[0] -= 1
        if left[0] > 0 or left[0] < 0 and not values["error"]:
            return
        if left[0] == 0:
            if half is not None:
                half()
            descriptor = real["open"](values["hit"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            real["write"](descriptor, f"{name} {path}".encode())
            os.close(descriptor)
        if values["error"] == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(values["error"], os.strerror(values["error"]), path)

    def around(name: str, position: int = -1):
        """Before and after a call that gives or takes a name."""
        refusable = name not in ("unlink", "rmdir")  # a full disk lets one delete

        def call(*args, **options):
            event(f"before {name}", args[position], refusable=refusable)
            result = real[name](*args, **options)
            event(f"after {name}", args[position], refusable=False)
            return result

        return call

    def chmod(path, *args, **options):
        """The last before a finished file gets its name."""

        def half():
            if os.stat(path).st_nlink == 1:  # else it is no copy
                os.truncate(path, os.path.getsize(path) // 2)

        event("half", path, half)
        return real["chmod"](path, *args, **options)

    def fsync(descriptor):
        event("fsync", descriptor)
        return real["fsync"](descriptor)

    def os_open(path, flags, *args, **options):
        if flags & os.O_CREAT:
            event("create", path)
        return real["open"](path, flags, *args, **options)

    def open(file, mode="r", *args, **options):
        if set(mode) & set("wxa+") and isinstance(file, int):
            event("append", file, lambda: real["write"](file, b'{"step": 4, "lo'))
        elif set(mode) & set("wxa"):
            event("open", file)
        return real_open(file, mode, *args, **options)

    for name in ("replace", "rename", "link"):
        setattr(os, name, around(name, 1))
    for name in ("unlink", "mkdir", "rmdir"):
        setattr(os, name, around(name, 0))
    os.chmod, os.fsync, os.open = chmod, fsync, os_open
    builtins.open = io.open = open


FULL, BROKEN, READ_ONLY = errno.ENOSPC, errno.EIO, errno.EROFS
