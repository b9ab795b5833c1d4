"""Defines a masked LayerNorm and the masked linear layer after it in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..masked_layer_norm.reference import masked_layer_norm
from ..masked_linear.reference import masked_linear
from ..masks import LayerMasks


def norm_then_linear(
    layer_norm: Callable[..., tuple[Tensor, Tensor]],
    linear: Callable[..., Tensor],
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_masks: LayerMasks,
    masks: LayerMasks,
    *,
    epsilon: float = 1e-5,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """linear(layer_norm(x)), the start of a residual branch.

    Args:
        layer_norm, linear: `masked_layer_norm` and `masked_linear` of one implementation. All other
            arguments are also the arguments of `norm_linear`.
        x: [G, R, K], one task per group.
        gain, shift: [K], weight and bias of the LayerNorm.
        weight, bias: [N, K] and [N] (or None), weight and bias of the linear layer.
        norm_masks, masks: the masks of the LayerNorm and of the linear layer. Both hold the same
            tensor `task_ids`.
        epsilon: added to the variance.
        relu: apply max(0, y) to the output.

    Returns:
        y, [G, R, N], in the dtype of x (under autocast, in the autocast dtype); and x itself, for
        the residual sum of the branch.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    normalised, x = layer_norm(
        x,
        gain,
        shift,
        *norm_masks.bits,
        epsilon=epsilon,
        dtype=torch.get_autocast_dtype(x.device.type) if autocast else None,
        group_gradients=norm_masks.group_gradients,
    )
    out, queue = masks.group_gradients, masks.queue
    operands = normalised, weight, bias, *masks.bits
    return linear(*operands, relu=relu, group_gradients=out, queue=queue), x


def norm_linear(*operands: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    """`norm_then_linear` with the operations of this implementation."""
    return norm_then_linear(masked_layer_norm, masked_linear, *operands, **settings)
