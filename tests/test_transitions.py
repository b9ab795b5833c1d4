"""Transitions beside a loop over the store's arrays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlps import configure_mlp
from tiny import SPEC, TASKS, make_episode, make_store, make_trainer

from harmodt.data.store import UNKNOWN, DataStore
from harmodt.data.transitions import Transitions, transitions_of
from harmodt.data.writer import StoreWriter
from harmodt.environments import EnvironmentSpec

# Length and ending of each episode of the first task, in environments whose episodes have 30
# steps. Each other task has them in another order.
EPISODES = ((30, UNKNOWN), (8, UNKNOWN), (22, 0), (9, 1), (30, 1), (30, 0))
GOING_ON = replace(SPEC, episode_length=30)
FALLING = replace(SPEC, episode_length=30, family="ant-dir")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    rng = np.random.default_rng(0)
    writer = StoreWriter(tmp_path_factory.mktemp("data") / "store", {}, SPEC)
    for number, name in enumerate(TASKS):
        with writer.task(name) as task:
            for length, terminated in (*EPISODES[number:], *EPISODES[:number]):
                task.add(make_episode(rng, length)._replace(terminated=terminated))
    return writer.finish(TASKS)


def draw(store: DataStore, environment: EnvironmentSpec) -> tuple[list[int], Transitions]:
    """What is drawn of tasks in these environments."""
    config = configure_mlp("mtiql", batch_per_task=400, return_scale=10.0, window_start_bias=1.0)
    feed = make_trainer(store, config).learner.feed
    return feed.load(1), transitions_of(*feed.batch(), environment)


@pytest.mark.parametrize(
    ("environment", "terminal"),
    [
        (GOING_ON, (False, False, False, True, True, False)),
        (FALLING, (False, True, False, True, True, False)),
    ],
    ids=["episodes go on", "episodes can end early"],
)
def test_transitions_equal_a_loop_over_the_arrays(
    store: DataStore, environment: EnvironmentSpec, terminal: tuple[bool, ...]
) -> None:
    tasks, found = draw(store, environment)
    for part, sizes in zip(found, [(39,), (4,), (), (39,), (), ()], strict=True):
        assert part.shape == (2, 400, *sizes)
    assert found.rewards.dtype == torch.float32
    assert found.terminal.dtype == found.known.dtype == torch.bool
    seen = set()
    for group, task in enumerate(tasks):
        data = store.task(TASKS[task])
        train = data.train
        scale = np.maximum(data.observation_std, 0.01)
        normalised = (train.observations - data.observation_mean) / scale
        expected = (*terminal[task:], *terminal[:task])
        ends = dict(zip((train.episode_starts[1:] - 1).tolist(), expected, strict=True))
        for i in range(400):
            # random observations are unique
            (at,) = np.flatnonzero(
                np.abs(normalised - found.observations[group, i].numpy()).max(1) < 1e-4
            )
            np.testing.assert_allclose(found.actions[group, i], train.actions[at].clip(-1, 1))
            assert found.rewards[group, i].item() == pytest.approx(train.rewards[at] / 10, abs=1e-5)
            last = at in ends
            assert found.terminal[group, i].item() == ends.get(at, False)
            assert found.known[group, i].item() == ends.get(at, True)
            if not last:
                np.testing.assert_allclose(
                    found.next_observations[group, i], normalised[at + 1], rtol=1e-4, atol=1e-5
                )
            seen.add(list(ends).index(at) if last else None)
    assert seen == {None, *range(len(EPISODES))}


def test_rewards_survive_large_returns(tmp_path: Path) -> None:
    """They are differences of float32 returns-to-go."""
    store = make_store(tmp_path / "store", TASKS[:2], lengths=(500, 500))
    for name in store.tasks:
        assert store.task(name).train.returns.max() > 2000
    config = configure_mlp("mtiql", batch_per_task=400, return_scale=1.0)
    feed = make_trainer(store, config).learner.feed
    tasks = feed.load(1)
    found = transitions_of(*feed.batch(), SPEC)
    for group, task in enumerate(tasks):
        rewards = np.sort(store.task(TASKS[task]).train.rewards)
        drawn = found.rewards[group][found.known[group]].numpy()
        nearest = np.abs(drawn[:, None] - rewards[None]).min(1)
        assert nearest.max() < 5e-4
