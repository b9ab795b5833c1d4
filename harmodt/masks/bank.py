"""One mask per task over the maskable weights, kept as packed bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from harmodt_kernels import LayerMasks, MaskedLinear, count_bits, pack_bits, unpack_bits
from harmodt_kernels.masked_linear import WeightGradients

from ..config import MaskInitialisation
from ..errors import UserError
from .initialisation import first_masks
from .vector import ParameterVector


@dataclass(frozen=True)
class TaskMasks:
    """The masks that a batch is computed under; without bits, all weights are active.

    Attributes:
        vector: of the model whose layers are masked.
        bits: int32 [T, P_m / 32], the masks of all tasks, or None for the dense model; for a model
            of soft masks int32 [L T, P_m / 32], as in `MaskBank`.
        task_ids: int64 [G], the task of each group.
        group_gradients: [G, P_m] or None. A backward pass writes each group's gradient of the
            maskable weights to it by itself, or to [1, P_m] their sum; those weights' own gradients
            then get nothing. To [G, P] or [1, P] it writes those of all weights, but for a task
            embedding's, which autograd brings to its parameter.
        queue: where the gradients of linear layers wait to be computed together; its `finish` is to
            be called after a backward pass.
        bf16_copy: [P_m], the maskable weights in the type of matrix products, which linear layers
            read in their place; or None. It needs group_gradients: the weights get no gradient.
    """

    vector: ParameterVector
    bits: Tensor | None
    task_ids: Tensor
    group_gradients: Tensor | None = None
    queue: WeightGradients = field(default_factory=WeightGradients)
    bf16_copy: Tensor | None = None
    _parts: dict[nn.Module, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.bf16_copy is not None and self.group_gradients is None:
            raise ValueError("a bf16_copy gets no gradient: give group_gradients as well")

    def with_tasks(self, task_ids: Tensor) -> TaskMasks:
        """The same for a batch of other tasks; what layers have of them is not looked up again."""
        others = replace(self, task_ids=task_ids, queue=WeightGradients())
        object.__setattr__(others, "_parts", self._parts)
        return others

    def of(self, layer: nn.Module) -> LayerMasks | None:
        """A masked layer's part of them."""
        if self.bits is None and self.group_gradients is None:
            return None
        if layer not in self._parts:
            of_layer = self._bits_of(layer), self._masked_gradients_of(layer)
            self._parts[layer] = *of_layer, self._bf16_copy_of(layer)
        (weight_bits, bias_bits), gradients, bf16_copy = self._parts[layer]
        return LayerMasks(weight_bits, bias_bits, self.task_ids, gradients, self.queue, bf16_copy)

    def _bits_of(self, layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        if self.bits is None:
            return None, None
        weight, bias = self.vector.layers[layer]
        return weight.bits(self.bits), None if bias is None else bias.bits(self.bits)

    def _masked_gradients_of(self, layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        gradients = self.group_gradients
        if gradients is None:
            return None
        weight, bias = self.vector.layers[layer]
        return weight.of_groups(gradients), None if bias is None else bias.of_groups(gradients)

    def _bf16_copy_of(self, layer: nn.Module) -> Tensor | None:
        if self.bf16_copy is None or not isinstance(layer, MaskedLinear):
            return None
        weight, _ = self.vector.layers[layer]
        return weight.view(self.bf16_copy)

    def gradients_of(self, module: nn.Module) -> list[Tensor] | None:
        """Where the gradients of a module that no mask covers go, for each parameter.

        They are [G, *shape] for those of each group, or [1, *shape] for their sums.

        None if group_gradients does not reach them, and they get their gradients themselves.
        """
        gradients = self.group_gradients
        if gradients is None or gradients.shape[1] < self.vector.weights.numel():
            return None
        if module not in self._parts:
            slots = self.vector.shared[module]
            self._parts[module] = [slot.of_groups(gradients) for slot in slots]
        return self._parts[module]


class MaskBank:
    """The masks of all tasks: P_m / 8 bytes each, or L times that where they are soft.

    Attributes:
        vector: of the model whose layers are masked.
        bits: int32 [T, P_m / 32], one row per task; bit j is element j of the parameter vector.
            Soft masks have L T rows: l T + i is 1 where the value in task i is above l / L.
        levels: L; 1 for masks of bits.
        maskable_bits: int32 [P_m / 32], 1 where an element is a weight and 0 where it is padding.
    """

    def __init__(self, vector: ParameterVector, bits: Tensor, levels: int = 1):
        self.vector = vector
        self.bits = bits
        self.levels = levels
        self.maskable_bits = vector.valid_bits()[: vector.maskable_size // 32]

    @classmethod
    def initialise(
        cls,
        vector: ParameterVector,
        sparsities: Sequence[float],
        seed: int,
        initialisation: MaskInitialisation = "erk",
        shared: bool = False,
        levels: int = 1,
    ) -> MaskBank:
        """The masks that tasks begin with, soft ones with values of 0 and 1.

        Other arguments and errors are those of `first_masks`.
        """
        bits = first_masks(vector, sparsities, seed, initialisation, shared)
        return cls(vector, bits.to(vector.weights.device).repeat(levels, 1), levels)

    def for_tasks(self, task_ids: Tensor, group_gradients: Tensor | None = None) -> TaskMasks:
        """The masks of a batch whose groups belong to these tasks, int64 [G]."""
        return TaskMasks(self.vector, self.bits, task_ids, group_gradients)

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self.bits) // self.levels

    def active_counts(self) -> Tensor:
        """Number of active weights of each task, int64 [T]."""
        return count_bits(self.bits[: self.tasks])

    def tensors(self) -> dict[str, Tensor]:
        """The masks as a checkpoint names them: of soft masks, first which weights are active."""
        active, higher = self.bits[: self.tasks], self.bits[self.tasks :]
        return {"masks": active} | ({"higher_masks": higher} if len(higher) else {})


def voted_masks(bits: Tensor, threshold: float, levels: int, tasks: int) -> Tensor:
    """The voted mask for each of some tasks, from bits as `MaskBank` has them.

    Args:
        threshold: as `vote` takes it. Soft masks are voted level by level.
        tasks: U.

    Returns:
        int32 [L U, P_m / 32].
    """
    voted = torch.stack([vote(of_level, threshold) for of_level in bits.chunk(levels)])
    return voted.repeat_interleave(tasks, 0)


def vote(bits: Tensor, threshold: float = 0.5) -> Tensor:
    """The mask for an unseen task: weights active in more than so many of the tasks (Eq. 13).

    Args:
        bits: int32 [T, P_m / 32].
        threshold: share of the tasks, in [0, 1), or their number, from 1 to T - 1: the paper's 25
            of 50 tasks is 0.5 or 25.

    Returns:
        int32 [P_m / 32].

    Raises:
        UserError: no weight could be active in more than so many tasks.
    """
    if not 0 <= threshold < len(bits) or (threshold >= 1 and threshold != int(threshold)):
        raise UserError(
            f"the threshold of the voted mask is {threshold:g} and there are {len(bits)} tasks: "
            f"give a share below 1, or a number of tasks below {len(bits)}"
        )
    # A share such as 0.29 of 100 tasks comes out a little below 29.
    most = math.floor(threshold if threshold >= 1 else threshold * len(bits) + 1e-9)
    votes = torch.zeros(bits.shape[1] * 32, dtype=torch.int32, device=bits.device)
    for row in bits:
        votes += unpack_bits(row, len(votes))
    return pack_bits(votes > most)
