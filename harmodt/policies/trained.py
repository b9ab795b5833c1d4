"""What the policies of all algorithms have in common."""

from __future__ import annotations

import numpy as np

from ..data.inputs import Inputs
from ..devices import Execution
from ..environments import EnvironmentSpec
from ..errors import UserError


class TrainedPolicy:
    """A trained network's tasks, and where it computes: the attributes of a `Policy`.

    Args:
        inputs: of the tasks; index = task id.
        environment: what the tasks are tasks of.
        execution: where and how the network computes.
        step: training steps of the weights.
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

    @property
    def plans(self) -> dict[str, str | int | float] | None:
        """How they are drawn, by the names of `PlanSettings`, if the policy plans."""
        return None

    def use_voted_mask(self) -> None:
        """Refuse: there are no masks to vote.

        Raises:
            UserError: always.
        """
        raise UserError("the run's algorithm has no masks to vote: leave --mask out")
