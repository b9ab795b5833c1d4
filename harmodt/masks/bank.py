"""One binary mask per task over the maskable weights, kept as packed bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harmodt_kernels import PYTORCH, Backend, count_bits, pack_bits, unpack_bits

from ..errors import UserError
from .vector import ParameterVector


@dataclass(frozen=True)
class TaskMasks:
    """The masks of all tasks, which of them each group of a batch uses, and how they are applied.

    Attributes:
        bits: int32 [T, P_m / 32].
        task_ids: int64 [G].
        backend: the kernels that apply them.
        group_gradients: [G, P_m] or None. A backward pass writes each group's gradient of the
            maskable weights to it by itself; those weights' own gradients are then undefined.
    """

    bits: Tensor
    task_ids: Tensor
    backend: Backend = PYTORCH
    group_gradients: Tensor | None = None


class MaskBank:
    """The masks of all tasks: P_m / 8 bytes each.

    Attributes:
        bits: int32 [T, P_m / 32], one row per task; bit j is element j of the parameter vector.
        maskable_bits: int32 [P_m / 32], 1 where an element is a weight and 0 where it is padding.
        backend: the kernels that apply them.
    """

    def __init__(self, bits: Tensor, maskable_bits: Tensor, backend: Backend = PYTORCH):
        self.bits = bits
        self.maskable_bits = maskable_bits
        self.backend = backend

    @classmethod
    def initialise(
        cls,
        vector: ParameterVector,
        tasks: int,
        sparsity: float,
        seed: int,
        backend: Backend = PYTORCH,
    ) -> MaskBank:
        """Draw every task's mask independently at the ERK densities (Appendix C of the paper).

        Args:
            vector: the model's parameters; the draw depends on their shapes alone.
            tasks: number of tasks.
            sparsity: S, the share of inactive weights, in [0, 1).
            seed: with the task's index, the seed of its mask.
            backend: the kernels that apply the masks.

        Raises:
            UserError: the sparsity is outside [0, 1).
        """
        slots = [vector.slots[name] for name in vector.maskable_names]
        shapes = [(slot.rows, slot.columns) for slot in slots]
        densities = erk_densities(shapes, sparsity)
        words = vector.maskable_size // 32
        bits = torch.empty(tasks, words, dtype=torch.int32)
        for task in range(tasks):
            mask = torch.zeros(vector.maskable_size, dtype=torch.bool)
            for slot, density in zip(slots, densities, strict=True):
                size = slot.rows * slot.columns
                generator = torch.Generator().manual_seed(_mix(seed, task, slot.offset))
                chosen = torch.zeros(size, dtype=torch.bool)
                chosen[torch.randperm(size, generator=generator)[: round(density * size)]] = True
                slot.view(mask, torch.Size((slot.rows, slot.columns))).copy_(
                    chosen.view(slot.rows, slot.columns)
                )
            bits[task] = pack_bits(mask)
        return cls(bits.to(vector.weights.device), vector.valid_bits()[:words], backend)

    def for_tasks(self, task_ids: Tensor, group_gradients: Tensor | None = None) -> TaskMasks:
        """The masks of a batch whose groups belong to these tasks, int64 [G]."""
        return TaskMasks(self.bits, task_ids, self.backend, group_gradients)

    def dense(self, groups: int, group_gradients: Tensor | None = None) -> TaskMasks:
        """A mask with all weights for every group: the dense model."""
        task_ids = torch.zeros(groups, dtype=torch.int64, device=self.bits.device)
        return TaskMasks(self.maskable_bits[None], task_ids, self.backend, group_gradients)

    def active_bits(self, task_ids: Sequence[int]) -> Tensor:
        """int32 [P_m / 32]: the weights that are active in at least one of these tasks."""
        union = self.bits[task_ids[0]].clone()
        for task in task_ids[1:]:
            union |= self.bits[task]
        return union

    def active_counts(self) -> Tensor:
        """Number of active weights of each task, int64 [T]."""
        return count_bits(self.bits)


def vote(bits: Tensor, threshold: float = 0.5) -> Tensor:
    """The mask for an unseen task: weights active in more than a share of the tasks (Eq. 13).

    Args:
        bits: int32 [T, P_m / 32].
        threshold: share of the tasks, in [0, 1); the paper's 25 of 50 tasks is 0.5.

    Returns:
        int32 [P_m / 32].
    """
    votes = torch.zeros(bits.shape[1] * 32, dtype=torch.int32, device=bits.device)
    for row in bits:
        votes += unpack_bits(row, len(votes))
    return pack_bits(votes > threshold * len(bits))


def erk_densities(shapes: Sequence[tuple[int, int]], sparsity: float) -> list[float]:
    """Erdős–Rényi-Kernel densities whose overall density is 1 − sparsity (Appendix C).

    A tensor of shape (rows, columns) gets ε (rows + columns) / (rows columns); a vector of n
    elements, n / n = 1 times ε. Tensors whose density would pass 1 become dense and ε is solved
    again over the rest.

    Raises:
        UserError: the sparsity is outside [0, 1).
    """
    if not 0.0 <= sparsity < 1.0:
        raise UserError(f"sparsity is {sparsity}, but a share of inactive weights lies in [0, 1)")
    sizes = [rows * columns for rows, columns in shapes]
    scores = [(rows + columns) / (rows * columns) if rows > 1 else 1.0 for rows, columns in shapes]
    dense: set[int] = set()
    while True:
        wanted = (1.0 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)
        rest = [i for i in range(len(sizes)) if i not in dense]
        epsilon = wanted / sum(scores[i] * sizes[i] for i in rest) if rest else 0.0
        passing = {i for i in rest if epsilon * scores[i] > 1.0}
        if not passing:
            return [1.0 if i in dense else epsilon * scores[i] for i in range(len(sizes))]
        dense |= passing


def _mix(*numbers: int) -> int:
    """One seed from several numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63)
    return seed
