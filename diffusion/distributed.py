"""Data parallelism with torch.distributed: the only file that imports it.

Everything here works in a process that was not launched by torchrun, and costs nothing there:
rank 0 of a world of 1.
"""

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from . import UserError
from .memory import keep_freed_memory

TIMEOUT = 3600.0  # seconds: rank 0 may build a cache or write pictures while the others wait
_watch: "Watch | None" = None


def setup(device: str = "auto", timeout: float = TIMEOUT) -> torch.device:
    """Join the process group if torchrun started us; return this process's device.

    timeout: seconds that ranks wait for one; then `Watch` names it, and all end.
    """
    global _watch
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: there is no Apple GPU here; use auto or cpu")
    if device == "cuda":
        index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if index >= count:
            raise UserError(
                f"rank {index} of this machine wants a GPU of its own and there are {count}; start "
                f"at most {count} ranks, or use --device cpu"
            )
        torch.cuda.set_device(index)
        device = f"cuda:{index}"
    launched = "RANK" in os.environ and "MASTER_ADDR" in os.environ  # by torchrun
    if launched and not dist.is_initialized():
        # gloo beside nccl: small host-side questions must not wait for the device
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        patience = timedelta(seconds=1.5 * timeout + 10)
        store, rank, size = next(dist.rendezvous("env://", timeout=patience))
        dist.init_process_group(backend, store=own_store(store, rank, size, timeout), rank=rank,
                                world_size=size, timeout=patience)  # fmt: skip
        if world_size() > 1:
            _watch = Watch(timeout)
    if device == "cpu":
        keep_freed_memory()
    return torch.device(device)


def own_store(store: dist.Store, rank: int, size: int, timeout: float) -> dist.Store:
    """The part of the store that belongs to this start of the group.

    torchrun keeps its store when it restarts the ranks: where one listens would be read as its
    predecessor left it. Rank 0 thinks of a name, and tells it each rank that has come since.
    """
    if rank > 0:
        name = store.get(f"name/{rank}/{store.add(f'came/{rank}', 1)}").decode()
        store.set(f"{name}/{rank}", "knows")
        return dist.PrefixStore(name, store)
    name, missing, end = uuid.uuid4().hex, set(range(1, size)), time.monotonic() + timeout
    while missing:
        for other in tuple(missing):
            if times := store.add(f"came/{other}", 0):
                store.set(f"name/{other}/{times}", name)
            if store.check([f"{name}/{other}"]):
                missing.remove(other)
        if time.monotonic() > end:
            raise UserError(f"rank {min(missing)} has not come within {timeout:.0f} s "
                            f"({len(missing)} of {size} ranks are missing)")  # fmt: skip
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def cleanup() -> None:
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def log(message: str = "") -> None:
    """Print above a progress bar; silent off rank 0."""
    if is_main():
        from tqdm import tqdm

        tqdm.write(message)


def progress(iterable=None, **options):
    """A tqdm bar on rank 0; where it is not seen on a terminal, a line every ten seconds."""
    from tqdm import tqdm

    seen = sys.stderr.isatty()
    options = (
        dict(disable=not is_main(), mininterval=0.2 if seen else 10, dynamic_ncols=seen) | options
    )
    return tqdm(iterable, **options)


def barrier() -> None:
    if dist.is_initialized():
        at()
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """True on every rank if the flag is set on one. Asked on the CPU: the device goes on."""
    if not dist.is_initialized():
        return flag
    at()
    count = torch.tensor(int(flag))
    dist.all_reduce(count)
    return bool(count)


def agreed(value: int) -> bool:
    """Whether all ranks have the same value."""
    if not dist.is_initialized():
        return True
    at()
    ends = torch.tensor([value, -value])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return int(ends[0]) == -int(ends[1])


