"""Compares the errors of the kernels with those of PyTorch in the same precision.

    python bench/errors.py [--output errors.json]

An error is the norm of the difference from the result in float64, divided by the norm of this
result. bf16 represents all operands exactly, so only the computation has an error. The layers are
those of the paper's model with five tasks, without dropout.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_masked_linear import Problem
from measuring import DEVICE, ON_GPU
from report import plain_table
from torch import Tensor

from harmodt.files import write_json
from harmodt_kernels import PYTORCH, REFERENCE, Backend, LayerMasks, fused_backend

PRECISIONS = ("bf16", "tf32", "tf32x3", "fp32") if ON_GPU else ("bf16", "fp32")
Results = dict[str, Tensor]
Operation = Callable[[Backend, torch.dtype, torch.dtype], Results]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file; by default, print a table")
    parser.add_argument("--rows", type=int, default=600, help="rows per task")
    arguments = parser.parse_args()
    rows = [row for name in PRECISIONS for row in measure(name, arguments.rows)]
    if arguments.output is None:
        print(table(rows))
    else:
        write_json(arguments.output, rows)


def measure(precision: str, rows: int) -> list[dict[str, Any]]:
    """The errors of every result of every operation in a precision."""
    found = []
    # In bf16, a GPU's kernels get bf16 tensors. A CPU's kernels round float32 tensors themselves.
    activations = torch.bfloat16 if precision == "bf16" and ON_GPU else torch.float32
    for name, operation in operations(rows).items():
        exact = operation(REFERENCE, torch.float64, torch.float64)
        errors = []
        for backend in (fused_backend(DEVICE), PYTORCH):
            with backend.precision(precision, DEVICE):
                results = operation(backend, activations, torch.float32)
            errors.append({key: _error(results[key], exact[key]) for key in exact})
        found += [
            {
                "precision": precision,
                "operation": name,
                "result": key,
                "error": errors[0][key],
                "pytorch": errors[1][key],
            }
            for key in exact
        ]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The errors as a Markdown table."""
    heads = ["operation", "result", "precision", "error", "PyTorch's", "error ÷ PyTorch's"]
    return plain_table(
        heads,
        [
            [
                *(row[key] for key in ("operation", "result", "precision")),
                *(f"{row[key]:.1e}" for key in ("error", "pytorch")),
                f"{row['error'] / row['pytorch']:.2f}" if row["pytorch"] else "",
            ]
            for row in rows
        ],
    )


def operations(rows: int) -> dict[str, Operation]:
    """Every operation with products or sums, by name."""
    return {
        **{f"masked linear, {layer}": _linear(layer, rows) for layer in ("qkv", "down")},
        "masked linear with ReLU, up": _linear("up", rows),
        "linear and residual, down": _residual("down", rows),
        "LayerNorm and linear, qkv": _norm_linear("qkv", rows),
        "masked LayerNorm": _layer_norm(rows),
        "attention": _attention(),
    }


def _linear(layer: str, rows: int) -> Operation:
    problem = _exact_in_bf16(layer, rows)

    def run(backend: Backend, activations: torch.dtype, weights: torch.dtype) -> Results:
        x, dy = (t.to(activations).requires_grad_() for t in (problem.x, problem.dy))
        weight, bias = (t.to(weights).requires_grad_() for t in (problem.weight, problem.bias))
        groups = [t.new_zeros(len(x), *t.shape).detach() for t in (weight, bias)]
        masked_linear = backend.masked_linear
        y = masked_linear(x, weight, bias, *problem.masks, relu=problem.relu)
        dx, *summed = torch.autograd.grad(y, (x, weight, bias), dy.to(y.dtype))
        options = {"group_gradients": tuple(groups), "relu": problem.relu}
        masked_linear(x, weight, bias, *problem.masks, **options).backward(dy.to(y.dtype))
        return {"y": y, "dx": dx, "dW": summed[0], "db": summed[1], "dW of a group": groups[0]}

    return run


def _residual(layer: str, rows: int) -> Operation:
    problem = _exact_in_bf16(layer, rows)

    def run(backend: Backend, activations: torch.dtype, weights: torch.dtype) -> Results:
        x = problem.x.to(activations).requires_grad_()
        weight, bias = (t.to(weights).requires_grad_() for t in (problem.weight, problem.bias))
        residual = problem.dy.to(weights)
        y = backend.linear_residual(x, weight, bias, *problem.masks, residual, 0.0)
        dx, d_weight, d_bias = torch.autograd.grad(y, (x, weight, bias), problem.dy.to(y.dtype))
        return {"y": y, "dx": dx, "dW": d_weight, "db": d_bias}

    return run


def _norm_linear(layer: str, rows: int) -> Operation:
    problem, norm = _exact_in_bf16(layer, rows), _exact_in_bf16("out", rows)
    masks = LayerMasks(*problem.masks)
    norm_masks = LayerMasks(norm.bias_bits, norm.bias_bits, problem.task_ids)

    def run(backend: Backend, activations: torch.dtype, weights: torch.dtype) -> Results:
        operands = [
            t.to(weights).requires_grad_()
            for t in (problem.x, norm.weight[0], norm.bias, problem.weight, problem.bias)
        ]
        y, _ = backend.norm_linear(*operands, norm_masks, masks)
        gradients = torch.autograd.grad(y, operands, problem.dy.to(y.dtype))
        return dict(zip(("y", "dx", "dgain", "dshift", "dW", "db"), (y, *gradients), strict=True))

    return run


def _layer_norm(rows: int) -> Operation:
    problem = _exact_in_bf16("out", rows)
    masks = (problem.bias_bits, problem.bias_bits, problem.task_ids)

    def run(backend: Backend, activations: torch.dtype, weights: torch.dtype) -> Results:
        operands = [
            t.to(weights).requires_grad_() for t in (problem.x, problem.weight[0], problem.bias)
        ]
        y, _ = backend.masked_layer_norm(*operands, *masks)
        gradients = torch.autograd.grad(y, operands, problem.dy.to(y.dtype))
        return dict(zip(("y", "dx", "dw", "db"), (y, *gradients), strict=True))

    return run


def _attention() -> Operation:
    torch.manual_seed(0)
    qkv, d_out = (
        torch.randn(40, 75, *rest, device=DEVICE).bfloat16() for rest in ((3, 8, 16), (8, 16))
    )

    def run(backend: Backend, activations: torch.dtype, weights: torch.dtype) -> Results:
        x = qkv.to(activations).requires_grad_()
        y = backend.attention(x, slice(None), 0.0)
        return {"y": y, "d_qkv": torch.autograd.grad(y, x, d_out.to(y.dtype))[0]}

    return run


def _exact_in_bf16(layer: str, rows: int) -> Problem:
    problem = Problem.random(torch.float32, 128, layer, 5, rows)
    for name in ("x", "weight", "bias", "dy"):
        setattr(problem, name, getattr(problem, name).bfloat16().float())
    return problem.with_relu() if problem.relu else problem


def _error(actual: Tensor, exact: Tensor) -> float:
    difference = torch.linalg.vector_norm(actual.double() - exact)
    return (difference / torch.linalg.vector_norm(exact)).item()


if __name__ == "__main__":
    main()
