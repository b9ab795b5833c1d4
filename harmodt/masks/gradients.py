"""The per-task gradients over the maskable weights, and how far the tasks agree.

Shapes are named as in `bank.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from harmodt_kernels.harmony_selection import count_signs
from harmodt_kernels.vector import ParameterVector

from ..batch import Layout
from .bank import MaskBank, TaskMasks

Draw = Callable[[Sequence[int]], list[Tensor]]
"""Draws a batch of the tasks with the given ids. Its first tensor has the ids, int64 [G]."""

Losses = Callable[[list[Tensor], TaskMasks], Tensor]
"""Computes the losses [G] of a batch under masks."""

MasksFor = Callable[[Tensor, Tensor], TaskMasks]
"""Makes the masks of some tasks, int64 [G], with a buffer [G, P_m] for their gradients."""

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Turns a function into one that is captured once and then replayed (`Execution.repeated`)."""

PASS_BYTES = 8
"""Bytes that a forward and backward pass needs for each output of each row in a masked layer.

Measured at d = 128 and 256: fused kernels need about 3.5 bytes, plain PyTorch up to 7.8.
"""


def backward(losses: Tensor, masks: TaskMasks) -> None:
    """Write the gradients of losses to the buffer of the masks.

    A buffer [G, ...] gets the gradient of each group's loss. A buffer [1, ...] gets the gradient of
    the mean loss.

    Args:
        losses: [G], the losses under these masks.
    """
    assert masks.group_gradients is not None
    rows = len(masks.group_gradients)
    # Every loss has the weight 1 for a buffer of G rows, and 1 / G for a buffer of one row.
    losses.backward(torch.full_like(losses, rows / len(losses)))
    masks.queue.finish()


