"""Where the episodes of a run lie, and observations there without what they repeat."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmodt.data.repeats import CompactObservations, find_repeats
from harmodt.data.store import Episodes, TaskData
from harmodt.data.trajectories import choose_place, lay_out
from harmodt.errors import UserError

SPECIAL = (0.0, -0.0, float("nan"), float("inf"))


def make_episodes(observations: np.ndarray, lengths: list[int]) -> Episodes:
    """Episodes [S, O] of these lengths, with nothing but their observations to tell them apart."""
    steps = len(observations)
    return Episodes(
        observations=observations.astype(np.float32),
        actions=np.zeros((steps, 2), np.float32),
        rewards=np.zeros(steps, np.float32),
        returns_to_go=np.zeros(steps, np.float32),
        episode_starts=np.cumsum([0, *lengths]),
        successes=np.ones(len(lengths), np.int8),
    )


def frames(rng: np.random.Generator, lengths: list[int], goal: int = 1) -> Episodes:
    """Observations as Meta-World's: now (3), those of the step before (3), and a goal.

    An episode's first step says something of its own of the step before.
    """
    now = rng.normal(size=(sum(lengths), 3))
    now[rng.random(now.shape) < 0.2] = rng.choice(SPECIAL)
    before = np.concatenate([now[:1], now[:-1]])
    first = np.cumsum([0, *lengths[:-1]])
    before[first] = rng.normal(size=(len(lengths), 3))
    goals = np.repeat(rng.normal(size=(len(lengths), goal)), lengths, axis=0)
    return make_episodes(np.concatenate([now, before, goals], axis=1), lengths)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers: -0.0 is not 0.0, and a NaN is itself."""
    return tensor.view(torch.int32)


def compacted(tasks: list[Episodes]) -> tuple[torch.Tensor, torch.Tensor]:
    """All observations of some tasks, and what comes out of a compact copy of them."""
    whole = torch.from_numpy(np.concatenate([task.observations for task in tasks]))
    lengths = np.concatenate([task.lengths for task in tasks])
    episodes = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    compact = CompactObservations(tasks, find_repeats(tasks), torch.device("cpu"))
    return whole, compact.gather(torch.arange(len(whole)), episodes)


many_lengths = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)


@given(lengths=many_lengths, seed=st.integers(0, 2**32 - 1), goal=st.integers(0, 2))
def test_what_repeats_is_found_and_comes_back(
    lengths: list[list[int]], seed: int, goal: int
) -> None:
    rng = np.random.default_rng(seed)
    tasks = [frames(rng, of_task, goal) for of_task in lengths]
    whole, found = compacted(tasks)
    assert torch.equal(bits(found), bits(whole))


@pytest.mark.parametrize("goal", [0, 2])
def test_what_repeats_is_left_out(goal: int) -> None:
    tasks = [frames(np.random.default_rng(seed), [300, 400], goal) for seed in range(2)]
    repeats = find_repeats(tasks)
    assert (repeats.stored, repeats.previous) == ((0, 1, 2), {3: 0, 4: 1, 5: 2})
    assert repeats.constant == tuple(range(6, 6 + goal))
    assert repeats.nbytes(tasks) == 4 * (2 * (700 + 2) * 3 + 4 * goal)
    compact = CompactObservations(tasks, repeats, torch.device("cpu"))
    assert compact._values.nbytes == repeats.nbytes(tasks)


@given(order=st.permutations(range(8)), seed=st.integers(0, 2**32 - 1))
def test_what_repeats_several_times_comes_back(order: list[int], seed: int) -> None:
    """Two dimensions with the value of one, and one with the value of those, in any order.

    Their first steps, which repeat nothing, differ.
    """
    rng = np.random.default_rng(seed)
    tasks = []
    for lengths in ([3, 5], [6]):
        now = rng.normal(size=(sum(lengths), 2))
        starts = np.cumsum([0, *lengths[:-1]])
        columns = [now]
        for source in (0, 0, 1):
            before = np.roll(columns[source], 1, axis=0)
            before[starts] = rng.normal(size=(len(lengths), 2))
            columns.append(before)
        tasks.append(make_episodes(np.concatenate(columns, axis=1)[:, order], lengths))
    whole, found = compacted(tasks)
    assert torch.equal(bits(found), bits(whole))
    assert 2 <= len(find_repeats(tasks).previous) <= 4


@pytest.mark.parametrize("dimension", [0, 4, 6])
def test_one_step_late_in_one_task_is_enough_to_store_a_dimension(dimension: int) -> None:
    tasks = [frames(np.random.default_rng(seed), [300, 400]) for seed in range(2)]
    tasks[1].observations[650, dimension] += 1
    repeats = find_repeats(tasks)
    # a value that is changed now is no longer what the next step has of the step before
    spoilt = 3 if dimension == 0 else dimension
    assert set(repeats.stored) == {0, 1, 2, spoilt}
    whole, found = compacted(tasks)
    assert torch.equal(bits(found), bits(whole))


@pytest.mark.parametrize(
    ("setting", "device", "free", "place"),
    [
        ("auto", "cpu", 0, None),
        ("same", "cpu", 0, "cpu"),
        ("auto", "cuda", 2.0, "cuda"),
        ("auto", "cuda", 1.99, "cuda, compact"),
        ("auto", "cuda", 1.25, "cuda, compact"),
        ("auto", "cuda", 1.15, None),
        ("cpu", "cuda", 100.0, None),
        ("same", "cuda", 1.0, "cuda"),
        ("same", "cuda", 0.99, "cuda, compact"),
        ("same", "cuda", 0.58, UserError),
    ],
)
def test_the_place_of_the_data(
    monkeypatch: pytest.MonkeyPatch, setting: Any, device: str, free: float, place: Any
) -> None:
    """As they are they take ten numbers a step, without what repeats about six."""
    tasks = [frames(np.random.default_rng(seed), [200, 300]) for seed in range(2)]
    size = 4 * 1000 * (7 + 2 + 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (round(free * size), 0))
    if place is UserError:
        data = [TaskData("a", task, task, np.zeros(7), np.ones(7), 0.0, 0.0) for task in tasks]
        with pytest.raises(UserError, match=r"the data take .* with --data-device cpu"):
            lay_out(setting, data, torch.device(device))
        return
    found, repeats = choose_place(setting, tasks, torch.device(device))
    name, compact = (place or "").partition(",")[::2]
    assert found == (torch.device(name) if name else None)
    assert repeats == (find_repeats(tasks) if compact else None)
