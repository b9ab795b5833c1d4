from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import LinearProblem, small_variances
from torch import Tensor

from harmodt_kernels import (
    NO_MASKS,
    REFERENCE,
    Backend,
    LayerMasks,
    fused_backend,
    pack_bits,
    unpack_bits,
)
from harmodt_kernels.masked_linear.gradients import WeightGradients
from harmodt_kernels.norm_linear.reference import norm_then_linear


@dataclass(frozen=True)
class Problem:
    """Operands in float64, and gradients of y and of the residual."""

    x: Tensor
    gain: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_masks: LayerMasks
    masks: LayerMasks
    dy: Tensor
    d_residual: Tensor

    @classmethod
    def random(cls, groups: int, rows: int, inputs: int, outputs: int) -> Problem:
        linear = LinearProblem.random(groups, rows, inputs, outputs)
        generator = torch.Generator().manual_seed(inputs)
        gain, shift = torch.randn(2, inputs, generator=generator).double()
        kept = torch.rand(2, len(linear.weight_mask), inputs, generator=generator) < 0.7
        ids = torch.from_numpy(linear.task_ids)
        return cls(
            # Rows of few elements too are spread out: nearly equal ones lose digits anywhere.
            torch.from_numpy(linear.x).clamp(-2, 2) + 1 + 6 * (torch.arange(inputs) % 2),
            gain,
            shift,
            torch.from_numpy(linear.weight) / inputs**0.5,
            torch.from_numpy(linear.bias),
            LayerMasks(*map(pack_bits, kept), ids),
            LayerMasks(*linear.bits, ids),
            torch.from_numpy(linear.output_gradient),
            torch.randn(groups, rows, inputs, generator=generator).double(),
        )

    def masks_on(self, device: torch.device) -> tuple[LayerMasks, LayerMasks]:
        """Those of the LayerNorm and of the layer, with one tensor of ids."""
        found = []
        for masks in (self.norm_masks, self.masks):
            bits = (None if t is None else t.to(device) for t in masks.bits[:2])
            found.append(LayerMasks(*bits, None))
        ids = None if self.masks.task_ids is None else self.masks.task_ids.to(device)
        return tuple(replace(masks, task_ids=ids) for masks in found)


