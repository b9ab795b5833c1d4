"""Where the episodes of a run lie, and observations there without what they repeat."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st

from harmodt.data import trajectories
from harmodt.data.repeats import CompactSteps, Repeats, columns_of, find_repeats
from harmodt.data.store import Episodes, TaskData
from harmodt.data.trajectories import lay_out
from harmodt.errors import UserError

SPECIAL = (0.0, -0.0, float("nan"), float("inf"))


def make_episodes(observations: np.ndarray, lengths: list[int]) -> Episodes:
    """Episodes of these lengths, with observations [S, O]; returns and actions never repeat."""
    steps = len(observations)
    return Episodes(
        observations=observations.astype(np.float32),
        actions=np.arange(2 * steps, dtype=np.float32).reshape(steps, 2) + 0.5,
        rewards=np.ones(steps, np.float32),
        returns_to_go=np.arange(steps, 0, -1, dtype=np.float32),
        episode_starts=np.cumsum([0, *lengths]),
        successes=np.ones(len(lengths), np.int8),
    )


def frames(rng: np.random.Generator, lengths: list[int], goal: int = 1) -> Episodes:
    """Observations as Meta-World's: now (3), those of the step before (3), and a goal.

    An episode's first step says something of its own of the step before.
    """
    now = rng.normal(size=(sum(lengths), 3))
    now[rng.random(now.shape) < 0.2] = rng.choice(SPECIAL)
    before = np.roll(now, 1, axis=0)
    before[np.cumsum([0, *lengths[:-1]])] = rng.normal(size=(len(lengths), 3))
    goals = np.repeat(rng.normal(size=(len(lengths), goal)), lengths, axis=0)
    return make_episodes(np.concatenate([now, before, goals], axis=1), lengths)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers: -0.0 is not 0.0, and a NaN is itself."""
    return tensor.cpu().view(torch.int32)


def check_comes_back(tasks: list[Episodes]) -> Repeats:
    """All steps come out of a compact copy as they are; returns what it leaves out."""
    whole = torch.from_numpy(np.concatenate([columns_of(task) for task in tasks]))
    lengths = np.concatenate([task.lengths for task in tasks])
    episodes = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(DEVICE)
    repeats = find_repeats(tasks)
    assert repeats is not None
    compact = CompactSteps(tasks, repeats, torch.device(DEVICE))
    assert compact._numbers.nbytes == repeats.nbytes(tasks)
    found = compact.gather(torch.arange(len(whole), device=DEVICE), episodes)
    assert torch.equal(bits(found), bits(whole))
    return repeats


many_lengths = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)


@given(lengths=many_lengths, seed=st.integers(0, 2**32 - 1), goal=st.integers(0, 2))
def test_steps_without_what_repeats_are_the_same(
    lengths: list[list[int]], seed: int, goal: int
) -> None:
    rng = np.random.default_rng(seed)
    check_comes_back([frames(rng, of_task, goal) for of_task in lengths])


@given(lengths=many_lengths, seed=st.integers(0, 2**32 - 1), size=st.integers(1, 5))
def test_numbers_that_repeat_by_chance_come_back_too(
    lengths: list[list[int]], seed: int, size: int
) -> None:
    """Of two values, so that columns follow one another, themselves, or in chains."""
    rng = np.random.default_rng(seed)
    check_comes_back(
        [
            make_episodes(rng.choice(SPECIAL[:2], size=(sum(of_task), size)), of_task)
            for of_task in lengths
        ]
    )


@given(order=st.permutations(range(8)), seed=st.integers(0, 2**32 - 1))
def test_what_repeats_several_times_comes_back(order: list[int], seed: int) -> None:
    """Two columns with the numbers of one, and one with the numbers of those, in any order.

    Their first steps, which repeat nothing, differ.
    """
    rng = np.random.default_rng(seed)
    tasks = []
    for lengths in ([3, 5], [6]):
        columns = [rng.normal(size=(sum(lengths), 2))]
        for source in (0, 0, 1):
            before = np.roll(columns[source], 1, axis=0)
            before[np.cumsum([0, *lengths[:-1]])] = rng.normal(size=(len(lengths), 2))
            columns.append(before)
        tasks.append(make_episodes(np.concatenate(columns, axis=1)[:, order], lengths))
    assert 2 <= len(check_comes_back(tasks).previous) <= 4


@pytest.mark.parametrize("goal", [0, 2])
def test_what_repeats_is_left_out(goal: int) -> None:
    tasks = [frames(np.random.default_rng(seed), [300, 400], goal) for seed in range(2)]
    repeats = check_comes_back(tasks)
    # column 0 is the return-to-go, the last two are the action's
    assert repeats.stored == (0, 1, 2, 3, 7 + goal, 8 + goal)
    assert repeats.previous == {4: 1, 5: 2, 6: 3}
    assert repeats.constant == tuple(range(7, 7 + goal))
    size = 4 * (2 * (700 + 2) * 6 + 4 * goal)
    assert repeats.nbytes(tasks) == size
    assert find_repeats(tasks, size) == repeats
    assert find_repeats(tasks, size - 1) is None


@pytest.mark.parametrize("dimension", [0, 4, 6])
def test_one_step_late_in_one_task_is_enough_to_store_a_dimension(dimension: int) -> None:
    tasks = [frames(np.random.default_rng(seed), [300, 400]) for seed in range(2)]
    room = find_repeats(tasks).nbytes(tasks)
    tasks[1].observations[650, dimension] += 1
    repeats = check_comes_back(tasks)
    # a number that is changed now is no longer what the next step has of the step before
    spoilt = 3 if dimension == 0 else dimension
    assert set(repeats.stored) == {0, 1, 2, 3, 1 + spoilt, 8, 9}
    assert find_repeats(tasks, room) is None  # although the first steps look as if there was enough


def test_without_room_the_first_steps_alone_are_read() -> None:
    """The last ones cannot be."""
    task = frames(np.random.default_rng(0), [300, 400])

    class FirstSteps(np.ndarray):
        def __getitem__(self, steps: Any) -> Any:
            assert np.arange(700)[steps].max() < 300
            return super().__getitem__(steps)

    unread = dataclasses.replace(task, observations=task.observations.view(FirstSteps))
    assert find_repeats([unread], 4 * 5 * 700) is None
    with pytest.raises(AssertionError):
        find_repeats([unread])


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
        ("same", "cuda", 2.0, "cuda"),
        ("same", "cuda", 1.99, "cuda, compact"),
        ("same", "cuda", 0.62, "cuda, compact"),
        ("same", "cuda", 0.58, UserError),
    ],
)
def test_the_place_of_the_data(
    monkeypatch: pytest.MonkeyPatch, setting: Any, device: str, free: float, place: Any
) -> None:
    """As they are they take ten numbers a step, without what repeats about six."""
    tasks = [frames(np.random.default_rng(seed), [200, 300]) for seed in range(2)]
    data = [TaskData("a", task, task, np.zeros(7), np.ones(7), 0.0, 0.0) for task in tasks]
    size = 4 * 1000 * (7 + 2 + 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (round(free * size), 0))
    laid = []
    monkeypatch.setattr(trajectories, "Trajectories", lambda *given: laid.append(given))
    if place is UserError:
        with pytest.raises(UserError, match=r"the data take .* with --data-device cpu"):
            lay_out(setting, data, torch.device(device))
        return
    lay_out(setting, data, torch.device(device))
    name, compact = (place or "").partition(",")[::2]
    there = torch.device(name) if name else None
    assert laid == [(tasks, there, find_repeats(tasks) if compact else None)]
