"""Compiles every kernel for several GPUs, without a GPU, and tabulates the results.

    python tests/compile_for_targets.py [--output build/kernels.md] [--all]

The operations are called on CPU tensors with the shapes and strides of the model. The launcher
compiles a kernel instead of running it, so Triton specialises the kernel as it would on the GPU.
The table is also written as JSON, next to the Markdown file.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import harmodt_kernels
from harmodt_kernels import (
    PYTORCH,
    LayerMasks,
    masked_adamw,
    masked_linear,
    registration,
    words_for,
)
from harmodt_kernels.attention import attention
from harmodt_kernels.backend import Precision
from harmodt_kernels.dropout_add import dropout_add
from harmodt_kernels.linear_residual import linear_residual
from harmodt_kernels.masked_layer_norm import masked_layer_norm
from harmodt_kernels.masked_linear.gradients import LayerGradients, write
from harmodt_kernels.norm_linear import norm_linear
from harmodt_kernels.token_embedding import token_embedding

OUTPUT = Path(__file__).parents[1] / "build" / "kernels.md"
PROCESSES = 2

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Triton compiles for these as for another target, but they have less shared memory.
ALIKE = ("sm_86", "sm_89", "sm_120")
# Without --all, small tiles, and products with the bf16 copy, are compiled for this target only. It
# represents the others.
USUAL = "sm_90"

# Patterns for PTX and AMD's assembly. A wide load has at least 16 bytes per thread.
INSTRUCTIONS = {
    "matrix": r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_s?mfma)",
    "fma": r"\b(fma\.rn\.f32|v_(pk_)?fma\w*_f32)",
    "async_copies": r"\bcp\.async\.(ca|cg|bulk)\.",
    "wide_loads": r"\bld\.global\S*\.(v4\.\w32|v2\.\w64|v8\.\w32|v4\.\w64)|_load_dwordx4",
}

# Arguments of a launch that are not the kernel's.
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")

# The dtypes of x, of weights and of biases.
PRECISIONS = {
    "fp32": (torch.float32,) * 3,
    "tf32x3": (torch.float32,) * 3,
    "tf32": (torch.float32,) * 3,
    "bf16": (torch.bfloat16,) * 3,
    "fp16": (torch.float16,) * 3,
    "bf16, bf16 weights": (torch.bfloat16, torch.bfloat16, torch.float32),
    "bf16, fp32 weights": (torch.bfloat16, torch.float32, torch.float32),
    "fp16, fp32 weights": (torch.float16, torch.float32, torch.float32),
}
# Maskable weights of the model of 1.47 million.
WEIGHTS = 1_189_888

# The precisions of a training run. The others are compiled for fewer sizes. In bf16, steps read the
# optimiser's bf16 copy of the weights; mask updates and policies read the weights themselves.
TRAINING = ("fp32", "tf32x3", "tf32", "bf16, fp32 weights")
BF16_COPY = "bf16, bf16 weights"


class Case(NamedTuple):
    """A use of an operation, as in the model.

    Attributes:
        largest: whether the case uses the operation's largest tiles.
    """

    use: str
    run: Callable[[], object]
    precision: str = "fp32"
    largest: bool = False

    def belongs(self, target: str, everything: bool) -> bool:
        """Whether the case is compiled for a target; `everything`: with --all."""
        if target.startswith("gfx") and self.precision == "tf32x3":
            return False  # AMD's GPUs have no such mode
        if self.precision == "tf32x3" and not everything:  # its tiles are like those of TF32
            return self.largest and target == USUAL
        if target in ALIKE:  # TF32 has float32's tiles here, and sm_80 shows its other properties
            return self.largest and (everything or not self.precision.startswith("tf32"))
        if everything or target == USUAL:
            return True
        # With the bf16 copy, the tiles are the same, and they need less shared memory.
        return self.largest and self.precision != BF16_COPY


@dataclass
class Compiled:
    """The result of compiling a kernel.

    Attributes:
        use: the first case that needs it.
        options: its compile-time constants, warps and stages.
        dot: whether it multiplies matrices.
        registers: registers per thread.
        shared: bytes of shared memory per block.
        spills: bytes of stack per thread (NVIDIA), or spilled vector and scalar registers (AMD).
        instructions: the number of each of `INSTRUCTIONS` in its code.
        loop: PTX instructions per matrix product, in the smallest loop that has a product.
    """

    kernel: str
    use: str
    precision: str
    options: str
    target: str
    dot: bool
    registers: int
    shared: int
    spills: list[int]
    instructions: dict[str, int]
    loop: float | None


@dataclass
class Compilation:
    """The names of all kernels, the compiled kernels, and the cases that failed."""

    kernels: list[str] = field(default_factory=list)
    compiled: list[Compiled] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)


def masked_linear_cases() -> Iterator[Case]:
    small, large = (5, 600, 128, 512), (5, 4800, 256, 1024)
    for precision in PRECISIONS:
        # Few cases, because each takes seconds. Other sizes have the same tiles.
        if precision == BF16_COPY:
            continue  # in a step, all layers start or end a branch, and have other cases
        if precision in ("fp32", "bf16, fp32 weights"):
            for d, rows in ((128, 600), (256, 4800)):
                if d == 128 or precision != "fp32":
                    yield masked_linear_case(precision, (5, rows, d, 3 * d))
                    yield masked_linear_case(precision, (5, rows, d, d))
                case = masked_linear_case(precision, (5, rows, d, 4 * d), relu=True)
                yield case._replace(largest=d == 256)
                yield masked_linear_case(precision, (5, rows, 4 * d, d))
            yield masked_linear_case(precision, small, relu=True, group_gradients=True)
            yield masked_linear_case(precision, small, no_bias=True)
            yield masked_linear_case(precision, (1, 1, 39, 4))
        else:
            case = masked_linear_case(precision, large, relu=True)
            yield case._replace(largest=precision.startswith("tf32"))
        if precision in TRAINING:
            yield masked_linear_case(precision, (4, 75, 39, 96), relu=True)
            yield masked_linear_case(precision, (1, 600, 128, 512), relu=True)
            yield masked_linear_case(precision, (1, 600, 512, 128))
    wide = masked_linear_case("bf16, fp32 weights", (1, 600, 1024, 1024), relu=True)
    yield wide._replace(largest=True)


def masked_linear_case(
    precision: str,
    shape: tuple[int, int, int, int],
    *,
    relu: bool = False,
    no_bias: bool = False,
    group_gradients: bool = False,
) -> Case:
    """Forward and backward pass of a layer whose tensors are views of flat vectors."""
    groups, rows, inputs, outputs = shape
    dtype, weight_dtype, bias_dtype = PRECISIONS[precision]
    words = words_for(inputs)
    weight_words = outputs * words
    end = weight_words + words_for(outputs)
    # A layer of odd size is alone in the vector. Another layer is the first one of the model.
    all_words = end if inputs % 32 else words_for(WEIGHTS)

    def weights_of(vectors: Tensor) -> Tensor:
        padded_rows = vectors[..., : weight_words * 32].unflatten(-1, (outputs, words * 32))
        return padded_rows[..., :inputs]

    def biases_of(vectors: Tensor) -> Tensor:
        return vectors[..., weight_words * 32 :][..., :outputs]

    def run() -> None:
        weights = torch.empty(all_words * 32, dtype=weight_dtype)
        biases = torch.empty(all_words * 32, dtype=bias_dtype)
        mask_bits = torch.zeros(3, all_words, dtype=torch.int32)
        gradients = torch.empty(groups, all_words * 32, dtype=bias_dtype)
        x = torch.empty(groups, rows, inputs, dtype=dtype, requires_grad=True)
        y = masked_linear(
            x,
            weights_of(weights).requires_grad_(),
            None if no_bias else biases_of(biases).requires_grad_(),
            mask_bits[:, :weight_words].unflatten(1, (outputs, words)),
            None if no_bias else mask_bits[:, weight_words:end],
            torch.zeros(groups, dtype=torch.int64),
            relu=relu,
            group_gradients=(weights_of(gradients), None if no_bias else biases_of(gradients))
            if group_gradients
            else None,
        )
        y.backward(torch.empty_like(y))

    options = (("ReLU", relu), ("no bias", no_bias), ("per-group gradients", group_gradients))
    size = f"{groups} × {rows} rows, {inputs} to {outputs}"
    return Case(", ".join([size, *(name for name, on in options if on)]), run, precision)


def stationary_cases() -> Iterator[Case]:
    for drop in (0.0, 0.1):
        yield stationary_case("bf16, fp32 weights", drop)._replace(largest=True)
        yield stationary_case(BF16_COPY, drop)._replace(largest=True)


def stationary_case(precision: str, drop: float) -> Case:
    """Kernels with a stationary weight: many groups, so a program has several tiles of rows.

    These are the forward passes with a LayerNorm or a residual, and the input gradient of a layer
    with many inputs.
    """
    dtype, weight_dtype, bias_dtype = PRECISIONS[precision]
    groups, rows, d = 50, 600, 128

    def layer(inputs: int, outputs: int) -> tuple[Tensor, Tensor, LayerMasks]:
        weight, bias = torch.empty(outputs, inputs), torch.empty(outputs)
        bits = torch.zeros(3, outputs, words_for(inputs), dtype=torch.int32)
        ids = torch.zeros(groups, dtype=torch.int64)
        masks = LayerMasks(bits, torch.zeros(3, words_for(outputs), dtype=torch.int32), ids)
        return weight.to(weight_dtype), bias.to(bias_dtype), masks

    def run() -> None:
        weight, bias, masks = layer(4 * d, d)
        x = torch.empty(groups, rows, 4 * d, dtype=dtype, requires_grad=True)
        operands = x, weight, bias, *masks.bits
        ends = [linear_residual(*operands, torch.empty(groups, rows, d), drop)]
        if not drop:
            ends.append(masked_linear(*operands, relu=True))
        torch.autograd.backward(ends, [torch.empty_like(end) for end in ends])
        with torch.no_grad(), torch.autocast("cpu", dtype):
            weight, bias, masks = layer(d, 4 * d)
            x = torch.empty(groups, rows, d)
            bits = torch.zeros(3, words_for(d), dtype=torch.int32)
            norm_masks = LayerMasks(bits, bits, masks.task_ids)
            norm_linear(x, *torch.empty(2, d), weight, bias, norm_masks, masks, relu=True)
            weight, bias, masks = layer(d, d)
            operands = x.to(dtype), weight, bias, *masks.bits
            linear_residual(*operands, x, drop)

    use = f"{groups} × {rows} rows, d = {d}"
    return Case(f"{use}, dropout" if drop else use, run, precision)


def linear_residual_cases() -> Iterator[Case]:
    for precision in ("fp32", "bf16, fp32 weights", BF16_COPY):
        for groups in (1, 5):
            yield linear_residual_case(precision, 600, 512, 128, groups)
    for precision in ("bf16, fp32 weights", BF16_COPY):
        case = linear_residual_case(precision, 4800, 1024, 256)
        yield case._replace(largest=True)


def linear_residual_case(
    precision: str, rows: int, inputs: int, outputs: int, groups: int = 5
) -> Case:
    """Forward and backward pass with dropout and a float32 residual."""
    dtype, weight_dtype, bias_dtype = PRECISIONS[precision]

    def run() -> None:
        bits = torch.zeros(3, outputs, words_for(inputs), dtype=torch.int32)
        y = linear_residual(
            torch.empty(groups, rows, inputs, dtype=dtype, requires_grad=True),
            torch.empty(outputs, inputs, dtype=weight_dtype, requires_grad=True),
            torch.empty(outputs, dtype=bias_dtype, requires_grad=True),
            bits,
            torch.zeros(3, words_for(outputs), dtype=torch.int32),
            torch.zeros(groups, dtype=torch.int64),
            torch.empty(groups, rows, outputs),
            0.1,
        )
        y.backward(torch.empty_like(y))

    use = f"{groups} × {rows} rows, {inputs} to {outputs}, dropout, residual"
    return Case(use, run, precision)


def norm_linear_cases() -> Iterator[Case]:
    yield norm_linear_case("fp32", 600, 128, 384)
    yield norm_linear_case("bf16, fp32 weights", 600, 128, 384)
    yield norm_linear_case(BF16_COPY, 600, 128, 384)
    for precision in TRAINING:
        for outputs in (384, 512):
            yield norm_linear_case(precision, 600, 128, outputs, groups=1, backward=False)
    for precision in (*TRAINING, BF16_COPY):
        case = norm_linear_case(precision, 4800, 256, 1024, relu=True, backward=False)
        yield case._replace(largest=True)


def norm_linear_case(
    precision: str,
    rows: int,
    inputs: int,
    outputs: int,
    *,
    relu: bool = False,
    backward: bool = True,
    groups: int = 5,
) -> Case:
    """Forward pass, and backward pass if `backward`, under autocast; x is float32."""
    dtype, weight_dtype, bias_dtype = PRECISIONS[precision]

    def run() -> None:
        gain, shift = torch.empty(2, inputs, requires_grad=True)
        norm_bits = torch.zeros(3, words_for(inputs), dtype=torch.int32)
        ids = torch.zeros(groups, dtype=torch.int64)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y, x = norm_linear(
                torch.empty(groups, rows, inputs, requires_grad=True),
                *(gain, shift),
                torch.empty(outputs, inputs, dtype=weight_dtype, requires_grad=True),
                torch.empty(outputs, dtype=bias_dtype, requires_grad=True),
                LayerMasks(norm_bits, norm_bits, ids),
                LayerMasks(
                    torch.zeros(3, outputs, words_for(inputs), dtype=torch.int32),
                    torch.zeros(3, words_for(outputs), dtype=torch.int32),
                    ids,
                ),
                relu=relu,
            )
        if backward:
            torch.autograd.backward((y, x), (torch.empty_like(y), torch.empty_like(x)))

    use = f"{groups} × {rows} rows, LayerNorm, {inputs} to {outputs}"
    return Case(f"{use}, ReLU" if relu else use, run, precision)


def weight_gradients_cases() -> Iterator[Case]:
    # Few cases, because each takes seconds. With dropout, because it needs the most registers.
    for precision in TRAINING:
        yield weight_gradients_case(precision, 512, 1, drop=0.1)._replace(largest=True)
    for groups in (1, 50):
        case = weight_gradients_case(TRAINING[-1], 128, groups, drop=0.1)
        yield case._replace(largest=groups == 50)


def weight_gradients_case(precision: str, d: int, groups: int, *, drop: float) -> Case:
    """All layers of a block, with masks and gradients in flat vectors, as in the model."""
    dtype, _, gradient_dtype = PRECISIONS[precision]

    def layer(
        inputs: int, outputs: int, normalised: bool, relu: bool, drop: float
    ) -> LayerGradients:
        size = outputs * (inputs + 1)
        bits = torch.zeros(3, WEIGHTS // 32, dtype=torch.int32)[:, : size // 32]
        gradients = torch.empty(1, WEIGHTS, dtype=gradient_dtype)[:, :size]
        dy = torch.empty(groups, 600, outputs, dtype=dtype)
        return LayerGradients(
            dy=dy,
            y=dy if relu else None,
            x=torch.empty(groups, 600, inputs, dtype=torch.float32 if normalised else dtype),
            weight_bits=bits[:, : -outputs // 32].unflatten(1, (outputs, inputs // 32)),
            bias_bits=bits[:, -outputs // 32 :],
            task_ids=torch.zeros(groups, dtype=torch.int64),
            weight_out=gradients[:, :-outputs].unflatten(1, (outputs, inputs)),
            bias_out=gradients[:, -outputs:],
            drop=drop,
            seed=torch.zeros(1, dtype=torch.int64) if drop else None,
            statistics=torch.empty(groups, 600, 2) if normalised else None,
            affine=torch.empty(groups, 2, inputs) if normalised else None,
        )

    def run() -> None:
        qkv, out = (d, 3 * d, True, False, 0.0), (d, d, False, False, drop)
        up, down = (d, 4 * d, True, True, 0.0), (4 * d, d, False, False, drop)
        write([layer(*size) for size in (down, up, out, qkv)])

    return Case(f"a block of {d}, {groups} × 600 rows, dropout", run, precision)


def masked_layer_norm_cases() -> Iterator[Case]:
    for precision in ("fp32", "bf16, fp32 weights"):
        yield masked_layer_norm_case(precision, 600, 256)._replace(largest=True)
    yield masked_layer_norm_case("fp32", 75, 39)


def masked_layer_norm_case(precision: str, rows: int, size: int) -> Case:
    """Forward and backward pass of a layer whose parameters are in flat vectors; x is float32."""
    dtype, *_ = PRECISIONS[precision]

    def run() -> None:
        gain, bias = torch.empty(2, 32 * words_for(size))[:, :size]
        bits = torch.zeros(3, 2 * words_for(size), dtype=torch.int32).chunk(2, 1)
        x = torch.empty(5, rows, size, requires_grad=True)
        ids = torch.zeros(5, dtype=torch.int64)
        # Once with a residual's gradient, once without it but with per-group gradients.
        for outputs, out in ((2, None), (1, tuple(torch.empty(2, 5, size)))):
            results = masked_layer_norm(x, gain, bias, *bits, ids, dtype=dtype, group_gradients=out)
            results = results[:outputs]
            torch.autograd.backward(results, [torch.empty_like(t) for t in results])

    return Case(f"5 × {rows} rows of {size}", run, precision)


def attention_cases() -> Iterator[Case]:
    yield attention_case("bf16, fp32 weights", 75, 16)
    yield attention_case("bf16, fp32 weights", 75, 32)
    yield attention_case("tf32", 75, 16)
    yield attention_case("fp32", 75, 64)
    for precision in TRAINING:
        yield attention_case(precision, 300, 128)._replace(largest=True)


def attention_case(precision: str, tokens: int, size: int) -> Case:
    """Forward and backward pass with dropout, and a policy's call with past tokens."""
    dtype, *_ = PRECISIONS[precision]

    def run() -> None:
        qkv = torch.empty(8, tokens, 3, 2, size, dtype=dtype, requires_grad=True)
        out = attention(qkv, slice(1, None, 3), 0.1)
        out.backward(torch.empty_like(out))
        past = torch.empty(2, 8, 2, 15, size, dtype=dtype)
        with torch.no_grad():
            attention(qkv, slice(-1, None), 0.0, tuple(past))

    return Case(f"8 × {tokens} tokens, heads of {size}", run, precision)


