from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import make_model
from torch import nn

from harmodt.masks.bank import TaskMasks
from harmodt.networks.decision_transformer import DecisionTransformer, TransformerConfig
from harmodt_kernels import PYTORCH, MaskedLayerNorm, MaskedLinear
from harmodt_kernels.vector import ParameterVector

DIMENSIONS = [(32, 2), (24, 3), (60, 4), (40, 2)]  # embedding dimension, heads


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(3, 5)
        self.masked = MaskedLinear(40, 3, backend=PYTORCH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.masked(torch.tanh(self.shared(x)).repeat(1, 8)[None])[0]


def make_small() -> tuple[Small, ParameterVector]:
    model = Small()
    return model, ParameterVector(model, torch.device("cpu"))


def make_transformer(dimension: int, heads: int) -> DecisionTransformer:
    config = TransformerConfig(
        39, 4, embed_dim=dimension, layers=2, heads=heads, max_timesteps=20, prompt_length=2
    )
    return make_model(config, tasks=2)


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
    names = ["masked.weight", "masked.bias"]
    assert vector.maskable_slots == [vector.slots[name] for name in names]
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
    assert vector.slots["masked.bias"].bits(bits).tolist() == [[6], [13]]


def test_a_matrix_of_one_row_keeps_its_rows() -> None:
    layer = MaskedLinear(40, 1, backend=PYTORCH)
    vector = ParameterVector(layer, torch.device("cpu"))
    bits = vector.valid_bits().repeat(2, 1)
    masks = TaskMasks(vector, bits, torch.zeros(2, dtype=torch.int64)).of(layer)
    assert masks.weight_bits.shape == (2, 1, 2)
    assert masks.bias_bits.shape == (2, 1)
    x = torch.randn(2, 3, 40)
    torch.testing.assert_close(layer(x, masks), layer(x))


@pytest.mark.parametrize(("dimension", "heads"), DIMENSIONS)
def test_parameters_and_gradients_are_views_of_the_vector(dimension: int, heads: int) -> None:
    model = make_transformer(dimension, heads)
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
    model = make_transformer(dimension, heads)
    vector = model.vector
    vector.weights.zero_()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            masked = name.startswith(("blocks.", "final_norm."))
            parameter.fill_(1.0 if masked else 2.0)
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
        in_vector = vector.slots[name].view(vector.gradient)
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


class Mixed(nn.Module):
    """Masked and other layers in turn, under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.masked_a = nn.Linear(3, 5)
        self.b = nn.ModuleDict({"inner": MaskedLinear(33, 2, bias=False, backend=PYTORCH)})
        self.final_norm = nn.LayerNorm(6)
        self.d = MaskedLayerNorm(7, backend=PYTORCH)
        self.e = nn.Embedding(4, 2)
        self.scalar = nn.Parameter(torch.tensor(3.0))


def test_maskable_are_the_parameters_of_masked_layers_whatever_their_names() -> None:
    torch.manual_seed(0)
    plain = Mixed()
    values = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    vector = ParameterVector(plain, torch.device("cpu"))
    names = ["b.inner.weight", "d.weight", "d.bias"]
    assert list(vector.slots)[:3] == names
    assert vector.maskable_slots == [vector.slots[name] for name in names]
    assert vector.maskable_size == 2 * 64 + 32 + 32
    assert vector.maskable_count() == 2 * 33 + 7 + 7
    for name, value in values.items():
        assert torch.equal(vector.slots[name].view(vector.weights), value)


def test_a_masked_layer_without_bias_has_its_weight_alone() -> None:
    model = Mixed()
    vector = ParameterVector(model, torch.device("cpu"))
    layer = model.b["inner"]
    assert vector.layers == {
        layer: (vector.slots["b.inner.weight"], None),
        model.d: (vector.slots["d.weight"], vector.slots["d.bias"]),
    }
    bits = torch.zeros(2, vector.maskable_size // 32, dtype=torch.int32)
    bits[1] = vector.valid_bits()[: bits.shape[1]]
    gradients = torch.zeros(3, vector.maskable_size)
    masks = TaskMasks(vector, bits, torch.tensor([1, 0, 1]), gradients).of(layer)
    assert masks.weight_bits.shape == (2, 2, 2)
    assert masks.bias_bits is None
    x = torch.randn(3, 4, 33)
    out = layer(x, masks)
    torch.testing.assert_close(out[[0, 2]], x[[0, 2]] @ layer.weight.T)
    assert (out[1] == 0).all()
    out.sum().backward()
    expected = x.sum(1)[:, None].expand(3, 2, 33) * torch.tensor([1.0, 0, 1])[:, None, None]
    torch.testing.assert_close(vector.layers[layer][0].of_groups(gradients), expected)
    assert (vector.gradient == 0).all()  # each group's own is written instead


def test_a_model_without_masked_layers_is_a_vector_too() -> None:
    model = nn.Sequential(nn.Linear(40, 3), nn.Tanh(), nn.Linear(3, 2, bias=False))
    x = torch.randn(6, 40)
    before = model(x)
    vector = ParameterVector(model, torch.device("cpu"))
    assert vector.maskable_size == vector.maskable_count() == 0
    assert vector.maskable_slots == []
    assert vector.layers == {}
    assert len(vector.weights) == 128 + 32 + 32
    valid = np.unpackbits(vector.valid_bits().numpy().view(np.uint8), bitorder="little")
    expected = [*range(120), *range(128, 131), *range(160, 166)]
    np.testing.assert_array_equal(np.flatnonzero(valid), expected)
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    weight = vector.slots["2.weight"].view(vector.gradient)
    torch.testing.assert_close(weight, torch.tanh(model[0](x)).sum(0).expand(2, 3))
