"""The episodes of several tasks as tensors, so that windows of all tasks are gathered at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .store import Episodes, TaskData

DEVICE_SHARE = 0.5
"""Data go onto a GPU by themselves if they take no more than this share of its free memory."""

_GATHERED = ("returns_to_go", "observations", "actions")


class Trajectories:
    """Episodes of T tasks, numbered through; E episodes of S steps in all.

    Args:
        tasks: one entry per task; index = task id.
        place: a device that all steps are copied to, or None: they are read where they are, which
            may be a memory-mapped file, and go to the CPU.

    Attributes:
        device: of everything that is returned.
        first_episode: int64 [T + 1], the first episode of each task, then E.
        starts: int64 [E + 1], the first step of each episode, then S.
        lengths: int64 [E].
    """

    def __init__(self, tasks: Sequence[Episodes], place: torch.device | None = None):
        self.device = place or torch.device("cpu")
        lengths = np.concatenate([np.zeros(0, np.int64), *(task.lengths for task in tasks)])
        counts = [len(task) for task in tasks]
        self.first_episode = self._tensor(np.cumsum([0, *counts]))
        self.starts = self._tensor(np.cumsum([0, *lengths]))
        self.lengths = self._tensor(lengths)
        self._first_step = self.starts[self.first_episode]
        self._arrays = [[np.asarray(getattr(task, name)) for name in _GATHERED] for task in tasks]
        self._whole: list[Tensor] | None = None
        if place is not None:
            self._whole = [self._copied(parts) for parts in zip(*self._arrays, strict=True)]
            self._arrays = []

    def episode_range(self, task_ids: Tensor) -> tuple[Tensor, Tensor]:
        """First episodes of some tasks, int64 [...], and their numbers of episodes, [...]."""
        first = self.first_episode[task_ids]
        return first, self.first_episode[task_ids + 1] - first

    def step_range(self, task_ids: Tensor) -> tuple[Tensor, Tensor]:
        """First step of each of some tasks, int64 [...], and their numbers of steps, [...]."""
        first = self._first_step[task_ids]
        return first, self._first_step[task_ids + 1] - first

    def episode_of(self, steps: Tensor) -> Tensor:
        """The episode that each of some steps, int64 [...] in [0, S), is of."""
        return torch.searchsorted(self.starts, steps, right=True) - 1

    def gather(self, task_ids: Tensor, steps: Tensor) -> list[Tensor]:
        """What is stored of some steps.

        Args:
            task_ids: int64 [G], whose they are.
            steps: int64 [G, ...] in [0, S).

        Returns:
            Returns-to-go [G, ...], observations [G, ..., O] and actions [G, ..., A], float32.
        """
        if self._whole is not None:
            return [array[steps] for array in self._whole]
        found = [
            torch.empty(*steps.shape, *array.shape[1:], dtype=torch.float32)
            for array in self._arrays[0]
        ]
        places = [tensor.numpy() for tensor in found]
        first = self._first_step[task_ids].view(-1, *[1] * (steps.dim() - 1))
        indices = (steps - first).numpy()
        for group, task in enumerate(task_ids.tolist()):
            for array, out in zip(self._arrays[task], places, strict=True):
                # the mode spares a second copy; no index lies outside
                np.take(array, indices[group], axis=0, out=out[group], mode="clip")
        return found

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _copied(self, parts: Sequence[np.ndarray]) -> Tensor:
        """The arrays of all tasks as one tensor; of one task at a time there is a second copy."""
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        whole = torch.empty(shape, dtype=torch.float32, device=self.device)
        for to, part in zip(whole.split([len(part) for part in parts]), parts, strict=True):
            to.copy_(torch.from_numpy(np.array(part)))
        return whole


def choose_place(
    setting: Literal["auto", "cpu", "same"], data: Sequence[TaskData], device: torch.device
) -> torch.device | None:
    """Where the data of a run lie, as `Trajectories` takes it.

    Args:
        setting: `data_device` of the run.
        device: of the run.

    Raises:
        UserError: "same", and they do not fit into the free memory of that GPU.
    """
    if setting == "cpu" or (setting == "auto" and device.type != "cuda"):
        return None
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    needed = sum(getattr(task.train, name).nbytes for task in data for name in _GATHERED)
    if setting == "same" and needed > free:
        raise UserError(
            f"the data take {needed / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB free: "
            "leave them on disk with --data-device cpu"
        )
    return device if setting == "same" or needed <= DEVICE_SHARE * free else None
