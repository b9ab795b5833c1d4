"""All parameters of a model as one flat vector.

Mask selection, gradient clipping, the optimiser and checkpoints work on the whole vector; the
model's parameters are views into it. Maskable tensors come first, each row padded to whole 32-bit
mask words, so that element j of the vector is bit j of the packed mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harmodt_kernels import pack_bits, words_for
from harmodt_kernels.bits import BITS_PER_WORD


@dataclass(frozen=True)
class Slot:
    """Where one tensor lives in the vector: `rows` rows of `columns` elements, `stride` apart."""

    offset: int
    rows: int
    columns: int
    stride: int

    @property
    def end(self) -> int:
        return self.offset + self.rows * self.stride

    def view(self, vector: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of `shape` as a view of the vector."""
        rows = vector[self.offset : self.end].view(self.rows, self.stride)[:, : self.columns]
        return rows[0].view(shape) if self.rows == 1 else rows

    def of_groups(self, vectors: Tensor) -> Tensor:
        """This tensor's part of one vector per group [G, P]: a view [G, rows, columns]."""
        rows = vectors[:, self.offset : self.end].unflatten(1, (self.rows, self.stride))
        return rows[..., : self.columns]

    def bits(self, mask_bits: Tensor) -> Tensor:
        """This tensor's part of packed masks [T, words]: [T, rows, words per row]."""
        words = mask_bits[:, self.offset // BITS_PER_WORD : self.end // BITS_PER_WORD]
        return words.unflatten(1, (self.rows, self.stride // BITS_PER_WORD))


class ParameterVector:
    """The flat weights and gradient of a model, whose parameters become views of them.

    Attributes:
        weights: float32 [P], padding included.
        gradient: float32 [P], filled by backward passes; zero it before one.
        maskable_size: P_m, the number of leading elements that masks cover, padding included.
        slots: name of each parameter to its place.
    """

    def __init__(self, model: nn.Module, is_maskable: Callable[[str], bool], device: torch.device):
        parameters = dict(model.named_parameters())
        names = sorted(parameters, key=lambda name: not is_maskable(name))  # stable
        self.slots: dict[str, Slot] = {}
        offset = 0
        for name in names:
            self.slots[name] = _place(parameters[name].shape, offset, is_maskable(name))
            offset = self.slots[name].end
        self.maskable_names = [name for name in names if is_maskable(name)]
        self.maskable_size = self.slots[self.maskable_names[-1]].end
        self.weights = torch.zeros(offset, device=device)
        self.gradient = torch.zeros(offset, device=device)
        for name, parameter in parameters.items():
            view = self.slots[name].view(self.weights, parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = self.slots[name].view(self.gradient, parameter.shape)

    def valid_bits(self) -> Tensor:
        """int32 [P / 32]: 1 where the vector holds a parameter, 0 where it holds padding."""
        valid = torch.zeros(len(self.weights), dtype=torch.bool)
        for slot in self.slots.values():
            valid[slot.offset : slot.end].view(slot.rows, slot.stride)[:, : slot.columns] = True
        return pack_bits(valid).to(self.weights.device)

    def maskable_count(self) -> int:
        """Number of maskable weights, padding excluded."""
        slots = (self.slots[name] for name in self.maskable_names)
        return sum(slot.rows * slot.columns for slot in slots)


def _place(shape: torch.Size, offset: int, maskable: bool) -> Slot:
    by_rows = maskable and len(shape) == 2
    rows, columns = shape if by_rows else (1, shape.numel())
    return Slot(offset, rows, columns, words_for(columns) * BITS_PER_WORD)
