"""The masks of all tasks as packed bits, and the masks that a batch is computed under."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from harmodt_kernels import LayerMasks, MaskedLinear, count_bits, pack_bits, unpack_bits
from harmodt_kernels.bits import BITS_PER_WORD
from harmodt_kernels.masked_linear import WeightGradients

from ..config import MaskInitialisation
from ..errors import UserError
from .initialisation import first_masks
from .vector import ParameterVector


class TaskMasks:
    """The masks that a model computes a batch under, and the buffers for its gradients.

    One instance serves many batches: each pass reads the present values of `task_ids`.

    Args:
        vector: the parameters of the model.
        bits: int32 [T, P_m / 32], the masks of all tasks; or None, and every weight is active. For
            a model of soft masks int32 [L T, P_m / 32], as in `MaskBank`.
        task_ids: int64 [G], the task of each group.
        group_gradients: a buffer for the gradients, or None. A backward pass overwrites it; the
            parameters then get no gradient of their own. A buffer of G rows takes the gradient of
            each group, a buffer of one row their sum. With P columns it takes the gradients of all
            parameters, with P_m columns those of the maskable weights: then the other parameters
            get their gradients from autograd.
        bf16_copy: [P_m], a copy of the maskable weights in the type of matrix products; or None.
            Linear layers read it instead of the weights. It needs group_gradients.

    Attributes:
        queue: linear layers put the operands of their weight gradients here, so that several
            layers share a launch. Call its `finish` after a backward pass.

    Raises:
        ValueError: a copy is given, and no buffer for its gradient.
    """

    def __init__(
        self,
        vector: ParameterVector,
        bits: Tensor | None,
        task_ids: Tensor,
        group_gradients: Tensor | None = None,
        bf16_copy: Tensor | None = None,
    ):
        if bf16_copy is not None and group_gradients is None:
            raise ValueError("a bf16_copy gets no gradient: give group_gradients as well")
        self.vector = vector
        self.bits = bits
        self.task_ids = task_ids
        self.group_gradients = group_gradients
        self.queue = WeightGradients()
        self._bf16_copy = bf16_copy
        self._layers: dict[nn.Module, LayerMasks] = {}
        self._shared: dict[nn.Module, list[Tensor]] = {}

    def of(self, layer: nn.Module) -> LayerMasks | None:
        """The masks and buffers of one masked layer; None where there are neither."""
        if self.bits is None and self.group_gradients is None:
            return None
        if layer not in self._layers:  # views are made once: that takes longer than a small layer
            weight_bits, bias_bits = self._bits_of(layer)
            gradients, bf16_copy = self._gradients_of_masked(layer), self._bf16_copy_of(layer)
            self._layers[layer] = LayerMasks(
                weight_bits, bias_bits, self.task_ids, gradients, self.queue, bf16_copy
            )
        return self._layers[layer]

    def gradients_of(self, module: nn.Module) -> list[Tensor] | None:
        """The buffers for the gradients of a module that no mask covers.

        Returns:
            For each parameter [G, *shape] or [1, *shape], as group_gradients; None where that does
            not hold this module, whose gradients then come from autograd.
        """
        gradients = self.group_gradients
        if gradients is None or gradients.shape[1] < self.vector.weights.numel():
            return None
        if module not in self._shared:
            slots = self.vector.shared[module]
            self._shared[module] = [slot.of_groups(gradients) for slot in slots]
        return self._shared[module]

    def _bits_of(self, layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        if self.bits is None:
            return None, None
        weight, bias = self.vector.layers[layer]
        return weight.bits(self.bits), None if bias is None else bias.bits(self.bits)

    def _gradients_of_masked(self, layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        gradients = self.group_gradients
        if gradients is None:
            return None
        weight, bias = self.vector.layers[layer]
        return weight.of_groups(gradients), None if bias is None else bias.of_groups(gradients)

    def _bf16_copy_of(self, layer: nn.Module) -> Tensor | None:
        if self._bf16_copy is None or not isinstance(layer, MaskedLinear):
            return None
        weight, _ = self.vector.layers[layer]
        return weight.view(self._bf16_copy)


class MaskBank:
    """The masks of all tasks: P_m / 8 bytes each, or L times that where they are soft.

    Attributes:
        vector: the parameters of the model whose layers are masked.
        bits: int32 [T, P_m / 32], one row per task; bit j masks element j of the parameter vector.
            Soft masks have L T rows: row l T + i is 1 where the value in task i is above l / L.
        levels: L, the number of levels of soft masks; 1 for masks of bits.
        maskable_bits: int32 [P_m / 32], 1 where an element is a weight and 0 where it is padding.
    """

    def __init__(self, vector: ParameterVector, bits: Tensor, levels: int = 1):
        self.vector = vector
        self.bits = bits
        self.levels = levels
        self.maskable_bits = vector.valid_bits()[: vector.maskable_size // 32]

    @classmethod
    def empty(cls, vector: ParameterVector, tasks: int, levels: int = 1) -> MaskBank:
        """Masks without an active weight, to be drawn or read from a checkpoint."""
        words = vector.maskable_size // BITS_PER_WORD
        bits = torch.zeros(levels * tasks, words, dtype=torch.int32, device=vector.weights.device)
        return cls(vector, bits, levels)

    def draw(
        self,
        sparsities: Sequence[float],
        seed: int,
        initialisation: MaskInitialisation = "erk",
        shared: bool = False,
    ) -> None:
        """Draw the masks that the tasks begin with; soft masks begin with values of 0 and 1.

        Arguments and errors are those of `first_masks`.
        """
        bits = first_masks(self.vector, sparsities, seed, initialisation, shared)
        self.bits.copy_(bits.repeat(self.levels, 1))

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
        """The masks as a checkpoint names them; the first T rows say which weights are active."""
        active, higher = self.bits[: self.tasks], self.bits[self.tasks :]
        return {"masks": active} | ({"higher_masks": higher} if len(higher) else {})


def voted_masks(bits: Tensor, threshold: float, levels: int, tasks: int) -> Tensor:
    """The voted mask, repeated for U tasks. Soft masks are voted level by level.

    Args:
        bits: the masks of the training tasks, as `MaskBank` has them.
        threshold: a threshold as `vote` takes it.
        levels: L of soft masks, or 1.
        tasks: U.

    Returns:
        int32 [L U, P_m / 32].
    """
    voted = torch.stack([vote(of_level, threshold) for of_level in bits.chunk(levels)])
    return voted.repeat_interleave(tasks, 0)


def vote(bits: Tensor, threshold: float = 0.5) -> Tensor:
    """The mask for an unseen task: the weights that more than `threshold` tasks use (Eq. 13).

    Args:
        bits: int32 [T, P_m / 32].
        threshold: a share of the tasks, in [0, 1), or a number of tasks, from 1 to T - 1. The
            paper's 25 of 50 tasks is 0.5 or 25.

    Returns:
        int32 [P_m / 32].

    Raises:
        UserError: the threshold is no share and no such number.
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
