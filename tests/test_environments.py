from __future__ import annotations

import metaworld
import numpy as np
import pytest
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

from harmodt.environments.metaworld import (
    ACTION_SIZE,
    EPISODE_LENGTH,
    OBSERVATION_SIZE,
    Environment,
)

pytestmark = pytest.mark.filterwarnings("ignore:Constant")

TASKS = ["basketball-v3", "drawer-open-v3", "pick-out-of-hole-v3"]


def _actions(seed: int, steps: int) -> np.ndarray:
    shape = (steps, ACTION_SIZE)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def _play(environment: Environment, first: np.ndarray, actions: np.ndarray) -> list[np.ndarray]:
    steps = [environment.step(action) for action in actions]
    return [first, *(np.append(observation, [reward, done]) for observation, reward, done in steps)]


def _same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_an_episode_is_that_of_metaworld_itself(task: str) -> None:
    actions = _actions(0, 60)
    benchmark = metaworld.MT1(task, seed=5)
    reference = ALL_V3_ENVIRONMENTS[task]()
    reference.set_task(benchmark.train_tasks[7])
    expected = [reference.reset()[0]]
    for action in actions:
        observation, reward, _, _, info = reference.step(action)
        expected.append(np.append(observation, [reward, info["success"]]))

    environment = Environment(task, goal_seed=5)
    assert environment.goals == 50
    assert _same(_play(environment, environment.reset(7), actions), expected)
    assert len(expected[0]) == OBSERVATION_SIZE


@pytest.mark.parametrize("task", TASKS)
def test_an_episode_does_not_depend_on_what_was_run_before(task: str) -> None:
    actions = _actions(1, 80)
    fresh = Environment(task, goal_seed=3)
    from_goal = _play(fresh, fresh.reset(4), actions)
    fresh = Environment(task)
    from_seed = _play(fresh, fresh.reset_random(11), actions)

    used = Environment(task, goal_seed=3)
    expert = ENV_POLICY_MAP[task]()
    observation = used.reset(9)
    for _ in range(150):
        observation, _, _ = used.step(expert.get_action(observation))
    _play(used, used.reset_random(2), _actions(2, 100))
    assert _same(_play(used, used.reset(4), actions), from_goal)
    assert _same(_play(used, used.reset_random(11), actions), from_seed)
    assert _same(_play(used, used.reset(4), actions), from_goal)


def test_random_goals_are_visible_and_differ() -> None:
    environment = Environment("reach-v3")
    goals = {tuple(environment.reset_random(seed)[36:]) for seed in range(5)}
    assert len(goals) == 5
    assert (0.0, 0.0, 0.0) not in goals


def test_actions_are_clipped_before_they_are_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Environment("push-v3")
    environment.reset(0)
    executed = []
    step = environment._env.step
    monkeypatch.setattr(environment._env, "step", lambda a: (executed.append(a), step(a))[1])
    environment.step(np.array([0.5, -3, 1.5, 9]))
    np.testing.assert_array_equal(executed, [[0.5, -1, 1, 1]])


def test_an_episode_has_500_steps_and_a_finite_action_in_each() -> None:
    environment = Environment("reach-v3")
    environment.reset(0)
    with pytest.raises(ValueError, match=r"reach-v3: the action .* is not finite"):
        environment.step(np.array([0, np.nan, 0, 0]))
    for action in _actions(4, EPISODE_LENGTH):
        environment.step(action)
    with pytest.raises(ValueError, match="reset"):
        environment.step(np.zeros(ACTION_SIZE))
