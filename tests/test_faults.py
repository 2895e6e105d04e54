"""Faults of a running training: killed, stopped, out of disk, damaged files, clocks, memory."""

import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from test_training import run_lines, same, same_runs, tiny  # noqa: F401

from diffusion.weights import checkpoint

# --- killed ----------------------------------------------------------------------------------------

KINDS = ("step", "checkpoint", "cache", "sampling", "SIGTERM", "SIGINT twice")


@pytest.fixture(scope="module")
def server():
    """Starts processes that have imported everything: a hundred milliseconds each."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["training_child"])
    return made


def started(server, options: dict, output: Path, place: str | None = None, n: int = 0):
    from training_child import run

    process = server.Process(target=run, args=(options, str(output), place, n))
    process.start()
    return process


def ended(process, seconds: float = 120) -> int:
    process.join(seconds)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def last_step(folder: Path) -> int:
    lines = checkpoint.read_lines(folder / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def kill(server, options: dict, output: Path, kind: str, rng: random.Random) -> bool:
    """One fault at a random moment; False if the run was done before it."""
    folder, cache_dir = Path(options["save_folder"]), Path(options["cache_dir"])
    most = {"checkpoint": 24, "cache": 118, "latents": 30, "sampling": 8}
    if kind in most:
        if kind in ("cache", "latents"):
            shutil.rmtree(cache_dir, ignore_errors=True)
        process = started(server, options, output, kind, rng.randint(1, most[kind]))
        return ended(process) == -signal.SIGKILL
    aim, process = last_step(folder) + rng.randint(1, 6), started(server, options, output)
    while last_step(folder) < aim and process.is_alive():
        time.sleep(0.002)
    time.sleep(rng.random() * 0.03)
    for number in {"step": [signal.SIGKILL], "SIGTERM": [signal.SIGTERM],
                   "SIGINT twice": [signal.SIGINT, signal.SIGINT]}[kind]:  # fmt: skip
        if process.is_alive():
            os.kill(process.pid, number)
            time.sleep(rng.random() * 0.01)
    code = ended(process)
    assert code in {"step": (-9, 0), "SIGTERM": (0, -15), "SIGINT twice": (0, 130, -2, 1)}[kind], (
        code, output.read_text()[-2000:])  # fmt: skip
    return checkpoint.newest(folder, print) is None or not finished(folder, options)


def finished(folder: Path, options: dict) -> bool:
    state = checkpoint.newest(folder, print)
    return state is not None and state["step"] >= options["train_steps"]


def check_whole(folder: Path) -> None:
    """What a reader finds between two attempts: whole files only."""
    for name in ("model.pt", "ema.safetensors", "best.safetensors"):
        if (folder / name).exists():
            checkpoint.load_weights(folder / name)


def one_run(server, options: dict, folder: Path, faults_to_come: list[str], seed: int) -> Counter:
    """A run with these faults one after the other, and then to its end."""
    options, rng = options | {"save_folder": str(folder)}, random.Random(seed)
    output, seen = folder.with_suffix(".log"), Counter()
    for kind in faults_to_come:
        seen[kind] += kill(server, options, output, kind, rng)
        check_whole(folder)
        if finished(folder, options):
            break
    assert ended(started(server, options, output)) == 0, output.read_text()[-3000:]
    assert "Traceback" not in output.read_text()
    return seen


@pytest.fixture
def quick_path(tmp_path):
    """A folder in memory where there is one: runs sync their files, and disks take their time."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def whole(server, tiny, quick_path):  # noqa: F811
    """(options, folder of the run that nothing happened to)."""
    options = tiny | dict(train_steps=40, save_folder=str(quick_path / "whole"), log_every=1,
                          cache_dir=str(quick_path / "cache"), dim_mults=(1,), heads=1,
                          num_samples=2, sample_steps=3)  # fmt: skip
    assert ended(started(server, options, quick_path / "whole.log")) == 0
    return options, quick_path / "whole"


def test_each_kind_of_kill_once(server, whole, quick_path):
    """The short version: the same command goes on, to the same bits and the same lines."""
    options, expected = whole
    seed = time.time_ns() % 10**6
    seen = one_run(server, options, quick_path / "run", list(KINDS), seed)
    same_runs(quick_path / "run", expected)
    assert sum(seen.values()) >= len(KINDS) - 1, (seed, seen)


@pytest.mark.slow
def test_fifty_kills(server, whole, quick_path):
    options, expected = whole
    rng, seen, seed = random.Random(), Counter(), time.time_ns() % 10**6
    while sum(seen.values()) < 50:
        seed += 1
        order = rng.sample(KINDS * 2, 2 * len(KINDS))
        seen += one_run(server, options, quick_path / f"run{seed}", order, seed)
        same_runs(quick_path / f"run{seed}", expected)
    print(dict(seen))
    assert min(seen[kind] for kind in KINDS) >= 3, seen
