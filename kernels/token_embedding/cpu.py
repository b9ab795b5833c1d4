"""Passes the tensors of the token embedding to the C library."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ctypes import Array, byref, c_void_p

import torch
from torch import Tensor

from ..native.library import EmbeddingShape, library, pointer, threads


def token_embedding(
    inputs: Sequence[Tensor], timesteps: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Computes `harmodt::token_embedding`, with the arguments of its schema."""
    rows, size = parameters[-1].shape
    inputs, timesteps = [x.contiguous() for x in inputs], timesteps.contiguous()
    tokens = parameters[-1].new_empty(*timesteps.shape, len(inputs), size)
    shape = shape_of(inputs, timesteps, rows, size)
    library().harmodt_token_embedding(
        byref(shape), pointers(parameters), pointer(tokens), threads()
    )
    return tokens, no_arrivals(len(inputs), size)


@functools.cache
def no_arrivals(inputs: int, size: int) -> Tensor:
    """Zeros, int32 [inputs, size]. Only a GPU needs these counters, to find the last program."""
    with torch.inference_mode(False):
        return torch.zeros(inputs, size, dtype=torch.int32)


def token_embedding_gradient(
    d_tokens: Tensor,
    inputs: Sequence[Tensor],
    timesteps: Tensor,
    _: Tensor,
    outs: Sequence[Tensor],
) -> None:
    inputs, timesteps = [x.contiguous() for x in inputs], timesteps.contiguous()
    shape, d_tokens = shape_of(inputs, timesteps, *outs[-1].shape[1:]), d_tokens.contiguous()
    library().harmodt_token_embedding_gradient(
        byref(shape), pointer(d_tokens), pointers(outs), threads()
    )


def shape_of(inputs: Sequence[Tensor], timesteps: Tensor, rows: int, size: int) -> EmbeddingShape:
    return EmbeddingShape(
        steps=timesteps.numel(),
        size=size,
        rows=rows,
        timesteps=pointer(timesteps),
        x=pointers(inputs),
        inputs=tuple(x.shape[-1] for x in inputs),
    )


def pointers(tensors: Sequence[Tensor]) -> Array[c_void_p]:
    return (c_void_p * len(tensors))(*map(pointer, tensors))
