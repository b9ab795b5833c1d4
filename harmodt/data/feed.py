"""Loads the inputs of each training step into one buffer on the run's device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..batch import Batch, Layout, batch_of, move, tensors_of
from ..draws import TRAIN, Draws
from .order import TaskOrder
from .windows import Drawn, WindowSampler

_WINDOWS = 1 << 14  # windows to draw at a time, about
_MOST_STEPS = 64  # most steps to draw at a time


class Feed:
    """The inputs of training steps.

    Every step reads its inputs from the same buffer, so a captured step can be replayed on new
    inputs. The feed draws tasks and windows for many steps at a time, on the device that holds the
    data. If the run's device has a copy of the data, the step itself gathers its windows. Otherwise
    a thread gathers the windows of the next step while the current step is computed, and one
    transfer brings them to the run's device.

    Args:
        sampler: draws and gathers windows.
        order: the tasks of each step.
        seed: the seed of the run.
        extra_inputs: returns all other inputs of S consecutive steps, such as learning rates:
            tensors [S, ...] on the CPU. Steps are counted from 1.

    Attributes:
        task_ids: int64 [G], the tasks of the loaded step.
        extra: the tensors of `extra_inputs` for the loaded step.
    """

    def __init__(
        self,
        sampler: WindowSampler,
        order: TaskOrder,
        seed: int,
        extra_inputs: Callable[[range], Sequence[Tensor]],
    ):
        self._sampler = sampler
        self._order = order
        self._seed = seed
        self._extra_inputs = extra_inputs
        windows = order.of(range(1, 2)).numel() * sampler.inputs.settings.batch_per_task
        self._steps_at_once = min(max(_WINDOWS // windows, 1), _MOST_STEPS)
        self._steps = range(0)  # the steps whose tasks and windows are drawn
        self._step_gathers = step_gathers(sampler)
        self._thread = None if self._step_gathers else ThreadPoolExecutor(1)
        self._ahead: dict[int, Future[tuple[list[int], list[Tensor]]]] = {}
        _, first = self._inputs_of(1)
        self._layout = Layout(first)
        self._buffer = self._layout.pack(first, sampler.device).to(sampler.device)
        self._views = self._layout.views(self._buffer)
        count = 1 + len(extra_inputs(range(1, 2)))
        self.task_ids, *self.extra = self._views[:count]
        self._windows = self._views[count:]

    def load(self, step: int) -> list[int]:
        """Load the inputs of a step, counted from 1, into the buffer; return its tasks' ids."""
        if self._thread is None:
            task_ids, inputs = self._inputs_of(step)
        else:
            found = self._ahead.pop(step, None) or self._thread.submit(self._inputs_of, step)
            task_ids, inputs = found.result()
            self._ahead = {step + 1: self._thread.submit(self._inputs_of, step + 1)}
        if inputs[0].device == self._buffer.device:
            torch._foreach_copy_(self._views, inputs)
        else:
            packed = self._layout.pack(inputs, self._buffer.device)
            self._buffer.copy_(packed, non_blocking=True)
        return task_ids

    def batch(self) -> tuple[Batch, Tensor]:
        """The windows of the loaded step, and the actions to predict, on the run's device."""
        if self._step_gathers:
            return self._sampler.gather(self.task_ids, Drawn(*self._windows))
        return batch_of([self.task_ids, *self._windows])

    def _inputs_of(self, step: int) -> tuple[list[int], list[Tensor]]:
        """The tasks of a step, and its inputs.

        The inputs are the task ids, the extra inputs, and the windows. If the step itself gathers
        its windows, the inputs have the draws of the windows instead.
        """
        if step not in self._steps:
            self._steps = range(step, step + self._steps_at_once)
            self._draw(self._steps)
        row = step - self._steps.start
        task_ids, *extra = (tensor[row] for tensor in self._others)
        windows = [tensor[row] for tensor in self._drawn]
        if not self._step_gathers:
            _, *windows = tensors_of(*self._sampler.gather(task_ids, Drawn(*windows)))
        return self._tasks[row], [task_ids, *extra, *windows]

    def _draw(self, steps: range) -> None:
        """Draw the tasks and windows of some steps, and compute their extra inputs."""
        device, tasks = self._sampler.episodes.device, self._order.of(steps)
        numbers = torch.arange(steps.start - 1, steps.stop - 1)
        numbers, *self._others = move([numbers, tasks, *self._extra_inputs(steps)], device)
        draws = Draws(self._seed, TRAIN, numbers[:, None, None, None])
        drawn = self._sampler.draw(self._others[0], draws)
        self._drawn = [tensor for tensor in drawn if tensor is not None]
        self._tasks: list[list[int]] = tasks.tolist()


def step_gathers(sampler: WindowSampler) -> bool:
    """Whether a step gathers its own windows: whether the run's device has a copy of the data."""
    return sampler.device == sampler.episodes.copied_to
