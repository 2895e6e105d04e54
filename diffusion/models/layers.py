"""3x3 convolutions: plain, with standardised weights, and both made ready for sampling.

A CPU's convolution brings the weights into its own order at every call, and the gradient of the
weights it sums slowly where an image has few positions. For wide layers on small images both take
longer than to convolve: with (16, 448, 4, 4) in bfloat16 a product of 3x3 patches takes half the
time forward and 40 % of it with backward, with (2, 2560, 8, 8) less than a quarter of either.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the size."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True):
        super().__init__(dim_in, dim_out, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight.permute(0, 2, 3, 1))  # contiguous, if channels_last

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """weight: (C_out, 3, 3, C_in)."""
        if patches_pay(x, weight):
            return product_of_patches(x, weight, self.bias)
        return self._conv_forward(x, weight.permute(0, 3, 1, 2), self.bias)


def patches_pay(x: Tensor, weight: Tensor) -> bool:
    """Whether the product is faster than the convolution."""
    narrowest = 64 * math.sqrt(x.shape[2] * x.shape[3])
    return x.device.type == "cpu" and weight.is_contiguous() and len(weight) >= narrowest


def product_of_patches(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, C, H, W), weight (C_out, 3, 3, C) -> (B, C_out, H, W), all of them channels_last."""
    _, _, H, W = x.shape
    h = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    patches = torch.cat([h[:, i : i + H, j : j + W] for i in range(3) for j in range(3)], 3)
    return F.linear(patches, weight.flatten(1), bias).permute(0, 3, 1, 2)


class WSConv3x3(Conv3x3):
    """A convolution with standardised weights (arXiv:1903.10520).

    Each filter has mean 0 and variance 1 / fan_in, so that activations keep their scale: without
    the gain a 3x3 convolution of 512 channels multiplies it by 68 and float16 overflows. One eps
    for all dtypes, and float32 throughout: the function does not change under autocast.
    """

    def reset_parameters(self) -> None:
        """The weights' own scale cancels, but says how far a step of Adam turns them: the same
        for all widths, and fast enough for a learning rate of 1e-3."""
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.standardised().to(x.dtype))

    def standardised(self) -> Tensor:
        """(C_out, 3, 3, C_in) float32"""
        w = self.weight.float().permute(0, 2, 3, 1)  # no copy where weights are channels_last
        fan_in = w[0].numel()
        gain = w.new_full((fan_in,), fan_in**-0.5)
        return F.layer_norm(w.flatten(1), (fan_in,), gain, eps=1e-5 / fan_in).view(w.shape)


@torch.no_grad()
def folded(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The same function for inference, which does once what `model` does at every call.

    Standardised weights are computed, and cast to dtype, that of autocast, as the weights of all
    convolutions and linear layers are. What stays as it is is shared with `model`.
    """
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for module in model.modules():
        if isinstance(module, WSConv3x3):
            weight = module.standardised().permute(0, 3, 1, 2)
            module.weight = nn.Parameter(weight, requires_grad=False)
            module.__class__ = Conv3x3
        if dtype is not None and isinstance(module, (nn.Conv2d, nn.Linear)):
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(p.to(dtype), requires_grad=False))
    return model
