"""Who belongs to a group of ranks, and whom of them the others wait for.

Through a store that all of them reach, a torch.distributed.Store, which distributed.py hands in.
"""

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from datetime import timedelta

from .. import UserError

SILENT = [0, 0, "start", float("inf")]  # of a rank that has not told anything


def own_name(store, rank: int, size: int, timeout: float) -> str:
    """A name for what this start of the group keeps in the store.

    torchrun keeps its store when it restarts the ranks: where one listens would be read as its
    predecessor left it. Rank 0 thinks of a name, and tells it each rank that has come since.
    """
    if rank > 0:
        key = f"name/{rank}/{store.add(f'came/{rank}', 1)}"
        try:
            store.wait([key], timedelta(seconds=timeout))
        except RuntimeError:
            raise UserError(f"rank 0 has not come within {timeout:.0f} s") from None
        name = store.get(key).decode()
        store.set(f"{name}/{rank}", "knows")
        return name
    name = uuid.uuid4().hex
    missing = set(range(1, size))
    end = time.monotonic() + timeout
    while missing:
        for other in tuple(missing):
            if times := store.add(f"came/{other}", 0):
                store.set(f"name/{other}/{times}", name)
            if store.check([f"{name}/{other}"]):
                missing.remove(other)
        if time.monotonic() > end:
            raise UserError(
                f"rank {min(missing)} has not come within {timeout:.0f} s "
                f"({len(missing)} of {size} ranks are missing)"
            )
        time.sleep(0.02)
    return name


class Watch(threading.Thread):
    """Names the rank that all others wait for, and ends this one, which torchrun then notices.

    Collectives wait in silence, and a time-out of theirs does not know whom it waited for. So each
    rank tells in the store that it lives, how many places it has passed, and since when it does
    nothing; whoever has stood still for `timeout` seconds looks who has passed the fewest places
    and does nothing either, or does not live.
    """

    def __init__(self, store, rank: int, size: int, timeout: float, resumes: bool):
        super().__init__(daemon=True)
        self.store = store
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self.every = min(5.0, timeout / 8)
        self.resumes = resumes
        self.places = 0
        self.place = "start"
        self.since = time.monotonic()
        self.seen: dict[int, tuple[list, float]] = {}  # rank -> what it told, when that was new
        self.stopped = threading.Event()
        self.spoken = time.monotonic()
        threading.Thread(target=self.talk, daemon=True).start()
        self.start()

    def stop(self) -> None:
        self.stopped.set()
        self.join(2 * self.every)

    def run(self) -> None:
        while not self.stopped.wait(self.every):
            now = time.monotonic()
            if (waited := now - self.since) <= self.timeout:
                continue
            if now - self.spoken > self.timeout / 2:
                self.end(
                    f"has waited {waited:.0f} s at {self.place}, and cannot reach the others: "
                    f"{os.environ['MASTER_ADDR']} does not answer"
                )
            if (told := self.verdict(waited)) is not None:
                self.end(told)

    def talk(self) -> None:
        """In a thread of its own: where a network is cut, the store's calls do not come back."""
        beat = 0
        while not self.stopped.wait(self.every):
            beat += 1
            with contextlib.suppress(RuntimeError):
                idle = time.monotonic() - self.since
                told = [beat, self.places, self.place, idle]
                self.store.set(f"alive/{self.rank}", json.dumps(told))
                if idle > self.timeout / 2:
                    self.look()
                self.spoken = time.monotonic()

    def look(self) -> None:
        for other in range(self.size):
            key = f"alive/{other}"
            now = time.monotonic()
            told = json.loads(self.store.get(key)) if self.store.check([key]) else SILENT
            if other not in self.seen or self.seen[other][0] != told:
                self.seen[other] = told, now

    def verdict(self, waited: float) -> str | None:
        """Whom all wait for; None where it works, or another rank will tell."""
        now = time.monotonic()
        told = {r: t for r, (t, _) in self.seen.items()}
        silent = [r for r, (_, when) in self.seen.items() if now - when > self.timeout / 3]
        fewest = min(t[1] for t in told.values())
        missing = silent or [r for r, t in told.items() if t[1] == fewest]
        if not silent and any(told[r][3] < self.timeout for r in missing if r != self.rank):
            return None
        if self.rank != min(r for r in told if r not in missing or len(missing) == len(told)):
            # one voice is enough, but nobody stays behind if it fails
            return None if waited < 1.25 * self.timeout else "ended with the others"
        names = ", ".join(f"rank {r} (last at {told[r][2]})" for r in missing[:8])
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        how = "gives no sign of life" if silent else "does not go on"
        return f"has waited {waited:.0f} s at {self.place}: {names}{more} {how}"

    def end(self, told: str) -> None:
        then = "; the run ends, and goes on from its last checkpoint when started again "
        hint = f"{then}(--rank_timeout says how long ranks wait)" if self.resumes else ""
        print(f"error: rank {self.rank} {told}{hint}", file=sys.stderr, flush=True)
        os._exit(1)
