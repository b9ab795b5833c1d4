from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from experts import ExpertPolicy
from rich.console import Console
from tiny import TASKS as TINY_TASKS
from tiny import configure, make_store, make_trainer

from harmodt import rollout
from harmodt.environments import FAMILIES, METAWORLD, family
from harmodt.errors import UserError
from harmodt.rollout import Request, play

TASKS = ("reach-v3", "button-press-topdown-v3")


def test_experts_solve_their_tasks_whatever_the_rounds_and_workers() -> None:
    policy = ExpertPolicy(*TASKS)
    whole = play(policy, Request(episodes=3))
    assert whole.success_rate == 1
    halves = [range(0, 3), range(3, 6)]
    assert policy.acted == halves * 500  # in turn
    assert whole.returns.min() > 300
    rounds = play(policy, Request(episodes=3, environments=4, workers=1))
    assert policy.acted[1000:] == [range(0, 2), range(2, 4)] * 2 * 500
    np.testing.assert_array_equal(rounds.returns, whole.returns)
    np.testing.assert_array_equal(rounds.successes, whole.successes)


class FakeSimulation:
    """Solved in step 3 alone where the goal is even, always where it is 1; rewards are goals."""

    def __init__(self, environment, tasks, goal_seed, workers, videos, variables, parts):
        self.made.append((environment.family, tasks, goal_seed, workers))
        self.parts = parts

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def reset(self, goal_indices):
        self.goals, self.time = goal_indices, [0] * len(self.parts)
        self.resets.append(goal_indices.tolist())
        return np.zeros((len(goal_indices), 39))

    def begin_step(self, actions, part):
        self.time[part] += 1

    def finish_step(self, part):
        goals = self.goals[self.parts[part]]
        solved = (goals % 2 == 0) & (self.time[part] == 3) | (goals == 1)
        return np.zeros((len(goals), 39)), goals * 1.0, solved


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
    assert [start[1] for start in policy.starts] == [5, 5, 23, 23, 41, 41]  # seeds, of each half
    for task_ids, _, targets in policy.starts[:2]:
        assert task_ids == [1] * 18 + [0] * 18
        assert targets == [2000] * 18 + [1000] * 18
    assert [rewards.tolist() for rewards in policy.rewards[:2]] == [[*range(18)]] * 2
    assert len(policy.rewards) == 2 * 1500
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
    result = play(policy, Request(6, ("both",), environments=6, workers=1))
    seen = policy.seen
    assert len(seen) == 2 * 7 * 2  # two halves of two rounds of its own number of steps
    # Three episodes of each task in a round, of four goals, which its observations begin with.
    assert [half[:, 0].tolist() for half in seen[:2]] == [[0, 1, 2]] * 2
    assert [half[:, 0].tolist() for half in seen[14:16]] == [[3, 0, 1]] * 2
    np.testing.assert_array_equal(result.returns, [[7 * 0.25] * 6, [7 * 2.0] * 6])
    assert result.successes is None and result.success_rate is None
    assert result.protocol.success_rule is None
    assert "numpy" in result.versions and "metaworld" not in result.versions


class AwaitedSimulation(FakeSimulation):
    """A step of one half ends only after the policy has acted for the other half."""

    def begin_step(self, actions, part):
        super().begin_step(actions, part)
        self.events.append(("simulated", part))

    def finish_step(self, part):
        since = self.events[len(self.events) - self.events[::-1].index(("simulated", part)) :]
        if self.time[part] < 500 or part == 0:
            assert ("acted", 1 - part) in since
        return super().finish_step(part)


