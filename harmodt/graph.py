"""A computation that is recorded once and then repeated as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harmodt_kernels import CannotRecord, Recording, RecordingMemory

from .errors import UserError

_ADVICE = (
    "the computation cannot be recorded as a graph ({}): train with --no-graph, or compute with "
    "--no-fused"
)

WARM_UP = 3  # calls that compute as usual: kernels are compiled, and memory is asked for


class Graph:
    """A function without arguments, recorded at one of its first calls.

    What it reads must stay where it is: inputs are copied there before a call. It must not look at
    a tensor's value, and what is computed from Python's numbers stays as it was when recorded.

    Args:
        function: computes a tensor from tensors that are where they were.
    """

    def __init__(self, function: Callable[[], Tensor]):
        self._function = function

    def __call__(self) -> Tensor:
        """Compute; returns a copy of the result.

        Raises:
            UserError: the function does what a graph cannot hold.
        """
        raise NotImplementedError


class CallGraph(Graph):
    """On a CPU: the calls of kernels, recorded at the second call.

    What is made at the first call alone, and kept, is no part of them.

    Args:
        function: as above.
        memory: of graphs that are computed in turn.

    Attributes:
        recording: of them, or None before that.
    """

    def __init__(self, function: Callable[[], Tensor], memory: RecordingMemory):
        super().__init__(function)
        self._memory = memory
        self.recording: Recording | None = None
        self._called = False

    def __call__(self) -> Tensor:
        if not self._called:
            self._called = True
            return self._function()
        if self.recording is None:
            try:
                self.recording = Recording(self._function, self._memory)
            except CannotRecord as error:
                raise UserError(_ADVICE.format(error)) from error
        else:
            self.recording.replay()
        return self.recording.result.clone()


class CudaGraph(Graph):
    """On a GPU: a CUDA graph.

    Args:
        function: as above.
        device: the GPU.
    """

    def __init__(self, function: Callable[[], Tensor], device: torch.device):
        super().__init__(function)
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Tensor:
        if self._calls < WARM_UP:
            self._calls += 1
            return self._as_usual()
        graph = self._graph or self._record()
        graph.replay()
        return self._result.clone()

    def _as_usual(self) -> Tensor:
        """Compute on the stream that will be recorded, which autograd remembers."""
        present = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            result = self._function().clone()
        present.wait_stream(self._stream)
        result.record_stream(present)
        return result

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._result = self._function()
        except RuntimeError as error:
            raise UserError(_ADVICE.format(error)) from error
        self._graph = graph
        return graph
