"""Moving averages of weights, also those that --posthoc_ema keeps beside the usual one."""

import copy

import numpy as np
import torch
from torch import Tensor, nn

TRACKS = (0.05, 0.10)  # relative lengths, sigma_rel, that --posthoc_ema keeps


def power(sigma_rel: float) -> float:
    """Give gamma + 1 of the power-function average of a relative length, up to 0.288.

    After step t it weighs the weights of step s like s^gamma, whose standard deviation is
    sigma_rel t, with sigma_rel^2 = (gamma+1) / ((gamma+2)^2 (gamma+3)) (arXiv:2312.02696, 3.1).
    """
    return float(np.roots([1, 4, 5 - sigma_rel**-2, 2]).real.max())


class EMA:
    """Average weights: ema += (1 - decay) (weights - ema), decay = min(ema_decay, (1+n) / (10+n)).

    n is the number of optimizer steps so far, so the average follows a short run and smooths a
    long one, and resuming needs no counter. It is a model of its own: sampling from it swaps
    nothing, and a checkpoint can be written at any time. Frozen parameters are shared with the
    model, not copied. length: sigma_rel of a power-function average, with the decay in step
    t = n + 1 of (1 - 1/t)^(gamma+1) instead. tracks: more averages, that are begun with this one.
    """

    def __init__(self, model: nn.Module, decay: float, length: float | None = None):
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        copied = copy.deepcopy(model, frozen)
        named = zip(copied.named_parameters(), model.parameters())
        rows = [(name, e, w) for (name, e), w in named if w.requires_grad]
        self.names, self.ema, self.weights = map(list, zip(*rows))
        self.model = copied.eval().requires_grad_(False)
        self.decay = decay
        self.power = length and power(length)
        self.tracks = []
        self.weight = torch.zeros((), device=self.ema[0].device)

    def begin(self, n: int) -> None:
        """Set how much the weights after step n, from 0, will count."""
        decay = (n / (n + 1)) ** self.power if self.power else (1 + n) / (10 + n)
        self.weight.fill_(1 - min(self.decay, decay))
        for track in self.tracks:
            track.begin(n)

    @torch.no_grad()
    def update(self, ok: Tensor | bool = True) -> None:
        """Follow the weights after a step; tracks are updated by themselves.

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
