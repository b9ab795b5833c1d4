from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import TASKS, LinearProblem, largest_error
from tiny import peak_memory
from torch import Tensor

from harmodt_kernels import PYTORCH, REFERENCE, Backend, fused_backend, masked_linear

SIZES = [
    (1, 1, 39, 4),
    (1, 75, 128, 96),
    (2, 63, 60, 96),
    (4, 75, 39, 96),
    (5, 1, 60, 4),
    (4, 63, 128, 4),
]  # groups, rows, inputs, outputs


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_output_and_gradients_equal_a_loop(backend, device, sizes, relu) -> None:
    problem = LinearProblem.random(*sizes)
    computed = problem.computed(backend, device, torch.float32, relu=relu)
    problem.check(computed, 2e-4, relu)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("backend", [REFERENCE, PYTORCH], ids=["reference", "pytorch"])
@pytest.mark.parametrize("sizes", SIZES[2:4])
def test_pytorchs_ways_are_exact_in_float64(backend, sizes, relu) -> None:
    problem = LinearProblem.random(*sizes)
    for of_groups in (False, True):
        computed = problem.computed(
            backend, torch.device("cpu"), torch.float64, relu=relu, of_groups=of_groups
        )
        problem.check(computed, 1e-12, relu)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("of_groups", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_without_masks_every_weight_is_active(backend, device, relu, of_groups, bias) -> None:
    problem = LinearProblem.random(4, 7, 39, 5).without_masks()
    computed = problem.computed(
        backend, device, torch.float32, relu=relu, of_groups=of_groups, bias=bias
    )
    if not bias:
        problem.bias[:] = 0.0
        computed.pop("bias_of_groups" if of_groups else "bias")
    problem.check(computed, 2e-4, relu)


def test_masks_of_all_weights_made_in_inference_serve_training(device) -> None:
    problem = LinearProblem.random(2, 5, 43, 6).without_masks()  # sizes of this test alone
    layer = torch.nn.Linear(43, 6).to(device)
    with torch.inference_mode():
        fused_backend(device).masked_linear(
            torch.zeros(2, 5, 43, device=device), layer.weight, layer.bias, None, None, None
        )
    problem.check(problem.computed(fused_backend(device), device, torch.float32), 2e-4)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("sizes", [(1, 75, 39, 96), (4, 5, 60, 4)])
def test_gradients_of_each_group_by_itself(backend, device, sizes, relu) -> None:
    problem = LinearProblem.random(*sizes)
    computed = problem.computed(backend, device, torch.float32, relu=relu, of_groups=True)
    problem.check(computed, 2e-4, relu)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("groups", [1, 6])
def test_sums_of_gradients_written_in_place(backend, device, groups, masked) -> None:
    problem = LinearProblem.random(groups, 40, 39, 35)  # on a GPU, of six groups in parts
    if not masked:
        problem.without_masks()
    computed = problem.computed(backend, device, torch.float32, relu=True, in_place=True)
    problem.check(computed, 2e-4, relu=True)


@pytest.mark.parametrize("implementation", ["cpu"], indirect=True)
def test_the_cpu_kernels_refuse_float16(backend, device) -> None:
    with pytest.raises(TypeError, match="x is float16"):
        LinearProblem.random(1, 2, 32, 4).computed(backend, device, torch.float16)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("of_groups", [False, True])
def test_without_rows_the_gradients_are_zero(backend, device, of_groups, relu) -> None:
    problem = LinearProblem.random(2, 0, 40, 33)
    computed = problem.computed(backend, device, torch.float32, relu=relu, of_groups=of_groups)
    problem.check(computed, 0.0, relu)
    assert computed["y"].shape == (2, 0, 33)


@pytest.mark.parametrize("of_groups", [False, True])
def test_without_a_bias(backend, device, of_groups) -> None:
    problem = LinearProblem.random(4, 7, 39, 5)
    computed = problem.computed(backend, device, torch.float32, bias=False, of_groups=of_groups)
    problem.bias[:] = 0.0
    untouched = computed.pop("bias_of_groups" if of_groups else "bias")
    assert untouched is None or untouched.isnan().all()
    problem.check(computed, 2e-4)


@pytest.mark.parametrize("asked", [("x",), ("weight",), ("bias",), ()])
def test_only_the_gradients_that_are_asked_for(backend, device, asked) -> None:
    problem = LinearProblem.random(2, 7, 39, 5)
    leaves = {
        name: torch.from_numpy(getattr(problem, name)).to(device, torch.float32)
        for name in ("x", "weight", "bias")
    }
    for name in asked:
        leaves[name].requires_grad_()
    bits = [bits.to(device) for bits in problem.bits]
    ids = torch.from_numpy(problem.task_ids).to(device)
    y = backend.masked_linear(*leaves.values(), *bits, ids)
    assert y.requires_grad == bool(asked)
    if asked:
        y.backward(torch.from_numpy(problem.output_gradient).to(device, torch.float32))
    computed = {"y": y.detach(), **{name: leaves[name].grad for name in asked}}
    problem.check(computed, 2e-4)
    assert all(leaf.grad is None for name, leaf in leaves.items() if name not in asked)


@pytest.mark.parametrize("autocast", [False, True])
def test_inactive_weights_may_hold_anything_and_get_no_gradient(backend, device, autocast) -> None:
    if autocast and backend.name == "triton-interpreter":
        pytest.skip("Triton's interpreter multiplies bf16 wrongly")
    problem = LinearProblem.random(4, 7, 39, 5)
    problem.weight_mask &= np.arange(39) % 3 != 0  # these columns are inactive in every task
    problem.bias_mask[:, 2] = False
    before = problem.computed(backend, device, torch.float32, autocast=autocast)
    problem.weight[:, ::3] = np.resize([np.nan, np.inf, -np.inf], (5, 13))
    problem.bias[2] = np.nan
    after = problem.computed(backend, device, torch.float32, autocast=autocast)
    for name, values in after.items():
        assert torch.equal(values, before[name]), name
    assert torch.isfinite(after["y"]).all()
    assert (after["weight"][:, ::3] == 0).all()
    assert after["bias"][2] == 0


LOW = [(torch.float32, torch.float32)] + [
    (dtype, weight)
    for dtype in (torch.float16, torch.bfloat16)
    for weight in (dtype, torch.float32)
]


@pytest.mark.parametrize(("dtype", "weight_dtype"), LOW, ids=str)
@pytest.mark.parametrize("sizes", SIZES[1:4])
def test_errs_at_most_twice_as_much_as_dense_layers(
    backend, device, dtype, weight_dtype, sizes
) -> None:
    _skip_what_is_not_computed(backend, dtype)
    problem = LinearProblem.random(*sizes).rounded(dtype)
    expected = problem.expected()
    computed = problem.computed(backend, device, dtype, weight_dtype=weight_dtype)
    dense = dense_layers(problem, device, dtype)
    for name, values in computed.items():
        assert values.dtype == (dtype if name in ("y", "x") else weight_dtype), name
        bound = 2 * largest_error(dense[name], expected[name]) + 1e-7
        assert largest_error(values, expected[name]) <= bound, name


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("of_groups", [False, True])
def test_a_program_goes_through_several_tiles_of_rows(
    backend, device, of_groups, relu, stationary
) -> None:
    problem = LinearProblem.random(2, 389, 39, 70).rounded(torch.float16)
    how = {"weight_dtype": torch.float32, "relu": relu, "of_groups": of_groups}
    computed = problem.computed(backend, device, torch.float16, **how)
    passed = computed["y"].cpu().numpy() > 0 if relu else None
    expected = problem.expected(relu, passed)
    for name, values in computed.items():
        # what is computed is rounded to float16 once
        bound = 2e-3 * np.abs(expected[name]).max()
        assert largest_error(values, expected[name]) <= bound, name


@pytest.mark.parametrize(
    ("groups", "depth", "columns", "stationary"),
    [
        *((50, 128, 384, True), (50, 128, 128, True), (50, 128, 512, True)),
        *((50, 512, 128, False), (1, 128, 384, False), (5, 128, 384, False)),
    ],
)
def test_a_program_goes_through_several_where_enough_are_left(
    groups, depth, columns, stationary
) -> None:
    kernels = pytest.importorskip("harmodt_kernels.masked_linear.triton")
    x, half = torch.empty(groups, 600, depth, device="meta"), torch.bfloat16
    plan = kernels.product_plan(kernels.FORWARD, x, half, depth, columns, loaded=2)
    assert plan.stationary == stationary == (plan.tiles_of_program > 1)
    single = kernels.product_plan(kernels.FORWARD, x, torch.float32, depth, columns, loaded=4)
    assert not single.stationary
    if stationary:
        tiles = groups * -(-600 // plan.tile.rows) * -(-columns // plan.tile.columns)
        assert 2 * 132 <= plan.programs < tiles <= plan.programs * plan.tiles_of_program


# Inputs and outputs of the layers of a block, d = 128, and the bytes that are loaded for an element
# of x and of dy in bf16. A group has 8 windows of 5 prompt steps and 20 context steps of 3 tokens.
# After the last block's attention only the 20 states of a window are left.
BLOCK = {
    "qkv": (128, 384, 4, 2),
    "out": (128, 128, 2, 4),
    "up": (128, 512, 4, 4),
    "down": (512, 128, 2, 4),
}
ROWS = 8 * (5 + 20) * 3
ROWS_AT_THE_END = 8 * 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("layer", BLOCK)
def test_a_product_keeps_a_gpu_busy(layer, gradient, dtype) -> None:
    kernels = pytest.importorskip("harmodt_kernels.masked_linear.triton")
    inputs, outputs, of_x, of_dy = BLOCK[layer]
    table = kernels.INPUT_GRADIENT if gradient else kernels.FORWARD
    depth, columns, loaded = (outputs, inputs, of_dy) if gradient else (inputs, outputs, of_x)

    def plan(groups: int, rows: int) -> tuple[int, int]:
        """Programs, and the steps that one program takes one after another."""
        x = torch.empty(groups, rows, depth, device="meta")
        found = kernels.product_plan(table, x, dtype, depth, columns, loaded)
        return found.programs, found.tiles_of_program * -(-depth // found.tile.depth)

    programs, steps = plan(1, ROWS)
    assert programs >= 100 and steps <= 16
    for groups in (5, 50):
        for rows in (ROWS, ROWS_AT_THE_END):
            programs, steps = plan(groups, rows)
            assert programs >= 132 and steps <= 40
    # The smallest tile has 16 rows, as many as matrix units take, and a word's 32 inputs.
    programs, steps = plan(1, ROWS_AT_THE_END)
    assert programs >= 10 * columns // 32 and steps <= 8


@pytest.mark.parametrize("sizes", SIZES[1:4])
def test_autocast_errs_at_most_twice_as_much_as_dense_layers(backend, device, sizes) -> None:
    _skip_what_is_not_computed(backend, torch.bfloat16)
    problem = LinearProblem.random(*sizes)
    expected = problem.expected()
    computed = problem.computed(backend, device, torch.float32, autocast=True)
    assert computed["y"].dtype == torch.bfloat16
    dense = dense_layers(problem, device, torch.float32, autocast=True)
    for name, values in computed.items():
        assert name == "y" or values.dtype == torch.float32, name
        bound = 2 * largest_error(dense[name], expected[name]) + 1e-6
        assert largest_error(values, expected[name]) <= bound, name


def _skip_what_is_not_computed(backend: Backend, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and backend.name == "triton-interpreter":
        pytest.skip("Triton's interpreter multiplies bf16 wrongly")
    if dtype == torch.float16 and backend.name.startswith("cpu"):
        pytest.skip("the CPU kernels refuse float16")


def dense_layers(
    problem: LinearProblem, device: torch.device, dtype: torch.dtype, autocast: bool = False
) -> dict[str, Tensor]:
    """The groups one by one, by PyTorch's layer on weights that were masked before."""
    operands = (problem.x, problem.weight, problem.bias, problem.output_gradient)
    x, weight, bias, dy = (torch.from_numpy(v).to(device, dtype) for v in operands)
    ys, dxs, dws, dbs = [], [], [], []
    for g, task in enumerate(problem.task_ids):
        masks = (problem.weight_mask[task], problem.bias_mask[task])
        weight_mask, bias_mask = (torch.from_numpy(mask).to(device) for mask in masks)
        leaves = [x[g].clone(), weight * weight_mask, bias * bias_mask]
        for leaf in leaves:
            leaf.requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            y = F.linear(*leaves)
        y.backward(dy[g].to(y.dtype))
        ys.append(y.detach())
        dxs.append(leaves[0].grad)
        dws.append(leaves[1].grad * weight_mask)
        dbs.append(leaves[2].grad * bias_mask)
    results = torch.stack(ys), torch.stack(dxs), torch.stack(dws).sum(0), torch.stack(dbs).sum(0)
    return dict(zip(("y", "x", "weight", "bias"), results, strict=True))


# The fixtures keep no state between the examples.
examples = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=20, **examples)
@given(
    groups=st.integers(1, 4),
    rows=st.integers(1, 40),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    relu=st.booleans(),
    masked=st.booleans(),
)
def test_any_shape(backend, device, groups, rows, inputs, outputs, relu, masked) -> None:
    problem = LinearProblem.random(groups, rows, inputs, outputs)
    if not masked:
        problem.without_masks()
    computed = problem.computed(backend, device, torch.float32, relu=relu)
    problem.check(computed, 2e-4, relu)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", range(4))  # the largest tile of each table, then smaller ones
@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
def test_every_tile(backend, device, dtype, relu, size, monkeypatch) -> None:
    kernels = importlib.import_module("harmodt_kernels.masked_linear.triton")
    for name in ("FORWARD", "INPUT_GRADIENT", "WEIGHT_GRADIENT"):
        tiles = {
            key: row[size : size + 1] or row[-1:] for key, row in getattr(kernels, name).items()
        }
        monkeypatch.setattr(kernels, name, tiles)
    sizes = (75, 140, 139) if size == 0 else (35, 70, 67)
    problem = LinearProblem.random(2, *sizes).rounded(dtype)
    computed, again = (problem.computed(backend, device, dtype, relu=relu) for _ in range(2))
    problem.check(computed, 2e-4 if dtype == torch.float32 else 3e-2, relu)
    assert all(torch.equal(values, again[name]) for name, values in computed.items())


def test_results_repeat_bit_for_bit(backend, device) -> None:
    problem = LinearProblem.random(4, 75, 60, 40)
    first, *others = (problem.computed(backend, device, torch.float32) for _ in range(5))
    for other in others:
        for name, values in other.items():
            assert torch.equal(values, first[name]), name


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written(device) -> None:
    problem = LinearProblem.random(2, 63, 60, 37)
    computed = problem.computed(fused_backend(device), device, torch.float32)
    problem.check(computed, 2e-4)


def test_a_bias_keeps_its_type_beside_a_rounded_weight(device) -> None:
    problem = LinearProblem.random(2, 60, 39, 5).rounded(torch.bfloat16)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        x, weight, bias, dy = (
            torch.from_numpy(v).to(device, torch.float32)
            for v in (problem.x, problem.weight, problem.bias, problem.output_gradient)
        )
        weight, bias = weight.to(dtype).requires_grad_(), bias.requires_grad_()
        masks = [t.to(device) for t in (*problem.bits, torch.from_numpy(problem.task_ids))]
        masked_linear(x.to(dtype), weight, bias, *masks).backward(dy.to(dtype))
        assert weight.grad.dtype == dtype
        gradients.append(bias.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)  # sums of the same numbers


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_gradients(backend, device, masked: bool, relu: bool) -> None:
    problem = LinearProblem.random(2, 5, 39, 4)
    masks = [t.to(device) for t in (*problem.bits, torch.from_numpy(problem.task_ids))]
    masks = masks if masked else [None] * 3

    def penalty(backend: Backend, leaves: list[Tensor]) -> Tensor:
        y = backend.masked_linear(*leaves, *masks, relu=relu)
        gradients = torch.autograd.grad(y.square().mean(), leaves, create_graph=True)
        return sum(g.square().mean() for g in gradients)

    leaves = [
        torch.from_numpy(v).to(device, torch.float32).requires_grad_()
        for v in (problem.x, problem.weight.copy(), problem.bias)
    ]
    wanted = torch.autograd.grad(penalty(REFERENCE, leaves), leaves)
    if backend in (REFERENCE, PYTORCH):
        found = torch.autograd.grad(penalty(backend, leaves), leaves)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        return
    with pytest.raises(RuntimeError, match="no gradient of a gradient: use backend=PYTORCH"):
        torch.autograd.grad(penalty(backend, leaves), leaves)
    y = backend.masked_linear(*leaves, *masks, relu=relu)  # whose gradient is a constant
    (d_x,) = torch.autograd.grad(y.sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no gradient of a gradient: use backend=PYTORCH"):
        d_x.square().sum().backward()


def operands_of_ops(device: torch.device) -> dict[str, tuple]:
    problem = LinearProblem.random(2, 5, 39, 4)
    x, weight, bias, dy = (
        torch.from_numpy(v).to(device, torch.float32)
        for v in (problem.x, problem.weight, problem.bias, problem.output_gradient)
    )
    weight_bits, bias_bits = (bits.to(device) for bits in problem.bits)
    ids = torch.from_numpy(problem.task_ids).to(device)
    y = dy.roll(1, 1)
    layer, gradient = (x, weight, bias, weight_bits, bias_bits, ids), (weight, weight_bits, ids)
    draw = 0.3, torch.tensor([7], device=device)
    return {
        "masked_linear": (*layer, True),
        "masked_linear with what ends a branch": (*layer, False, dy, *draw),
        "masked_linear_input_gradient": (dy, y, *gradient, x.dtype),
        "masked_linear_input_gradient with dropout": (dy, None, *gradient, x.dtype, *draw),
        "masked_linear_weight_gradients": (
            [dy, dy],
            [y, None],
            [x, x],
            [weight_bits, weight_bits],
            [bias_bits, None],
            [ids, ids],
            [x.new_empty(2, 4, 39), x.new_empty(1, 4, 39)],
            [x.new_empty(2, 4)],
            [0.0, draw[0]],
            [None, draw[1]],
            [None, x.new_ones(2, 5, 2)],
            [None, x.new_ones(2, 2, 39)],
            [True, False],
        ),
    }


@pytest.mark.parametrize("name", list(operands_of_ops(torch.device("cpu"))))
def test_the_registered_operations_keep_pytorchs_rules(device, name: str) -> None:
    operation = getattr(torch.ops.harmodt, name.partition(" ")[0])
    torch.library.opcheck(operation, operands_of_ops(device)[name])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_to_one_graph(device, relu: bool, masked: bool) -> None:
    problem = LinearProblem.random(2, 5, 39, 4)
    if not masked:
        problem.without_masks()
    backend = fused_backend(device)
    compiled = torch.compile(backend.masked_linear, fullgraph=True, backend="aot_eager")
    whole = replace(backend, masked_linear=compiled)
    computed = problem.computed(whole, device, torch.float32, relu=relu)
    problem.check(computed, 2e-4, relu)


@pytest.mark.parametrize("groups", [1, 5, 50])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 384), (512, 128)])
def test_takes_no_more_memory_than_a_dense_layer(
    device, groups, inputs, outputs, monkeypatch
) -> None:
    """Forward and backward hold at most 5 % more than F.linear's do, whose weight has no copies."""
    if device.type == "cuda":
        pytest.skip("counted on the CPU: the launchers allocate the same there")
    from harmodt_kernels.masked_linear import triton as kernels

    monkeypatch.setattr(kernels, "launch", lambda *_, **__: None)  # what it computes is no matter
    rows = 600
    x, dy = torch.zeros(groups, rows, inputs), torch.zeros(groups, rows, outputs)
    weight, bias = torch.zeros(outputs, inputs), torch.zeros(outputs)
    bits = torch.zeros(TASKS, outputs, inputs // 32, dtype=torch.int32)
    bias_bits = torch.zeros(TASKS, outputs // 32, dtype=torch.int32)
    ids = torch.zeros(groups, dtype=torch.int64)

    def peak(layer) -> int:
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        return peak_memory(lambda: torch.autograd.grad(layer(*leaves), leaves, dy))

    dense = peak(F.linear)
    masked = peak(lambda *leaves: masked_linear(*leaves, bits, bias_bits, ids))
    assert masked <= 1.05 * dense


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_replays_on_changed_inputs(device) -> None:
    problems = [LinearProblem.random(3, 63, 128, 96) for _ in range(2)]
    problems[1].x = problems[1].x[::-1].copy()
    operands = [
        [torch.from_numpy(v).to(device, torch.float32) for v in (p.x, p.weight, p.bias)]
        for p in problems
    ]
    bits = [bits.to(device) for bits in problems[0].bits]
    ids = torch.from_numpy(problems[0].task_ids).to(device)
    x, weight, bias = (t.clone() for t in operands[0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        masked_linear(x, weight, bias, *bits, ids)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = masked_linear(x, weight, bias, *bits, ids)
    x.copy_(operands[1][0])
    graph.replay()
    problems[1].check({"y": y}, 2e-4)


def test_the_backward_pass_in_pytorch_passes_its_own_check() -> None:
    problem = LinearProblem.random(4, 3, 5, 4)
    leaves = [
        torch.from_numpy(v).requires_grad_() for v in (problem.x, problem.weight, problem.bias)
    ]
    ids = torch.from_numpy(problem.task_ids)
    assert torch.autograd.gradcheck(
        lambda *v: PYTORCH.masked_linear(*v, *problem.bits, ids), leaves
    )


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(5, 39)}, ValueError, "x has shape .* must be"),
        ({"x": torch.zeros(2, 5, 40)}, ValueError, "weight has shape"),
        ({"x": torch.zeros(0, 5, 39)}, ValueError, "x has no groups"),
        ({"x": torch.zeros(2, 5, 39, dtype=torch.float64)}, TypeError, "x is torch.float64"),
        ({"weight_bits": torch.zeros(3, 4, 2, dtype=torch.int64)}, TypeError, "weight_bits is"),
        ({"weight_bits": torch.zeros(3, 4, 1, dtype=torch.int32)}, ValueError, "weight_bits has"),
        ({"bias_bits": None}, ValueError, "bias and bias_bits"),
        ({"weight_bits": None}, ValueError, "bias_bits is given without weight_bits"),
        ({"task_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "task_ids has shape"),
        ({"task_ids": torch.zeros(2, dtype=torch.int32)}, TypeError, "task_ids is torch.int32"),
        ({"task_ids": None}, ValueError, "task_ids is None"),
        ({"weight": torch.zeros(39, 4).T}, ValueError, "weight has strides"),
        ({"group_gradients": (torch.zeros(2, 4, 39), None)}, ValueError, "a tensor for the bias"),
        ({"group_gradients": torch.zeros(2, 4, 40).split([39, 1], 2)}, ValueError, r"gradients\[1"),
    ],
)
def test_operands_that_do_not_fit_are_named(changed, error, message) -> None:
    operands = {
        "x": torch.zeros(2, 5, 39),
        "weight": torch.zeros(4, 39),
        "bias": torch.zeros(4),
        "weight_bits": torch.zeros(3, 4, 2, dtype=torch.int32),
        "bias_bits": torch.zeros(3, 1, dtype=torch.int32),
        "task_ids": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        masked_linear(**(operands | changed))
