"""A policy that reads only the present observation."""

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

    It makes no random draws, so the seed has no effect.

    Args:
        actor: the network, on its device.
        inputs, environment, execution, step: as in `TrainedPolicy`.
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

    def _begin(self, seed: int) -> None:
        """Refuse other target returns, because the network reads none.

        Raises:
            UserError: a target return differs from the target return of the row's task.
        """
        if not np.array_equal(self._targets, self.target_returns[self._task_ids]):
            raise UserError("the run's algorithm reads no target return: leave --target-return out")

    def _restart(self, rows: np.ndarray) -> None:
        """Do nothing, because this policy keeps no history."""

    def _act(self, observations: np.ndarray) -> np.ndarray:
        normalised = self._inputs.normalise(self._tasks, torch.from_numpy(observations))
        present, tasks = move([normalised, self._tasks], self._execution.device)
        with torch.inference_mode(), self._execution.computing():
            return self.actor(present[:, None], tasks)[:, 0].cpu().numpy()
