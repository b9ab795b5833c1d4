from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import LayerNormProblem
from torch import Tensor

from harmodt_kernels import fused_backend
from harmodt_kernels.masked_layer_norm import masked_layer_norm


@pytest.mark.parametrize("of_groups", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(5, 75, 128), (3, 130, 39), (1, 1, 2), (2, 0, 40)], ids=str)
def test_equals_the_formulas(backend, device, sizes, masked, of_groups) -> None:
    problem = LayerNormProblem.random(*sizes)
    if not masked:
        problem.without_masks()
    problem.check(problem.computed(backend, device, of_groups), of_groups)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_rows_of_small_variance(backend, device, epsilon, masked) -> None:
    """Their result is what epsilon makes of them; a constant row becomes the bias."""
    problem = replace(LayerNormProblem.random(2, 12, 40), epsilon=epsilon).with_small_variances()
    if not masked:
        problem.without_masks()
    expected = problem.expected(True)
    for name, values in problem.computed(backend, device, True).items():
        values = values.double().cpu()
        largest = expected[name].abs().max()  # up to 1 / √ε in gradients
        torch.testing.assert_close(values, expected[name], rtol=2e-5, atol=float(largest) * 1e-6)
    other = replace(problem, epsilon=2 * epsilon).expected(True)
    for name in ("y", "x", "weight"):
        assert (other[name] - expected[name]).abs().max() > 0.01 * expected[name].abs().max()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_sums_of_gradients_written_in_place(backend, device, groups, masked) -> None:
    problem = LayerNormProblem.random(groups, 9, 39)
    if not masked:
        problem.without_masks()
    problem.check(problem.computed(backend, device, False, in_place=True), False)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it keeps no state
)
@given(groups=st.integers(1, 3), rows=st.integers(1, 140), size=st.integers(2, 70))
def test_any_shape(backend, device, groups, rows, size) -> None:
    problem = LayerNormProblem.random(groups, rows, size)
    problem.check(problem.computed(backend, device, True), True)


