"""Compares the CPU kernels with the definitions on random odd shapes, on every instruction set.

A round draws operands for each operation: sizes around the kernels' blocks, views whose gaps hold
NaN, masks or none, float32 or bfloat16, a number of threads. Each instruction set of this machine
computes outputs and gradients from them. `REFERENCE` computes the same in float64.

The sanitizers see what no comparison sees, such as a read beyond an operand's end:

    cmake -B build/sanitize -DHARMODT_SANITIZE=ON && cmake --build build/sanitize
    LD_PRELOAD=$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \\
        python tests/odd_shapes.py 100 --library build/sanitize/libharmodt.so

A round's number is its seed: `python tests/odd_shapes.py 1 --first 37` repeats round 37.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Threads that wait must not keep processors from others. PyTorch reads this at its import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

from harmodt_kernels import (
    REFERENCE,
    Backend,
    LayerMasks,
    fused_backend,
    lr_and_corrections_at,
    pack_bits,
    words_for,
)
from harmodt_kernels.native import library

ISAS = ("amx", "avx512bf16", "avx512", "avx2", "portable")

Results = dict[str, Tensor | None]
Compute = Callable[[Backend, Callable[[Tensor], Tensor]], Results]
"""Computes outputs and gradients with a backend. It passes each operand through the function given
to it, which converts the floating-point ones for the definition."""


class Draw(random.Random):
    """Draws shapes and operands."""

    def size(self, most: int = 140) -> int:
        """A size, often one around which the kernels' blocks and mask words end."""
        usual = (1, 2, 3, 15, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129)
        fitting = [size for size in usual if size <= most]
        return self.choice(fitting) if self.random() < 0.7 else self.randint(1, most)

    def rows(self) -> int:
        """A number of rows; seldom none, or more than are summed at a time."""
        few = self.random() < 0.9
        return self.choice((0, 1, self.size(), self.size())) if few else self.randint(300, 700)

    def chance(self) -> bool:
        return self.random() < 0.5

    def whole(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Small whole numbers: their products and sums are exact in float32 and in bfloat16."""
        return torch.randint(-3, 4, shape).to(dtype)

    def mask(self, *shape: int) -> Tensor:
        """A mask of each task, bool; often with tasks in which no weight or every weight is on."""
        density = torch.tensor([self.choice((0.0, 0.3, 0.8, 1.0)) for _ in range(shape[0])])
        return torch.rand(shape) < density.view(-1, *[1] * (len(shape) - 1))

    def spread(self, values: Tensor, *, last: bool = False) -> Tensor:
        """The same values, perhaps as a view with gaps in memory, at an odd offset.

        Args:
            last: whether the last dimension may have gaps too, or may be the slowest in memory.
        """
        if values.dim() == 0 or self.random() < 0.3:
            return values
        if last and values.dim() > 1 and self.chance():
            return values.transpose(-1, -2).contiguous().transpose(-1, -2)
        step = 2 if last and self.chance() else 1
        before, after = self.randint(0, 3), self.randint(0, 3)
        longer = values.new_empty(*values.shape[:-1], before + step * values.shape[-1] + after)
        longer.fill_(math.nan if values.is_floating_point() else -1)
        view = longer[..., before : before + step * values.shape[-1] : step]
        return view.copy_(values)

    def dropout(self, exact: bool = True) -> tuple[float, Tensor | None]:
        """A probability and a seed. If `exact`, kept elements are multiplied by 1 or 2."""
        drop = self.choice((0.0, 0.5) if exact else (0.0, 0.1, 0.9))
        seed = torch.tensor(self.choice((0, 1, 2**31 - 1, self.randrange(2**31))))
        return drop, seed.view(1) if self.chance() else seed

    def buffers(self, groups: int, *shapes: Sequence[int] | None) -> list[tuple[int, ...] | None]:
        """The shapes of buffers for gradients: of each group, or of their sum; or []."""
        count = self.choice((0, 1, groups))
        return [None if s is None else (count, *s) for s in shapes] if count else []


def leaves(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def gradients(outputs: Sequence[Tensor], dys: Sequence[Tensor], **of: Tensor | None) -> Results:
    """The gradients of the named leaves, after a backward pass."""
    torch.autograd.backward(outputs, [dy.to(y.dtype) for y, dy in zip(outputs, dys, strict=True)])
    return {f"d_{name}": None if leaf is None else leaf.grad for name, leaf in of.items()}


def empty_buffers(shapes: Sequence[Sequence[int] | None], like: Tensor) -> tuple[Any, ...] | None:
    """Buffers that hold NaN, with gaps between rows. Their dtype is float32, or that of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)

    def buffer(shape: Sequence[int]) -> Tensor:
        return torch.full((*shape[:-1], shape[-1] + 3), math.nan, dtype=dtype)[..., : shape[-1]]

    return tuple(None if shape is None else buffer(shape) for shape in shapes) or None


