"""The weight and bias gradients of masked linear layers, for one layer or several together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..registration import kernels_for


class LayerGradients(NamedTuple):
    """What the gradients of one layer's weight and bias need: operands and output buffers.

    Attributes:
        dy: [G, R, N], the gradient of the output.
        y: [G, R, N], the output of a layer with a ReLU, else None.
        x: [G, R, K], the input.
        weight_bits, bias_bits, task_ids: as in `masked_linear`.
        weight_out: [G, N, K] for one gradient per group, or [1, N, K] for their sum.
        bias_out: [G, N] or [1, N] in the same way, or None without a bias.
        drop, seed: the dropout after the layer, which is applied to dy. The seed is None if and
            only if `drop` is 0.
        statistics: float32 [G, R, 2], the mean and the inverse standard deviation of each row of x,
            if a LayerNorm before the layer is applied to x; else None.
        affine: float32 [G, 2, K], gain and shift of this LayerNorm with the groups' masks, or None.
    """

    dy: Tensor
    y: Tensor | None
    x: Tensor
    weight_bits: Tensor | None
    bias_bits: Tensor | None
    task_ids: Tensor | None
    weight_out: Tensor
    bias_out: Tensor | None
    drop: float = 0.0
    seed: Tensor | None = None
    statistics: Tensor | None = None
    affine: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which dy and x are multiplied."""
        return self.x.dtype if self.statistics is None else self.dy.dtype


def write(layers: Sequence[LayerGradients]) -> None:
    """Write the weight and bias gradients of layers. A GPU computes them in one launch."""
    columns = [list(column) for column in zip(*layers, strict=True)]
    bias_outs = columns[_BIAS_OUT]
    columns[_BIAS_OUT] = [out for out in bias_outs if out is not None]
    has_bias = [out is not None for out in bias_outs]
    torch.ops.harmodt.masked_linear_weight_gradients(*columns, has_bias)


def layers_of(*operands: list) -> list[LayerGradients]:
    """The layers from the operation's arguments: the inverse of what `write` does."""
    *columns, has_bias = operands
    bias_outs = iter(columns[_BIAS_OUT])
    columns[_BIAS_OUT] = [next(bias_outs) if has else None for has in has_bias]
    return [LayerGradients(*layer) for layer in zip(*columns, strict=True)]


_BIAS_OUT = LayerGradients._fields.index("bias_out")


class WeightGradients:
    """A queue of layers whose weight gradients one launch computes together.

    Small layers need this to keep a GPU busy. On a CPU no layer waits. The operands of waiting
    layers stay in memory.

    Args:
        layers: the number of layers per launch.
    """

    def __init__(self, layers: int = 4):
        self._layers = layers
        self._waiting: list[LayerGradients] = []

    def add(self, layer: LayerGradients) -> None:
        """Add a layer. Compute the gradients of all waiting layers if there are enough."""
        self._waiting.append(layer)
        if len(self._waiting) == self._layers or kernels_for(layer.x.device) == "cpu":
            self.finish()

    def finish(self) -> None:
        """Compute the gradients of all waiting layers."""
        waiting, self._waiting = self._waiting, []  # also empty if an error ends the writing
        if waiting:
            write(waiting)