class GradientPass:
    """Computes the losses and gradients of tasks, either under their masks or without masks.

    Args:
        vector: the parameters of the model.
        losses: computes the losses of a batch.
        masks_for: makes the masks.
        record: captures passes, whose buffers then stay in memory. If None, no pass is captured.
        most_recorded: passes of more than this number of tasks are not captured.
    """

    def __init__(
        self,
        vector: ParameterVector,
        losses: Losses,
        masks_for: MasksFor,
        record: Record | None = None,
        most_recorded: int = 0,
    ):
        self.vector = vector
        self._losses = losses
        self._masks_for = masks_for
        self._record = record
        self._most_recorded = most_recorded
        self._recorded: dict[int, tuple[list[Tensor], Tensor, Callable[[], Tensor]]] = {}

    def __call__(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute gradients [G, P_m] and losses [G] of a batch.

        The next call overwrites the gradients.
        """
        tasks = len(batch[0])
        buffers, gradients, compute = self._recorded.get(tasks) or self._prepare(batch)
        torch._foreach_copy_(buffers, batch)
        return gradients, compute()

    @property
    def nbytes(self) -> int:
        """The bytes of the buffers that stay in memory."""
        kept = ([*buffers, gradients] for buffers, gradients, _ in self._recorded.values())
        return sum(tensor.nbytes for tensors in kept for tensor in tensors)

    def _prepare(self, like: list[Tensor]) -> tuple[list[Tensor], Tensor, Callable[[], Tensor]]:
        """Make buffers for a batch and its gradients, and the function that computes them."""
        layout, weights = Layout(like), self.vector.weights
        buffers = layout.views(layout.pack(like, weights.device))
        # The padding must be 0, and no pass writes to it.
        gradients = weights.new_zeros(len(like[0]), self.vector.maskable_size)
        masks = self._masks_for(buffers[0], gradients)

        def compute() -> Tensor:
            losses = self._losses(buffers, masks)
            backward(losses, masks)
            return losses.detach()

        if self._record is None or len(like[0]) > self._most_recorded:
            return buffers, gradients, compute
        self._recorded[len(like[0])] = buffers, gradients, self._record(compute)
        return self._recorded[len(like[0])]


class TaskGradients:
    """The gradients of all tasks, either masked or dense. Each task has its own batch.

    They are computed in chunks of a few tasks. If the gradients are kept, each is computed once. If
    not, each call of `of` computes them again, with the same result. Memory then does not grow with
    the number of tasks.

    Args:
        compute: computes the gradients of a batch.
        draw: draws the batches.
        chunks: the task ids of each chunk.
        keep: whether to keep all gradients.
    """

    def __init__(
        self,
        compute: GradientPass,
        draw: Draw,
        chunks: Sequence[Sequence[int]],
        keep: bool = False,
    ):
        self.vector = compute.vector
        self.chunks = chunks
        self._compute = compute
        self._draw = draw
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._keep = keep

    def of(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Gradients [G, P_m] and losses [G] of one chunk's tasks.

        The next call may overwrite the gradients.
        """
        if chunk in self._kept:
            return self._kept[chunk]
        gradients, losses = self._compute(self._draw(self.chunks[chunk]))
        if self._keep:
            if len(self.chunks) > 1:
                gradients = gradients.clone()
            self._kept[chunk] = gradients, losses
        return gradients, losses

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the gradients and losses of the chunks."""
        return map(self.of, range(len(self.chunks)))

    def mean(self) -> Tensor:
        """The mean of all tasks' gradients, [P_m]; it has the same bits for all sizes of chunks."""
        total = self.vector.weights.new_zeros(self.vector.maskable_size)
        for gradients, _ in self:
            for gradient in gradients:
                total += gradient
        return total.div_(sum(map(len, self.chunks)))


class UpdateGradients:
    """The gradients that a mask update needs.

    These are the masked gradients ḡ_i = ∇L_i(θ ⊙ M^i) ⊙ M^i and the dense gradients g_i = ∇L_i(θ).
    A chunk has as many tasks as fit into the memory. An update reads each masked gradient twice:
    for the mean of all tasks, and then for the task's own selection. So all masked gradients are
    kept if they fit into the rest of the memory.

    Args:
        bank: the masks.
        losses: computes the losses of a batch.
        memory: bytes for passes and gradients.
        rows: the number of rows that the batch of one task has in a masked layer.
        record, most_recorded: as in `GradientPass`.
    """

    def __init__(
        self,
        bank: MaskBank,
        losses: Losses,
        memory: float,
        rows: int,
        record: Record | None = None,
        most_recorded: int = 0,
    ):
        def without_masks(task_ids: Tensor, group_gradients: Tensor) -> TaskMasks:
            return TaskMasks(bank.vector, None, task_ids, group_gradients)

        self._masked = GradientPass(bank.vector, losses, bank.for_tasks, record, most_recorded)
        self._dense = GradientPass(bank.vector, losses, without_masks, record, most_recorded)
        at_once, self._keep = _plan(bank, memory, rows)
        self.chunks = chunks_of(bank.tasks, at_once)

    @property
    def nbytes(self) -> int:
        """The bytes of the buffers that stay in memory between updates."""
        return self._masked.nbytes + self._dense.nbytes

    def on(self, draw: Draw) -> tuple[TaskGradients, TaskGradients]:
        """The masked and the dense gradients on the batches of `draw`."""
        masked = TaskGradients(self._masked, draw, self.chunks, self._keep)
        return masked, TaskGradients(self._dense, draw, self.chunks)


def chunks_of(tasks: int, at_once: int) -> list[range]:
    """The ids of all tasks in chunks of at most `at_once` tasks."""
    task_ids = range(tasks)
    return [task_ids[i : i + at_once] for i in task_ids[::at_once]]


def _plan(bank: MaskBank, memory: float, rows: int) -> tuple[int, bool]:
    """How many tasks are computed at a time, and whether all masked gradients are kept."""
    vector, tasks = bank.vector, bank.tasks
    outputs = sum(weight.shape[0] for weight, _ in vector.layers.values())
    gradient = 4 * vector.maskable_size
    # Each task of a chunk needs a masked gradient, a dense gradient, and memory for the pass.
    task_bytes = 2 * gradient + PASS_BYTES * rows * outputs * bank.levels
    if tasks * task_bytes <= memory:  # one chunk: its buffer keeps the masked gradients
        return tasks, True
    keep = tasks * gradient + task_bytes <= memory
    at_once = (memory - keep * tasks * gradient) // task_bytes
    return min(max(int(at_once), 1), tasks), keep


def harmony_score(agreeing: Tensor, differing: Tensor) -> float:
    """The averaged harmony score (Definition 3.2), in [-1, 1]: how far the tasks' gradients agree.

    It is the mean of (g_ij ĝ_j) / (|g_ij| |ĝ_j|) over tasks and weights, without the weights where
    a factor is 0. The g_i are all masked or all dense, and ĝ is their mean.

    Args:
        agreeing, differing: int64 [T], for each task the number of weights where the signs of its
            gradient and of the mean are equal, and where they are opposite.

    Returns:
        The score; 0 if no weight is left.
    """
    counted = (agreeing + differing).sum().clamp(min=1)
    return float((agreeing - differing).sum().double() / counted)


def averaged_harmony(gradients: TaskGradients) -> float:
    """The averaged harmony score of the tasks' gradients (Definition 3.2), in [-1, 1]."""
    mean = gradients.mean()
    signs = [count_signs(gradient, mean) for chunk, _ in gradients for gradient in chunk]
    return harmony_score(*map(torch.stack, zip(*signs, strict=True)))
