"""The base of all trained policies: checks, target returns, and the present step."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..batch import Steps
from ..data.inputs import Inputs
from ..devices import Execution
from ..environments import EnvironmentSpec
from ..errors import UserError

Own = TypeVar("Own", bound="TrainedPolicy")


class TrainedPolicy(ABC):
    """A `Policy` of a trained network.

    This class checks every call, so a mistake in a caller's loop gives an error and not a wrong
    action. It also keeps the task, the return-to-go and the time step of each row. A subclass
    implements `_begin`, `_restart` and `_act`, which get only checked arguments.

    Args:
        inputs: turns observations into network inputs; its tasks are those of the policy.
        environment: the environments of the tasks.
        execution: the device, kernels and precision of the network.
        step: number of training steps after which the weights were saved.
    """

    def __init__(
        self, inputs: Inputs, environment: EnvironmentSpec, execution: Execution, step: int
    ):
        self.mask = "none"
        self.unseen: str | None = None
        self.environment = environment
        self.step = step
        self.tasks = tuple(task.name for task in inputs.conditioning)
        self.target_returns = np.array([task.target_return for task in inputs.conditioning])
        self.backend = execution.backend.name
        self.precision: str = execution.precision
        self.device = str(execution.device)
        self._inputs = inputs
        self._execution = execution
        self._rows: int | None = None  # N; None before `start`
        self._rewards_due = False

    @property
    def plans(self) -> dict[str, str | int | float] | None:
        """None: this policy does not plan."""
        return None

    def use_voted_mask(self) -> None:
        """Refuse: this policy has no masks to vote.

        Raises:
            UserError: always.
        """
        raise UserError("the run's algorithm has no masks to vote: leave --mask out")

    def copy(self: Own) -> Own:
        """A policy with the same networks, as `Policy.copy` says."""
        other = copy.copy(self)
        other._rows = None
        return other

    def start(
        self,
        task_ids: np.ndarray,
        seed: int = 0,
        target_returns: np.ndarray | None = None,
        part: range | None = None,
    ) -> None:
        """Begin N new episodes, as `Policy.start` says.

        Raises:
            UserError: a task id, the seed, a target return or the part is invalid.
        """
        self._rows = None
        of_all = self._checked_tasks(task_ids)
        self._all_rows = len(of_all)
        if not isinstance(seed, int | np.integer) or seed < 0:
            raise UserError(f"seed is {seed!r}: give a whole number, 0 or larger")
        targets = self.target_returns[of_all] if target_returns is None else target_returns
        targets = _checked("target_returns", targets, (self._all_rows,), np.float64)
        self._part = np.arange(self._all_rows)[_checked_part(part, self._all_rows)]
        self._task_ids, self._targets = of_all[self._part], targets[self._part]
        rows = len(self._part)
        self._returns_to_go = self._targets.copy()
        self._tasks = torch.from_numpy(self._task_ids)
        self._time = np.zeros(rows, np.int64)
        self._rewards_due = False
        self._begin(int(seed))
        self._restart(np.ones(rows, bool))
        self._rows = rows

    def restart(self, rows: np.ndarray) -> None:
        """Begin new episodes in some rows, as `Policy.restart` says.

        Raises:
            UserError: `rows` is not bool [N], or another row still waits for its reward.
        """
        count, chosen = self._started("restart"), np.asarray(rows)
        if chosen.dtype != np.bool_ or chosen.shape != (count,):
            raise UserError(
                f"rows is {chosen.dtype} of the shape {chosen.shape}: give restart an array of "
                f"bool of the shape {(count,)}, True where a new episode begins"
            )
        if not chosen.any():
            return
        if self._rewards_due and not chosen.all():
            raise UserError(
                "restart was called before the rewards of the last actions were recorded: call "
                "record_rewards first"
            )
        self._rewards_due = False
        self._returns_to_go[chosen] = self._targets[chosen]
        self._time[chosen] = 0
        self._restart(chosen)

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Choose actions, as `Policy.act` says.

        Raises:
            UserError: `start` was not called, the last rewards were not recorded, or the
                observations have another shape, or hold NaN or infinity.
        """
        shape = self._started("act"), self.environment.observation_size
        if self._rewards_due:
            raise UserError(
                "act was called twice without record_rewards in between: call record_rewards with "
                "the rewards of each action"
            )
        seen = _checked("observations", observations, shape, np.float32)
        actions = self._act(seen)
        self._time += 1
        self._rewards_due = True
        return actions

    def record_rewards(self, rewards: np.ndarray) -> None:
        """Lower each row's return-to-go by its reward, as `Policy.record_rewards` says.

        Raises:
            UserError: `act` was not called since the last rewards, or the rewards have another
                shape, or hold NaN or infinity.
        """
        count = self._started("record_rewards")
        if not self._rewards_due:
            raise UserError(
                "record_rewards was called, but no action waits for its reward: call it once after "
                "each act"
            )
        self._returns_to_go -= _checked("rewards", rewards, (count,), np.float64)
        self._rewards_due = False

    @abstractmethod
    def _begin(self, seed: int) -> None:
        """Prepare for the tasks of the new rows, `self._tasks`. `start` calls `_restart` next.

        Args:
            seed: seed of everything that the policy draws.
        """

    @abstractmethod
    def _restart(self, rows: np.ndarray) -> None:
        """Clear the histories where `rows`, bool [N], is True; at least one row is True."""

    @abstractmethod
    def _act(self, observations: np.ndarray) -> np.ndarray:
        """Choose actions, float32 [N, A] in [-1, 1], after observations float32 [N, O]."""

    def _draw_for(self, rows: np.ndarray, draw: Callable[[int], Tensor]) -> Tensor:
        """Draw random numbers for some rows; draw also for all rows of other parts, and drop those.

        So a row gets the same numbers whatever the parts are, while all rows begin together.

        Args:
            rows: bool [n], the rows of this part that need numbers.
            draw: draws numbers for a number of rows, [rows, ...].
        """
        needed = np.ones(self._all_rows, bool)
        needed[self._part] = rows
        places = needed.cumsum()[self._part[rows]] - 1
        return draw(int(needed.sum()))[torch.from_numpy(places)]

    def _present(self, observations: np.ndarray) -> Steps:
        """The present step of every row as the network reads it, [N, ...], on the CPU."""
        rows = len(observations)
        return self._inputs.steps(
            self._tasks,
            torch.from_numpy(self._returns_to_go),
            torch.from_numpy(observations),
            torch.zeros(rows, self.environment.action_size),  # not chosen yet
            torch.from_numpy(self._time),
            torch.ones(rows, dtype=torch.bool),
        )

    def _started(self, method: str) -> int:
        """Return N, the number of rows.

        Raises:
            UserError: `start` was not called before the method.
        """
        if self._rows is None:
            raise UserError(f"{method} was called before start: call start(task_ids) first")
        return self._rows

    def _checked_tasks(self, task_ids: Any) -> np.ndarray:
        """Return task ids as int64 [N].

        Raises:
            UserError: they are not an array of ids of the policy's tasks.
        """
        ids = np.asarray(task_ids)
        if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
            raise UserError(
                f"task_ids is {ids.dtype} of the shape {ids.shape}: give one whole number for each "
                "episode; policy.tasks.index(NAME) returns the number of a task"
            )
        unknown = ids[(ids < 0) | (ids >= len(self.tasks))]
        if unknown.size:
            raise UserError(
                f"there is no task {unknown[0]}: the policy's tasks are 0 to {len(self.tasks) - 1}"
            )
        return ids.astype(np.int64)


def _checked_part(part: range | None, rows: int) -> slice:
    """Return a part of the rows as a slice.

    Raises:
        UserError: it is not a range of adjacent rows.
    """
    if part is None:
        return slice(0, rows)
    if part.step != 1 or not 0 <= part.start < part.stop <= rows:
        raise UserError(f"part is {part}: give a range of adjacent rows from 0 to {rows - 1}")
    return slice(part.start, part.stop)


def _checked(name: str, values: Any, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Return numbers as an array of a dtype.

    Raises:
        UserError: the values are not numbers, have another shape, or contain NaN or infinity.
    """
    try:
        array: np.ndarray = np.asarray(values, dtype)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{name} is not an array of numbers ({error}): give numbers of the shape {shape}"
        ) from error
    if array.shape != shape:
        raise UserError(
            f"{name} has the shape {array.shape}: give the shape {shape}, one row for each episode"
        )
    finite = np.isfinite(array)
    if not finite.all():
        row = np.argwhere(~finite)[0, 0]
        raise UserError(f"{name} holds NaN or infinity in row {row}: give finite numbers")
    return array
