"""LoRA (arXiv:2106.09685): low-rank branches beside the layers of a finished network.

    h = W x + w (alpha / r) up(down(x))         r: rank, w: the adapter's weight, 1 unless set

Branches are injected from outside, as a forward hook: the network's own modules, their names and
their weights stay what they are. `up` starts at zero, so that injecting changes nothing.

A linear layer's `down` is (r, in) and its `up` (out, r). A k x k convolution's `down` is a k x k
convolution (r, in, k, k) of the same stride and padding, its `up` a 1 x 1 one (out, r, 1, 1).
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layers import WSConv3x3

# What --targets may name: patterns over module names, of Stable Diffusion and of our pixel U-Net.
TARGETS = {
    "attention": r"(to_q|to_k|to_v|to_out\.0|to_qkv|to_out|[qkv]_proj|out_proj)$",
    "mlp": r"(proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|mlp\.fc1|mlp\.fc2|film)$",
    "conv": r"(conv1|conv2|conv_shortcut|samplers\.0\.conv|skip|down\.\d\.3|up\.\d\.3\.1)$",
    "all": r"",
}


class LowRank(NamedTuple):
    """A layer's branch as files hold it; alpha / rank is its scale."""

    down: Tensor
    up: Tensor
    alpha: float


class Branch(nn.Module):
    """One adapter's branch beside one layer. Its parameters are float32 whatever the layer's are.

    weight: of the adapter in the sum. merged: the weight with which it stands in the layer's own
    weights, None if it does not.
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
        self.merged = None

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.down.weight.dtype)
        return self.weight * self.scale * self.up(self.down(self.dropout(x)))

    def delta(self) -> Tensor:
        """What the branch adds to the layer's weights at weight 1, in their shape, float32."""
        down = self.down.weight
        up = self.up.weight
        return (self.scale * up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


def add_branches(layer: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
    """The forward hook of layers with branches."""
    for branch in layer.lora.values():
        if branch.merged is None:
            out = out + branch(args[0]).to(out.dtype)
    return out


# --- where they go -------------------------------------------------------------------------------


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that take a branch, by name.

    Weight-standardised convolutions take none: it could not be merged into their weights, whose
    mean and scale are divided out.
    """
    fit = lambda m: isinstance(m, nn.Linear | nn.Conv2d) and not isinstance(m, WSConv3x3)  # noqa: E731
    inside = [m for m in model.modules() if isinstance(m, Branch)]
    ours = {id(part) for branch in inside for part in branch.modules()}
    found = {name: m for name, m in model.named_modules() if fit(m) and id(m) not in ours}
    return {name: m for name, m in found.items() if getattr(m, "groups", 1) == 1}


def find(model: nn.Module, targets: str) -> list[str]:
    """The names of the layers that `targets` means: names of TARGETS, or a regular expression.

    Several names of TARGETS are joined by commas; an expression is searched in each module's name.
    Raises ValueError if nothing matches, with the names there are.
    """
    chosen = targets.split(",")
    presets = all(name in TARGETS for name in chosen)
    try:
        pattern = re.compile("|".join(TARGETS[n] for n in chosen) if presets else targets)
    except re.error as error:
        raise ValueError(
            f"targets {targets!r} is neither of {', '.join(TARGETS)} nor a regular "
            f"expression ({error})"
        ) from None
    known = layers(model)
    if names := [name for name in known if pattern.search(name)]:
        return names
    ends = sorted({re.sub(r"^(?:.*\.)?([a-z_]\w*(?:\.\d+)*)$", r"\1", name) for name in known})
    raise ValueError(
        f"targets {targets!r} matches none of the {len(known)} layers that take a "
        f"LoRA; use {', '.join(TARGETS)}, or a regular expression over module names, "
        f"which end in {', '.join(ends)}"
    )


def inject(
    model: nn.Module,
    names: Iterable[str],
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    adapter: str = "default",
) -> None:
    """A new branch beside each layer of `names`. alpha: None means the rank, a scale of 1.

    Raises ValueError for a rank below 1, and an adapter that is there already.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be 1 or more")
    known = layers(model)
    alpha = rank if alpha is None else alpha
    for name in names:
        _attach(known[name], adapter, Branch(known[name], rank, alpha, dropout))


def load(model: nn.Module, parts: Mapping[str, LowRank], adapter: str, weight: float = 1.0) -> None:
    """Branches with these weights, by module name. Raises ValueError if a shape does not fit."""
    known = layers(model)
    for name, low in parts.items():
        branch = Branch(known[name], len(low.down), low.alpha)
        for kind in ("down", "up"):
            given = getattr(low, kind)
            own = getattr(branch, kind).weight
            if given.shape != own.shape:
                raise ValueError(
                    f"{name}: {kind} is {tuple(given.shape)}, this network's layer "
                    f"takes {tuple(own.shape)}"
                )
            own.data.copy_(given)
        branch.weight = weight
        _attach(known[name], adapter, branch.requires_grad_(False))


def _attach(layer: nn.Module, adapter: str, branch: Branch) -> None:
    if not hasattr(layer, "lora"):
        layer.lora = nn.ModuleDict()
        layer.register_forward_hook(add_branches)
    if adapter in layer.lora:
        raise ValueError(f"there is a LoRA {adapter!r} already")
    layer.lora[adapter] = branch.train(layer.training)


# --- what can be done with them ------------------------------------------------------------------


def branches(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Branch]]:
    """(module name, layer, adapter, branch) of all."""
    for name, layer in list(model.named_modules()):
        if isinstance(getattr(layer, "lora", None), nn.ModuleDict):
            for adapter, branch in layer.lora.items():
                yield name, layer, adapter, branch


def state(model: nn.Module, adapter: str = "default") -> dict[str, LowRank]:
    """An adapter's weights by module name: what `load` takes."""
    return {
        name: LowRank(branch.down.weight.detach(), branch.up.weight.detach(), branch.alpha)
        for name, _, own, branch in branches(model)
        if own == adapter
    }


def set_weights(model: nn.Module, weights: Mapping[str, float]) -> None:
    """The adapters' weights in the sum; others keep theirs. Not while they are merged."""
    for _, _, adapter, branch in branches(model):
        if branch.merged is not None:
            raise ValueError("unmerge before the weights of adapters are changed")
        branch.weight = float(weights.get(adapter, branch.weight))


def merge(model: nn.Module) -> None:
    """Put all branches into their layers' weights: the same function at the speed without them."""
    for _, layer, _, branch in branches(model):
        if branch.merged is None:
            _add(layer, branch, branch.weight)
            branch.merged = branch.weight


def unmerge(model: nn.Module) -> None:
    """Undo `merge`; the layers' weights are then theirs again within rounding."""
    for _, layer, _, branch in branches(model):
        if branch.merged is not None:
            _add(layer, branch, -branch.merged)
            branch.merged = None


@torch.no_grad()
def _add(layer: nn.Module, branch: Branch, weight: float) -> None:
    # a new tensor: the old one may be shared with another copy of the network, or with its file
    total = torch.add(layer.weight.float(), branch.delta(), alpha=weight)
    layer.weight.data = total.to(layer.weight.dtype).contiguous(
        memory_format=torch.channels_last
        if total.ndim == 4 and layer.weight.is_contiguous(memory_format=torch.channels_last)
        else torch.contiguous_format
    )
