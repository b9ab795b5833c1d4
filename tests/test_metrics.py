"""What a run writes of its steps and evaluations, compared with what these returned."""

from __future__ import annotations

import json
import math
import os
import signal
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from runs import begin
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import make_store

from harmodt import train
from harmodt.algorithms import StepResult
from harmodt.checkpoint import checkpoint_steps
from harmodt.data.store import DataStore
from harmodt.results import EvaluationResult
from harmodt.rollout import make_protocol
from harmodt.rundir import RunDirectory
from harmodt.training import trainer as module
from harmodt.training.trainer import Trainer

FLAGS = ("--keep-checkpoints", "1", "--evaluate-every", "4", "--evaluation-episodes", "4")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("store") / "store")


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in RunDirectory(run).metrics.open()]


def expected_values(results: dict[int, StepResult], tasks: tuple[str, ...]) -> dict[str, float]:
    """Means over some steps, each from all its numbers one by one."""
    values = defaultdict(list)
    for result in results.values():
        for task, loss in zip(result.task_ids, result.losses.tolist(), strict=True):
            values["loss"].append(loss)
            values[f"loss/{tasks[task]}"].append(loss)
        values["gradient_norm"].append(float(result.gradient_norm))
    return {name: math.fsum(numbers) / len(numbers) for name, numbers in values.items()}


def test_the_metrics_are_means_of_what_the_steps_returned(
    store: DataStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results: dict[int, StepResult] = {}
    train_step = Trainer.train_step

    def noted(trainer: Trainer) -> StepResult:
        result = train_step(trainer)
        copies = result.losses.clone(), result.gradient_norm.clone()
        results[trainer.step] = StepResult(list(result.task_ids), *copies)
        return result

    monkeypatch.setattr(Trainer, "train_step", noted)
    schedule = ("--learning-rate", "0.01", "--warmup-steps", "5", "--final-learning-rate", "0.2")
    begin(store, tmp_path / "run", "--tasks-per-step", "1", *schedule)
    assert len({tuple(result.task_ids) for result in results.values()}) == 3
    board = EventAccumulator(str(RunDirectory(tmp_path / "run").tensorboard)).Reload()
    told = {
        name: {e.step: e.value for e in board.Scalars(name)} for name in board.Tags()["scalars"]
    }
    records = lines(tmp_path / "run")
    written, last = [record for record in records if "loss" in record], 0
    assert [record["step"] for record in written] == [3, 4, 6, 8, 9, 12]
    alternating = 0
    for record in written:
        step = record["step"]
        window = {number: results[number] for number in range(last + 1, step + 1)}
        expected, last = expected_values(window, store.tasks), step
        alternating += len(expected) > 3
        falls = 0.2 + 0.8 * (1 + math.cos(math.pi * step / 12)) / 2
        expected["learning_rate"] = 0.01 * min(step / 5, 1) * falls
        assert record.keys() == expected.keys() | {"step", "crc32"}
        for name, value in expected.items():
            assert record[name] == pytest.approx(value, rel=1e-6), (step, name)
            assert told[name].pop(step) == pytest.approx(value, rel=1e-6), (step, name)
    assert alternating >= 2  # windows with more than one task
    updates = [record for record in records if "harmony" in record]
    assert [record["step"] for record in updates] == [0, 4, 8]
    for record in updates:
        for name in record.keys() - {"step", "crc32"}:
            assert told[name].pop(record["step"]) == pytest.approx(record[name], rel=1e-6), name
    assert not any(told.values())  # TensorBoard was told nothing else


def plays(scores: dict[int, float]):
    """In place of evaluations: the share of successful episodes by step."""

    def play(policy, request, console):
        protocol = make_protocol(policy, request)
        shape = len(protocol.tasks), protocol.episodes
        successes = np.arange(protocol.episodes) < scores[policy.step] * protocol.episodes
        returns = np.full(shape, -float(policy.step))
        return EvaluationResult(protocol, np.broadcast_to(successes, shape), returns, 1.0, {})

    return play


HIGH_FIRST = {4: 0.75, 8: 0.25, 12: 0.5}
BEST = "best success {} at step {}; the table shows the last evaluation"


@pytest.mark.parametrize(
    ("scores", "best", "kept", "cut"),
    [
        (HIGH_FIRST, BEST.format("0.75", 4), [4, 12], None),
        (HIGH_FIRST, BEST.format("0.75", 4), [4, 12], 6),
        (HIGH_FIRST, BEST.format("0.75", 4), [4, 12], 10),
        ({4: 0.5, 8: 0.5, 12: 0.25}, BEST.format("0.50", 8), [8, 12], 10),
        ({4: 0.25, 8: 0.5, 12: 0.5}, None, [12], None),
    ],
)
def test_the_checkpoint_of_the_best_evaluation_is_kept(
    store: DataStore, tmp_path: Path, monkeypatch, capsys, scores, best, kept, cut
) -> None:
    directory = RunDirectory(tmp_path / "run")
    monkeypatch.setattr(module, "play", plays(scores))
    if cut is None:
        begin(store, directory.path, *FLAGS)
    else:
        train_step = Trainer.train_step

        def interrupted(trainer: Trainer) -> StepResult:
            result = train_step(trainer)
            if trainer.step == cut:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        with monkeypatch.context() as context, pytest.raises(SystemExit):
            context.setattr(Trainer, "train_step", interrupted)
            begin(store, directory.path, *FLAGS)
        so_far = {step: score for step, score in scores.items() if step <= cut}
        best_so_far = max(so_far, key=lambda step: (so_far[step], step))
        assert checkpoint_steps(directory) == [best_so_far, cut]
        train.main(["--resume", str(directory.path)])
    assert checkpoint_steps(directory) == kept
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("best ")]
    assert printed == ([best] if best else [])
    found = {
        int(line["step"]): line["success"] for line in lines(directory.path) if "success" in line
    }
    assert found == scores


def test_a_finished_run_that_is_resumed_names_no_table(
    store: DataStore, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(module, "play", plays(HIGH_FIRST))
    begin(store, tmp_path / "run", *FLAGS)
    capsys.readouterr()
    train.main(["--resume", str(tmp_path / "run")])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("best ")]
    where = f"nothing was evaluated now, and all evaluations are in {tmp_path / 'run/evaluation'}"
    assert printed == [f"best success 0.75 at step 4; {where}"]
