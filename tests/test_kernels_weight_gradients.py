"""Gradients of weights that wait for those of other layers, to be computed together."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import pytest
import torch
from problems import LinearProblem
from torch import Tensor

from harmodt_kernels import REFERENCE, fused_backend
from harmodt_kernels.masked_linear.gradients import LayerGradients, WeightGradients, write
from harmodt_kernels.registration import kernels_for

# Of a block: inputs, outputs, whether a ReLU follows, and the dropout behind it.
LAYERS = [(39, 64, False, 0.0), (40, 39, False, 0.3), (39, 50, True, 0.0), (50, 39, False, 0.3)]


class Result(NamedTuple):
    """A layer's operands, and what was computed: its output, and gradients by name."""

    problem: LinearProblem
    relu: bool
    found: dict[str, Tensor]

    def check(self) -> None:
        self.problem.check(self.found, 2e-4, self.relu)


def backward(
    queue: WeightGradients | None, device: torch.device, groups: int, of_groups: bool = False
) -> list[Result]:
    """A backward pass through all layers, whose gradients are summed or of each group."""
    backend, results, ends = fused_backend(device), [], []
    for index, (inputs, outputs, relu, drop) in enumerate(LAYERS):
        rows = 20 - index  # the last block computes fewer rows where its attention ends
        problem = LinearProblem.random(groups, rows, inputs, outputs)
        x, weight, bias, dy = (
            torch.from_numpy(v).to(device, torch.float32)
            for v in (problem.x, problem.weight, problem.bias, problem.output_gradient)
        )
        layer = x.requires_grad_(), weight, bias, *problem.bits, torch.from_numpy(problem.task_ids)
        layer = [t.to(device) for t in layer]
        count = groups if of_groups else 1
        outs = tuple(
            torch.full((count, *t.shape), torch.nan, device=device) for t in (weight, bias)
        )
        where: dict[str, Any] = {"group_gradients": outs, "queue": queue}
        if drop:
            seed, nothing = torch.tensor([index], device=device), torch.zeros_like(dy)
            y = backend.linear_residual(*layer, nothing, drop, seed=seed, **where)
            factors = REFERENCE.dropout_add(nothing, torch.ones_like(dy), drop, seed)
            problem.output_gradient = problem.output_gradient * factors.cpu().numpy()
        else:
            y = backend.masked_linear(*layer, relu=relu, **where)
        ends.append((y, dy))
        if of_groups:
            found = {"weight_of_groups": outs[0], "bias_of_groups": outs[1]}
        else:
            found = {"weight": outs[0][0], "bias": outs[1][0]}
        results.append(Result(problem, relu, found if drop else {"y": y.detach(), **found}))
    torch.autograd.backward(*zip(*ends, strict=True))
    return results


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("of_groups", [False, True])
@pytest.mark.parametrize("groups", [1, 9])  # of nine the sums are in parts
def test_layers_that_wait_get_their_gradients(device, groups, of_groups) -> None:
    for result in backward(WeightGradients(4), device, groups, of_groups):
        result.check()
        mask = result.problem.weight_mask[result.problem.task_ids]
        active = torch.from_numpy(mask if of_groups else mask.any(0))
        gradients = result.found["weight_of_groups" if of_groups else "weight"].cpu()
        assert (gradients[~active] == 0).all()


def test_the_rest_waits_for_the_end(device) -> None:
    queue = WeightGradients(3)
    results = backward(queue, device, 2)
    waiting = [result for result in results if result.found["weight"].isnan().all()]
    assert len(waiting) == (0 if kernels_for(device) == "cpu" else 1)
    queue.finish()
    for result in results:
        result.check()
        result.found["weight"].fill_(torch.nan)
    queue.finish()  # nothing is left
    assert all(result.found["weight"].isnan().all() for result in results)


def test_an_error_leaves_no_layer_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the next step would write the gradients of the failed one."""
    queue, x = WeightGradients(4), torch.zeros(1, 2, 3, device="meta")
    layer = LayerGradients(x, None, x, None, None, None, x, None)
    queue.add(layer)

    def fails(layers: list[LayerGradients]) -> None:
        assert layers == [layer]
        raise MemoryError

    module = importlib.import_module("harmodt_kernels.masked_linear.gradients")
    monkeypatch.setattr(module, "write", fails)
    with pytest.raises(MemoryError):
        queue.finish()
    queue.finish()  # would fail again if the layer still waited


def test_results_repeat_bit_for_bit(device) -> None:
    first, second = (backward(WeightGradients(4), device, 9) for _ in range(2))
    for expected, result in zip(first, second, strict=True):
        assert all(torch.equal(result.found[n], v) for n, v in expected.found.items())


class FakeLaunches:
    """Takes the place of `launch` and remembers kernels and numbers of programs."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int]] = []

    def __call__(self, kernel: Any, grid: tuple[int], **_: Any) -> None:
        self.made.append((kernel.__name__, grid[0]))


@pytest.mark.parametrize("precision", ["ieee", "tf32", "half"])
@pytest.mark.parametrize("groups", [1, 5, 50])
@pytest.mark.parametrize("d", [128, 256])
def test_a_block_keeps_a_gpu_busy_in_two_launches(monkeypatch, d, groups, precision) -> None:
    kernels = importlib.import_module("harmodt_kernels.masked_linear.triton")
    launches = FakeLaunches()
    monkeypatch.setattr(kernels, "launch", launches)
    monkeypatch.setattr(kernels, "precision_of", lambda _: precision)
    dtype = torch.bfloat16 if precision == "half" else torch.float32
    for of_groups in (False, True):
        launches.made.clear()
        layers = []
        for inputs, outputs in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)):
            out_rows = groups if of_groups else 1
            layers.append(
                LayerGradients(
                    dy=torch.empty(groups, 600, outputs, dtype=dtype),
                    y=None,
                    x=torch.empty(groups, 600, inputs, dtype=dtype),
                    weight_bits=torch.empty(groups, outputs, inputs // 32, dtype=torch.int32),
                    bias_bits=torch.empty(groups, outputs // 32, dtype=torch.int32),
                    task_ids=torch.empty(groups, dtype=torch.int64),
                    weight_out=torch.empty(out_rows, outputs, inputs),
                    bias_out=torch.empty(out_rows, outputs),
                )
            )
        write(layers)
        (name, programs), *more = launches.made
        assert name == "masked_linear_weight_gradients_kernel"
        assert programs >= 132  # multiprocessors of NVIDIA's H100
        assert [name for name, _ in more] in ([], ["sum_chunks_kernel"])
        assert not (more and (of_groups or groups < 50))