def computed(
    backend: Backend,
    problem: Problem,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    relu: bool = False,
    of_groups: bool | str = False,
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """y and all gradients; those of parameters of each group, written in place, or summed."""
    names = ["x", "gain", "shift", "weight", *(["bias"] if problem.bias is not None else [])]
    leaves = {n: getattr(problem, n).to(device, dtype).clone().requires_grad_() for n in names}
    operands = [leaves.get(name) for name in ("x", "gain", "shift", "weight", "bias")]
    rows = 1 if of_groups == "summed" else len(problem.x)
    outs = {
        n: torch.full((rows, *leaf.shape), torch.nan, device=device, dtype=dtype)
        for n, leaf in leaves.items()
        if n != "x"
    }
    masks = problem.masks_on(device)
    if of_groups:
        pairs = (outs["gain"], outs["shift"]), (outs["weight"], outs.get("bias"))
        masks = [replace(m, group_gradients=out) for m, out in zip(masks, pairs, strict=True)]
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        y, residual = backend.norm_linear(*operands, *masks, relu=relu)
    given = problem.dy.to(y), problem.d_residual.to(residual)
    torch.autograd.backward((y, residual), given)
    found = {name: leaf.grad for name, leaf in leaves.items()}
    if of_groups:
        assert all(found.pop(name) is None for name in outs)
        found |= outs
    return {"y": y.detach(), **found}


def by_formulas(
    problem: Problem,
    of_groups: bool | str = False,
    passed: Tensor | None = None,
    epsilon: float = 1e-5,
) -> dict[str, Tensor]:
    """y and all gradients in float64, by the formulas.

    Args:
        passed: where a ReLU let y pass; without it there is none.
    """
    names = ["gain", "shift", "weight", *(["bias"] if problem.bias is not None else [])]
    # Parameters of each group, so that each has a gradient of its own.
    of_group = {
        n: getattr(problem, n).expand(len(problem.x), *getattr(problem, n).shape) for n in names
    }
    leaves = {name: values.clone().requires_grad_() for name, values in of_group.items()}

    def masked(name: str, bits: Tensor | None) -> Tensor:
        ids = problem.masks.task_ids
        if bits is None:
            return leaves[name]
        return leaves[name] * unpack_bits(bits[ids], leaves[name].shape[-1])

    x = problem.x.clone().requires_grad_()
    centred = x - x.mean(-1, keepdim=True)
    normalised = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
    norm_masks, masks = problem.norm_masks, problem.masks
    gain, shift = masked("gain", norm_masks.weight_bits), masked("shift", norm_masks.bias_bits)
    between = normalised * gain[:, None] + shift[:, None]
    y = between @ masked("weight", masks.weight_bits).mT
    if "bias" in leaves:
        y = y + masked("bias", masks.bias_bits)[:, None]
    if passed is not None:
        y = y * passed
    torch.autograd.backward((y, x * 1), (problem.dy, problem.d_residual))
    of_parameters = {name: leaf.grad for name, leaf in leaves.items()}
    if of_groups is not True:
        keep = of_groups == "summed"
        of_parameters = {n: grad.sum(0, keepdim=keep) for n, grad in of_parameters.items()}
    return {"y": y.detach(), "x": x.grad, **of_parameters}


def check(
    problem: Problem, found: dict[str, Tensor], relu: bool = False, of_groups: bool | str = False
) -> None:
    """Compare with the formulas in float64; ReLU lets pass what it did in the results."""
    passed = found["y"].double().cpu() > 0 if relu else None
    expected = by_formulas(problem, of_groups, passed)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        values = values.double().cpu()
        torch.testing.assert_close(values, expected[name], rtol=2e-5, atol=5e-4, msg=name)


@pytest.mark.parametrize("of_groups", [False, True, "summed"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 75, 39, 96), (3, 70, 64, 33), (2, 7, 160, 5), (2, 0, 40, 33)], ids=str
)
def test_equals_the_definition(backend, device, sizes, relu, of_groups) -> None:
    problem = Problem.random(*sizes)
    found = computed(backend, problem, device, relu=relu, of_groups=of_groups)
    check(problem, found, relu, of_groups)


@pytest.mark.parametrize("masked", [True, False])
def test_rows_of_small_variance(backend, device, masked) -> None:
    """What is added to the variance decides there what becomes of them."""
    problem = Problem.random(2, 12, 40, 8)
    problem = replace(problem, x=small_variances(problem.x)[0].float().double())
    if not masked:
        problem = replace(problem, norm_masks=NO_MASKS, masks=NO_MASKS)
    expected, other = (by_formulas(problem, epsilon=e) for e in (1e-5, 2e-5))
    found = computed(backend, problem, device)
    for name, values in expected.items():
        bound = float(values.abs().max())
        torch.testing.assert_close(found[name].double().cpu(), values, rtol=2e-5, atol=1e-6 * bound)
    for name in ("y", "x", "gain"):
        assert (other[name] - expected[name]).abs().max() > 0.01 * expected[name].abs().max()


def test_a_layer_without_a_bias(backend, device) -> None:
    problem = Problem.random(2, 9, 40, 8)
    masks = replace(problem.masks, bias_bits=None)
    problem = replace(problem, bias=None, masks=masks)
    for of_groups in (False, True):
        check(problem, computed(backend, problem, device, of_groups=of_groups), False, of_groups)


def test_without_masks_every_weight_is_active(backend, device) -> None:
    problem = Problem.random(2, 9, 40, 8)
    problem = replace(problem, norm_masks=NO_MASKS, masks=NO_MASKS)
    check(problem, computed(backend, problem, device))


