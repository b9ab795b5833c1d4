"""Mistakes in a loop that calls a policy: each is an error, whatever the policy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlps import configure_mlp
from runs import begin
from tiny import SPEC, TASKS, configure, make_store, make_trainer

from harmodt.data.store import DataStore
from harmodt.errors import UserError
from harmodt.policies import Policy

README = Path(__file__).parents[1] / "README.md"
OBSERVATIONS = np.random.default_rng(0).normal(size=(2, SPEC.observation_size))
MAKERS = {
    "prompt-dt": configure,
    "mtdiff-p": lambda name: configure(name, horizon=3, diffusion_steps=4, sampling_steps=2),
    "mtbc": configure_mlp,
}
"""An algorithm of each kind of policy, and its small settings."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module", params=MAKERS)
def fresh(store: DataStore, request: pytest.FixtureRequest) -> Callable[[], Policy]:
    """Makes a policy that was not started; all of them have the same weights."""
    learner = make_trainer(store, MAKERS[request.param](request.param)).learner
    return lambda: learner.policy(0)


@pytest.fixture
def policy(fresh: Callable[[], Policy]) -> Policy:
    """A policy in two episodes, before their first step."""
    made = fresh()
    made.start(np.array([2, 0]))
    return made


def changed(row: int, value: float) -> np.ndarray:
    """Observations of which one number is another."""
    observations = OBSERVATIONS.copy()
    observations[row, 7] = value
    return observations


def test_calls_before_start_are_refused(fresh: Callable[[], Policy]) -> None:
    policy = fresh()
    for call in (
        lambda: policy.act(OBSERVATIONS),
        lambda: policy.record_rewards(np.zeros(2)),
        lambda: policy.restart(np.ones(2, bool)),
    ):
        with pytest.raises(UserError, match=r"was called before start: call start\(task_ids\)"):
            call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.array([0, 3]),), "there is no task 3: the policy's tasks are 0 to 2"),
        ((np.array([-1]),), "there is no task -1"),
        ((np.array([]),), "task_ids is float64 of the shape"),
        ((np.array([[0]]),), r"task_ids is int64 of the shape \(1, 1\)"),
        ((np.array([0.0]),), "task_ids is float64"),
        ((np.array([True]),), "task_ids is bool"),
        (([TASKS[0]],), r"task_ids is <U8 .*policy.tasks.index\(NAME\)"),
        ((0,), r"task_ids is int64 of the shape \(\)"),
        ((np.array([0, 1]), 0, None, range(1, 3)), r"part is range\(1, 3\): give a range"),
        ((np.array([0, 1]), 0, None, range(0)), r"part is range\(0, 0\)"),
        ((np.array([0, 1]), 0, None, range(0, 2, 2)), "from 0 to 1"),
        ((np.array([0]), -1), "seed is -1: give a whole number"),
        ((np.array([0]), 0.5), "seed is 0.5"),
        ((np.array([0, 1]), 0, np.array([1.0])), r"target_returns has the shape \(1,\)"),
        ((np.array([0]), 0, np.array([np.nan])), "target_returns holds NaN or infinity in row 0"),
        ((np.array([0]), 0, ["much"]), "target_returns is not an array of numbers"),
    ],
)
def test_a_start_that_cannot_be_is_refused(
    policy: Policy, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        policy.start(*arguments)
    with pytest.raises(UserError, match="act was called before start"):
        policy.act(OBSERVATIONS)


@pytest.mark.parametrize(
    ("observations", "message"),
    [
        (OBSERVATIONS[:1], r"has the shape \(1, 39\): give .* \(2, 39\)"),
        (OBSERVATIONS[0], r"has the shape \(39,\)"),
        (OBSERVATIONS[:, :38], r"has the shape \(2, 38\)"),
        (OBSERVATIONS[None], r"has the shape \(1, 2, 39\)"),
        (changed(1, np.nan), "holds NaN or infinity in row 1"),
        (changed(0, -np.inf), "holds NaN or infinity in row 0"),
        ("nothing", "is not an array of numbers"),
        ([[0.0], [0.0, 1.0]], "is not an array of numbers"),
        (None, "observations"),
    ],
)
def test_observations_that_cannot_be_are_refused_and_change_nothing(
    fresh: Callable[[], Policy], observations: Any, message: str
) -> None:
    told, spared = fresh(), fresh()
    for policy in (told, spared):
        policy.start(np.array([2, 0]))
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            told.act(observations)
        np.testing.assert_array_equal(told.act(OBSERVATIONS), spared.act(OBSERVATIONS))
        for policy in (told, spared):
            policy.record_rewards(np.ones(2))


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (np.zeros(1), r"rewards has the shape \(1,\): give .* \(2,\)"),
        (1.0, r"rewards has the shape \(\)"),
        (np.zeros((2, 1)), r"rewards has the shape \(2, 1\)"),
        (np.array([0.0, np.nan]), "rewards holds NaN or infinity in row 1"),
    ],
)
def test_rewards_that_cannot_be_are_refused(policy: Policy, rewards: Any, message: str) -> None:
    policy.act(OBSERVATIONS)
    with pytest.raises(UserError, match=message):
        policy.record_rewards(rewards)
    policy.record_rewards(np.zeros(2))
    policy.act(OBSERVATIONS)


def test_forgotten_rewards_are_noticed(policy: Policy) -> None:
    with pytest.raises(UserError, match="no action waits for its reward"):
        policy.record_rewards(np.zeros(2))
    policy.act(OBSERVATIONS)
    with pytest.raises(UserError, match="act was called twice without record_rewards in between"):
        policy.act(OBSERVATIONS)
    with pytest.raises(UserError, match="restart was called before the rewards"):
        policy.restart(np.array([True, False]))
    policy.record_rewards(np.zeros(2))
    with pytest.raises(UserError, match="no action waits for its reward"):
        policy.record_rewards(np.zeros(2))
    policy.restart(np.array([True, False]))
    policy.act(OBSERVATIONS)


def test_episodes_that_are_given_up_need_no_rewards(policy: Policy) -> None:
    policy.act(OBSERVATIONS)
    policy.restart(np.ones(2, bool))
    policy.act(OBSERVATIONS)
    policy.start(np.array([1, 1]))
    policy.act(OBSERVATIONS)


@pytest.mark.parametrize(
    "rows", [np.array([0]), np.array([1, 0]), np.array([True]), True, np.ones((2, 1), bool)]
)
def test_rows_that_are_no_mask_are_refused(policy: Policy, rows: Any) -> None:
    with pytest.raises(UserError, match=r"give restart an array of bool of the shape \(2,\)"):
        policy.restart(rows)


def test_the_loop_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "button-press-v3"
    monkeypatch.chdir(tmp_path)
    store = make_store(tmp_path / "store", (*TASKS, task))
    begin(store, Path("runs/quickstart-harmodt-f-seed0"), "--steps", "1", "--checkpoint-every", "1")
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    (example,) = (block for block in blocks if "record_rewards" in block)
    values: dict[str, Any] = {}
    exec(example, values)
    assert "solved at the last step: " in capsys.readouterr().out
    policy = values["policy"]
    assert policy._time.tolist() == [500]
    earned = policy.target_returns[3] - policy._returns_to_go[0]
    assert earned == pytest.approx(values["env"].get_wrapper_attr("return_queue")[-1], rel=1e-6)
