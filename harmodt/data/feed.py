"""What the training steps of a run read, brought to one place on the device step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..batch import Batch, Layout, batch_of, move, tensors_of
from ..draws import TRAIN, Draws
from .order import TaskOrder
from .windows import Drawn, WindowSampler

_WINDOWS = 1 << 14  # whose places are drawn at once, if they are of more than one step
_MOST_STEPS = 64


class Feed:
    """The inputs of training steps. Each step's come to the same place, where a graph finds them.

    What is drawn is drawn for many steps at once, where the data lie. If they lie on the model's
    device, a step gathers its windows there. Else a thread gathers the next step's while this one
    computes, and they come in one transfer, for which nobody waits.

    Args:
        sampler: of the data.
        order: the tasks of each step.
        seed: of the run.
        more: what else a step reads: for some consecutive steps, counted from 1, tensors [S, ...]
            on the CPU.

    Attributes:
        task_ids: int64 [G], the tasks of the step that was loaded.
        more: what else it reads.
    """

    def __init__(
        self,
        sampler: WindowSampler,
        order: TaskOrder,
        seed: int,
        more: Callable[[range], Sequence[Tensor]],
    ):
        self._sampler = sampler
        self._order = order
        self._seed = seed
        self._more = more
        windows = order.of(range(1, 2)).numel() * sampler.inputs.settings.batch_per_task
        self._steps_at_once = min(max(_WINDOWS // windows, 1), _MOST_STEPS)
        self._steps = range(0)  # that are drawn
        self._gathers_late = gathers_late(sampler)
        self._thread = None if self._gathers_late else ThreadPoolExecutor(1)
        self._ahead: dict[int, Future[tuple[list[int], list[Tensor]]]] = {}
        _, first = self._of_step(1)
        self._layout = Layout(first)
        self._place = self._layout.pack(first, sampler.device).to(sampler.device)
        self._views = self._layout.views(self._place)
        count = 1 + len(more(range(1, 2)))
        self.task_ids, *self.more = self._views[:count]
        self._windows = self._views[count:]

    def load(self, step: int) -> list[int]:
        """Bring the inputs of a step, counted from 1, to their place; returns its tasks' ids."""
        if self._thread is None:
            task_ids, inputs = self._of_step(step)
        else:
            found = self._ahead.pop(step, None) or self._thread.submit(self._of_step, step)
            task_ids, inputs = found.result()
            self._ahead = {step + 1: self._thread.submit(self._of_step, step + 1)}
        if inputs[0].device == self._place.device:
            torch._foreach_copy_(self._views, inputs)
        else:
            packed = self._layout.pack(inputs, self._place.device)
            self._place.copy_(packed, non_blocking=True)
        return task_ids

    def batch(self) -> tuple[Batch, Tensor]:
        """The windows of the step that was loaded, and the actions to predict, on the device."""
        if self._gathers_late:
            return self._sampler.gather(self.task_ids, Drawn(*self._windows))
        return batch_of([self.task_ids, *self._windows])

    def _of_step(self, step: int) -> tuple[list[int], list[Tensor]]:
        """The tasks of a step; and their ids, what else it reads, and its windows or their places.

        The windows themselves are on the CPU; their places are there where they are gathered.
        """
        if step not in self._steps:
            self._steps = range(step, step + self._steps_at_once)
            self._draw(self._steps)
        row = step - self._steps.start
        task_ids, *more = (tensor[row] for tensor in self._others)
        windows = [tensor[row] for tensor in self._drawn]
        if not self._gathers_late:
            _, *windows = tensors_of(*self._sampler.gather(task_ids, Drawn(*windows)))
        return self._tasks[row], [task_ids, *more, *windows]

    def _draw(self, steps: range) -> None:
        """Draw tasks and places of windows for some steps, and ask what else they read."""
        place, tasks = self._sampler.episodes.device, self._order.of(steps)
        numbers = torch.arange(steps.start - 1, steps.stop - 1)
        numbers, *self._others = move([numbers, tasks, *self._more(steps)], place)
        draws = Draws(self._seed, TRAIN, numbers[:, None, None, None])
        drawn = self._sampler.draw(self._others[0], draws)
        self._drawn = [tensor for tensor in drawn if tensor is not None]
        self._tasks: list[list[int]] = tasks.tolist()


def gathers_late(sampler: WindowSampler) -> bool:
    """Whether a step gathers its own windows: all data lie in tensors where the batches go."""
    return sampler.device == sampler.episodes.place
