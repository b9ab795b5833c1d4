"""Each task's gradient of its loss over the maskable weights, and how far the tasks' agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from harmodt_kernels.harmony_selection import count_signs

from .bank import MaskBank, TaskMasks
from .vector import ParameterVector

TaskLosses = Callable[[Sequence[int], TaskMasks], Tensor]
"""The losses [G] of some tasks, by id, on a batch of theirs: the same whenever it is asked for."""

MasksFor = Callable[[Tensor, Tensor], TaskMasks]
"""The masks of some tasks, int64 [G], that write each one's gradient to [G, P_m]."""


PASS_BYTES = 8
"""Bytes that a pass forward and backward keeps for each output of each row in a masked layer.

Those of the fused kernels are about 3.5, those of plain PyTorch up to 7.8 (d = 128 and 256).
"""


class TaskGradients:
    """The gradients of all tasks of one family: under some masks, or of the dense model.

    They are computed for a few tasks at a time. Kept, they are computed once; if not, whenever they
    are asked for, and memory does not grow with the number of tasks. They come out the same.

    Args:
        vector: of the model.
        losses: computes the tasks' losses.
        masks_for: the family.
        parts: the ids of all tasks, a few at a time.
        keep: all tasks' gradients, from the first time that they are asked for.
    """

    def __init__(
        self,
        vector: ParameterVector,
        losses: TaskLosses,
        masks_for: MasksFor,
        parts: Sequence[Sequence[int]],
        keep: bool = False,
    ):
        self.vector = vector
        self.parts = parts
        self._losses = losses
        self._masks_for = masks_for
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._keep = keep

    def of(self, part: int) -> tuple[Tensor, Tensor]:
        """Gradients [G, P_m] and losses [G] of the tasks of one part."""
        if part in self._kept:
            return self._kept[part]
        task_ids, device = self.parts[part], self.vector.weights.device
        # zeros, because nothing is written to the padding
        gradients = torch.zeros(len(task_ids), self.vector.maskable_size, device=device)
        masks = self._masks_for(torch.tensor(list(task_ids), device=device), gradients)
        losses = self._losses(task_ids, masks)
        losses.sum().backward()
        masks.queue.finish()
        if self._keep:
            self._kept[part] = gradients, losses.detach()
        return gradients, losses.detach()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Gradients and losses of each part in turn."""
        return map(self.of, range(len(self.parts)))

    def mean(self) -> Tensor:
        """The mean of all tasks' gradients, [P_m]; its roundings do not depend on the parts."""
        total = self.vector.weights.new_zeros(self.vector.maskable_size)
        for gradients, _ in self:
            for gradient in gradients:
                total += gradient
        return total.div_(sum(map(len, self.parts)))


def of_all_tasks(
    bank: MaskBank, losses: TaskLosses, memory: float, rows: int
) -> tuple[TaskGradients, TaskGradients]:
    """ḡ_i = ∇L_i(θ ⊙ M^i) ⊙ M^i, and g_i = ∇L_i(θ), which are needed once.

    As many tasks are computed at a time as the memory holds, their passes and gradients. If all
    ḡ_i fit beside that, they are kept; if not, they are computed whenever they are asked for.

    Args:
        memory: bytes.
        rows: of a task's batch in a masked layer.
    """
    at_once, keep = _plan(bank, memory, rows)
    task_ids = range(bank.tasks)
    parts = [task_ids[i : i + at_once] for i in task_ids[::at_once]]

    def without_masks(task_ids: Tensor, group_gradients: Tensor) -> TaskMasks:
        return TaskMasks(bank.vector, None, task_ids, group_gradients)

    masked = TaskGradients(bank.vector, losses, bank.for_tasks, parts, keep)
    return masked, TaskGradients(bank.vector, losses, without_masks, parts)


def _plan(bank: MaskBank, memory: float, rows: int) -> tuple[int, bool]:
    """How many tasks are computed at a time, and whether all masked gradients are kept."""
    vector, tasks = bank.vector, bank.tasks
    outputs = sum(weight.shape[0] for weight, _ in vector.layers.values())
    gradient = 4 * vector.maskable_size
    of_pass = PASS_BYTES * rows * outputs * bank.levels
    keep = tasks * gradient + gradient + of_pass <= memory
    if keep:
        at_once = (memory - tasks * gradient) // (gradient + of_pass)
    else:
        at_once = memory // (2 * gradient + of_pass)
    return min(max(int(at_once), 1), tasks), keep


def harmony_score(agreeing: Tensor, differing: Tensor) -> float:
    """The averaged harmony score (Definition 3.2), in [-1, 1]: how far the tasks' gradients agree.

    It is the mean of (g_ij ĝ_j) / (|g_ij| |ĝ_j|) over tasks and weights; weights with a zero
    factor are left out. The g_i and their mean ĝ are of one family.

    Args:
        agreeing, differing: int64 [T], each task's weights with equal and with opposite signs.

    Returns:
        0 when every weight was left out.
    """
    counted = (agreeing + differing).sum().clamp(min=1)
    return float((agreeing - differing).sum().double() / counted)


def averaged_harmony(gradients: TaskGradients) -> float:
    """The averaged harmony score of a family of gradients (Definition 3.2), in [-1, 1]."""
    mean = gradients.mean()
    signs = [count_signs(gradient, mean) for part, _ in gradients for gradient in part]
    return harmony_score(*map(torch.stack, zip(*signs, strict=True)))
