from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from problems import LinearProblem
from torch import Tensor

from harmodt_kernels import REFERENCE, Backend, fused_backend
from harmodt_kernels.linear_residual import linear_residual


def results(
    backend: Backend,
    problem: LinearProblem,
    device: torch.device,
    drop: float = 0.0,
    dtype: torch.dtype = torch.float32,
    of_residual: torch.dtype = torch.float32,
    of_groups: bool | str = False,
    bias: bool = True,
) -> dict[str, Tensor]:
    """The sum and all gradients; fused or by the definition, the same is dropped at each call."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = problem.x, problem.weight, problem.bias, np.roll(problem.output_gradient, 1, 1)
    types = dtype, wide, wide, of_residual
    x, weight, b, residual = (
        torch.from_numpy(v).to(device, t).requires_grad_()
        for v, t in zip(values, types, strict=True)
    )
    masks = [t.to(device) for t in (*problem.bits, torch.from_numpy(problem.task_ids))]
    if not bias:
        masks[1] = None
    rows = 1 if of_groups == "summed" else len(x)
    outs = torch.full((rows, *weight.shape), torch.nan, device=device, dtype=wide), None
    if bias:
        outs = outs[0], torch.full((rows, len(weight)), torch.nan, device=device, dtype=wide)
    torch.manual_seed(3)  # plain PyTorch reads no seed
    y = backend.linear_residual(
        x,
        weight,
        b if bias else None,
        *(masks if problem.masked else (None, None, None)),
        residual,
        drop,
        seed=torch.tensor([3], device=device),
        group_gradients=outs if of_groups else None,
    )
    y.backward(torch.from_numpy(problem.output_gradient).to(y))
    found = {"y": y.detach(), "x": x.grad, "residual": residual.grad}
    of_weights = outs if of_groups else (weight.grad, b.grad)
    found |= dict(zip(("weight", "bias"), of_weights, strict=True))
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("of_groups", [False, True, "summed"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(1, 75, 39, 96), (3, 7, 60, 4)], ids=str)
def test_equals_the_definition(backend, device, sizes, bias, of_groups) -> None:
    equals_the_definition(backend, device, sizes, 0.0, of_groups=of_groups, bias=bias)


@pytest.mark.parametrize("of_groups", [False, True, "summed"])
@pytest.mark.parametrize("sizes", [(1, 75, 39, 70), (5, 7, 60, 33)], ids=str)
def test_it_drops_what_the_definition_drops(device, sizes, of_groups) -> None:
    backend = fused_backend(device)
    whole = equals_the_definition(backend, device, sizes, 0.3, of_groups=of_groups)
    residual = np.roll(LinearProblem.random(*sizes).output_gradient, 1, 1)
    kept = whole["y"] != torch.from_numpy(residual).to(whole["y"])
    assert kept.double().mean().item() == pytest.approx(0.7, abs=0.06)


def equals_the_definition(
    backend: Backend,
    device: torch.device,
    sizes: tuple[int, int, int, int],
    drop: float,
    **settings: Any,
) -> dict[str, Tensor]:
    problem, exact = LinearProblem.random(*sizes), torch.float64
    if drop:
        expected = results(REFERENCE, problem, device, drop, exact, exact, **settings)
    else:
        expected = by_formulas(problem, **settings)
    computed = results(backend, problem, device, drop, **settings)
    assert_close(computed, expected)
    return computed


def assert_close(computed: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert computed.keys() == expected.keys()
    for name, values in computed.items():
        torch.testing.assert_close(
            values.double().cpu(), expected[name].cpu(), rtol=1e-5, atol=2e-4, msg=name
        )


def by_formulas(
    problem: LinearProblem, of_groups: bool | str = False, bias: bool = True
) -> dict[str, Tensor]:
    """The sum and all gradients without dropout, in float64."""
    if not bias:
        problem = replace(problem, bias_mask=np.zeros_like(problem.bias_mask))
    found = problem.expected()
    residual, dy = np.roll(problem.output_gradient, 1, 1), problem.output_gradient
    result = {"y": found["y"] + residual, "x": found["x"], "residual": dy}
    for name in ("weight", "bias") if bias else ("weight",):
        summed = found[name][None] if of_groups == "summed" else found[name]
        result[name] = found[f"{name}_of_groups"] if of_groups is True else summed
    return {name: torch.from_numpy(values) for name, values in result.items()}


@pytest.mark.parametrize("of_groups", [False, True, "summed"])
@pytest.mark.parametrize("masked", [False, True])
def test_without_masks_every_weight_is_active(backend, device, masked, of_groups) -> None:
    problem = LinearProblem.random(2, 7, 39, 5)
    problem.weight_mask[:] = problem.bias_mask[:] = True
    problem.masked = masked
    computed = results(backend, problem, device, of_groups=of_groups)
    assert_close(computed, by_formulas(problem, of_groups))


@pytest.mark.parametrize("of_groups", [False, True, "summed"])
def test_without_masks_the_same_is_dropped(device, of_groups) -> None:
    problem = LinearProblem.random(3, 7, 39, 5)
    problem.weight_mask[:] = problem.bias_mask[:] = True
    problem.masked = False
    exact = torch.float64
    expected = results(REFERENCE, problem, device, 0.3, exact, exact, of_groups)
    for name, values in results(
        fused_backend(device), problem, device, 0.3, of_groups=of_groups
    ).items():
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-5, atol=2e-4, msg=name)


@pytest.mark.parametrize("masked", [False, True])
def test_without_rows_there_are_none(backend, device, masked) -> None:
    problem = LinearProblem.random(3, 0, 39, 5)
    problem.masked = masked
    found = results(backend, problem, device)
    assert found["y"].shape == (3, 0, 5) and found["x"].shape == (3, 0, 39)
    assert not found["weight"].any()


def in_parts(backend: Backend) -> Backend:
    """The same, but that the layer, dropout and the sum come one after the other."""

    def linear_residual(*operands: Any, seed: Tensor, group_gradients: Any) -> Tensor:
        *layer, residual, drop = operands
        branch = backend.masked_linear(*layer, group_gradients=group_gradients)
        return backend.dropout_add(residual, branch, drop, seed)

    return replace(backend, linear_residual=linear_residual)


@pytest.mark.parametrize("drop", [0.0, 0.2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_cpu_it_is_its_parts_bit_for_bit(cpu: Backend, precision, drop) -> None:
    device = torch.device("cpu")
    # rows in two chunks of the weight's gradient; columns that end within a register
    for sizes in ((2, 700, 128, 70), (3, 50, 39, 130)):
        problem = LinearProblem.random(*sizes)
        for of_groups in (True, "summed"):
            with cpu.precision(precision, device):
                fused, parts = (
                    results(backend, problem, device, drop, of_groups=of_groups)
                    for backend in (cpu, in_parts(cpu))
                )
            assert all(torch.equal(fused[name], values) for name, values in parts.items())


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("tiles", ["one tile of rows", "several"])
def test_halves_beside_a_residual_of_float32(backend, device, dtype, drop, tiles, request) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bf16 wrongly")
    if tiles == "several":
        request.getfixturevalue("stationary")
    rows = 389 if tiles == "several" else 37
    problem = LinearProblem.random(2, rows, 60, 40).rounded(dtype)
    exact = results(backend, problem, device, drop)
    for name, values in results(backend, problem, device, drop, dtype).items():
        assert values.dtype == (dtype if name == "x" else torch.float32), name
        # weights and gradients of y are rounded to 16 bits before they are multiplied
        error = (values.double() - exact[name]).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * exact[name].abs().max(), name


def test_results_repeat_bit_for_bit(backend, device) -> None:
    problem = LinearProblem.random(3, 40, 39, 40)
    first, *others = (results(backend, problem, device, 0.1) for _ in range(5))
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written(device) -> None:
    problem = LinearProblem.random(3, 37, 39, 40)
    for name, values in results(fused_backend(device), problem, device, 0.1).items():
        assert values.isfinite().all(), name


def test_operands_that_do_not_fit_are_named(device) -> None:
    problem = LinearProblem.random(2, 5, 39, 4)
    x, weight, bias, residual = (
        torch.from_numpy(v).to(device, torch.float32)
        for v in (problem.x, problem.weight, problem.bias, problem.output_gradient)
    )
    masks = [t.to(device) for t in (*problem.bits, torch.from_numpy(problem.task_ids))]
    for of_layer in (masks, [None] * 3):
        layer = x, weight, bias, *of_layer
        with pytest.raises(
            ValueError, match=r"residual has shape \[2, 4, 4\]: .* it must be \[2, 5, 4\]"
        ):
            linear_residual(*layer, residual[:, 1:], 0.3)
        with pytest.raises(TypeError, match=r"residual is torch\.float64"):
            linear_residual(*layer, residual.double(), 0.3)
        with pytest.raises(ValueError, match="weight has shape"):
            linear_residual(x[..., 1:], *layer[1:], residual, 0.3)
        with pytest.raises(ValueError, match=r"x has shape \[5, 39\]: it must be"):
            linear_residual(x[0], *layer[1:], residual, 0.3)
        with pytest.raises(ValueError, match="x has no groups"):
            linear_residual(x[:0], *layer[1:], residual, 0.3)
    with pytest.raises(ValueError, match="bias_bits is given without weight_bits"):
        linear_residual(x, weight, bias, None, masks[1], None, residual, 0.3)
