"""All parameters of a model as one flat vector.

Mask selection, gradient clipping, the optimiser and checkpoints work on the whole vector, and the
model's parameters are views of it. The parameters of masked layers come first. Each row is padded
to a multiple of 32 elements, one for each bit of a mask word. So bit j of a packed mask masks
element j of the vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .bits import BITS_PER_WORD, count_bits, pack_bits, words_for
from .masked_layer_norm import MaskedLayerNorm
from .masked_linear import MaskedLinear

MASKED_LAYERS = (MaskedLinear, MaskedLayerNorm)
"""The layers that masks cover. Masks cover all parameters of these layers, and no other
parameters."""


@dataclass(frozen=True)
class Slot:
    """The position of a tensor in the vector: `rows` rows of `columns` elements, `stride` apart."""

    offset: int
    shape: torch.Size
    rows: int
    columns: int
    stride: int

    @property
    def end(self) -> int:
        return self.offset + self.rows * self.stride

    def view(self, vector: Tensor) -> Tensor:
        """The tensor as a view of the vector [P]."""
        return self.of_groups(vector[None])[0]

    def of_groups(self, vectors: Tensor) -> Tensor:
        """The tensor in each of G vectors, [G, P]: a view [G, *shape]."""
        part = vectors[:, self.offset : self.end]
        if self.rows == 1:
            return part[:, : self.columns].view(len(vectors), *self.shape)
        return part.unflatten(1, (self.rows, self.stride))[..., : self.columns]

    def bits(self, mask_bits: Tensor) -> Tensor:
        """The bits of the tensor in packed masks [T, words]: [T, *shape[:-1], words of a row]."""
        words = mask_bits[:, self.offset // BITS_PER_WORD : self.end // BITS_PER_WORD]
        return words.unflatten(1, (*self.shape[:-1], -1))


class ParameterVector:
    """The flat weights and gradient of a model. The model's parameters become views of them.

    Attributes:
        weights: float32 [P], padding included.
        gradient: float32 [P]. Autograd adds to it, so set it to 0 before a backward pass.
        maskable_size: P_m, the number of leading elements that masks cover, with padding. It is 0
            for a model without masked layers.
        slots: the slot of each parameter, by name.
        layers: the slots of weight and bias of each masked layer; None for a missing bias.
        shared: for each module that no mask covers, the slots of its parameters in their order.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        layers = [m for m in model.modules() if isinstance(m, MASKED_LAYERS)]
        masked = {id(parameter) for layer in layers for parameter in layer.parameters()}
        parameters = dict(model.named_parameters())
        # The sort is stable: masked parameters come first, else the model's order stays.
        first = sorted(parameters, key=lambda name: id(parameters[name]) not in masked)
        self.slots: dict[str, Slot] = {}
        self.maskable_size = offset = 0
        for name in first:
            maskable = id(parameters[name]) in masked
            self.slots[name] = _slot(parameters[name].shape, offset, maskable)
            offset = self.slots[name].end
            self.maskable_size = offset if maskable else self.maskable_size
        self.weights = torch.zeros(offset, device=device)
        self.gradient = torch.zeros(offset, device=device)
        of_parameter = {id(parameters[name]): slot for name, slot in self.slots.items()}
        self.layers: dict[nn.Module, tuple[Slot, Slot | None]] = {
            layer: (
                of_parameter[id(layer.weight)],
                None if layer.bias is None else of_parameter[id(layer.bias)],
            )
            for layer in layers
        }
        self.shared = {
            module: [of_parameter[id(parameter)] for parameter in module.parameters()]
            for module in model.modules()
            if masked.isdisjoint(map(id, module.parameters()))
        }
        for name, parameter in parameters.items():
            view = self.slots[name].view(self.weights)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = self.slots[name].view(self.gradient)

    @property
    def maskable_slots(self) -> list[Slot]:
        """The slots of the parameters of masked layers, in order."""
        return [slot for slot in self.slots.values() if slot.end <= self.maskable_size]

    def count_by_parameter(self, mask_bits: Tensor) -> dict[str, Tensor]:
        """Count the set bits of masks, int32 [T, P_m / 32], in each maskable parameter.

        Returns:
            int64 [T] by the parameter's name.
        """
        return {
            name: count_bits(mask_bits[:, slot.offset // BITS_PER_WORD : slot.end // BITS_PER_WORD])
            for name, slot in self.slots.items()
            if slot.end <= self.maskable_size
        }

    def valid_bits(self) -> Tensor:
        """int32 [P / 32]: a bit is 1 for an element of a parameter and 0 for padding."""
        valid = torch.zeros(len(self.weights), dtype=torch.bool)
        for slot in self.slots.values():
            slot.view(valid).fill_(True)
        return pack_bits(valid).to(self.weights.device)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters as views of the vector, by name."""
        return {name: slot.view(self.weights) for name, slot in self.slots.items()}

    def count(self) -> int:
        """Number of weights, without padding."""
        return sum(slot.rows * slot.columns for slot in self.slots.values())

    def maskable_count(self) -> int:
        """Number of maskable weights, without padding."""
        return sum(slot.rows * slot.columns for slot in self.maskable_slots)


def by_layer(counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The counts of `count_by_parameter`, summed over the parameters of each layer."""
    sums: dict[str, Tensor] = {}
    for name, count in counts.items():
        layer = name.rpartition(".")[0]
        sums[layer] = sums[layer] + count if layer in sums else count
    return sums


def _slot(shape: torch.Size, offset: int, maskable: bool) -> Slot:
    by_rows = maskable and len(shape) == 2
    rows, columns = shape if by_rows else (1, math.prod(shape))
    return Slot(offset, shape, rows, columns, words_for(columns) * BITS_PER_WORD)
