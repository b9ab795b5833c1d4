from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from harmodt_kernels import (
    REFERENCE,
    Backend,
    NotFinite,
    Selection,
    UpdateRefused,
    fused_backend,
    pack_bits,
    unpack_bits,
)
from harmodt_kernels.harmony_selection import triton as kernels

# numpy's, where the interpreter multiplies infinity
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

IMPLEMENTATIONS = ["reference", "triton", "cpu"]  # the definition is PyTorch's quickest

RULES = [
    (importance, rule)
    for importance in ("fisher", "magnitude")
    for rule in ("paper", "upstream-score")
]

# The fixtures keep no state between the examples.
examples = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@dataclass
class Problem:
    """Operands of a selection.

    Those of `random` are exact in float32: small integers, and powers of two where something is
    divided. They also make nearly every score tie with others.
    """

    masks: np.ndarray
    maskable: np.ndarray
    weights: np.ndarray
    masked_gradients: np.ndarray
    dense_gradients: np.ndarray
    mean_gradient: np.ndarray
    losses: np.ndarray
    balance: float

    @classmethod
    def random(cls, seed: int, tasks: int, words: int) -> Problem:
        rng = np.random.default_rng(seed)
        shape = (tasks, 32 * words)
        maskable = rng.random(shape[1]) < rng.choice([0.3, 0.9, 1.0])
        masks = (rng.random(shape) < rng.choice([0.0, 0.1, 0.8, 1.0])) & maskable
        span = rng.integers(1, 4)

        def integers(*shape: int) -> np.ndarray:
            return rng.integers(-span, span, shape, endpoint=True).astype(np.float32)

        return cls(
            masks=masks,
            maskable=maskable,
            weights=integers(shape[1]),
            masked_gradients=integers(*shape) * masks * np.float32(rng.choice([1, 8])),
            dense_gradients=integers(*shape),
            mean_gradient=integers(shape[1]),
            losses=(2.0 ** rng.integers(-2, 3, tasks)).astype(np.float32),
            balance=float(2.0 ** rng.integers(-3, 5)),
        )

    @classmethod
    def usual(cls, tasks: int, words: int) -> Problem:
        """One in which half of the weights are active."""
        problem = cls.random(0, tasks, words)
        active = np.random.default_rng(0).random(problem.masks.shape) < 0.5
        return replace(problem, masks=active & problem.maskable)

    @classmethod
    def of_scores(cls, scores: np.ndarray, masks: np.ndarray, maskable: np.ndarray) -> Problem:
        """One whose active weights leave, and whose inactive ones enter, by `scores`, float32 [P].

        It holds for the magnitude and the paper's rule.
        """
        return cls(
            masks=masks,
            maskable=maskable,
            weights=np.zeros_like(scores),
            masked_gradients=scores * masks,
            dense_gradients=-scores * np.ones_like(masks, np.float32),
            mean_gradient=np.ones_like(scores),
            losses=np.ones(len(masks), np.float32),
            balance=0.0,
        )

    def operands(self, device: torch.device) -> tuple[Tensor, ...]:
        """The tensors, in the order of the arguments of `select_harmony`."""
        values = [torch.from_numpy(getattr(self, f.name)) for f in fields(self)[:-1]]
        return tuple((pack_bits(v) if v.dtype == torch.bool else v).to(device) for v in values)

    def select(
        self, backend: Backend, device: torch.device, count: int, importance: str, rule: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """The masks after the selection, whose padding was seen to stay 0, and what moved.

        The signs were seen to be counted right.
        """
        operands = self.operands(device)
        bits, maskable_bits, *_ = operands
        selection = backend.select_harmony(
            *operands, count=count, balance=self.balance, importance=importance, rule=rule
        )
        assert selection.agreeing.tolist() == self.signs(1)
        assert selection.differing.tolist() == self.signs(-1)
        backend.move_weights(bits, selection)
        assert not (bits & ~maskable_bits).any()
        masks = unpack_bits(bits.cpu(), len(self.weights)).numpy()
        return masks, selection.moved.cpu().numpy()

    def signs(self, sign: int) -> list[int]:
        """How many signs of each task agree (1) with those of the mean gradient or differ (-1)."""
        products = np.sign(self.masked_gradients) * np.sign(self.mean_gradient * self.maskable)
        return (products == sign).sum(1).tolist()

    def expected(self, count: int, importance: str, rule: str) -> tuple[np.ndarray, np.ndarray]:
        """The same by sorting whole vectors in float64, index after score."""
        masks, moved = self.masks.copy(), np.zeros(len(self.masks), int)
        mean = self.mean_gradient.astype(np.float64)
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


def check(problem: Problem, backend: Backend, device: torch.device, count: int, kind: Any) -> None:
    masks, moved = problem.select(backend, device, count, *kind)
    expected_masks, expected_moved = problem.expected(count, *kind)
    np.testing.assert_array_equal(moved, expected_moved)
    np.testing.assert_array_equal(masks, expected_masks)
    np.testing.assert_array_equal(masks.sum(1), problem.masks.sum(1))


@pytest.mark.parametrize("number", [15, pytest.param(50, marks=pytest.mark.full)])
def test_selection_equals_a_sort_with_ties_by_index(backend, device, number) -> None:
    @settings(max_examples=number, deadline=None)
    @given(
        seed=st.integers(0, 2**32),
        tasks=st.sampled_from([1, 2, 4, 9]),
        words=st.sampled_from([1, 2, 3, 6, 33, 70]),
        count=st.integers(0, 120),
        kind=st.sampled_from(RULES),
    )
    def of_random(seed: int, tasks: int, words: int, count: int, kind: Any) -> None:
        check(Problem.random(seed, tasks, words), backend, device, count, kind)

    of_random()


P = 32 * 47  # no multiple of a chunk of several words or of a program's share
RNG = np.random.default_rng(0)
SCORES = {
    "one for all": np.full(P, 2.0),
    "ascending": np.arange(P) - 700.0,
    "descending": 700.0 - np.arange(P),
    "smallest side by side": np.where(np.abs(np.arange(P) - 640) < 40, -5.0, 5.0),
    "smallest far apart": np.where(np.arange(P) % 64 == 63, -1.0 - np.arange(P) // 64, 1.0),
    "smallest at the end": np.where(np.arange(P) > P - 33, -1.0, np.arange(P)),
    "in steps across chunks": np.arange(P) // 48 % 3,
    "signed zeros": RNG.choice([0.0, -0.0], P),
    "denormal": RNG.integers(-9, 9, P) * 1e-45,
    "huge": RNG.choice([-3e38, 3e38, 1e-38], P),
}
MASKS = {
    "even": np.arange(P) % 2 == 0,
    "first half": np.arange(P) < P // 2,
    "few": np.arange(P) % 97 == 5,
    "all but few": np.arange(P) % 97 != 5,
    "all": np.ones(P, bool),
    "none": np.zeros(P, bool),
}


SIZES = [(1, 1, 64), (7, 32, 2048), (40, 4, 512), (10 * P, 2, 1024)]


@pytest.mark.parametrize(
    ("scores", "count", "chunk_words", "values"),
    [  # of each kind of scores one size, and of all others if they are asked for
        pytest.param(scores, *size, marks=[pytest.mark.full] * (kind % 4 != number))
        for kind, scores in enumerate(SCORES)
        for number, size in enumerate(SIZES)
    ],
)
def test_selection_of_any_scores(
    backend, device, monkeypatch, scores: str, count: int, chunk_words: int, values: int
) -> None:
    monkeypatch.setattr(kernels, "words_per_chunk", lambda size, count: chunk_words)
    monkeypatch.setattr(kernels, "VALUES", values)
    maskable = np.arange(P) % 64 < 60
    masks = np.stack(list(MASKS.values())) & maskable
    problem = Problem.of_scores(SCORES[scores].astype(np.float32), masks, maskable)
    check(problem, backend, device, count, ("magnitude", "paper"))


@settings(max_examples=40, **examples)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=300
    ),
    repeats=st.integers(1, 3),
    wanted=st.integers(0, 300),
)
@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
def test_the_smallest_of_a_row_are_those_of_a_stable_sort(
    device, monkeypatch, values, repeats, wanted
) -> None:
    monkeypatch.setattr(kernels, "VALUES", 64)
    scores = np.tile(np.float32(values) + np.float32(0), repeats)  # -0 is 0
    bits = scores.view(np.int32)
    keys = torch.from_numpy(bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(device)
    wanted = min(wanted, len(scores))
    rows = torch.stack((keys, keys.flip(0)))[None]
    (chosen,) = kernels.smallest_chunks(rows, wanted)
    for row, of_row in zip(chosen.cpu().numpy(), (scores, scores[::-1]), strict=True):
        np.testing.assert_array_equal(row, np.sort(np.argsort(of_row, kind="stable")[:wanted]))


@pytest.mark.parametrize("number", [5, pytest.param(30, marks=pytest.mark.full)])
def test_what_leaves_does_not_come_back_in_the_same_update(backend, device, number) -> None:
    @settings(max_examples=number, deadline=None)
    @given(seed=st.integers(0, 2**32), count=st.integers(0, 40), kind=st.sampled_from(RULES))
    def of_random(seed: int, count: int, kind: Any) -> None:
        problem = Problem.random(seed, 4, 4)
        masks, moved = problem.select(backend, device, count, *kind)
        np.testing.assert_array_equal((problem.masks & ~masks).sum(1), moved)
        np.testing.assert_array_equal((masks & ~problem.masks).sum(1), moved)

    of_random()


def random_floats(seed: int, tasks: int, words: int) -> Problem:
    """One of floats of all sizes, denormals among them."""
    problem, rng = Problem.random(seed, tasks, words), np.random.default_rng(seed)

    def floats(*shape: int) -> np.ndarray:
        scale = 10.0 ** rng.integers(-44, 12, shape)
        return (rng.normal(size=shape) * scale).astype(np.float32)

    dense_gradients = floats(tasks, 32 * words)
    masked_gradients = dense_gradients * problem.masks
    return replace(
        problem,
        weights=floats(32 * words),
        dense_gradients=dense_gradients,
        masked_gradients=masked_gradients,
        mean_gradient=masked_gradients.mean(0),
        losses=rng.random(tasks, np.float32) + np.float32(0.1),
        balance=float(rng.random()),
    )


@pytest.mark.parametrize("number", [3, pytest.param(10, marks=pytest.mark.full)])
def test_random_floats_keep_the_number_of_active_weights(backend, device, number) -> None:
    @settings(max_examples=number, deadline=None)
    @given(seed=st.integers(0, 2**32), kind=st.sampled_from(RULES))
    def of_random(seed: int, kind: Any) -> None:
        problem = random_floats(seed, 3, 4)
        for _ in range(3):
            masks, moved = problem.select(backend, device, 20, *kind)
            np.testing.assert_array_equal(masks.sum(1), problem.masks.sum(1))
            np.testing.assert_array_equal((problem.masks & ~masks).sum(1), moved)
            problem.masks = masks

    of_random()


def as_sets(selection: Selection) -> list[Tensor]:
    leaving, entering, *of_tasks = selection
    return [leaving.sort(-1).values, entering.sort(-1).values, *of_tasks]


@pytest.mark.parametrize("number", [15, pytest.param(40, marks=pytest.mark.full)])
def test_all_backends_choose_the_same_of_random_floats(device, number) -> None:
    @settings(max_examples=number, deadline=None)
    @given(
        seed=st.integers(0, 2**32),
        words=st.sampled_from([3, 40]),
        count=st.sampled_from([1, 7, 150]),
        kind=st.sampled_from(RULES),
    )
    def of_random(seed: int, words: int, count: int, kind: Any) -> None:
        check_backends_agree(random_floats(seed, 3, words), device, count, kind)

    of_random()


def check_backends_agree(problem: Problem, device: torch.device, count: int, kind: Any) -> None:
    arguments = {
        "count": count, "balance": problem.balance, "importance": kind[0], "rule": kind[1]
    }  # fmt: skip
    chosen, expected = (
        as_sets(backend.select_harmony(*problem.operands(device), **arguments))
        for backend in (fused_backend(device), REFERENCE)
    )
    for values, others in zip(chosen, expected, strict=True):
        assert torch.equal(values, others)


@pytest.mark.parametrize("kind", RULES)
def test_the_last_bit_of_a_score_counts(device, kind) -> None:
    problem, rng = Problem.usual(4, 40), np.random.default_rng(0)

    def close_to_one(*shape: int) -> np.ndarray:
        return (1 + rng.integers(0, 64, shape) * 2.0**-23).astype(np.float32)

    problem.weights, problem.mean_gradient = close_to_one(1280), close_to_one(1280)
    problem.dense_gradients = close_to_one(4, 1280)
    problem.masked_gradients = close_to_one(4, 1280) * problem.masks
    problem.losses, problem.balance = rng.random(4, np.float32), 0.3
    check_backends_agree(problem, device, 100, kind)


def test_more_than_all_candidates_are_exchanged(backend, device) -> None:
    problem = Problem.random(0, 2, 2)
    problem.maskable = np.arange(64) < 60
    problem.masks = np.stack([np.arange(64) < 50, np.arange(64) < 3])
    masks, moved = problem.select(backend, device, 1000, "fisher", "paper")
    assert moved.tolist() == [10, 3]
    assert masks[0, 50:60].all()
    assert not masks[1, :3].any()
    assert not masks[:, 60:].any()


def test_ties_go_to_the_lowest_index(backend, device) -> None:
    scores = np.zeros(64, np.float32)
    problem = Problem.of_scores(scores, np.arange(64)[None] % 2 == 0, np.ones(64, bool))
    masks, _ = problem.select(backend, device, 3, "magnitude", "paper")
    changed = np.flatnonzero(masks[0] != problem.masks[0])
    assert changed.tolist() == [0, 1, 2, 3, 4, 5]


def test_what_does_not_count_is_minus_one_and_last(backend, device) -> None:
    problem = Problem.random(0, 2, 2)
    problem.masks = np.stack([np.arange(64) < 3, np.arange(64) < 1]) & problem.maskable
    leaving, entering, moved, *_ = backend.select_harmony(
        *problem.operands(device), count=5, balance=1.0, importance="fisher"
    )
    for indices in (leaving, entering):
        assert indices.shape == (2, 5)
        counted = torch.arange(5, device=device) < moved[:, None]
        assert torch.equal(indices >= 0, counted)
        assert (indices[~counted] == -1).all()


def test_minus_one_moves_nothing(backend, device) -> None:
    bits = torch.tensor([[0, -1], [0, 0]], dtype=torch.int32, device=device)
    leaving = torch.tensor([[63, 32, 40], [-1, -1, -1]], device=device)
    entering = torch.tensor([[31, -1, -1], [0, 30, -1]], device=device)
    moved, *others = torch.tensor([[3, 2], [0, 0], [0, 0], [0, 0]], device=device)
    backend.move_weights(bits, Selection(leaving, entering, moved, *others))
    expected = [[-(1 << 31), 0x7FFFFFFF - 1 - (1 << 8)], [1 + (1 << 30), 0]]
    assert bits.tolist() == expected


@pytest.mark.parametrize(
    ("size", "count", "words"),
    [(32, 0, 1), (10**6, 10**6, 1), (1_200_000, 100, 4), (10**8, 1, 32), (0, 5, 1)],
)
def test_chunks_are_of_a_power_of_two_of_words(size: int, count: int, words: int) -> None:
    assert kernels.words_per_chunk(size, count) == words


def test_masks_and_gradients_may_be_rows_of_larger_tensors(backend, device) -> None:
    usual = Problem.usual(3, 40)
    scores = np.random.default_rng(0).permutation(1280).astype(np.float32)
    problem = Problem.of_scores(scores, usual.masks, usual.maskable)
    operands = list(problem.operands(device))
    for i in (0, 3, 4):
        wide = torch.full_like(operands[i], 77).repeat(1, 3)
        wide[:, : operands[i].shape[1]] = operands[i]
        operands[i] = wide[:, : operands[i].shape[1]]
    selection = backend.select_harmony(*operands, count=2, balance=0.0, importance="magnitude")
    backend.move_weights(operands[0], selection)
    expected, _ = problem.expected(2, "magnitude", "paper")
    assert torch.equal(operands[0].cpu(), pack_bits(torch.from_numpy(expected)))
    assert (operands[0]._base[:, 40:] == 77).all()


@pytest.mark.parametrize(
    ("place", "value"),
    [  # an active weight, an inactive one, padding
        *((3, np.nan), (60, np.inf), (95, -np.inf)),
        *(
            pytest.param(place, value, marks=pytest.mark.full)
            for place, value in ((3, np.inf), (3, -np.inf), (60, np.nan), (60, -np.inf))
        ),
        *(pytest.param(95, value, marks=pytest.mark.full) for value in (np.nan, np.inf)),
    ],
)
@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("masked_gradients", "task 1: its masked gradient holds NaN or infinity"),
        ("dense_gradients", "task 1: its dense gradient holds NaN or infinity"),
        ("mean_gradient", "task 0: the mean gradient holds NaN or infinity"),
        ("losses", "task 1: its loss is NaN or infinite"),
    ],
)
def test_nan_and_infinity_are_refused_and_the_masks_stay(
    backend, device, field, message, place, value
) -> None:
    problem = Problem.random(1, 2, 3)
    problem.maskable = np.arange(96) < 90
    problem.masks = np.stack([np.arange(96) < 30] * 2)
    values = getattr(problem, field).copy()
    if field == "mean_gradient":
        values[place] = value
    elif field == "losses":
        values[1] = value
    else:
        values[1, place] = value
    problem = replace(problem, **{field: values})
    for kind in RULES:
        _check_refusal(problem, backend, device, message, kind)


