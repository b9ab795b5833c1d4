"""What a sequence model reads: windows of time steps, a group of windows for each task.

Shapes: G groups, B windows per group, L time steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """Consecutive time steps of one trajectory for each window.

    Padding stands on the left and has `valid` False.

    Attributes:
        returns_to_go: float32 [G, B, L], divided by the return scale.
        observations: float32 [G, B, L, 39], normalised by the task's mean and deviation.
        actions: float32 [G, B, L, 4], in [-1, 1].
        timesteps: int64 [G, B, L], counted from the beginning of the episode.
        valid: bool [G, B, L].
    """

    returns_to_go: Tensor
    observations: Tensor
    actions: Tensor
    timesteps: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Batch:
    """Windows of several tasks: `task_ids` int64 [G], and each window's prompt and history."""

    task_ids: Tensor
    prompt: Steps | None
    history: Steps
