"""LoRA (arXiv:2106.09685): low-rank branches beside the layers of a finished network.

    h = W x + w (alpha / r) up(down(x))         r: rank, w: the adapter's weight, 1 unless set

Branches are injected from outside, as a forward hook: the network's own modules, their names and
their weights stay what they are. `up` starts at zero, so that injecting changes nothing.

A linear layer's `down` is (r, in) and its `up` (out, r). A k x k convolution's `down` is a k x k
convolution (r, in, k, k) of the same stride and padding, its `up` a 1 x 1 one (out, r, 1, 1).

Adapters of other kinds come as a `Delta`, what a layer's own weights change by:

    h = W x + w Delta x
"""

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layers import WSConv3x3


def ending(*names: str) -> str:
    """Write the pattern of module names that end so."""
    return f"({'|'.join(names)})$"


# What --targets may name: patterns over module names, of Stable Diffusion, then of the pixel U-Net.
TARGETS = {
    "attention": ending("to_[qkv]", r"to_out\.0", "[qkv]_proj", "out_proj", "to_qkv", "to_out"),
    "mlp": ending(
        "proj_in", "proj_out", r"ff\.net\.0\.proj", r"ff\.net\.2", r"mlp\.fc[12]", "film"
    ),
    "conv": ending(
        "conv[12]", "conv_shortcut", r"samplers\.0\.conv", "skip", r"down\.\d\.3", r"up\.\d\.3\.1"
    ),
    "all": "",
}


class LowRank(NamedTuple):
    """Hold a layer's branch as files do; alpha / rank is its scale."""

    down: Tensor
    up: Tensor
    alpha: float


class Delta(NamedTuple):
    """Hold what a layer's weights and its bias change by; None: not at all."""

    weight: Tensor
    bias: Tensor | None = None


# layers whose output is linear in their weights: they take a Delta
LINEAR = nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm


class Branch(nn.Module):
    """Add one adapter's branch to one layer. Its parameters are float32 whatever the layer's are.

    weight: of the adapter in the sum. merged: it has been added to the layer's own weights.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        options = {"bias": False, "device": layer.weight.device, "dtype": torch.float32}
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, **options)
            self.up = nn.Linear(rank, layer.out_features, **options)
        else:
            same = {k: getattr(layer, k) for k in ("stride", "padding", "dilation")}
            self.down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, **same, **options)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, **options)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.dropout = nn.Dropout(dropout)
        self.alpha = alpha
        self.scale = alpha / rank
        self.weight = 1.0
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.down.weight.dtype)
        return self.weight * self.scale * self.up(self.down(self.dropout(x)))

    def changes(self) -> dict[str, Tensor]:
        """Compute what the branch adds to the layer's parameters, at weight 1 and in float32."""
        down = self.down.weight
        up = self.up.weight
        delta = (self.scale * up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])
        return {"weight": delta}


class DeltaBranch(nn.Module):
    """Add the output of a layer's twin, whose weights are what the layer's own change by.

    weight, merged: as in Branch.
    """

    def __init__(self, layer: nn.Module, delta: Delta):
        super().__init__()
        given = delta._asdict().items()
        own = {k: None if v is None else nn.Parameter(v.to(layer.weight)) for k, v in given}
        self.twin = copy.copy(layer)
        self.twin.__dict__.update(_parameters=own, _modules={})
        self.twin.__dict__.pop("forward", None)  # cpu.py's, which is of the layer itself
        self.weight = 1.0
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.twin.forward(x)  # not its hooks, which are the layer's

    def changes(self) -> dict[str, Tensor]:
        """Give what the layer's parameters change by, at weight 1."""
        return {name: value.float() for name, value in self.twin.named_parameters()}


