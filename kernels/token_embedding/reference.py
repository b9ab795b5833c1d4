"""Defines the token embedding in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import with_gradients_in


def token_embedding(
    inputs: Sequence[Tensor],
    timesteps: Tensor,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor] | None = None,
) -> Tensor:
    """Embed three inputs per step: each token is a linear layer's output plus the timestep's row.

    The result is differentiable in inputs and parameters.

    Args:
        inputs: three tensors, [..., I]. Each has its own I.
        timesteps: int64 [...], below T.
        parameters: the weight [d, I] and the bias [d] of each input's layer in turn, then the table
            of timesteps, [T, d].
        gradients: buffers [1, ...] for the gradients of the parameters, in the same order, or None.
            The backward pass writes to them. The parameters themselves then get no gradient.

    Returns:
        [..., 3, d].
    """
    *layers, table = with_gradients_in(gradients, *parameters)
    of_layers = zip(inputs, layers[::2], layers[1::2], strict=True)
    tokens = torch.stack([F.linear(x, weight, bias) for x, weight, bias in of_layers], dim=-2)
    return tokens + F.embedding(timesteps, table)[..., None, :]
