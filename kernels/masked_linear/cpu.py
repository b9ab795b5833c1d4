"""Passes the tensors of the masked linear layer to the C library."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from ..masks import stride_of
from ..native.library import LinearShape, WeightGradient, library, pointer, threads
from .gradients import LayerGradients, layers_of


def bf16_products() -> bool:
    """Whether PyTorch's setting for CPUs rounds the operands of float32 products to bf16."""
    return torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_bits: Tensor | None,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    relu: bool,
    residual: Tensor | None = None,
    drop: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Computes `harmodt::masked_linear`, with the arguments of its schema."""
    dtype = check_dtype(x.dtype)
    operand, float_residual = as_float(x), None if residual is None else as_float(residual)
    y = operand.new_empty(*x.shape[:2], len(weight))
    weight, bias = weight.float(), None if bias is None else bias.float()
    shape = shape_of(operand, weight, y, weight_bits, bias_bits, task_ids, dtype)
    library().harmodt_masked_linear(
        byref(shape),
        *map(pointer, (operand, weight, bias)),
        relu,
        pointer(float_residual),
        drop,
        pointer(seed),
        pointer(y),
        threads(),
    )
    return y.to(dtype if residual is None else torch.promote_types(dtype, residual.dtype))


def masked_linear_input_gradient(
    dy: Tensor,
    y: Tensor | None,
    weight: Tensor,
    weight_bits: Tensor | None,
    task_ids: Tensor | None,
    dtype: torch.dtype,
    drop: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    check_dtype(dtype)
    dy, y, weight = as_float(dy), None if y is None else as_float(y), weight.float()
    dx = dy.new_empty(*dy.shape[:2], weight.shape[1])
    shape = shape_of(dx, weight, dy, weight_bits, None, task_ids, dtype)
    library().harmodt_masked_linear_input_gradient(
        byref(shape),
        *map(pointer, (dy, y)),
        drop,
        pointer(seed),
        *map(pointer, (weight, dx)),
        threads(),
    )
    return dx.to(dtype)


def masked_linear_weight_gradients(*operands: list) -> None:
    for layer in layers_of(*operands):
        write_gradients(layer)


def write_gradients(layer: LayerGradients) -> None:
    weight_out, bias_out, dtype = layer.weight_out, layer.bias_out, check_dtype(layer.dtype)
    if weight_out.dtype != torch.float32:
        raise TypeError(f"group_gradients are {weight_out.dtype}: on a CPU they must be float32")
    dy, x, y = as_float(layer.dy), as_float(layer.x), None if layer.y is None else as_float(layer.y)
    shape = shape_of(x, None, dy, layer.weight_bits, layer.bias_bits, layer.task_ids, dtype)
    out = WeightGradient(
        per_group=len(weight_out) == len(x),
        weight=pointer(weight_out),
        weight_group_stride=weight_out.stride(0),
        weight_row_stride=weight_out.stride(1),
        bias=pointer(bias_out),
        bias_group_stride=0 if bias_out is None else bias_out.stride(0),
    )
    library().harmodt_masked_linear_weight_gradient(
        byref(shape),
        *map(pointer, (dy, y)),
        layer.drop,
        pointer(layer.seed),
        *map(pointer, (x, layer.statistics, layer.affine)),
        byref(out),
        threads(),
    )


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype == torch.float16:
        raise TypeError("x is float16, but the CPU kernels take float32 or bfloat16")
    return dtype


def as_float(x: Tensor) -> Tensor:
    return x.float().contiguous()


def shape_of(
    x: Tensor,
    weight: Tensor | None,
    y: Tensor,
    weight_bits: Tensor | None,
    bias_bits: Tensor | None,
    task_ids: Tensor | None,
    dtype: torch.dtype,
) -> LinearShape:
    groups, rows, inputs = x.shape
    return LinearShape(
        groups=groups,
        rows=rows,
        inputs=inputs,
        outputs=y.shape[2],
        weight_stride=0 if weight is None else weight.stride(0),
        weight_bits=pointer(weight_bits),
        tasks=0 if weight_bits is None else len(weight_bits),
        weight_bits_task_stride=stride_of(weight_bits, 0),
        weight_bits_row_stride=stride_of(weight_bits, 1),
        bias_bits=pointer(bias_bits),
        bias_bits_task_stride=stride_of(bias_bits, 0),
        task_ids=pointer(task_ids),
        bf16=dtype == torch.bfloat16 or bf16_products(),
    )
