from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import metadata

import numpy as np
import pytest
import torch
from problems import ADAMW, LEARNING_RATE
from torch import Tensor

from harmodt_kernels import REFERENCE, Backend, fused_backend, lr_and_corrections_at, pack_bits
from harmodt_kernels.masked_adamw.reference import clipped

# numpy's, where the interpreter computes with infinity
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OLD_TRITON = tuple(map(int, metadata.version("triton").split(".")[:2])) < (3, 9)

IMPLEMENTATIONS = ["reference", "triton", "cpu"]  # the definition is PyTorch's quickest


def _vectors(count: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=dtype)


def _precisions(backend: Backend) -> list[tuple[torch.dtype, float]]:
    """The dtypes that a backend takes, and their rounding errors."""
    float32 = (torch.float32, 1e-5)
    return [float32, (torch.float64, 1e-12)] if backend is REFERENCE else [float32]


def _torch_adamw(
    weights: Tensor, gradients: Sequence[Tensor], max_norm: float
) -> tuple[Tensor, dict[str, Tensor]]:
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=LEARNING_RATE,
        betas=ADAMW["betas"],
        eps=ADAMW["epsilon"],
        weight_decay=ADAMW["weight_decay"],
    )
    for gradient in gradients:
        parameter.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([parameter], max_norm)
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


@pytest.mark.parametrize("max_norm", [math.inf, 0.25, 40.0])
@pytest.mark.parametrize("size", [32, 96, 1100])
def test_with_every_weight_active_it_is_pytorchs_adamw(backend, device, size, max_norm) -> None:
    for dtype, error in _precisions(backend):
        gradients = _vectors(5, size, dtype=dtype).to(device)
        weights = _vectors(1, size, 1, dtype)[0].to(device)
        first, second = torch.zeros_like(weights), torch.zeros_like(weights)
        expected, state = _torch_adamw(weights, gradients, max_norm)
        for step, gradient in enumerate(gradients, 1):
            expected_norm = torch.linalg.vector_norm(gradient)
            norm = backend.masked_adamw(
                weights,
                gradient,
                first,
                second,
                None,
                None,
                _rates(weights, step),
                max_norm=max_norm,
                **ADAMW,
            )
            torch.testing.assert_close(norm, expected_norm)
        torch.testing.assert_close(weights, expected, rtol=error, atol=error)
        torch.testing.assert_close(first, state["exp_avg"], rtol=error, atol=error)
        torch.testing.assert_close(second, state["exp_avg_sq"], rtol=error, atol=error)


def test_weights_that_are_active_now_and_then_skip_the_other_steps(backend, device) -> None:
    size, steps = 40, 8
    for dtype, error in _precisions(backend):
        gradients = _vectors(steps, size, dtype=dtype).to(device)
        active = (_vectors(steps, size, 2) > 0).to(device)
        weights = _vectors(1, size, 1, dtype)[0].to(device)
        first, second = torch.zeros_like(weights), torch.zeros_like(weights)
        w, m, v = (values.tolist() for values in (weights, first, second))
        for step in range(1, steps + 1):
            gradient, now = gradients[step - 1], active[step - 1]
            masks = _of_one_task(now)
            backend.masked_adamw(
                weights, gradient, first, second, *masks, _rates(weights, step), **ADAMW
            )
            for j in range(size):
                if now[j]:
                    g = float(gradient[j])
                    m[j] = 0.9 * m[j] + 0.1 * g
                    v[j] = 0.999 * v[j] + 0.001 * g * g
                    moved = m[j] / (1 - 0.9**step) / (math.sqrt(v[j] / (1 - 0.999**step)) + 1e-8)
                    w[j] -= 0.01 * (moved + 0.1 * w[j])
        for computed, expected in ((weights, w), (first, m), (second, v)):
            np.testing.assert_allclose(computed.cpu().numpy(), expected, error, error / 1000)


