from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import LayerNormProblem

from harmodt_kernels import fused_backend
from harmodt_kernels.masked_layer_norm import masked_layer_norm

IMPLEMENTATIONS = ["reference", "pytorch", "cpu"]


@pytest.mark.parametrize("of_groups", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(5, 75, 128), (3, 130, 39), (1, 1, 2), (2, 0, 40)], ids=str)
def test_equals_the_formulas(backend, sizes, masked, of_groups) -> None:
    problem = LayerNormProblem.random(*sizes)
    if not masked:
        problem.without_masks()
    problem.check(problem.computed(backend, of_groups), of_groups)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it keeps no state
)
@given(groups=st.integers(1, 3), rows=st.integers(1, 140), size=st.integers(2, 70))
def test_any_shape(backend, groups, rows, size) -> None:
    problem = LayerNormProblem.random(groups, rows, size)
    problem.check(problem.computed(backend, True), True)


def test_inactive_weights_may_be_nan(backend) -> None:
    problem = LayerNormProblem.random(2, 9, 40)
    expected = problem.expected(False)
    used = problem.weight_mask[problem.task_ids].any(0)
    problem.weight[~used] = torch.nan
    assert not used.all()
    for name, values in problem.computed(backend, False).items():
        torch.testing.assert_close(values.double(), expected[name], rtol=2e-5, atol=2e-4)


@pytest.mark.usefixtures("native")
def test_threads_do_not_change_the_result() -> None:
    problem, before, results = LayerNormProblem.random(3, 200, 40), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(problem.computed(fused_backend("cpu"), False))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@pytest.mark.usefixtures("native")
def test_the_registered_operations_keep_pytorchs_rules() -> None:
    problem = LayerNormProblem.random(2, 7, 40)
    operands = (problem.x, problem.weight, problem.bias, *problem.masks)
    torch.library.opcheck(torch.ops.harmodt.masked_layer_norm, (*operands, 1e-5))
    _, statistics = torch.ops.harmodt.masked_layer_norm(*operands, 1e-5)
    torch.library.opcheck(
        torch.ops.harmodt.masked_layer_norm_gradient,
        (problem.dy, problem.x, statistics, problem.weight, *problem.masks),
    )


@pytest.mark.usefixtures("native")
def test_operands_that_do_not_fit_are_named() -> None:
    problem = LayerNormProblem.random(2, 7, 40)
    bits = problem.masks[:2]
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        masked_layer_norm(problem.x.double(), problem.weight, problem.bias, *problem.masks)
    with pytest.raises(TypeError, match=r"task_ids is torch\.int32.* takes torch\.int64"):
        masked_layer_norm(problem.x, problem.weight, problem.bias, *bits, problem.task_ids.int())
    with pytest.raises(ValueError, match=r"weight_bits has shape \[4, 1\].* \[4, 2\]"):
        masked_layer_norm(
            problem.x, problem.weight, problem.bias, bits[0][:, :1], bits[1], problem.task_ids
        )
    with pytest.raises(ValueError, match="bias_bits is given without weight_bits"):
        masked_layer_norm(problem.x, problem.weight, problem.bias, None, bits[1], None)
    with pytest.raises(ValueError, match="weight_bits needs bias_bits and task_ids"):
        masked_layer_norm(problem.x, problem.weight, problem.bias, *bits, None)
    with pytest.raises(ValueError, match=r"bias has strides \(2,\)"):
        masked_layer_norm(problem.x, problem.weight, torch.zeros(80)[::2], *problem.masks)
