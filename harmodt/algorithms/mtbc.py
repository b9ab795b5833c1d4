"""MTBC: behaviour cloning of all tasks' data by one multilayer perceptron.

The papers that list it give a number of parameters and no architecture. The one here was chosen: it
has 1.75 M parameters for Meta-World's 50 tasks (the HarmoDT paper's Table 1: 1.74 M), or 1.73 M
with a head for each task and `--hidden-size 872`.
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
    """Regresses on the actions of single steps."""

    def losses(self, batch: Batch, targets: Tensor, *extra: Tensor) -> Tensor:
        """Mean squared error on the actions, as the sequence models have it (Eq. 2), [G]."""
        chosen = self.actor(batch.history.observations[:, :, 0], batch.task_ids)
        return (chosen - targets[:, :, 0]).square().mean((1, 2))
