"""Choose how many threads compute on a CPU: as many as there are free cores.

A layer's work is cut into equal parts, one for each thread, and ends with the slowest: beside a
process that keeps one of two cores busy, two threads take more than twice as long as one.
"""

import os
import time
from functools import cache
from pathlib import Path

import torch

ASKED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # a user's own choice
BUSY = 0.4  # a thread on a core of which others use more than this makes the rest wait for it
QUOTAS = (  # where Linux says how much of the cores a container may use: microseconds, of a period
    ("cpu.max",),
    ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"),
)


def is_asked() -> bool:
    """Tell whether the user, or torchrun, has set the number of threads."""
    return any(name in os.environ for name in ASKED) or "RANK" in os.environ


@cache
def use_free_cores() -> str | None:
    """Compute on as many threads as there are free cores, at most torch's own number.

    Looks once in a process, for a fifth of a second. Returns what to tell the user, None where
    nothing changed.
    """
    usual = torch.get_num_threads()
    free = None if is_asked() or usual == 1 else free_cores()
    threads = usual if free is None else min(usual, max(1, int(free + BUSY)))
    if threads == usual:
        return None
    torch.set_num_threads(threads)
    return (
        f"computing on {threads} of {usual} threads, as {free:.1f} cores are free; "
        f"OMP_NUM_THREADS={usual} uses them all"
    )


def use_threads_of(saved: int | None) -> str | None:
    """Compute on as many threads as a run has so far: other numbers round its sums otherwise.

    saved: that number, None if unknown. Nothing changes where there are fewer cores than that, or
    where the user has chosen. Returns what to tell the user, None where nothing changed.
    """
    if saved is None or is_asked() or saved == torch.get_num_threads() or saved > cores():
        return None
    torch.set_num_threads(saved)
    number = "one thread" if saved == 1 else f"{saved} threads"
    return f"computing on {number}, as the run has so far; OMP_NUM_THREADS sets another number"


def cores() -> int:
    """Count the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def free_cores(seconds: float = 0.2) -> float | None:
    """Measure how many of the cores that this process may use are idle, in cores.

    None where the system does not tell (all but Linux).
    """
    try:
        mine = os.sched_getaffinity(0)
        before = ticks(Path("/proc/stat").read_text())
        time.sleep(seconds)
        after = ticks(Path("/proc/stat").read_text())
    except (AttributeError, OSError):
        return None
    return min(idle_cores(before, after, mine), quota(Path("/sys/fs/cgroup")))


def ticks(stat: str) -> dict[int, tuple[int, int]]:
    """Parse /proc/stat: the ticks that each core was idle, and all of its ticks (proc(5))."""
    found = {}
    for line in stat.splitlines():
        name, *values = line.split()
        if name.startswith("cpu") and name != "cpu":
            counts = [int(value) for value in values[:8]]  # guests' time is in the user's
            idle = counts[3] + counts[4]  # nothing to do, or waiting for a disk
            found[int(name[3:])] = (idle, sum(counts))
    return found


def idle_cores(before: dict, after: dict, cores: set[int]) -> float:
    """Sum the idle share of cores between two readings of `ticks`."""
    free = 0.0
    for core in cores & before.keys() & after.keys():
        idle, total = (late - early for late, early in zip(after[core], before[core]))
        free += idle / total if total > 0 else 1.0
    return free


def quota(root: Path) -> float:
    """Read how many cores' worth of time the container may use; infinite without a limit."""
    for names in QUOTAS:
        try:
            amount, period = " ".join((root / name).read_text() for name in names).split()
            if float(amount) > 0:
                return float(amount) / float(period)
        except (OSError, ValueError):  # not there, or "max"
            continue
    return float("inf")
