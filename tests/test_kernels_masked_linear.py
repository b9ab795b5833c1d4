from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from harmodt_kernels import masked_linear, pack_bits

TASKS = 3
SIZES = [
    (1, 1, 39, 4),
    (1, 75, 128, 96),
    (2, 63, 60, 96),
    (4, 75, 39, 96),
    (5, 1, 60, 4),
    (4, 63, 128, 4),
]  # groups, rows, inputs, outputs


@dataclass
class Problem:
    """Random operands in float64; the groups' tasks repeat where there are more than tasks."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    weight_mask: np.ndarray
    bias_mask: np.ndarray
    task_ids: np.ndarray
    output_gradient: np.ndarray

    @classmethod
    def random(cls, groups: int, rows: int, inputs: int, outputs: int) -> Problem:
        rng = np.random.default_rng([groups, rows, inputs, outputs])
        return cls(
            x=rng.normal(size=(groups, rows, inputs)),
            weight=rng.normal(size=(outputs, inputs)),
            bias=rng.normal(size=outputs),
            weight_mask=rng.random((TASKS, outputs, inputs)) < 0.7,
            bias_mask=rng.random((TASKS, outputs)) < 0.7,
            task_ids=rng.permutation(np.arange(groups) % TASKS),
            output_gradient=rng.normal(size=(groups, rows, outputs)),
        )

    def expected(self) -> dict[str, np.ndarray]:
        """Output and gradients, element by element of the output dimension."""
        result = {
            "y": np.zeros_like(self.output_gradient),
            "x": np.zeros_like(self.x),
            "weight": np.zeros_like(self.weight),
            "bias": np.zeros_like(self.bias),
        }
        for g, task in enumerate(self.task_ids):
            for n in range(len(self.bias)):
                active = self.weight_mask[task, n]
                row = np.where(active, self.weight[n], 0.0)
                shift = self.bias[n] if self.bias_mask[task, n] else 0.0
                dy = self.output_gradient[g, :, n]
                for r, x in enumerate(self.x[g]):
                    result["y"][g, r, n] = (x * row).sum() + shift
                result["x"][g] += np.outer(dy, row)
                result["weight"][n] += np.where(active, dy @ self.x[g], 0.0)
                result["bias"][n] += dy.sum() if self.bias_mask[task, n] else 0.0
        return result

    def computed(
        self, dtype: torch.dtype, bias: bool = True, autocast: bool = False
    ) -> dict[str, torch.Tensor]:
        """The same by the kernel on operands of some dtype."""
        leaves = {name: _leaf(getattr(self, name), dtype) for name in ("x", "weight", "bias")}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = masked_linear(
                leaves["x"],
                leaves["weight"],
                leaves["bias"] if bias else None,
                pack_bits(torch.from_numpy(self.weight_mask)),
                pack_bits(torch.from_numpy(self.bias_mask)) if bias else None,
                torch.from_numpy(self.task_ids),
            )
        y.backward(torch.from_numpy(self.output_gradient).to(y.dtype))
        return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def _leaf(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(values).to(dtype).requires_grad_()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 2e-4)])
def test_output_and_gradients_equal_a_loop(sizes, dtype, error) -> None:
    problem = Problem.random(*sizes)
    expected, computed = problem.expected(), problem.computed(dtype)
    for name, values in computed.items():
        assert values.dtype == dtype, name
        np.testing.assert_allclose(values.numpy(), expected[name], error, error, err_msg=name)


def test_without_a_bias() -> None:
    problem = Problem.random(4, 7, 39, 5)
    computed = problem.computed(torch.float64, bias=False)
    problem.bias[:] = 0.0
    expected = problem.expected()
    assert computed.pop("bias") is None
    for name, values in computed.items():
        np.testing.assert_allclose(values.numpy(), expected[name], 1e-12, 1e-12, err_msg=name)


@pytest.mark.parametrize("autocast", [False, True])
def test_inactive_weights_may_hold_anything_and_get_no_gradient(autocast: bool) -> None:
    problem = Problem.random(4, 7, 39, 5)
    problem.weight_mask &= np.arange(39) % 3 != 0  # these columns are inactive in every task
    problem.bias_mask[:, 2] = False
    before = problem.computed(torch.float32, autocast=autocast)
    problem.weight[:, ::3] = np.resize([np.nan, np.inf, -np.inf], (5, 13))
    problem.bias[2] = np.nan
    after = problem.computed(torch.float32, autocast=autocast)
    for name, values in after.items():
        assert torch.equal(values, before[name]), name
    assert torch.isfinite(after["y"]).all()
    assert (after["weight"][:, ::3] == 0).all()
    assert after["bias"][2] == 0


@pytest.mark.parametrize("sizes", SIZES)
def test_autocast_errs_at_most_twice_as_much_as_a_dense_layer(sizes) -> None:
    problem = Problem.random(*sizes)
    expected = problem.expected()
    computed = problem.computed(torch.float32, autocast=True)
    dense = _dense_under_autocast(problem)
    assert computed["y"].dtype == torch.bfloat16
    for name, values in computed.items():
        if name != "y":
            assert values.dtype == torch.float32, name
        error = np.abs(values.double().numpy() - expected[name]).max()
        bound = np.abs(dense[name].double().numpy() - expected[name]).max()
        assert error <= 2 * bound + 1e-6, name


def _dense_under_autocast(problem: Problem) -> dict[str, torch.Tensor]:
    """The groups one by one, by PyTorch's layer on weights that were masked before."""
    x, weight, bias = (
        torch.from_numpy(v).float() for v in (problem.x, problem.weight, problem.bias)
    )
    result = {"y": torch.zeros(problem.output_gradient.shape, dtype=torch.bfloat16)}
    result |= {name: torch.zeros_like(v) for name, v in (("x", x), ("weight", weight))}
    result["bias"] = torch.zeros_like(bias)
    for g, task in enumerate(problem.task_ids):
        weight_mask, bias_mask = (
            torch.from_numpy(mask[task]) for mask in (problem.weight_mask, problem.bias_mask)
        )
        leaves = [x[g].clone(), weight * weight_mask, bias * bias_mask]
        for leaf in leaves:
            leaf.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(*leaves)
        y.backward(torch.from_numpy(problem.output_gradient[g]).to(y.dtype))
        result["y"][g] = y.detach()
        result["x"][g] = leaves[0].grad
        result["weight"] += leaves[1].grad * weight_mask
        result["bias"] += leaves[2].grad * bias_mask
    return result


def test_gradients_pass_pytorchs_own_check() -> None:
    problem = Problem.random(4, 3, 5, 4)
    bits = [pack_bits(torch.from_numpy(m)) for m in (problem.weight_mask, problem.bias_mask)]
    leaves = [_leaf(v, torch.float64) for v in (problem.x, problem.weight, problem.bias)]
    task_ids = torch.from_numpy(problem.task_ids)
    assert torch.autograd.gradcheck(lambda *v: masked_linear(*v, *bits, task_ids), leaves)
