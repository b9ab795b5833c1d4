"""Times the LayerNorm and the layer that start a residual branch, as one operation and as two.

    pytest bench/bench_norm_linear.py --benchmark-only

The layer is "qkv" of the paper's model, forward and backward, with 600 rows per task. The paths:

    fused            the layer normalises x while it reads it
    two operations   the kernels of the LayerNorm, then those of the layer
    reference        both in plain PyTorch

Before a path is timed, its results are compared with the reference in float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from bench_masked_linear import Problem
from measuring import DEVICE, ON_GPU, assert_agree, fused, measure, timer
from torch import Tensor

from harmodt_kernels import PYTORCH, LayerMasks
from harmodt_kernels.norm_linear.reference import norm_then_linear

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # of the norm

pytestmark = pytest.mark.benchmark(timer=timer)


def begin(problem: Problem, path: str) -> tuple[Tensor, ...]:
    """y and the gradients of x, gain, shift, weight and bias, computed by a path."""
    backend = PYTORCH if path == "reference" else fused()
    apply = backend.norm_linear
    if path == "two operations":
        apply = partial(norm_then_linear, backend.masked_layer_norm, backend.masked_linear)
    gain, shift = problem.weight[0], problem.x[0, 0]
    operands = [
        t.detach().requires_grad_() for t in (problem.x, gain, shift, problem.weight, problem.bias)
    ]
    bits = problem.weight_bits[:, 0]
    norm_masks = LayerMasks(bits, bits, problem.task_ids)
    y, _ = apply(*operands, norm_masks, LayerMasks(*problem.masks))
    return y.detach(), *torch.autograd.grad(y, operands, problem.dy.to(y.dtype))


@pytest.mark.parametrize("path", ["fused", "two operations", "reference"])
@pytest.mark.parametrize("tasks", [1, 5, 50] if ON_GPU else [1, 5])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def bench_norm_linear(benchmark: Any, precision: str, tasks: int, path: str) -> None:
    rows = 4 if benchmark.disabled else 600
    problem = Problem.random(torch.float32, 128, "qkv", tasks, rows)
    expected = begin(problem, "reference")
    with fused().precision(precision, DEVICE):
        for actual, exact in zip(begin(problem, path), expected, strict=True):
            assert_agree(actual, exact, TOLERANCE[precision])
        benchmark.group = "LayerNorm and masked linear layer, qkv, 600 rows of each task"
        measure(benchmark, lambda: begin(problem, path))
