"""The episodes of several tasks as tensors, so that windows of all tasks are gathered at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .repeats import CompactObservations, Repeats, find_repeats
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
        repeats: of their observations, which are copied without them; None copies them as they are.

    Attributes:
        place: as above.
        device: of everything that is returned.
        first_episode: int64 [T + 1], the first episode of each task, then E.
        starts: int64 [E + 1], the first step of each episode, then S.
        lengths: int64 [E].
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
        self._first_step = self.starts[self.first_episode]
        arrays = {name: [np.asarray(getattr(task, name)) for task in tasks] for name in _GATHERED}
        self._arrays = list(zip(*arrays.values(), strict=True))
        self._whole: list[Tensor | CompactObservations] | None = None
        if place is not None:
            self._whole = [
                CompactObservations(tasks, repeats, place)
                if repeats is not None and name == "observations"
                else self._copied(parts)
                for name, parts in arrays.items()
            ]
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

    def gather(self, task_ids: Tensor, episodes: Tensor, times: Tensor) -> list[Tensor]:
        """What is stored of some steps.

        Args:
            task_ids: int64 [G], whose they are.
            episodes: int64 [G, B], of these tasks.
            times: int64 [G, B, L], steps from the beginning of the episode.

        Returns:
            Returns-to-go [G, B, L], observations [G, B, L, O] and actions [G, B, L, A], float32.
        """
        steps = self.starts[episodes][..., None] + times
        if self._whole is None:
            return self._read(task_ids, steps)
        return [
            array.gather(steps, episodes[..., None])
            if isinstance(array, CompactObservations)
            else array[steps]
            for array in self._whole
        ]

    def _read(self, task_ids: Tensor, steps: Tensor) -> list[Tensor]:
        """What `gather` returns, of steps [G, B, L] in [0, S), from where the arrays are."""
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

    def _copied(self, parts: Sequence[np.ndarray]) -> Tensor:
        """The arrays of all tasks as one tensor; of one task at a time there is a second copy."""
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        whole = torch.empty(shape, dtype=torch.float32, device=self.device)
        for to, part in zip(whole.split([len(part) for part in parts]), parts, strict=True):
            to.copy_(torch.from_numpy(np.array(part)))
        return whole


def lay_out(
    setting: Literal["auto", "cpu", "same"], data: Sequence[TaskData], device: torch.device
) -> Trajectories:
    """The training episodes of a run's data, where they are to lie.

    Args:
        setting: `data_device` of the run.
        device: of the run.

    Raises:
        UserError: "same", and they do not fit into the free memory of that GPU.
    """
    tasks = [task.train for task in data]
    return Trajectories(tasks, *choose_place(setting, tasks, device))


def choose_place(
    setting: Literal["auto", "cpu", "same"], tasks: Sequence[Episodes], device: torch.device
) -> tuple[torch.device | None, Repeats | None]:
    """Where data lie, and what of their observations is left out there, as `Trajectories` takes it.

    It is left out where they would not fit otherwise. Settings and errors are those of `lay_out`.
    """
    if setting == "cpu" or (setting == "auto" and device.type != "cuda"):
        return None, None
    if device.type != "cuda":
        return device, None
    free, _ = torch.cuda.mem_get_info(device)
    room = free * (1 if setting == "same" else DEVICE_SHARE)
    others = sum(_nbytes(tasks, name) for name in _GATHERED if name != "observations")
    if others + _nbytes(tasks, "observations") <= room:
        return device, None
    repeats = find_repeats(tasks)
    needed = others + repeats.nbytes(tasks)
    if needed <= room:
        return device, repeats
    if setting == "same":
        raise UserError(
            f"the data take {needed / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB free: "
            "leave them on disk with --data-device cpu"
        )
    return None, None


def _nbytes(tasks: Sequence[Episodes], name: str) -> int:
    return sum(getattr(task, name).nbytes for task in tasks)