def test_who_spoiled_the_mean_gradient_is_named(backend, device) -> None:
    problem = Problem.random(1, 3, 3)
    problem.dense_gradients[0, 5] = np.nan
    problem.masked_gradients[2, 40] = np.inf
    problem.mean_gradient[40] = np.inf
    _check_refusal(problem, backend, device, "task 2: its masked gradient")


def test_a_loss_of_zero_is_refused_where_it_is_divided_by(backend, device) -> None:
    problem = Problem.random(1, 2, 3)
    problem.masks[1] = False  # nothing is divided, but the loss is wrong all the same
    problem.losses[1] = 0.0
    _check_refusal(problem, backend, device, "task 1: its loss is not above zero")
    for kind in (("fisher", "upstream-score"), ("magnitude", "paper")):
        problem.select(backend, device, 5, *kind)


def test_even_a_selection_of_nothing_is_refused(backend, device) -> None:
    problem = Problem.random(1, 2, 3)
    problem.dense_gradients[1, 7] = np.nan
    _check_refusal(problem, backend, device, "task 1: its dense gradient holds NaN", count=0)


def _check_refusal(
    problem: Problem,
    backend: Backend,
    device: torch.device,
    message: str,
    kind: tuple[str, str] = ("fisher", "paper"),
    count: int = 5,
) -> None:
    operands = problem.operands(device)
    before = operands[0].clone()
    selection = backend.select_harmony(
        *operands, count=count, balance=1.0, importance=kind[0], rule=kind[1]
    )
    with pytest.raises(ValueError, match=message) as error:
        backend.move_weights(operands[0], selection)
    from_finite = "not above zero" in message or "overflow" in message
    assert error.type is (UpdateRefused if from_finite else NotFinite)
    assert torch.equal(operands[0], before)


