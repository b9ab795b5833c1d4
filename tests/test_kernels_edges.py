"""Every operation of the CPU kernels against everything unusual: a table of rows and columns.

A row of `ROWS` is an operation with valid operands. Each test is a column: it changes one operand,
or what is around the call. The operation must then give what the definition gives, or raise one
error that names the operand. A new operation is a new row.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from harmodt_kernels import (
    REFERENCE,
    Backend,
    LayerMasks,
    Selection,
    fused_backend,
    lr_and_corrections_at,
    pack_bits,
)

TASKS = 3

Operands = dict[str, Any]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    groups: int
    rows: int
    inputs: int
    outputs: int


USUAL = Sizes(2, 3, 33, 40)
SIZES = {
    "no groups": Sizes(0, 3, 33, 40),
    "no rows": Sizes(2, 0, 33, 40),
    "one element": Sizes(1, 1, 1, 1),
}


@dataclass(frozen=True)
class Row:
    """An operation.

    Attributes:
        name: of the row.
        operands: makes valid operands, by the names that the errors use. Settings are no tensors.
        call: the operation's outputs.
        leaves: operands whose gradients are results too.
        written: operands that the operation writes. They are results too.
        reads_values: whether the host reads values of the operands.
    """

    name: str
    operands: Callable[[Sizes], Operands]
    call: Callable[[Backend, Operands], tuple[Tensor, ...]]
    leaves: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    reads_values: bool = False


def bits(*shape: int) -> Tensor:
    return pack_bits(torch.rand(shape) < 0.7)


def layer(sizes: Sizes) -> Operands:
    """Operands of a masked linear layer."""
    groups, rows, inputs, outputs = dataclasses.astuple(sizes)
    return {
        "x": torch.randn(groups, rows, inputs),
        "weight": torch.randn(outputs, inputs),
        "bias": torch.randn(outputs),
        "weight_bits": bits(TASKS, outputs, inputs),
        "bias_bits": bits(TASKS, outputs),
        "task_ids": torch.randint(TASKS, (groups,)),
    }


def layer_into_buffers(sizes: Sizes) -> Operands:
    """The gradients of weight and bias go to buffers that hold NaN."""
    shapes = (sizes.outputs, sizes.inputs), (sizes.outputs,)
    buffers = [torch.full((sizes.groups, *shape), torch.nan) for shape in shapes]
    return {**layer(sizes), **{f"group_gradients[{i}]": b for i, b in enumerate(buffers)}}


def without_masks(operands: Callable[[Sizes], Operands]) -> Callable[[Sizes], Operands]:
    return lambda sizes: {
        name: value
        for name, value in operands(sizes).items()
        if "bits" not in name and name != "task_ids"
    }


def layer_arguments(o: Operands) -> list[Any]:
    names = "x", "weight", "bias", "weight_bits", "bias_bits", "task_ids"
    return [o.get(name) for name in names]


def buffers_of(o: Operands) -> Any:
    return (o["group_gradients[0]"], o["group_gradients[1]"]) if "group_gradients[0]" in o else None


def call_linear(backend: Backend, o: Operands) -> tuple[Tensor, ...]:
    options = {"relu": True, "group_gradients": buffers_of(o)}
    return (backend.masked_linear(*layer_arguments(o), **options),)


def residual_operands(sizes: Sizes) -> Operands:
    shape = sizes.groups, sizes.rows, sizes.outputs
    return {**layer(sizes), "residual": torch.randn(shape), "seed": torch.tensor([7])}


def call_residual(backend: Backend, o: Operands) -> tuple[Tensor, ...]:
    operands = *layer_arguments(o), o["residual"], o.get("drop", 0.5)
    return (backend.linear_residual(*operands, seed=o["seed"], group_gradients=buffers_of(o)),)


def norm_operands(sizes: Sizes) -> Operands:
    groups, rows, size, _ = dataclasses.astuple(sizes)
    # Elements of a row differ enough for their variance to be well conditioned.
    return {
        "x": torch.randn(groups, rows, size) + 6 * (torch.arange(size) % 2),
        "weight": torch.randn(size),
        "bias": torch.randn(size),
        "weight_bits": bits(TASKS, size),
        "bias_bits": bits(TASKS, size),
        "task_ids": torch.randint(TASKS, (groups,)),
    }


def norm_into_buffers(sizes: Sizes) -> Operands:
    buffers = torch.full((2, sizes.groups, sizes.inputs), torch.nan)
    return {**norm_operands(sizes), **{f"group_gradients[{i}]": b for i, b in enumerate(buffers)}}


def call_norm(backend: Backend, o: Operands) -> tuple[Tensor, ...]:
    return backend.masked_layer_norm(*layer_arguments(o), group_gradients=buffers_of(o))


def norm_linear_operands(sizes: Sizes) -> Operands:
    norm, size = norm_operands(sizes), sizes.inputs
    return {
        **layer(sizes),
        "x": norm["x"],
        "gain": norm["weight"],
        "shift": norm["bias"],
        "gain_bits": bits(TASKS, size),
        "shift_bits": bits(TASKS, size),
    }


def call_norm_linear(backend: Backend, o: Operands) -> tuple[Tensor, ...]:
    norm_masks = LayerMasks(o.get("gain_bits"), o.get("shift_bits"), o.get("task_ids"))
    masks = LayerMasks(o.get("weight_bits"), o.get("bias_bits"), o.get("task_ids"))
    operands = (o[name] for name in ("x", "gain", "shift", "weight", "bias"))
    return backend.norm_linear(*operands, norm_masks, masks)


def attention_operands(sizes: Sizes) -> Operands:
    qkv = torch.randn(sizes.groups, max(sizes.rows, 1), 3, 2, sizes.inputs)
    return {"qkv": qkv[:, : sizes.rows], "seed": torch.tensor(7)}


def call_attention(backend: Backend, o: Operands) -> tuple[Tensor, ...]:
    queries = o.get("queries", slice(0, None, 2))
    return (backend.attention(o["qkv"], queries, o.get("drop", 0.5), seed=o["seed"]),)


def past_operands(sizes: Sizes) -> Operands:
    past = torch.randn(2, sizes.groups, 2, 5, sizes.inputs)
    return {"qkv": attention_operands(sizes)["qkv"], "past[0]": past[0], "past[1]": past[1]}


def call_past(backend: Backend, o: Operands) -> tuple[Tensor, ...]:
    return (backend.attention(o["qkv"], slice(None), 0.0, (o["past[0]"], o["past[1]"])),)


def dropout_operands(sizes: Sizes) -> Operands:
    x, branch = torch.randn(2, sizes.groups, sizes.rows, sizes.inputs)
    return {"x": x, "branch": branch, "seed": torch.tensor([7])}


def call_dropout(backend: Backend, o: Operands) -> tuple[Tensor, ...]:
    return (backend.dropout_add(o["x"], o["branch"], o.get("drop", 0.5), o["seed"]),)


def embedding_operands(sizes: Sizes) -> Operands:
    steps, size = (sizes.groups, sizes.rows), sizes.outputs
    widths = 1, sizes.inputs, 4
    named = {f"inputs[{i}]": torch.randn(*steps, width) for i, width in enumerate(widths)}
    shapes: list[tuple[int, ...]] = [s for width in widths for s in ((size, width), (size,))]
    shapes.append((TASKS, size))
    named |= {f"parameters[{i}]": torch.randn(shape) for i, shape in enumerate(shapes)}
    return {**named, "timesteps": torch.randint(TASKS, steps)}


def embedding_into_buffers(sizes: Sizes) -> Operands:
    o = embedding_operands(sizes)
    buffers = [torch.full_like(o[f"parameters[{i}]"], torch.nan)[None] for i in range(7)]
    return o | {f"gradients[{i}]": buffer for i, buffer in enumerate(buffers)}


def call_embedding(backend: Backend, o: Operands) -> tuple[Tensor, ...]:
    inputs, parameters, gradients = (
        [value for name, value in o.items() if name.startswith(of)]
        for of in ("inputs", "parameters", "gradients")
    )
    return (backend.token_embedding(inputs, o["timesteps"], parameters, gradients or None),)


def selection_operands(sizes: Sizes) -> Operands:
    tasks, words = sizes.groups, sizes.rows
    size = 32 * words
    return {
        "mask_bits": bits(tasks, size).view(tasks, words),
        "maskable_bits": torch.full((words,), -1, dtype=torch.int32),
        "weights": torch.randn(size),
        "masked_gradients": torch.randn(tasks, size),
        "dense_gradients": torch.randn(tasks, size),
        "mean_gradient": torch.randn(size),
        "losses": torch.rand(tasks) + 0.1,
    }


def call_selection(backend: Backend, o: Operands) -> tuple[Tensor, ...]:
    names = [name for name in selection_operands(USUAL) if name in o]
    settings = {"balance": 10.0, "importance": "fisher", "count": o.get("count", 5)}
    selection = backend.select_harmony(*(o[name] for name in names), **settings)
    in_order = (side.sort(-1).values for side in selection[:2])  # the definition has another order
    return *in_order, *selection[2:]


def move_operands(sizes: Sizes) -> Operands:
    o = selection_operands(sizes)
    names, selection = ("leaving", "entering"), call_selection(REFERENCE, o)
    moved = {f"selection.{name}": side for name, side in zip(names, selection, strict=False)}
    return {"mask_bits": o["mask_bits"], **moved}


def call_move(backend: Backend, o: Operands) -> tuple[Tensor, ...]:
    tasks = len(o["mask_bits"])
    no_counts = torch.zeros(3, tasks, dtype=torch.int64)
    refused = torch.zeros(tasks, dtype=torch.uint8)
    sides = o["selection.leaving"], o["selection.entering"]
    backend.move_weights(o["mask_bits"], Selection(*sides, *no_counts, refused))
    return ()


def adamw_operands(sizes: Sizes) -> Operands:
    size = sizes.rows * sizes.inputs
    vectors = torch.randn(4, size)
    vectors[3].abs_()
    names = "weights", "gradient", "first_moment", "second_moment"
    return {
        **dict(zip(names, vectors, strict=True)),
        "mask_bits": bits(TASKS, size),
        "task_ids": torch.randint(TASKS - 1, (sizes.groups,)),
        "lr_and_corrections": torch.tensor(
            lr_and_corrections_at(3, 0.01, (0.9, 0.999)), dtype=torch.float32
        ),
        "bf16_copy": torch.zeros(size, dtype=torch.bfloat16),
    }


def call_adamw(backend: Backend, o: Operands) -> tuple[Tensor, ...]:
    settings = {"betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.1, "max_norm": 1.0}
    names = [name for name in adamw_operands(USUAL) if name != "bf16_copy"]
    operands = (o.get(name) for name in names)
    return (backend.masked_adamw(*operands, **settings, bf16_copy=o["bf16_copy"]),)


LAYER_LEAVES = "x", "weight", "bias"
BUFFERS = "group_gradients[0]", "group_gradients[1]"
EMBEDDING_LEAVES = *(f"inputs[{i}]" for i in range(3)), *(f"parameters[{i}]" for i in range(7))
ADAMW_WRITTEN = "weights", "first_moment", "second_moment", "bf16_copy"

ROWS = (
    Row("masked_linear", layer, call_linear, LAYER_LEAVES),
    Row("masked_linear, no masks", without_masks(layer), call_linear, LAYER_LEAVES),
    Row("masked_linear, buffers", layer_into_buffers, call_linear, ("x",), BUFFERS),
    Row("linear_residual", residual_operands, call_residual, (*LAYER_LEAVES, "residual")),
    Row("masked_layer_norm", norm_operands, call_norm, LAYER_LEAVES),
    Row("masked_layer_norm, no masks", without_masks(norm_operands), call_norm, LAYER_LEAVES),
    Row("masked_layer_norm, buffers", norm_into_buffers, call_norm, ("x",), BUFFERS),
    Row("norm_linear", norm_linear_operands, call_norm_linear, (*LAYER_LEAVES, "gain", "shift")),
    Row("attention", attention_operands, call_attention, ("qkv",)),
    Row("attention, past", past_operands, call_past),
    Row("dropout_add", dropout_operands, call_dropout, ("x", "branch")),
    Row("token_embedding", embedding_operands, call_embedding, EMBEDDING_LEAVES),
    Row(
        "token_embedding, buffers",
        embedding_into_buffers,
        call_embedding,
        EMBEDDING_LEAVES[:3],
        tuple(f"gradients[{i}]" for i in range(7)),
    ),
    Row("select_harmony", selection_operands, call_selection),
    Row("move_weights", move_operands, call_move, written=("mask_bits",), reads_values=True),
    Row("masked_adamw", adamw_operands, call_adamw, written=ADAMW_WRITTEN),
    Row(
        "masked_adamw, no masks",
        without_masks(adamw_operands),
        call_adamw,
        written=ADAMW_WRITTEN,
    ),
)

Change = Callable[[Tensor], Tensor]

OWN_WORDS = re.compile(
    "(: .* must | holds .*, but | has strides .*: | is on .*, and other operands are on |: give )"
)
"""Of the errors that this package writes."""


def made(row: Row, sizes: Sizes = USUAL, **changes: Change | Any) -> Operands:
    """The row's operands, the same each time; some are changed, or settings are added."""
    torch.manual_seed(1)
    operands = row.operands(sizes)
    for name, change in changes.items():
        operands[name] = change(operands[name]) if callable(change) else change
    return operands


