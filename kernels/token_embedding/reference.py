"""The definition of the token embedding in plain PyTorch."""

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
    """Three tokens of each time step: a linear layer's output of each input, plus the time's row.

    Differentiable in inputs and parameters.

    Args:
        inputs: three tensors, [..., I] with an I of each.
        timesteps: int64 [...], below T.
        parameters: weight [d, I] and bias [d] of each input's layer in turn, then the table of the
            time steps, [T, d].
        gradients: tensors [1, ...], as the parameters, to which the backward pass writes their
            gradients; the parameters then get none.

    Returns:
        [..., 3, d].
    """
    if gradients is not None:
        pairs = zip(parameters, gradients, strict=True)
        parameters = [copies_of_groups(p, None, None, 1, out).squeeze(0) for p, out in pairs]
    *layers, table = parameters
    of_layers = zip(inputs, layers[::2], layers[1::2], strict=True)
    tokens = torch.stack([F.linear(x, weight, bias) for x, weight, bias in of_layers], dim=-2)
    return tokens + F.embedding(timesteps, table)[..., None, :]
