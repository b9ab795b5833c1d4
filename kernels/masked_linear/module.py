"""The masked linear layer as a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..masks import NO_MASKS, LayerMasks
from .operation import masked_linear

if TYPE_CHECKING:
    from ..backend import Backend


class MaskedLinear(nn.Linear):
    """A `torch.nn.Linear` over groups of rows. Each group has the mask of its task.

    If a weight or bias is inactive in a group's task, it counts as 0 for the group and gets no
    gradient from it. Without masks, this is `nn.Linear`. The parameters have the names that they
    have there.

    Args:
        in_features, out_features: sizes K and N.
        bias: whether the layer has a bias, which is masked too.
        backend: computes the layer. None selects the fused operation for the input's device.
        device, dtype: of the parameters.

    Attributes:
        masks: the masks of calls that are given none, or None. They move with the module, but its
            state dict leaves them out.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        backend: Backend | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.backend = backend
        self.masks: LayerMasks | None = None

    def forward(self, x: Tensor, masks: LayerMasks | None = None, *, relu: bool = False) -> Tensor:
        """Apply the layer, then max(0, y) if `relu`.

        Args:
            x: [G, ..., K] with masks, where G is the length of their `task_ids`; else [..., K].
            masks: the layer's masks. None selects the attribute `masks`. If this is None too, every
                weight is active.

        Returns:
            [G, ..., N] or [..., N].

        Raises:
            ValueError: x has another number of groups than the masks.
            BackendUnavailable: the device has no fused kernel.
        """
        apply = masked_linear if self.backend is None else self.backend.masked_linear
        masks = masks or self.masks or NO_MASKS
        y = apply(
            x if x.dim() == 3 else x.reshape(_groups(x, masks), -1, x.shape[-1]),
            masks.operand_for(self.weight),
            self.bias,
            *masks.bits,
            relu=relu,
            group_gradients=masks.group_gradients,
            queue=masks.queue,
        )
        return y if x.dim() == 3 else y.reshape(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLinear:
        """Apply `fn`, which for example moves a tensor, to the parameters and to the masks."""
        super()._apply(fn, recurse)
        if self.masks is not None:
            names = ("weight_bits", "bias_bits", "task_ids", "bf16_copy")
            tensors = ((name, getattr(self.masks, name)) for name in names)
            moved: dict[str, Any] = {name: fn(t) for name, t in tensors if t is not None}
            if (buffers := self.masks.group_gradients) is not None:
                moved["group_gradients"] = tuple(b if b is None else fn(b) for b in buffers)
            self.masks = dataclasses.replace(self.masks, **moved)
        return self


def _groups(x: Tensor, masks: LayerMasks) -> int:
    """The number of groups in x: one, unless there are masks or a gradient for each group."""
    if masks.task_ids is None:
        return 1
    groups = len(masks.task_ids)
    if x.dim() < 2 or len(x) != groups:
        raise ValueError(
            f"x has shape {list(x.shape)} and its masks are for {groups} groups: x must be "
            f"[{groups}, ..., {x.shape[-1]}]"
        )
    return groups
