"""What acts in environments: the interface of every policy."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from ..environments import EnvironmentSpec

Sampler = Literal["ddpm", "ddim"]


class Policy(Protocol):
    """Acts in N episodes in lock-step.

    Attributes:
        tasks: task names; index = task id.
        target_returns: float64 [T], the return asked for in each task.
        environment: what its tasks are tasks of.
        step: training steps of its weights.
        mask: "task" if each task has its own mask, "voted" for that of Eq. 13, "none" without, or
            another that unseen tasks are met under.
        unseen: where the tasks were not trained on, the checksum of the store of their prompts.
        backend, precision, device: where and how it computes, by name.
    """

    tasks: tuple[str, ...]
    target_returns: np.ndarray
    environment: EnvironmentSpec
    step: int
    mask: str
    unseen: str | None
    backend: str
    precision: str
    device: str

    @property
    def plans(self) -> dict[str, str | int | float] | None:
        """How they are drawn, by the names of `PlanSettings`, if it plans."""

    def use_voted_mask(self) -> None:
        """Act in every task under the mask for unseen tasks (Eq. 13).

        Raises:
            UserError: there are no masks to vote.
        """

    def start(
        self, task_ids: np.ndarray, seed: int = 0, target_returns: np.ndarray | None = None
    ) -> None:
        """Begin N new episodes.

        Args:
            task_ids: int [N], the task of each row.
            seed: of what the policy draws.
            target_returns: float [N], unscaled; by default each task's.
        """

    def restart(self, rows: np.ndarray) -> None:
        """Begin new episodes in the rows where `rows`, bool [N], is True."""

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Choose actions, float32 [N, A] in [-1, 1], after observations float [N, O]."""

    def record_rewards(self, rewards: np.ndarray) -> None:
        """Take in the rewards of the last actions, float [N]."""
