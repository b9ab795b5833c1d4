"""A new algorithm is a file and a row: one that is nothing like the others trains and acts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TASKS, make_store
from torch import Tensor, nn

from harmodt import algorithms, load_policy, train
from harmodt.algorithms import Algorithm, Setup, StepResult
from harmodt.algorithms.optimiser import Optimiser
from harmodt.checkpoint import Checkpoint, load_checkpoint
from harmodt.config import AlgorithmSettings
from harmodt.data.order import TaskOrder
from harmodt.data.store import DataStore, TaskData
from harmodt.draws import TRAIN, Draws, below
from harmodt.errors import UserError
from harmodt.masks.vector import ParameterVector
from harmodt.rundir import RunDirectory
from harmodt.settings import Count


@dataclass(frozen=True)
class ActorCriticSettings(AlgorithmSettings):
    """An actor and a critic."""

    hidden: Count = 8
    """Width of both."""


class ActorCritic:
    """Two networks with an optimiser each, no masks and no history; trains on single steps."""

    def __init__(self, setup: Setup, data: Sequence[TaskData] = ()):
        self.setup, self.data = setup, data
        spec, hidden = setup.environment, setup.config.own.hidden
        sizes = {"actor": spec.action_size, "critic": 1}
        self.networks = {
            name: nn.Sequential(
                nn.Linear(spec.observation_size, hidden), nn.ReLU(), nn.Linear(hidden, size)
            )
            for name, size in sizes.items()
        }
        device, backend = setup.execution.device, setup.execution.backend
        self.vectors = {n: ParameterVector(net, device) for n, net in self.networks.items()}
        self.order = TaskOrder(setup.config.data, len(setup.conditioning), seed=0)
        self.optimisers = {
            name: Optimiser(vector, setup.config.optimisation, backend)
            for name, vector in self.vectors.items()
        }

    def train_step(self, step: int) -> StepResult:
        (tasks,) = self.order.of(range(step, step + 1))
        draws, task_ids = Draws(0, TRAIN, step), tasks.tolist()
        (rates,) = next(iter(self.optimisers.values())).rates([step])
        losses, norms = torch.zeros(len(task_ids)), []
        for name, network in self.networks.items():
            self.vectors[name].gradient.zero_()
            of_tasks = torch.stack([self.loss(network, name, t, draws) for t in task_ids])
            of_tasks.mean().backward()
            norms.append(self.optimisers[name].step(None, tasks, rates))
            losses += of_tasks.detach()
        return StepResult(task_ids, losses, torch.stack(norms).max())

    def loss(self, network: nn.Module, name: str, task: int, draws: Draws) -> Tensor:
        train = self.data[task].train
        words = draws.words(torch.arange(8), group=task, block=len(name))[0]
        steps = below(words, len(train.rewards)).numpy()
        wanted = train.actions[steps] if name == "actor" else train.rewards[steps, None] / 10
        inputs = torch.from_numpy(np.array(train.observations[steps]))
        return (network(inputs) - torch.from_numpy(np.array(wanted))).square().mean()

    def before_step(self, step: int) -> dict[str, float]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": tensor
            for name, network in self.networks.items()
            for key, tensor in [
                *((key, parameter.detach()) for key, parameter in network.named_parameters()),
                *self.optimisers[name].tensors().items(),
            ]
        }

    def policy(self, step: int) -> ActorPolicy:
        return ActorPolicy(self.setup, self.networks["actor"], step)

    def resume_training(self) -> None:
        pass

    def describe(self) -> dict[str, int]:
        parameters = (p for network in self.networks.values() for p in network.parameters())
        return {"parameters": sum(p.numel() for p in parameters)}


class ActorPolicy:
    mask, backend, precision, device = "none", "pytorch", "fp32", "cpu"

    def __init__(self, setup: Setup, actor: nn.Module, step: int):
        self.actor, self.step, self.environment = actor, step, setup.environment
        self.tasks = tuple(task.name for task in setup.conditioning)
        self.target_returns = np.array([task.target_return for task in setup.conditioning])

    def act(self, observations: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.actor(torch.from_numpy(observations.astype(np.float32))).numpy()


def actor_policy(setup: Setup, checkpoint: Checkpoint) -> ActorPolicy:
    learner = ActorCritic(setup)
    checkpoint.copy_to(learner.tensors())
    return learner.policy(checkpoint.step)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataStore:
    row = Algorithm(ActorCriticSettings, ActorCritic, actor_policy)
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
    with pytest.raises(UserError, match="--sparsity is no setting of actor-critic, but of harmodt"):
        begin(store, tmp_path / "run", "--sparsity", "0.5")
    with pytest.raises(UserError, match="hidden is 0: give 1 or more"):
        begin(store, tmp_path / "run", "--hidden", "0")
