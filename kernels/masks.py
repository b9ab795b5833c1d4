"""The masks of one layer: as its operands, and as the definitions apply them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .bits import pack_bits, unpack_bits

if TYPE_CHECKING:
    from .masked_linear.gradients import WeightGradients


@dataclass(frozen=True)
class LayerMasks:
    """The masks of one layer under all tasks, and which of them each group of a batch uses.

    Attributes:
        weight_bits: int32 [T, N, ceil(K / 32)] of a linear layer, [T, ceil(d / 32)] of a LayerNorm;
            or None where every weight is active in every task.
        bias_bits: int32 [T, ceil(N / 32)], or None without a bias or without masks.
        task_ids: int64 [G], the task of each group; it is not read without masks.
        group_gradients: tensors [G, N, K] and [G, N] (of a LayerNorm both [G, d]; None without a
            bias) to which a backward pass writes the gradient of each group by itself, or of one
            row, [1, ...], to which it writes their sum; weight and bias then get none.
        queue: where a linear layer's gradients wait for those of other layers, or None.
        rounded: [N, K], a linear layer's weight in the type of its products, which is read in place
            of the weight where its gradients go to `group_gradients`; or None.
    """

    weight_bits: Tensor | None
    bias_bits: Tensor | None
    task_ids: Tensor | None
    group_gradients: tuple[Tensor, Tensor | None] | None = None
    queue: WeightGradients | None = None
    rounded: Tensor | None = None

    @property
    def bits(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The operands that say which weights are active."""
        return self.weight_bits, self.bias_bits, self.task_ids

    def operand_for(self, weight: Tensor) -> Tensor:
        """What a linear layer multiplies with for its weight.

        Raises:
            ValueError: that is the rounded one, and there is no place for its gradient.
        """
        if self.rounded is None:
            return weight
        if self.group_gradients is None:
            raise ValueError("a rounded weight gets no gradient: give group_gradients as well")
        return self.rounded


NO_MASKS = LayerMasks(None, None, None)
"""Of a layer whose weights are all active."""


def copies_of_groups(
    values: Tensor,
    bits: Tensor | None,
    task_ids: Tensor | None,
    groups: int,
    gradient: Tensor | None = None,
) -> Tensor:
    """One copy of a parameter for each group, 0 where the mask of the group's task is.

    Args:
        values: [..., K].
        bits: int32 [T, ..., ceil(K / 32)], or None for no masks.
        task_ids: int64 [G], or None for no masks.
        groups: G.
        gradient: [G, ..., K], to which a backward pass writes that of each copy, or [1, ..., K],
            to which it writes their sum; it does not reach `values` then.

    Returns:
        [G, ..., K].
    """
    copies = values.expand(groups, *values.shape)
    if gradient is not None:
        copies = copies.detach().requires_grad_()

        def write(of_copies: Tensor) -> None:
            gradient.copy_(of_copies.sum_to_size(gradient.shape))

        copies.register_hook(write)
    if bits is None:
        return copies
    # not a product: 0 times NaN or infinity is NaN
    return torch.where(unpack_bits(bits[task_ids], values.shape[-1]), copies, 0.0)


def with_gradients_in(buffers: Sequence[Tensor | None] | None, *parameters: Any) -> list[Any]:
    """Parameters whose gradients a backward pass writes to buffers, for plain PyTorch.

    Args:
        buffers: [1, *shape] for each parameter; or None, and the parameters come back as they are.
        parameters: tensors, or None for one that there is not.
    """
    if buffers is None:
        return list(parameters)
    pairs = zip(parameters, buffers, strict=True)
    return [
        p if p is None else copies_of_groups(p, None, None, 1, out).squeeze(0) for p, out in pairs
    ]


@functools.cache
def all_active(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The bits of one task that uses every weight, int32 [1, ..., words], padding 0."""
    with torch.inference_mode(False):  # whoever asks next may want gradients
        return pack_bits(torch.ones(1, *shape, dtype=torch.bool, device=device))


@functools.cache
def first_task(groups: int, device: torch.device) -> Tensor:
    """Ids of groups that all belong to the first task, int64 [G]."""
    with torch.inference_mode(False):
        return torch.zeros(groups, dtype=torch.int64, device=device)
