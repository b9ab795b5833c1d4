"""What a sequence model reads: windows of time steps, a group of windows for each task.

Shapes: G groups, B windows per group, L time steps, O observation and A action components.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class Batch(NamedTuple):
    """Windows of several tasks: `task_ids` int64 [G], and each window's prompt and history.

    A prompt comes before the history, so there is no padding in it.
    """

    task_ids: Tensor
    prompt: Steps | None
    history: Steps


def move(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of tensors on another device, made by a single transfer.

    Nobody waits for a transfer to a GPU: what is computed there next comes after it.
    """
    sizes = [-(-tensor.nbytes // 8) * 8 for tensor in tensors]  # each begins at a multiple of 8
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for to, tensor in zip(_unpack(packed, sizes, tensors), tensors, strict=True):
        to.copy_(tensor)
    return _unpack(packed.to(device, non_blocking=True), sizes, tensors)


def _unpack(packed: Tensor, sizes: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """Views of the parts of packed bytes, with the dtypes and shapes of some tensors."""
    return [
        part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(packed.split(list(sizes)), like, strict=True)
    ]
