from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problems import LinearProblem
from torch import Tensor

from harmodt_kernels import REFERENCE, Backend, BackendUnavailable, fused_backend
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
    expected = results(REFERENCE, problem, device, drop, exact, exact, **settings)
    computed = results(backend, problem, device, drop, **settings)
    assert computed.keys() == expected.keys()
    for name, values in computed.items():
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-5, atol=2e-4, msg=name)
    return computed


@pytest.mark.parametrize("masked", [False, True])
def test_without_masks_every_weight_is_active(backend, device, masked) -> None:
    problem = LinearProblem.random(2, 7, 39, 5)
    problem.weight_mask[:] = problem.bias_mask[:] = True
    problem.masked = masked
    expected = results(REFERENCE, problem, device, 0.0, torch.float64, torch.float64)
    for name, values in results(backend, problem, device).items():
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-5, atol=2e-4, msg=name)


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


def operands_of_ops(device: torch.device) -> dict[str, tuple]:
    problem = LinearProblem.random(2, 5, 39, 4)
    x, weight, bias, dy = (
        torch.from_numpy(v).to(device, torch.float32)
        for v in (problem.x, problem.weight, problem.bias, problem.output_gradient)
    )
    masks = [t.to(device) for t in (*problem.bits, torch.from_numpy(problem.task_ids))]
    draw = 0.3, torch.tensor([7], device=device)
    return {
        "linear_residual": (x, weight, bias, *masks, dy, *draw),
        "linear_residual_input_gradient": (dy, weight, masks[0], masks[2], x.dtype, *draw),
    }


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("name", list(operands_of_ops(torch.device("cpu"))))
def test_the_registered_operations_keep_pytorchs_rules(device, name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.harmodt, name), operands_of_ops(device)[name])


@pytest.mark.usefixtures("native")
def test_an_operation_without_a_kernel_there_says_so() -> None:
    operands = operands_of_ops(torch.device("cpu"))["linear_residual"]
    with pytest.raises(BackendUnavailable, match="linear_residual has no kernel for a CPU: take"):
        torch.ops.harmodt.linear_residual(*operands)


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
def test_operands_that_do_not_fit_are_named(device) -> None:
    *operands, residual, drop, _ = operands_of_ops(device)["linear_residual"]
    with pytest.raises(
        ValueError, match=r"residual \[2, 4, 4\] must be as the output, \[2, 5, 4\]"
    ):
        linear_residual(*operands, residual[:, 1:], drop)
    with pytest.raises(TypeError, match=r"residual is torch\.float64"):
        linear_residual(*operands, residual.double(), drop)
    with pytest.raises(ValueError, match="weight has shape"):
        linear_residual(operands[0][..., 1:], *operands[1:], residual, drop)