def test_scores_that_overflow_are_refused_and_the_masks_stay(backend, device) -> None:
    problem = Problem.random(3, 2, 2)
    problem.masks[:] = np.arange(64) < 40
    problem.maskable[:] = True
    # finite, but the second task's squares are not
    gradients = np.stack([problem.masks[0] * 1e-3, problem.masks[1] * -1e21])
    problem.masked_gradients = gradients.astype(np.float32)
    _check_refusal(problem, backend, device, "task 1: its scores overflow")


def test_scores_that_nobody_asks_for_may_overflow(backend, device) -> None:
    problem = Problem.random(3, 2, 3)
    problem.maskable = np.arange(96) < 90
    problem.masks = np.stack([np.arange(96) < 40] * 2)
    needed = problem.maskable & ~problem.masks
    problem.dense_gradients = np.where(needed, 1.0, 1e30).astype(np.float32)
    problem.masked_gradients = np.where(problem.masks, 1.0, 0.0).astype(np.float32)
    problem.mean_gradient = np.full(96, 1e30, np.float32)
    problem.weights = np.where(problem.masks[0], 1.0, np.nan).astype(np.float32)
    _, moved = problem.select(backend, device, 5, "magnitude", "paper")
    assert moved.tolist() == [5, 5]


@pytest.fixture
def workspaces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the keys that every launch of a kernel gets."""
    sizes, launch = [], kernels.launch

    def spy(kernel: Any, grid: Any, **arguments: Any) -> None:
        if kernel is not kernels.move_weights_kernel:
            found = [arguments[name] for name in ("minima", "keys") if name in arguments]
            sizes.append(sum(tensor.nbytes for tensor in found))
        launch(kernel, grid, **arguments)

    monkeypatch.setattr(kernels, "launch", spy)
    return sizes


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("count", [3, 100])
def test_the_workspace_does_not_grow_with_the_tasks(device, workspaces, monkeypatch, count) -> None:
    monkeypatch.setattr(kernels, "WORKSPACE", 5_000)
    for tasks in (1, 4, 17):
        check(Problem.usual(tasks, 40), fused_backend(device), device, count, RULES[0])
    assert len(workspaces) > 6  # more than one slice
    # One task alone may need more: here the minima of its 40 chunks and all keys of both sides.
    assert max(workspaces) <= (5_000 if count == 3 else 8 * (40 + 1280))


def test_five_runs_give_the_same(device) -> None:
    problem = Problem.usual(4, 40)  # full of ties
    fused = fused_backend(device)
    arguments = {"count": 50, "balance": 1.0, "importance": "magnitude"}
    first, *others = (
        fused.select_harmony(*problem.operands(device), **arguments) for _ in range(5)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_an_importance_or_a_rule_that_is_none_is_refused(backend, device) -> None:
    operands = Problem.usual(3, 4).operands(device)
    with pytest.raises(ValueError, match="rule is 'upstream': it must be paper or upstream-score"):
        backend.select_harmony(
            *operands, count=5, balance=1.0, importance="fisher", rule="upstream"
        )
    with pytest.raises(ValueError, match="importance is 'size'"):
        backend.select_harmony(*operands, count=5, balance=1.0, importance="size")


@pytest.mark.parametrize("kind", RULES)
def test_the_operations_compose(device, kind) -> None:
    operands = Problem.usual(3, 4).operands(device)
    settings = (7, 0.5, *kind)
    torch.library.opcheck(torch.ops.harmodt.select_harmony.default, (*operands, *settings))
    leaving, entering, *_ = torch.ops.harmodt.select_harmony(*operands, *settings)
    torch.library.opcheck(
        torch.ops.harmodt.move_weights.default, (operands[0].clone(), leaving, entering)
    )


def test_the_operations_compile_into_one_graph(device) -> None:
    operands = Problem.usual(3, 4).operands(device)

    def update(bits: Tensor, *others: Tensor) -> Tensor:
        leaving, entering, _, refused = torch.ops.harmodt.select_harmony(
            bits, *others, 7, 0.5, "fisher", "paper"
        )
        torch.ops.harmodt.move_weights(bits, leaving, entering)
        return refused

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    eager_bits, compiled_bits = operands[0].clone(), operands[0].clone()
    update(eager_bits, *operands[1:])
    compiled(compiled_bits, *operands[1:])
    assert torch.equal(eager_bits, compiled_bits)
    assert not torch.equal(eager_bits, operands[0])


def test_operands_that_do_not_fit_are_refused(device) -> None:
    fused, operands = fused_backend(device), Problem.usual(3, 4).operands(device)
    arguments = {"count": 5, "balance": 1.0, "importance": "fisher"}
    for place, other, error, message in (
        (3, operands[3].double(), TypeError, "masked_gradients is torch.float64"),
        (0, operands[0].long(), TypeError, "mask_bits is torch.int64"),
        (
            6,
            operands[6][:2],
            ValueError,
            r"losses has shape \[2\]: with mask_bits \[3",
        ),
        (2, operands[2][:100], ValueError, r"weights has shape \[100\]"),
        (4, operands[4].T.contiguous().T, ValueError, "dense_gradients has strides"),
    ):
        wrong = [other if i == place else operand for i, operand in enumerate(operands)]
        with pytest.raises(error, match=message):
            fused.select_harmony(*wrong, **arguments)
    selection = fused.select_harmony(*operands, **arguments)
    bits = operands[0].clone()
    beyond = torch.full_like(selection.leaving, bits.shape[1] * 32)
    for mask_bits, changed, error, message in (
        (bits[:2], {}, ValueError, r"selection.leaving has shape \[3, 5\]: with mask_bits \[2"),
        (bits.repeat(1, 2)[:, ::2], {}, ValueError, "mask_bits has strides"),
        (bits, {"leaving": selection.leaving.int()}, TypeError, "selection.leaving is torch.int32"),
        (bits, {"entering": selection.entering[:, :2]}, ValueError, "selection.entering has shape"),
        (bits, {"entering": beyond}, IndexError, "selection.entering holds"),
    ):
        if error is IndexError and (device.type != "cpu" or fused.name.startswith("triton")):
            continue  # a GPU's kernel does not check
        with pytest.raises(error, match=message):
            fused.move_weights(mask_bits, selection._replace(**changed))
    assert torch.equal(bits, operands[0])