@pytest.mark.parametrize(
    "odd",
    [
        torch.tensor([-0.3, 0.7, 1.0, 2.5]),
        torch.tensor([1e-45, -1e-45, 1e-39, -1e-38]),
        torch.tensor([-0.0, 0.0, 1.0]),
        torch.tensor([-3e38, 3e38, 1.0]),
        torch.tensor([0x7F800000, 0x7FC01234, 0x7F800001, 0xFFFFFFFF]).int().view(torch.float32),
    ],
    ids=["ordinary", "denormal", "signed zeros", "huge", "infinity and NaN"],
)
def test_inactive_weights_and_moments_stay_bit_for_bit(backend, device, odd: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    size = 4096
    weights, first, second = (
        odd[torch.randint(len(odd), (size,), generator=generator)].to(device) for _ in range(3)
    )
    second = second.abs()
    gradient = torch.randn(size, generator=generator)
    active = torch.rand(size, generator=generator) < 0.5
    gradient[~active & (torch.arange(size) % 3 == 0)] = 0.0
    gradient[~active & (torch.arange(size) % 3 == 1)] = -0.0
    gradient, active = gradient.to(device), active.to(device)
    before = weights.clone(), first.clone(), second.clone()
    masks = _of_one_task(active)
    backend.masked_adamw(weights, gradient, first, second, *masks, _rates(weights, 7), **ADAMW)
    for name, new, old in zip(
        ("weight", "first moment", "second moment"), (weights, first, second), before, strict=True
    ):
        changed = (new.view(torch.int32) != old.view(torch.int32)) & ~active
        assert not changed.any(), f"{name}: {old[changed][:5]} became {new[changed][:5]}"
    assert (weights.view(torch.int32) != before[0].view(torch.int32))[active].any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inactive_weights_may_hold_anything(backend, device, value: float) -> None:
    weights = torch.full((64,), value, device=device)
    gradient = torch.ones(64, device=device)
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    weights[:32] = 1.0
    kept = weights[32:].clone()
    active = torch.arange(64, device=device) < 32
    masks = _of_one_task(active)
    backend.masked_adamw(weights, gradient, first, second, *masks, _rates(weights), **ADAMW)
    assert torch.equal(weights[32:].view(torch.int32), kept.view(torch.int32))
    assert (weights[:32] < 1.0).all()


def test_a_gradient_of_nan_is_not_hidden(backend, device) -> None:
    weights, first, second = torch.ones(3, 64, device=device)
    gradient = torch.ones(64, device=device)
    gradient[5] = math.nan  # and so is the norm
    norm = backend.masked_adamw(
        weights, gradient, first, second, None, None, _rates(weights), max_norm=0.25, **ADAMW
    )
    assert norm.isnan()
    assert weights.isnan().all()


def test_the_gradient_stays_as_it_is(backend, device) -> None:
    state = _random_state(100, device)
    before = state[1].clone()
    backend.masked_adamw(*state, max_norm=0.01, **ADAMW)
    assert torch.equal(state[1], before)


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("limit", [1e-6, 0.25, 3.0])
def test_clipping_is_pytorchs(scale: float, limit: float) -> None:
    gradient = _vectors(1, 100, dtype=torch.float32)[0] * scale
    parameter = torch.nn.Parameter(torch.zeros(100))
    parameter.grad = gradient.clone()
    expected_norm = torch.nn.utils.clip_grad_norm_([parameter], limit)
    scaled, norm = clipped(gradient, limit)
    torch.testing.assert_close(norm, expected_norm)
    torch.testing.assert_close(scaled, parameter.grad, rtol=1e-5, atol=0.0)


def _rates(weights: Tensor, step: int = 1, betas: tuple[float, float] = ADAMW["betas"]) -> Tensor:
    """The rates of a step, as precise as the weights."""
    rates = lr_and_corrections_at(step, LEARNING_RATE, betas)
    return torch.tensor(rates, dtype=weights.dtype, device=weights.device)


def _of_one_task(active: Tensor) -> tuple[Tensor, Tensor]:
    """The masks of two tasks, the second of which is `active`, and its id."""
    bits = pack_bits(torch.stack((~active, active)))
    return bits, torch.ones(1, dtype=torch.int64, device=active.device)


def _random_state(
    size: int, device: torch.device, betas: tuple[float, float] = ADAMW["betas"]
) -> list[Tensor]:
    """All operands of a third step: of two of three tasks, whose masks end before the weights."""
    weights, gradient, first, second = _vectors(4, size, dtype=torch.float32).to(device)
    masks = pack_bits(_vectors(3, size * 3 // 4, 5).to(device) > 0.3)
    task_ids = torch.tensor([2, 0], device=device)
    return [weights, gradient, first, second.abs(), masks, task_ids, _rates(weights, 3, betas)]


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.4, 0.0)], ids=str)
@pytest.mark.parametrize("max_norm", [math.inf, 1e3, 0.25])
@pytest.mark.parametrize("size", [31, 64, 3000])
def test_backends_agree_rounding_for_rounding(
    device, implementation, size, max_norm, betas
) -> None:
    states = [_random_state(size, device, betas) for _ in range(2)]
    before, gradient = (tensor.clone() for tensor in states[0][:2])
    settings = ADAMW | {"betas": betas, "max_norm": max_norm}
    fused_norm = fused_backend(device).masked_adamw(*states[0], **settings)
    norm = REFERENCE.masked_adamw(*states[1], **settings)
    weights, fused_gradient, first, second, *_ = states[0]
    assert torch.equal(fused_norm, norm)
    assert torch.equal(fused_gradient, gradient)
    # Before 3.9, Triton's interpreter rounded twice in a fused multiply-add.
    error = 1e-6 if implementation == "triton" and device.type == "cpu" and OLD_TRITON else 0.0
    torch.testing.assert_close(first, states[1][2], rtol=error, atol=error / 4)
    torch.testing.assert_close(second, states[1][3], rtol=error, atol=error / 4)
    # PyTorch's square root on a CPU may be one unit in the last place off, which counts where a
    # weight and its change all but cancel.
    change = states[1][0] - before
    bound = (4 * torch.finfo(torch.float32).eps + error) * (before.abs() + change.abs())
    assert ((weights - states[1][0]).abs() <= bound).all()