def test_either_output_may_go_without_a_gradient(backend, device) -> None:
    problem = LayerNormProblem.random(2, 9, 40)
    masks = [t.to(device) for t in problem.masks]

    def gradients(output: int, of_output: Tensor) -> list[Tensor | None]:
        operands = (problem.x, problem.weight, problem.bias)
        leaves = [t.clone().to(device).requires_grad_() for t in operands]
        backend.masked_layer_norm(*leaves, *masks)[output].backward(of_output.to(device))
        return [leaf.grad for leaf in leaves]

    dx, d_weight, d_bias = gradients(1, problem.d_residual)
    assert torch.equal(dx.cpu(), problem.d_residual)
    assert d_weight is None and d_bias is None
    dx, *_ = gradients(0, problem.dy)
    expected = problem.expected(False)["x"] - problem.d_residual
    torch.testing.assert_close(dx.double().cpu(), expected, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_y_comes_in_the_dtype_that_is_asked_for(backend, device, masked) -> None:
    problem = LayerNormProblem.random(2, 9, 40)
    if not masked:
        problem.without_masks()
    problem.dy, problem.d_residual = problem.dy.half().float(), problem.d_residual * 0
    operands = (problem.x, problem.weight, problem.bias)
    leaves = [t.clone().to(device).requires_grad_() for t in operands]
    masks = [t.to(device) for t in problem.masks] if masked else (None, None, None)
    y, x = backend.masked_layer_norm(*leaves, *masks, dtype=torch.float16)
    assert y.dtype == torch.float16 and x.dtype == torch.float32
    y.backward(problem.dy.to(y))
    expected = problem.expected(False)
    torch.testing.assert_close(y.double().cpu(), expected["y"], rtol=1e-3, atol=1e-3)
    for name, leaf in zip(("x", "weight", "bias"), leaves, strict=True):
        torch.testing.assert_close(leaf.grad.double().cpu(), expected[name], rtol=2e-5, atol=2e-4)


def test_inactive_weights_may_be_nan(backend, device) -> None:
    problem = LayerNormProblem.random(2, 9, 40)
    expected = problem.expected(False)
    used = problem.weight_mask[problem.task_ids].any(0)
    problem.weight[~used] = torch.nan
    assert not used.all()
    for name, values in problem.computed(backend, device, False).items():
        torch.testing.assert_close(values.double().cpu(), expected[name], rtol=2e-5, atol=2e-4)


@pytest.mark.usefixtures("native")
def test_threads_do_not_change_the_result() -> None:
    problem, before, results = LayerNormProblem.random(3, 200, 40), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(problem.computed(fused_backend("cpu"), torch.device("cpu"), False))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_rounded_once(backend, device, dtype) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter rounds to bf16 wrongly")
    problem = LayerNormProblem.random(2, 37, 40)
    for name in ("x", "dy", "d_residual"):
        setattr(problem, name, getattr(problem, name).to(dtype).float())
    expected, computed = problem.expected(True), problem.computed(backend, device, True, dtype)
    for name, values in computed.items():
        assert values.dtype == (dtype if name in ("y", "x") else torch.float32), name
        rounded = expected[name].to(values.dtype).double()
        bound = (rounded - expected[name]).abs().max() + 1e-4
        assert (values.double().cpu() - expected[name]).abs().max() <= bound, name


def test_results_repeat_bit_for_bit(backend, device) -> None:
    problem = LayerNormProblem.random(2, 70, 40)
    first, *others = (problem.computed(backend, device, False) for _ in range(5))
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("of_groups", [False, True])
def test_sums_do_not_depend_on_who_comes_last(backend, device, of_groups, monkeypatch) -> None:
    if device.type != "cpu":
        pytest.skip("a GPU runs programs in any order")
    problem = LayerNormProblem.random(3, 70, 40)
    first = problem.computed(backend, device, of_groups)
    builder = pytest.importorskip("triton.runtime.interpreter").interpreter_builder
    usual = builder.set_grid_idx

    def backwards(x: int, y: int, z: int) -> None:
        usual(builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    then = problem.computed(backend, device, of_groups)
    assert all(torch.equal(then[name], first[name]) for name in first)


def test_a_second_backward_pass_gives_the_same(backend, device) -> None:
    problem = LayerNormProblem.random(2, 70, 40)
    weight = problem.weight.to(device).requires_grad_()
    masks = [t.to(device) for t in problem.masks]
    y, _ = backend.masked_layer_norm(problem.x.to(device), weight, problem.bias.to(device), *masks)
    dy = problem.dy.to(device)
    first, then = (torch.autograd.grad(y, weight, dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(then, first)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written(device) -> None:
    problem = LayerNormProblem.random(2, 37, 39)
    problem.check(problem.computed(fused_backend(device), device, False), False)


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("sizes", [(2, 3, 5000), (1, 530, 33)], ids=str)
def test_more_than_a_programs_share(backend, device, sizes) -> None:
    problem = LayerNormProblem.random(*sizes)
    problem.check(problem.computed(backend, device, True), True)


def test_the_registered_operations_keep_pytorchs_rules(device) -> None:
    problem = LayerNormProblem.random(2, 7, 40)
    x, dy, d_residual = (t.to(device) for t in (problem.x, problem.dy, problem.d_residual))
    weights = problem.weight.to(device), problem.bias.to(device)
    masks = [t.to(device) for t in problem.masks]
    torch.library.opcheck(torch.ops.harmodt.masked_layer_norm, (x, *weights, *masks, 1e-5, x.dtype))
    _, *kept = torch.ops.harmodt.masked_layer_norm(x, *weights, *masks, 1e-5, x.dtype)
    for groups, residual in ((1, d_residual), (2, None)):
        out = (torch.zeros(groups, 40, device=device) for _ in range(2))
        torch.library.opcheck(
            torch.ops.harmodt.masked_layer_norm_gradient,
            (dy, residual, x, *kept, weights[0], *masks, *out),
        )


def test_compiles_to_one_graph(device) -> None:
    problem = LayerNormProblem.random(2, 5, 40)
    backend = fused_backend(device)
    compiled = torch.compile(backend.masked_layer_norm, fullgraph=True, backend="aot_eager")
    whole = replace(backend, masked_layer_norm=compiled)
    problem.check(problem.computed(whole, device, False), False)


def test_an_output_that_is_not_used_has_gradients_of_zero(device) -> None:
    problem = LayerNormProblem.random(2, 7, 40)
    x = problem.x.to(device).requires_grad_()
    parameters = problem.weight.to(device), problem.bias.to(device)
    masks, outs = [t.to(device) for t in problem.masks], torch.full((2, 2, 40), 7.0, device=device)
    gradients = tuple(outs)
    apply = fused_backend(device).masked_layer_norm
    _, residual = apply(x, *parameters, *masks, group_gradients=gradients)
    residual.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and not outs.any()


@pytest.mark.usefixtures("native")
def test_a_cpu_refuses_halves() -> None:
    problem = LayerNormProblem.random(2, 7, 40)
    with pytest.raises(TypeError, match=r"x is torch\.float16"):
        masked_layer_norm(problem.x.half(), problem.weight, problem.bias, *problem.masks)


@pytest.mark.usefixtures("native")
def test_operands_that_do_not_fit_are_named() -> None:
    problem = LayerNormProblem.random(2, 7, 40)
    bits = problem.masks[:2]
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        masked_layer_norm(problem.x.double(), problem.weight, problem.bias, *problem.masks)
    with pytest.raises(TypeError, match=r"task_ids is torch\.int32: it must be torch\.int64"):
        masked_layer_norm(problem.x, problem.weight, problem.bias, *bits, problem.task_ids.int())
    with pytest.raises(ValueError, match=r"weight_bits has shape \[4, 1\].* \[4, 2\]"):
        masked_layer_norm(
            problem.x, problem.weight, problem.bias, bits[0][:, :1], bits[1], problem.task_ids
        )
    with pytest.raises(ValueError, match="x has no groups"):
        masked_layer_norm(problem.x[:0], problem.weight, problem.bias, *bits, problem.task_ids[:0])
    with pytest.raises(ValueError, match="bias_bits is given without weight_bits"):
        masked_layer_norm(problem.x, problem.weight, problem.bias, None, bits[1], None)
    with pytest.raises(ValueError, match="weight_bits needs bias_bits and task_ids"):
        masked_layer_norm(problem.x, problem.weight, problem.bias, *bits, None)
    with pytest.raises(ValueError, match=r"bias has strides \(2,\)"):
        masked_layer_norm(problem.x, problem.weight, torch.zeros(80)[::2], *problem.masks)