def dropout_add_cases() -> Iterator[Case]:
    for precision in ("fp32", "bf16, fp32 weights"):
        yield dropout_add_case(precision, 384_000)._replace(largest=True)
    yield dropout_add_case("fp32", 39)


def dropout_add_case(precision: str, size: int) -> Case:
    """A branch in the precision's dtype, added to a float32 residual."""
    dtype, *_ = PRECISIONS[precision]

    def run() -> None:
        out = dropout_add(
            torch.empty(size), torch.empty(size, dtype=dtype, requires_grad=True), 0.1
        )
        out.backward(torch.empty_like(out))

    return Case(f"{size:,} elements", run, precision)


def token_embedding_cases() -> Iterator[Case]:
    yield token_embedding_case((5, 64, 20), 39, 256)._replace(largest=True)
    yield token_embedding_case((1, 8, 5), 39, 128)
    yield token_embedding_case((1, 1, 7), 376, 39)


def token_embedding_case(steps: tuple[int, int, int], observations: int, size: int) -> Case:
    """Forward and backward pass with parameters in flat vectors, written in place."""

    def run() -> None:
        widths = (1, observations, 4)
        shapes = [shape for width in widths for shape in ((size, width), (size,))]
        parameters = [torch.empty(shape, requires_grad=True) for shape in [*shapes, (1000, size)]]
        tokens = token_embedding(
            [torch.empty(*steps, width) for width in widths],
            torch.zeros(steps, dtype=torch.int64),
            parameters,
            [torch.empty_like(parameter)[None] for parameter in parameters],
        )
        tokens.backward(torch.empty_like(tokens))

    return Case(f"{steps[0]} × {steps[1] * steps[2]} steps, {observations} to {size}", run)


