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


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
def test_rows_of_a_group_are_summed_in_ranges(device, groups, monkeypatch) -> None:
    kernels = importlib.import_module("harmodt_kernels.masked_linear.triton")
    monkeypatch.setattr(kernels, "ROWS_OF_CHUNK", 20)
    monkeypatch.setattr(kernels, "FEWEST_CHUNKS", 2)
    plans, chunks_of = [], kernels.chunks_of

    def remembered(*operands: Any) -> Any:
        plans.append(chunks_of(*operands))
        return plans[-1]

    monkeypatch.setattr(kernels, "chunks_of", remembered)
    problem = LinearProblem.random(groups, 90, 39, 35)
    first, second = (
        problem.computed(fused_backend(device), device, torch.float32, relu=True, in_place=True)
        for _ in range(2)
    )
    problem.check(first, 2e-4, relu=True)
    assert all(torch.equal(values, second[name]) for name, values in first.items())
    number, of_groups, rows, ranges = plans[-1]
    assert (number, of_groups, rows, ranges) == (2 * groups, 1, 48, 2)


@pytest.mark.parametrize("shape", [(2, 5, 0, 4), (2, 5, 4, 0), (2, 5, 0, 0), (2, 0, 0, 4)])
def test_a_weight_without_elements(device, shape) -> None:
    groups, rows, inputs, outputs = shape
    x, dy = torch.ones(groups, rows, inputs), torch.ones(groups, rows, outputs)
    weight_out, bias_out = torch.ones(1, outputs, inputs), torch.full((1, outputs), torch.nan)
    tensors = (t.to(device) for t in (dy, x, weight_out, bias_out))
    dy, x, weight_out, bias_out = tensors
    write([LayerGradients(dy, None, x, None, None, None, weight_out, bias_out)])
    assert (bias_out == groups * rows).all()


class FakeLaunches:
    """Takes the place of `launch` and remembers kernels, numbers of programs, and arguments."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int]] = []
        self.arguments: list[dict[str, Any]] = []

    def __call__(self, kernel: Any, grid: tuple[int], **arguments: Any) -> None:
        self.made.append((kernel.__name__, grid[0]))
        self.arguments.append(arguments)

    def steps(self) -> int:
        """The most products that a program of the first launch adds one after another."""
        arguments = self.arguments[0]
        return max(
            layer.groups_of_program
            * -(-min(layer.rows, layer.rows_of_program) // arguments["BLOCK_R"])
            for layer in arguments["layers"]
        )


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32", "half"])
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
        launches.arguments.clear()
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
        if (d, precision) == (128, "half"):
            assert launches.steps() <= 40
        assert [name for name, _ in more] in ([], ["sum_chunks_kernel"])
        assert not (more and (of_groups or groups < 50))


@pytest.mark.parametrize("groups", [1, 5, 50])
def test_many_rows_of_one_group_keep_a_gpu_busy(monkeypatch, groups) -> None:
    """Without masks, the groups of a batch are one group."""
    kernels = importlib.import_module("harmodt_kernels.masked_linear.triton")
    launches = FakeLaunches()
    monkeypatch.setattr(kernels, "launch", launches)
    layers = []
    for inputs, outputs in ((128, 384), (128, 128), (128, 512), (512, 128)):
        dy, x = (torch.empty(1, groups * 600, n, dtype=torch.bfloat16) for n in (outputs, inputs))
        out, bias_out = torch.empty(1, outputs, inputs), torch.empty(1, outputs)
        layers.append(LayerGradients(dy, None, x, None, None, None, out, bias_out))
    write(layers)
    assert launches.made[0][1] >= 132 and launches.steps() <= 40