class Layer:
    """Operands of a masked linear layer, whose results are exact."""

    def __init__(self, draw: Draw, dtype: torch.dtype, inputs: int | None = None):
        self.groups, self.rows = draw.randint(1, 4), draw.rows()
        self.inputs, self.outputs = inputs or draw.size(), draw.size()
        self.relu, has_bias, has_masks = draw.chance(), draw.chance(), draw.random() < 0.8
        weight_dtype = draw.choice((torch.float32, dtype))
        weight = draw.whole(self.outputs, self.inputs)
        bias = draw.whole(self.outputs)
        tasks = draw.randint(1, 4)
        self.task_ids = torch.randint(tasks, (self.groups,))
        self.masks: list[Tensor | None] = [None, None, None]
        if has_masks:
            weight_mask = draw.mask(tasks, self.outputs, self.inputs)
            bias_mask = draw.mask(tasks, self.outputs)
            # A weight that no task uses may have any value.
            weight = torch.where(weight_mask.any(0), weight, math.nan)
            bias = torch.where(bias_mask.any(0), bias, math.nan)
            bits = draw.spread(pack_bits(weight_mask)), draw.spread(pack_bits(bias_mask))
            self.masks = [bits[0], bits[1] if has_bias else None, self.task_ids]
        self.x = draw.spread(
            draw.whole(self.groups, self.rows, self.inputs, dtype=dtype), last=True
        )
        self.weight = draw.spread(weight.to(weight_dtype))
        self.bias = draw.spread(bias.to(weight_dtype)) if has_bias else None
        shape = self.groups, self.rows, self.outputs
        self.dy = draw.spread(draw.whole(*shape, dtype=dtype), last=True)
        self.buffers = draw.buffers(
            self.groups, (self.outputs, self.inputs), (self.outputs,) if has_bias else None
        )


def masked_linear(draw: Draw, dtype: torch.dtype) -> Compute:
    layer = Layer(draw, dtype)

    def compute(backend: Backend, of: Callable[[Tensor], Tensor]) -> Results:
        operands = [None if t is None else of(t) for t in (layer.x, layer.weight, layer.bias)]
        x, weight, bias = leaves(operands)
        assert x is not None and weight is not None
        out = empty_buffers(layer.buffers, x)
        y = backend.masked_linear(
            x, weight, bias, *layer.masks, relu=layer.relu, group_gradients=out
        )
        results = gradients([y], [of(layer.dy)], x=x, weight=weight, bias=bias)
        return {"y": y, **results, **written(out)}

    return compute


def written(buffers: tuple[Any, ...] | None) -> Results:
    return {f"group_gradients[{i}]": buffer for i, buffer in enumerate(buffers or ())}


def linear_residual(draw: Draw, dtype: torch.dtype) -> Compute:
    layer, (drop, seed) = Layer(draw, dtype), draw.dropout()
    shape = layer.groups, layer.rows, layer.outputs
    given = draw.spread(draw.whole(*shape, dtype=draw.choice((dtype, torch.float32))), last=True)

    def compute(backend: Backend, of: Callable[[Tensor], Tensor]) -> Results:
        operands = [
            None if t is None else of(t) for t in (layer.x, layer.weight, layer.bias, given)
        ]
        x, weight, bias, residual = leaves(operands)
        assert x is not None and weight is not None
        out = empty_buffers(layer.buffers, x)
        y = backend.linear_residual(
            x, weight, bias, *layer.masks, residual, drop, seed=seed, group_gradients=out
        )
        results = gradients([y], [of(layer.dy)], x=x, weight=weight, bias=bias, residual=residual)
        return {"y": y, **results, **written(out)}

    return compute


