"""Batches of windows of time steps, and transfers of several tensors at once.

A batch has one group of windows for each task.

Shapes: G groups, B windows per group, L time steps, O observation and A action components.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Steps(NamedTuple):
    """Consecutive time steps of one trajectory for each window.

    Padding comes after a window's last step. Attention is causal, so no valid step reads it.

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
    """Windows of several tasks.

    A prompt has no padding, because the history comes directly after it.

    Attributes:
        task_ids: int64 [G].
        prompt, history: the time steps of each window.
        terminated: int8 [G, B], how each window's episode ended, as in `data.store.Episodes`; None
            for windows that do not come from a store.
    """

    task_ids: Tensor
    prompt: Steps | None
    history: Steps
    terminated: Tensor | None = None


def tensors_of(batch: Batch, targets: Tensor) -> list[Tensor]:
    """A list of all tensors of a store's batch and its target actions; task ids come first."""
    assert batch.terminated is not None
    return [batch.task_ids, targets, batch.terminated, *batch.history, *(batch.prompt or ())]


def batch_of(tensors: Sequence[Tensor]) -> tuple[Batch, Tensor]:
    """The inverse of `tensors_of`."""
    task_ids, targets, terminated, *steps = tensors
    size = len(Steps._fields)
    prompt = Steps(*steps[size:]) if steps[size:] else None
    return Batch(task_ids, prompt, Steps(*steps[:size]), terminated), targets


class Layout:
    """A layout of several tensors in one buffer of bytes.

    Each tensor begins at a multiple of 16 bytes, because Triton compiles separate kernels for other
    addresses.

    Args:
        like: tensors with the dtypes and shapes that the buffer will hold, in order.
    """

    def __init__(self, like: Sequence[Tensor]):
        self._parts: list[tuple[int, int, torch.dtype, torch.Size]] = []
        self.size = 0
        for tensor in like:
            self._parts.append((self.size, tensor.nbytes, tensor.dtype, tensor.shape))
            self.size += -(-tensor.nbytes // 16) * 16

    def views(self, packed: Tensor) -> list[Tensor]:
        """The tensors as views of a buffer, uint8 [size]."""
        return [
            packed[start : start + size].view(dtype).view(shape)
            for start, size, dtype, shape in self._parts
        ]

    def pack(self, tensors: Sequence[Tensor], to: torch.device) -> Tensor:
        """Copy tensors into a new buffer on their own device, uint8 [size].

        Args:
            tensors: tensors on one device.
            to: the device that the buffer will be copied to; for a GPU the buffer is pinned memory.
        """
        device = tensors[0].device
        pinned = device.type == "cpu" and to.type == "cuda"
        packed = torch.empty(self.size, dtype=torch.uint8, device=device, pin_memory=pinned)
        torch._foreach_copy_(self.views(packed), list(tensors))
        return packed


def move(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors from one device to another in a single transfer.

    The host does not wait for a transfer to a GPU. The GPU finishes the transfer before it starts
    the kernels that the host launches next.
    """
    layout = Layout(tensors)
    return layout.views(layout.pack(tensors, device).to(device, non_blocking=True))
