"""Compares the CPU kernels with PyTorch's operations. The calls are made in turn.

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

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_masked_linear import TOLERANCE, Problem, dense, masked, of_backend
from measuring import ON_GPU, assert_agree, fused, measure_in_turn, onednn, onednn_is_exact
from torch import Tensor

from harmodt_kernels import PYTORCH
from harmodt_kernels.attention import pytorch as attention_pytorch

SHAPES = [(600, layer, 128) for layer in ("qkv", "out", "up", "down")]
SHAPES += [(rows, "up", 256) for rows in (32, 600, 4800)]
CASES = [(passes, "float32", *s) for s in SHAPES for passes in ("forward", "forward + backward")]
CASES += [("forward + backward", "bf16", *shape) for shape in SHAPES]

pytestmark = [
    pytest.mark.skipif(ON_GPU, reason="PyTorch computes on a GPU here"),
    pytest.mark.benchmark(disable_gc=True),
]


def inside(context: Callable[[], Any], call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with context():
            return call()

    return run


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


@pytest.mark.parametrize("head_size", [16, 32])
@pytest.mark.parametrize("passes", ["forward", "forward + backward"])
def bench_attention(benchmark: Any, passes: str, head_size: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(40, 75, 3, 8, head_size, requires_grad=passes != "forward")
    d_out = torch.randn(40, 75, 8, head_size)
    kernel = fused().attention

    def run(attention: Callable[[], Tensor]) -> Tensor:
        if passes == "forward":
            with torch.no_grad():
                return attention()
        return torch.autograd.grad(attention(), qkv, d_out)[0]

    def by_kernel() -> Tensor:
        return run(lambda: kernel(qkv, slice(None), 0.0))

    def by_products() -> Tensor:
        return attention_pytorch.attention(qkv, slice(None), 0.0)

    def by_pytorch() -> Tensor:
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)

    for other in (by_products, by_pytorch):
        assert_agree(by_kernel(), run(other), 1e-5)
    calls = {
        "fused": by_kernel,
        "products and softmax": lambda: run(by_products),
        "the same, oneDNN": inside(onednn, lambda: run(by_products)),
        "F.scaled_dot_product_attention": lambda: run(by_pytorch),
    }
    benchmark.group = "attention: 40 sequences of 75 tokens, 8 heads"
    measure_in_turn(benchmark, calls, seconds=1.0)


@pytest.mark.parametrize("passes", ["forward", "forward + backward"])
def bench_layer_norm(benchmark: Any, passes: str) -> None:
    problem = Problem.random(torch.float32, 128, "out", 5, 600)
    bits = (problem.bias_bits, problem.bias_bits, problem.task_ids)

    def run(layer_norm: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        weight = problem.bias

        def forward(x: Tensor, _: Tensor, bias: Tensor) -> Tensor:
            return layer_norm(x, weight, bias, *bits)[0]

        if passes == "forward":
            return problem.forward(forward)
        x = problem.x.requires_grad_()
        return torch.autograd.grad(forward(x, weight, problem.bias), x, problem.dy)[0]

    def plain(x: Tensor, weight: Tensor, bias: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return F.layer_norm(x, x.shape[-1:], weight, bias), x

    kernel = fused().masked_layer_norm
    assert_agree(run(kernel), run(PYTORCH.masked_layer_norm), 1e-5)
    calls = {
        "fused": lambda: run(kernel),
        "PyTorch dense": lambda: run(plain),
        "reference": lambda: run(PYTORCH.masked_layer_norm),
    }
    benchmark.group = "LayerNorm: 5 tasks x 600 rows, d = 128"
    measure_in_turn(benchmark, calls, seconds=1.0)