def add_branches(layer: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
    """Add the branches' outputs to a layer's: the forward hook of layers with branches."""
    for branch in layer.lora.values():
        if not branch.merged:
            out = out + branch(args[0]).to(out.dtype)
    return out


# --- where they go -------------------------------------------------------------------------------


def layers(model: nn.Module, kinds=nn.Linear | nn.Conv2d) -> dict[str, nn.Module]:
    """Find the layers of these kinds by name: those that take low-rank branches, unless said.

    Weight-standardised convolutions take none: it could not be merged into their weights, whose
    mean and scale are divided out.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        and not isinstance(module, WSConv3x3)
        and ".lora." not in name  # the branches' own
    }


def find(model: nn.Module, targets: str) -> list[str]:
    """Find the names of the layers that match `targets`: names of TARGETS, or a regular expression.

    Several names of TARGETS are joined by commas; an expression is searched in each module's name.
    Raises ValueError if nothing matches, with names that there are.
    """
    chosen = targets.split(",")
    if set(chosen) <= TARGETS.keys():
        targets = "|".join(TARGETS[name] for name in chosen)
    use = f"use {', '.join(TARGETS)}, or a regular expression over module names"
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ValueError(f"targets {targets!r} is no regular expression ({error}); {use}") from None
    known = list(layers(model))
    names = [name for name in known if pattern.search(name)]
    if not names:
        raise ValueError(
            f"targets {targets!r} matches none of the {len(known)} layers that take a LoRA; {use} "
            f"such as {', '.join(known[:10])}"
        )
    return names


def inject(
    model: nn.Module,
    names: Iterable[str],
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    adapter: str = "default",
) -> None:
    """Put a new branch beside each layer of `names`. alpha: None means the rank, a scale of 1.

    Raises ValueError for an adapter that is there already.
    """
    known = layers(model)
    alpha = rank if alpha is None else alpha
    for name in names:
        _attach(known[name], adapter, Branch(known[name], rank, alpha, dropout))


def load(
    model: nn.Module, parts: Mapping[str, LowRank | Delta], adapter: str, weight: float = 1.0
) -> None:
    """Put branches with these weights, which fit, beside layers, by module name.

    Raises ValueError for an adapter that is there already.
    """
    for name, low in parts.items():
        layer = model.get_submodule(name)
        if isinstance(low, Delta):
            branch = DeltaBranch(layer, low)
        else:
            branch = Branch(layer, len(low.down), low.alpha)
            for kind in ("down", "up"):
                getattr(branch, kind).weight.data.copy_(getattr(low, kind))
        branch.weight = weight
        _attach(layer, adapter, branch.requires_grad_(False))


def _attach(layer: nn.Module, adapter: str, branch: Branch | DeltaBranch) -> None:
    if not hasattr(layer, "lora"):
        layer.lora = nn.ModuleDict()
        layer.register_forward_hook(add_branches)
    if adapter in layer.lora:
        raise ValueError(f"a LoRA {adapter!r} exists already; choose another name")
    layer.lora[adapter] = branch.train(layer.training)


# --- branches in a network ------------------------------------------------------------------------


def branches(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Branch | DeltaBranch]]:
    """Go through all branches: (module name, layer, adapter, branch)."""
    for name, layer in list(model.named_modules()):
        for adapter, branch in getattr(layer, "lora", {}).items():
            yield name, layer, adapter, branch


def state(model: nn.Module, adapter: str = "default") -> dict[str, LowRank]:
    """Return an adapter's weights by module name: what `load` takes."""
    return {
        name: LowRank(branch.down.weight.detach(), branch.up.weight.detach(), branch.alpha)
        for name, _, own, branch in branches(model)
        if own == adapter
    }


def set_weights(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Set adapters' weights in the sum; others stay. Raises ValueError for merged ones."""
    for _, _, adapter, branch in branches(model):
        if branch.merged:
            raise ValueError(f"LoRA {adapter!r} is merged; load it unmerged to change its weight")
        branch.weight = float(weights.get(adapter, branch.weight))


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add all branches to their layers' weights: the same function at the speed without them."""
    for _, layer, _, branch in branches(model):
        if not branch.merged:
            for name, change in branch.changes().items():
                own = getattr(layer, name)
                total = torch.add(own.float(), change, alpha=branch.weight)
                # a new tensor: the old one may be shared with another copy of the network, or its
                # file
                own.data = torch.empty_like(own).copy_(total)
            branch.merged = True
            if isinstance(branch, DeltaBranch):
                branch.twin = None  # as large as the layer
