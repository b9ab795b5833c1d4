"""A new algorithm is a file and a row: one that is nothing like the others trains and acts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TASKS, make_store
from torch import Tensor, nn

from harmodt import algorithms, load_policy, train
from harmodt.algorithms import Algorithm, Learner, Setup
from harmodt.batch import Batch
from harmodt.checkpoint import load_checkpoint
from harmodt.config import AlgorithmSettings
from harmodt.data.inputs import Inputs
from harmodt.data.store import DataStore
from harmodt.data.trajectories import Trajectories
from harmodt.data.windows import WindowSampler
from harmodt.errors import UserError
from harmodt.rundir import RunDirectory
from harmodt.settings import Count
from harmodt_kernels.vector import ParameterVector


@dataclass(frozen=True)
class ActorCriticSettings(AlgorithmSettings):
    """An actor and a critic."""

    hidden: Count = 8
    """Width of both."""


class ActorCritic(Learner[ActorCriticSettings]):
    """Two networks, no masks, no history and no prompt; trains on single steps."""

    def __init__(self, setup: Setup):
        super().__init__(setup)
        spec, hidden = setup.environment, self.settings.hidden
        self.networks = {
            name: nn.Sequential(
                nn.Linear(spec.observation_size, hidden), nn.ReLU(), nn.Linear(hidden, size)
            )
            for name, size in {"actor": spec.action_size, "critic": 1}.items()
        }
        for name, network in self.networks.items():
            self.trained[name] = ParameterVector(network, self.execution.device)

    def make_sampler(self, episodes: Trajectories, inputs: Inputs) -> WindowSampler:
        return WindowSampler(episodes, inputs, 1, self.execution.device)

    def losses(self, batch: Batch, targets: Tensor, *extra: Tensor) -> Tensor:
        observations, to_go = batch.history.observations, batch.history.returns_to_go
        actor = (self.networks["actor"](observations) - targets).square().mean((1, 2, 3))
        critic = (self.networks["critic"](observations)[..., 0] - to_go).square().mean((1, 2))
        return actor + critic

    def policy(self, step: int) -> ActorPolicy:
        return ActorPolicy(self.setup, self.networks["actor"], step)


class ActorPolicy:
    mask, backend, precision, device = "none", "pytorch", "fp32", "cpu"

    def __init__(self, setup: Setup, actor: nn.Module, step: int):
        self.actor, self.step, self.environment = actor, step, setup.environment
        self.tasks = tuple(task.name for task in setup.conditioning)
        self.target_returns = np.array([task.target_return for task in setup.conditioning])

    def act(self, observations: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.actor(torch.from_numpy(observations.astype(np.float32))).numpy()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataStore:
    row = Algorithm(ActorCriticSettings, ActorCritic)
    monkeypatch.setitem(algorithms.ALGORITHMS, "actor-critic", row)
    return make_store(tmp_path / "store", TASKS)


def begin(store: DataStore, output: Path, *more: str) -> Path:
    train.main(
        [
            *("--algorithm", "actor-critic", "--data", str(store.path), "--output", str(output)),
            *("--steps", "60", "--tasks-per-step", "2", "--evaluation-episodes", "0"),
            *("--checkpoint-every", "20", "--learning-rate", "0.01", "--warmup-steps", "5"),
            *("--device", "cpu", "--no-fused", *more),
        ]
    )
    return output


def test_it_trains_and_acts(store: DataStore, tmp_path: Path, capsys) -> None:
    run = begin(store, tmp_path / "run", "--hidden", "16")
    assert "actor-critic on 3 tasks: 0.00 M parameters, cpu, pytorch" in capsys.readouterr().out
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]
    assert losses[-1] < 0.8 * losses[0]
    description = json.loads((run / "run.json").read_text())
    assert description["parameters"] == (39 * 16 + 16) * 2 + 17 * 5
    assert description["config"]["own"] == {"hidden": 16}
    policy = load_policy(run)
    assert (policy.step, policy.tasks) == (60, TASKS)
    assert policy.act(np.zeros((2, 39))).shape == (2, 4)


def test_it_goes_on_after_a_kill(store: DataStore, tmp_path: Path) -> None:
    whole, cut = (begin(store, tmp_path / name) for name in ("whole", "cut"))
    for step in (40, 60):
        directory = RunDirectory(cut).checkpoint(step)
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
    train.main(["--resume", str(cut)])
    ours, theirs = (load_checkpoint(RunDirectory(run)) for run in (cut, whole))
    assert ours.step == theirs.step == 60
    for name, tensor in theirs.tensors.items():
        assert torch.equal(ours.tensors[name], tensor), name


def test_it_has_its_own_settings(store: DataStore, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="--sparsity is not a setting of actor-critic, but of harmodt"
    ):
        begin(store, tmp_path / "run", "--sparsity", "0.5")
    with pytest.raises(UserError, match="hidden is 0: give 1 or more"):
        begin(store, tmp_path / "run", "--hidden", "0")
