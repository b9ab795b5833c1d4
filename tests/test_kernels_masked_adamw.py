from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from harmodt_kernels import clip_gradient, masked_adamw, pack_bits

SETTINGS = {"learning_rate": 0.01, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.1}


def _vectors(count: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=dtype)


def _torch_adamw(weights: Tensor, gradients: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=SETTINGS["learning_rate"],
        betas=SETTINGS["betas"],
        eps=SETTINGS["epsilon"],
        weight_decay=SETTINGS["weight_decay"],
    )
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_with_every_weight_active_it_is_pytorchs_adamw(dtype, error) -> None:
    gradients = _vectors(10, 96, dtype=dtype)
    weights, first, second = _vectors(1, 96, 1, dtype)[0], *torch.zeros(2, 96, dtype=dtype)
    expected, state = _torch_adamw(weights, gradients)
    everything = pack_bits(torch.ones(96, dtype=torch.bool))
    for step, gradient in enumerate(gradients, 1):
        masked_adamw(weights, gradient, first, second, everything, step=step, **SETTINGS)
    torch.testing.assert_close(weights, expected, rtol=error, atol=error)
    torch.testing.assert_close(first, state["exp_avg"], rtol=error, atol=error)
    torch.testing.assert_close(second, state["exp_avg_sq"], rtol=error, atol=error)


def test_weights_that_are_active_now_and_then_skip_the_other_steps() -> None:
    size, steps = 40, 8
    gradients = _vectors(steps, size)
    active = _vectors(steps, size, 2) > 0
    weights, first, second = _vectors(1, size, 1)[0], *torch.zeros(2, size, dtype=torch.float64)
    w, m, v = (values.tolist() for values in (weights, first, second))
    for step in range(1, steps + 1):
        gradient, now = gradients[step - 1], active[step - 1]
        masked_adamw(weights, gradient, first, second, pack_bits(now), step=step, **SETTINGS)
        for j in range(size):
            if now[j]:
                g = float(gradient[j])
                m[j] = 0.9 * m[j] + 0.1 * g
                v[j] = 0.999 * v[j] + 0.001 * g * g
                moved = m[j] / (1 - 0.9**step) / (math.sqrt(v[j] / (1 - 0.999**step)) + 1e-8)
                w[j] -= 0.01 * (moved + 0.1 * w[j])
    for computed, expected in ((weights, w), (first, m), (second, v)):
        np.testing.assert_allclose(computed.numpy(), expected, 1e-12, 1e-15)


@pytest.mark.parametrize(
    "values",
    [[-0.3, 0.7, 1.0, 2.5], [1e-45, -1e-45, 1e-39, -1e-38], [-0.0, 0.0, 1.0], [-3e38, 3e38, 1.0]],
    ids=["ordinary", "denormal", "signed zeros", "huge"],
)
def test_inactive_weights_and_moments_stay_bit_for_bit(values: list[float]) -> None:
    odd = torch.tensor(values)
    generator = torch.Generator().manual_seed(0)
    size = 4096
    weights, first, second = (
        odd[torch.randint(len(odd), (size,), generator=generator)] for _ in range(3)
    )
    second = second.abs()
    gradient = torch.randn(size, generator=generator)
    active = torch.rand(size, generator=generator) < 0.5
    gradient[~active & (torch.arange(size) % 3 == 0)] = 0.0
    gradient[~active & (torch.arange(size) % 3 == 1)] = -0.0
    before = weights.clone(), first.clone(), second.clone()
    masked_adamw(weights, gradient, first, second, pack_bits(active), step=7, **SETTINGS)
    for name, new, old in zip(
        ("weight", "first moment", "second moment"), (weights, first, second), before, strict=True
    ):
        changed = (new.view(torch.int32) != old.view(torch.int32)) & ~active
        assert not changed.any(), f"{name}: {old[changed][:5]} became {new[changed][:5]}"
    assert (weights != before[0])[active].any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inactive_weights_may_hold_anything(value: float) -> None:
    weights, gradient = torch.full((64,), value), torch.ones(64)
    first, second = torch.zeros(64), torch.zeros(64)
    weights[:32] = 1.0
    active = torch.arange(64) < 32
    masked_adamw(weights, gradient, first, second, pack_bits(active), step=1, **SETTINGS)
    assert torch.equal(weights[32:].view(torch.int32), torch.full((32,), value).view(torch.int32))
    assert (weights[:32] < 1.0).all()


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("limit", [1e-6, 0.25, 3.0])
def test_clipping_is_pytorchs(scale: float, limit: float) -> None:
    gradient = _vectors(1, 100, dtype=torch.float32)[0] * scale
    parameter = torch.nn.Parameter(torch.zeros(100))
    parameter.grad = gradient.clone()
    expected_norm = torch.nn.utils.clip_grad_norm_([parameter], limit)
    norm = clip_gradient(gradient, limit)
    torch.testing.assert_close(norm, expected_norm)
    torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=0.0)
