from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from harmodt_kernels import REFERENCE, BackendUnavailable, MaskedLinear
from harmodt_kernels.native import library

README = Path(__file__).parents[1] / "README.md"


def make_layer(
    device, *, bias: bool = True, backend=REFERENCE
) -> tuple[MaskedLinear, torch.Tensor]:
    """A layer of 3 tasks, of which task 1 has a mask, and that mask."""
    torch.manual_seed(0)
    layer = MaskedLinear(39, 5, tasks=3, bias=bias, backend=backend, device=device)
    mask = torch.rand(5, 39, device=device) < 0.6
    layer.set_mask(1, mask)
    return layer, mask


@pytest.mark.parametrize("bias", [False, True])
def test_each_group_is_under_its_tasks_mask(backend, device, bias) -> None:
    layer, mask = make_layer(device, bias=bias, backend=backend)
    x = torch.randn(3, 7, 39, device=device)
    y = layer(x, torch.tensor([1, 0, 1], device=device))
    for group, weight in enumerate((layer.weight * mask, layer.weight, layer.weight * mask)):
        expected = x[group] @ weight.T + (layer.bias if bias else 0.0)
        torch.testing.assert_close(y[group], expected, rtol=1e-4, atol=1e-5)
    y[[0, 2]].sum().backward()
    assert (layer.weight.grad[~mask] == 0).all()
    assert (layer.weight.grad[mask] != 0).all()


def test_a_mask_of_the_bias(device) -> None:
    layer, mask = make_layer(device)
    bias_mask = torch.tensor([True, False, True, False, False], device=device)
    layer.set_mask(1, mask, bias_mask)
    y = layer(torch.zeros(2, 1, 39, device=device), torch.tensor([1, 2], device=device))
    assert torch.equal(y[0, 0], layer.bias * bias_mask)
    assert torch.equal(y[1, 0], layer.bias)


def test_masks_are_bits_and_travel_with_the_state(device) -> None:
    layer, _ = make_layer(device)
    assert layer.weight_bits.dtype == torch.int32 and layer.weight_bits.shape == (3, 5, 2)
    other = MaskedLinear(39, 5, tasks=3, backend=REFERENCE, device=device)
    other.load_state_dict(layer.state_dict())
    x, ids = torch.randn(2, 4, 39, device=device), torch.tensor([1, 2], device=device)
    assert torch.equal(other(x, ids), layer(x, ids))


def test_starts_like_a_linear_layer() -> None:
    torch.manual_seed(3)
    layer = MaskedLinear(39, 5, tasks=1)
    torch.manual_seed(3)
    linear = torch.nn.Linear(39, 5)
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)


def test_without_kernels_it_says_so(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(library, "PATH", tmp_path / "libharmodt.so")
    layer, _ = make_layer("cpu", backend=None)
    with pytest.raises(BackendUnavailable, match="the CPU kernels were not built"):
        layer(torch.zeros(1, 1, 39), torch.tensor([0]))


def test_masks_that_do_not_fit_are_refused(device) -> None:
    layer, mask = make_layer(device, bias=False)
    with pytest.raises(IndexError, match="task 3 of a layer with 3 tasks"):
        layer.set_mask(3, mask)
    with pytest.raises(ValueError, match=r"weight_mask is torch.bool \[39, 5\]"):
        layer.set_mask(0, mask.T)
    with pytest.raises(ValueError, match="weight_mask is torch"):
        layer.set_mask(0, mask.float())
    with pytest.raises(ValueError, match="without a bias"):
        layer.set_mask(0, mask, mask[:, 0])


def test_the_example_of_the_readme_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    (example,) = (block for block in blocks if "MaskedLinear" in block)
    values: dict = {}
    exec(example, values)
    assert values["y"].shape == (2, 100, 32)
    assert values["layer"].weight.grad is not None