def outcome(row: Row, backend: Backend, operands: Operands) -> Results:
    """Outputs, gradients, and the operands that were written."""
    for name in row.leaves:
        if operands[name].is_floating_point():
            operands[name] = operands[name].detach().requires_grad_()
    outputs = row.call(backend, operands)
    results = {f"output {i}": output.detach().clone() for i, output in enumerate(outputs)}
    if row.leaves and outputs[0].requires_grad:
        torch.autograd.backward(outputs, [gradient_for(output) for output in outputs])
        results |= {f"gradient of {name}": operands[name].grad for name in row.leaves}
    results |= {name: operands[name].detach() for name in row.written}
    return {name: result for name, result in results.items() if result is not None}


def gradient_for(output: Tensor) -> Tensor:
    return (torch.arange(output.numel()) % 7 - 3).view(output.shape).to(output.dtype)


def assert_equal(computed: Results, expected: Results, tolerance: float = 1e-4) -> None:
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            computed[name],
            value,
            rtol=tolerance,
            atol=tolerance,
            check_dtype=False,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check_changed(row: Row, name: str, change: Change, mentioned: tuple[str, ...]) -> None:
    check_same(row, lambda: made(row, **{name: change}), mentioned)


def check_same(row: Row, operands: Callable[[], Operands], mentioned: tuple[str, ...]) -> None:
    """The result is the definition's, or an error says what is mentioned."""
    try:
        computed = outcome(row, fused_backend("cpu"), operands())
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        message = str(error)
        assert all(text in message for text in mentioned), message
        assert OWN_WORDS.search(message) and "\n" not in message, message
        return
    assert_equal(computed, outcome(row, REFERENCE, operands()))


