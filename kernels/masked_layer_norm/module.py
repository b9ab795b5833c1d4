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
    """A `torch.nn.LayerNorm` over groups of rows. Each group has the mask of its task.

    Each call takes the masks. The parameters have the same names as in `nn.LayerNorm`.

    Args:
        size: d, the number of elements of a row.
        eps: added to the variance.
        backend: computes the layer. None selects the fused operation for the input's device.
        device, dtype: the device and the dtype of the parameters.
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
            masks: the layer's masks, or None if every weight is active.

        Returns:
            y, [G, R, d], the normalised rows, under autocast in the autocast dtype; and x itself,
            for the residual sum of the branch that begins here.

        Raises:
            BackendUnavailable: the device has no fused kernel.
        """
        backend = self.backend
        apply: Callable[..., tuple[Tensor, Tensor]] = (
            backend.masked_layer_norm if backend else masked_layer_norm
        )
        # The product that reads y next would convert it, so y is written in the autocast dtype.
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else None
        masks = masks or NO_MASKS
        return apply(
            x,
            self.weight,
            self.bias,
            *masks.bits,
            epsilon=self.eps,
            dtype=dtype,
            group_gradients=masks.group_gradients,
        )
