"""The speed of the training loop, its stop, what it announces, and when it measures FID."""

import signal
import threading
import time

from torch import nn

from ..evaluation.fid import Fid
from ..runtime import distributed as dist
from ..runtime.precision import describe
from .run_folder import RunLog, logged
from .steps import BatchSplit, count_parameters
from .train_state import TrainState


class Clock:
    """Measure steps a second of training proper: saving and sampling do not count."""

    def __init__(self, step: int):
        self.skip(step)

    def skip(self, step: int) -> None:
        """Start measuring again."""
        self.step = step
        self.time = time.perf_counter()

    def rate(self, step: int) -> float:
        """Give the steps a second since the last call."""
        rate = (step - self.step) / (time.perf_counter() - self.time)
        self.skip(step)
        return rate


class StopSignal:
    """Stop after the step at SIGINT or SIGTERM; at a second SIGINT at once."""

    def __init__(self):
        self.requested = False
        self.alone = dist.world_size() == 1
        main = threading.current_thread() is threading.main_thread()  # others get no signals
        both = (signal.SIGINT, signal.SIGTERM) if main else ()
        self.old = {s: signal.signal(s, self.ask) for s in both}

    def ask(self, number, _frame) -> None:
        # torchrun passes on a Ctrl-C that its children have already got: not a second one
        if self.requested and number == signal.SIGINT and self.alone:
            raise KeyboardInterrupt
        self.requested = True
        dist.log("stopping after this step ...")

    def restore(self) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


def announce(
    recipe,
    model: nn.Module,
    split: BatchSplit,
    total: int,
    eager: str | None,
) -> None:
    """Print what is about to be trained. eager: why steps are no CUDA graphs, None if they are."""
    parameters, trained = count_parameters(model)
    precision = describe(recipe.config.amp, recipe.device)
    dist.log(f"{recipe.config.data}: {recipe.batches.describe()}")
    part = "" if trained == parameters else f" ({trained:,} trained)"
    dist.log(
        f"{parameters / 1e6:.1f} M parameters{part} on {recipe.device}, {precision}; batch "
        f"{recipe.config.batch_size} = {split.ranks} ranks x {split.accum} x {split.micro}; "
        f"{total} steps"
    )
    if recipe.device.type == "cuda":
        dist.log("each step is one CUDA graph" if eager is None else f"no CUDA graphs: {eager}")


def measure_fid(fid: Fid, state: TrainState, total: int, logs: RunLog, stop: StopSignal) -> bool:
    """Measure and log the FID where it is due, unless that has been done; tell whether it was."""
    step = state.step
    if not fid.due(step, total) or dist.any_rank(logged(logs.path, step, fid.name)):
        return False
    pipeline = state.recipe.pipeline(state.ema.model)
    values = fid.measure(pipeline, state.split.micro, lambda: stop.requested)
    if values is not None:
        logs.metrics(step, values)
        copies = f", {values['copies']:.1%} copies" if "copies" in values else ""
        took = f" ({values['fid_seconds']:.0f} s)"
        dist.log(f"step {step}: {fid.name} {values[fid.name]:.4g}{copies}{took}")
    return True
