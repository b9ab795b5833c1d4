"""The masked LayerNorm as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..masks import NO_MASKS, LayerMasks
from .operation import masked_layer_norm

if TYPE_CHECKING:
    from ..backend import Backend


class MaskedLayerNorm(nn.LayerNorm):
    """A `torch.nn.LayerNorm` over groups of rows, each under the mask of its task.

    The masks come with each call; parameters and their names are those of `nn.LayerNorm`.

    Args:
        size: d.
        eps: added to the variance.
        backend: whose operation is used, or None for the fused one of the input's device.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float = 1e-5,
        backend: Backend | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(size, eps, device=device, dtype=dtype)
        self.backend = backend

    def forward(  # type: ignore[override]
        self, x: Tensor, masks: LayerMasks | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalise each row.

        Args:
            x: [G, R, d].
            masks: those of the layer, or None where every weight is active.

        Returns:
            What is normalised, [G, R, d], under autocast in the autocast dtype; and x itself, for
            the residual sum of the branch that begins here.

        Raises:
            BackendUnavailable: there is no fused kernel for the device.
        """
        backend = self.backend
        apply: Callable[..., tuple[Tensor, Tensor]] = (
            backend.masked_layer_norm if backend else masked_layer_norm
        )
        # What follows is a product, which would convert y.
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else None
        of_layer = masks or NO_MASKS
        return apply(
            x,
            self.weight,
            self.bias,
            *of_layer.bits,
            epsilon=self.eps,
            dtype=dtype,
            group_gradients=of_layer.group_gradients,
        )
