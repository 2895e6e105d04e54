"""Faults from outside a run, each as one line: what happened, and that the same command resumes."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from .. import UserError
from ..config import Config
from ..runtime.distributed import describe_comm_error
from ..runtime.machine import explain, is_out_of_memory


@contextlib.contextmanager
def friendly_errors(config: Config, micro: int, step: Callable[[], int]) -> Iterator[None]:
    """Turn full disks, removed folders, too little memory and lost ranks into UserErrors.

    micro: samples of a micro-batch. step: returns the step that the run is at.
    """
    folder = Path(config.save_folder)
    command = "the same command without --overwrite" if config.overwrite else "the same command"
    resume = f"{command} resumes from the last checkpoint in {folder}"
    try:
        yield
    except OSError as error:
        if not folder.is_dir():
            raise UserError(
                f"step {step()}: {folder} was removed or renamed under the run; nothing more can "
                "be saved there"
            ) from None
        raise UserError(f"step {step()}: {error}; {resume}") from None
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            message = (
                f"out of memory with a micro-batch of {micro}; raise --grad_accum, which changes "
                "nothing else, or give --checkpointing or --amp auto"
            )
        else:
            message = describe_comm_error(error) or explain(error)
        if message is None:
            raise
        raise UserError(f"step {step()}: {message}; {resume}") from None
