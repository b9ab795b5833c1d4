from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from harmodt.config import ModelConfig
from harmodt.masks.vector import ParameterVector
from harmodt.networks.decision_transformer import DecisionTransformer, is_maskable

DIMENSIONS = [(32, 2), (24, 3), (60, 4), (40, 2)]  # embedding dimension, heads


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(3, 5)
        self.masked = nn.Linear(40, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.masked(torch.tanh(self.shared(x)).repeat(1, 8))


def make_small() -> tuple[Small, ParameterVector]:
    model = Small()
    return model, ParameterVector(
        model, lambda name: name.startswith("masked."), torch.device("cpu")
    )


def make_model(dimension: int, heads: int) -> DecisionTransformer:
    return DecisionTransformer(ModelConfig(dimension, layers=2, heads=heads), tasks=2)


def test_the_layout_is_maskable_rows_of_whole_words_then_the_rest() -> None:
    torch.manual_seed(0)
    plain = Small()
    torch.manual_seed(0)
    model, vector = make_small()
    expected = np.zeros(3 * 64 + 32 + 32 + 32, np.float32)
    for row in range(3):
        expected[64 * row : 64 * row + 40] = plain.masked.weight[row].detach()
    expected[192:195] = plain.masked.bias.detach()
    expected[224:239] = plain.shared.weight.detach().flatten()
    expected[256:261] = plain.shared.bias.detach()
    np.testing.assert_array_equal(vector.weights.numpy(), expected)
    assert vector.maskable_size == 224
    assert vector.maskable_count() == 3 * 40 + 3
    assert vector.maskable_names == ["masked.weight", "masked.bias"]
    valid = np.unpackbits(vector.valid_bits().numpy().view(np.uint8), bitorder="little")
    np.testing.assert_array_equal(np.flatnonzero(valid), np.flatnonzero(expected))
    for name, parameter in plain.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], parameter)


def test_slots_cut_packed_masks_row_by_row() -> None:
    _, vector = make_small()
    bits = torch.arange(2 * 7, dtype=torch.int32).view(2, 7)
    assert vector.slots["masked.weight"].bits(bits).tolist() == [
        [[0, 1], [2, 3], [4, 5]],
        [[7, 8], [9, 10], [11, 12]],
    ]
    assert vector.slots["masked.bias"].bits(bits).tolist() == [[[6]], [[13]]]


@pytest.mark.parametrize(("dimension", "heads"), DIMENSIONS)
def test_parameters_and_gradients_are_views_of_the_vector(dimension: int, heads: int) -> None:
    model = make_model(dimension, heads)
    vector = model.vector
    vector.weights.copy_(torch.arange(len(vector.weights)))
    vector.gradient.copy_(-torch.arange(len(vector.weights)))
    seen = []
    for parameter in model.parameters():
        assert torch.equal(parameter.grad, -parameter)
        seen.append(parameter.detach().flatten().clone())
        with torch.no_grad():
            parameter.fill_(-1.0)
            parameter.grad.fill_(7.0)
    positions = torch.cat(seen).sort().values
    assert len(positions.unique()) == len(positions)  # no two parameters share an element
    assert torch.equal((vector.weights == -1.0).nonzero()[:, 0], positions.long())
    assert torch.equal((vector.gradient == 7.0).nonzero()[:, 0], positions.long())


@pytest.mark.parametrize(("dimension", "heads"), DIMENSIONS)
def test_masks_cover_the_leading_elements(dimension: int, heads: int) -> None:
    model = make_model(dimension, heads)
    vector = model.vector
    vector.weights.zero_()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if is_maskable(name) else 2.0)
    assert (vector.weights[: vector.maskable_size] < 2).all()
    assert (vector.weights[vector.maskable_size :] != 1).all()
    assert vector.maskable_count() == int((vector.weights == 1).sum())
    assert vector.maskable_size % 32 == 0
    valid = np.unpackbits(vector.valid_bits().numpy().view(np.uint8), bitorder="little")
    np.testing.assert_array_equal(valid, vector.weights.numpy() > 0)


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
def test_backward_accumulates_into_the_vector() -> None:
    torch.manual_seed(0)
    plain = Small()
    torch.manual_seed(0)
    model, vector = make_small()
    x = torch.randn(6, 3)
    for _ in range(2):
        plain(x).square().sum().backward()
        model(x).square().sum().backward()
    for (name, expected), parameter in zip(
        plain.named_parameters(), model.parameters(), strict=True
    ):
        in_vector = vector.slots[name].view(vector.gradient, parameter.shape)
        assert parameter.grad.data_ptr() == in_vector.data_ptr()
        torch.testing.assert_close(in_vector, expected.grad)
    vector.gradient.zero_()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_changing_the_vector_changes_the_output() -> None:
    model, vector = make_small()
    x = torch.randn(6, 3)
    before = model(x)
    vector.weights.mul_(2.0)
    assert not torch.allclose(model(x), before)
    vector.weights.zero_()
    assert (model(x) == 0).all()