@pytest.fixture(autouse=True)
def _kernels(native: None) -> Iterator[None]:
    """The CPU kernels, and the operands' dtypes as usual after a test."""
    yield
    torch.set_default_dtype(torch.float32)


each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
each_tensor = pytest.mark.parametrize(
    ("row", "tensor"),
    [
        pytest.param(row, name, id=f"{row.name}-{name}")
        for row in ROWS
        for name, value in row.operands(USUAL).items()
        if isinstance(value, Tensor)
    ],
)


@each_row
def test_valid_operands_give_the_definitions_results(row: Row) -> None:
    fused = fused_backend("cpu")
    assert_equal(outcome(row, fused, made(row)), outcome(row, REFERENCE, made(row)))


OTHER_DTYPES = {torch.float32: torch.float64, torch.int32: torch.int64, torch.int64: torch.int32}


@each_tensor
@pytest.mark.parametrize("dtype", ["other", "bool"])
def test_another_dtype(row: Row, tensor: str, dtype: str) -> None:
    def change(value: Tensor) -> Tensor:
        return value.to(
            torch.bool if dtype == "bool" else OTHER_DTYPES.get(value.dtype, value.dtype)
        )

    check_changed(row, tensor, change, (tensor,))


SHAPES: dict[str, Change] = {
    "longer": lambda t: torch.cat((t, t[..., :1]), -1) if t.dim() else t.new_ones(2),
    "shorter": lambda t: t[..., :-1] if t.dim() else t.new_ones(0),
    "one row more": lambda t: torch.cat((t, t[:1])) if t.dim() else t.new_ones(2),
    "a dimension less": lambda t: t[0] if t.dim() else t.new_ones(3),
    "a dimension more": lambda t: t[None],
}


