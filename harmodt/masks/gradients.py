"""Each task's gradient of its loss over the maskable weights, and how far the tasks' agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from harmodt_kernels.harmony_selection import count_signs

from ..batch import Layout
from .bank import MaskBank, TaskMasks
from .vector import ParameterVector

Draw = Callable[[Sequence[int]], list[Tensor]]
"""A batch of some tasks, by id, the same whenever it is asked for: first their ids, int64 [G]."""

Losses = Callable[[list[Tensor], TaskMasks], Tensor]
"""The losses [G] of the tasks of a batch."""

MasksFor = Callable[[Tensor, Tensor], TaskMasks]
"""The masks of some tasks, int64 [G], that write each one's gradient to [G, P_m]."""

Repeated = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Makes a function that is called again and again, as `Execution.repeated`."""

PASS_BYTES = 8
"""Bytes that a pass forward and backward keeps for each output of each row in a masked layer.

Those of the fused kernels are about 3.5, those of plain PyTorch up to 7.8 (d = 128 and 256).
"""


class GradientPass:
    """Computes tasks' losses and gradients under the masks of one family, or of the dense model.

    Args:
        vector: of the model.
        losses: of a batch.
        masks_for: the family.
        repeated: passes of as many tasks are repeated by this, and keep their places in memory;
            None where they are not to.
        most: tasks of a pass that is repeated.
    """

    def __init__(
        self,
        vector: ParameterVector,
        losses: Losses,
        masks_for: MasksFor,
        repeated: Repeated | None = None,
        most: int = 0,
    ):
        self.vector = vector
        self._losses = losses
        self._masks_for = masks_for
        self._repeated = repeated
        self._most = most
        self._kept: dict[int, tuple[list[Tensor], Tensor, Callable[[], Tensor]]] = {}

    def __call__(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients [G, P_m], until the next call writes over them, and losses [G] of a batch."""
        tasks = len(batch[0])
        place, gradients, compute = self._kept.get(tasks) or self._prepare(batch)
        torch._foreach_copy_(place, batch)
        return gradients, compute()

    @property
    def nbytes(self) -> int:
        """The size of the places that it keeps."""
        kept = ([*place, gradients] for place, gradients, _ in self._kept.values())
        return sum(tensor.nbytes for tensors in kept for tensor in tensors)

    def _prepare(self, like: list[Tensor]) -> tuple[list[Tensor], Tensor, Callable[[], Tensor]]:
        """Places for a batch and for its gradients, and what computes the ones from the other."""
        layout, weights = Layout(like), self.vector.weights
        place = layout.views(layout.pack(like, weights.device))
        # zeros, because nothing is written to the padding
        gradients = weights.new_zeros(len(like[0]), self.vector.maskable_size)
        masks = self._masks_for(place[0], gradients)

        def compute() -> Tensor:
            losses = self._losses(place, masks)
            losses.sum().backward()
            masks.queue.finish()
            return losses.detach()

        if self._repeated is None or len(like[0]) > self._most:
            return place, gradients, compute
        self._kept[len(like[0])] = place, gradients, self._repeated(compute)
        return self._kept[len(like[0])]


class TaskGradients:
    """The gradients of all tasks of one family, on batches of theirs.

    They are computed for a few tasks at a time. Kept, they are computed once; if not, whenever they
    are asked for, and memory does not grow with the number of tasks. They come out the same.

    Args:
        compute: the family's passes.
        draw: the batches.
        parts: the ids of all tasks, a few at a time.
        keep: all tasks' gradients, from the first time that they are asked for.
    """

    def __init__(
        self,
        compute: GradientPass,
        draw: Draw,
        parts: Sequence[Sequence[int]],
        keep: bool = False,
    ):
        self.vector = compute.vector
        self.parts = parts
        self._compute = compute
        self._draw = draw
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._keep = keep

    def of(self, part: int) -> tuple[Tensor, Tensor]:
        """Gradients [G, P_m], until others are asked for, and losses [G] of one part's tasks."""
        if part in self._kept:
            return self._kept[part]
        gradients, losses = self._compute(self._draw(self.parts[part]))
        if self._keep:
            if len(self.parts) > 1:
                gradients = gradients.clone()
            self._kept[part] = gradients, losses
        return gradients, losses

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


class GradientFamilies:
    """What a mask update follows from: ḡ_i = ∇L_i(θ ⊙ M^i) ⊙ M^i, and g_i = ∇L_i(θ).

    As many tasks are computed at a time as the memory holds, their passes and gradients. If all
    ḡ_i fit beside that, they are kept; if not, they are computed whenever they are asked for. The
    g_i are needed once.

    Args:
        bank: the masks.
        losses: of a batch.
        memory: bytes.
        rows: of a task's batch in a masked layer.
        repeated, most: as `GradientPass` takes them.
    """

    def __init__(
        self,
        bank: MaskBank,
        losses: Losses,
        memory: float,
        rows: int,
        repeated: Repeated | None = None,
        most: int = 0,
    ):
        def without_masks(task_ids: Tensor, group_gradients: Tensor) -> TaskMasks:
            return TaskMasks(bank.vector, None, task_ids, group_gradients)

        self._masked = GradientPass(bank.vector, losses, bank.for_tasks, repeated, most)
        self._dense = GradientPass(bank.vector, losses, without_masks, repeated, most)
        at_once, self._keep = _plan(bank, memory, rows)
        task_ids = range(bank.tasks)
        self.parts = [task_ids[i : i + at_once] for i in task_ids[::at_once]]

    @property
    def nbytes(self) -> int:
        """The size of the places that they keep from update to update."""
        return self._masked.nbytes + self._dense.nbytes

    def of(self, draw: Draw) -> tuple[TaskGradients, TaskGradients]:
        """The masked gradients and the dense ones on some batches."""
        masked = TaskGradients(self._masked, draw, self.parts, self._keep)
        return masked, TaskGradients(self._dense, draw, self.parts)


def _plan(bank: MaskBank, memory: float, rows: int) -> tuple[int, bool]:
    """How many tasks are computed at a time, and whether all masked gradients are kept."""
    vector, tasks = bank.vector, bank.tasks
    outputs = sum(weight.shape[0] for weight, _ in vector.layers.values())
    gradient = 4 * vector.maskable_size
    of_task = 2 * gradient + PASS_BYTES * rows * outputs * bank.levels
    if tasks * of_task <= memory:  # the masked ones are kept where they are computed
        return tasks, True
    keep = tasks * gradient + of_task <= memory
    at_once = (memory - keep * tasks * gradient) // of_task
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
