from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from experts import ExpertPolicy
from rich.console import Console

from harmodt import rollout
from harmodt.environments import FAMILIES, METAWORLD, family
from harmodt.errors import UserError
from harmodt.rollout import Request, play

TASKS = ("reach-v3", "button-press-topdown-v3")


def test_experts_solve_their_tasks_whatever_the_rounds_and_workers() -> None:
    policy = ExpertPolicy(*TASKS)
    whole = play(policy, Request(episodes=3))
    assert whole.success_rate == 1
    assert policy.calls == 500  # one for all rows of a time step
    assert whole.returns.min() > 300
    rounds = play(policy, Request(episodes=3, environments=4, workers=1))
    assert policy.calls == 500 + 2 * 500
    np.testing.assert_array_equal(rounds.returns, whole.returns)
    np.testing.assert_array_equal(rounds.successes, whole.successes)


class FakeSimulation:
    """Solved in step 3 alone where the goal is even, always where it is 1; rewards are goals."""

    def __init__(self, environment, tasks, goal_seed, workers, videos, variables):
        self.made.append((environment.family, tasks, goal_seed, workers))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def reset(self, goal_indices):
        self.goals, self.time = goal_indices, 0
        self.resets.append(goal_indices.tolist())
        return np.zeros((len(goal_indices), 39))

    def step(self, actions):
        self.time += 1
        solved = (self.goals % 2 == 0) & (self.time == 3) | (self.goals == 1)
        return np.zeros((len(self.goals), 39)), self.goals * 1.0, solved


@pytest.fixture
def fake(monkeypatch):
    FakeSimulation.made, FakeSimulation.resets = [], []
    monkeypatch.setattr(rollout, "Simulation", FakeSimulation)
    return FakeSimulation


@pytest.fixture
def policy():
    idle = ExpertPolicy(*TASKS)
    idle.act = lambda observations: np.zeros((len(observations), 4))
    return idle


@pytest.mark.parametrize(("rule", "solved"), [("any", [1, 1, 1, 0]), ("last", [0, 1, 0, 0])])
def test_success_at_any_step_and_at_the_last(fake, policy, rule, solved):
    result = play(policy, Request(episodes=4, success_rule=rule))
    assert result.successes.tolist() == [[bool(x) for x in solved]] * 2
    assert result.returns.tolist() == [[0, 500, 1000, 1500]] * 2


def test_rounds_cover_the_episodes_in_order(fake, policy):
    request = Request(53, TASKS[::-1], seed=5, goal_seed=9, environments=40, workers=2)
    result = play(policy, request)
    # 20 episodes per round would need three rounds; three rounds of 18 do.
    assert fake.made == [("metaworld", [TASKS[1]] * 18 + [TASKS[0]] * 18, 9, 2)]
    assert fake.resets[0] == [*range(18)] * 2
    assert fake.resets[2] == [*range(36, 50), 0, 1, 2, 3] * 2
    assert result.returns.shape == result.successes.shape == (2, 53)
    assert result.returns[0].tolist() == [500 * (episode % 50) for episode in range(53)]
    assert [start[1] for start in policy.starts] == [5, 23, 41]  # seeds
    assert policy.starts[0][0] == [1] * 18 + [0] * 18
    assert policy.starts[0][2] == [2000] * 18 + [1000] * 18
    assert policy.rewards[0].tolist() == [*range(18)] * 2 and len(policy.rewards) == 1500
    assert result.protocol.target_returns == (2000, 1000) and result.protocol.rounds == 3
    play(policy, Request(2, TASKS[:1], target_return=70.5))
    assert policy.starts[-1][2] == [70.5, 70.5]


def test_the_bar_counts_steps_and_solved_episodes_over_all_rounds(fake, policy):
    console = Console(width=150, file=io.StringIO())
    play(policy, Request(episodes=4, environments=4), console=console)
    # Of goals 0 to 3 all but the last are solved, in each of two tasks.
    assert "1000/1000 steps 6/8 solved" in console.file.getvalue()


def test_the_protocol_tells_what_computed_the_actions(fake, policy):
    first = play(policy, Request(episodes=2)).protocol
    assert first.environment == family(METAWORLD).spec and first.environment.reward_version
    for name, value in (("precision", "bf16"), ("backend", "triton"), ("device", "cuda:0")):
        setattr(policy, name, value)
        other = play(policy, Request(episodes=2)).protocol
        assert getattr(other, name) == value
        assert other.name != first.name


def test_the_protocol_tells_of_the_environments_that_are_played(fake, policy):
    """Data may be of rewards that are not known; what is played is known."""
    played = policy.environment
    policy.environment = replace(played, reward_version=None)
    assert play(policy, Request(episodes=1)).protocol.environment == played


def test_a_task_that_the_policy_does_not_know(fake, policy):
    with pytest.raises(UserError, match=r"push-v3.*reach-v3, button-press-topdown-v3"):
        play(policy, Request(2, ("push",)))
    assert not fake.made


def test_a_family_without_success_has_returns_alone(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", "toy_family:Toy")
    policy = ExpertPolicy("slow", "quick", environment="toy")
    act, seen = policy.act, []
    policy.act = lambda observations: act(seen.append(observations) or observations)
    result = play(policy, Request(6, ("both",), environments=6, workers=1))
    assert policy.calls == 2 * 7  # two rounds of its own number of steps
    # Three episodes of each task in a round, of four goals, which its observations begin with.
    assert seen[0][:, 0].tolist() == [0, 1, 2] * 2
    assert seen[7][:, 0].tolist() == [3, 0, 1] * 2
    np.testing.assert_array_equal(result.returns, [[7 * 0.25] * 6, [7 * 2.0] * 6])
    assert result.successes is None and result.success_rate is None
    assert result.protocol.success_rule is None
    assert "numpy" in result.versions and "metaworld" not in result.versions


@pytest.mark.parametrize("name", ["episodes", "environments", "workers"])
def test_numbers_that_cannot_be_played(name):
    with pytest.raises(UserError, match=f"{name} is 0: give 1 or more$"):
        Request(**{name: 0})
