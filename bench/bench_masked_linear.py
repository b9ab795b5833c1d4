"""Times the linear layers of a transformer block with the masks of several tasks.

    pytest bench/bench_masked_linear.py --benchmark-only

A step has a group of 600 rows (8 windows of 75 tokens) for each task, but at most GROUPS groups.
The masks of all tasks are in memory. As in the model, the layer "up" ends in a ReLU. The paths:

    fused                the kernels, which apply the bits to tiles of W
    fused, full masks    on a GPU, the kernels with masks whose bits are all 1
    fused, no masks      on a GPU, the kernels without masks
    reference            plain PyTorch: one masked copy of W per group, then a batched product
    compiled             the reference through torch.compile
    vmap                 torch.func: a linear layer called on the stacked masked copies
    dense                no masks: the lower bound. W is in float32, and each call casts it
    dense, W cast once   in bf16, the same on a W that is in bf16 already; so is its gradient

The rows "full masks" and "no masks" show what the masks cost. On a CPU, bench_cpu.py times this in
turn, because the difference is less than what the machine's speed changes between two benchmarks.

Before a path is timed, its results are compared with the definition in float64. For this the
weights are rounded to the dtype of the products.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measuring import DEVICE, ON_GPU, assert_agree, fused, measure, random_masks, timer
from torch import Tensor, nn

from harmodt_kernels import PYTORCH, REFERENCE, unpack_bits

WITH_RELU = "up"
LAYERS = {"up": (4, 1), "qkv": (3, 1), "out": (1, 1), "down": (1, 4)}  # outputs, inputs over d
TASKS = (1, 5, 50, 1000)
GROUPS = 50 if ON_GPU else 5
ROWS = 600
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}  # of the norm

# One layer for each number of tasks, and all layers for five tasks. A GPU also times wider layers
# and bf16.
SIZES = [("up", tasks) for tasks in TASKS] + [(layer, 5) for layer in LAYERS if layer != "up"]
if ON_GPU:
    CASES = [("bfloat16", 128, *size) for size in SIZES]
    CASES += [("bfloat16", d, "up", tasks) for d in (256, 512, 1024) for tasks in (5, 50)]
    CASES += [("float32", d, "up", 5) for d in (128, 256)]
else:
    CASES = [("float32", 128, "up", tasks) for tasks in TASKS] + [("float32", 256, "up", 5)]

MASKED = ("fused", "reference", "compiled", "vmap")

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]

pytestmark = pytest.mark.benchmark(timer=timer)


@dataclass
class Problem:
    """The operands of a layer: x [G, R, K], weight [N, K], bias [N], dy [G, R, N] and the masks."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    weight_bits: Tensor  # [T, N, K / 32]
    bias_bits: Tensor  # [T, N / 32]
    task_ids: Tensor  # [G]
    relu: bool = False

    @classmethod
    def random(cls, dtype: torch.dtype, d: int, layer: str, tasks: int, rows: int) -> Problem:
        torch.manual_seed(0)
        outputs, inputs = (factor * d for factor in LAYERS[layer])
        groups = min(tasks, GROUPS)
        problem = cls(
            x=torch.randn(groups, rows, inputs, device=DEVICE, dtype=dtype),
            weight=torch.randn(outputs, inputs, device=DEVICE) * inputs**-0.5,
            bias=torch.randn(outputs, device=DEVICE),
            dy=torch.randn(groups, rows, outputs, device=DEVICE, dtype=dtype),
            weight_bits=random_masks(tasks, outputs, inputs // 32),
            bias_bits=random_masks(tasks, outputs // 32),
            task_ids=torch.randperm(tasks, device=DEVICE)[:groups],
        )
        return problem.with_relu() if layer == WITH_RELU else problem

    def with_relu(self) -> Problem:
        """The layer with a ReLU. dy is 0 where y is close to 0: rounding could change its sign."""
        edges = [self.expected(masked)[0].abs() < 1e-2 for masked in (False, True)]
        dy = self.dy.masked_fill(edges[0] | edges[1], 0.0)
        return dataclasses.replace(self, dy=dy, relu=True)

    def without_masks(self) -> Problem:
        """The problem with every weight active: its masks are full."""
        bits = (torch.full_like(bits, -1) for bits in (self.weight_bits, self.bias_bits))
        weight_bits, bias_bits = bits
        return dataclasses.replace(self, weight_bits=weight_bits, bias_bits=bias_bits)

    def cast(self) -> Problem:
        """The problem with weight and bias in the dtype of x."""
        weight, bias = self.weight.to(self.x.dtype), self.bias.to(self.x.dtype)
        return dataclasses.replace(self, weight=weight, bias=bias)

    @property
    def masks(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight_bits, self.bias_bits, self.task_ids

    def forward(self, forward: Forward) -> Tensor:
        with torch.no_grad():
            return forward(self.x, self.weight, self.bias)

    def forward_backward(self, forward: Forward) -> tuple[Tensor, ...]:
        """y and the gradients of x, weight and bias."""
        operands = [t.detach().requires_grad_() for t in (self.x, self.weight, self.bias)]
        y = forward(*operands)
        return y.detach(), *torch.autograd.grad(y, operands, self.dy)

    def expected(self, masked: bool) -> tuple[Tensor, ...]:
        """The results of `forward_backward` by the definition in float64."""
        problem = self.cast() if masked else self.cast().without_masks()
        operands = (t.double() for t in (problem.x, problem.weight, problem.bias, problem.dy))
        exact = Problem(*operands, *problem.masks, self.relu)
        return exact.forward_backward(of_backend(REFERENCE.masked_linear, exact))


def of_backend(masked_linear: Callable[..., Tensor], problem: Problem) -> Forward:
    return lambda x, weight, bias: masked_linear(x, weight, bias, *problem.masks, relu=problem.relu)


def activated(problem: Problem, forward: Forward) -> Forward:
    """A layer and, if the problem has one, the ReLU after it."""
    return (lambda *operands: forward(*operands).relu()) if problem.relu else forward


def masked(values: Tensor, bits: Tensor, task_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Masked copies of a weight or bias [..., K] for the groups' tasks, [G, ..., K]."""
    mask = unpack_bits(bits[task_ids], values.shape[-1])
    return torch.where(mask, values, 0.0).to(dtype)


def vmap(problem: Problem) -> Forward:
    outputs, inputs = problem.weight.shape
    layer = nn.Linear(inputs, outputs, device="meta")

    def one(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,))

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        parameters = {
            "weight": masked(weight, problem.weight_bits, problem.task_ids, x.dtype),
            "bias": masked(bias, problem.bias_bits, problem.task_ids, x.dtype),
        }
        return torch.func.vmap(one)(parameters, x)

    return forward


def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def forward_of(path: str, problem: Problem, compiler: str) -> Forward:
    """The layer of a path; `compiler` is torch.compile's backend."""
    if path == "fused":
        return of_backend(fused().masked_linear, problem)
    if path == "fused, full masks":
        return of_backend(fused().masked_linear, problem.without_masks())
    if path == "fused, no masks":
        kernel = partial(fused().masked_linear, relu=problem.relu)
        return lambda x, weight, bias: kernel(x, weight, bias, None, None, None)
    if path == "vmap":
        return activated(problem, vmap(problem))
    if path.startswith("dense"):
        return activated(problem, dense)
    reference = of_backend(PYTORCH.masked_linear, problem)
    if path == "reference":
        return reference
    torch.compiler.reset()  # otherwise each case counts as a recompilation, which are limited
    return torch.compile(reference, fullgraph=True, dynamic=False, backend=compiler)


@functools.lru_cache(maxsize=1)  # all paths of a case share the problem
def problem_and_results(
    dtype: str, d: int, layer: str, tasks: int, rows: int, is_masked: bool
) -> tuple[Problem, tuple[Tensor, ...]]:
    problem = Problem.random(getattr(torch, dtype), d, layer, tasks, rows)
    return problem, problem.expected(is_masked)


def paths_of(dtype: str) -> list[str]:
    """The paths of the benchmarks whose products are in a dtype."""
    cast = [] if dtype == "float32" else ["dense, W cast once"]
    return [*MASKED, "dense", *cast, *(("fused, full masks", "fused, no masks") if ON_GPU else ())]


@pytest.mark.parametrize(
    ("passes", "dtype", "d", "layer", "tasks", "path"),
    [
        (passes, *case, path)
        for passes in ("forward + backward", "forward")
        for case in CASES
        for path in paths_of(case[0])
        # compiling for a CPU takes long, and both passes include the forward one
        if ON_GPU or (passes, path) != ("forward", "compiled")
    ],
)
def bench_masked_linear(
    benchmark: Any, passes: str, dtype: str, d: int, layer: str, tasks: int, path: str
) -> None:
    problem, expected = problem_and_results(
        dtype, d, layer, tasks, 4 if benchmark.disabled else ROWS, path in MASKED
    )
    problem = problem.cast() if path == "dense, W cast once" else problem
    # Without timing, only check that the whole graph compiles: generating code takes too long.
    forward = forward_of(path, problem, "aot_eager" if benchmark.disabled else "inductor")
    run = problem.forward if passes == "forward" else problem.forward_backward
    actual = run(forward)
    for one, other in zip((actual,) if passes == "forward" else actual, expected, strict=False):
        assert_agree(one, other, TOLERANCE[dtype])
    del actual, expected
    groups = len(problem.task_ids)
    benchmark.group = "masked linear layer, 600 rows of each task"
    benchmark.extra_info["groups"] = groups
    benchmark.extra_info["mask_bytes"] = problem.weight_bits.nbytes + problem.bias_bits.nbytes
    measure(benchmark, lambda: run(forward))