def harmony_selection_cases() -> Iterator[Case]:
    # The model's 1.2 million weights with the paper's largest count, then other chunks and sizes.
    for importance, rule in itertools.product(("fisher", "magnitude"), ("paper", "upstream-score")):
        case = harmony_selection_case(5, WEIGHTS, 100, importance, rule)
        yield case._replace(largest=(importance, rule) == ("fisher", "paper"))
    for tasks, size, count in ((50, WEIGHTS, 1), (5, WEIGHTS, 10_000), (1, 96, 1), (3, 96, 9)):
        yield harmony_selection_case(tasks, size, count, "fisher", "paper")


def harmony_selection_case(tasks: int, size: int, count: int, importance: str, rule: str) -> Case:
    def run() -> None:
        mask_bits = torch.zeros(tasks, words_for(size), dtype=torch.int32)
        gradients = torch.empty(tasks, size)
        leaving, entering, *_ = torch.ops.harmodt.select_harmony(
            mask_bits,
            mask_bits[0],
            gradients[0],
            gradients,
            gradients,
            gradients[0],
            gradients[:, 0],
            count,
            10.0,
            importance,
            rule,
        )
        torch.ops.harmodt.move_weights(mask_bits, leaving, entering)

    return Case(f"{tasks} × {size:,} weights, {count:,} moved, {importance}, {rule}", run)


