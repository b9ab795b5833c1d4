"""The interface of every policy."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from ..environments import EnvironmentSpec

Sampler = Literal["ddpm", "ddim"]


class Policy(Protocol):
    """Acts in N episodes in lock-step; row n of every array belongs to episode n.

    Call `start` once. Then alternate `act`, the environments' step, and `record_rewards`. After
    `record_rewards`, call `restart` for the rows whose episodes have ended.

    Attributes:
        tasks: task names; index = task id.
        target_returns: float64 [T], the return that the policy aims at in each task.
        environment: the environments of the tasks.
        step: number of training steps after which the weights were saved.
        mask: "task" if each task has its own mask, "voted" for the mask of Eq. 13, "none" without
            masks, or the name of another mask for unseen tasks.
        unseen: for tasks that the run was not trained on, the checksum of the store with their
            prompts; otherwise None.
        backend, precision, device: names of the kernels, precision and device of its computations.
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
        """The settings of the policy's plans, by name (`PlanSettings`); None if it has no plans."""

    def use_voted_mask(self) -> None:
        """Use the mask for unseen tasks (Eq. 13) in every task, from the next `start` on.

        Raises:
            UserError: the policy has no masks.
        """

    def copy(self) -> Policy:
        """A policy with the same networks, which plays its own episodes; call its `start` first."""

    def start(
        self,
        task_ids: np.ndarray,
        seed: int = 0,
        target_returns: np.ndarray | None = None,
        part: range | None = None,
    ) -> None:
        """Begin N new episodes.

        Args:
            task_ids: int [N], the task of each row.
            seed: seed of everything that the policy draws, such as prompts.
            target_returns: float [N], unscaled, the return to aim at in each row; by default the
                target return of the row's task.
            part: the rows that this policy plays; by default all. Copies of the policy play the
                others. Every copy draws for all N rows, and uses its own draws, so draws do not
                depend on the parts. From now on, all arrays have only the rows of the part.
        """

    def restart(self, rows: np.ndarray) -> None:
        """Begin new episodes in the rows where `rows`, bool [N], is True."""

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Choose actions, float32 [N, A] in [-1, 1], after observations float [N, O]."""

    def record_rewards(self, rewards: np.ndarray) -> None:
        """Record the rewards of the last actions, float [N]. Call this once after each `act`."""
