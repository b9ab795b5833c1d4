"""Times the selection of 100 weights that leave and 100 that enter each task's mask, HarmoDT-F.

    pytest bench/bench_harmony_selection.py --benchmark-only

The paper's model has 1.19 M maskable weights at d = 128 and 4.74 M at d = 256. The paths:

    fused            the kernels, which store no matrix of scores; they also count signs
    reference        computes the scores of one task at a time
    scores + topk    computes the scores of all tasks, then torch.topk twice; it counts no signs and
                     does not check for NaN

The minimum (floor) is to read both gradients of every task once, 8 bytes per task and weight.
`share_of_floor` assumes the rate at which the device sums a large vector.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from measuring import DEVICE, ON_GPU, fused, measure, note_floor, random_masks, timer
from torch import Tensor

from harmodt_kernels import REFERENCE, Selection, unpack_bits

WEIGHTS = {128: 1_189_888, 256: 4_739_072}  # P by d
COUNT = 100
BALANCE = 10.0
CASES = [(5, 128), (50, 128), (5, 256)] + ([(50, 256)] if ON_GPU else [])

pytestmark = pytest.mark.benchmark(timer=timer)


@dataclass
class Problem:
    """The operands of `select_harmony`."""

    mask_bits: Tensor  # [T, P / 32]
    maskable_bits: Tensor  # [P / 32]
    weights: Tensor  # [P]
    masked_gradients: Tensor  # [T, P]
    dense_gradients: Tensor  # [T, P]
    mean_gradient: Tensor  # [P]
    losses: Tensor  # [T]

    @classmethod
    def random(cls, tasks: int, weights: int) -> Problem:
        torch.manual_seed(0)
        mask_bits = random_masks(tasks, weights // 32)
        dense_gradients = torch.randn(tasks, weights, device=DEVICE)
        masked_gradients = torch.randn(tasks, weights, device=DEVICE)
        for gradient, bits in zip(masked_gradients, mask_bits, strict=True):
            gradient.masked_fill_(~unpack_bits(bits, weights), 0.0)
        return cls(
            mask_bits,
            torch.full_like(mask_bits[0], -1),
            torch.randn(weights, device=DEVICE),
            masked_gradients,
            dense_gradients,
            masked_gradients.mean(0),
            torch.rand(tasks, device=DEVICE) + 0.1,
        )

    def select(self, select_harmony: Any) -> Selection:
        return select_harmony(
            self.mask_bits,
            self.maskable_bits,
            self.weights,
            self.masked_gradients,
            self.dense_gradients,
            self.mean_gradient,
            self.losses,
            count=COUNT,
            balance=BALANCE,
            importance="fisher",
        )


def scores_and_topk(
    mask_bits: Tensor,
    maskable_bits: Tensor,
    weights: Tensor,
    masked_gradients: Tensor,
    dense_gradients: Tensor,
    mean_gradient: Tensor,
    losses: Tensor,
    *,
    count: int,
    balance: float,
    importance: str,
) -> Selection:
    """The selection from whole matrices [T, P] without padding (Eq. 8 to 12)."""
    active = unpack_bits(mask_bits, len(weights))
    fisher = (masked_gradients / losses[:, None]).square()
    harmony = masked_gradients * mean_gradient + balance * fisher
    leaving = torch.where(active, harmony, torch.inf).topk(count, largest=False).indices
    agreement = dense_gradients * mean_gradient
    entering = torch.where(active, -torch.inf, agreement).topk(count).indices
    moved = losses.new_full(losses.shape, count, dtype=torch.int64)
    return Selection(leaving, entering, moved, *moved.new_zeros(3, len(moved)))


@functools.lru_cache(maxsize=1)  # all paths of a case share the problem
def problem_and_result(tasks: int, weights: int) -> tuple[Problem, Selection]:
    problem = Problem.random(tasks, weights)
    return problem, problem.select(REFERENCE.select_harmony)


@pytest.mark.parametrize("path", ["fused", "reference", "scores + topk"])
@pytest.mark.parametrize(("tasks", "d"), CASES)
def bench_harmony_selection(benchmark: Any, tasks: int, d: int, path: str) -> None:
    if path == "fused":
        select_harmony = fused().select_harmony
    else:
        select_harmony = REFERENCE.select_harmony if path == "reference" else scores_and_topk
    weights = 32 * 1024 if benchmark.disabled else WEIGHTS[d]
    problem, expected = problem_and_result(tasks, weights)
    actual = problem.select(select_harmony)
    for one, other in zip(actual[:2], expected[:2], strict=True):  # the order within a row is free
        assert torch.equal(one.sort().values, other.sort().values)
    assert torch.equal(actual.moved, expected.moved)
    benchmark.group = f"harmony selection: {tasks} tasks, {weights / 1e6:.2f} M weights"
    measure(benchmark, lambda: problem.select(select_harmony))
    note_floor(benchmark, problem.masked_gradients.nbytes + problem.dense_gradients.nbytes)
