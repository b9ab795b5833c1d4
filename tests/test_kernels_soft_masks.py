"""The layers of a model of soft masks, against dense layers of scaled weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harmodt_kernels import PYTORCH, REFERENCE, Backend, LayerMasks, pack_bits
from harmodt_kernels.masked_linear.gradients import WeightGradients
from harmodt_kernels.soft_masks import soft_masks

LEVELS, TASKS, ROWS, INPUTS, OUTPUTS = 3, 4, 5, 33, 7
TASK_IDS = [2, 0, 2]


class Problem:
    """Operands in float64 whose masks have all of their values, and gradients of the outputs."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        groups = len(TASK_IDS)
        sizes = {
            "x": (groups, ROWS, INPUTS),
            "gain": (INPUTS,),
            "shift": (INPUTS,),
            "weight": (OUTPUTS, INPUTS),
            "bias": (OUTPUTS,),
        }
        self.operands = {
            name: torch.randn(size, generator=draw).double() for name, size in sizes.items()
        }
        self.levels = {
            name: torch.randint(LEVELS + 1, (TASKS, *size), generator=draw)
            for name, size in sizes.items()
            if name != "x"
        }
        self.dy = torch.randn(groups, ROWS, OUTPUTS, generator=draw).double()
        self.residual = torch.randn(groups, ROWS, OUTPUTS, generator=draw).double()

    def bits(self, name: str, device: torch.device) -> Tensor:
        levels = self.levels[name]
        return torch.cat([pack_bits(levels > level) for level in range(LEVELS)]).to(device)

    def expected(self, with_norm: bool) -> dict[str, Tensor]:
        """y, and the gradients of x and of each group's parameters."""
        x = self.operands["x"].clone().requires_grad_()
        of_groups = {
            name: self.operands[name].expand(len(TASK_IDS), *levels.shape[1:]).clone()
            for name, levels in self.levels.items()
        }
        scaled = {}
        for name, copies in of_groups.items():
            copies.requires_grad_()
            scaled[name] = copies * self.levels[name][TASK_IDS] / LEVELS
        rows = x
        if with_norm:
            normalised = F.layer_norm(x, x.shape[-1:])
            rows = normalised * scaled["gain"][:, None] + scaled["shift"][:, None]
        y = rows @ scaled["weight"].mT + scaled["bias"][:, None]
        y.backward(self.dy)
        names = of_groups if with_norm else ("weight", "bias")
        return {"y": y.detach(), "x": x.grad} | {name: of_groups[name].grad for name in names}


def compute(
    backend: Backend, device: torch.device, operation: str, gradients: str
) -> dict[str, Tensor]:
    problem = Problem()
    given = {
        name: tensor.to(device, torch.float32).requires_grad_()
        for name, tensor in problem.operands.items()
    }
    ids, queue = torch.tensor(TASK_IDS, device=device), WeightGradients()
    rows = {"each": len(TASK_IDS), "summed": 1}.get(gradients)
    out = {
        name: torch.full((rows, *given[name].shape), torch.nan, device=device)
        for name in problem.levels
        if rows
    }

    def masks(weight: str, bias: str) -> LayerMasks:
        own = (out[weight], out[bias]) if rows else None
        bits = problem.bits(weight, device), problem.bits(bias, device)
        return LayerMasks(*bits, ids, own, queue)

    soft, of_layer = soft_masks(backend, LEVELS), masks("weight", "bias")
    layer: dict[str, Any] = {"group_gradients": of_layer.group_gradients, "queue": queue}
    weights = given["weight"], given["bias"]
    if operation == "norm_linear":
        norm = given["gain"], given["shift"]
        y, x = soft.norm_linear(given["x"], *norm, *weights, masks("gain", "shift"), of_layer)
        assert torch.equal(x, given["x"])
    elif operation == "linear_residual":
        residual = problem.residual.to(device, torch.float32)
        y = soft.linear_residual(given["x"], *weights, *of_layer.bits, residual, 0.0, **layer)
        y = y - residual
    else:
        y = soft.masked_linear(given["x"], *weights, *of_layer.bits, **layer)
    y.backward(problem.dy.to(y))
    queue.finish()
    used = given if operation == "norm_linear" else ("x", "weight", "bias")
    found = {"y": y.detach(), "x": given["x"].grad}
    return found | {n: out[n] if rows else given[n].grad[None] for n in used if n != "x"}


@pytest.mark.parametrize("gradients", ["each", "summed", "autograd"])
@pytest.mark.parametrize("operation", ["masked_linear", "linear_residual", "norm_linear"])
def test_a_weight_counts_as_its_masks_value_says(
    backend: Backend, device: torch.device, operation: str, gradients: str
) -> None:
    found = compute(backend, device, operation, gradients)
    expected = Problem().expected(with_norm=operation == "norm_linear")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name not in ("x", "y") and gradients != "each":
            value = value.sum(0, keepdim=True)
        torch.testing.assert_close(found[name].cpu().double(), value, rtol=1e-4, atol=1e-4)


def test_relu_comes_after_the_mean_of_the_levels() -> None:
    problem = Problem()
    x, weight, bias = (problem.operands[name] for name in ("x", "weight", "bias"))
    bits = (problem.bits(name, torch.device("cpu")) for name in ("weight", "bias"))
    operands = x, weight, bias, *bits, torch.tensor(TASK_IDS)
    y = soft_masks(REFERENCE, LEVELS).masked_linear(*operands, relu=True)
    expected = problem.expected(with_norm=False)["y"]
    torch.testing.assert_close(y, expected.relu())
    assert 0 < (y > 0).sum() < y.numel()


def test_without_masks_layers_are_computed_once() -> None:
    calls = []

    def masked_linear(*operands: Any, **settings: Any) -> Tensor:
        calls.append(len(operands[0]))
        return PYTORCH.masked_linear(*operands, **settings)

    soft = soft_masks(dataclasses.replace(PYTORCH, masked_linear=masked_linear), LEVELS)
    x, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    y = soft.masked_linear(x, weight, None, None, None, None)
    torch.testing.assert_close(y, x @ weight.T)
    assert calls == [2]
