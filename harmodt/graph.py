"""Captures a computation once and then replays it as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harmodt_kernels import CannotRecord, Recording, RecordingMemory

from .errors import UserError

_ADVICE = "the computation cannot be captured as a graph ({}): give --no-graph or --no-fused"

WARM_UP = 3  # ordinary calls before a capture: they compile kernels and allocate memory


class Graph:
    """A function without arguments that is captured at one of its first calls and then replayed.

    The function reads tensors whose addresses never change. The caller copies new inputs into them
    before a call. The function must not read a tensor's value on the host. Python numbers keep the
    values that they had at the capture.

    Args:
        function: computes one tensor.
    """

    def __init__(self, function: Callable[[], Tensor]):
        self._function = function

    def __call__(self) -> Tensor:
        """Compute, and return a copy of the result.

        Raises:
            UserError: the function does something that cannot be captured.
        """
        raise NotImplementedError


class CallGraph(Graph):
    """The graph on a CPU: a list of the function's kernel calls, captured at its second call.

    The first call is not captured, because it may create tensors that later calls use again.

    Args:
        function: computes one tensor.
        memory: memory that several graphs share; they must never run at the same time.

    Attributes:
        recording: the captured calls; None before the second call.
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


class CudaMemory:
    """The memory of several CUDA graphs: a pool, and the stream on which all of them are captured.

    The allocator of PyTorch gives freed memory of a pool only to the stream that used it before. So
    graphs that share memory share the stream too. Nothing is made before the first graph needs it.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    @functools.cached_property
    def pool(self) -> Any:  # PyTorch's type of a pool's handle is private
        return torch.cuda.graph_pool_handle()


class CudaGraph(Graph):
    """The graph on a GPU: a CUDA graph, captured after `WARM_UP` ordinary calls.

    Args:
        function: computes one tensor.
        memory: memory that several graphs share; they must never run at the same time. A replay
            overwrites what the other graphs computed, except their results.
    """

    def __init__(self, function: Callable[[], Tensor], memory: CudaMemory):
        super().__init__(function)
        self._memory = memory
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Tensor:
        if self._calls < WARM_UP:
            self._calls += 1
            return self._compute()
        graph = self._graph or self._record()
        graph.replay()
        return self._result.clone()

    def _compute(self) -> Tensor:
        """Compute on the stream of the capture.

        Autograd runs later backward passes on the stream of the first call. A capture fails if they
        run on another stream than its own.
        """
        present = torch.cuda.current_stream(self._memory.device)
        self._memory.stream.wait_stream(present)
        with torch.cuda.stream(self._memory.stream):
            result = self._function().clone()
        present.wait_stream(self._memory.stream)
        result.record_stream(present)
        return result

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            memory = self._memory
            with torch.cuda.graph(graph, pool=memory.pool, stream=memory.stream):
                self._result = self._function()
        except RuntimeError as error:
            raise UserError(_ADVICE.format(error)) from error
        self._graph = graph
        return graph
