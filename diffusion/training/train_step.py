"""What a training step computes on the device: forward, backward, the update of weights and EMA.

It reads nothing back and has no branch on values, so that it may run as one CUDA graph: a small
network's step is hundreds of short kernels, and Python launches them more slowly than they run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import UserError
from ..config import Config
from ..models.cuda import works
from ..runtime import distributed as dist
from ..runtime.cuda_graph import StepGraph
from .ema import EMA
from .optimizer import AdamW
from .steps import StepStats, clip_factor


def not_captured(config: Config, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Say why a run's steps are not CUDA graphs; None if they are.

    Raises UserError where --cuda_graph on cannot be.
    """
    reason = None
    if config.cuda_graph == "off":
        reason = "--cuda_graph off"
    elif device.type != "cuda":
        reason = f"they need a CUDA device, and this is {device.type}"
    elif dist.world_size() > 1:
        reason = "several ranks add up their gradients, outside of a graph"
    elif dtype == torch.float16:
        reason = "float16 needs a scaled loss; bf16 and float32 do not"
    elif config.checkpointing or config.consistency:
        reason = "--checkpointing and --consistency bring random numbers back, to use them twice"
    if config.cuda_graph == "on" and reason is not None:
        raise UserError(f"--cuda_graph on: {reason}")
    return reason


@dataclass(eq=False)
class TrainStep:
    """Run one optimizer step. network: the model, in DistributedDataParallel where there are ranks.

    graph: whether it is captured, from the fourth step on.
    """

    recipe: object
    network: nn.Module
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    ema: EMA
    stats: StepStats
    dtype: torch.dtype | None
    graph: bool = False

    def __post_init__(self):
        self.captured = StepGraph(self.run_tensors) if self.graph else None
        self.one_pass = None
        weights = self.optimizer.parameters
        kernels = weights[0].is_cuda and works(weights[0].device)
        simple = not self.scaler.is_enabled() and {p.dtype for p in weights} == {torch.float32}
        if kernels and simple and type(self.optimizer) is AdamW:
            from .triton_update import Update

            self.one_pass = Update(self.optimizer, self.ema)

    def __call__(self, parts: Sequence) -> None:
        """Step on the `inputs` of each micro-batch."""
        if self.captured is None:
            self.run(parts)
            return
        self.like = parts[0]
        self.captured(*(tensor for part in parts for tensor in part.tensors()))

    def run_tensors(self, *tensors: Tensor) -> None:
        n = len(self.like.tensors())
        self.run([self.like.refilled(tensors[i : i + n]) for i in range(0, len(tensors), n)])

    def run(self, parts: Sequence) -> None:
        """Step, and count what happened in stats."""
        self.backward(parts)
        self.update()

    def backward(self, parts: Sequence) -> None:
        """Leave each parameter its gradient of the mean loss of the parts."""
        device = self.recipe.device.type
        for p in self.optimizer.parameters:
            p.grad = None  # what a capture without enough memory left
        for i, inputs in enumerate(parts):
            with dist.no_sync(self.network, i + 1 < len(parts)):
                with torch.autocast(device, self.dtype, enabled=self.dtype is not None):
                    loss = self.recipe.loss(self.network, inputs).mean() / len(parts)
                self.scaler.scale(loss).backward()
            self.stats.add_loss(loss)

    def update(self) -> None:
        """Clip the gradients, step the optimizer and the averages, and forget the gradients.

        A non-finite gradient is the same on all ranks, and changes nothing.
        """
        gradients = self.optimizer.take_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(gradients)
        ok = torch.isfinite(norm)
        limit = self.recipe.config.grad_clip or math.inf
        if self.one_pass is not None and len(gradients) == len(self.optimizer.parameters):
            self.one_pass(gradients, ok, clip_factor(norm, limit))
        else:
            if limit < math.inf:
                torch._foreach_mul_(gradients, clip_factor(norm, limit))
            self.optimizer.found_inf = (~ok).float()  # read by the fused kernel, on the device
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.ema.update(ok)
        for track in self.ema.tracks:  # also where nothing changed: the profile is of all steps
            track.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.stats.add_step(norm, ok)
