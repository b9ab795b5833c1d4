"""What acts: the interface that every policy implements."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..environments import EnvironmentSpec


class Policy(Protocol):
    """Acts in N episodes in lock-step."""

    tasks: tuple[str, ...]
    target_returns: np.ndarray
    environment: EnvironmentSpec
    step: int
    mask: str
    backend: str
    precision: str
    device: str

    def start(
        self, task_ids: np.ndarray, seed: int = 0, target_returns: np.ndarray | None = None
    ) -> None:
        """Begin N new episodes."""

    def restart(self, rows: np.ndarray) -> None:
        """Begin new episodes in some rows."""

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Choose actions."""

    def record_rewards(self, rewards: np.ndarray) -> None:
        """Take in the rewards of the last actions."""
