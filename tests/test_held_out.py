"""How many episodes an import holds out as prompts, and what small data sets do instead."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import begin
from test_data import make_arrays, write_source
from tiny import TASKS, configure, make_store

from harmodt import load_policy, sealed
from harmodt.data.__main__ import main
from harmodt.data.describe import describe, show
from harmodt.data.importing import ImportConfig, import_data
from harmodt.data.inputs import TaskConditioning
from harmodt.data.merging import MergeConfig, merge_stores
from harmodt.data.store import MANIFEST, DataStore
from harmodt.errors import UserError
from harmodt.progress import PlainConsole

RETURN = 25.0  # of episode 0; episode n has n + 1 times as much


def to_text(description: dict[str, Any]) -> str:
    console = PlainConsole(file=io.StringIO(), width=10_000)
    show(description, console)
    return console.file.getvalue()


def imported(tmp_path: Path, episodes: int, **changes: object) -> DataStore:
    source = write_source(tmp_path / "raw", episodes)
    config = replace(ImportConfig(source, tmp_path / "store"), **changes)  # type: ignore[arg-type]
    return import_data(config, progress=False)


def returns(store: DataStore, name: str = "reach-v3") -> tuple[list[float], list[float]]:
    """Returns of a task's training and prompt episodes, in units of `RETURN`."""
    task = store.task(name)
    return (task.train.returns / RETURN).tolist(), (task.prompts.returns / RETURN).tolist()


@pytest.mark.parametrize(
    ("episodes", "held_out"), [(1, 0), (4, 0), (5, 1), (9, 1), (10, 2), (49, 9), (50, 10), (80, 10)]
)
def test_at_most_a_fifth_of_the_episodes_is_held_out(
    tmp_path: Path, episodes: int, held_out: int
) -> None:
    store = imported(tmp_path, episodes)
    train, prompts = returns(store)
    if held_out:
        assert train == list(range(1, episodes - held_out + 1))
        assert prompts == list(range(episodes - held_out + 1, episodes + 1))
    else:  # every episode is for both
        assert train == prompts == list(range(1, episodes + 1))
    shared = store.manifest["tasks"]["reach-v3"]["shared_prompts"]
    assert shared == (0 if held_out else episodes)
    described = describe(store)
    assert described["shared_prompts"] == described["tasks"]["reach-v3"]["shared_prompts"] == shared
    assert (f"({episodes} shared)" in to_text(described)) == (not held_out)


def test_a_number_that_is_named_is_held_out(tmp_path: Path) -> None:
    for count in (0, 1, 3):
        store = imported(tmp_path / str(count), 4, prompt_episodes=count)
        assert returns(store) == ([1, 2, 3, 4][: 4 - count], [1, 2, 3, 4][4 - count :])
        assert store.manifest["tasks"]["reach-v3"]["shared_prompts"] == 0
    with pytest.raises(UserError, match="reach-v3 has 4 episodes, and none is left for training"):
        imported(tmp_path, 4, prompt_episodes=4)


@pytest.mark.parametrize("episodes", [1, 4, 12, 60])
def test_the_target_is_the_best_return_of_all_episodes(tmp_path: Path, episodes: int) -> None:
    task = imported(tmp_path, episodes).task("reach-v3")
    for algorithm in ("prompt-dt", "mtdt"):
        conditioning = TaskConditioning.from_data(task, configure(algorithm))
        assert conditioning.target_return == RETURN * episodes


def test_the_target_is_that_of_the_training_episodes_where_they_are_better(tmp_path: Path) -> None:
    task = make_store(tmp_path / "store", lengths=(30,), prompt_lengths=(3, 4)).task(TASKS[0])
    best = float(task.train.rewards.sum(dtype=np.float64))
    conditioning = TaskConditioning.from_data(task, configure())
    assert conditioning.target_return == pytest.approx(best)
    assert best > task.prompts.returns.max()


def trained_and_acting(store: DataStore, run: Path, algorithm: str) -> np.ndarray:
    """Train a run through the command line; actions of its policy in two episodes of each task."""
    begin(store, run, algorithm=algorithm)
    policy = load_policy(run)
    rows = 2 * len(policy.tasks)
    policy.start(np.repeat(np.arange(len(policy.tasks)), 2))
    actions = []
    for observations in np.random.default_rng(0).normal(size=(6, rows, 39)):
        actions.append(policy.act(observations))
        policy.record_rewards(np.ones(rows))
    return np.stack(actions)


@pytest.mark.parametrize("algorithm", ["harmodt-f", "mtdt"])
def test_one_episode_of_each_task_trains_and_acts(tmp_path: Path, algorithm: str) -> None:
    source = write_source(tmp_path / "raw", 1, ("reach-v2", "push-v2"))
    store = import_data(ImportConfig(source, tmp_path / "store"), progress=False)
    assert np.isfinite(trained_and_acting(store, tmp_path / "run", algorithm)).all()


def test_a_store_without_prompts_serves_algorithms_that_read_none(tmp_path: Path) -> None:
    source = write_source(tmp_path / "raw", 3, ("reach-v2", "push-v2"))
    config = ImportConfig(source, tmp_path / "store", prompt_episodes=0)
    store = import_data(config, progress=False)
    store.verify()
    assert returns(store) == ([1, 2, 3], [])
    assert "shared" not in to_text(describe(store))
    assert np.isfinite(trained_and_acting(store, tmp_path / "run", "mtdt")).all()
    with pytest.raises(UserError, match=r"push-v3 has no prompt episode of at least 2 steps"):
        begin(store, tmp_path / "prompted", algorithm="prompt-dt")
    other = import_data(replace(config, output=tmp_path / "other", episodes=2), progress=False)
    merged = merge_stores(MergeConfig((store.path, other.path), tmp_path / "both"), progress=False)
    assert returns(merged) == ([1, 2, 3, 1, 2], [])


def test_a_merge_counts_the_prompts_that_are_shared(tmp_path: Path) -> None:
    few = imported(tmp_path / "few", 2)
    many = imported(tmp_path / "many", 10)
    merged = merge_stores(MergeConfig((few.path, many.path), tmp_path / "both"), progress=False)
    assert returns(merged)[1] == [1, 2, 9, 10]
    assert merged.manifest["tasks"]["reach-v3"]["shared_prompts"] == 2
    assert "4 (2 shared)" in to_text(describe(merged))


def test_a_store_that_does_not_say_how_many_are_shared_has_none(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    for task in store.manifest["tasks"].values():
        assert task.pop("shared_prompts") == 0
    sealed.write(store.path / MANIFEST, store.manifest)
    assert describe(DataStore.open(store.path))["shared_prompts"] == 0


def test_more_shared_prompts_than_prompts_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    store.manifest["tasks"][TASKS[1]]["shared_prompts"] = 4
    sealed.write(store.path / MANIFEST, store.manifest)
    with pytest.raises(UserError, match=f"the entries of {TASKS[1]} do not fit together"):
        DataStore.open(store.path)


def test_the_command_says_what_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw" / "reach-v2").mkdir(parents=True)
    np.savez(tmp_path / "raw" / "reach-v2" / "0.npz", **make_arrays(0))
    words = ["data", "import", tmp_path / "raw", "--output", tmp_path / "store"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    main()
    assert "1 (1 shared)" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["data", "info", str(tmp_path / "store"), "--json"])
    main()
    assert json.loads(capsys.readouterr().out)["tasks"]["reach-v3"]["shared_prompts"] == 1
