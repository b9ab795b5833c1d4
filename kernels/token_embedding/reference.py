"""The definition of the token embedding in plain PyTorch."""

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
    *layers, table = with_gradients_in(gradients, *parameters)
    of_layers = zip(inputs, layers[::2], layers[1::2], strict=True)
    tokens = torch.stack([F.linear(x, weight, bias) for x, weight, bias in of_layers], dim=-2)
    return tokens + F.embedding(timesteps, table)[..., None, :]
