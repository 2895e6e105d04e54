"""Clipping, AdamW and the average of the weights in one pass over memory, for CUDA.

One launch serves all weights: it finds them by a table of their addresses.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ema import EMA
from .optimizer import AdamW

BLOCK = 1024  # weights that a program changes


class Update:
    """Do the steps of an AdamW and of an EMA of the same weights, all in float32.

    36 bytes a weight are moved; clipping, AdamW and EMA by themselves move 68, and EMA makes a copy
    of all weights. The optimizer's state is what it would be without, but that the step counts are
    parts of one tensor.
    """

    def __init__(self, optimizer: AdamW, ema: EMA):
        self.optimizer = optimizer
        self.ema = ema
        self.weights = optimizer.param_groups[0]["params"]
        sizes = torch.tensor([w.numel() for w in self.weights])
        blocks = (sizes + BLOCK - 1) // BLOCK
        firsts = blocks.cumsum(0) - blocks
        self.layout = [sizes.tolist(), firsts.tolist()]
        self.device = self.weights[0].device
        self.owners = torch.arange(len(sizes)).repeat_interleave(blocks).to(self.device)
        betas = torch.tensor(optimizer.defaults["betas"], dtype=torch.float64)
        self.betas = betas.view(2, 1).to(self.device)
        self.steps = None
        self.spare: list[Tensor] = []
        self.kept: list[Tensor] = []

    def fits(self, gradients: list[Tensor]) -> bool:
        """Say whether it can be called: all is float32, and of each weight is there all."""
        pairs = zip(self.ema.ema, self.ema.weights)
        mine = [id(p) for p in self.optimizer.parameters]
        return (
            mine == [id(p) for p in self.ema.weights]
            and len(gradients) == len(mine)
            and all(e.stride() == p.stride() for e, p in pairs)
            and all(x.dtype == torch.float32 for x in [*self.weights, *gradients, *self.ema.ema])
        )

    @torch.no_grad()
    def __call__(
        self, gradients: list[Tensor], ok: Tensor, lr: Tensor, clip: Tensor, ema_weight: Tensor
    ) -> None:
        """Change weights, moments, step counts and averages, or nothing where ok is False.

        All are () on the device: ok bool, the others float32. gradients: of `take_gradients`; they
        are multiplied with clip. ema_weight: the part of the new weights in the averages.
        In a CUDA graph the first calls must come before the capture.
        """
        self._open_state()
        self.steps += ok
        settings = self.optimizer.param_groups[0]
        table, aligned = self._table(gradients)
        update_kernel[len(self.owners),](
            table,
            self.owners,
            1 - self.betas**self.steps,
            lr,
            clip,
            ok,
            ema_weight,
            len(gradients),
            *settings["betas"],
            settings["eps"],
            settings["weight_decay"],
            16 if aligned else 4,
            BLOCK,
        )

    def _open_state(self) -> None:
        """Make the optimizer's state, if there is none, and gather the step counts in a tensor."""
        states = [self.optimizer.state[w] for w in self.weights]
        if self.steps is not None and states[0]["step"].data_ptr() == self.steps.data_ptr():
            return
        for weight, state in zip(self.weights, states):
            if not state:
                state["step"] = torch.zeros((), device=self.device)
                state["exp_avg"] = torch.zeros_like(weight)
                state["exp_avg_sq"] = torch.zeros_like(weight)
        self.steps = torch.stack([state["step"].view(()) for state in states])
        for state, step in zip(states, self.steps):
            state["step"] = step

    def _table(self, gradients: list[Tensor]) -> tuple[Tensor, bool]:
        """Copy to the device, without a wait, where all lies; are these multiples of 16 bytes?

        A captured graph copies at every replay, so what it copies from is kept.
        """
        states = [self.optimizer.state[w] for w in self.weights]
        moments = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        tensors = (self.weights, *moments, self.ema.ema, gradients)
        addresses = [[x.data_ptr() for x in row] for row in tensors]
        values = torch.tensor(addresses + self.layout)
        cuda = self.device.type == "cuda"  # else Triton's interpreter
        if cuda and torch.cuda.is_current_stream_capturing():
            source = self.spare.pop()  # nothing may be allocated now; earlier copies have ended
            self.kept.append(source)
        else:
            source = torch.empty_like(values, pin_memory=cuda)
            self.spare = [source]
        source.copy_(values)
        return source.to(self.device, non_blocking=True), not (values[:5] % 16).any()


@triton.jit
def update_kernel(
    table,
    owners,
    corrections,
    lr,
    clip,
    ok,
    ema_weight,
    N,
    beta1: tl.constexpr,
    beta2: tl.constexpr,
    eps: tl.constexpr,
    decay: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update a block of one of N weights.

    table (7, N): addresses of weights, moments, averages and gradients; sizes; first blocks.
    owners: the weight of each block. corrections (2, N): of the moments. The others: see `Update`.
    """
    block = tl.program_id(0)
    owner = tl.load(owners + block)
    row = table + owner
    start = (block - tl.load(row + 6 * N)) * BLOCK
    left = (tl.load(row + 5 * N) - start) * tl.load(ok)
    weights = memory(row, start, ALIGNED)
    firsts = memory(row + N, start, ALIGNED)
    seconds = memory(row + 2 * N, start, ALIGNED)
    averages = memory(row + 3 * N, start, ALIGNED)
    gradients = memory(row + 4 * N, start, ALIGNED)
    rate = tl.load(lr)
    step = (rate / tl.load(corrections + owner)).to(tl.float32)
    root = tl.sqrt_rn(tl.load(corrections + N + owner).to(tl.float32))
    places = tl.arange(0, BLOCK)
    for whole in tl.static_range(2):
        if (left >= BLOCK) == whole:  # without a mask, 16 bytes are read at once
            mask = None if whole else places < left
            gradient = tl.load(gradients + places, mask) * tl.load(clip)
            first = beta1 * tl.load(firsts + places, mask) + (1 - beta1) * gradient
            second = beta2 * tl.load(seconds + places, mask) + (1 - beta2) * gradient * gradient
            weight = tl.load(weights + places, mask)
            weight -= rate * decay * weight
            weight -= tl.div_rn(step * first, tl.div_rn(tl.sqrt_rn(second), root) + eps)
            average = tl.load(averages + places, mask)
            average += tl.load(ema_weight) * (weight - average)
            tl.store(weights + places, weight, mask)
            tl.store(firsts + places, first, mask)
            tl.store(seconds + places, second, mask)
            tl.store(averages + places, average, mask)


@triton.jit
def memory(address, start, ALIGNED: tl.constexpr):
    """Point to the float32 number `start` of what lies at an address, a multiple of ALIGNED."""
    pointer = tl.load(address).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(pointer, ALIGNED) + start
