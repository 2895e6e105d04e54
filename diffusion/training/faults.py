"""What ends a run from outside, told in one line: what happened, what is kept, what helps."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from .. import UserError
from ..config import Config
from ..runtime import distributed as dist


@contextlib.contextmanager
def told(config: Config, micro: int, step: Callable[[], int]) -> Iterator[None]:
    """Turn a full disk, a folder that has gone, too little memory and lost ranks into UserErrors.

    micro: samples of a micro-batch. step: where the run is.
    """
    folder = Path(config.save_folder)
    same = "the same command without --overwrite" if config.overwrite else "the same command"
    kept = f"what {folder} holds is kept, and {same} goes on from its last checkpoint"
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not folder.is_dir():
            raise UserError(
                f"{folder} was removed or renamed while the run in it was at step "
                f"{step()}: nothing more can be saved there"
            ) from None
        raise UserError(f"step {step()}: {error}; {kept}") from None
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise UserError(
                f"out of memory at step {step()} with a micro-batch of {micro}: "
                f"{less_memory(config, micro)}; {kept}"
            ) from None
        if (lost := dist.lost(error)) is not None:
            raise UserError(
                f"step {step()}: {lost}; {kept} (torchrun --max_restarts=N does so by itself)"
            ) from None
        raise


def out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the machine."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def less_memory(config: Config, micro: int) -> str:
    """The options that help, those that cost nothing first."""
    ways = []
    if config.amp == "no":
        ways.append("--amp auto halves the activations")
    if micro > 1:
        times = next(n for n in range(2, micro + 1) if micro % n == 0)
        ways.append(
            f"--grad_accum {times * config.grad_accum} makes micro-batches of "
            f"{micro // times} and changes nothing else"
        )
    if not config.checkpointing:
        ways.append("--checkpointing recomputes activations, a third slower")
    if not ways:
        ways.append("a smaller --unet_dim or --image_size is needed")
    return "; ".join(ways)
