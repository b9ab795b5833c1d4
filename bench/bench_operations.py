"""Times attention, LayerNorm, dropout and embedding by themselves, beside PyTorch's operations.

    pytest bench/bench_operations.py --benchmark-only

The calls of a table are made in turn. On a GPU, events time them, with cold caches and without the
host's launches. The sizes are those of the paper's models: 8 windows of 75 tokens for each task.

The attention of PyTorch is `F.scaled_dot_product_attention`. On a GPU each of its implementations
has a row: flash, efficient, cuDNN. A warning names those that PyTorch does not have for this GPU.
It gets query, key and value as views of one tensor, as the layer qkv makes them. On a CPU with
matrix units, the row "the same, oneDNN" rounds the operands of products to bf16.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_masked_linear import Problem
from measuring import (
    DEVICE,
    ON_GPU,
    assert_agree,
    fused,
    inside,
    measure_in_turn,
    onednn,
    onednn_is_exact,
    timer,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from harmodt_kernels import PYTORCH, REFERENCE
from harmodt_kernels.attention import pytorch as attention_pytorch

PASSES = ["forward + backward", "forward"]
TOLERANCE = {"float32": 1e-4 if ON_GPU else 1e-5, "bfloat16": 2e-2}  # of the norm
TASKS = [1, 5, 50] if ON_GPU else [5]
WINDOWS, TOKENS, STEPS, ROWS = 8, 75, 25, 600  # ROWS = WINDOWS * TOKENS
INPUTS = (1, 39, 4)  # components of a return-to-go, an observation and an action
DROP = 0.1

# dtype, probability of dropout, tasks, head size
if ON_GPU:
    CASES = [("bfloat16", DROP, tasks, 16) for tasks in (5, 1, 50)]
    CASES += [("float32", DROP, 5, 16), ("bfloat16", 0.0, 5, 16), ("bfloat16", DROP, 5, 32)]
else:
    CASES = [("float32", 0.0, 5, 16), ("float32", 0.0, 5, 32)]

# PyTorch's implementations of attention on a GPU.
SDPA = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
}
MISSING = ("No available kernel", "No viable backend")  # PyTorch's errors if a device lacks one
SDPA_FLOAT32 = ("SDPA, efficient",)  # the others take 16-bit numbers only

pytestmark = pytest.mark.benchmark(timer=timer, disable_gc=True)

Call = Callable[[], Tensor]
Results = tuple[Tensor, ...]


def calls_of(
    passes: str, forwards: Mapping[str, Call], operands: Sequence[Tensor], dy: Tensor
) -> dict[str, Callable[[], Results]]:
    """The calls that are timed: forward only, or forward and the gradients of operands."""
    return {name: partial(results, passes, f, operands, dy) for name, f in forwards.items()}


def results(passes: str, forward: Call, operands: Sequence[Tensor], dy: Tensor) -> Results:
    """The output of a call, or the gradients of operands if there is a backward pass."""
    if passes == "forward":
        with torch.no_grad():
            return (forward(),)
    return torch.autograd.grad(forward(), operands, dy)


def assert_all_agree(actual: Results, expected: Results, tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_agree(one, other, tolerance)


def attentions(
    qkv: Tensor, drop: float, implementations: Mapping[str, SDPBackend | None]
) -> dict[str, Call]:
    """PyTorch's attention by each implementation that this device has.

    Args:
        implementations: by name; None lets PyTorch choose.
    """

    def attention() -> Tensor:
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=drop, is_causal=True)
        return out.transpose(1, 2)

    calls = {}
    for name, implementation in implementations.items():
        call = attention
        if implementation is not None:
            call = inside(partial(sdpa_kernel, implementation), attention)
        try:
            call()
        except RuntimeError as error:
            if not any(words in str(error) for words in MISSING):
                raise
            warnings.warn(f"PyTorch has no {name} for {qkv.dtype} on this device", stacklevel=2)
        else:
            calls[name] = call
    return calls


@pytest.mark.parametrize(("dtype", "drop", "tasks", "head_size"), CASES)
@pytest.mark.parametrize("passes", PASSES)
def bench_attention(
    benchmark: Any, passes: str, dtype: str, drop: float, tasks: int, head_size: int
) -> None:
    torch.manual_seed(0)
    shape = WINDOWS * tasks, TOKENS, 8, head_size
    like: dict[str, Any] = {"device": DEVICE, "dtype": getattr(torch, dtype)}
    qkv = torch.randn(*shape[:2], 3, *shape[2:], **like, requires_grad=True)
    d_out, seed = torch.randn(shape, **like), torch.tensor(1, device=DEVICE)
    kernel = fused().attention

    def calls(drop: float) -> dict[str, Callable[[], Results]]:
        forwards: dict[str, Call] = {"fused": lambda: kernel(qkv, slice(None), drop, None, seed)}
        if ON_GPU:
            names = SDPA_FLOAT32 if dtype == "float32" else SDPA
            forwards |= attentions(qkv, drop, {name: SDPA[name] for name in names})
        else:
            products = partial(attention_pytorch.attention, qkv, slice(None), drop)
            forwards |= {"products and softmax": products}
            forwards |= {"the same, oneDNN": inside(onednn, products)}
            forwards |= attentions(qkv, drop, {"F.scaled_dot_product_attention": None})
        return calls_of(passes, forwards, [qkv], d_out)

    definition = partial(REFERENCE.attention, qkv.double(), slice(None), 0.0)
    exact = results(passes, definition, [qkv], d_out.double())
    for name, call in calls(0.0).items():  # with dropout, each path drops other weights
        rounded = name == "the same, oneDNN" and not onednn_is_exact()
        assert_all_agree(call(), exact, TOLERANCE["bfloat16" if rounded else dtype])
    benchmark.group = "attention: 8 sequences of 75 tokens for each task, 8 heads"
    measure_in_turn(benchmark, calls(drop), seconds=1.0, on_device=True)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("passes", PASSES)
def bench_layer_norm(benchmark: Any, passes: str, tasks: int) -> None:
    problem = Problem.random(torch.float32, 128, "out", tasks, ROWS)
    masks = problem.bias_bits, problem.bias_bits, problem.task_ids
    operands = [t.requires_grad_() for t in (problem.x, problem.bias.clone(), problem.bias)]
    x, gain, shift = operands
    forwards: dict[str, Call] = {
        "fused": lambda: fused().masked_layer_norm(*operands, *masks)[0],
        "reference": lambda: PYTORCH.masked_layer_norm(*operands, *masks)[0],
        "PyTorch dense": lambda: F.layer_norm(x, x.shape[-1:], gain, shift),
    }
    calls = calls_of(passes, forwards, operands, problem.dy)
    for name, call in calls.items():
        of_path = (None, None, None) if name == "PyTorch dense" else masks
        exact = [t.detach().double().requires_grad_() for t in operands]
        definition = lambda: REFERENCE.masked_layer_norm(*exact, *of_path)[0]  # noqa: B023, E731
        expected = results(passes, definition, exact, problem.dy.double())
        assert_all_agree(call(), expected, TOLERANCE["float32"])
    benchmark.group = "LayerNorm: 600 rows of each task, d = 128"
    measure_in_turn(benchmark, calls, seconds=1.0, on_device=True)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("passes", PASSES)
def bench_dropout(benchmark: Any, passes: str, tasks: int) -> None:
    """x + dropout(branch), as at the end of a residual branch."""
    torch.manual_seed(0)
    x, branch, dy = (torch.randn(tasks, ROWS, 128, device=DEVICE) for _ in range(3))
    operands = [x.requires_grad_(), branch.requires_grad_()]
    seed = torch.tensor(1, device=DEVICE)
    forwards: dict[str, Call] = {
        "fused": lambda: fused().dropout_add(x, branch, DROP, seed),
        "F.dropout": lambda: x + F.dropout(branch, DROP),
    }
    if not ON_GPU:
        forwards["reference"] = lambda: PYTORCH.dropout_add(x, branch, DROP)
    calls = calls_of(passes, forwards, operands, dy)
    for call in calls.values():  # what came through is that of all elements, or nothing
        *_, found = call()
        kept, whole = (found - x, branch) if passes == "forward" else (found, dy)
        is_kept = kept.abs() > 1e-6
        torch.testing.assert_close(kept, is_kept * whole / (1 - DROP), rtol=1e-4, atol=1e-5)
        assert abs(is_kept.double().mean() - (1 - DROP)) < 0.01
    benchmark.group = "dropout and residual sum: 600 rows of each task, d = 128"
    measure_in_turn(benchmark, calls, seconds=1.0, on_device=True)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("passes", PASSES)
def bench_embedding(benchmark: Any, passes: str, tasks: int) -> None:
    torch.manual_seed(0)
    steps = tasks, WINDOWS, STEPS
    inputs = [torch.randn(*steps, size, device=DEVICE) for size in INPUTS]
    timesteps = torch.randint(1000, steps, device=DEVICE)
    shapes = [shape for size in INPUTS for shape in ((128, size), (128,))]
    parameters = [torch.randn(*shape, device=DEVICE) for shape in (*shapes, (1000, 128))]
    parameters = [parameter.requires_grad_() for parameter in parameters]
    dy = torch.randn(*steps, 3, 128, device=DEVICE)
    forwards: dict[str, Call] = {
        "fused": lambda: fused().token_embedding(inputs, timesteps, parameters),
        "reference": lambda: PYTORCH.token_embedding(inputs, timesteps, parameters),
    }
    calls = calls_of(passes, forwards, parameters, dy)
    exact = [p.detach().double().requires_grad_() for p in parameters]
    doubles = [x.double() for x in inputs]
    definition = partial(REFERENCE.token_embedding, doubles, timesteps, exact)
    expected = results(passes, definition, exact, dy.double())
    for call in calls.values():
        assert_all_agree(call(), expected, TOLERANCE["float32"])
    benchmark.group = "token embedding: 8 windows of 25 steps for each task, d = 128"
    measure_in_turn(benchmark, calls, seconds=1.0, on_device=True)