def asks(step: int) -> bool:
    """Whether ranks ask each other after this step if one is to stop: the question takes longer the
    more there are, so that many ask less often."""
    return step % max(1, world_size() // 16) == 0


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place; x itself where there is one rank."""
    if dist.is_initialized():
        at()
        dist.all_reduce(x)
    return x


def gather(x: torch.Tensor) -> list[torch.Tensor] | None:
    """Each rank's CPU tensor, in rank order, on rank 0; None elsewhere. Shapes may differ."""
    return gather_object(x.cpu())


def gather_object(value) -> list | None:
    """Each rank's value, of any small picklable kind, in rank order on rank 0; None elsewhere."""
    if not dist.is_initialized():
        return [value]
    at()
    out = [None] * world_size() if is_main() else None
    dist.gather_object(value, out, dst=0)
    return out


# --- a rank that does not come --------------------------------------------------------------------


def at(place: str | None = None) -> None:
    """Where this rank is now, for people; None: one place further, of the same name."""
    if _watch is not None:
        _watch.places, _watch.since = _watch.places + 1, time.monotonic()
        _watch.place = _watch.place if place is None else place


def lost(error: RuntimeError) -> str | None:
    """What to tell if the error is that ranks could not talk to each other; else None."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL",
             "Broken pipe", "gloo")  # fmt: skip
    if world_size() == 1 or not any(sign in text for sign in signs):
        return None
    return f"rank {rank()} lost the others ({text.splitlines()[0][-160:]})"


class Watch(threading.Thread):
    """Names the rank that all others wait for, and ends this one, which torchrun then notices.

    Collectives wait in silence, and a time-out of theirs does not know whom it waited for. So each
    rank tells in the store that it lives, and how many places it has passed; whoever has stood
    still for `timeout` seconds looks who has passed the fewest, or does not live.
    """

    def __init__(self, timeout: float):
        super().__init__(daemon=True)
        self.timeout, self.every = timeout, min(5.0, timeout / 8)
        self.places, self.place, self.since = 0, "start", time.monotonic()
        self.seen: dict[int, tuple[list, float]] = {}  # rank -> what it told, when that was new
        self.stopped = threading.Event()
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.key = f"alive/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{restart}/"
        # a connection of its own: the process group's may be waiting for an answer
        self.store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
            timeout=timedelta(seconds=max(5.0, timeout / 4)), wait_for_workers=False,
        )  # fmt: skip
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
                self.end(f"has waited {waited:.0f} s at {self.place}, and cannot reach the others: "
                         f"{os.environ['MASTER_ADDR']} does not answer")  # fmt: skip
            if (told := self.verdict(waited)) is not None:
                self.end(told)

    def talk(self) -> None:
        """In a thread of its own: where a network is cut, the store's calls do not come back."""
        beat = 0
        while not self.stopped.wait(self.every):
            beat += 1
            with contextlib.suppress(RuntimeError):
                self.store.set(f"{self.key}{rank()}", json.dumps([beat, self.places, self.place]))
                if time.monotonic() - self.since > self.timeout / 2:
                    self.look()
                self.spoken = time.monotonic()

    def look(self) -> None:
        for other in range(world_size()):
            key, now = f"{self.key}{other}", time.monotonic()
            told = json.loads(self.store.get(key)) if self.store.check([key]) else [0, 0, "start"]
            if other not in self.seen or self.seen[other][0] != told:
                self.seen[other] = told, now

    def verdict(self, waited: float) -> str | None:
        """Whom all wait for; None where another rank will tell."""
        now, told = time.monotonic(), {r: t for r, (t, _) in self.seen.items()}
        silent = [r for r, (_, when) in self.seen.items() if now - when > self.timeout / 3]
        fewest = min(t[1] for t in told.values())
        missing = silent or [r for r, t in told.items() if t[1] == fewest]
        if rank() != min(r for r in told if r not in missing or len(missing) == len(told)):
            # one voice is enough, but nobody stays behind if it fails
            return None if waited < 1.25 * self.timeout else "ended with the others"
        names = ", ".join(f"rank {r} (last at {told[r][2]})" for r in missing[:8])
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        how = "gives no sign of life" if silent else "does not go on"
        return f"has waited {waited:.0f} s at {self.place}: {names}{more} {how}"

    def end(self, told: str) -> None:
        print(f"error: rank {rank()} {told}; the run ends, and goes on from its last checkpoint "
              "when started again (--rank_timeout says how long ranks wait)",
              file=sys.stderr, flush=True)  # fmt: skip
        os._exit(1)


def wrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model as the training step calls it: gradients averaged over ranks in backward."""
    if not dist.is_initialized():
        return model
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def no_sync(model: torch.nn.Module, skip: bool):
    """Inside it backward only accumulates, where `skip` says that more micro-batches follow."""
    if skip and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()
