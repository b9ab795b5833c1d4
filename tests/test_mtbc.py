"""MTBC, and what it shares with MTIQL: the networks, the policy, its settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mlps import Weights, configure_mlp
from runs import assert_same, begin
from tiny import TASKS, make_setup, make_store, make_trainer

from harmodt import environments, load_policy, train
from harmodt.algorithms import preset
from harmodt.algorithms.unseen import Unseen
from harmodt.collect import CollectConfig, collect
from harmodt.data.store import DataStore
from harmodt.draws import TRAIN, Draws
from harmodt.errors import UserError
from harmodt.networks.task_mlp import TaskInput, TaskMLP
from harmodt.rollout import Request, play
from harmodt.rundir import RunDirectory
from harmodt.settings import settings

TASK_INPUTS: tuple[TaskInput, ...] = ("one-hot", "multi-head")
SMALL = ("--hidden-size", "16")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.mark.parametrize("task_input", TASK_INPUTS)
@pytest.mark.parametrize("fused", [False, True])
def test_steps_equal_a_computation_in_float64(
    store: DataStore, native: None, task_input: str, fused: bool
) -> None:
    trainer = make_trainer(store, configure_mlp("mtbc", task_conditioning=task_input, fused=fused))
    weights = Weights(trainer.learner.tensors(), ["policy"])
    for step in (1, 2, 3):
        task_ids = trainer.learner.feed.load(step)
        batch, actions = trainer.learner.feed.batch()
        expected = []
        for group, task in enumerate(task_ids):
            errors = [
                (
                    torch.tanh(weights.forward("policy", x.double(), task, 3, task_input))
                    - a.double()
                )
                for x, a in zip(
                    batch.history.observations[group, :, 0], actions[group, :, 0], strict=True
                )
            ]
            expected.append(sum((error**2).sum() for error in errors) / (12 * 4))
        norm = weights.learn(torch.stack(expected).mean(), step)
        result = trainer.train_step()
        assert list(result.task_ids) == task_ids
        torch.testing.assert_close(result.losses.double(), torch.stack(expected).detach())
        assert result.gradient_norm.item() == pytest.approx(norm, rel=1e-5)
        weights.check(trainer.learner.tensors())
    assert weights.clipped


def test_steps_are_drawn_by_seed_and_step(store: DataStore) -> None:
    trainer = make_trainer(store, configure_mlp("mtbc", seed=4))
    feed = trainer.learner.feed
    for step in (7, 2):
        task_ids = feed.load(step)
        batch, actions = feed.batch()
        expected, wanted = feed._sampler.sample(task_ids, Draws(4, TRAIN, step - 1))
        assert torch.equal(batch.history.observations, expected.history.observations)
        assert torch.equal(actions, wanted)


def test_a_head_is_of_its_task_alone() -> None:
    network = TaskMLP(3, 2, tasks=4, hidden_size=5, hidden_layers=1, task_input="multi-head")
    x = torch.rand(2, 6, 3)
    before = network(x, torch.tensor([3, 1]))
    with torch.no_grad():
        network.head.weight[2:4] += 1.0  # task 1's
    after = network(x, torch.tensor([3, 1]))
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    assert torch.equal(network(x[:1], torch.tensor([3]))[0], before[0])


@pytest.mark.parametrize("algorithm", ["mtbc", "mtiql"])
@pytest.mark.parametrize("task_input", TASK_INPUTS)
def test_the_task_changes_the_action(store: DataStore, algorithm: str, task_input: str) -> None:
    config = configure_mlp(algorithm, task_conditioning=task_input)
    policy = make_trainer(store, config).learner.policy(0)
    policy._inputs.normalise = lambda tasks, observations: observations  # by which it could tell
    policy.start(np.array([0, 1, 2, 1]))
    actions = policy.act(np.ones((4, 39)))
    assert actions.dtype == np.float32 and actions.shape == (4, 4)
    assert np.abs(actions).max() < 1
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(actions[first] - actions[second]).max() > 1e-3
    np.testing.assert_allclose(actions[1], actions[3], rtol=1e-6)


def test_the_policy_reads_normalised_observations(store: DataStore) -> None:
    trainer = make_trainer(store, configure_mlp("mtbc"))
    weights, policy = Weights(trainer.learner.tensors(), []), trainer.learner.policy(5)
    assert (policy.step, policy.mask, policy.tasks) == (5, "none", TASKS)
    rows = np.random.default_rng(0).normal(size=(2, 39))
    policy.start(np.array([2, 0]))
    actions = policy.act(rows)
    for row, task in enumerate((2, 0)):
        data = store.task(TASKS[task])
        scale = np.maximum(data.observation_std.astype(float), 0.01)
        x = torch.from_numpy((rows[row] - data.observation_mean) / scale)
        expected = torch.tanh(weights.forward("policy", x, task, 3, "one-hot"))
        np.testing.assert_allclose(actions[row], expected, rtol=1e-4, atol=1e-6)


def test_the_policy_refuses_what_it_cannot_do(store: DataStore) -> None:
    policy = make_trainer(store, configure_mlp("mtbc")).learner.policy(0)
    policy.start(np.array([0, 2]), 0, policy.target_returns[[0, 2]])
    with pytest.raises(UserError, match="reads no target return: leave --target-return out"):
        policy.start(np.array([0, 2]), 0, np.array([1.0, 2.0]))
    with pytest.raises(UserError, match="no masks to vote"):
        policy.use_voted_mask()
    assert policy.plans is None


@pytest.mark.parametrize("algorithm", ["mtbc", "mtiql"])
def test_a_run_that_goes_on_ends_as_without_a_pause(
    store: DataStore, tmp_path: Path, algorithm: str
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run in (whole, cut):
        begin(store, run, *SMALL, algorithm=algorithm)
    for step in (8, 12):  # as if it had been killed after the checkpoint of step 4
        folder = RunDirectory(cut).checkpoint(step)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    train.main(["--resume", str(cut)])
    assert_same(whole, cut)
    policy = load_policy(cut)
    trained = load_policy(whole)
    for each in (policy, trained):
        each.start(np.array([0, 1, 2]))
    observations = np.random.default_rng(1).normal(size=(3, 39))
    assert policy.step == 12
    np.testing.assert_array_equal(policy.act(observations), trained.act(observations))


@pytest.mark.parametrize("algorithm", [("mtbc",), ("mtiql", "--temperature", "1")], ids=" ".join)
def test_it_learns_what_each_task_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: tuple[str, ...]
) -> None:
    monkeypatch.setitem(environments.FAMILIES, "toy", "toy_family:Toy")
    data = CollectConfig(
        tmp_path / "data", ("both",), 6, 1, noise_start=0, random_start=0, family="toy"
    )
    run = tmp_path / "run"
    collected = collect(data, progress=False)
    flags = ("--steps", "150", "--learning-rate", "0.02", "--warmup-steps", "1")
    name, *own = algorithm
    begin(collected, run, *SMALL, *flags, *own, algorithm=name)
    result = play(load_policy(run), Request(4, goal_seed=0, workers=1))
    for returns, way in zip(result.returns, (0.5 * 0.5, 2.0 * 1.0), strict=True):
        np.testing.assert_allclose(returns, 7 * way, rtol=0.1)
    with pytest.raises(UserError, match="reads no target return"):
        play(load_policy(run), Request(1, target_return=3.0, workers=1))


@pytest.mark.parametrize("algorithm", ["mtbc", "mtiql"])
def test_bf16_keeps_weights_in_fp32_and_the_loss_close(store: DataStore, algorithm: str) -> None:
    of_heads = {"task_conditioning": "multi-head", "learning_rate": 1e-3}
    full, half = (
        make_trainer(store, configure_mlp(algorithm, precision=precision, **of_heads))
        for precision in ("fp32", "bf16")
    )
    losses = [torch.stack([t.train_step().losses for _ in range(4)]) for t in (full, half)]
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.0)
    assert not torch.equal(*losses)
    assert {tensor.dtype for tensor in half.learner.tensors().values()} == {torch.float32}


def test_settings_that_mean_nothing_are_refused(store: DataStore, tmp_path: Path) -> None:
    refused = {
        "mtbc": ("action-dropout", "return-scale", "target-return"),
        "mtiql": ("action-dropout", "target-return"),
    }
    for algorithm, names in refused.items():
        for name in (*names, "sparsity", "prompt-length", "context-length"):
            with pytest.raises(
                UserError, match=f"--{name} is not a setting of {algorithm}, but of h"
            ):
                begin(store, tmp_path / "run", f"--{name}", "0.5", algorithm=algorithm)
    begin(store, tmp_path / "run", *SMALL, "--return-scale", "7", algorithm="mtiql")


def test_an_algorithms_defaults_are_below_a_presets() -> None:
    ours, theirs = (preset("paper", name) for name in ("mtbc", "prompt-dt"))
    assert (ours.data.batch_per_task, theirs.data.batch_per_task) == (160, 8)
    for name in ("learning_rate", "steps", "tasks_per_step", "evaluation_episodes"):
        assert dict(settings(ours))[name] == dict(settings(theirs))[name]


@pytest.mark.parametrize("algorithm", ["mtbc", "mtiql"])
def test_unseen_tasks_are_refused(store: DataStore, tmp_path: Path, algorithm: str) -> None:
    begin(store, tmp_path / "run", *SMALL, algorithm=algorithm)
    with pytest.raises(UserError, match=f"{algorithm} cannot act on unseen tasks"):
        load_policy(tmp_path / "run", unseen=Unseen(store.path))


def test_a_checkpoint_of_another_size_is_refused(store: DataStore, tmp_path: Path) -> None:
    begin(store, tmp_path / "run", *SMALL, algorithm="mtbc")
    run = RunDirectory(tmp_path / "run")
    config = run.read().config
    config["own"]["hidden_size"] = 24
    run.update({"config": config})
    with pytest.raises(UserError, match=r"of another model size: policy\.hidden\.0\.weight"):
        load_policy(run.path)


def test_it_is_described_by_its_parameters(store: DataStore) -> None:
    setup = make_setup(store, configure_mlp("mtbc"))
    trainer = make_trainer(store, setup.config)
    # Observation and task in, two hidden layers, an action out, with biases.
    expected = (39 + 3 + 1) * 16 + (16 + 1) * 16 + (16 + 1) * 4
    assert trainer.learner.describe() == {"parameters": expected}
