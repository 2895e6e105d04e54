"""Data parallelism with torch.distributed: the only file that imports it.

Everything here works in a process that was not launched by torchrun, and costs nothing there:
rank 0 of a world of 1. A rank that dies or hangs ends the others: a collective inside a step fails
after the timeout of `setup`, and `barrier` names the ranks that it waits for.
"""

import contextlib
import os
import re
import sys
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .. import UserError, printable
from .malloc import keep_freed_memory
from .threads import use_free_cores

TIMEOUT = 3600.0  # seconds
LONG_WORK = 24 * 3600.0  # seconds; one rank may decode or download while the others wait
COMMUNICATION_ERRORS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "NCCL",
    "Broken pipe",
    "gloo",
)
_barriers: dict[str, tuple] = {}  # "milestone", "long work": (gloo group, its timeout in seconds)


def find_device(device: str = "auto") -> torch.device:
    """Find this process's device. Raises UserError for one that is not there."""
    mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "mps" and not mps:
        raise UserError("--device mps: there is no Apple GPU here; use auto or cpu")
    if device == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0))
        count = torch.cuda.device_count()
        if count == 0:
            raise UserError("--device cuda: there is no CUDA GPU here; use auto or cpu")
        if index >= count:
            raise UserError(
                f"rank {index} of this machine needs a GPU of its own and there are {count}; "
                f"start at most {count} ranks, or use --device cpu"
            )
        return torch.device("cuda", index)
    return torch.device(device)


def setup(name: str = "auto", timeout: float = TIMEOUT) -> torch.device:
    """Join the process group if torchrun started us; return this process's device.

    timeout: seconds that a collective, and a barrier at a milestone, wait for the other ranks.
    Raises UserError for a device that is not there, and if not all ranks come.
    """
    device = find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    launched = "RANK" in os.environ and "MASTER_ADDR" in os.environ  # by torchrun
    if launched and not dist.is_initialized():
        _join(device.type == "cuda", timeout)
    return prepare(device)


def prepare(device: torch.device) -> torch.device:
    """Set up memory and threads where a CPU computes; return the device."""
    if device.type == "cpu":
        keep_freed_memory()
        before = torch.get_num_threads()
        if "RANK" not in os.environ and (changed := use_free_cores()):
            if torch.get_num_threads() != before:  # not at the calls after the first
                log(changed)
    return device


