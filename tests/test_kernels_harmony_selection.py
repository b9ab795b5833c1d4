from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmodt_kernels import pack_bits, select_harmony, unpack_bits

RULES = [
    (importance, rule) for importance in ("fisher", "magnitude") for rule in ("paper", "upstream")
]


@dataclass
class Problem:
    """Operands of a selection.

    Small integers, and powers of two where something is divided, are exact in float32; they also
    make nearly every score tie with others.
    """

    masks: np.ndarray
    maskable: np.ndarray
    weights: np.ndarray
    masked_gradients: np.ndarray
    dense_gradients: np.ndarray
    losses: np.ndarray
    balance: float

    @classmethod
    def random(cls, seed: int, tasks: int, words: int) -> Problem:
        rng = np.random.default_rng(seed)
        shape = (tasks, 32 * words)
        maskable = rng.random(shape[1]) < rng.choice([0.3, 0.9, 1.0])
        masks = (rng.random(shape) < rng.choice([0.0, 0.1, 0.8, 1.0])) & maskable
        span = rng.integers(1, 4)
        return cls(
            masks=masks,
            maskable=maskable,
            weights=rng.integers(-span, span, shape[1], endpoint=True).astype(np.float32),
            masked_gradients=(
                rng.integers(-span, span, shape, endpoint=True) * masks * rng.choice([1, 8])
            ).astype(np.float32),
            dense_gradients=rng.integers(-span, span, shape, endpoint=True).astype(np.float32),
            losses=(2.0 ** rng.integers(-2, 3, tasks)).astype(np.float32),
            balance=float(2.0 ** rng.integers(-3, 5)),
        )

    def select(self, count: int, importance: str, rule: str) -> tuple[np.ndarray, np.ndarray]:
        """The masks after the selection, whose padding was seen to stay 0, and what moved."""
        bits = pack_bits(torch.from_numpy(self.masks))
        maskable_bits = pack_bits(torch.from_numpy(self.maskable))
        moved = select_harmony(
            bits,
            maskable_bits,
            *(
                torch.from_numpy(values)
                for values in (
                    self.weights,
                    self.masked_gradients,
                    self.dense_gradients,
                    self.losses,
                )
            ),
            count=count,
            balance=self.balance,
            importance=importance,
            rule=rule,
        )
        assert not (bits & ~maskable_bits).any()
        return unpack_bits(bits, len(self.weights)).numpy(), moved.numpy()

    def expected(self, count: int, importance: str, rule: str) -> tuple[np.ndarray, np.ndarray]:
        """The same by sorting whole vectors in float64, index after score."""
        masks, moved = self.masks.copy(), np.zeros(len(self.masks), int)
        mean = self.masked_gradients.astype(np.float64).mean(0)
        index = np.arange(len(self.weights))
        for i, active in enumerate(self.masks):
            gradient = self.masked_gradients[i].astype(np.float64)
            if importance == "magnitude":
                score = np.abs(self.weights.astype(np.float64) * active)
            else:
                score = (gradient / float(self.losses[i] if rule == "paper" else 1.0)) ** 2
            agreement = gradient * mean
            harmony = (
                agreement + self.balance * score
                if rule == "paper"
                else self.balance * agreement + score
            )
            recovery = self.dense_gradients[i] * mean
            leaving = [j for j in np.lexsort((index, harmony)) if active[j]]
            entering = [
                j
                for j in np.lexsort((index, -recovery))
                if self.maskable[j] and not self.masks[i, j]
            ]
            moved[i] = min(count, len(leaving), len(entering))
            masks[i, leaving[: moved[i]]] = False
            masks[i, entering[: moved[i]]] = True
        return masks, moved


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    tasks=st.sampled_from([1, 2, 4]),
    words=st.integers(1, 6),
    count=st.integers(0, 120),
    kind=st.sampled_from(RULES),
)
def test_selection_equals_a_sort_with_ties_by_index(seed, tasks, words, count, kind) -> None:
    problem = Problem.random(seed, tasks, words)
    masks, moved = problem.select(count, *kind)
    expected_masks, expected_moved = problem.expected(count, *kind)
    np.testing.assert_array_equal(moved, expected_moved)
    np.testing.assert_array_equal(masks, expected_masks)
    np.testing.assert_array_equal(masks.sum(1), problem.masks.sum(1))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 40), kind=st.sampled_from(RULES))
