from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from experts import ExpertPolicy
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from harmodt import evaluate as module
from harmodt.config import TrainConfig
from harmodt.data.inputs import TaskConditioning, save_conditioning
from harmodt.data.store import Episodes
from harmodt.errors import UserError, run_command
from harmodt.evaluate import EvaluationResult, Protocol, evaluate, wilson_interval
from harmodt.masks.bank import MaskBank
from harmodt.networks.decision_transformer import DecisionTransformer
from harmodt.training.checkpoint import save_checkpoint, write_run
from harmodt_kernels.native import library

TASKS = ("reach-v3", "button-press-topdown-v3")


# Table I of R. G. Newcombe, "Two-sided confidence intervals for the single proportion",
# Statistics in Medicine 17 (1998), method 3.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_matches_the_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(trials=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_bounds_are_where_the_score_test_turns(trials, share):
    successes = round(share * trials)
    rate = successes / trials
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= rate <= high <= 1
    for bound in (low, high):
        if bound not in (0, 1):
            score = abs(rate - bound) / math.sqrt(bound * (1 - bound) / trials)
            assert score == pytest.approx(1.959964, abs=1e-4)
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_experts_solve_their_tasks_whatever_the_rounds_and_workers():
    policy = ExpertPolicy(*TASKS)
    whole = evaluate(policy, episodes=3)
    assert whole.success == 1
    assert policy.calls == 500  # one for all rows of a time step
    assert whole.returns.min() > 300
    rounds = evaluate(policy, episodes=3, environments=4, workers=1)
    assert policy.calls == 500 + 2 * 500
    np.testing.assert_array_equal(rounds.returns, whole.returns)
    np.testing.assert_array_equal(rounds.successes, whole.successes)


class FakeSimulation:
    """Solved in step 3 alone where the goal is even, always where it is 1; rewards are goals."""

    def __init__(self, family, tasks, goal_seed, workers, videos, variables):
        self.made.append((tasks, goal_seed, workers))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def reset(self, goal_indices):
        self.goals, self.time = goal_indices, 0
        self.resets.append(goal_indices.tolist())
        return np.zeros((len(goal_indices), 39))

    def step(self, actions):
        self.time += 1
        solved = (self.goals % 2 == 0) & (self.time == 3) | (self.goals == 1)
        return np.zeros((len(self.goals), 39)), self.goals * 1.0, solved


@pytest.fixture
def fake(monkeypatch):
    FakeSimulation.made, FakeSimulation.resets = [], []
    monkeypatch.setattr(module, "Simulation", FakeSimulation)
    return FakeSimulation


def test_success_at_any_step_and_at_the_last(fake):
    policy = ExpertPolicy(*TASKS)
    policy.act = lambda observations: np.zeros((len(observations), 4))
    for success, expected in (("any", [1, 1, 1, 0]), ("last", [0, 1, 0, 0])):
        result = evaluate(policy, episodes=4, success=success)
        assert result.successes.tolist() == [[bool(x) for x in expected]] * 2
        assert result.returns.tolist() == [[0, 500, 1000, 1500]] * 2


def test_rounds_cover_the_episodes_in_order(fake):
    policy = ExpertPolicy(*TASKS)
    policy.act = lambda observations: np.zeros((len(observations), 4))
    result = evaluate(
        policy,
        TASKS[::-1],
        53,
        environments=40,
        seed=5,
        goal_seed=9,
        workers=2,
    )
    # 20 episodes per round would need three rounds; three rounds of 18 do.
    assert fake.made == [([TASKS[1]] * 18 + [TASKS[0]] * 18, 9, 2)]
    assert fake.resets[0] == [*range(18)] * 2
    assert fake.resets[2] == [*range(36, 50), 0, 1, 2, 3] * 2
    assert result.returns.shape == (2, 53)
    assert result.returns[0].tolist() == [500 * (episode % 50) for episode in range(53)]
    assert [start[1] for start in policy.starts] == [5, 23, 41]  # seeds
    assert policy.starts[0][0] == [1] * 18 + [0] * 18
    assert policy.starts[0][2] == [2000] * 18 + [1000] * 18
    assert policy.rewards[0].tolist() == [*range(18)] * 2 and len(policy.rewards) == 1500
    assert result.protocol.target_returns == (2000, 1000) and result.protocol.rounds == 3
    evaluate(policy, TASKS[:1], 2, target_return=70.5)
    assert policy.starts[-1][2] == [70.5, 70.5]


def test_a_task_that_the_policy_does_not_know(fake):
    with pytest.raises(UserError, match=r"push-v3.*reach-v3, button-press-topdown-v3"):
        evaluate(ExpertPolicy(*TASKS), ["push-v3"], 2)
    assert not fake.made


def make_result(**changes) -> EvaluationResult:
    protocol = {
        "tasks": TASKS, "episodes": 4, "success": "any", "goal_seed": 9, "seed": 5,
        "target_returns": (4000.0, 3.5), "checkpoint": 70,
    }  # fmt: skip
    successes = np.array([[1, 1, 0, 1], [0, 0, 0, 0]], bool)
    returns = np.array([[10.5, 20, 30, 40], [1, 2, 3, 4]])
    protocol = Protocol(**(protocol | changes))
    return EvaluationResult(protocol, successes, returns, 12.3, "reference")