@pytest.mark.parametrize("covered", [0, 64, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_first_weights_are_written_rounded(backend, device, dtype, covered) -> None:
    if backend.name == "triton-interpreter" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter rounds to bf16 wrongly")
    state = _random_state(100, device)
    alone = [tensor.clone() for tensor in state]
    bf16_copy = torch.full((120,), 7.0, dtype=dtype, device=device)
    backend.masked_adamw(*state, max_norm=0.25, bf16_copy=bf16_copy[:covered], **ADAMW)
    backend.masked_adamw(*alone, max_norm=0.25, **ADAMW)
    assert all(map(torch.equal, state, alone))
    assert torch.equal(bf16_copy[:covered], state[0][:covered].to(dtype))  # inactive ones as well
    assert (bf16_copy[covered:] == 7).all()


def test_five_runs_give_the_same(device) -> None:
    results = []
    for _ in range(5):
        state = _random_state(5000, device)
        fused_backend(device).masked_adamw(*state, max_norm=0.5, **ADAMW)
        results.append(state)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_operation_composes(device) -> None:
    state = _random_state(100, device)
    norm = torch.linalg.vector_norm(state[1])
    floats = (0.25, 0.1, 0.001, 1e-8, 0.1)
    operation, bf16_copy = torch.ops.harmodt.masked_adamw.default, state[0][:64].half()
    torch.library.opcheck(operation, (*state, norm, *floats))
    torch.library.opcheck(operation, (*state, norm, *floats, bf16_copy))


def test_it_compiles_into_one_graph(device) -> None:
    fused = fused_backend(device).masked_adamw
    states = [_random_state(100, device) for _ in range(2)]

    def step(*state: Tensor) -> Tensor:
        return fused(*state, max_norm=0.25, **ADAMW)

    norm = step(*states[0])
    compiled_norm = torch.compile(step, fullgraph=True, backend="aot_eager")(*states[1])
    assert torch.equal(norm, compiled_norm)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_operands_that_do_not_fit_are_refused(device) -> None:
    state = _random_state(64, device)
    for place, other, error, message in (
        (0, state[0].double(), TypeError, "weights is torch.float64"),
        (4, state[4].long(), TypeError, "mask_bits is torch.int64"),
        (1, state[1][:32], ValueError, r"gradient has shape \[32\]: with weights \[64\] .* \[64\]"),
        (4, state[4][0], ValueError, r"mask_bits has shape \[2\]: it must be \[any, 0 to 2\]"),
        (4, state[4].repeat(1, 2), ValueError, r"mask_bits has shape \[3, 4\]"),
        (4, state[4].repeat(1, 2)[:, ::2], ValueError, "mask_bits has strides"),
        (5, None, ValueError, "mask_bits needs the tasks of the step"),
        (5, state[5].int(), TypeError, "task_ids is torch.int32"),
        (5, state[5].repeat(2)[::2], ValueError, "task_ids has strides"),
        (6, state[6][:2], ValueError, r"lr_and_corrections has shape \[2\]"),
        (2, state[2].repeat(2)[::2], ValueError, "first_moment has strides"),
    ):
        wrong = [other if i == place else operand for i, operand in enumerate(state)]
        with pytest.raises(error, match=message):
            fused_backend(device).masked_adamw(*wrong, **ADAMW)
    for bf16_copy, error, message in (
        (torch.zeros(64, dtype=torch.int16), TypeError, "bf16_copy is torch.int16"),
        (torch.zeros(65), ValueError, r"bf16_copy has shape \[65\]: it must be \[0 to 64\]"),
        (torch.zeros(64)[::2], ValueError, "bf16_copy has strides"),
        (torch.zeros(64, device="meta"), ValueError, "bf16_copy is on meta"),
    ):
        with pytest.raises(error, match=message):
            fused_backend(device).masked_adamw(*state, bf16_copy=bf16_copy, **ADAMW)


def test_a_weight_is_active_in_any_task_of_the_step_and_beyond_the_masks(backend, device) -> None:
    masks = torch.tensor([[1, 8], [2, 0], [4, 0]], dtype=torch.int32, device=device)
    for tasks, active in (
        ([0], [0, 35]),
        ([2, 1, 2], [1, 2]),
        ([0, 1], [0, 1, 35]),
        ([0] * 40 + [1], [0, 1, 35]),  # more masks than a program loads at a time
    ):
        weights, gradient = torch.ones(2, 70, device=device)
        first, second = torch.zeros(2, 70, device=device)
        task_ids, rates = torch.tensor(tasks, device=device), _rates(weights)
        backend.masked_adamw(weights, gradient, first, second, masks, task_ids, rates, **ADAMW)
        for changed in (weights != 1, first != 0, second != 0):
            assert changed.nonzero()[:, 0].tolist() == [*active, *range(64, 70)]
