"""Clipping, AdamW and the average of the weights in one pass over memory, for CUDA.

One launch serves all weights: it finds them by a table of their addresses.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ema import EMA
from .optimizer import AdamW

BLOCK = tl.constexpr(1024)  # numbers that a program changes


class Update:
    """Do the steps of an AdamW and of an EMA of the same weights.

    36 bytes a weight are moved; one after the other, clipping, AdamW and EMA move 48. What the
    optimizer keeps, and a checkpoint holds, is the same.
    """

    def __init__(self, optimizer: AdamW, ema: EMA):
        self.ema = ema
        self.find(optimizer)
        optimizer.register_load_state_dict_post_hook(self.find)

    def find(self, optimizer: AdamW) -> None:
        """Make what the optimizer's state lacks, and note where all lies that stays there.

        table: (N, 6) of N weights: the addresses of gradients (in each step others), weights,
        moments and averages; the sizes. programs: (P, 2) of P blocks, the weight's row and
        where it begins.
        """
        self.settings = optimizer.param_groups[0]
        weights = self.settings["params"]
        self.steps = torch.zeros(len(weights), device=weights[0].device)
        rows = []
        programs = []
        for step, weight, average in zip(self.steps, weights, self.ema.ema):
            state = optimizer.state[weight]
            step.copy_(state.get("step", step))
            state["step"] = step
            names = ("exp_avg", "exp_avg_sq")
            moments = [state.setdefault(name, torch.zeros_like(weight)) for name in names]
            size = weight.numel()
            programs += [(len(rows), start) for start in range(0, size, BLOCK.value)]
            tensors = (weight, *moments, average)
            rows.append([0, *(x.data_ptr() for x in tensors), size])
        self.table = torch.tensor(rows, device=step.device)
        self.programs = torch.tensor(programs, device=step.device)

    def __call__(self, gradients: list[Tensor], ok: Tensor, clip: Tensor) -> None:
        """Change weights, moments, step counts and averages; where ok, () bool, is False, nothing.

        gradients: of `take_gradients`, of every weight; they count times clip (). Nothing waits,
        and a CUDA graph can hold it.
        """
        addresses = [g.data_ptr() for g in gradients]
        # as arguments of a kernel they come to the device without a copy from memory
        places = self.table[:, 0].unbind()
        torch._foreach_zero_(places)
        torch._foreach_add_(places, addresses)
        self.steps += ok
        beta1, beta2 = self.settings["betas"]
        update_kernel[len(self.programs),](
            self.table,
            self.programs,
            1 - beta1**self.steps,
            1 - beta2**self.steps,
            self.settings["lr"],
            clip,
            ok,
            self.ema.weight,
            1 - beta1,
            1 - beta2,
            self.settings["eps"],
            self.settings["weight_decay"],
            4 if any(a % 16 for a in addresses) else 16,
        )


@triton.jit
def update_kernel(
    table,
    programs,
    correction1,
    correction2,
    lr,
    clip,
    ok,
    ema_weight,
    new1,
    new2,
    eps,
    decay,
    ALIGNED: tl.constexpr,
):
    """Update a block of a weight.

    correction1, correction2: (N,) what the moments are divided by. new1, new2: the parts of the
    gradient in them. ALIGNED: what addresses are multiples of.
    """
    program = programs + 2 * tl.program_id(0)
    owner = tl.load(program)
    start = tl.multiple_of(tl.load(program + 1), BLOCK)
    places = start + tl.arange(0, BLOCK)
    row = table + 6 * owner
    gradients = memory(row, places, ALIGNED)
    weights = memory(row + 1, places, ALIGNED)
    firsts = memory(row + 2, places, ALIGNED)
    seconds = memory(row + 3, places, ALIGNED)
    averages = memory(row + 4, places, ALIGNED)
    size = tl.load(row + 5) * tl.load(ok)
    rate = tl.load(lr)
    step = rate / tl.load(correction1 + owner)
    root = tl.sqrt_rn(tl.load(correction2 + owner))
    for whole in tl.static_range(2):
        if (start + BLOCK <= size) == whole:  # without a mask, 16 bytes are read at once
            mask = None if whole else places < size
            gradient = tl.load(gradients, mask) * tl.load(clip)
            first = tl.load(firsts, mask)
            first += new1 * (gradient - first)
            second = tl.load(seconds, mask)
            second += new2 * (gradient * gradient - second)
            weight = tl.load(weights, mask)
            weight -= rate * decay * weight
            weight -= step * first / (tl.sqrt_rn(second) / root + eps)
            average = tl.load(averages, mask)
            average += tl.load(ema_weight) * (weight - average)
            tl.store(weights, weight, mask)
            tl.store(firsts, first, mask)
            tl.store(seconds, second, mask)
            tl.store(averages, average, mask)


@triton.jit
def memory(address, places, ALIGNED: tl.constexpr):
    """Point to places in the float32 numbers that lie at an address."""
    numbers = tl.load(address).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(numbers, ALIGNED) + places