@settings(
    max_examples=10,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it keeps no state
)
@given(
    groups=st.integers(1, 4),
    rows=st.integers(1, 90),
    inputs=st.integers(2, 70),
    outputs=st.integers(1, 70),
)
def test_any_shape(device, groups, rows, inputs, outputs) -> None:
    problem = Problem.random(groups, rows, inputs, outputs)
    check(problem, computed(fused_backend(device), problem, device))


@pytest.mark.parametrize("output", [0, 1])
def test_either_output_may_go_without_a_gradient(backend, device, output) -> None:
    problem = Problem.random(2, 9, 40, 8)
    operands = [
        getattr(problem, name).to(device, torch.float32).requires_grad_()
        for name in ("x", "gain", "shift", "weight", "bias")
    ]
    masks = problem.masks_on(device)
    given = (problem.dy, problem.d_residual)[output].to(device, torch.float32)
    backend.norm_linear(*operands, *masks)[output].backward(given)
    gradients = [operand.grad for operand in operands]
    if output:
        assert torch.equal(gradients[0], given)
        assert not any(gradient is not None and gradient.any() for gradient in gradients[1:])
        return
    without = replace(problem, d_residual=torch.zeros_like(problem.d_residual))
    expected = by_formulas(without)
    for gradient, name in zip(gradients, ("x", "gain", "shift", "weight", "bias"), strict=True):
        torch.testing.assert_close(gradient.double().cpu(), expected[name], rtol=2e-5, atol=5e-4)


def test_inactive_gains_and_weights_may_be_nan(backend, device) -> None:
    problem = Problem.random(2, 9, 40, 8)
    expected = computed(backend, problem, device)
    ids = problem.masks.task_ids
    for values, bits in (
        (problem.gain, problem.norm_masks.weight_bits),
        (problem.shift, problem.norm_masks.bias_bits),
        (problem.weight, problem.masks.weight_bits),
    ):
        used = unpack_bits(bits[ids], values.shape[-1]).any(0)
        assert not used.all()
        values[~used] = torch.nan
    found = computed(backend, problem, device)
    assert all(torch.equal(found[name], values) for name, values in expected.items())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_cpu_it_is_its_parts_bit_for_bit(cpu: Backend, precision, relu) -> None:
    backend, device = cpu, torch.device("cpu")
    parts = partial(norm_then_linear, backend.masked_layer_norm, backend.masked_linear)
    # rows in two chunks of the weight's gradient, and whole panels that could stay where they are
    for sizes in ((2, 700, 128, 70), (3, 50, 39, 130)):
        problem = Problem.random(*sizes)
        with backend.precision(precision, device):
            fused, other = (
                computed(operations, problem, device, relu=relu)
                for operations in (backend, replace(backend, norm_linear=parts))
            )
        assert all(torch.equal(fused[name], values) for name, values in other.items())


@pytest.mark.usefixtures("native")
def test_threads_do_not_change_the_result() -> None:
    problem, before, results = Problem.random(3, 200, 40, 70), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(computed(fused_backend("cpu"), problem, torch.device("cpu"), relu=True))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
