"""What a network is conditioned on: the third argument of every `net(x, t, cond)`."""

from typing import NamedTuple

from torch import Tensor

VECTOR = 6  # see data/augment.py


class Cond(NamedTuple):
    """Hold the conditioning of a batch; None means that there is none of that kind.

    context: (B, L, D) embeddings of a text, or (B, L) its ids for a network that embeds them.
    labels: (B,) int64 classes.
    image: (B, C, H, W) channels that the network reads behind those of x.
    vector: (B, VECTOR) what was done to an image; None is the same as zeros.
    """

    context: Tensor | None = None
    labels: Tensor | None = None
    image: Tensor | None = None
    vector: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """List those that are there."""
        return tuple(value for value in self if value is not None)

    def refilled(self, tensors: tuple[Tensor, ...]) -> "Cond":
        """Put other tensors, in the order of `tensors`, in place of those that are there."""
        values = iter(tensors)
        return Cond(*(None if value is None else next(values) for value in self))


NOTHING = Cond()
