"""The fused token embedding: its public function, its checks and its registered operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autograd import differentiable_once
from ..operands import Layout, check
from ..registration import register


def token_embedding(
    inputs: Sequence[Tensor],
    timesteps: Tensor,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor] | None = None,
) -> Tensor:
    """Embed three inputs per step: each token is a linear layer's output plus the timestep's row.

    This is the fused form of `reference.token_embedding`: one pass forward, and one pass for the
    gradients of all parameters. Products are in float32, whatever precision is set; but the
    gradients of inputs are PyTorch's products. Results repeat bit for bit.

    Args:
        inputs: three tensors, float32 [..., I]. Each has its own I.
        timesteps: int64 [...], below T. A GPU does not check them.
        parameters: the weight [d, I] and the bias [d] of each input's layer in turn, then the table
            of timesteps, [T, d]; float32.
        gradients: buffers [1, ...] for the gradients of the parameters, in the same order, or None.
            The backward pass writes to them. The parameters themselves then get no gradient.

    Returns:
        float32 [..., 3, d].

    Raises:
        TypeError: a tensor is not float32, or timesteps is not int64.
        ValueError: shapes or devices do not fit together, or a parameter is not contiguous.
        IndexError: on a CPU, the table has no row for a timestep.
        BackendUnavailable: the device has no fused kernels.
    """
    _check_operands(inputs, timesteps, parameters, gradients or [])
    return _TokenEmbedding.apply(timesteps, *inputs, *parameters, *(gradients or []))


def _check_operands(
    inputs: Sequence[Tensor],
    timesteps: Tensor,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> None:
    if len(inputs) != 3 or len(parameters) != 7 or len(gradients) not in (0, 7):
        raise ValueError(
            f"there are {len(inputs)} inputs, {len(parameters)} parameters and {len(gradients)} "
            "gradients: give three, seven, and seven or none"
        )
    device = timesteps.device
    check("timesteps", timesteps, torch.int64, (None,) * timesteps.dim(), device)
    rows, size = len(parameters[-1]), parameters[-1].shape[-1]
    shapes: list[tuple[int, ...]] = []
    for x in inputs:
        shapes += [(size, x.shape[-1]), (size,)]
    shapes.append((rows, size))
    named = [(f"inputs[{i}]", x, (*timesteps.shape, x.shape[-1])) for i, x in enumerate(inputs)]
    for name, tensors, one in (("parameters", parameters, ()), ("gradients", gradients, (1,))):
        for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=False)):
            named.append((f"{name}[{i}]", tensor, (*one, *shape)))
    for name, tensor, shape in named:
        layout: Layout = "any" if name.startswith("inputs") else "contiguous"
        check(name, tensor, torch.float32, shape, device, layout=layout)


class _TokenEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, timesteps: Tensor, *tensors: Tensor) -> Tensor:
        """Takes inputs, parameters and gradients one by one: autograd finds no tensors in lists."""
        inputs, parameters = tensors[:3], tensors[3:10]
        tokens, arrivals = torch.ops.harmodt.token_embedding(inputs, timesteps, parameters)
        ctx.save_for_backward(timesteps, arrivals, *inputs, *parameters)
        ctx.gradients = tensors[10:]
        return tokens

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_tokens: Tensor) -> tuple[Tensor | None, ...]:
        timesteps, arrivals, *tensors = ctx.saved_tensors
        inputs, parameters = tensors[:3], tensors[3:]
        given = len(ctx.gradients) > 0
        outs = ctx.gradients if given else [torch.empty_like(p)[None] for p in parameters]
        torch.ops.harmodt.token_embedding_gradient(d_tokens, inputs, timesteps, arrivals, outs)
        with torch.autocast(d_tokens.device.type, enabled=False):
            d_inputs = [
                d_tokens.select(-2, i) @ parameters[2 * i] if ctx.needs_input_grad[1 + i] else None
                for i in range(len(inputs))
            ]
        d_parameters = [None] * 14 if given else [out[0] for out in outs]
        return None, *d_inputs, *d_parameters


def _token_embedding_fake(
    inputs: Sequence[Tensor], timesteps: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    size = parameters[-1].shape[1]
    return (
        inputs[0].new_empty(*timesteps.shape, len(inputs), size),
        inputs[0].new_empty(len(inputs), size, dtype=torch.int32),
    )


def _gradient_fake(*_: Any) -> None:
    return None


register(
    __package__,
    "token_embedding",
    "(Tensor[] inputs, Tensor timesteps, Tensor[] parameters) -> (Tensor tokens, Tensor arrivals)",
    _token_embedding_fake,
)
register(
    __package__,
    "token_embedding_gradient",
    # The GPU kernel counts its programs in `arrivals`, then sets it back to 0.
    "(Tensor d_tokens, Tensor[] inputs, Tensor timesteps, Tensor arrivals, Tensor(a!)[] outs) "
    "-> ()",
    _gradient_fake,
)
