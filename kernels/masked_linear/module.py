"""The masked linear layer as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..masks import NO_MASKS, LayerMasks
from .operation import masked_linear

if TYPE_CHECKING:
    from ..backend import Backend


class MaskedLinear(nn.Linear):
    """A `torch.nn.Linear` over groups of rows. Each group has the mask of its task.

    If a weight or bias is inactive in a group's task, it counts as 0 for the group and gets no
    gradient from the group. Each call takes the masks. The parameters have the same names as in
    `nn.Linear`.

    Args:
        in_features, out_features: sizes K and N.
        bias: whether the layer has a bias, which is masked too.
        backend: computes the layer. None selects the fused operation for the input's device.
        device, dtype: the device and the dtype of the parameters.
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

    def forward(self, x: Tensor, masks: LayerMasks | None = None, *, relu: bool = False) -> Tensor:
        """Apply the layer, then max(0, y) if `relu`.

        Args:
            x: [G, R, K].
            masks: the layer's masks, or None if every weight is active.

        Returns:
            [G, R, N].

        Raises:
            BackendUnavailable: the device has no fused kernel.
        """
        apply = masked_linear if self.backend is None else self.backend.masked_linear
        masks = masks or NO_MASKS
        return apply(
            x,
            masks.operand_for(self.weight),
            self.bias,
            *masks.bits,
            relu=relu,
            group_gradients=masks.group_gradients,
            queue=masks.queue,
        )