@each_tensor
@pytest.mark.parametrize("shape", SHAPES)
def test_another_shape(row: Row, tensor: str, shape: str) -> None:
    check_changed(row, tensor, SHAPES[shape], ())


@each_tensor
def test_another_device(row: Row, tensor: str) -> None:
    check_changed(row, tensor, lambda t: t.to("meta"), ("meta",))


def with_gaps(t: Tensor) -> Tensor:
    return torch.stack((t, t), -1)[..., 0]


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else with_gaps(t)


def with_gaps_between_rows(t: Tensor) -> Tensor:
    return torch.cat((t, t), -1)[..., : t.shape[-1]] if t.dim() else t


def repeated(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape) if t.dim() else t


@each_tensor
@pytest.mark.parametrize("view", [with_gaps, transposed, with_gaps_between_rows, repeated])
def test_a_view(row: Row, tensor: str, view: Change) -> None:
    if view is repeated and tensor in row.written:
        return  # its elements share memory, so that there is no right result
    check_changed(row, tensor, view, (tensor, "strides"))


@each_row
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes(row: Row, sizes: Sizes) -> None:
    check_same(row, lambda: made(row, sizes), ("no groups",))


IDS = [
    (row, name, beyond)
    for row in ROWS
    for name in row.operands(USUAL)
    if name in ("task_ids", "timesteps") or name.startswith("selection.")
    for beyond in (TASKS if "." not in name else 32 * USUAL.rows, -1, 2**40)
    if beyond >= 0 or "." not in name  # a selection ends with -1
]


