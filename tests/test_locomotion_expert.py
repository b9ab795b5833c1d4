"""The experts of walkers: how they act, and how one is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from harmodt.environments import family
from harmodt.environments.locomotion import CheetahVelocity, Locomotion, expert
from harmodt.environments.locomotion.expert import Expert, load_expert
from harmodt.environments.locomotion.measure_expert import expert_returns
from harmodt.environments.locomotion.simulator import EPISODE_LENGTH
from harmodt.environments.locomotion.train_expert import (
    GoalEnvironment,
    RelabellingBuffer,
    TrainExpertConfig,
    train_expert,
)
from harmodt.errors import UserError


def test_an_expert_is_the_perceptron_of_its_file() -> None:
    layers = [torch.nn.Linear(18, 9), torch.nn.Linear(9, 7), torch.nn.Linear(7, 6)]
    arrays = {}
    for number, layer in enumerate(layers):
        arrays[f"{number}.weight"] = layer.weight.detach().numpy()
        arrays[f"{number}.bias"] = layer.bias.detach().numpy()
    x = np.random.default_rng(0).normal(size=(5, 18))
    hidden = torch.from_numpy(x)
    for layer in layers[:-1]:
        hidden = torch.relu(layer.double()(hidden))
    expected = torch.tanh(layers[-1].double()(hidden)).detach().numpy()
    found = Expert.read(save(arrays))
    np.testing.assert_allclose(found(x), expected, atol=1e-5)
    np.testing.assert_allclose(found(x[2]), expected[2], atol=1e-5)


@pytest.mark.parametrize(
    ("task", "least"),
    [
        ("cheetah-dir-forward", 850),
        ("cheetah-dir-backward", 850),
        ("cheetah-vel-1.500", -45),
    ],
)
def test_the_shipped_experts_solve_their_tasks(task: str, least: float) -> None:
    """What stands still gets 0, 0 and -300."""
    walkers, returns = family(task.rsplit("-", 1)[0]), np.zeros(6)
    walker, act = walkers.make(task), walkers.expert(task)
    for start in range(len(returns)):
        observation = walker.reset(start)
        for _ in range(EPISODE_LENGTH):
            observation, reward, _ = walker.step(act(observation))
            returns[start] += reward
    assert returns.mean() > least


@pytest.mark.parametrize("angle", ["1.715", "4.002"])
def test_the_shipped_ant_goes_its_way(angle: str) -> None:
    walkers, ways = family("ant-dir"), []
    walker, act = walkers.make(f"ant-dir-{angle}"), walkers.expert(f"ant-dir-{angle}")
    for start in range(6):  # it may stumble
        observation = walker.reset(start)
        before = walker.data.qpos[:2].copy()
        for _ in range(EPISODE_LENGTH):
            observation, _, _ = walker.step(act(observation))
        direction = np.cos(float(angle)), np.sin(float(angle))
        ways.append((walker.data.qpos[:2] - before) @ direction)
    assert np.median(ways) > 5, ways  # metres in 10 s


def test_a_family_without_an_expert_says_how_to_train_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert, "WEIGHTS", tmp_path)
    load_expert.cache_clear()
    with pytest.raises(UserError, match=r"train one with `python -m harmodt.*train_expert ant-dir"):
        load_expert("ant-dir")
    load_expert.cache_clear()


def test_relabelled_transitions_are_worth_what_their_goal_makes_them() -> None:
    walkers, weight = CheetahVelocity(), 1.5
    environment = GoalEnvironment(walkers, weight, seed=3)
    buffer = RelabellingBuffer(
        50, environment.observation_space, environment.action_space,
        family=walkers, progress_weight=weight, seed=4,
    )  # fmt: skip
    rng, goals = np.random.default_rng(0), set()
    observation, _ = environment.reset()
    steps = {}
    for _ in range(30):
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        after, reward, ended, cut, info = environment.step(action)
        buffer.add(observation, after, action[None], reward, np.array([ended or cut]), [info])
        velocity = environment._walker.velocity[0]
        steps[action.tobytes()] = velocity, 0.05 * float(np.square(action).sum())
        goals.add(observation[-1])
        observation = after
    batch = buffer.sample(64)
    drawn = batch.observations[:, -1].numpy()
    assert len(set(drawn[:32])) == 32 and set(drawn[32:]) == goals
    for i in range(64):
        velocity, cost = steps[batch.actions[i].numpy().tobytes()]
        expected = -weight * abs(velocity - drawn[i]) - cost
        assert batch.rewards[i].item() == pytest.approx(expected, abs=1e-5)
        assert batch.next_observations[i, -1] == drawn[i]


def test_an_expert_is_trained_and_the_best_one_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainExpertConfig("cheetah-dir", tmp_path, steps=640, evaluate_every=320)
    train_expert(config)
    text = capsys.readouterr().out
    assert text.count("steps, ") == 2
    trained = Expert.read((tmp_path / "cheetah-dir.safetensors").read_bytes())
    walkers = family("cheetah-dir")
    assert isinstance(walkers, Locomotion)
    mean = expert_returns(walkers, trained, episodes=1).mean()
    assert f"{mean:.1f}" == f"{max(float(line.split()[-1]) for line in text.splitlines()):.1f}"


def test_only_walkers_have_experts_to_train(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="metaworld is not a family of walkers"):
        train_expert(TrainExpertConfig("metaworld", tmp_path))
