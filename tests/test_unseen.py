"""Tasks that a run was not trained on: what it is told of them, and under which mask it acts."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import TASKS, configure, make_setup, make_store, unpack_masks

from harmodt import evaluate, load_policy
from harmodt.algorithms import find
from harmodt.algorithms import unseen as unseen_module
from harmodt.algorithms.unseen import Unseen, nearest_tasks
from harmodt.checkpoint import load_checkpoint, save_checkpoint
from harmodt.data.inputs import TaskConditioning
from harmodt.data.store import DataStore
from harmodt.errors import UserError, run_command
from harmodt.masks.bank import vote
from harmodt.policies.decision import DecisionPolicy
from harmodt.results import EvaluationResult
from harmodt.training import run as module
from harmodt.training.run import SavedRun

UNSEEN = ("door-open-v3", "window-open-v3")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("trained") / "store")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("unseen") / "store", UNSEEN, seed=5)


def begin(folder: Path, store: DataStore, algorithm: str = "harmodt-r", **changes: Any) -> Path:
    """A run with random weights, at step 3."""
    run = module.begin(
        folder / "run", "quickstart", configure(algorithm, **changes), store, store.tasks
    )
    torch.manual_seed(1)
    for parameter in run.learner.model.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    save_checkpoint(run.directory, 3, run.learner.tensors())
    return run.directory.path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, store: DataStore) -> Path:
    return begin(tmp_path_factory.mktemp("run"), store)


def meet(run: Path, others: DataStore, **how: Any) -> DecisionPolicy:
    policy = load_policy(run, unseen=Unseen(others.path, **how))
    assert isinstance(policy, DecisionPolicy)
    return policy


def masks_of(run: Path) -> torch.Tensor:
    return load_checkpoint(SavedRun.open(run).directory).tensors["masks"]


def actions(policy: DecisionPolicy, tasks: int = 2) -> np.ndarray:
    policy.start(np.arange(tasks), seed=3)
    chosen = []
    for observations in np.random.default_rng(0).normal(size=(4, tasks, 39)):
        chosen.append(policy.act(observations))
        policy.record_rewards(np.zeros(tasks))
    return np.stack(chosen)


def test_only_prompts_are_taken_from_an_unseen_task(store: DataStore, others: DataStore) -> None:
    config = configure()
    trained = [TaskConditioning.from_data(store.task(name), config) for name in TASKS]
    data = dataclasses.replace(
        others.task(UNSEEN[0]),
        **dict.fromkeys(("train", "observation_mean", "observation_std", "best_return"), None),
    )
    found = TaskConditioning.of_unseen(data, trained, config)
    np.testing.assert_allclose(found.mean, np.mean([t.mean for t in trained], 0), rtol=1e-6)
    np.testing.assert_allclose(
        found.deviation, np.mean([t.deviation for t in trained], 0), rtol=1e-6
    )
    assert found.mean.dtype == found.deviation.dtype == np.float32
    assert found.target_return == data.prompts.returns.max() == found.prompts.returns[0]
    given = TaskConditioning.of_unseen(data, trained, configure(target_return=7.0))
    assert given.target_return == 7


def test_without_prompt_episodes_an_unseen_task_is_refused(
    tmp_path: Path, store: DataStore
) -> None:
    bare = make_store(tmp_path / "bare", UNSEEN[:1], prompt_lengths=())
    with pytest.raises(UserError, match="door-open-v3 has no prompt episodes"):
        TaskConditioning.of_unseen(bare.task(UNSEEN[0]), [], configure())


@pytest.mark.parametrize(("threshold", "least"), [(None, 2), (0.9, 3), (1, 2), (2, 3), (0, 1)])
def test_the_voted_mask_is_that_of_the_training_tasks(
    run: Path, others: DataStore, threshold: float | None, least: int
) -> None:
    policy = meet(run, others, mask="voted", threshold=threshold)
    votes = dict.fromkeys(unpack_masks(policy.model, masks_of(run)[0]), 0)
    for bits in masks_of(run):
        for name, mask in unpack_masks(policy.model, bits).items():
            votes[name] = votes[name] + mask.int()
    assert policy.tasks == UNSEEN and policy.mask_bits is not None
    for bits in policy.mask_bits:
        for name, mask in unpack_masks(policy.model, bits).items():
            assert torch.equal(mask, votes[name] >= least)
    assert policy.mask == ("voted" if threshold is None else f"voted>{threshold}")
    assert policy.unseen == others.checksum


@pytest.mark.parametrize("threshold", [3, 25, 1.5, -0.5])
def test_a_threshold_that_leaves_nothing_is_refused(
    run: Path, others: DataStore, threshold: float
) -> None:
    with pytest.raises(UserError, match=f"is {threshold} and there are 3 tasks: give a share"):
        meet(run, others, threshold=threshold)


def test_a_share_is_counted_without_rounding() -> None:
    bits = torch.zeros(100, 1, dtype=torch.int32)
    bits[:29] = 1
    bits[:30] |= 2
    assert 0.29 * 100 < 29
    assert vote(bits, 0.29).tolist() == vote(bits, 29).tolist() == [2]


def test_two_tasks_vote_for_what_both_have() -> None:
    bits = torch.tensor([[0b0011], [0b0101]], dtype=torch.int32)
    assert vote(bits).item() == vote(bits, 1).item() == 0b0001
    assert vote(bits, 0.49).item() == vote(bits, 0).item() == 0b0111


def test_without_a_mask_all_weights_act(run: Path, others: DataStore) -> None:
    policy = meet(run, others, mask="none")
    assert (policy.mask_bits, policy.mask) == (None, "none")
    dense = actions(policy)
    policy.mask_bits = torch.full_like(masks_of(run)[:2], -1)
    np.testing.assert_allclose(actions(policy), dense, atol=1e-6)
    policy.mask_bits = masks_of(run)[:2]
    assert np.abs(actions(policy) - dense).max() > 0.01


def test_a_random_mask_has_the_voted_ones_weights_in_each_layer(
    run: Path, others: DataStore
) -> None:
    voted = meet(run, others, mask="voted")
    policies = [meet(run, others, mask="random", seed=seed) for seed in (0, 0, 1)]
    first, again, other = (policy.mask_bits[0] for policy in policies)  # type: ignore[index]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert voted.mask_bits is not None
    as_voted = unpack_masks(voted.model, voted.mask_bits[0])
    differing = 0
    for name, mask in unpack_masks(voted.model, first).items():
        assert mask.sum() == as_voted[name].sum()
        differing += int((mask != as_voted[name]).sum())
    assert differing > 100


@pytest.mark.parametrize("embedding", [0, 5])
def test_the_nearest_task_is_the_one_whose_prompts_are_the_same(
    run: Path, store: DataStore, tmp_path: Path, embedding: int
) -> None:
    # Prompt episodes of one window: a task's gradient depends on no draw.
    one = make_store(tmp_path / "one", prompt_lengths=(6,))
    only = {"action_dropout": 0.0, "prompt_length": 6, "task_embedding_dim": embedding}
    saved = SavedRun.open(begin(tmp_path, one, **only))
    setup, state = make_setup(one, saved.config), load_checkpoint(saved.directory)
    order = [2, 0, 1, 0]
    unseen = [dataclasses.replace(setup.conditioning[i], name=f"unseen {i}") for i in order]
    assert nearest_tasks(setup, state, unseen).tolist() == order
    policy = load_policy(saved.directory.path, unseen=Unseen(one.path, mask="nearest"))
    assert isinstance(policy, DecisionPolicy)
    assert policy.mask_bits is not None and torch.equal(policy.mask_bits, state.tensors["masks"])


@pytest.mark.parametrize(
    ("algorithm", "mask"), [("mtdt", "none"), ("prompt-dt", "none"), ("harmodt-r", "voted")]
)
def test_a_model_with_a_task_embedding_is_told_the_mean(
    store: DataStore, others: DataStore, tmp_path: Path, algorithm: str, mask: str
) -> None:
    path = begin(tmp_path, store, algorithm, task_embedding_dim=5)
    policy = load_policy(path, unseen=Unseen(others.path))
    assert isinstance(policy, DecisionPolicy) and policy.mask == mask
    assert np.isfinite(actions(policy)).all()
    saved = SavedRun.open(path)
    state = load_checkpoint(saved.directory)
    learner = find(algorithm).learner(make_setup(store, saved.config))
    learner.load(state)
    trained = learner.model
    mean = trained.task_embedding.weight.mean(0)
    assert torch.allclose(policy.model.task_embedding.weight, mean.expand(2, -1))
    for (name, ours), theirs in zip(
        policy.model.named_parameters(), trained.parameters(), strict=True
    ):
        assert name.startswith("task_embedding") or torch.equal(ours, theirs)


@pytest.mark.parametrize("algorithm", ["mtdt", "prompt-dt"])
@pytest.mark.parametrize("mask", ["voted", "random", "nearest"])
def test_a_mask_is_refused_before_anything_is_computed_where_the_run_has_none(
    store: DataStore,
    others: DataStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: str,
    mask: Any,
) -> None:
    path = begin(tmp_path, store, algorithm)

    def computed(*_: Any) -> None:
        raise AssertionError("a model was built or a gradient computed")

    for name in ("_sequence_learner", "_masks_under"):
        monkeypatch.setattr(unseen_module, name, computed)
    with pytest.raises(UserError, match=f"{algorithm} has no masks: evaluate it with --mask none"):
        load_policy(path, unseen=Unseen(others.path, mask=mask))


@pytest.mark.parametrize(
    ("masks", "reason"),
    [
        (["--unseen", "{store}", "--mask", "none", "voted"], "prompt-dt has no masks: evaluate"),
        (["--mask", "task", "voted"], "has no masks to vote: leave --mask out"),
    ],
)
def test_no_mask_is_played_where_a_later_one_is_refused(
    store: DataStore,
    others: DataStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    masks: list[str],
    reason: str,
) -> None:
    path = begin(tmp_path, store, "prompt-dt")
    monkeypatch.setattr(evaluate, "play", play_nothing)
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, path, *(word.format(store=others.path) for word in masks))
    assert end.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.split())
    assert not list((path / "evaluation").glob("*"))


def test_a_store_of_another_family_is_refused(run: Path, tmp_path: Path) -> None:
    from harmodt.collect import CollectConfig, collect

    config = CollectConfig(tmp_path / "walkers", ("cheetah-dir",), 1, 1, workers=1)
    collect(config, progress=False)
    with pytest.raises(UserError, match="family cheetah-dir instead of metaworld"):
        load_policy(run, unseen=Unseen(config.output))


def test_the_fields_in_which_other_environments_differ_are_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versioned = dataclasses.replace(tiny.SPEC, reward_version="v1")
    monkeypatch.setattr(tiny, "SPEC", versioned)
    meet(run, make_store(tmp_path / "versioned", UNSEEN))
    monkeypatch.setattr(tiny, "SPEC", dataclasses.replace(versioned, episode_length=200))
    shorter = make_store(tmp_path / "shorter", UNSEEN)
    reason = r"shorter has other environments than the run \(episode_length 200 instead of 500\)"
    with pytest.raises(UserError, match=reason):
        meet(run, shorter)


def test_prompts_that_have_changed_are_refused_and_the_rest_is_not_read(
    run: Path, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "store", UNSEEN, seed=5)
    for file in ("actions.npy", "prompts/actions.npy"):
        array = store.path / UNSEEN[0] / file
        content = bytearray(array.read_bytes())
        content[-1] ^= 1
        array.write_bytes(content)
        if "prompts" not in file:
            meet(run, store)
    with pytest.raises(
        UserError, match=r"door-open-v3/prompts/actions\.npy is damaged .its checksum"
    ):
        meet(run, store)
    meet(run, store, tasks=UNSEEN[1:])


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    run_command(evaluate.main)


def test_the_command_compares_masks(
    run: Path,
    others: DataStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluate, "play", play_nothing)
    command(
        monkeypatch, run, "--unseen", others.path, "--tasks", "door-open", "--episodes", 2,
        "--mask", "voted", "none", "random", "nearest",
    )  # fmt: skip
    text = capsys.readouterr().out
    assert [text.count(f"{mask} ") for mask in ("voted", "random", "nearest")] == [2, 2, 2]
    results = [EvaluationResult.load(path) for path in (run / "evaluation").glob("*.json")]
    assert {result.protocol.mask for result in results} == {"voted", "none", "random", "nearest"}
    assert {result.protocol.tasks for result in results} == {("door-open-v3",)}
    assert {result.protocol.unseen for result in results} == {others.checksum}
    assert all(others.checksum in result.to_csv() for result in results)


def test_masks_are_compared_on_the_runs_own_tasks_too(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "play", play_nothing)
    command(monkeypatch, run, "--episodes", 2, "--mask", "task", "voted")
    text = capsys.readouterr().out
    assert "Success, checkpoint 3" in text and "unseen" not in text
    assert text.count(" task ") == 1 + len(TASKS) + 1 and text.count(" voted ") == len(TASKS) + 1


def play_nothing(policy: DecisionPolicy, request: Any, **_: Any) -> EvaluationResult:
    from harmodt.rollout import make_protocol

    protocol = make_protocol(policy, request)
    solved = np.zeros((len(protocol.tasks), protocol.episodes), bool)
    return EvaluationResult(protocol, solved, solved * 1.0, 0.1, {})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--mask", "nearest"], "--mask nearest is for unseen tasks: name a store with --unseen"),
        (["--threshold", "25"], "--threshold is for unseen tasks"),
        (["--unseen", "x", "--mask", "none", "--threshold", "2"], "add voted to --mask"),
        (["--unseen", "x", "--mask", "task"], "an unseen task has no mask of its own"),
        (["--unseen", "nowhere"], "there is no store in nowhere"),
        (["--unseen", "{store}", "--tasks", "push"], "has no task 'push-v3': it holds door-open"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    run: Path,
    others: DataStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, run, *(word.format(store=others.path) for word in arguments))
    assert end.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("mask", ["voted", "random", "nearest"])
def test_soft_masks_meet_an_unseen_task_level_by_level(
    tmp_path: Path, store: DataStore, others: DataStore, mask: Any
) -> None:
    run = begin(tmp_path, store, "soco-dt")
    saved = load_checkpoint(SavedRun.open(run).directory)
    full = saved.tensors["higher_masks"]
    full &= 0x55555555  # of every other active weight the value is 1, of the rest 1/2
    save_checkpoint(SavedRun.open(run).directory, 4, saved.tensors)
    policy = meet(run, others, mask=mask)
    assert policy.mask_bits is not None
    active, higher = policy.mask_bits.chunk(2)
    assert len(active) == len(higher) == len(UNSEEN)
    if mask == "voted":
        assert torch.equal(active, vote(saved.tensors["masks"]).repeat(2, 1))
        assert torch.equal(higher, vote(full).repeat(2, 1))
    elif mask == "nearest":
        for row, above in zip(active, higher, strict=True):
            assert (row == saved.tensors["masks"]).all(1).any()
            assert torch.equal(above, row & 0x55555555)
    else:
        for rows, trained in ((active, saved.tensors["masks"]), (higher, full)):
            counted = policy.model.vector.count_by_parameter(torch.stack((rows[0], vote(trained))))
            assert all(own == other for own, other in counted.values())
    assert np.isfinite(actions(policy)).all()