def masked_adamw_cases() -> Iterator[Case]:
    for size in (1_300_000, 39, 1):
        yield masked_adamw_case(size)._replace(largest=size > 39)
    yield masked_adamw_case(1_300_000, copied=WEIGHTS)._replace(largest=True)


def masked_adamw_case(size: int, copied: int = 0) -> Case:
    """A step; the first `copied` weights have a bf16 copy."""

    def run() -> None:
        masked_adamw(
            *torch.zeros(4, size),
            torch.zeros(50, words_for(size), dtype=torch.int32),
            torch.zeros(5, dtype=torch.int64),
            torch.zeros(3),
            betas=(0.9, 0.999),
            epsilon=1e-8,
            weight_decay=1e-4,
            max_norm=0.25,
            bf16_copy=torch.zeros(copied, dtype=torch.bfloat16) if copied else None,
        )

    return Case(f"{size:,} weights{', bf16 copy' if copied else ''}", run)


CASES = {
    "masked_linear": masked_linear_cases,
    "stationary": stationary_cases,
    "linear_residual": linear_residual_cases,
    "norm_linear": norm_linear_cases,
    "weight_gradients": weight_gradients_cases,
    "masked_layer_norm": masked_layer_norm_cases,
    "attention": attention_cases,
    "dropout_add": dropout_add_cases,
    "token_embedding": token_embedding_cases,
    "harmony_selection": harmony_selection_cases,
    "masked_adamw": masked_adamw_cases,
}


