from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlps import Weights, configure_mlp
from tiny import SPEC, TASKS, make_episode, make_trainer
from torch import Tensor

from harmodt.algorithms import preset
from harmodt.algorithms.mtiql import LARGEST_WEIGHT
from harmodt.data.store import UNKNOWN, DataStore
from harmodt.data.transitions import transitions_of
from harmodt.data.writer import StoreWriter
from harmodt.errors import UserError
from harmodt.settings import change, check
from harmodt.training.trainer import Trainer

NETWORKS = ("policy", "value", "critics")


def write_store(path: Path, *endings: int) -> DataStore:
    """Short episodes that ended so, whose steps are often the last one."""
    rng = np.random.default_rng(0)
    writer = StoreWriter(path, {}, SPEC)
    for index, name in enumerate(TASKS):
        with writer.task(name) as task:
            for length, terminated in zip((9, 5, 7), endings, strict=True):
                task.add(make_episode(rng, length, index)._replace(terminated=terminated))
            task.add_prompt(make_episode(rng, 9, index))
    return writer.finish(TASKS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return write_store(tmp_path_factory.mktemp("data") / "store", UNKNOWN, 1, 0)


class Oracle:
    """The losses of IQL in float64, one transition at a time."""

    def __init__(self, trainer: Trainer):
        self.own = trainer.setup.config.own
        self.weights = Weights(trainer.learner.tensors(), NETWORKS)
        self.action_weights: list[float] = []

    def losses(self, batch: Any, actions: Tensor) -> Tensor:
        step = transitions_of(batch, actions, SPEC)
        groups = []
        for group, task in enumerate(batch.task_ids.tolist()):
            rows = [part[group].double() for part in step]
            counted = [self._loss(task, *row) for row in zip(*rows, strict=True) if row[-1]]
            groups.append(torch.stack(counted).mean())
        return torch.stack(groups)

    def _loss(
        self, task: int, observation: Tensor, action: Tensor, reward: Tensor, following: Tensor,
        terminal: Tensor, _known: Tensor,
    ) -> Tensor:  # fmt: skip
        own, task_input = self.own, self.own.critic_conditioning
        forward, pair = self.weights.forward, torch.cat((observation, action))

        def value(x: Tensor) -> Tensor:
            return forward("value", x, task, 3, task_input)[0]

        worth = min(
            forward(f"target_critics.{i}", pair, task, 3, task_input)[0].item() for i in (0, 1)
        )
        wanted = reward.item() + own.discount * (1 - terminal.item()) * value(following).item()
        advantage = worth - value(observation)
        share = own.expectile if advantage.item() > 0 else 1 - own.expectile
        weight = min(math.exp(own.temperature * advantage.item()), LARGEST_WEIGHT)
        self.action_weights.append(weight)
        chosen = torch.tanh(forward("policy", observation, task, 3, own.task_conditioning))
        loss = share * advantage**2 + weight * ((chosen - action) ** 2).sum() / 4
        for i in (0, 1):
            loss = loss + (forward(f"critics.{i}", pair, task, 3, task_input)[0] - wanted) ** 2
        return loss

    def follow(self) -> None:
        """The targets' step towards the critics."""
        for name, target in self.weights.all.items():
            if name.startswith("target_critics."):
                critic = self.weights.all[name.removeprefix("target_")].detach()
                target += self.own.target_rate * (critic - target)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 3.0},
        {
            "temperature": 3.0,
            "critic_conditioning": "one-hot",
            "task_conditioning": "multi-head",
        },
        {"temperature": 60.0, "expectile": 0.9, "discount": 0.5, "target_rate": 0.5},
    ],
    ids=["one-hot policy", "told otherwise", "other numbers"],
)
def test_steps_equal_a_computation_in_float64(store: DataStore, changes: dict[str, Any]) -> None:
    config = configure_mlp("mtiql", return_scale=1.0, **changes)
    trainer = make_trainer(store, config)
    oracle = Oracle(trainer)
    for step in (1, 2, 3):
        task_ids = trainer.learner.feed.load(step)
        losses = oracle.losses(*trainer.learner.feed.batch())
        norm = oracle.weights.learn(losses.mean(), step)
        oracle.follow()
        result = trainer.train_step()
        assert list(result.task_ids) == task_ids
        torch.testing.assert_close(result.losses.double(), losses.detach(), rtol=1e-4, atol=1e-5)
        assert result.gradient_norm.item() == pytest.approx(norm, rel=1e-4)
        oracle.weights.check(trainer.learner.tensors())
    largest = [weight == LARGEST_WEIGHT for weight in oracle.action_weights]
    assert oracle.weights.clipped
    assert not all(largest)
    assert any(largest) == (changes["temperature"] > 3.0)


