"""What a sequence model reads: windows of time steps, a group of windows for each task.

Shapes: G groups, B windows per group, L time steps, O observation and A action components.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Steps(NamedTuple):
    """Consecutive time steps of one trajectory for each window.

    Padding comes after a window's last step, where no valid step can see it.

    Attributes:
        returns_to_go: float32 [G, B, L], divided by the return scale.
        observations: float32 [G, B, L, O], normalised by the task's mean and deviation.
        actions: float32 [G, B, L, A], in [-1, 1].
        timesteps: int64 [G, B, L], counted from the beginning of the episode.
        valid: bool [G, B, L], False for padding.
    """

    returns_to_go: Tensor
    observations: Tensor
    actions: Tensor
    timesteps: Tensor
    valid: Tensor


class StepArrays(NamedTuple):
    """The same of one task in NumPy, [B, L, ...] or of any other leading shape."""

    returns_to_go: np.ndarray
    observations: np.ndarray
    actions: np.ndarray
    timesteps: np.ndarray
    valid: np.ndarray


class Batch(NamedTuple):
    """Windows of several tasks: `task_ids` int64 [G], and each window's prompt and history.

    A prompt comes before the history, so there is no padding in it.
    """

    task_ids: Tensor
    prompt: Steps | None
    history: Steps


def join(groups: Sequence[StepArrays], device: torch.device) -> Steps:
    """The windows of several groups, each [B, L, ...], as tensors [G, B, L, ...] on a device."""
    return Steps(
        *(torch.from_numpy(np.stack(part)).to(device) for part in zip(*groups, strict=True))
    )