def _join(cuda: bool, timeout: float) -> None:
    """Form the process group, with gloo beside nccl for what is asked on the host."""
    limit = timedelta(seconds=timeout)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    except RuntimeError as error:
        raise UserError(
            f"rank {os.environ['RANK']} could not reach rank 0 at {os.environ['MASTER_ADDR']}:"
            f"{os.environ.get('MASTER_PORT')} within {timeout:.0f} s: {str(error).splitlines()[0]}"
        ) from None
    store = dist.PrefixStore(agree_on_name(store, rank, size, timeout), store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    for name, seconds in (("milestone", timeout), ("long work", LONG_WORK)):
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
        _barriers[name] = group, seconds


def agree_on_name(store, rank: int, size: int, timeout: float) -> str:
    """Agree on a name for this start of the group, under which it keeps its keys in the store.

    torchrun keeps its store when it restarts the ranks, which would read the addresses of their
    predecessors. Rank 0 chooses a new name and repeats it to every rank until that has confirmed
    it. Raises UserError that names a rank that does not come.
    """
    if rank > 0:
        key = f"name/{rank}/{store.add(f'arrivals/{rank}', 1)}"
        try:
            store.wait([key], timedelta(seconds=timeout))
        except RuntimeError:
            raise UserError(f"rank 0 has not come within {timeout:.0f} s") from None
        name = store.get(key).decode()
        store.set(f"{name}/{rank}", "confirmed")
        return name
    name = uuid.uuid4().hex
    missing = set(range(1, size))
    end = time.monotonic() + timeout
    while missing:
        for other in tuple(missing):
            if arrivals := store.add(f"arrivals/{other}", 0):
                store.set(f"name/{other}/{arrivals}", name)
            if store.check([f"{name}/{other}"]):
                missing.remove(other)
        if time.monotonic() > end:
            raise UserError(
                f"rank {min(missing)} has not come within {timeout:.0f} s "
                f"({len(missing)} of {size} ranks are missing)"
            )
        time.sleep(0.02)
    return name


def cleanup() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
        _barriers.clear()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def is_restart() -> bool:
    """Check whether torchrun or Slurm has started this command again, after a fault."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any_rank(any(os.environ.get(name, "0") != "0" for name in counts))


def log(message: str = "") -> None:
    """Print above a progress bar; silent off rank 0."""
    if is_main():
        from tqdm import tqdm

        tqdm.write(printable(message))


LINE = "{desc} {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Lines:
    """Write to stderr what a bar writes over itself, a line each."""

    def write(self, text: str) -> None:
        if text := text.replace("\x1b[A", "").strip():  # which moves up, of a bar below another
            sys.stderr.write(f"{text}\n")


def progress(iterable=None, **options):
    """Show a tqdm bar on rank 0; where it is not on a terminal, a line every ten seconds."""
    from tqdm import tqdm

    defaults = dict(disable=not is_main(), dynamic_ncols=True, mininterval=0.2)
    if not sys.stderr.isatty():
        defaults |= dict(file=Lines(), dynamic_ncols=False, mininterval=10, bar_format=LINE)
    options |= {"desc": printable(options.get("desc") or "")}
    return tqdm(iterable, **defaults | options)


# --- questions between ranks, asked on the CPU: the device keeps working --------------------------


def barrier(milestone: str | None = None) -> None:
    """Wait until all ranks have come here. Raises UserError that names those that do not.

    milestone: what the ranks of a loop have just done: they wait for the timeout of `setup`.
    None: they wait for a day, since one of them may decode or download for hours.
    """
    if not dist.is_initialized():
        return
    group, seconds = _barriers["long work" if milestone is None else "milestone"]
    try:
        dist.monitored_barrier(group, timedelta(seconds=seconds), wait_all_ranks=True)
    except RuntimeError as error:
        found = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
        missing = f"rank {found[1].strip()}" if found else "rank 0, which names who is missing,"
        raise UserError(
            f"rank {rank()} has finished {milestone or 'its part'}: {missing} did not answer "
            f"within {seconds:.0f} s, or died"
        ) from None


def any_rank(flag: bool) -> bool:
    """Return True on every rank if the flag is set on one."""
    if not dist.is_initialized():
        return flag
    count = torch.tensor(int(flag))
    dist.all_reduce(count)
    return bool(count)


def should_poll_stop(step: int) -> bool:
    """Check whether ranks ask each other after this step if one is to stop.

    The question takes longer the more ranks there are, so that many ranks ask less often.
    """
    return step % max(1, world_size() // 64) == 0


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum x over ranks, in place; x itself where there is one rank."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather_object(value) -> list | None:
    """Gather each rank's small picklable value on rank 0, in rank order; None elsewhere."""
    if not dist.is_initialized():
        return [value]
    out = [None] * world_size() if is_main() else None
    dist.gather_object(value, out, dst=0)
    return out


def from_main(value):
    """Return rank 0's small picklable value on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def describe_comm_error(error: RuntimeError) -> str | None:
    """Describe an error as lost contact between ranks; None if it is another one."""
    text = str(error)
    if world_size() == 1 or not any(sign in text for sign in COMMUNICATION_ERRORS):
        return None
    return f"rank {rank()} lost another rank, which died or hangs ({text.splitlines()[0][-160:]})"


# --- gradients ------------------------------------------------------------------------------------


def wrap(model: torch.nn.Module) -> torch.nn.Module:
    """Wrap a model so that its gradients are averaged over ranks in backward.

    A compiled one is cut where a bucket of 25 MB of gradients is complete, so that these are sent
    during backward; not with checkpointing, whose graphs torch 2.6 cannot cut.
    """
    if world_size() == 1:
        return model
    if any(getattr(module, "checkpointing", False) for module in model.modules()):
        torch._dynamo.config.optimize_ddp = False
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def no_sync(model: torch.nn.Module, skip: bool):
    """Return a context in which backward only accumulates, if `skip`: more micro-batches follow."""
    if skip and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()
