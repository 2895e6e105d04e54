"""Data parallelism with torch.distributed: the only file that imports it.

Everything here works in a process that was not launched by torchrun, and costs nothing there:
rank 0 of a world of 1.
"""

import contextlib
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .. import UserError
from . import watchdog as ranks
from .memory import keep_freed_memory

TIMEOUT = 3600.0  # seconds
_watch: ranks.Watch | None = None


def setup(device: str = "auto", timeout: float | None = None) -> torch.device:
    """Join the process group if torchrun started us; return this process's device.

    timeout: seconds that ranks wait for one that does nothing; then `ranks.Watch` names it, and
    all end. None: TIMEOUT, and nothing that a restart would continue.
    """
    global _watch
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: there is no Apple GPU here; use auto or cpu")
    if device == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0))
        count = torch.cuda.device_count()
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
        seconds = TIMEOUT if timeout is None else timeout
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
        except RuntimeError as error:
            raise UserError(
                f"rank {os.environ['RANK']} could not reach rank 0 at "
                f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')} within "
                f"{seconds:.0f} s: {str(error).splitlines()[0]}"
            ) from None
        name = ranks.own_name(store, rank, size, seconds)
        # `Watch` knows better than a time-out of collectives whether a rank works or hangs
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(name, store),
            rank=rank,
            world_size=size,
            timeout=timedelta(days=7),
        )
        if world_size() > 1:
            # a connection of its own: the process group's may be waiting for an answer
            own = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=max(5.0, seconds / 4)),
                wait_for_workers=False,
            )
            own = dist.PrefixStore(name, own)
            _watch = ranks.Watch(own, rank, size, seconds, resumes=timeout is not None)
    if device == "cpu":
        keep_freed_memory()
    return torch.device(device)


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
    """A tqdm bar on rank 0; where it is not seen on a terminal, a line every ten seconds.

    On every rank it tells that work goes on, which others may wait for.
    """
    from tqdm import tqdm

    class Bar(tqdm):
        def __iter__(self):
            for x in super().__iter__():
                going()
                yield x

        def update(self, n=1):
            going()
            return super().update(n)

    seen = sys.stderr.isatty()
    options = (
        dict(disable=not is_main(), mininterval=0.2 if seen else 10, dynamic_ncols=seen) | options
    )
    return Bar(iterable, **options)


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
    return step % max(1, world_size() // 64) == 0


def restarted() -> bool:
    """Whether torchrun or Slurm has started this command again, after a fault."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any_rank(any(os.environ.get(name, "0") != "0" for name in counts))


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


def from_main(value):
    """Rank 0's value, of any small picklable kind, on every rank."""
    if not dist.is_initialized():
        return value
    at()
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


# --- a rank that does not come --------------------------------------------------------------------


def at(place: str | None = None) -> None:
    """Where this rank is now, for people; None: one place further, of the same name."""
    if _watch is not None:
        _watch.places = _watch.places + 1
        _watch.since = time.monotonic()
        _watch.place = _watch.place if place is None else place


def going() -> None:
    """This rank works, for however long it passes no place."""
    if _watch is not None:
        _watch.since = time.monotonic()


def lost(error: RuntimeError) -> str | None:
    """What to tell if the error is that ranks could not talk to each other; else None."""
    text = str(error)
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Timed out waiting",
        "NCCL",
        "Broken pipe",
        "gloo",
    )
    if world_size() == 1 or not any(sign in text for sign in signs):
        return None
    return f"rank {rank()} lost the others ({text.splitlines()[0][-160:]})"


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
