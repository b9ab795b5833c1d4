"""MTBC: one multilayer perceptron clones the behaviour in the data of all tasks.

The papers that list MTBC state its number of parameters, but not its architecture. This project
chose one: it has 1.75 M parameters for Meta-World's 50 tasks (the HarmoDT paper's Table 1: 1.74 M),
or 1.73 M with a head for each task and `--hidden-size 872`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..batch import Batch
from .mlp import MLPLearner, MLPSettings


@dataclass(frozen=True)
class MTBCSettings(MLPSettings):
    """MTBC: an MLP that imitates the data's actions."""


class MTBCLearner(MLPLearner[MTBCSettings]):
    """Trains the policy by regression on the actions of single steps."""

    def losses(self, batch: Batch, targets: Tensor, *extra: Tensor) -> Tensor:
        """Mean squared error on the actions, as for the sequence models (Eq. 2), [G]."""
        chosen = self.actor(batch.history.observations[:, :, 0], batch.task_ids)
        return (chosen - targets[:, :, 0]).square().mean((1, 2))