def test_the_policy_acts_for_one_half_while_the_other_half_simulates(fake, monkeypatch):
    events = AwaitedSimulation.events = []
    monkeypatch.setattr(rollout, "Simulation", AwaitedSimulation)

    class Watched(ExpertPolicy):
        def act(self, observations):
            events.append(("acted", self._part.start // 3))
            return np.zeros((len(observations), 4))

    result = play(Watched(*TASKS), Request(episodes=3))
    assert result.returns.tolist() == [[0, 500, 1000]] * 2
    assert [part for event, part in events if event == "acted"] == [0, 1] * 500


class MovedSimulation(FakeSimulation):
    """What is observed and paid follows from the row and its actions; it keeps the actions."""

    def reset(self, goal_indices):
        super().reset(goal_indices)
        self.state = np.sin(np.outer(np.arange(len(goal_indices)) + 1, np.arange(39) + 1))
        self.played.append([[] for _ in goal_indices])
        return self.state.copy()

    def begin_step(self, actions, part):
        super().begin_step(actions, part)
        for row, action in zip(self.parts[part], actions, strict=True):
            self.played[-1][row].append(action.copy())
            self.state[row] = np.sin(self.state[row] + np.resize(action, 39))

    def finish_step(self, part):
        observations = self.state[self.parts[part]]
        return observations, observations[:, 0] * 2, observations[:, 1] > 0


KINDS = {
    "harmodt-f": {"fused": True},
    "soco-dt": {"fused": True},
    "prompt-dt": {"fused": True},
    "mtdt": {"fused": True},
    "harmodt-m": {},
    "mtdiff-p": {"horizon": 3, "diffusion_steps": 4, "sampling_steps": 2},
    "mtdiff-p-onehot": {"horizon": 3, "diffusion_steps": 4, "sampler": "ddpm", "replan_every": 2},
    "mtbc": {"hidden_size": 16},
}
"""Algorithms of every kind of policy, and settings of each."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store", prompt_lengths=(12, 9, 7))


@pytest.fixture
def moved(monkeypatch):
    """Plays a policy in halves or not; returns its actions [rounds, N, steps, 4]."""
    monkeypatch.setattr(rollout, "Simulation", MovedSimulation)
    halves = rollout._halves

    def acted(policy, request, in_halves):
        cut = halves if in_halves else lambda tasks, size: [range(tasks * size)]
        monkeypatch.setattr(rollout, "_halves", cut)
        MovedSimulation.made, MovedSimulation.resets, MovedSimulation.played = [], [], []
        play(policy, request)
        return np.array(MovedSimulation.played)

    return acted


# Three tasks are halves of one and two; one task is cut between its episodes.
@pytest.mark.parametrize("tasks", [TINY_TASKS, TINY_TASKS[1:2]], ids=["three tasks", "one task"])
@pytest.mark.parametrize("algorithm", KINDS)
@pytest.mark.usefixtures("native")
def test_actions_do_not_depend_on_the_halves(store, moved, algorithm, tasks):
    policy = make_trainer(store, configure(algorithm, **KINDS[algorithm])).learner.policy(0)
    network = policy.actor if algorithm == "mtbc" else policy.model
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    request = Request(5, tasks, seed=3, episode_length=12, environments=3 * len(tasks))
    whole, halves = (moved(policy, request, in_halves) for in_halves in (False, True))
    assert whole.shape == (2, 3 * len(tasks), 12, 4) and whole.std(axis=1).mean() > 0.001
    if "fused" in KINDS[algorithm]:
        np.testing.assert_array_equal(halves, whole)
    else:
        np.testing.assert_allclose(halves, whole, rtol=1e-3, atol=1e-4)


def test_one_episode_is_played_without_halves(store, moved):
    policy = make_trainer(store, configure("mtdt")).learner.policy(0)
    policy.copy = lambda: pytest.fail("a single row has no halves")
    assert moved(policy, Request(1, TINY_TASKS[:1], episode_length=3), True).shape == (1, 1, 3, 4)


@pytest.mark.parametrize(
    ("tasks", "size", "halves"),
    [
        (1, 1, [range(1)]),
        (1, 5, [range(2), range(2, 5)]),
        (2, 1, [range(1), range(1, 2)]),
        (3, 4, [range(4), range(4, 12)]),
        (50, 2, [range(50), range(50, 100)]),
    ],
)
def test_the_halves_have_whole_tasks(tasks, size, halves):
    assert rollout._halves(tasks, size) == halves


@pytest.mark.parametrize("name", ["episodes", "environments", "workers"])
def test_numbers_that_cannot_be_played(name):
    with pytest.raises(UserError, match=f"{name} is 0: give 1 or more$"):
        Request(**{name: 0})
