"""Choose how many threads compute on a CPU: as many as there are free cores.

A layer's work is cut into equal parts, one for each thread, and ends with the slowest: beside a
process that keeps one of two cores busy, two threads take more than twice as long as one. Torch's
own number is the most; where it counts cores and Linux two threads of each, a half-busy machine
looks free.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

ASKED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # a user's own choice
BUSY = 0.4  # a thread on a core of which others use more than this makes the rest wait for it
QUOTAS = (  # where Linux says how much of the cores a container may use: microseconds, of a period
    ("cpu.max",),
    ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"),
)
USUAL = torch.get_num_threads()
_set = [USUAL]  # the numbers that were set here; another one is a caller's choice


def is_asked() -> bool:
    """Tell whether the user, a caller or torchrun has set the number of threads."""
    named = any(name in os.environ for name in (*ASKED, "RANK"))
    return named or torch.get_num_threads() != _set[-1]


def use(threads: int) -> None:
    """Compute on this many threads from here on."""
    torch.set_num_threads(threads)
    _set.append(threads)


@contextmanager
def kept() -> Iterator[None]:
    """Restore, at the end, the number of threads that there was."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            use(before)


@cache
def use_free_cores() -> str | None:
    """Compute on as many threads as there are free cores, at most torch's own number.

    Looks once in a process, for a fifth of a second, and if a core is busy then for another second.
    Returns what to tell the user, None where nothing changed.
    """
    if is_asked() or USUAL == 1:
        return None
    for seconds in (0.2, 1.0):  # a moment's load says little of a long run
        free = free_cores(seconds)
        if free is None or int(free + BUSY) >= USUAL:
            return None
    threads = max(1, int(free + BUSY))
    use(threads)
    return (
        f"computing on {threads} of {USUAL} threads, since other programs keep cores busy "
        f"({free:.1f} are free); OMP_NUM_THREADS={USUAL} takes them all"
    )


def use_threads_of(saved: int | None) -> str | None:
    """Compute on as many threads as a run has so far, since others round its sums differently.

    saved: that number, None if unknown. Returns what to tell the user, None if there is nothing.
    """
    wanted = USUAL if saved is None else saved
    now = torch.get_num_threads()
    if wanted == now:
        return None
    if is_asked() or wanted > USUAL:
        return f"threads: {now} from here on, {wanted} so far; sums are rounded differently"
    use(wanted)
    return f"computing on {wanted} of {USUAL} threads, as the run has so far"


def free_cores(seconds: float) -> float | None:
    """Measure for so long how many of the cores that this process may use are idle, in cores.

    None where the system does not tell (all but Linux, and containers with numbers of their own).
    """
    try:
        mine = os.sched_getaffinity(0)
        before = ticks(Path("/proc/stat").read_text())
        time.sleep(seconds)
        after = ticks(Path("/proc/stat").read_text())
    except (AttributeError, OSError, ValueError):
        return None
    idle = idle_cores(before, after, mine)
    return None if idle is None else min(idle, quota(Path("/sys/fs/cgroup")))


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


def idle_cores(before: dict, after: dict, cores: set[int]) -> float | None:
    """Sum the idle share of cores between two readings of `ticks`; None if one is not in them."""
    if not cores <= before.keys() & after.keys():
        return None
    free = 0.0
    for core in cores:
        idle, total = (late - early for late, early in zip(after[core], before[core]))
        free += min(1.0, max(0.0, idle / total)) if total > 0 else 1.0
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
