"""Exponential moving average of weights."""

import copy

import torch
from torch import Tensor, nn


class EMA:
    """Average weights: ema += (1 - decay) (weights - ema), decay = min(ema_decay, (1+n) / (10+n)).

    n is the number of optimizer steps so far, so the average follows a short run and smooths a
    long one, and resuming needs no counter. It is a model of its own: sampling from it swaps
    nothing, and a checkpoint can be written at any time. Frozen parameters are shared with the
    model, not copied.
    """

    def __init__(self, model: nn.Module, decay: float):
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        copied = copy.deepcopy(model, frozen)
        pairs = [(e, w) for e, w in zip(copied.parameters(), model.parameters()) if w.requires_grad]
        self.ema = [e for e, _ in pairs]
        self.weights = [w for _, w in pairs]
        self.model = copied.eval().requires_grad_(False)
        self.decay = decay
        self.weight = torch.zeros((), device=self.ema[0].device)

    def begin(self, n: int) -> None:
        """Set how much the weights after step n, from 0, will count."""
        self.weight.fill_(1 - min(self.decay, (1 + n) / (10 + n)))

    @torch.no_grad()
    def update(self, ok: Tensor) -> None:
        """Follow the weights after a step.

        ok: () bool on the device; where it is False nothing happens.
        """
        weight = ok * self.weight
        if weight.device.type == "cpu":
            for e, w in zip(self.ema, self.weights):
                e.lerp_(w, weight)
            return
        change = torch._foreach_sub(self.weights, self.ema)  # three launches, not one a weight
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(self.ema, change)