class TargetDriver:
    """The part of a GPU's driver that Triton calls before it compiles."""

    def __init__(self, target: str):
        self._target = target

    def get_current_device(self) -> int:
        return list(TARGETS).index(self._target)  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._target]


def compile_operation(operation: str, target: str, everything: bool) -> Compilation:
    """Compile the cases of an operation that belong to a target."""
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(TargetDriver(target))
    registration.interpreted = lambda: True  # sends CPU tensors to Triton's launchers
    result, seen = Compilation(), set()
    case: Case

    def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        compiled = kernel.warmup(grid=grid, **arguments)
        if (compiled.hash, case.precision) not in seen:
            seen.add((compiled.hash, case.precision))
            constants = {k: v for k, v in arguments.items() if k.isupper() or k in OPTIONS}
            result.compiled.append(describe(compiled, case, target, constants))

    for module in pkgutil.walk_packages(harmodt_kernels.__path__, "harmodt_kernels."):
        if module.name.endswith(".triton"):
            names = vars(importlib.import_module(module.name))
            names["launch"] = launch
            result.kernels += [
                name
                for name, value in names.items()
                if name.endswith("_kernel") and isinstance(value, triton.JITFunction)
            ]
    for case in CASES[operation]():
        if not case.belongs(target, everything):
            continue
        name: Precision = case.precision if case.precision in ("tf32", "tf32x3") else "fp32"
        try:
            with PYTORCH.precision(name, "cuda"):
                case.run()
        except Exception:  # reported with its traceback; the other cases still run
            where = {"use": case.use, "precision": case.precision, "target": target}
            result.failures.append({**where, "error": traceback.format_exc()})
    return result


