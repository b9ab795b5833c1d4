from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harmodt_kernels import (
    REFERENCE,
    BackendUnavailable,
    LayerMasks,
    MaskedLayerNorm,
    MaskedLinear,
    pack_bits,
)
from harmodt_kernels.native import library

README = Path(__file__).parents[1] / "README.md"


def make_masks(*shape: int) -> Tensor:
    """Masks of two tasks; the second one uses everything."""
    mask = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[1] = True
    return mask


def masks_of(weight_mask: Tensor, bias_mask: Tensor | None, tasks: list[int], device) -> LayerMasks:
    bias_bits = None if bias_mask is None else pack_bits(bias_mask).to(device)
    return LayerMasks(
        pack_bits(weight_mask).to(device), bias_bits, torch.tensor(tasks, device=device)
    )


@pytest.mark.parametrize("bias", [False, True])
def test_each_group_is_under_its_tasks_mask(backend, device, bias) -> None:
    torch.manual_seed(0)
    layer = MaskedLinear(39, 5, bias=bias, backend=backend, device=device)
    weight_mask, bias_mask = make_masks(5, 39), make_masks(5) if bias else None
    x, tasks = torch.randn(3, 7, 39, device=device), [0, 1, 0]
    y = layer(x, masks_of(weight_mask, bias_mask, tasks, device))
    for group, task in enumerate(tasks):
        expected = x[group] @ (layer.weight * weight_mask[task].to(device)).T
        if bias_mask is not None:
            expected = expected + layer.bias * bias_mask[task].to(device)
        torch.testing.assert_close(y[group], expected, rtol=1e-4, atol=1e-5)
    y[[0, 2]].sum().backward()
    assert torch.equal(layer.weight.grad != 0, weight_mask[0].to(device))


def test_without_masks_it_is_a_linear_layer(backend, device) -> None:
    layer = MaskedLinear(39, 5, backend=backend, device=device)
    x = torch.randn(3, 7, 39, device=device)
    for relu in (False, True):
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
        expected = expected.relu() if relu else expected
        torch.testing.assert_close(layer(x, relu=relu), expected, rtol=1e-4, atol=1e-5)


def test_the_gradients_of_groups_are_written_and_parameters_get_none(backend, device) -> None:
    layer = MaskedLinear(39, 5, backend=backend, device=device)
    masks = masks_of(make_masks(5, 39), make_masks(5), [0, 1, 0], device)
    shapes = (3, 5, 39), (3, 5)
    weight_out, bias_out = (torch.full(s, torch.nan, device=device) for s in shapes)
    x = torch.randn(3, 7, 39, device=device)
    for masked in (masks, LayerMasks(None, None, None)):
        outs = weight_out.clone(), bias_out.clone()
        one = LayerMasks(masked.weight_bits, masked.bias_bits, masked.task_ids, outs)
        layer(x, one, relu=True).sum().backward()
        assert layer.weight.grad is None and layer.bias.grad is None
        layer(x, masked, relu=True).sum().backward()
        torch.testing.assert_close(outs[0].sum(0), layer.weight.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outs[1].sum(0), layer.bias.grad, rtol=1e-4, atol=1e-5)
        layer.zero_grad()


def test_a_layer_norm_is_under_its_tasks_mask(backend, device) -> None:
    torch.manual_seed(0)
    layer = MaskedLayerNorm(40, backend=backend, device=device)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    masks, x = make_masks(40), torch.randn(2, 7, 40, device=device)
    y, _ = layer(x, masks_of(masks, masks.roll(1, 1), [1, 0], device))
    normalised = torch.nn.functional.layer_norm(x, (40,))
    for group, task in enumerate([1, 0]):
        gain = layer.weight * masks[task].to(device)
        shift = layer.bias * masks.roll(1, 1)[task].to(device)
        expected = normalised[group] * gain + shift
        torch.testing.assert_close(y[group], expected, rtol=1e-4, atol=1e-5)
    with torch.autocast(device.type, torch.bfloat16):
        halves, residual = layer(x)
    assert halves.dtype == torch.bfloat16 and residual.dtype == torch.float32
    dense = torch.nn.functional.layer_norm(x, (40,), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x)[0], dense, rtol=1e-4, atol=1e-5)


def test_they_start_like_pytorchs_layers_and_take_their_weights() -> None:
    torch.manual_seed(3)
    layer = MaskedLinear(39, 5)
    torch.manual_seed(3)
    linear = torch.nn.Linear(39, 5)
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
    layer.load_state_dict(torch.nn.Linear(39, 5).state_dict())
    MaskedLayerNorm(8).load_state_dict(torch.nn.LayerNorm(8).state_dict())


def test_without_kernels_it_says_so(monkeypatch, native, tmp_path) -> None:
    monkeypatch.setattr(library, "PATH", tmp_path / "libharmodt.so")
    with pytest.raises(BackendUnavailable, match="the CPU kernels were not built"):
        MaskedLinear(39, 5)(torch.zeros(1, 1, 39))
    with pytest.raises(BackendUnavailable, match="the CPU kernels were not built"):
        MaskedLayerNorm(39)(torch.zeros(1, 1, 39))
    assert MaskedLinear(39, 5, backend=REFERENCE)(torch.zeros(1, 1, 39)).shape == (1, 1, 5)


def test_the_example_of_the_readme_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    (example,) = (block for block in blocks if "MaskedLinear" in block)
    values: dict = {}
    exec(example, values)
    assert values["y"].shape == (2, 100, 32)
    assert values["layer"].weight.grad is not None