@pytest.mark.parametrize(("row", "tensor", "beyond"), IDS, ids=lambda v: getattr(v, "name", str(v)))
def test_an_index_out_of_range(row: Row, tensor: str, beyond: int) -> None:
    def change(ids: Tensor) -> Tensor:
        return ids.index_fill(-1, torch.tensor([ids.shape[-1] - 1]), beyond)

    operands = made(row, **{tensor: change})
    before = {name: operands[name].clone() for name in row.written}
    with pytest.raises(IndexError, match=rf"{tensor.rpartition('.')[2]}.* {beyond}\b"):
        outcome(row, fused_backend("cpu"), operands)
    for name, value in before.items():
        torch.testing.assert_close(operands[name], value, rtol=0, atol=0, equal_nan=True)


SETTINGS = [
    *((name, "drop", value) for name in ("linear_residual", "attention", "dropout_add")
      for value in (1.0, -0.5, float("nan"))),
    ("attention", "queries", slice(None, None, -1)),
    ("select_harmony", "count", -1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "setting", "value"), SETTINGS)
def test_a_setting_out_of_range(name: str, setting: str, value: Any) -> None:
    row = next(row for row in ROWS if row.name == name)
    operands = made(row, **{setting: value})
    with pytest.raises(ValueError, match=rf"{setting}.*must be"):
        outcome(row, fused_backend("cpu"), operands)


