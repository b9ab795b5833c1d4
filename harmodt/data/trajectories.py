"""The episodes of several tasks as tensors, so that windows of all tasks are gathered at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .repeats import CompactSteps, Repeats, columns_of, find_repeats
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
        repeats: of these tasks, which a copy is to be without; None copies steps as they are.

    Attributes:
        place: as above.
        device: of everything that is returned.
        first_episode: int64 [T + 1], the first episode of each task, then E.
        starts: int64 [E + 1], the first step of each episode, then S.
        lengths: int64 [E].
        terminated: int8 [E], as in `Episodes`.
    """

    def __init__(
        self,
        tasks: Sequence[Episodes],
        place: torch.device | None = None,
        repeats: Repeats | None = None,
    ):
        self.place = place
        self.device = place or torch.device("cpu")
        lengths = np.concatenate([np.zeros(0, np.int64), *(task.lengths for task in tasks)])
        counts = [len(task) for task in tasks]
        self.first_episode = self._tensor(np.cumsum([0, *counts]))
        self.starts = self._tensor(np.cumsum([0, *lengths]))
        self.lengths = self._tensor(lengths)
        self.terminated = self._tensor(np.concatenate([task.terminated for task in tasks]))
        self._first_step = self.starts[self.first_episode]
        self._arrays = [[np.asarray(getattr(task, name)) for name in _GATHERED] for task in tasks]
        self._widths = [int(np.prod(array.shape[1:])) for array in self._arrays[0]]
        self._steps: Tensor | CompactSteps | None = None
        if place is not None:
            self._steps = CompactSteps(tasks, repeats, place) if repeats else self._copied(tasks)
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

    def gather(self, task_ids: Tensor, episodes: Tensor, times: Tensor) -> Sequence[Tensor]:
        """What is stored of some steps.

        Args:
            task_ids: int64 [G], whose they are.
            episodes: int64 [G, B], of these tasks.
            times: int64 [G, B, L], steps from the beginning of the episode.

        Returns:
            Returns-to-go [G, B, L], observations [G, B, L, O] and actions [G, B, L, A], float32.
        """
        steps = self.starts[episodes][..., None] + times
        if self._steps is None:
            return self._read(task_ids, steps)
        columns = (
            self._steps[steps]
            if isinstance(self._steps, Tensor)
            else self._steps.gather(steps, episodes[..., None])
        )
        returns_to_go, observations, actions = columns.split(self._widths, -1)
        return returns_to_go.squeeze(-1), observations, actions

    def _read(self, task_ids: Tensor, steps: Tensor) -> list[Tensor]:
        """What `gather` returns, of steps [G, B, L] in [0, S), from the arrays where they are."""
        found = [
            torch.empty(*steps.shape, *array.shape[1:], dtype=torch.float32)
            for array in self._arrays[0]
        ]
        places = [tensor.numpy() for tensor in found]
        indices = (steps - self._first_step[task_ids][:, None, None]).numpy()
        for group, task in enumerate(task_ids.tolist()):
            for array, out in zip(self._arrays[task], places, strict=True):
                # the mode spares a second copy; no index lies outside
                np.take(array, indices[group], axis=0, out=out[group], mode="clip")
        return found

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _copied(self, tasks: Sequence[Episodes]) -> Tensor:
        """All steps as `columns_of` has them; of one task at a time there is a second copy."""
        counts = [len(task.observations) for task in tasks]
        steps = torch.empty(sum(counts), sum(self._widths), device=self.device)
        for to, task in zip(steps.split(counts), tasks, strict=True):
            to.copy_(torch.from_numpy(columns_of(task)))
        return steps


def lay_out(
    setting: Literal["auto", "cpu", "same"], data: Sequence[TaskData], device: torch.device
) -> Trajectories:
    """The training episodes of a run's data, where they are to lie.

    Args:
        setting: `data_device` of the run.
        data: one entry per task; index = task id.
        device: of the run.

    Raises:
        UserError: "same", and they do not fit into the free memory of that GPU.
    """
    tasks = [task.train for task in data]
    return Trajectories(tasks, *choose_place(setting, tasks, device))


def choose_place(
    setting: Literal["auto", "cpu", "same"], tasks: Sequence[Episodes], device: torch.device
) -> tuple[torch.device | None, Repeats | None]:
    """Where data lie, and what repeats in them and is left out there, as `Trajectories` takes it.

    It is left out where they take more than their share of the free memory as they are. Arguments
    and errors are those of `lay_out`.
    """
    if setting == "cpu" or (setting == "auto" and device.type != "cuda"):
        return None, None
    if device.type != "cuda":
        return device, None
    free, _ = torch.cuda.mem_get_info(device)
    size = sum(getattr(task, name).nbytes for task in tasks for name in _GATHERED)
    if size <= DEVICE_SHARE * free:
        return device, None
    repeats = find_repeats(tasks, free if setting == "same" else DEVICE_SHARE * free)
    if repeats is not None:
        return device, repeats
    if setting == "same":
        raise UserError(
            f"the data take {size / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB free, too "
            "little even without what repeats in them: leave them on disk with --data-device cpu"
        )
    return None, None
