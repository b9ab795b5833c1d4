"""Observations without what they repeat, for data that a device has no room for as they are.

Half of a Meta-World observation is the one of the step before, and its goal is the same through an
episode. What repeats is found in the data, bit for bit; no environment is known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .store import Episodes

_SAMPLE = 256  # steps of each task that rule out most pairs of dimensions


@dataclass(frozen=True)
class Repeats:
    """The dimensions of observations by what must be stored of them.

    Attributes:
        stored: those that are stored for each step.
        previous: has for a dimension the stored one whose value, a step earlier, is its own; no two
            have the same.
        constant: those that stay the same through every episode.
    """

    stored: tuple[int, ...]
    previous: dict[int, int]
    constant: tuple[int, ...]

    def nbytes(self, tasks: Sequence[Episodes]) -> int:
        """What `CompactObservations` takes."""
        episodes = sum(map(len, tasks))
        rows = sum(len(task.observations) for task in tasks) + episodes
        return 4 * (rows * len(self.stored) + episodes * len(self.constant))


def find_repeats(tasks: Sequence[Episodes]) -> Repeats:
    """What repeats in all episodes of all tasks, bit for bit; it reads all observations once."""
    size = tasks[0].observations.shape[1]
    follows = np.ones((size, size), dtype=bool)  # [d, i]: d has i's value of the step before
    for task in tasks:
        _rule_out(follows, task)
    constant = tuple(np.flatnonzero(follows.diagonal()).tolist())
    previous: dict[int, int] = {}
    for dimension in range(size):
        taken = {*constant, *previous, *previous.values()}
        sources = [i for i in np.flatnonzero(follows[dimension]).tolist() if i not in taken]
        if dimension not in taken and sources:
            previous[dimension] = sources[0]
    stored = tuple(d for d in range(size) if d not in constant and d not in previous)
    return Repeats(stored, previous, constant)


def _rule_out(follows: np.ndarray, task: Episodes) -> None:
    """Strike out, in bool [O, O], what does not hold in a task's episodes."""
    observations = np.ascontiguousarray(task.observations, np.float32).view(np.int32)
    later = np.ones(len(observations), dtype=bool)
    later[task.episode_starts[:-1]] = False
    some = np.flatnonzero(later)[:_SAMPLE]
    follows &= (observations[some][:, :, None] == observations[some - 1][:, None, :]).all(0)
    columns = np.ascontiguousarray(observations.T)
    for dimension, source in np.argwhere(follows).tolist():
        same = columns[dimension, 1:] == columns[source, :-1]
        follows[dimension, source] = (same | ~later[1:]).all()


class CompactObservations:
    """The observations of several tasks' episodes on a device, without what they repeat.

    In front of each episode is a row of what its first step has of the step before, so that a
    dimension's place is a linear function of the row and the episode.

    Args:
        tasks: as in `Trajectories`.
        repeats: of these tasks.
        device: that they are copied to.
    """

    def __init__(self, tasks: Sequence[Episodes], repeats: Repeats, device: torch.device):
        rows, episodes = [len(t.observations) + len(t) for t in tasks], [len(t) for t in tasks]
        end = sum(rows) * len(repeats.stored)
        self._values = torch.empty(repeats.nbytes(tasks) // 4, device=device)
        of_rows = self._values[:end].view(sum(rows), len(repeats.stored))
        constants = self._values[end:].view(sum(episodes), len(repeats.constant))
        places = zip(tasks, of_rows.split(rows), constants.split(episodes), strict=True)
        for task, there, constants_there in places:
            there.copy_(torch.from_numpy(_rows(task, repeats)))
            first = task.observations[task.episode_starts[:-1]]
            constants_there.copy_(torch.from_numpy(first[:, list(repeats.constant)]))
        (self._of_row, self._of_episode), self._offsets = _places(repeats, end, device)

    def gather(self, steps: Tensor, episodes: Tensor) -> Tensor:
        """Observations of some steps.

        Args:
            steps, episodes: int64 [...], each step's place among all and its episode's.

        Returns:
            float32 [..., O].
        """
        rows, episodes = (steps + episodes + 1)[..., None], episodes[..., None]
        return self._values[rows * self._of_row + episodes * self._of_episode + self._offsets]


def _rows(task: Episodes, repeats: Repeats) -> np.ndarray:
    """A task's steps, with a row in front of each episode: float32 [S + E, stored]."""
    observations, first = task.observations, task.episode_starts[:-1]
    in_front = first + np.arange(len(task))
    rows = np.zeros((len(observations) + len(task), len(repeats.stored)), np.float32)
    of_steps = np.ones(len(rows), dtype=bool)
    of_steps[in_front] = False
    rows[of_steps] = observations[:, list(repeats.stored)]
    for dimension, source in repeats.previous.items():
        rows[in_front, repeats.stored.index(source)] = observations[first, dimension]
    return rows


def _places(repeats: Repeats, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each dimension the strides of rows and episodes, int64 [2, O], and the offset, [O].

    Args:
        end: of the rows, where constants begin.
    """
    width, constants = len(repeats.stored), len(repeats.constant)
    size = width + len(repeats.previous) + constants
    strides, offsets = np.zeros((2, size), np.int64), np.zeros(size, np.int64)
    for column, dimension in enumerate(repeats.stored):
        strides[:, dimension], offsets[dimension] = (width, 0), column
    for dimension, source in repeats.previous.items():
        strides[:, dimension] = (width, 0)
        offsets[dimension] = repeats.stored.index(source) - width
    for column, dimension in enumerate(repeats.constant):
        strides[:, dimension], offsets[dimension] = (0, constants), end + column
    return torch.from_numpy(strides).to(device), torch.from_numpy(offsets).to(device)
