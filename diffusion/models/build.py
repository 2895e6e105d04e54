"""Networks without values: sizes and names only, until a file's tensors take their places."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class NoInit(TorchFunctionMode):
    """`nn.init` does nothing. To draw values that are none, torch would import its compiler."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def blank() -> Iterator[None]:
    """Modules made within are on the meta device: whatever their sizes, they cost nothing."""
    with torch.device("meta"), NoInit():
        yield
