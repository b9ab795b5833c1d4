"""Compares the CPU kernels of the linear layers with PyTorch's. The calls are made in turn.

    pytest bench/bench_cpu.py --benchmark-only

The speed of a shared machine changes from second to second. Ratios of calls that are made in turn
are reliable even if their times are not. The kernels are compared with

    PyTorch dense       F.linear with PyTorch's defaults: MKL, on x86
    oneDNN dense        F.linear under torch.set_float32_matmul_precision("medium"), which selects
                        oneDNN on CPUs
    oneDNN masked copy  the same, after it unpacks the mask and computes W ⊙ M

On a processor with matrix units, the setting "medium" rounds operands to bf16. oneDNN is then
compared with products in bf16 only.

To limit both sides to AVX2, set ONEDNN_MAX_CPU_ISA=AVX2 and HARMODT_ISA=avx2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_masked_linear import TOLERANCE, Problem, dense, forward_of, masked, of_backend
from measuring import (
    ON_GPU,
    assert_agree,
    fused,
    inside,
    measure_in_turn,
    note_held,
    onednn,
    onednn_is_exact,
)
from torch import Tensor

from harmodt_kernels import Recording

SHAPES = [(600, layer, 128) for layer in ("qkv", "out", "up", "down")]
SHAPES += [(rows, "up", 256) for rows in (32, 600, 4800)]
CASES = [(passes, "float32", *s) for s in SHAPES for passes in ("forward", "forward + backward")]
CASES += [("forward + backward", "bf16", *shape) for shape in SHAPES]

pytestmark = [
    pytest.mark.skipif(ON_GPU, reason="bench_masked_linear.py measures a GPU"),
    pytest.mark.benchmark(disable_gc=True),
]


@pytest.mark.parametrize(("passes", "products", "rows", "layer", "d"), CASES)
def bench_linear(benchmark: Any, passes: str, products: str, rows: int, layer: str, d: int) -> None:
    problem = Problem.random(torch.float32, d, layer, 1, 4 if benchmark.disabled else rows)
    problem.relu = False  # PyTorch's layers have no ReLU
    run = problem.forward if passes == "forward" else problem.forward_backward

    def masked_copy(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = masked(weight, problem.weight_bits, problem.task_ids, x.dtype)[0]
        return F.linear(x, weight, masked(bias, problem.bias_bits, problem.task_ids, x.dtype)[0])

    kernels = of_backend(fused().masked_linear, problem)
    call: Callable[[], Any] = lambda: run(kernels)  # noqa: E731
    if products == "bf16":
        call = inside(lambda: fused().precision("bf16", "cpu"), call)
    tolerance = TOLERANCE["float32" if products == "float32" else "bfloat16"]
    actual = call()
    actual = (actual,) if passes == "forward" else actual
    for one, other in zip(actual, problem.expected(True), strict=False):
        assert_agree(one, other, tolerance)
    calls = {"fused": call, "PyTorch dense": lambda: run(dense)}
    if products == "bf16" or onednn_is_exact():
        calls["oneDNN dense"] = inside(onednn, lambda: run(dense))
        calls["oneDNN masked copy"] = inside(onednn, lambda: run(masked_copy))
    benchmark.group = "masked linear layer of one task, beside PyTorch's dense ones"
    measure_in_turn(benchmark, calls, seconds=1.0)


@pytest.mark.parametrize("rows", [600, 32])
@pytest.mark.parametrize("tasks", [1, 5])
@pytest.mark.parametrize("passes", ["forward", "forward + backward"])
def bench_masks(benchmark: Any, passes: str, tasks: int, rows: int) -> None:
    """What masks cost: the layer "up" with random masks, with full masks, and without masks.

    A call with one row of x per task packs all weights, but multiplies next to nothing. With masks
    it packs them once per task; without masks it packs them once. Recorded calls are replayed, so
    that Python adds no time to any row.
    """
    problem = Problem.random(torch.float32, 128, "up", tasks, 4 if benchmark.disabled else rows)
    one_row = dataclasses.replace(problem, x=problem.x[:, :1], dy=problem.dy[:, :1].contiguous())
    cases = {
        "fused": (problem, "fused"),
        "full masks": (problem, "fused, full masks"),
        "no masks": (problem, "fused, no masks"),
        "one row per task: packing": (one_row, "fused"),
        "the same, no masks": (one_row, "fused, no masks"),
    }
    recordings = {name: recorded(*case, passes) for name, case in cases.items()}
    for name, (operands, path) in cases.items():
        recordings[name].replay()
        expected = operands.expected(path == "fused")[0 if passes == "forward" else 1]
        assert_agree(recordings[name].result, expected, TOLERANCE["float32"])
    benchmark.group = "what masks cost: layer up, d = 128, replayed; fused has 13 of 16 bits set"
    measure_in_turn(benchmark, {name: r.replay for name, r in recordings.items()}, seconds=1.0)
    if not benchmark.disabled:
        note_held(benchmark, {name: r.nbytes for name, r in recordings.items()})


def recorded(problem: Problem, path: str, passes: str) -> Recording:
    """A recording of a layer. Its result is y, or the gradient of x if there is a backward pass."""
    forward = forward_of(path, problem, "")
    if passes == "forward":
        return Recording(lambda: problem.forward(forward))
    return Recording(lambda: problem.forward_backward(forward)[1])
