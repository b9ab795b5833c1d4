"""Holds the episodes of several tasks, and gathers steps from all of them at once.

The episodes stay in the arrays of the store, which may be memory-mapped files, or they lie on a
device as one table with a row for each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .store import Episodes, TaskData

DEVICE_SHARE = 0.5
"""With `data_device` auto, data are copied to a GPU if they fit into this share of its free
memory."""

_GATHERED = ("returns_to_go", "observations", "actions")


class Trajectories:
    """Episodes of T tasks, numbered over all tasks: E episodes with S steps in total.

    Args:
        tasks: one entry per task; index = task id.
        device: all steps are copied to this device. With None the steps stay in their arrays, and
            `gather` returns tensors on the CPU.

    Attributes:
        copied_to: the device that holds the copy; None without a copy.
        device: every returned tensor lies here.
        first_episode: int64 [T + 1], the first episode of each task, then E.
        starts: int64 [E + 1], the first step of each episode, then S.
        lengths: int64 [E], steps of each episode.
        terminated: int8 [E], how each episode ended, as in `Episodes`.
    """

    def __init__(self, tasks: Sequence[Episodes], device: torch.device | None = None):
        self.copied_to = device
        self.device = device or torch.device("cpu")
        lengths = np.concatenate([np.zeros(0, np.int64), *(task.lengths for task in tasks)])
        counts = [len(task) for task in tasks]
        self.first_episode = self._tensor(np.cumsum([0, *counts]))
        self.starts = self._tensor(np.cumsum([0, *lengths]))
        self.lengths = self._tensor(lengths)
        self.terminated = self._tensor(np.concatenate([task.terminated for task in tasks]))
        self._first_step = self.starts[self.first_episode]
        self._arrays = [[np.asarray(getattr(task, name)) for name in _GATHERED] for task in tasks]
        self._widths = [int(np.prod(array.shape[1:])) for array in self._arrays[0]]
        self._table: Tensor | None = None
        if device is not None:
            self._table = self._make_table()
            self._arrays = []

    def episode_range(self, task_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The first episode of each given task, and its number of episodes; all int64 [...]."""
        first = self.first_episode[task_ids]
        return first, self.first_episode[task_ids + 1] - first

    def step_range(self, task_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The first step of each given task, and its number of steps; all int64 [...]."""
        first = self._first_step[task_ids]
        return first, self._first_step[task_ids + 1] - first

    def episode_of(self, steps: Tensor) -> Tensor:
        """The episode of each given step; steps are int64 [...] in [0, S)."""
        return torch.searchsorted(self.starts, steps, right=True) - 1

    def gather(self, task_ids: Tensor, episodes: Tensor, times: Tensor) -> Sequence[Tensor]:
        """Gather stored steps.

        Args:
            task_ids: int64 [G], the task of each group.
            episodes: int64 [G, B], episodes of these tasks.
            times: int64 [G, B, L], steps from the beginning of the episode.

        Returns:
            Returns-to-go [G, B, L], observations [G, B, L, O] and actions [G, B, L, A], float32.
        """
        steps = self.starts[episodes][..., None] + times
        if self._table is None:
            return self._read(task_ids, steps)
        returns_to_go, observations, actions = self._table[steps].split(self._widths, -1)
        return returns_to_go.squeeze(-1), observations, actions

    def _read(self, task_ids: Tensor, steps: Tensor) -> list[Tensor]:
        """Read steps [G, B, L] in [0, S) from the tasks' arrays."""
        found = [
            torch.empty(*steps.shape, *array.shape[1:], dtype=torch.float32)
            for array in self._arrays[0]
        ]
        outs = [tensor.numpy() for tensor in found]
        rows = (steps - self._first_step[task_ids][:, None, None]).numpy()
        for group, task in enumerate(task_ids.tolist()):
            for array, out in zip(self._arrays[task], outs, strict=True):
                # With "clip", NumPy makes no second copy. It clips nothing, because every row lies
                # within the array.
                np.take(array, rows[group], axis=0, out=out[group], mode="clip")
        return found

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _make_table(self) -> Tensor:
        """All steps on the device: return-to-go, observation and action, float32 [S, 1 + O + A].

        At any time the host holds a second copy of at most one task.
        """
        counts = [len(arrays[0]) for arrays in self._arrays]
        table = torch.empty(sum(counts), sum(self._widths), device=self.device)
        for rows, arrays in zip(table.split(counts), self._arrays, strict=True):
            columns = [array.reshape(len(array), -1) for array in arrays]
            rows.copy_(torch.from_numpy(np.concatenate(columns, axis=1, dtype=np.float32)))
        return table


def open_trajectories(
    setting: Literal["auto", "cpu", "same"], data: Sequence[TaskData], device: torch.device
) -> Trajectories:
    """Open a run's training episodes, and copy them to its device if the setting says so.

    Args:
        setting: the run's `data_device`.
        data: one entry per task; index = task id.
        device: the run's device.

    Raises:
        UserError: the setting is "same", and the data do not fit into the GPU's free memory.
    """
    tasks = [task.train for task in data]
    return Trajectories(tasks, device if _copies(setting, tasks, device) else None)


def _copies(
    setting: Literal["auto", "cpu", "same"], tasks: Sequence[Episodes], device: torch.device
) -> bool:
    """Whether all steps should be copied to the device."""
    if device.type != "cuda" or setting == "cpu":
        return setting == "same"
    free, _ = torch.cuda.mem_get_info(device)
    size = 4 * sum(np.asarray(getattr(t, name)).size for t in tasks for name in _GATHERED)
    if setting == "auto":
        return size <= DEVICE_SHARE * free
    if size > free:
        raise UserError(
            f"the data take {size / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB free: leave "
            "them on disk with --data-device cpu"
        )
    return True
