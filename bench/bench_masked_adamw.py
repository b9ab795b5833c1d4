"""Times an optimiser step: it clips the gradient's norm, then AdamW moves the active weights.

    pytest bench/bench_masked_adamw.py --benchmark-only

The sizes are those of the paper's models at d = 128 and 256 and, on a GPU, one that no cache holds.
The paths:

    fused        one kernel after the norm
    reference    plain PyTorch
    dense        clip_grad_norm_ and torch.optim.AdamW(fused=True), without masks

The minimum (floor) is to read the gradient for its norm, then to read weight, gradient and both
moments, and to write all of them except the gradient: 32 bytes per weight, plus the bits.
`share_of_floor` assumes the rate at which the device sums a large vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from measuring import DEVICE, ON_GPU, fused, measure, note_floor, random_masks, timer
from torch import Tensor, nn

from harmodt_kernels import REFERENCE, lr_and_corrections_at, unpack_bits

SIZES = [1_458_720, 5_276_704] + ([75_000_000] if ON_GPU else [])
MAX_NORM = 0.25
ADAMW = {"betas": (0.9, 0.999), "weight_decay": 1e-4}

pytestmark = pytest.mark.benchmark(timer=timer)


@dataclass
class Problem:
    """The operands of a first step. The gradient of a weight that no task uses is 0.

    All of them are on the device before a call is timed: to send one would make the host wait.
    """

    weights: Tensor  # [P]
    gradient: Tensor
    first_moment: Tensor
    second_moment: Tensor
    active_bits: Tensor  # [P / 32]
    task_ids: Tensor  # [1]
    rates: Tensor  # [3], the learning rate and the bias corrections

    @classmethod
    def random(cls, size: int) -> Problem:
        torch.manual_seed(0)
        active_bits = random_masks(size // 32)
        gradient = torch.randn(size, device=DEVICE)
        gradient.masked_fill_(~unpack_bits(active_bits, size), 0.0)
        weights = torch.randn(size, device=DEVICE)
        moments = (torch.zeros(size, device=DEVICE) for _ in range(2))
        rates = torch.tensor(lr_and_corrections_at(1, 1e-3, ADAMW["betas"]), device=DEVICE)
        task_ids = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        return cls(weights, gradient, *moments, active_bits, task_ids, rates)

    def step(self, masked_adamw: Any) -> None:
        masked_adamw(
            self.weights,
            self.gradient,
            self.first_moment,
            self.second_moment,
            self.active_bits[None],
            self.task_ids,
            self.rates,
            epsilon=1e-8,
            max_norm=MAX_NORM,
            **ADAMW,
        )


class DenseAdamW:
    """PyTorch's own step on the same weights and gradient."""

    def __init__(self, problem: Problem):
        self._parameter = nn.Parameter(problem.weights)
        self._parameter.grad = problem.gradient
        self._optimiser = torch.optim.AdamW(
            [self._parameter], lr=1e-3, eps=1e-8, fused=True, **ADAMW
        )

    def step(self) -> None:
        nn.utils.clip_grad_norm_([self._parameter], MAX_NORM)
        self._optimiser.step()


@pytest.mark.parametrize("path", ["fused", "reference", "dense"])
@pytest.mark.parametrize("size", SIZES)
def bench_masked_adamw(benchmark: Any, size: int, path: str) -> None:
    size = 32 * 1024 if benchmark.disabled else size
    problem, expected = Problem.random(size), Problem.random(size)
    if path == "dense":
        step = DenseAdamW(problem).step
    else:
        masked_adamw = (fused() if path == "fused" else REFERENCE).masked_adamw

        def step() -> None:
            problem.step(masked_adamw)

    before = problem.weights.clone()
    step()
    expected.step(REFERENCE.masked_adamw)
    active = unpack_bits(problem.active_bits, size)
    assert not torch.equal(problem.weights[active], before[active])
    torch.testing.assert_close(problem.weights[active], expected.weights[active], rtol=0, atol=1e-6)
    if path != "dense":
        assert torch.equal(problem.weights[~active], before[~active])
    benchmark.group = f"masked AdamW: {size / 1e6:.2f} M weights"
    measure(benchmark, step)
    note_floor(benchmark, 32 * size + problem.active_bits.nbytes)
