"""The masks of all tasks as packed bits, and the masks of one batch.

Shapes: T tasks, G groups of a batch, P elements of the parameter vector, of which masks cover the
first P_m (`vector.py`), L levels of soft masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from harmodt_kernels import LayerMasks, MaskedLinear, count_bits, pack_bits, unpack_bits
from harmodt_kernels.bits import BITS_PER_WORD
from harmodt_kernels.masked_linear import WeightGradients
from harmodt_kernels.vector import ParameterVector

from ..config import MaskInitialisation
from ..errors import UserError
from .initialisation import first_masks


class TaskMasks:
    """The masks under which a model computes a batch, and the buffers for the gradients.

    One instance serves many batches: each pass reads the present values of `task_ids`.

    Args:
        vector: the parameters of the model.
        bits: int32 [T, P_m / 32], the masks of all tasks. For soft masks int32 [L T, P_m / 32], as
            in `MaskBank`. If None, every weight is active.
        task_ids: int64 [G], the task of each group.
        group_gradients: a buffer for the gradients, or None. A backward pass overwrites this
            buffer. It does not set `grad` of the parameters that the buffer covers. A buffer of G
            rows gets the gradient of each group; a buffer of one row gets their sum. A buffer of P
            columns gets the gradients of all parameters. A buffer of P_m columns gets only the
            gradients of the maskable weights, and autograd computes those of the other parameters.
        bf16_copy: [P_m], a copy of the maskable weights in the dtype of matrix products; or None.
            Linear layers read the copy instead of the weights. It needs group_gradients.

    Attributes:
        queue: linear layers put the operands of their weight gradients here, so that several
            layers share a kernel launch. Call its `finish` after a backward pass.

    Raises:
        ValueError: a copy is given without a buffer for its gradient.
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
        """The masks and buffers of one masked layer; None if there are neither."""
        if self.bits is None and self.group_gradients is None:
            return None
        if layer not in self._layers:  # keep the views: making them takes longer than a small layer
            weight_bits, bias_bits = self._bits_of(layer)
            gradients, bf16_copy = self._gradients_of_masked(layer), self._bf16_copy_of(layer)
            self._layers[layer] = LayerMasks(
                weight_bits, bias_bits, self.task_ids, gradients, self.queue, bf16_copy
            )
        return self._layers[layer]

    def gradients_of(self, module: nn.Module) -> list[Tensor] | None:
        """The buffers for the gradients of a module that no mask covers.

        Returns:
            A view of group_gradients for each parameter, [G, *shape] or [1, *shape]; None if
            group_gradients has no columns for this module. Autograd then computes the gradients.
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
    """The masks of all tasks. A mask has P_m / 8 bytes; a soft mask has L times as many.

    Attributes:
        vector: the parameters of the model whose layers are masked.
        bits: int32 [T, P_m / 32], one row per task; bit j masks element j of the parameter vector.
            Soft masks have L T rows: row l T + i, for l < L, is 1 where the value in task i is
            above l / L.
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
        """Make masks without an active weight; draw them or load a checkpoint afterwards."""
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
        """Draw the tasks' first masks. Soft masks begin with only the values 0 and 1.

        The arguments and errors are those of `first_masks`.
        """
        bits = first_masks(self.vector, sparsities, seed, initialisation, shared)
        self.bits.copy_(bits.repeat(self.levels, 1))

    def for_tasks(self, task_ids: Tensor, group_gradients: Tensor | None = None) -> TaskMasks:
        """The masks of a batch with the tasks `task_ids`, int64 [G]."""
        return TaskMasks(self.vector, self.bits, task_ids, group_gradients)

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self.bits) // self.levels

    def active_counts(self) -> Tensor:
        """Number of active weights of each task, int64 [T]."""
        return count_bits(self.bits[: self.tasks])

    def tensors(self) -> dict[str, Tensor]:
        """The masks by their names in a checkpoint; the first T rows have the active weights."""
        active, higher = self.bits[: self.tasks], self.bits[self.tasks :]
        return {"masks": active} | ({"higher_masks": higher} if len(higher) else {})


def voted_masks(bits: Tensor, threshold: float, levels: int, tasks: int) -> Tensor:
    """The voted mask, repeated for U tasks. For soft masks, each level has its own vote.

    Args:
        bits: the masks of the training tasks, in the form of `MaskBank.bits`.
        threshold: the threshold of `vote`.
        levels: L for soft masks, 1 for masks of bits.
        tasks: U.

    Returns:
        int32 [L U, P_m / 32].
    """
    voted = torch.stack([vote(of_level, threshold) for of_level in bits.chunk(levels)])
    return voted.repeat_interleave(tasks, 0)


def vote(bits: Tensor, threshold: float = 0.5) -> Tensor:
    """The mask for an unseen task: the weights that are active in enough tasks (Eq. 13).

    A weight is active if more than `threshold` tasks use it.

    Args:
        bits: int32 [T, P_m / 32].
        threshold: a share of the tasks, in [0, 1), or a number of tasks, from 1 to T - 1. For the
            paper's 25 of 50 tasks it is 0.5 or 25.

    Returns:
        int32 [P_m / 32].

    Raises:
        UserError: the threshold is neither a share nor a number of tasks in these ranges.
    """
    if not 0 <= threshold < len(bits) or (threshold >= 1 and threshold != int(threshold)):
        raise UserError(
            f"the threshold of the voted mask is {threshold:g} and there are {len(bits)} tasks: "
            f"give a share below 1, or a number of tasks below {len(bits)}"
        )
    # In floating point 0.29 * 100 is slightly less than 29: add a little before the floor.
    most = math.floor(threshold if threshold >= 1 else threshold * len(bits) + 1e-9)
    votes = torch.zeros(bits.shape[1] * 32, dtype=torch.int32, device=bits.device)
    for row in bits:
        votes += unpack_bits(row, len(votes))
    return pack_bits(votes > most)