def describe(compiled: Any, case: Case, target: str, constants: dict[str, Any]) -> Compiled:
    nvidia = TARGETS[target].backend == "cuda"
    code = compiled.asm["ptx" if nvidia else "amdgcn"]
    registers, spills = (
        resources_of_cubin(compiled.asm["cubin"]) if nvidia else resources_of_amdgcn(code)
    )
    return Compiled(
        kernel=compiled.name,
        use=case.use,
        precision=case.precision,
        options=", ".join(f"{name}={value}" for name, value in constants.items()),
        target=target,
        dot=" tt.dot " in compiled.asm["ttir"],
        registers=registers,
        shared=compiled.metadata.shared,
        spills=spills,
        instructions={
            name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()
        },
        loop=instructions_per_product(code) if nvidia else None,
    )


def instructions_per_product(ptx: str) -> float | None:
    """Instructions per matrix product in the smallest loop that has a product."""
    lines = [line.strip() for line in ptx.splitlines()]
    starts = ((i, re.match(r"(\$L__BB\w+):", line)) for i, line in enumerate(lines))
    labels = {label[1]: i for i, label in starts if label}
    found = []
    for end, line in enumerate(lines):
        target = re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", line)
        if target and labels.get(target[1], end) < end:
            body = [text for text in lines[labels[target[1]] : end + 1] if text.endswith(";")]
            products = sum(bool(re.search(INSTRUCTIONS["matrix"], text)) for text in body)
            if products:
                found.append((len(body), len(body) / products))
    return min(found)[1] if found else None