def test_json_holds_protocol_versions_and_every_episode(tmp_path):
    result = make_result()
    path = result.save(tmp_path / "evaluation")
    content = json.loads(path.read_text())
    assert content["protocol"]["goal_seed"] == 9 and content["protocol"]["episodes"] == 4
    assert content["protocol"]["success"] == "any" and content["protocol"]["checkpoint"] == 70
    assert content["versions"].keys() >= {"python", "torch", "metaworld", "mujoco"}
    assert content["backend"] == "reference"
    first = content["tasks"][0]
    assert (first["task"], first["successes"], first["success"]) == ("reach-v3", 3, 0.75)
    assert first["mean_return"] == 25.125 and first["episode_returns"] == [10.5, 20, 30, 40]
    assert first["episode_successes"] == [True, True, False, True]
    assert content["average"]["success"] == 0.375 and content["average"]["episodes"] == 8


def test_csv_holds_a_row_per_task_and_the_average(tmp_path):
    path = make_result().save(tmp_path)
    rows = list(csv.DictReader(io.StringIO(path.with_suffix(".csv").read_text())))
    assert [row["task"] for row in rows] == [*TASKS, "average"]
    assert [float(row["success"]) for row in rows] == [0.75, 0, 0.375]
    assert [float(row["mean_return"]) for row in rows] == [25.125, 2.5, 13.8125]
    assert {(row["success_rule"], row["goal_seed"]) for row in rows} == {("any", "9")}
    low, high = wilson_interval(3, 4)
    assert (float(rows[0]["success_low"]), float(rows[0]["success_high"])) == (low, high)


def test_an_evaluation_replaces_only_its_own_files(tmp_path):
    variants = [
        make_result(), make_result(), make_result(seed=6), make_result(success="last"),
        make_result(checkpoint=80), make_result(target_returns=(4000.0, 3.0)),
    ]  # fmt: skip
    assert len({result.save(tmp_path) for result in variants}) == 5
    assert len(list(tmp_path.iterdir())) == 10


def test_a_failing_write_leaves_the_old_files(tmp_path, monkeypatch):
    path = make_result().save(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(module.EvaluationResult, "to_json", lambda self: {"broken": object()})
    with pytest.raises(TypeError):
        make_result().save(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert json.loads(path.read_text())["version"] == 1


def test_table_shows_every_task_and_the_average():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(make_result().table())
    lines = [line for line in console.export_text().splitlines() if "/" in line]
    assert [line.split("│")[1].strip() for line in lines] == [*TASKS, "average"]
    assert "3/4" in lines[0] and "0.75" in lines[0] and "0.30 – 0.95" in lines[0]
    assert "3/8" in lines[2] and "0.38" in lines[2]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A tiny model gains nothing from threads, which on a busy machine wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of an untrained, tiny model."""
    run = tmp_path_factory.mktemp("run")
    config = TrainConfig(embed_dim=8, layers=1, heads=1)
    model = DecisionTransformer(config.model(), len(TASKS), torch.device("cpu"))
    bank = MaskBank.initialise(model.vector, len(TASKS), 0.2, 0)
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    prompts = Episodes(
        np.zeros((9, 39), np.float32), np.zeros((9, 4), np.float32), np.ones(9, np.float32),
        np.arange(9, 0, -1, dtype=np.float32), np.array([0, 9]), np.ones(1, np.int8),
    )  # fmt: skip
    scale = np.ones(39, np.float32)
    write_run(run, {"config": config.to_json(), "tasks": list(TASKS)})
    save_conditioning(
        run / "conditioning.safetensors",
        [TaskConditioning(task, 0 * scale, scale, prompts, 100.0) for task in TASKS],
    )
    for step in (20, 40):
        save_checkpoint(run, step, tensors | {"masks": bank.bits})
    return run


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    run_command(module.main)


def test_command_line_end_to_end(run, monkeypatch, capsys):
    command(monkeypatch, run, "--episodes", 2, "--tasks", "reach-v2", "--checkpoint", 20)
    captured = capsys.readouterr()
    assert "reach-v3" in captured.out and "average" in captured.out
    assert "500/500 steps" in captured.out
    first = {path: path.read_bytes() for path in (run / "evaluation").iterdir()}
    assert len(first) == 2
    (path,) = (run / "evaluation").glob("step-20-any-1x2-*.json")
    content = json.loads(path.read_text())
    assert content["protocol"]["target_returns"] == [100.0]
    command(monkeypatch, run, "--episodes", 2, "--tasks", "reach-v2", "--checkpoint", 20)
    again = json.loads(path.read_text())
    assert again["tasks"] == content["tasks"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--checkpoint", "30"], "no checkpoint of step 30.*20, 40"),
        (["--tasks", "button-pres"], "no task 'button-pres'.*button-press-v3"),
        (["--tasks", "push"], "not trained on push-v3.*reach-v3, button-press-topdown-v3"),
        (["--device", "cuda:77"], "cuda:77.*cpu"),
        (["--device", "abacus"], "abacus.*cpu"),
        (["--episodes", "0"], "--episodes is 0"),
        (["--workers", "0"], "--workers is 0"),
        (["--goal-seed", "-1"], "--goal-seed is -1"),
        (["--fused"], "--fused: the CPU kernels were not built.*--no-fused"),
    ],
)
def test_mistakes_get_one_sentence_and_status_2(run, monkeypatch, capsys, arguments, says):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(library, "PATH", run / "libharmodt.so")
    before = sorted(run.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, run, *arguments)
    captured = capsys.readouterr()
    assert exit.value.code == 2
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert re.search(says, captured.err)
    assert sorted(run.rglob("*")) == before


def test_a_run_that_is_not_there(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "harmodt.evaluate", tmp_path / "nowhere"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "nowhere" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "nowhere").exists()
