"""The masks of one layer as operands, and how the definitions apply them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .bits import unpack_bits

if TYPE_CHECKING:
    from .masked_linear.gradients import WeightGradients


@dataclass(frozen=True)
class LayerMasks:
    """The masks of one layer in all tasks, and the task of each group of a batch.

    Attributes:
        weight_bits: int32 [T, N, ceil(K / 32)] for a linear layer, [T, ceil(d / 32)] for a
            LayerNorm. None means that every weight is active in every task.
        bias_bits: int32 [T, ceil(N / 32)], or None without a bias or without masks.
        task_ids: int64 [G], the task of each group. Without masks nothing reads it.
        group_gradients: the buffers for the gradients of weight and bias, or None. They have shapes
            [G, N, K] and [G, N] (for a LayerNorm both [G, d]; without a bias the second is None),
            and a backward pass writes each group's gradient to them. If their first dimension is 1
            instead, it writes the sum over the groups. With these buffers, weight and bias
            themselves get no gradient.
        queue: collects a linear layer's gradient together with other layers' gradients, so that one
            launch computes all of them; or None.
        bf16_copy: [N, K], a copy of a linear layer's weight in the dtype of its products, or None.
            Products read it instead of the weight. It requires `group_gradients`.
    """

    weight_bits: Tensor | None
    bias_bits: Tensor | None
    task_ids: Tensor | None
    group_gradients: tuple[Tensor, Tensor | None] | None = None
    queue: WeightGradients | None = None
    bf16_copy: Tensor | None = None

    @property
    def bits(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The operands that say which weights and biases are active: bits and task ids."""
        return self.weight_bits, self.bias_bits, self.task_ids

    def operand_for(self, weight: Tensor) -> Tensor:
        """The tensor that products read for `weight`: the copy if there is one.

        Raises:
            ValueError: there is a copy, but no `group_gradients` to take its gradient.
        """
        if self.bf16_copy is None:
            return weight
        if self.group_gradients is None:
            raise ValueError("a bf16_copy gets no gradient: give group_gradients as well")
        return self.bf16_copy


NO_MASKS = LayerMasks(None, None, None)
"""For a layer whose weights are all active."""


def stride_of(bits: Tensor | None, dimension: int) -> int:
    """The stride of mask bits. Without masks it is 0."""
    return 0 if bits is None else bits.stride(dimension)


def copies_of_groups(
    values: Tensor,
    bits: Tensor | None,
    task_ids: Tensor | None,
    groups: int,
    gradient: Tensor | None = None,
) -> Tensor:
    """One copy of a parameter for each group, 0 where the mask of the group's task is 0.

    Args:
        values: [..., K].
        bits: int32 [T, ..., ceil(K / 32)], or None for no masks.
        task_ids: int64 [G], or None for no masks.
        groups: G.
        gradient: a buffer, or None. A backward pass writes the gradient of each copy to
            [G, ..., K], or their sum to [1, ..., K]. No gradient reaches `values` then.

    Returns:
        [G, ..., K].
    """
    copies = values.expand(groups, *values.shape)
    if gradient is not None:
        copies = copies.detach().requires_grad_()

        def write(copy_gradients: Tensor) -> None:
            gradient.copy_(copy_gradients.sum_to_size(gradient.shape))

        copies.register_hook(write)
    if bits is None:
        return copies
    # torch.where instead of a product with the mask, because 0 times NaN or infinity is NaN.
    return torch.where(unpack_bits(bits[task_ids], values.shape[-1]), copies, 0.0)


def with_gradients_in(buffers: Sequence[Tensor | None] | None, *parameters: Any) -> list[Any]:
    """Copies of parameters. A backward pass writes the gradients of the copies to buffers.

    Args:
        buffers: a buffer [1, *shape] for each parameter. With None, the function returns the
            parameters themselves.
        parameters: tensors. None stands for a bias that the layer lacks.
    """
    if buffers is None:
        return list(parameters)
    pairs = zip(parameters, buffers, strict=True)
    return [
        p if p is None else copies_of_groups(p, None, None, 1, out).squeeze(0) for p, out in pairs
    ]