def masked_layer_norm(draw: Draw, dtype: torch.dtype) -> Compute:
    groups, rows, size, tasks = draw.randint(1, 4), draw.rows(), draw.size(), draw.randint(1, 4)
    has_masks, shape = draw.random() < 0.8, (groups, rows, size)
    bits = [draw.spread(pack_bits(draw.mask(tasks, size))) for _ in range(2)]
    masks = [*bits, torch.randint(tasks, (groups,))] if has_masks else [None] * 3
    operands = [
        draw.spread(spread_rows(*shape), last=True),
        *(draw.spread(torch.randn(size)) for _ in range(2)),
    ]
    dys = [draw.spread(torch.randn(shape), last=True) for _ in range(2)]
    shapes = draw.buffers(groups, (size,), (size,))

    def compute(backend: Backend, of: Callable[[Tensor], Tensor]) -> Results:
        x, weight, bias = leaves([of(t) for t in operands])
        assert x is not None
        out = empty_buffers(shapes, x)
        outputs = backend.masked_layer_norm(x, weight, bias, *masks, group_gradients=out)
        results = gradients(outputs, [of(dy) for dy in dys], x=x, weight=weight, bias=bias)
        return {"y": outputs[0], **results, **written(out)}

    return compute


def spread_rows(*shape: int) -> Tensor:
    """Rows for a LayerNorm, [..., size]. No elements of a row are nearly equal: such rows lose
    digits in any arithmetic."""
    return torch.randn(shape).clamp(-2, 2) + 1 + 6 * (torch.arange(shape[-1]) % 2)


def norm_linear(draw: Draw, dtype: torch.dtype) -> Compute:
    layer = Layer(draw, torch.float32)
    size, tasks = layer.inputs, 4
    norm_bits = [draw.spread(pack_bits(draw.mask(tasks, size))) for _ in range(2)]
    has_masks = layer.masks[0] is not None
    operands = [
        draw.spread(spread_rows(layer.groups, layer.rows, size), last=True),
        *(draw.spread(torch.randn(size)) for _ in range(2)),
        layer.weight,
    ]
    d_residual = draw.spread(torch.randn(operands[0].shape), last=True)
    norm_shapes = draw.buffers(layer.groups, (size,), (size,))
    norm_masks = LayerMasks(*(norm_bits if has_masks else (None, None)), layer.masks[2])
    masks = LayerMasks(*layer.masks)
    exact = [None if t is None else as_double(t) for t in (*operands, layer.bias)]
    # Other arithmetic could give an output next to 0 the other sign, and so another ReLU.
    near_0 = REFERENCE.norm_linear(*exact, norm_masks, masks)[0].abs() < 0.5

    def compute(backend: Backend, of: Callable[[Tensor], Tensor]) -> Results:
        x, gain, shift, weight, bias = leaves(
            [*(of(t) for t in operands), None if layer.bias is None else of(layer.bias)]
        )
        assert x is not None
        norm_out, out = empty_buffers(norm_shapes, x), empty_buffers(layer.buffers, x)
        y, residual = backend.norm_linear(
            x, gain, shift, weight, bias,
            dataclasses.replace(norm_masks, group_gradients=norm_out),
            dataclasses.replace(masks, group_gradients=out),
            relu=layer.relu,
        )  # fmt: skip
        dy = torch.where(near_0, 0.0, of(layer.dy))
        results = gradients(
            [y, residual],
            [dy, of(d_residual)],
            x=x,
            gain=gain,
            shift=shift,
            weight=weight,
            bias=bias,
        )
        norm_results = {f"norm's {name}": value for name, value in written(norm_out).items()}
        return {"y": y, **results, **written(out), **norm_results}

    return compute


def attention(draw: Draw, dtype: torch.dtype) -> Compute:
    sequences, tokens = draw.choice((0, 1, 2, 3)), draw.size(100)
    heads, size = draw.randint(1, 3), draw.size(70)
    start, step, stop = draw.randrange(tokens), draw.randint(1, 4), draw.choice((None, -1, tokens))
    queries = slice(start, stop, step)
    drop, seed = draw.dropout(exact=False)
    spread = draw.choice((1.0, 5.0))  # with the second, some weights are too small for float32
    values = draw.spread(spread * torch.randn(sequences, tokens, 3, heads, size), last=True)
    before = draw.choice((0, 1, draw.size(70)))
    past = [draw.spread(torch.randn(sequences, heads, before, size), last=True) for _ in range(2)]
    has_past = draw.random() < 0.3
    wanted = len(range(*queries.indices(tokens)))
    dy = draw.spread(torch.randn(sequences, wanted, heads, size), last=True)

    def compute(backend: Backend, of: Callable[[Tensor], Tensor]) -> Results:
        if has_past:
            with torch.no_grad():
                cache = of(past[0]), of(past[1])
                return {"out": backend.attention(of(values), queries, drop, cache, seed)}
        (qkv,) = leaves([of(values)])
        out = backend.attention(qkv, queries, drop, seed=seed)
        return {"out": out, **gradients([out], [of(dy)], qkv=qkv)}

    return compute


