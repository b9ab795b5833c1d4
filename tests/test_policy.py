from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TASKS, configure, make_store, make_trainer

from harmodt import load_policy
from harmodt.batch import Batch, Steps
from harmodt.checkpoint import save_checkpoint
from harmodt.data.store import DataStore, Episode
from harmodt.data.trajectories import Trajectories
from harmodt.data.windows import WindowSampler
from harmodt.data.writer import StoreWriter
from harmodt.devices import Execution
from harmodt.draws import TRAIN, Draws
from harmodt.errors import UserError
from harmodt.masks.bank import TaskMasks, vote
from harmodt.policies.decision import DecisionPolicy
from harmodt.settings import change
from harmodt.training.run import begin

LENGTH = 15  # steps of an episode, more than the context of 6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    # One prompt episode, as long as a prompt: every row of a task has the same prompt.
    return make_store(tmp_path_factory.mktemp("data") / "store", prompt_lengths=(3,))


def make_policy(store: DataStore, **changes: object) -> DecisionPolicy:
    trainer = make_trainer(store, configure(**{"action_dropout": 0.0, **changes}))
    with torch.no_grad():
        for parameter in trainer.learner.model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return trainer.learner.policy(0)


def with_masks(policy: DecisionPolicy, bits: torch.Tensor) -> DecisionPolicy:
    """The same policy under other masks."""
    other = copy.copy(policy)
    other.mask_bits = bits
    return other


def observations(rows: int, seed: int = 0) -> np.ndarray:
    """Float64 observations [LENGTH, rows, 39], as the environments give them."""
    return np.random.default_rng(seed).normal(size=(LENGTH, rows, 39))


def rewards(rows: int) -> np.ndarray:
    return np.random.default_rng(9).uniform(0, 10, (LENGTH, rows))


