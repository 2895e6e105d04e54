"""Data parallelism with torch.distributed: the only file that imports it.

Everything here works in a process that was not launched by torchrun, and costs nothing there:
rank 0 of a world of 1.
"""

import contextlib
import ctypes
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from . import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
TIMEOUT = timedelta(hours=1)  # rank 0 may build a cache or write pictures while the others wait


def setup(device: str = "auto") -> torch.device:
    """Join the process group if torchrun started us; return this process's device."""
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
        dist.init_process_group(backend, timeout=TIMEOUT)
    if device == "cpu":
        keep_freed_memory()
    return torch.device(device)


def keep_freed_memory() -> None:
    """Have glibc keep large blocks for the next step instead of giving them back to the system.

    Else each step's tensors are new pages, which the system must clear: a tenth of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def cleanup() -> None:
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
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """True on every rank if the flag is set on one. Asked on the CPU: the device goes on."""
    if not dist.is_initialized():
        return flag
    count = torch.tensor(int(flag))
    dist.all_reduce(count)
    return bool(count)


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place; x itself where there is one rank."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather(x: torch.Tensor) -> list[torch.Tensor] | None:
    """Each rank's CPU tensor, in rank order, on rank 0; None elsewhere. Shapes may differ."""
    return gather_object(x.cpu())


def gather_object(value) -> list | None:
    """Each rank's value, of any small picklable kind, in rank order on rank 0; None elsewhere."""
    if not dist.is_initialized():
        return [value]
    out = [None] * world_size() if is_main() else None
    dist.gather_object(value, out, dst=0)
    return out


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
