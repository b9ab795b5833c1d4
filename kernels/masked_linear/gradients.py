"""The gradients of the weights of masked linear layers: of one layer, or of several together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..registration import kernels_for


class LayerGradients(NamedTuple):
    """What the gradients of a layer's weight and bias follow from, and where they are written.

    Attributes:
        dy: [G, R, N], of the output.
        y: the output, [G, R, N], where a ReLU made it, else None.
        x: [G, R, K].
        weight_bits, bias_bits, task_ids: as those of `masked_linear`.
        weight_out: [G, N, K] for the gradients of each group, or [1, N, K] for their sums.
        bias_out: [G, N] or [1, N], likewise, or None without a bias.
        drop, seed: of the dropout behind the layer, which is applied to dy; the seed is None iff
            `drop` is 0.
        statistics, affine: of the LayerNorm before the layer, which is applied to x: float32
            [G, R, 2], each row's mean and inverse deviation, and [G, 2, K], gain and shift under
            the groups' masks; both None without one.
    """

    dy: Tensor
    y: Tensor | None
    x: Tensor
    weight_bits: Tensor
    bias_bits: Tensor | None
    task_ids: Tensor
    weight_out: Tensor
    bias_out: Tensor | None
    drop: float = 0.0
    seed: Tensor | None = None
    statistics: Tensor | None = None
    affine: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """In which dy and x are multiplied."""
        return self.x.dtype if self.statistics is None else self.dy.dtype


_BIAS_OUT = LayerGradients._fields.index("bias_out")


def write(layers: Sequence[LayerGradients]) -> None:
    """Write the gradients of some layers: on a GPU, of all of them at once."""
    columns = [list(column) for column in zip(*layers, strict=True)]
    columns[_BIAS_OUT] = [out for out in columns[_BIAS_OUT] if out is not None]
    torch.ops.harmodt.masked_linear_weight_gradients(*columns)


def layers_of(*operands: list) -> list[LayerGradients]:
    """The layers from the operation's arguments; biases are only of those that have one."""
    columns, of_layers = list(operands), iter(operands[_BIAS_OUT])
    bias_bits = columns[LayerGradients._fields.index("bias_bits")]
    columns[_BIAS_OUT] = [None if bits is None else next(of_layers) for bits in bias_bits]
    return [LayerGradients(*layer) for layer in zip(*columns, strict=True)]


class WeightGradients:
    """Layers whose gradients of weights wait for those of other layers.

    A GPU computes those of several layers in one launch, which small ones need to keep it busy. On
    a CPU nothing waits. What they are computed from stays in memory as long as they wait.

    Args:
        layers: how many are computed at once.
    """

    def __init__(self, layers: int = 4):
        self._layers = layers
        self._waiting: list[LayerGradients] = []

    def add(self, layer: LayerGradients) -> None:
        """Compute a layer's gradients once there are enough layers."""
        self._waiting.append(layer)
        if len(self._waiting) == self._layers or kernels_for(layer.x.device) == "cpu":
            self.finish()

    def finish(self) -> None:
        """Compute the gradients that still wait."""
        if self._waiting:
            write(self._waiting)
            self._waiting.clear()
