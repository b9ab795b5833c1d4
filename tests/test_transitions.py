"""Transitions beside a loop over the store's arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mlps import configure_mlp
from tiny import TASKS, make_store, make_trainer

from harmodt.data.store import DataStore
from harmodt.data.transitions import Transitions, transitions_of

LENGTHS = (30, 8, 22)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("data") / "store", lengths=LENGTHS)


def draw(store: DataStore, **how: bool) -> tuple[list[int], Transitions]:
    """What is drawn of tasks where an episode has 30 steps, and is no longer than that."""
    config = configure_mlp("mtiql", batch_per_task=200, return_scale=10.0, window_start_bias=1.0)
    feed = make_trainer(store, config).learner.feed
    return feed.load(1), transitions_of(*feed.batch(), episode_length=30, **how)


@pytest.mark.parametrize("short_ends", [True, False])
def test_transitions_equal_a_loop_over_the_arrays(store: DataStore, short_ends: bool) -> None:
    tasks, found = draw(store, short_ends=short_ends)
    for part, sizes in zip(found, [(39,), (4,), (), (39,), (), ()], strict=True):
        assert part.shape == (2, 200, *sizes)
    assert found.rewards.dtype == torch.float32
    assert found.terminal.dtype == found.known.dtype == torch.bool
    seen = set()
    for group, task in enumerate(tasks):
        data = store.task(TASKS[task])
        train = data.train
        scale = np.maximum(data.observation_std, 0.01)
        normalised = (train.observations - data.observation_mean) / scale
        ends = train.episode_starts[1:] - 1
        for i in range(200):
            # random observations are unique
            (at,) = np.flatnonzero(
                np.abs(normalised - found.observations[group, i].numpy()).max(1) < 1e-4
            )
            np.testing.assert_allclose(found.actions[group, i], train.actions[at].clip(-1, 1))
            assert found.rewards[group, i].item() == pytest.approx(train.rewards[at] / 10, abs=1e-5)
            last = at in ends
            whole = last and LENGTHS[int(np.flatnonzero(ends == at)[0])] == 30
            assert found.terminal[group, i].item() == (last and not whole and short_ends)
            assert found.known[group, i].item() == (not last or (not whole and short_ends))
            if not last:
                np.testing.assert_allclose(
                    found.next_observations[group, i], normalised[at + 1], rtol=1e-4, atol=1e-5
                )
            seen.add((last, whole))
    assert seen == {(False, False), (True, False), (True, True)}


def test_rewards_survive_large_returns(tmp_path: Path) -> None:
    """They are differences of float32 returns-to-go."""
    store = make_store(tmp_path / "store", TASKS[:2], lengths=(500, 500))
    for name in store.tasks:
        assert store.task(name).train.returns.max() > 2000
    config = configure_mlp("mtiql", batch_per_task=400, return_scale=1.0)
    feed = make_trainer(store, config).learner.feed
    tasks = feed.load(1)
    found = transitions_of(*feed.batch(), episode_length=500, short_ends=True)
    for group, task in enumerate(tasks):
        rewards = np.sort(store.task(TASKS[task]).train.rewards)
        drawn = found.rewards[group][found.known[group]].numpy()
        nearest = np.abs(drawn[:, None] - rewards[None]).min(1)
        assert nearest.max() < 5e-4