def test_weights_may_be_of_autocasts_type(backend, device) -> None:
    problem, half = Problem.random(2, 9, 40, 8), torch.float16
    operands = [
        getattr(problem, name).to(device, half if name in ("weight", "bias") else torch.float32)
        for name in ("x", "gain", "shift", "weight", "bias")
    ]
    results = []
    for apply in (backend.norm_linear, REFERENCE.norm_linear):
        with torch.autocast(device.type, half):
            results.append(apply(*operands, *problem.masks_on(device))[0])
    assert results[0].dtype == results[1].dtype == half
    torch.testing.assert_close(*results, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiles", ["one tile of rows", "several"])
def test_products_of_halves_beside_x_of_float32(backend, device, dtype, tiles, request) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bf16 wrongly")
    if tiles == "several":
        request.getfixturevalue("stationary")
    problem = Problem.random(2, 389 if tiles == "several" else 37, 60, 40)
    exact = by_formulas(problem)
    for name, values in computed(backend, problem, device, autocast=dtype).items():
        assert values.dtype == (dtype if name == "y" else torch.float32), name
        # what is normalised, weights and gradients of y are rounded before they are multiplied
        error = (values.double().cpu() - exact[name]).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * exact[name].abs().max(), name


def test_results_repeat_bit_for_bit(backend, device) -> None:
    problem = Problem.random(3, 40, 39, 40)
    first, *others = (computed(backend, problem, device, relu=True) for _ in range(5))
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", [37, 0])
def test_every_output_is_written(device, rows) -> None:
    problem = Problem.random(3, rows, 39, 70)
    check(problem, computed(fused_backend(device), problem, device))


def test_its_weights_gradient_may_wait(device) -> None:
    problem, queue = Problem.random(9, 20, 39, 50), WeightGradients(4)
    outs = [torch.full((1, *shape), torch.nan, device=device) for shape in ((50, 39), (50,))]
    x, gain, shift, weight, bias = (
        getattr(problem, name).to(device, torch.float32).requires_grad_()
        for name in ("x", "gain", "shift", "weight", "bias")
    )
    of_norm, of_layer = problem.masks_on(device)
    of_layer = replace(of_layer, group_gradients=tuple(outs), queue=queue)
    y, _ = fused_backend(device).norm_linear(x, gain, shift, weight, bias, of_norm, of_layer)
    y.backward(problem.dy.to(y))
    queue.finish()
    expected = computed(REFERENCE, problem, torch.device("cpu"), torch.float64)
    for out, name in zip(outs, ("weight", "bias"), strict=True):
        torch.testing.assert_close(out[0].double().cpu(), expected[name], rtol=2e-5, atol=5e-4)


def test_the_registered_operation_keeps_pytorchs_rules(device) -> None:
    problem = Problem.random(2, 5, 39, 4)
    x, gain, shift, weight, bias = (
        getattr(problem, name).to(device, torch.float32)
        for name in ("x", "gain", "shift", "weight", "bias")
    )
    of_norm, of_layer = problem.masks_on(device)
    norm = x, gain, shift, *of_norm.bits[:2]
    for dtype in (torch.float32, torch.bfloat16):
        operands = *norm, weight, bias, *of_layer.bits, 1e-5, True, dtype
        torch.library.opcheck(torch.ops.harmodt.norm_linear, operands)


def test_it_compiles_whole(backend, device) -> None:
    problem = Problem.random(2, 5, 39, 4)
    plain = computed(backend, problem, device)
    compiled = torch.compile(backend.norm_linear, fullgraph=True, backend="aot_eager")
    found = computed(replace(backend, norm_linear=compiled), problem, device)
    for name, values in plain.items():
        torch.testing.assert_close(found[name], values)


def test_operands_that_do_not_fit_are_named(device) -> None:
    problem = Problem.random(2, 5, 39, 4)
    operands = [
        getattr(problem, name).to(device, torch.float32)
        for name in ("x", "gain", "shift", "weight", "bias")
    ]
    masks = problem.masks_on(device)
    apply = fused_backend(device).norm_linear
    x, gain, *rest = operands
    with pytest.raises(ValueError, match=r"gain has shape \[38\]: with x \[2, 5, 39\]"):
        apply(x, gain[1:], *rest, *masks)
    with pytest.raises(ValueError, match=r"weight_bits has shape \[3, 4, 2\]"):
        apply(x, gain, rest[0], rest[1][1:], rest[2][1:], *masks)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        apply(x.double(), gain, *rest, *masks)
    other = replace(masks[0], task_ids=masks[0].task_ids.clone())
    with pytest.raises(ValueError, match="different task_ids"):
        apply(x, gain, *rest, other, masks[1])
    wanted = r"weight is torch\.float16: it must be torch\.float32 or torch\.bfloat16"
    with torch.autocast(x.device.type, torch.bfloat16), pytest.raises(TypeError, match=wanted):
        apply(x, gain, rest[0], rest[1].half(), rest[2], *masks)
