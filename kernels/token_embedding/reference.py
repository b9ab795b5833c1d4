"""Defines the token embedding in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import copies_of_groups


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
    if gradients is not None:
        pairs = zip(parameters, gradients, strict=True)
        parameters = [copies_of_groups(p, None, None, 1, out).squeeze(0) for p, out in pairs]
    *layers, table = parameters
    operands = zip(inputs, layers[::2], layers[1::2], strict=True)
    tokens = torch.stack([F.linear(x, weight, bias) for x, weight, bias in operands], dim=-2)
    return tokens + F.embedding(timesteps, table)[..., None, :]
