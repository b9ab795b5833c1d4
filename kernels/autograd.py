"""Marks backward passes that have no derivative of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Results = tuple[Tensor | None, ...]


def differentiable_once(backward: Callable[..., Results]) -> Callable[..., Results]:
    """Decorate the backward pass of an operation: a gradient of its results raises an error.

    The fused kernels compute first derivatives only. Without this, a second derivative would be 0.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor | None) -> Results:
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled():  # nobody asked for a graph of the backward pass
            return results
        read = (*gradients, *ctx.saved_tensors)
        sources = [t for t in read if t is not None and t.requires_grad]
        return tuple(r if r is None else _NoDerivative.apply(r, *sources) for r in results)

    return wrapped


class _NoDerivative(torch.autograd.Function):
    """Joins a result to the tensors that it depends on, so that autograd comes to `backward`."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise RuntimeError(
            "the fused kernels have no gradient of a gradient: use backend=PYTORCH, the plain "
            "PyTorch operations of harmodt_kernels"
        )