def test_what_leaves_does_not_come_back_in_the_same_update(seed, count, kind) -> None:
    problem = Problem.random(seed, 4, 4)
    masks, moved = problem.select(count, *kind)
    np.testing.assert_array_equal((problem.masks & ~masks).sum(1), moved)
    np.testing.assert_array_equal((masks & ~problem.masks).sum(1), moved)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(RULES))
def test_random_floats_keep_the_number_of_active_weights(seed, kind) -> None:
    problem = Problem.random(seed, 3, 4)
    rng = np.random.default_rng(seed)
    for _ in range(4):
        scale = 10.0 ** rng.integers(-30, 12, problem.masks.shape)
        problem.dense_gradients = (rng.normal(size=scale.shape) * scale).astype(np.float32)
        problem.masked_gradients = problem.dense_gradients * problem.masks
        masks, moved = problem.select(20, *kind)
        np.testing.assert_array_equal(masks.sum(1), problem.masks.sum(1))
        np.testing.assert_array_equal((problem.masks & ~masks).sum(1), moved)
        problem.masks = masks


def test_more_than_all_candidates_are_exchanged() -> None:
    problem = Problem.random(0, 2, 2)
    problem.maskable = np.arange(64) < 60
    problem.masks = np.stack([np.arange(64) < 50, np.arange(64) < 3])
    masks, moved = problem.select(1000, "fisher", "paper")
    assert moved.tolist() == [10, 3]
    assert masks[0, 50:60].all()
    assert not masks[1, :3].any()
    assert not masks[:, 60:].any()


def test_ties_go_to_the_lowest_index() -> None:
    zeros = np.zeros((1, 64), np.float32)
    problem = Problem(
        masks=np.arange(64)[None] % 2 == 0,
        maskable=np.ones(64, bool),
        weights=np.ones(64, np.float32),
        masked_gradients=zeros,
        dense_gradients=zeros,
        losses=np.ones(1, np.float32),
        balance=1.0,
    )
    masks, _ = problem.select(3, "magnitude", "paper")
    changed = np.flatnonzero(masks[0] != problem.masks[0])
    assert changed.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("field", "named"),
    [
        ("masked_gradients", "masked gradients"),
        ("dense_gradients", "dense gradients"),
        ("losses", "losses"),
    ],
)
def test_nan_and_infinity_are_refused_and_the_masks_stay(field, named, value) -> None:
    problem = Problem.random(1, 2, 3)
    values = getattr(problem, field).copy()
    values.flat[-1] = value
    _check_refusal(replace(problem, **{field: values}), f"the {named} hold NaN or infinity")


def test_a_loss_of_zero_is_refused_where_it_is_divided_by() -> None:
    problem = Problem.random(1, 2, 3)
    problem.losses[1] = 0.0
    _check_refusal(problem, "a loss is zero")
    for kind in (("fisher", "upstream"), ("magnitude", "paper")):
        problem.select(5, *kind)


def _check_refusal(problem: Problem, message: str) -> None:
    bits = pack_bits(torch.from_numpy(problem.masks))
    before = bits.clone()
    with pytest.raises(ValueError, match=message):
        select_harmony(
            bits,
            pack_bits(torch.from_numpy(problem.maskable)),
            torch.from_numpy(problem.weights),
            torch.from_numpy(problem.masked_gradients),
            torch.from_numpy(problem.dense_gradients),
            torch.from_numpy(problem.losses),
            count=5,
            balance=1.0,
            importance="fisher",
        )
    assert torch.equal(bits, before)


def test_scores_that_overflow_are_refused_and_the_masks_stay() -> None:
    problem = Problem.random(3, 2, 2)
    problem.masks[:] = np.arange(64) < 40
    problem.maskable[:] = True
    # finite, but the second task's squares are not
    gradients = np.stack([problem.masks[0] * 1e-3, problem.masks[1] * -1e21])
    problem.masked_gradients = gradients.astype(np.float32)
    _check_refusal(problem, "the scores of task 1 overflow")
