"""Times an evaluation of MT5: 10 episodes per task, with simulation, after start-up.

    pytest bench/bench_evaluate.py --benchmark-only

The weights are untrained, because trained ones take the same time. Starting the simulation's
workers is not timed.
"""

from __future__ import annotations

import numpy as np
import pytest
from paths import make_trainer

from harmodt.data.store import DataStore
from harmodt.environments.simulation import Simulation
from harmodt.policies import Policy
from harmodt.rollout import GOAL_SEED

EPISODES = 10
STEPS = 100  # of an episode's 500


def make_policy(store: DataStore, path: str) -> Policy:
    return make_trainer(store, path).learner.policy(0)


@pytest.mark.benchmark(group="policy call, MT5 x 10 episodes")
@pytest.mark.parametrize("path", ["reference", "fused"])
def bench_act(benchmark, store: DataStore, path: str) -> None:
    """One policy call for the 50 episodes, and their rewards."""
    policy = make_policy(store, path)
    policy.start(np.repeat(np.arange(5), EPISODES))
    size = policy.environment.observation_size
    observations = np.random.default_rng(0).normal(size=(5 * EPISODES, size))
    rewards = np.ones(5 * EPISODES)

    def act() -> np.ndarray:
        actions = policy.act(observations)
        policy.record_rewards(rewards)
        return actions

    # Warmed up until the histories are full.
    actions = benchmark.pedantic(act, rounds=30, warmup_rounds=20)
    assert np.abs(actions).max() <= 1.0


@pytest.mark.benchmark(group=f"evaluation, MT5 x 10 episodes, {STEPS} steps")
@pytest.mark.parametrize("path", ["reference", "fused"])
def bench_episodes(benchmark, store: DataStore, path: str) -> None:
    """Policy calls and simulation, from the beginning of the episodes."""
    policy = make_policy(store, path)
    steps = 5 if benchmark.disabled else STEPS
    rows = [name for name in store.tasks for _ in range(EPISODES)]

    def play() -> None:
        observations = simulation.reset(np.tile(np.arange(EPISODES), 5))
        policy.start(np.repeat(np.arange(5), EPISODES))
        for _ in range(steps):
            observations, rewards, _ = simulation.step(policy.act(observations))
            policy.record_rewards(rewards)

    with Simulation(policy.environment, rows, GOAL_SEED) as simulation:
        benchmark.pedantic(play, rounds=1)
