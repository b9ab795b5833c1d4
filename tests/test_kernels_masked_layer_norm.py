from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harmodt_kernels import REFERENCE, Backend, fused_backend, pack_bits
from harmodt_kernels.masked_layer_norm import masked_layer_norm


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@dataclass
class Problem:
    """Operands, two tasks more than groups."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    weight_mask: Tensor
    bias_mask: Tensor
    task_ids: Tensor
    dy: Tensor

    @classmethod
    def random(cls, groups: int, rows: int, size: int) -> Problem:
        generator = torch.Generator().manual_seed(size)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        masks = (torch.rand(groups + 2, size, generator=generator) < 0.7 for _ in range(2))
        ids = torch.randint(groups + 2, (groups,), generator=generator)
        # Rows of two elements too are spread out: nearly equal ones lose digits in any arithmetic.
        x = draw(groups, rows, size) + 1 + 6 * (torch.arange(size) % 2)
        return cls(x, draw(size), draw(size), *masks, ids, draw(groups, rows, size))

    def computed(self, backend: Backend, of_groups: bool) -> dict[str, Tensor]:
        """The output and the gradients; of weight and bias those of each group, or summed."""
        leaves = [t.clone().requires_grad_() for t in (self.x, self.weight, self.bias)]
        out = torch.full((2, *self.x.shape[::2]), torch.nan)
        bits = (pack_bits(self.weight_mask), pack_bits(self.bias_mask))
        y = backend.masked_layer_norm(
            *leaves, *bits, self.task_ids, group_gradients=tuple(out) if of_groups else None
        )
        y.backward(self.dy)
        d_weight, d_bias = out if of_groups else (leaves[1].grad, leaves[2].grad)
        return {"y": y.detach(), "x": leaves[0].grad, "weight": d_weight, "bias": d_bias}

    def expected(self, of_groups: bool) -> dict[str, Tensor]:
        """By the formulas, in float64."""
        x, dy = self.x.double(), self.dy.double()
        gain_mask, bias_mask = (m[self.task_ids] for m in (self.weight_mask, self.bias_mask))
        gain = torch.where(gain_mask, self.weight.double(), 0.0)[:, None]
        bias = torch.where(bias_mask, self.bias.double(), 0.0)[:, None]
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        v = centred / deviation
        d = dy * gain
        dx = d - d.mean(-1, keepdim=True) - v * (d * v).mean(-1, keepdim=True)
        d_weight, d_bias = (dy * v).sum(1) * gain_mask, dy.sum(1) * bias_mask
        if not of_groups:
            d_weight, d_bias = d_weight.sum(0), d_bias.sum(0)
        return {"y": v * gain + bias, "x": dx / deviation, "weight": d_weight, "bias": d_bias}


def check(computed: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(
            computed[name].double(), tensor, rtol=2e-5, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("of_groups", [False, True])
@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("sizes", [(5, 75, 128), (3, 130, 39), (1, 1, 2), (2, 0, 40)], ids=str)
def test_equals_the_formulas(name, sizes, of_groups) -> None:
    problem = Problem.random(*sizes)
    backend = REFERENCE if name == "reference" else fused_backend("cpu")
    check(problem.computed(backend, of_groups), problem.expected(of_groups))


@settings(max_examples=30, deadline=None)
@given(groups=st.integers(1, 3), rows=st.integers(1, 140), size=st.integers(2, 70))
def test_any_shape(groups, rows, size) -> None:
    problem = Problem.random(groups, rows, size)
    check(problem.computed(fused_backend("cpu"), True), problem.expected(True))


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_inactive_weights_may_be_nan(name) -> None:
    problem = Problem.random(2, 9, 40)
    expected = problem.expected(False)
    used = problem.weight_mask[problem.task_ids].any(0)
    problem.weight[~used] = torch.nan
    assert not used.all()
    backend = REFERENCE if name == "reference" else fused_backend("cpu")
    check(problem.computed(backend, False), expected)


def test_threads_do_not_change_the_result() -> None:
    problem, before, results = Problem.random(3, 200, 40), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(problem.computed(fused_backend("cpu"), False))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_the_registered_operations_keep_pytorchs_rules() -> None:
    problem = Problem.random(2, 7, 40)
    bits = (pack_bits(problem.weight_mask), pack_bits(problem.bias_mask))
    operands = (problem.x, problem.weight, problem.bias, *bits, problem.task_ids)
    torch.library.opcheck(torch.ops.harmodt.masked_layer_norm, (*operands, 1e-5))
    _, statistics = torch.ops.harmodt.masked_layer_norm(*operands, 1e-5)
    torch.library.opcheck(
        torch.ops.harmodt.masked_layer_norm_gradient,
        (problem.dy, problem.x, statistics, problem.weight, *bits, problem.task_ids),
    )


def test_operands_that_do_not_fit_are_named() -> None:
    problem = Problem.random(2, 7, 40)
    bits = (pack_bits(problem.weight_mask), pack_bits(problem.bias_mask))
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        masked_layer_norm(problem.x.double(), problem.weight, problem.bias, *bits, problem.task_ids)
    with pytest.raises(TypeError, match=r"task_ids is torch\.int32.* takes torch\.int64"):
        masked_layer_norm(problem.x, problem.weight, problem.bias, *bits, problem.task_ids.int())
    with pytest.raises(ValueError, match=r"weight_bits has shape \[4, 1\].* \[4, 2\]"):
        masked_layer_norm(
            problem.x, problem.weight, problem.bias, bits[0][:, :1], bits[1], problem.task_ids
        )
    with pytest.raises(ValueError, match=r"bias has strides \(2,\)"):
        masked_layer_norm(problem.x, problem.weight, torch.zeros(80)[::2], *bits, problem.task_ids)
