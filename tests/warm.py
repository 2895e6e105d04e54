"""Scripts and modules as processes of their own, without the seconds that a start takes.

They are forked from a server that has imported everything. Real processes: one can kill them, send
them signals, and run several as the ranks of a group, with the variables that torchrun sets.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def forked(target: str, *args) -> multiprocessing.Process:
    """A process that runs this function of child.py."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["child"])
    with pytest.MonkeyPatch.context() as patch:  # the server does not know this one's sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
        forkserver.ensure_running()
    import child

    process = context.Process(target=getattr(child, target), args=args)
    process.start()
    return process


class Process:
    """What subprocess.Popen has; of several ranks, the first one's output. Signals go to all."""

    def __init__(self, name: str, *args, cwd: Path, ranks: int = 0, env: dict | None = None):
        self.outputs = tempfile.TemporaryDirectory(prefix="warm")  # goes when this object goes
        self.folder = Path(self.outputs.name)
        self.args = [name, *map(str, args)]
        name = str(ROOT / name) if name.endswith(".py") else name
        port = free_port()
        self.processes = []
        for rank in range(ranks or 1):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks else {}  # fmt: skip
            rank_variables = {k: str(v) for k, v in group.items()}
            files = [str(self.folder / f"{kind}{rank}") for kind in ("out", "err")]
            variables = {**os.environ, **(env or {}), **rank_variables}
            self.processes.append(
                forked("script", name, self.args[1:], str(cwd), variables, *files)
            )

    @property
    def pid(self) -> int:
        return self.processes[0].pid

    @property
    def returncode(self) -> int | None:
        """0 if all ranks ended well, else that of the first that did not."""
        codes = [p.exitcode for p in self.processes]
        return None if None in codes else next((c for c in codes if c), 0)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout, *self.read())
        return self.returncode

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def read(self, rank: int = 0) -> tuple[str, str]:
        """(stdout, stderr) of a rank so far."""
        files = (self.folder / f"out{rank}", self.folder / f"err{rank}")
        return tuple(f.read_text() if f.exists() else "" for f in files)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        self.wait(timeout)
        return self.read()


def script(name: str, *args, **options) -> subprocess.CompletedProcess:
    """Runs it to its end. options: as `Process` takes them."""
    process = Process(name, *args, **options)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
