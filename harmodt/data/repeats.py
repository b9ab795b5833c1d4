"""Steps without what their numbers repeat, for data that a device has no room for as they are.

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

_SAMPLE = 256  # steps of each task that rule out most pairs of columns


@dataclass(frozen=True)
class Repeats:
    """The columns of `columns_of` by what must be stored of them.

    Attributes:
        stored: those that are stored for each step.
        previous: has for a column the stored one whose number, a step earlier, is its own; no two
            have the same.
        constant: those that stay the same through every episode.
    """

    stored: tuple[int, ...]
    previous: dict[int, int]
    constant: tuple[int, ...]

    def nbytes(self, tasks: Sequence[Episodes]) -> int:
        """What `CompactSteps` takes."""
        episodes = sum(map(len, tasks))
        rows = sum(len(task.observations) for task in tasks) + episodes
        return 4 * (rows * len(self.stored) + episodes * len(self.constant))


def columns_of(task: Episodes, steps: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Return-to-go, observation and action of steps side by side, float32 [n, 1 + O + A]."""
    arrays = (task.returns_to_go[steps][:, None], task.observations[steps], task.actions[steps])
    return np.concatenate(arrays, axis=1, dtype=np.float32)


def find_repeats(tasks: Sequence[Episodes], room: float = np.inf) -> Repeats | None:
    """What repeats in all episodes of all tasks, bit for bit.

    Args:
        tasks: one or more, whose episodes have a step at least.
        room: bytes for what is left. Where the first steps of each task show that there is too
            little, the others are not read; else all are, once.

    Returns:
        None where what is left takes more than the room.
    """
    size = columns_of(tasks[0], slice(1)).shape[1]
    follows = np.ones((size, size), dtype=bool)  # [d, i]: d has i's number of the step before
    for task in tasks:
        some = np.flatnonzero(_is_later(task))[:_SAMPLE]
        now, before = (columns_of(task, steps).view(np.int32) for steps in (some, some - 1))
        follows &= (now[:, :, None] == before[:, None, :]).all(0)
    if _partition(follows).nbytes(tasks) > room:
        return None
    for task in tasks:
        columns = np.ascontiguousarray(columns_of(task).T).view(np.int32)
        first = ~_is_later(task)[1:]
        for column, source in np.argwhere(follows).tolist():
            same = columns[column, 1:] == columns[source, :-1]
            follows[column, source] = (same | first).all()
    repeats = _partition(follows)
    return repeats if repeats.nbytes(tasks) <= room else None


def _is_later(task: Episodes) -> np.ndarray:
    """Whether a step is not the first of its episode, bool [S]."""
    later = np.ones(len(task.observations), dtype=bool)
    later[task.episode_starts[:-1]] = False
    return later


def _partition(follows: np.ndarray) -> Repeats:
    """The columns by what must be stored, from what follows what, bool [W, W]."""
    constant = tuple(np.flatnonzero(follows.diagonal()).tolist())
    previous: dict[int, int] = {}
    for column, sources in enumerate(follows):
        taken = {*constant, *previous, *previous.values()}
        free = [source for source in np.flatnonzero(sources).tolist() if source not in taken]
        if column not in taken and free:
            previous[column] = free[0]
    rest = set(range(len(follows))) - {*constant, *previous}
    return Repeats(tuple(sorted(rest)), previous, constant)


class CompactSteps:
    """The steps of several tasks' episodes on a device, without what they repeat.

    In front of each episode is a row of what its first step has of the step before, so that where a
    number lies is a linear function of the row and the episode.

    Args:
        tasks: as in `Trajectories`.
        repeats: of these tasks.
        device: that they are copied to.
    """

    def __init__(self, tasks: Sequence[Episodes], repeats: Repeats, device: torch.device):
        rows, episodes = [len(t.observations) + len(t) for t in tasks], [len(t) for t in tasks]
        end = sum(rows) * len(repeats.stored)
        self._numbers = torch.empty(repeats.nbytes(tasks) // 4, device=device)
        by_row = self._numbers[:end].view(sum(rows), len(repeats.stored)).split(rows)
        by_episode = self._numbers[end:].view(sum(episodes), len(repeats.constant)).split(episodes)
        for task, rows_there, constants_there in zip(tasks, by_row, by_episode, strict=True):
            rows_there.copy_(torch.from_numpy(_rows(task, repeats)))
            constants = columns_of(task, task.episode_starts[:-1])[:, list(repeats.constant)]
            constants_there.copy_(torch.from_numpy(constants))
        linear = torch.from_numpy(_linear(repeats, end)).to(device)
        self._of_row, self._of_episode, self._offset = linear

    def gather(self, steps: Tensor, episodes: Tensor) -> Tensor:
        """The columns of some steps.

        Args:
            steps, episodes: int64, which step among all, [...], and which episode's, of a shape
                that broadcasts to it.

        Returns:
            float32 [..., 1 + O + A], as of `columns_of`.
        """
        of_episodes = self._offset.addcmul(episodes[..., None], self._of_episode)
        return self._numbers[of_episodes.addcmul((steps + episodes)[..., None], self._of_row)]


def _rows(task: Episodes, repeats: Repeats) -> np.ndarray:
    """A task's steps, with a row in front of each episode: float32 [S + E, stored]."""
    first = task.episode_starts[:-1]
    in_front = first + np.arange(len(task))
    rows = np.zeros((len(task.observations) + len(task), len(repeats.stored)), np.float32)
    is_step = np.ones(len(rows), dtype=bool)
    is_step[in_front] = False
    rows[is_step] = columns_of(task)[:, list(repeats.stored)]
    at_start = columns_of(task, first)
    for column, source in repeats.previous.items():
        rows[in_front, repeats.stored.index(source)] = at_start[:, column]
    return rows


def _linear(repeats: Repeats, end: int) -> np.ndarray:
    """Where a column's number lies: what of step + episode, what of the episode, and an offset.

    Args:
        end: of the rows, where constants begin.

    Returns:
        int64 [3, 1 + O + A].
    """
    width, constants = len(repeats.stored), len(repeats.constant)
    linear = np.zeros((3, width + len(repeats.previous) + constants), np.int64)
    for at, column in enumerate(repeats.stored):
        linear[:, column] = width, 0, width + at  # after the episode's row in front
    for column, source in repeats.previous.items():
        linear[:, column] = width, 0, repeats.stored.index(source)
    for at, column in enumerate(repeats.constant):
        linear[:, column] = 0, constants, end + at
    return linear
