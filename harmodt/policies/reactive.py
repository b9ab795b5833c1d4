"""A network as a policy that acts on the present observation alone."""

from __future__ import annotations

import numpy as np
import torch

from ..batch import move
from ..data.inputs import Inputs
from ..devices import Execution
from ..environments import EnvironmentSpec
from ..errors import UserError
from ..networks.task_mlp import Actor
from .trained import TrainedPolicy


class ReactivePolicy(TrainedPolicy):
    """Acts in N episodes in lock-step, without history, prompt or return; a `Policy`.

    Args:
        actor: the network, on its device.
        inputs: of the tasks; index = task id.
        environment: what the tasks are tasks of.
        execution: where and how the network computes.
        step: training steps of the weights.
    """

    def __init__(
        self,
        actor: Actor,
        inputs: Inputs,
        environment: EnvironmentSpec,
        execution: Execution,
        step: int = 0,
    ):
        super().__init__(inputs, environment, execution, step)
        self.actor = actor

    def start(
        self, task_ids: np.ndarray, seed: int = 0, target_returns: np.ndarray | None = None
    ) -> None:
        """Begin N new episodes.

        Args:
            task_ids: int [N], the task of each row.
            seed: of nothing: no number is drawn.
            target_returns: float [N], those of the tasks if given.

        Raises:
            UserError: another return is asked for.
        """
        known = self.target_returns[task_ids]
        if target_returns is not None and not np.array_equal(target_returns, known):
            raise UserError(
                "the run's algorithm cannot be asked for a return: leave --target-return out"
            )
        self._tasks = torch.from_numpy(np.asarray(task_ids).astype(np.int64))

    def restart(self, rows: np.ndarray) -> None:
        """Begin new episodes in some rows, bool [N]: nothing of the old ones is remembered."""

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Choose actions, float32 [N, A] in [-1, 1], after observations float [N, O]."""
        rows = torch.from_numpy(np.asarray(observations, np.float32))
        normalised = self._inputs.normalise(self._tasks, rows)
        present, tasks = move([normalised, self._tasks], self._execution.device)
        with torch.inference_mode(), self._execution.computing():
            return self.actor(present[:, None], tasks)[:, 0].cpu().numpy()

    def record_rewards(self, rewards: np.ndarray) -> None:
        """Take in the rewards of the last actions, float [N], which change nothing."""