def dropout_add(draw: Draw, dtype: torch.dtype) -> Compute:
    shape = [draw.choice((0, 1, draw.size(40), draw.size(40))) for _ in range(draw.randint(0, 3))]
    drop, seed = draw.dropout(exact=False)
    given = [draw.spread(torch.randn(shape), last=True) for _ in range(3)]
    has_x = draw.chance()

    def compute(backend: Backend, of: Callable[[Tensor], Tensor]) -> Results:
        x, branch = leaves([of(given[0]) if has_x else None, of(given[1])])
        out = backend.dropout_add(x, branch, drop, seed)
        return {"out": out, **gradients([out], [of(given[2])], x=x, branch=branch)}

    return compute


def token_embedding(draw: Draw, dtype: torch.dtype) -> Compute:
    steps = [draw.choice((0, 1, 2, draw.size(40))) for _ in range(draw.randint(1, 2))]
    size, rows = draw.size(), draw.size(40)
    if draw.random() < 0.1:
        steps = [draw.randint(257, 600)]  # more than are summed at a time
    widths = [draw.size(50) for _ in range(3)]
    inputs = [draw.spread(draw.whole(*steps, width), last=True) for width in widths]
    timesteps = draw.spread(torch.randint(rows, steps), last=True)
    shapes: list[tuple[int, ...]] = [s for width in widths for s in ((size, width), (size,))]
    shapes.append((rows, size))
    parameters = [draw.whole(*shape) for shape in shapes]
    dy = draw.spread(draw.whole(*steps, 3, size), last=True)
    in_buffers = draw.chance()

    def compute(backend: Backend, of: Callable[[Tensor], Tensor]) -> Results:
        xs, weights = leaves([of(x) for x in inputs]), leaves([of(p) for p in parameters])
        out = None
        if in_buffers:
            out = [torch.full_like(w, math.nan)[None] for w in weights if w is not None]
        tokens = backend.token_embedding(xs, timesteps, weights, out)
        named = {f"inputs[{i}]": x for i, x in enumerate(xs)}
        named |= {f"parameters[{i}]": weight for i, weight in enumerate(weights)}
        results = gradients([tokens], [of(dy)], **named)
        return {"tokens": tokens, **results, **written(None if out is None else tuple(out))}

    return compute


def select_harmony(draw: Draw, dtype: torch.dtype) -> Compute:
    """Selects and moves. In float32 both compute the same scores, so that ties are the same."""
    tasks, words = draw.randint(1, 4), draw.choice((1, 2, 3, 33, 70, 300))
    size, rule = 32 * words, draw.choice(("paper", "upstream-score"))
    importance, balance = draw.choice(("fisher", "magnitude")), draw.choice((0.0, 1.0, 10.0))
    count = draw.choice((0, 1, draw.size(), size, 2 * size))
    maskable = draw.spread(pack_bits(torch.rand(size) < draw.choice((0.5, 0.97, 1.0))))
    bits = draw.spread(pack_bits(draw.mask(tasks, size)) & maskable)
    dense, masked = (torch.randn(tasks, size).round(decimals=1) for _ in range(2))
    mean, weights = (torch.randn(size).round(decimals=1) for _ in range(2))
    losses = torch.rand(tasks) + 0.1
    if draw.random() < 0.2:
        draw.choice((dense, masked, mean, losses)).view(-1)[0] = draw.choice((math.nan, math.inf))
    operands = weights, draw.spread(masked), draw.spread(dense), mean, losses

    def compute(backend: Backend, of: Callable[[Tensor], Tensor]) -> Results:
        selection = backend.select_harmony(
            bits,
            maskable,
            *operands,
            count=count,
            balance=balance,
            importance=importance,
            rule=rule,
        )
        if selection.refused.any():
            return {"refused": selection.refused}
        moved = draw_view(bits)
        backend.move_weights(moved, selection)
        results = selection._asdict()
        for side in ("leaving", "entering"):
            results[side] = results[side].sort(1).values
        return {**results, "bits": moved}

    return compute