def play(policy: DecisionPolicy, observations: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """The actions [steps, rows, 4] of some steps."""
    actions = []
    for observation, reward in zip(observations, rewards, strict=True):
        actions.append(policy.act(observation))
        policy.record_rewards(reward)
    return np.stack(actions)


def record_calls(policy: DecisionPolicy, monkeypatch: pytest.MonkeyPatch) -> list[Steps]:
    """The histories that the model is given from now on."""
    calls: list[Steps] = []
    original = policy.model.act

    def act(history: Steps, *arguments: Any) -> torch.Tensor:
        calls.append(Steps(*(part.clone() for part in history)))
        return original(history, *arguments)

    monkeypatch.setattr(policy.model, "act", act)
    return calls


def test_actions_are_one_per_row_in_range(store: DataStore) -> None:
    policy = make_policy(store)
    assert policy.tasks == TASKS
    policy.start(np.array([2, 0, 2, 1]))
    actions = play(policy, observations(4), rewards(4))
    assert actions.shape == (LENGTH, 4, 4)
    assert actions.dtype == np.float32
    assert np.abs(actions).max() <= 1
    assert actions.std() > 0.05


def test_the_history_is_a_window_of_the_same_trajectory(
    store: DataStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(store, max_timesteps=12, return_scale=20.0)
    calls = record_calls(policy, monkeypatch)
    played, paid = observations(2).astype(np.float32), rewards(2).astype(np.float32)
    policy.start(np.array([0, 1]), target_returns=paid.astype(np.float64).sum(0))
    actions = play(policy, played, paid)
    writer = StoreWriter(tmp_path / "played", {}, store.environment)
    for row, name in enumerate(TASKS[:2]):
        with writer.task(name) as task:
            task.add(Episode(played[:, row], actions[:, row], paid[:, row], 1))
    data = [writer.finish(TASKS[:2]).task(name) for name in TASKS[:2]]
    inputs = policy._inputs
    inputs.settings = change(inputs.settings, {"batch_per_task": 300})
    sampler = WindowSampler(Trajectories([task.train for task in data]), inputs, 6)
    batch, _ = sampler.sample((0, 1), Draws(0, TRAIN, 0))
    for row in range(2):
        found = set()
        for window in range(300):
            history = batch.history
            if not history.valid[row, window].all():
                continue
            last = _step_of(history.observations[row, window, -1], policy, row, played)
            found.add(last)
            _check_window(calls[last], history, row, window)
        assert found == set(range(5, LENGTH))
    for time in range(LENGTH):  # while episodes are short, so is what the model computes
        assert calls[time].valid.shape == (2, 1, min(time + 1, 6))
        assert calls[time].valid.all()


def _step_of(
    observation: torch.Tensor, policy: DecisionPolicy, row: int, played: np.ndarray
) -> int:
    conditioning = policy._inputs.conditioning[row]
    normal = (played[:, row] - conditioning.mean) / conditioning.deviation
    return int(np.abs(normal - observation.numpy()).max(1).argmin())


def _check_window(call: Steps, history: Steps, row: int, window: int) -> None:
    for name in ("returns_to_go", "observations", "timesteps", "valid"):
        ours, theirs = getattr(call, name)[row, 0], getattr(history, name)[row, window]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=name)
    # the last action is the one that is asked for
    torch.testing.assert_close(call.actions[row, 0, :-1], history.actions[row, window, :-1])


RESTARTS = {3: (1,), 5: (0, 1), 13: (2,)}
"""The rows of three that begin anew before a step."""


def test_actions_are_those_of_forward_on_the_same_history(
    store: DataStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(store)
    calls = record_calls(policy, monkeypatch)
    tasks, seen, paid = np.array([1, 0, 1]), observations(3), rewards(3)
    policy.start(tasks)
    begun = np.zeros(3, int)
    for time in range(LENGTH):
        restarted = np.isin(np.arange(3), RESTARTS.get(time, ()))
        policy.restart(restarted)
        begun[restarted] = time
        (actions,) = play(policy, seen[time : time + 1], paid[time : time + 1])
        lengths = np.minimum(time + 1 - begun, 6)
        assert calls[time].valid.shape == (2, 2, lengths.max())
        for row, task in enumerate(tasks):
            # groups are in the order of their tasks
            history = Steps(*(part[task, row // 2][None, None] for part in calls[time]))
            assert history.valid.sum() == lengths[row]
            alone = Steps(*(part[:, :, : lengths[row]] for part in history))
            words, inputs = torch.zeros(2, 1, 1, dtype=torch.int64), policy._inputs
            task_ids = torch.tensor([task])
            prompt = inputs.prompts(task_ids, *inputs.draw_prompts(task_ids, *words))
            batch = Batch(task_ids, prompt, alone)
            masks = TaskMasks(policy.model.vector, policy.mask_bits, batch.task_ids)
            with torch.no_grad():
                expected = policy.model(batch, masks)[0, 0, -1]
            np.testing.assert_allclose(actions[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["harmodt-f", "prompt-dt", "mtdt"])
# unequal numbers, not sorted; in the second a task is missing
@pytest.mark.parametrize("task_ids", [(2, 0, 2, 1, 2, 0), (2, 0, 2, 2, 0, 2)])
def test_a_row_does_not_depend_on_the_others(
    store: DataStore, algorithm: str, task_ids: tuple[int, ...]
) -> None:
    policy = make_policy(store, algorithm=algorithm)
    seen, paid = observations(6), rewards(6)
    tasks = np.array(task_ids)
    policy.start(tasks)
    together = play(policy, seen, paid)
    for row in range(6):
        policy.start(tasks[row : row + 1])
        alone = play(policy, seen[:, row : row + 1], paid[:, row : row + 1])
        np.testing.assert_allclose(together[:, row], alone[:, 0], rtol=1e-4, atol=1e-5)
    policy.start(tasks[::-1].copy())
    reverse = play(policy, seen[:, ::-1], paid[:, ::-1])
    np.testing.assert_allclose(together, reverse[:, ::-1], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    "task_ids",
    [(0, 0, 1, 1, 2, 2), (2, 0, 1, 0, 1, 2), (2, 0, 2, 2, 0, 2)],
    ids=["in order", "as many of each", "more of one"],
)
def test_recorded_actions_are_those_that_are_computed_anew(
    store: DataStore, task_ids: tuple[int, ...]
) -> None:
    played = []
    for graph in (True, False):
        torch.manual_seed(0)
        policy = make_policy(store, fused=True, graph=graph, action_dropout=0.3)
        policy.start(np.array(task_ids))
        before = play(policy, observations(6), rewards(6))  # histories are full for half of it
        policy.restart(np.arange(6) == 4)
        played.append((before, play(policy, observations(6, seed=1), rewards(6))))
    for recorded, anew in zip(*played, strict=True):
        np.testing.assert_array_equal(recorded, anew)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("task_ids", [(0, 0, 1, 2), (2, 0, 2, 1)], ids=["in order", "not"])
def test_rounds_of_the_same_rows_keep_their_graph(
    store: DataStore, monkeypatch: pytest.MonkeyPatch, task_ids: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    policy = make_policy(store, fused=True, action_dropout=0.3)
    fresh = [copy.copy(policy) for _ in range(3)]
    made: list[object] = []
    repeated = Execution.repeated

    def count(execution: Execution, function: Any) -> Any:
        made.append(function)
        return repeated(execution, function)

    monkeypatch.setattr(Execution, "repeated", count)
    found = []
    for number in range(3):
        targets = np.full(4, 10.0 + number)
        policy.start(np.array(task_ids), seed=number, target_returns=targets)
        found.append(play(policy, observations(4, seed=number), rewards(4)))
    assert len(made) == 1
    for number, (actions, other) in enumerate(zip(found, fresh, strict=True)):
        targets = np.full(4, 10.0 + number)
        other.start(np.array(task_ids), seed=number, target_returns=targets)
        expected = play(other, observations(4, seed=number), rewards(4))
        np.testing.assert_array_equal(actions, expected)
    policy.start(np.array(task_ids[:3]))
    policy.use_voted_mask()
    policy.start(np.array(task_ids[:3]))
    assert len(made) == 1 + 3 + 2


@pytest.mark.usefixtures("native")
def test_a_graph_that_is_kept_sees_what_was_learned_since(store: DataStore) -> None:
    learner = make_trainer(store, configure(fused=True, action_dropout=0.0)).learner
    kept, task_ids = learner.policy(0), np.array([0, 0, 1, 1])
    kept.start(task_ids)
    before = play(kept, observations(4), rewards(4))
    learner.resume_training()
    for step in range(1, 4):
        learner.before_step(step - 1)
        learner.train_step(step)
    fresh, after = learner.policy(3), []
    for policy in (kept, fresh):
        policy.start(task_ids)
        after.append(play(policy, observations(4), rewards(4)))
    np.testing.assert_array_equal(*after)
    assert np.abs(after[0] - before).max() > 1e-3


@pytest.mark.parametrize(("drop", "draws"), [(0.0, False), (0.5, True), (1.0, False)])
def test_nothing_is_drawn_where_no_action_or_every_action_is_hidden(
    store: DataStore, drop: float, draws: bool
) -> None:
    policy = make_policy(store, algorithm="mtdt", action_dropout=drop)
    policy.start(np.array([0, 1]))
    before = policy._rng.bit_generator.state
    play(policy, observations(2), rewards(2))
    assert (policy._rng.bit_generator.state != before) == draws


def test_each_task_has_its_own_mask_and_normalisation(store: DataStore) -> None:
    policy = make_policy(store)
    same = np.repeat(observations(1), 3, axis=1)
    policy.start(np.array([0, 1, 2]), target_returns=np.full(3, 100.0))
    actions = play(policy, same, np.zeros((LENGTH, 3)))
    assert np.abs(actions[:, 0] - actions[:, 1]).max() > 1e-2
    assert np.abs(actions[:, 1] - actions[:, 2]).max() > 1e-2
    whole = torch.full_like(policy.mask_bits, -1)
    dense = with_masks(policy, whole)
    dense.start(np.array([0, 1, 2]), target_returns=np.full(3, 100.0))
    assert np.abs(play(dense, same, np.zeros((LENGTH, 3))) - actions).max() > 1e-2


def test_restarted_rows_begin_anew_and_the_others_go_on(store: DataStore) -> None:
    policy = make_policy(store)
    tasks, seen, paid = np.array([1, 0, 1]), observations(3), rewards(3)
    policy.start(tasks)
    straight = play(policy, seen, paid)
    policy.start(tasks)
    play(policy, seen[:8], paid[:8])
    policy.restart(np.array([False, True, True]))
    mixed = seen.copy()[:7]
    mixed[:, 0] = seen[8:, 0]
    after = play(policy, mixed, np.concatenate((paid[8:, :1], paid[:7, 1:]), axis=1))
    np.testing.assert_allclose(after[:, 0], straight[8:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after[:, 1:], straight[:7, 1:], rtol=1e-5, atol=1e-6)
    policy.restart(np.zeros(3, bool))  # nothing to do


def test_a_restarted_row_keeps_nothing_of_a_broken_episode(store: DataStore) -> None:
    policy = make_policy(store)
    seen, paid, tasks = observations(2), rewards(2), np.array([0, 0])
    policy.start(tasks)
    expected = play(policy, seen, paid)
    broken = seen.copy()
    broken[:, 1] = 1e30  # the model computes NaN from it
    policy.start(tasks)
    assert np.isnan(play(policy, broken, paid)[:, 1]).any()
    policy.restart(np.array([False, True]))
    after = play(policy, seen, paid)
    np.testing.assert_allclose(after[:, 1], expected[:, 1], rtol=1e-4, atol=1e-5)


def test_a_restart_draws_a_new_prompt(tmp_path: Path) -> None:
    policy = make_policy(make_store(tmp_path / "store", prompt_lengths=(40, 40)))
    seen = observations(2)
    first = []
    policy.start(np.array([0, 0]))
    for _ in range(4):
        first.append(policy.act(seen[0]))
        policy.record_rewards(np.zeros(2))
        policy.restart(np.array([True, False]))
    assert len({action.tobytes() for action in np.stack(first)[:, 0]}) > 1


def test_prompts_are_seeded(tmp_path: Path) -> None:
    policy = make_policy(make_store(tmp_path / "store", prompt_lengths=(40, 40)))
    actions = []
    for seed in (0, 0, 1):
        policy.start(np.array([0, 1, 2]), seed=seed)
        actions.append(policy.act(observations(3)[0]))
    np.testing.assert_array_equal(actions[0], actions[1])
    assert (actions[0] != actions[2]).any()


def test_the_return_to_go_falls_by_the_rewards(
    store: DataStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(store, return_scale=10.0)
    best = [max(store.task(name).train.returns) for name in TASKS]
    np.testing.assert_allclose(policy.target_returns, best, rtol=1e-6)
    calls = record_calls(policy, monkeypatch)
    paid = rewards(2)
    policy.start(np.array([0, 2]))
    play(policy, observations(2), paid)
    for row, task in enumerate((0, 2)):
        received = np.concatenate(([0.0], np.cumsum(paid[:, row])))
        expected = (best[task] - received) / 10
        np.testing.assert_allclose(calls[-1].returns_to_go[row, 0], expected[9:15], rtol=1e-5)
    policy.start(np.array([0, 2]), target_returns=np.array([50, 70]))
    policy.act(observations(2)[0])
    assert calls[-1].returns_to_go[:, 0, -1].tolist() == [5.0, 7.0]


@pytest.mark.parametrize("drop", [0.0, 0.5, 1.0])
def test_actions_are_hidden_as_in_training(
    store: DataStore, monkeypatch: pytest.MonkeyPatch, drop: float
) -> None:
    policy = make_policy(store, action_dropout=drop)
    calls = record_calls(policy, monkeypatch)
    policy.start(np.zeros(40, int))
    actions = play(policy, observations(40), rewards(40))
    before = calls[-1].actions[0, :, :-1].numpy()  # [rows, K - 1, 4]
    hidden = (before == 0).all(-1)
    assert abs(hidden.mean() - drop) <= 5 * (drop * (1 - drop) / hidden.size) ** 0.5
    executed = actions[-6:-1].transpose(1, 0, 2)
    np.testing.assert_array_equal(before[~hidden], executed[~hidden])


def test_the_voted_mask_takes_the_place_of_every_tasks_own(store: DataStore) -> None:
    policy = make_policy(store, sparsity=0.5, unseen_threshold=0.4)
    bits = vote(policy.mask_bits, 0.4)
    expected = with_masks(policy, bits.repeat(3, 1))
    assert policy.mask == "task"
    policy.use_voted_mask()
    assert policy.mask == "voted"
    actions = []
    for each in (policy, expected):
        each.start(np.array([1, 0, 2]))
        actions.append(play(each, observations(3), rewards(3)))
    np.testing.assert_array_equal(*actions)
    dense = make_policy(store, algorithm="prompt-dt")
    assert dense.mask == "none"
    with pytest.raises(UserError, match="has no masks to vote"):
        dense.use_voted_mask()


@pytest.mark.parametrize("algorithm", ["harmodt-f", "soco-dt", "prompt-dt", "mtdt"])
def test_a_loaded_policy_acts_as_the_one_that_was_saved(
    store: DataStore, tmp_path: Path, algorithm: str
) -> None:
    config = configure(algorithm=algorithm, dropout=0.5, action_dropout=0.0)
    trainer = begin(tmp_path / "run", "quickstart", config, store, TASKS)
    for step in (1, 2):
        trainer.train_step()
        save_checkpoint(trainer.directory, step, trainer.learner.tensors())
    path = trainer.directory.path
    loaded = load_policy(path)
    assert (loaded.tasks, loaded.step) == (TASKS, 2)
    assert loaded.environment == store.environment
    assert (loaded.backend, loaded.precision, loaded.device) == ("pytorch", "fp32", "cpu")
    actions = []
    for policy in (trainer.learner.policy(2), loaded, load_policy(path, checkpoint=1)):
        policy.start(np.array([1, 0, 2]), seed=3)
        actions.append(play(policy, observations(3), rewards(3)))
    np.testing.assert_array_equal(actions[0], actions[1])
    assert (actions[0] != actions[2]).any()


def test_only_the_prompts_of_restarted_rows_are_encoded(
    store: DataStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(store)
    encoded = []
    original = policy.model.encode_prompt

    def encode(prompt: Steps, *arguments: Any) -> Any:
        encoded.append(prompt.valid.shape[:2].numel())
        return original(prompt, *arguments)

    monkeypatch.setattr(policy.model, "encode_prompt", encode)
    policy.start(np.array([2, 0, 2, 1]))
    policy.restart(np.array([False, False, True, False]))
    policy.restart(np.array([True, True, False, False]))
    assert encoded == [6, 1, 2]  # at first all; the groups of one row are filled up to two


@pytest.mark.parametrize("changes", [{}, {"algorithm": "mtdt"}, {"context_length": 1}])
def test_every_variant_acts(store: DataStore, changes: dict[str, Any]) -> None:
    policy = make_policy(store, **changes)
    policy.start(np.array([0, 1, 1]))
    assert np.isfinite(play(policy, observations(3), rewards(3))).all()
