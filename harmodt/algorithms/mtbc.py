"""MTBC: behaviour cloning of all tasks' data by one multilayer perceptron.

The papers that list it give a number of parameters and no architecture: what is here is chosen, and
for Meta-World's 50 tasks it has 1.75 M parameters (the HarmoDT paper's Table 1: 1.74 M), or 1.73 M
with a head for each task and `--hidden-size 872`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..batch import Batch
from ..data.store import TaskData
from .learner import Setup
from .mlp import POLICY, MLPLearner, MLPSettings, build_actor


@dataclass(frozen=True)
class MTBCSettings(MLPSettings):
    """MTBC: an MLP that imitates the data's actions."""


class MTBCLearner(MLPLearner):
    """Regresses on the actions of single steps."""

    def __init__(self, setup: Setup, data: Sequence[TaskData]):
        super().__init__(setup, data, {POLICY: build_actor(setup)}, window=1)

    def losses(self, batch: Batch, actions: Tensor) -> Tensor:
        """Mean squared error on the actions, that of the sequence models (Eq. 2), [G]."""
        chosen = self.networks[POLICY](batch.history.observations[:, :, 0], batch.task_ids)
        return (chosen - actions[:, :, 0]).square().mean((1, 2))
