from __future__ import annotations

import gymnasium as gym
import metaworld  # noqa: F401 (registers its environments)
import numpy as np
import pytest
from experts import ExpertPolicy
from metaworld.evaluation import evaluation
from tiny import make_store, make_trainer

from harmodt.errors import UserError
from harmodt.policies.metaworld_agent import MetaWorldAgent

TASKS = ["reach-v3", "button-press-topdown-v3"]


@pytest.fixture(scope="module")
def envs():
    made = gym.make_vec(
        "Meta-World/custom-mt-envs", vector_strategy="sync", envs_list=TASKS, seed=1
    )
    yield made
    made.close()


def test_experts_are_measured_by_meta_worlds_own_evaluation(envs, monkeypatch):
    policy = ExpertPolicy(*TASKS[::-1])  # task ids that differ from the rows
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    step = envs.step

    def watched(actions):
        result = step(actions)
        steps.append((result[1], result[2] | result[3]))
        return result

    monkeypatch.setattr(envs, "step", watched)
    agent = MetaWorldAgent(policy, envs, seed=4)
    success, _, per_task, returns = evaluation(agent, envs, num_episodes=2)
    assert success == 1 and per_task == dict.fromkeys(TASKS, 1.0)
    assert policy.starts == [([1, 0], 4, [2000, 1000])]

    assert len(policy.rewards) == len(steps)  # nothing is rewarded before the first action
    assert len(policy.restarts) == len(steps) + 1
    assert policy.restarts[0].all()
    # The policy hears of every reward but those that ended an episode, and of each ending.
    for heard, restarted, (rewards, done) in zip(
        policy.rewards, policy.restarts[1:], steps, strict=True
    ):
        np.testing.assert_allclose(heard, np.where(done, 0, rewards), atol=1e-9)
        np.testing.assert_array_equal(restarted, done)
    assert sum(done.any() for _, done in steps) >= 2
    assert min(min(r) for r in returns.values()) > 0


def test_a_second_evaluation_begins_anew(envs):
    policy = ExpertPolicy(*TASKS)
    agent = MetaWorldAgent(policy, envs)
    for _ in range(2):
        assert evaluation(agent, envs, num_episodes=1)[0] == 1
    rewards = np.stack(policy.rewards)
    assert rewards.min() >= 0  # no reward is taken back when the returns begin at 0 again


def test_a_trained_policy_hears_of_every_reward_once(envs, tmp_path):
    policy = make_trainer(make_store(tmp_path / "store", TASKS)).learner.policy(0)
    targets = np.array([300.0, 500.0])
    agent = MetaWorldAgent(policy, envs, target_returns=targets)
    for _ in range(2):  # evaluations
        observations, _ = envs.reset()
        agent.reset(np.ones(2, bool))
        expected = targets.copy()
        for step in range(5):
            observations, rewards, *_ = envs.step(agent.eval_action(observations))
            begun = np.array([False, step == 2])
            agent.reset(begun)
            expected = np.where(begun, targets, expected - rewards)
            np.testing.assert_allclose(policy._returns_to_go, expected, rtol=1e-9)


def test_one_hot_task_ids_are_ignored():
    made = gym.make_vec(
        "Meta-World/custom-mt-envs", vector_strategy="sync", envs_list=TASKS[:1], use_one_hot=True
    )
    policy = ExpertPolicy(*TASKS)
    seen = []
    policy.act = lambda observations: seen.append(observations.shape)
    MetaWorldAgent(policy, made).eval_action(made.reset()[0])
    made.close()
    assert seen == [(1, 39)]


def test_environments_of_other_tasks_are_refused(envs):
    with pytest.raises(UserError, match=r"not trained on button-press-topdown-v3.*of reach-v3"):
        MetaWorldAgent(ExpertPolicy("reach-v3"), envs)
