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
    """A `torch.nn.Linear` over groups of rows, each under the mask of its task.

    A weight or bias that is inactive in a group's task counts as zero there and gets no gradient
    from it. The masks come with each call; parameters and their names are those of `nn.Linear`.

    Args:
        in_features, out_features: sizes K and N.
        bias: whether there is a bias, which is masked too.
        backend: whose operation is used, or None for the fused one of the input's device.
        device, dtype: of the parameters.
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
            masks: those of the layer, or None where every weight is active.

        Returns:
            [G, R, N].

        Raises:
            BackendUnavailable: there is no fused kernel for the device.
        """
        apply = masked_linear if self.backend is None else self.backend.masked_linear
        of_layer = masks or NO_MASKS
        return apply(
            x,
            of_layer.operand_for(self.weight),
            self.bias,
            *of_layer.bits,
            relu=relu,
            group_gradients=of_layer.group_gradients,
            queue=of_layer.queue,
        )
