from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import metaworld
import numpy as np
import pytest
from experts import ExpertPolicy
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

import harmodt
from harmodt.environments import METAWORLD, Environment, EnvironmentSpec, family, family_of
from harmodt.environments.metaworld import (
    MetaWorld,
    MetaWorldEnvironment,
    RepeatedEnvironment,
    RepeatedMetaWorld,
)
from harmodt.errors import UserError
from harmodt.rollout import Request, play

TASKS = ["basketball-v3", "drawer-open-v3", "pick-out-of-hole-v3"]


def _actions(seed: int, steps: int) -> np.ndarray:
    shape = (steps, MetaWorld.spec.action_size)
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

    environment = MetaWorldEnvironment(task, goal_seed=5)
    assert _same(_play(environment, environment.reset(7), actions), expected)
    assert len(expected[0]) == MetaWorld.spec.observation_size


@pytest.mark.parametrize("task", TASKS)
def test_an_episode_does_not_depend_on_what_was_run_before(task: str) -> None:
    actions = _actions(1, 80)
    fresh = MetaWorldEnvironment(task, goal_seed=3)
    from_goal = _play(fresh, fresh.reset(4), actions)
    fresh = MetaWorldEnvironment(task)
    from_seed = _play(fresh, fresh.reset_random(11), actions)

    used = MetaWorldEnvironment(task, goal_seed=3)
    expert = MetaWorld().expert(task)
    observation = used.reset(9)
    for _ in range(150):
        observation, _, _ = used.step(expert(observation))
    _play(used, used.reset_random(2), _actions(2, 100))
    assert _same(_play(used, used.reset(4), actions), from_goal)
    assert _same(_play(used, used.reset_random(11), actions), from_seed)
    assert _same(_play(used, used.reset(4), actions), from_goal)


def test_random_goals_are_visible_and_differ() -> None:
    environment = MetaWorldEnvironment("reach-v3")
    goals = {tuple(environment.reset_random(seed)[36:]) for seed in range(5)}
    assert len(goals) == 5
    assert (0.0, 0.0, 0.0) not in goals


def test_actions_are_clipped_before_they_are_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = MetaWorldEnvironment("push-v3")
    environment.reset(0)
    executed = []
    step = environment._env.step
    monkeypatch.setattr(environment._env, "step", lambda a: (executed.append(a), step(a))[1])
    environment.step(np.array([0.5, -3, 1.5, 9]))
    np.testing.assert_array_equal(executed, [[0.5, -1, 1, 1]])


def test_an_episode_has_500_steps_and_a_finite_action_in_each() -> None:
    environment = MetaWorldEnvironment("reach-v3")
    environment.reset(0)
    with pytest.raises(ValueError, match=r"reach-v3: the action .* is not finite"):
        environment.step(np.array([0, np.nan, 0, 0]))
    for action in _actions(4, MetaWorld.spec.episode_length):
        environment.step(action)
    with pytest.raises(ValueError, match="reset"):
        environment.step(np.zeros(MetaWorld.spec.action_size))


def test_the_family_says_what_metaworld_is() -> None:
    found = family(METAWORLD)
    assert found.spec == EnvironmentSpec("metaworld", 39, 4, 500, success=True, reward_version="v2")
    assert len(metaworld.MT1("push-v3", seed=0).train_tasks) == found.goals
    environment = MetaWorldEnvironment("push-v3")
    assert environment.reset(found.goals - 1).shape == (found.spec.observation_size,)
    space = environment._env.action_space
    assert (
        space.shape == (found.spec.action_size,) and abs(space.low).max() == space.high.max() == 1
    )
    assert environment._env.max_path_length == found.spec.episode_length
    assert environment._env.reward_function_version == found.spec.reward_version


def test_a_spec_survives_json_and_a_family_survives_pickling() -> None:
    spec = family(METAWORLD).spec
    assert EnvironmentSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert pickle.loads(pickle.dumps(family(METAWORLD))).spec == spec


def test_an_expert_is_metaworlds_without_its_warnings() -> None:
    environment = MetaWorldEnvironment("basketball-v3")
    expert, theirs = MetaWorld().expert("basketball-v3"), ENV_POLICY_MAP["basketball-v3"]()
    observation = environment.reset(3)
    for _ in range(60):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            action = expert(observation)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.testing.assert_array_equal(action, theirs.get_action(observation))
        observation, _, _ = environment.step(action)