def draw_view(values: Tensor) -> Tensor:
    """A copy of a matrix with gaps between its rows."""
    longer = torch.full((values.shape[0], values.shape[1] + 3), -1, dtype=values.dtype)
    return longer[:, 1:-2].copy_(values)


def masked_adamw(draw: Draw, dtype: torch.dtype) -> Compute:
    size, tasks = draw.choice((0, 1, draw.size(), draw.size(3000))), draw.randint(1, 4)
    words = draw.randint(0, words_for(size))
    bits = draw.spread(pack_bits(draw.mask(tasks, 32 * words)))
    ids = torch.randint(tasks, (draw.randint(0, 4),))
    masks = (bits, ids) if draw.random() < 0.8 else (None, None)
    vectors = torch.randn(4, size)
    vectors[3] = vectors[3].abs()
    rates = torch.tensor(lr_and_corrections_at(draw.randint(1, 9), 0.01, (0.9, 0.999)))
    copied = draw.randint(0, size) if draw.chance() else None
    max_norm = draw.choice((math.inf, 1.0, 1e-3))

    def compute(backend: Backend, of: Callable[[Tensor], Tensor]) -> Results:
        changed = vectors.clone()
        copy = None if copied is None else torch.full((copied,), math.nan, dtype=torch.bfloat16)
        norm = backend.masked_adamw(
            *changed, *masks, rates,
            betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.1, max_norm=max_norm, bf16_copy=copy,
        )  # fmt: skip
        return {"norm": norm, "weights and moments": changed, "bf16_copy": copy}

    return compute


# The operations; the error that their results may have; and whether they take bfloat16 tensors.
OPERATIONS: tuple[tuple[Callable[[Draw, torch.dtype], Compute], float, bool], ...] = (
    (masked_linear, 0.0, True),
    (linear_residual, 0.0, True),
    (masked_layer_norm, 2e-5, False),
    (norm_linear, 2e-5, False),
    (attention, 2e-4, False),
    (dropout_add, 2e-5, False),
    (token_embedding, 0.0, False),
    (select_harmony, 0.0, False),
    (masked_adamw, 2e-5, False),
)


def as_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def check(computed: Results, expected: Results, tolerance: float) -> None:
    """Compare results. The tolerance is relative to each result's largest element."""
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        if value is None or (found := computed[name]) is None:
            assert value is computed[name], f"{name}: one result is missing"
            continue
        largest = float(value.detach().abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(
            found.detach(),
            value.detach().to(found.dtype),
            rtol=0,
            atol=tolerance * max(1.0, largest),
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def instruction_sets() -> Iterator[str]:
    """Hold the kernels to each instruction set of this machine in turn, the fastest last."""
    for isa in reversed(ISAS):
        if library.library().harmodt_use_isa(isa.encode()):
            yield isa


def run_round(number: int) -> None:
    """Draw operands from a seed, and compare every operation on every instruction set."""
    draw = Draw(number)
    torch.manual_seed(number)
    for operation, error, takes_bf16 in OPERATIONS:
        dtype = draw.choice((torch.float32, torch.bfloat16)) if takes_bf16 else torch.float32
        precision = draw.choice(("fp32", "bf16"))
        compute, threads = operation(draw, dtype), draw.choice((1, 2, 3, 5))
        expected = compute(REFERENCE, as_double)
        rounds = precision == "bf16" and operation is norm_linear
        tolerance = 3e-2 if rounds else error
        torch.set_num_threads(threads)
        for isa in instruction_sets():
            fused = fused_backend("cpu")
            try:
                with fused.precision(precision, "cpu"):
                    check(compute(fused, lambda tensor: tensor), expected, tolerance)
            except Exception:
                print(
                    f"{operation.__name__} in {dtype}, products in {precision}, on {isa}, "
                    f"{threads} threads",
                    file=sys.stderr,
                )
                raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rounds", type=int, help="how many rounds")
    parser.add_argument("--first", type=int, default=0, help="the number of the first round")
    parser.add_argument("--library", type=Path, help="a library with the sanitizers")
    arguments = parser.parse_args()
    if arguments.library is not None:
        library.PATH = arguments.library.resolve()
    before = time.monotonic()
    for number in range(arguments.first, arguments.first + arguments.rounds):
        print(f"round {number}", flush=True)  # a sanitizer ends the process in a round
        run_round(number)
    isas = ", ".join(instruction_sets())
    print(f"{arguments.rounds} rounds on {isas} in {time.monotonic() - before:.0f} s")


if __name__ == "__main__":
    main()
