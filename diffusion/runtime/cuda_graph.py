"""CUDA graphs: a function captured once and replayed, without Python and its launches.

A step of a small network takes the GPU less time than Python needs to launch its kernels; a replay
launches them all at once. What is captured must have fixed shapes and never wait for the device.
"""

import math
from collections import Counter

import torch
from torch import Tensor

from .distributed import log

WARM_UP = 3  # calls before the capture: libraries choose their kernels and allocate


class Graph:
    """Replay a function of tensors to a tuple of tensors, captured for inputs of these shapes.

    A replay reads the weights at the addresses of the capture: they may change in place only.
    warm_up: calls before the capture. options: of torch.cuda.graph.
    Raises ValueError for tensors that are not on a CUDA device.
    """

    def __init__(self, function, inputs: tuple[Tensor, ...], warm_up: int = WARM_UP, **options):
        if not inputs[0].is_cuda:
            raise ValueError(f"CUDA graphs need a CUDA device; these are on {inputs[0].device}")
        self.function = function  # keeps its weights alive, whose addresses the graph knows
        self.inputs = tuple(v.clone() for v in inputs)
        self.graph = torch.cuda.CUDAGraph()
        # other threads, which read ahead, may allocate meanwhile
        capture = torch.cuda.graph(self.graph, capture_error_mode="thread_local", **options)
        stream = capture.capture_stream  # one of all graphs: cuBLAS keeps 32 MB for each stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with capture:
            self.outputs = function(*self.inputs) or ()

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
            shapes = shapes_of(inputs)
            if (key, shapes) not in self.graphs:
                self.graphs[key, shapes] = Graph(function, inputs)
            return self.graphs[key, shapes](*inputs)

        return run


class StepGraph:
    """Run a function that changes tensors in place, and returns nothing, from its fourth call as a
    graph: here every call counts, so the first ones are the warm-up.

    There is a graph for each of the inputs' shapes, in memory that they share. Where there is too
    little for a graph's own, the function keeps running without.
    """

    def __init__(self, function):
        self.function = function
        self.graphs: dict[tuple, Graph] = {}
        self.calls = Counter()
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Tensor) -> None:
        shapes = shapes_of(inputs)
        if shapes not in self.graphs:
            self.calls[shapes] += 1
            if self.calls[shapes] <= WARM_UP or not self.capture(shapes, inputs):
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    self.function(*inputs)
                torch.cuda.current_stream().wait_stream(self.stream)
                return
        self.graphs[shapes](*inputs)

    def capture(self, shapes: tuple, inputs: tuple[Tensor, ...]) -> bool:
        """Capture the function; tell whether there was memory for it."""
        options = dict(warm_up=0, pool=self.pool, stream=self.stream)
        try:
            self.graphs[shapes] = Graph(self.function, inputs, **options)
        except RuntimeError as error:
            if torch.cuda.OutOfMemoryError not in (type(error), type(error.__context__)):
                raise
            self.calls[shapes] = -math.inf  # not again
            log("too little memory for steps as CUDA graphs: they run without, more slowly")
        return shapes in self.graphs


def shapes_of(inputs: tuple[Tensor, ...]) -> tuple:
    """Describe tensors by all that a graph depends on."""
    return tuple((v.shape, v.dtype, v.stride()) for v in inputs)