@pytest.mark.parametrize("task", TASKS)
def test_a_repeated_action_is_two_steps_of_metaworld(task: str) -> None:
    actions = _actions(5, 30)
    reference = ALL_V3_ENVIRONMENTS[task]()
    reference.set_task(metaworld.MT1(task, seed=5).train_tasks[7])
    expected = [reference.reset()[0]]
    reference.step(np.zeros(4))  # TD-MPC2's episodes begin with a step at rest
    for action in actions:
        _, first, _, _, _ = reference.step(action)
        observation, second, _, _, info = reference.step(action)
        expected.append(np.append(observation, [first + second, info["success"]]))

    environment = RepeatedEnvironment(task, goal_seed=5)
    assert _same(_play(environment, environment.reset(7), actions), expected)
    from_seed = _play(environment, environment.reset_random(3), actions)
    assert _same(_play(environment, environment.reset(7), actions), expected)
    assert _same(_play(environment, environment.reset_random(3), actions), from_seed)


def test_an_episode_of_repeated_actions_has_100() -> None:
    environment = RepeatedEnvironment("reach-v3")
    with pytest.raises(ValueError, match="reach-v3: the episode is over"):
        environment.step(np.zeros(4))
    environment.reset(0)
    with pytest.raises(ValueError, match="is not finite"):
        environment.step(np.array([0, np.nan, 0, 0]))
    for action in _actions(4, 100):
        environment.step(action)
    with pytest.raises(ValueError, match="reach-v3: the episode is over"):
        environment.step(np.zeros(4))
    environment.reset_random(0)
    environment.step(np.zeros(4))
    assert environment.scene.steps_per_second == 40


def test_repeated_actions_are_a_family_that_has_to_be_named() -> None:
    repeated = family("metaworld-repeat-2")
    assert repeated.spec == EnvironmentSpec(
        "metaworld-repeat-2", 39, 4, 100, success=True, reward_version="v2"
    )
    assert repeated.resolve_tasks(["mt10"]) == family(METAWORLD).resolve_tasks(["mt10"])
    assert family_of(["reach-v3", "mt5"]) == family(METAWORLD) != repeated
    assert pickle.loads(pickle.dumps(repeated)) == repeated


def test_a_policy_of_repeated_actions_is_played_with_them() -> None:
    policy = ExpertPolicy("drawer-close-v3", environment="metaworld-repeat-2")
    result = play(policy, Request(episodes=2, workers=1))
    assert result.protocol.environment == RepeatedMetaWorld.spec
    assert len(policy.acted) == 2 * 100  # each of the two rows is a half
    assert result.successes is not None and result.successes.all()
    environment = MetaWorldEnvironment("drawer-close-v3", Request().goal_seed)
    observation, expert = environment.reset(0), MetaWorld().expert("drawer-close-v3")
    environment.step(np.zeros(4))
    rewards = []
    for _ in range(100):
        action = expert(observation).clip(-1, 1)
        for _ in range(2):
            observation, reward, _ = environment.step(action)
            rewards.append(reward)
    assert result.returns[0, 0] == pytest.approx(sum(rewards), rel=1e-12)


def test_an_unknown_family_is_answered_with_those_there_are() -> None:
    with pytest.raises(UserError, match="no environment family 'atari': choose from metaworld"):
        family("atari")


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("harmodt.environments.metaworld", "metaworld mujoco gymnasium torch"),
        ("harmodt.environments.simulation", "metaworld mujoco gymnasium torch"),
        ("harmodt.data.store, harmodt.collect", "metaworld mujoco gymnasium torch"),
        ("harmodt.train", "metaworld mujoco gymnasium"),
        ("harmodt.data.importers.tdmpc2", "metaworld mujoco gymnasium tensordict"),
    ],
)
def test_no_simulator_is_imported_before_one_is_needed(modules: str, absent: str) -> None:
    script = f"import sys, {modules}; print(*(set({absent.split()}) & set(sys.modules)))"
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, env=variables, capture_output=True, check=True).stdout
    assert printed.split() == []


def test_only_environments_import_a_simulator() -> None:
    package = Path(harmodt.__file__).parent
    importing = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if re.search(r"^\s*(import|from) (metaworld|mujoco)\b", file.read_text(), re.MULTILINE)
    }
    assert {file for file in importing if not file.startswith("environments/")} == set()
    assert "environments/metaworld.py" in importing