@each_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(row: Row, dtype: torch.dtype) -> None:
    fused = fused_backend("cpu")
    expected, operands = outcome(row, fused, made(row)), made(row)
    torch.set_default_dtype(dtype)
    computed = outcome(row, fused, operands)
    assert_equal(computed, expected, 0.0)
    for name, value in expected.items():
        assert computed[name].dtype == value.dtype, name


@each_row
def test_inference_mode_and_then_training(row: Row) -> None:
    fused = fused_backend("cpu")
    with torch.inference_mode():
        outputs = row.call(fused, made(row))
    expected = outcome(row, REFERENCE, made(row))
    for i, output in enumerate(outputs):
        torch.testing.assert_close(output, expected[f"output {i}"], rtol=1e-4, atol=1e-4)
    assert_equal(outcome(row, fused, made(row)), expected)


@each_row
def test_fake_mode_and_then_real_tensors(row: Row) -> None:
    fused, expected = fused_backend("cpu"), outcome(row, REFERENCE, made(row))
    operands = made(row)
    with FakeTensorMode() as mode:
        fakes = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in operands.items()
        }
        if not row.reads_values:
            outputs = row.call(fused, fakes)
            for i, output in enumerate(outputs):
                assert output.shape == expected[f"output {i}"].shape
                assert output.dtype == expected[f"output {i}"].dtype
    assert_equal(outcome(row, fused, made(row)), expected)


@each_row
def test_compiled(row: Row) -> None:
    fused = fused_backend("cpu")
    if row.reads_values:
        return
    compiled = torch.compile(row.call, backend="eager", fullgraph=True)
    with torch.no_grad():
        outputs = compiled(fused, made(row))
    expected = outcome(row, REFERENCE, made(row))
    for i, output in enumerate(outputs):
        torch.testing.assert_close(output, expected[f"output {i}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row", [row for row in ROWS if row.leaves], ids=lambda row: row.name)
def test_a_gradient_of_a_gradient_is_refused(row: Row) -> None:
    operands = made(row)
    leaves = [operands[name].requires_grad_() for name in row.leaves]
    outputs = row.call(fused_backend("cpu"), operands)
    # The gradients depend on these too, which is all that those of a sum depend on.
    dys = [gradient_for(output).requires_grad_() for output in outputs]
    gradients = torch.autograd.grad(outputs, leaves, dys, create_graph=True)
    with pytest.raises(RuntimeError, match="backend=PYTORCH"):
        gradients[0].square().sum().backward()


@each_row
def test_two_python_threads_at_once(row: Row) -> None:
    fused = fused_backend("cpu")
    expected = outcome(row, fused, made(row))
    operands = [made(row) for _ in range(6)]
    computed: list[Results] = []

    def run() -> None:
        while operands:
            computed.append(outcome(row, fused, operands.pop()))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computed) == 6
    for results in computed:
        assert_equal(results, expected, 0.0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_process_after_the_first_call() -> None:
    """OpenMP's threads do not exist in the child, which must not wait for them."""
    fused = fused_backend("cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = [outcome(row, fused, made(row)) for row in ROWS]
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(60)  # ends a child that waits
                for row, results in zip(ROWS, expected, strict=True):
                    assert_equal(outcome(row, fused, made(row)), results, 0.0)
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)
