"""CUDA graphs: a function captured once and replayed, without Python and its launches.

A step of a small network takes the GPU less time than Python needs to launch its kernels; a replay
launches them all at once. What is captured must have fixed shapes and never wait for the device.
"""

import torch
from torch import Tensor

WARM_UP = 3  # calls before the capture: libraries choose their kernels and allocate


class Graph:
    """Replay a function of tensors to a tuple of tensors, captured for inputs of these shapes.

    A replay reads the weights at the addresses of the capture: they may change in place only.
    Raises ValueError for tensors that are not on a CUDA device.
    """

    def __init__(self, function, inputs: tuple[Tensor, ...]):
        if not inputs[0].is_cuda:
            raise ValueError(f"CUDA graphs need a CUDA device; these are on {inputs[0].device}")
        self.function = function  # keeps its weights alive, whose addresses the graph knows
        self.inputs = tuple(v.clone() for v in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        self.graph.replay()
        return tuple(v.clone() for v in self.outputs)  # the next replay writes over its own


class Graphs:
    """Graphs of a function, by the shapes of its inputs and by a key of all else they depend on."""

    def __init__(self):
        self.graphs: dict[tuple, Graph] = {}

    def wrap(self, function, key: tuple = ()):
        """Return the function, captured when it is first called with inputs of new shapes."""

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            shapes = tuple((v.shape, v.dtype, v.stride()) for v in inputs)
            if (key, shapes) not in self.graphs:
                self.graphs[key, shapes] = Graph(function, inputs)
            return self.graphs[key, shapes](*inputs)

        return run