def resources_of_cubin(cubin: bytes) -> tuple[int, list[int]]:
    """The registers and spills of NVIDIA's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", report)[1]) for name in ("REG", "STACK"))
    return registers, [stack]


def resources_of_amdgcn(code: str) -> tuple[int, list[int]]:
    """The registers and spills in the metadata of AMD's assembly."""
    registers, *spills = (
        int(re.search(rf"\.{name}:\s+(\d+)", code)[1])
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    )
    return registers, spills


def compile_for_all(targets: Sequence[str], everything: bool) -> Compilation:
    """Compile every operation for some targets, without Triton's usual cache."""
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        # New processes, because Triton reads TRITON_INTERPRET when it is imported.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(PROCESSES, spawn) as pool:
            jobs = [(case, target, everything) for case in CASES for target in targets]
            results = list(pool.map(compile_operation, *zip(*jobs, strict=True)))
    return Compilation(
        results[0].kernels,
        [compiled for result in results for compiled in result.compiled],
        [failure for result in results for failure in result.failures],
    )


def markdown(compilation: Compilation) -> str:
    lines = [
        "# Kernels, compiled for each target",
        "",
        f"Compiled by Triton {triton.__version__} with PyTorch {torch.__version__}. Registers are "
        "per thread, shared memory is in bytes per block. Spills are bytes of stack per thread on "
        "NVIDIA, and vector + scalar registers on AMD. The next columns count instructions in the "
        "code: matrix products, float32 multiply-adds, asynchronous copies, and loads of 16 bytes "
        "or more. The last column has the PTX instructions per matrix product in its loop.",
    ]
    for kernel in compilation.kernels:
        lines += ["", f"## {kernel}", ""]
        header = (
            "first use|precision|options|target|registers|shared|spills|matrix|FMA|async|wide|loop"
        )
        lines += [f"| {header.replace('|', ' | ')} |", "|---" * 4 + "|--:" * 8 + "|"]
        for row in compilation.compiled:
            if row.kernel == kernel:
                cells = [row.use, row.precision, row.options, row.target, row.registers, row.shared]
                cells += [" + ".join(map(str, row.spills)), *row.instructions.values()]
                cells.append("" if row.loop is None else round(row.loop))
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the Markdown file to write")
    parser.add_argument(
        "--all", action="store_true", help=f"compile every case not only for {USUAL}"
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=[*TARGETS])
    arguments = parser.parse_args()
    output = arguments.output
    compilation = compile_for_all(arguments.targets, arguments.all)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(markdown(compilation), encoding="utf-8")
    output.with_suffix(".json").write_text(json.dumps(asdict(compilation)), encoding="utf-8")
    for failure in compilation.failures:
        print(*failure.values(), sep="\n", file=sys.stderr)
    return 1 if compilation.failures else 0


if __name__ == "__main__":
    sys.exit(main())
