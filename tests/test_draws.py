from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from harmodt.draws import MASKS, TASKS, TRAIN, Draws, Seeds, below, choose, coin, normal, philox

LAST = 2**32 - 1


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    # the vectors of Random123, the authors' library
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((LAST,) * 4, (LAST, LAST), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    for columns in (1, 7):
        words = philox(torch.tensor(counter)[:, None].repeat(1, columns), key)
        assert words.tolist() == [[word] * columns for word in expected]


def test_philox_in_integers_of_any_size() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        key = tuple(rng.integers(2**32, size=2).tolist())
        counters = torch.from_numpy(rng.integers(2**32, size=(4, 3, 5)))
        words = philox(counters, key).flatten(1).T.tolist()
        assert words == [_philox(counter, key) for counter in counters.flatten(1).T.tolist()]


def _philox(counter: list[int], key: tuple[int, ...]) -> list[int]:
    """As in the paper, in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & LAST, (left >> 32) ^ c3 ^ k1, left & LAST
        k0, k1 = (k0 + 0x9E3779B9) & LAST, (k1 + 0xBB67AE85) & LAST
    return [c0, c1, c2, c3]


def words_of(
    seed: int = 3, purpose: int = TRAIN, step: int | Tensor = 5, count: int = 40
) -> Tensor:
    return Draws(seed, purpose, step).words(torch.arange(count))


def test_words_are_the_same_whenever_and_with_whatever_they_are_drawn() -> None:
    words = words_of()
    assert words.shape == (4, 40)
    assert words.dtype == torch.int64
    assert torch.equal(words_of(step=torch.tensor(5)), words)
    assert torch.equal(words_of(count=3), words[:, :3])
    draws, places = Draws(3, TRAIN, 5), torch.tensor([[7, 39], [0, 7]])
    assert torch.equal(draws.words(places), words[:, places])
    together = draws.words(places, torch.tensor([[2], [0]]), torch.arange(3)[:, None, None])
    assert together.shape == (4, 3, 2, 2)
    assert torch.equal(together[:, 0, 1], words[:, places[1]])
    assert torch.equal(together[:, 2, :1], draws.words(places[:1], 2, 2))
    steps = Draws(3, TRAIN, torch.tensor([[9], [5]])).words(torch.arange(40))
    assert torch.equal(steps[:, 1], words)


def test_words_of_different_places_steps_purposes_and_seeds_have_nothing_in_common() -> None:
    drawn = [
        words_of(seed, purpose, step)
        for seed in (0, 1, 2**70)
        for purpose in (TRAIN, MASKS, TASKS)
        for step in (0, 1, 99_999_999)
    ]
    drawn += [Draws(0, TRAIN, 0).words(torch.arange(40), i, j) for i, j in ((0, 1), (1, 0), (1, 1))]
    words = torch.stack(drawn).flatten()
    assert words.min() >= 0
    assert words.max() < 2**32
    # 4800 words: two are equal by chance 0.003 times, and these are always the same words
    assert len(words.unique()) == len(words)


@pytest.mark.parametrize("by", ["position", "group", "block", "step"])
def test_words_are_uniform_along_every_part_of_a_place(by: str) -> None:
    count, cells = 16_384, 64
    if by == "step":
        words = torch.cat([words_of(step=step, count=1) for step in range(count // 4)], 1)
    elif by == "position":
        words = words_of(count=count)
    else:
        words = Draws(3, TRAIN, 5).words(torch.tensor([0]), **{by: torch.arange(count)})
    for word in words:
        for shift in (0, 26):  # the lowest and the highest bits
            counts = torch.bincount((word >> shift) % cells, minlength=cells).double()
            expected = len(word) / cells
            # 63 degrees of freedom: one in a million is above 132; the words are always the same
            assert ((counts - expected) ** 2 / expected).sum() < 132
    assert abs(np.corrcoef(words.double().numpy()) - np.eye(4)).max() < 5 / words.shape[1] ** 0.5


def test_integers_below_a_limit() -> None:
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, LAST])
    assert below(words, 1).tolist() == [0] * 5
    assert below(words, 10).tolist() == [0, 0, 4, 5, 9]
    assert below(words, 2**31).tolist() == [0, 0, 2**30 - 1, 2**30, 2**31 - 1]
    assert below(words, torch.tensor([3, 3, 4, 4, 5])).tolist() == [0, 0, 1, 2, 4]
    counts = torch.bincount(below(words_of(count=3000).flatten(), 6), minlength=6)
    assert counts.sum() == 12_000
    assert abs(counts - 2000).max() < 5 * (12_000 * 5 / 36) ** 0.5


def test_a_coin_of_a_probability() -> None:
    words = torch.tensor([0, 2**30 - 1, 2**30, LAST])
    assert coin(words, 0.25).tolist() == [True, True, False, False]
    assert coin(words, 0.0).tolist() == [False] * 4
    assert coin(words, 1.0).tolist() == [True] * 4


def test_a_choice_is_of_the_smallest_and_of_equals_the_first() -> None:
    assert choose(torch.tensor([5, 3, 9, 3, LAST, 0, 3]), 3).tolist() == [1, 3, 5]
    assert choose(torch.full((6,), LAST), 4).tolist() == [0, 1, 2, 3]
    assert choose(torch.tensor([LAST, 0]), 2).tolist() == [0, 1]
    assert choose(torch.tensor([[3, 1, 2], [1, 2, 0]]), 2).tolist() == [[1, 2], [0, 2]]


def test_every_choice_is_as_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for step in range(2000):
        chosen = tuple(choose(words_of(step=step, count=5)[0], 2).tolist())
        counts[chosen] = counts.get(chosen, 0) + 1
    assert len(counts) == 10
    assert max(abs(count - 200) for count in counts.values()) < 5 * (2000 * 9 / 100) ** 0.5


def test_the_seeds_of_a_run_seed_dropout_too() -> None:
    seeds, drawn = Seeds(7), {}
    for numbers in [(TRAIN, 0), (TRAIN, 1), (MASKS, 0), (MASKS, 0, 1), (TRAIN, 0)]:
        assert seeds.begin(*numbers) == Draws(7, *numbers[:2])
        number = torch.rand(()).item()
        assert drawn.setdefault(numbers, number) == number
    assert len(set(drawn.values())) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_words() -> None:
    positions = torch.arange(5000)
    for draws in (Draws(3, TRAIN, 5), Draws(0, MASKS, 10**7)):
        on_cpu, on_gpu = (draws.words(positions.to(device)) for device in ("cpu", "cuda"))
        assert torch.equal(on_gpu.cpu(), on_cpu)
        assert torch.equal(choose(on_gpu[0], 50).cpu(), choose(on_cpu[0], 50))


def test_normal_numbers_come_from_pairs_of_words() -> None:
    """By the formula of Box and Muller, in Python's floats, also at the ends of what words are."""
    rng = np.random.default_rng(0)
    for first, second in [(0, 0), (LAST, LAST), (0, LAST), *rng.integers(2**32, size=(9, 2))]:
        length = math.sqrt(-2 * math.log((int(first) + 0.5) / 2**32))
        angle = 2 * math.pi * (int(second) + 0.5) / 2**32
        found = normal(torch.tensor([int(first), int(second)]))
        assert found.dtype == torch.float32
        expected = [length * math.cos(angle), length * math.sin(angle)]
        assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)
    words = torch.from_numpy(rng.integers(2**32, size=(4, 50_000)))
    numbers = normal(words).double()
    error = 1 / math.sqrt(50_000)
    assert numbers.shape == words.shape
    assert numbers.mean(1).abs().max() < 5 * error
    assert (numbers.std(1) - 1).abs().max() < 5 * error / math.sqrt(2)
    assert torch.corrcoef(numbers).fill_diagonal_(0).abs().max() < 5 * error