def test_at_a_temperature_of_zero_the_policy_is_mtbcs(tmp_path: Path) -> None:
    """Where all episodes terminated, so that no last step is left out, and nothing is clipped."""
    store = write_store(tmp_path / "store", 1, 1, 1)
    iql = make_trainer(store, configure_mlp("mtiql", temperature=0.0, gradient_clip=1e9))
    cloning = make_trainer(store, configure_mlp("mtbc", gradient_clip=1e9))
    for name, tensor in cloning.learner.tensors().items():
        tensor.copy_(iql.learner.tensors()[name])
    for _ in range(4):
        iql.train_step()
        cloning.train_step()
    ours, theirs = iql.learner.tensors(), cloning.learner.tensors()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_the_targets_begin_as_the_critics_which_differ(store: DataStore) -> None:
    tensors = make_trainer(store, configure_mlp("mtiql")).learner.tensors()
    for name, tensor in tensors.items():
        if name.startswith("target_critics."):
            assert torch.equal(tensor, tensors[name.removeprefix("target_")])
    assert not torch.equal(tensors["critics.0.head.weight"], tensors["critics.1.head.weight"])


def test_a_reward_of_one_at_every_step_is_worth_the_sum_of_its_discounts(
    store: DataStore,
) -> None:
    """Where nothing ends, and where all does after the present step."""
    own = {"discount": 0.5, "expectile": 0.5, "target_rate": 0.1, "steps": 600}
    config = configure_mlp(
        "mtiql", return_scale=1.0, learning_rate=3e-3, weight_decay=0.0, adam_epsilon=1e-8,
        gradient_clip=10.0, **own,
    )  # fmt: skip
    trainer = make_trainer(store, config)
    batch_of = trainer.learner.feed.batch

    def ones() -> tuple[Any, Tensor]:
        batch, actions = batch_of()
        ends = batch.task_ids == 0  # task 0's steps are all last ones
        valid = torch.ones_like(batch.history.valid)
        valid[ends, :, 1] = False
        to_go = torch.ones_like(batch.history.returns_to_go) * torch.tensor([2.0, 1.0])
        to_go[ends] = 1.0
        return batch._replace(
            history=batch.history._replace(returns_to_go=to_go, valid=valid),
            terminated=torch.ones_like(batch.terminated),
        ), actions

    trainer.learner.feed.batch = ones
    for _ in range(600):
        trainer.train_step()
    batch, _ = batch_of()
    values = trainer.learner.networks["value"](batch.history.observations[:, :, 0], batch.task_ids)
    for task, value in zip(batch.task_ids.tolist(), values.mean((1, 2)).tolist(), strict=True):
        assert value == pytest.approx(1.0 if task == 0 else 2.0, abs=0.15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expectile": 0.0}, "expectile is 0.0: give a share in"),
        ({"expectile": 1.0}, "expectile is 1.0"),
        ({"discount": 1.0}, "discount is 1.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"target_rate": 0.0}, "target_rate is 0.0"),
        ({"target_rate": 1.5}, "target_rate is 1.5"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_layers": 0}, "hidden_layers is 0"),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(change(preset("quickstart", "mtiql"), changes))
