from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from runs import ended_process

from harmodt.environments import EnvironmentSpec
from harmodt.errors import UserError
from harmodt.results import (
    EvaluationResult,
    Protocol,
    average_over_seeds,
    versions,
)
from harmodt.statistics import bootstrap_means, wilson_interval

TASKS = ("reach-v3", "button-press-topdown-v3")
PROTOCOL = Protocol(
    tasks=TASKS, episodes=4, success_rule="any", goal_seed=9, seed=5,
    target_returns=(4000.0, 3.5), checkpoint=70, rounds=1, mask="task", unseen=None,
    environment=EnvironmentSpec("metaworld", 39, 4, 500, True, "v2"),
    precision="fp32", backend="reference", device="cpu",
)  # fmt: skip
SUCCESSES = np.array([[1, 1, 0, 1], [0, 0, 0, 0]], bool)
RETURNS = np.array([[10.5, 20, 30, 40], [1, 2, 3, 4]])


def make_result(**changes) -> EvaluationResult:
    protocol = replace(PROTOCOL, **changes)
    return EvaluationResult(protocol, SUCCESSES, RETURNS, 12.3, {"python": "3"})


def returns_alone() -> EvaluationResult:
    spec = EnvironmentSpec("toy", 3, 2, 7, success=False)
    protocol = replace(PROTOCOL, success_rule=None, environment=spec)
    return EvaluationResult(protocol, None, RETURNS, 1.0, {})


def test_intervals_of_a_result_and_of_several_seeds():
    one = make_result()
    assert one.average.mean == one.success_rate == 0.375
    assert (one.average.low, one.average.high) == tuple(
        np.quantile(bootstrap_means(SUCCESSES[None]), (0.025, 0.975))
    )
    other = replace(one, successes=~SUCCESSES, protocol=replace(one.protocol, checkpoint=90))
    both = average_over_seeds([one, other])
    assert both.mean == 0.5
    values = np.stack([SUCCESSES, ~SUCCESSES])
    assert (both.low, both.high) == tuple(np.quantile(bootstrap_means(values), (0.025, 0.975)))


@pytest.mark.parametrize("solved", [True, False])
def test_episodes_that_are_all_alike_do_not_make_certain(solved):
    result = replace(make_result(), successes=np.full((2, 4), solved))
    average = result.average
    assert average.mean == solved
    assert (average.low, average.high) == wilson_interval(8 * solved, 8)


@pytest.mark.parametrize(
    "change",
    [
        *({"success_rule": "last"}, {"goal_seed": 1}, {"precision": "bf16"}),
        *({"tasks": TASKS[::-1]}, {"plans": {"sampler": "ddpm"}}),
    ],
)
def test_only_results_of_one_protocol_are_averaged(change):
    with pytest.raises(UserError, match=f"differ in {next(iter(change))}:"):
        average_over_seeds([make_result(), make_result(backend="triton"), make_result(**change)])


def test_no_result_has_no_average():
    with pytest.raises(UserError, match="no result to average"):
        average_over_seeds([])


PLANS = {"sampler": "ddim", "sampling_steps": 10, "guidance": 1.2}


@pytest.mark.parametrize(
    "result",
    [make_result(), returns_alone(), make_result(plans=PLANS)],
    ids=["success", "return", "plans"],
)
def test_a_result_is_read_back_as_it_was_written(result, tmp_path):
    result = replace(result, returns=result.returns / 3)  # not round numbers
    path = result.save(tmp_path / "evaluation")
    again = EvaluationResult.load(path)
    assert again.protocol == result.protocol and again.protocol.name == path.stem
    np.testing.assert_array_equal(again.returns, result.returns)
    assert again.returns.dtype == np.float64
    if result.successes is None:
        assert again.successes is None
    else:
        assert again.successes.dtype == bool
        np.testing.assert_array_equal(again.successes, result.successes)
    assert (again.seconds, again.versions) == (result.seconds, result.versions)
    assert again.summary() == result.summary()


def test_plans_are_told_where_there_are_some(tmp_path):
    without, planned = make_result(), make_result(plans=PLANS)
    assert "plans" not in without.to_json()["protocol"]
    assert without.protocol.name != planned.protocol.name
    row = next(csv.DictReader(io.StringIO(planned.to_csv())))
    assert (row["sampler"], row["sampling_steps"], row["guidance"]) == ("ddim", "10", "1.2")
    assert "sampler" not in without.to_csv()


def refused(path: Path) -> str:
    """The one sentence, naming the file, with which it is not read."""
    with pytest.raises(UserError) as error:
        EvaluationResult.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"format": "harmodt-evaluation", "version": 2}', "of version 2, and .* reads version 4"),
        (b'{"format": "harmodt-evaluation", "version": [3]}', r"of version \[3\], and"),
        (b'{"format": "harmodt-run", "version": 3}', "is not an evaluation: name a JSON file"),
        (
            b'{"format": "harmodt-evaluation", "version": 4}',
            "is damaged .its checksum fails.: restore it .*, or evaluate",
        ),
        (b"[]", "is not an evaluation"),
        (b"null", "is not an evaluation"),
        (b"7", "is not an evaluation"),
        (b"{", "is damaged .it is not JSON.*, or evaluate the run again"),
        (b"", "is damaged .it is not JSON"),
        (bytes(range(256)), "is damaged .it is not JSON"),
        (b"[" * 100_000, "is damaged .it is not JSON"),
        (b'{"a":' * 100_000, "is damaged .it is not JSON"),
        (b"1" * 100_000, "is damaged .it is not JSON"),
        (None, "there is no evaluation"),
    ],
)
def test_files_that_are_no_evaluation_of_this_version(tmp_path, content, says):
    path = tmp_path / "step-1.json"
    if content is not None:
        path.write_bytes(content)
    assert re.search(says, refused(path))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_not_read(tmp_path, make):
    make(tmp_path / "step-1.json")
    assert "is not a regular file" in refused(tmp_path / "step-1.json")
    assert "there is no evaluation" in refused(Path(__file__) / "step-1.json")


def test_one_digit_that_is_another_is_noticed(tmp_path):
    path = make_result().save(tmp_path)
    for old, new in ((b"10.5", b"11.5"), (b"true", b"false"), (b'"cpu"', b'"gpu"')):
        content = path.read_bytes()
        path.write_bytes(content.replace(old, new, 1))
        assert "its checksum fails" in refused(path)
        path.write_bytes(content)
    EvaluationResult.load(path)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (["tasks"], None, "`array`, got `null`"),
        (["tasks"], [], "the tasks of its results are not the tasks"),
        (["tasks", 0], 7, "`object`, got `int`"),
        (["tasks", 0, "task"], "push-v3", "the tasks of its results are not the tasks"),
        (
            ["tasks", 1, "episode_returns"],
            [1.0, 2, 3],
            "press-topdown-v3 has the returns of 3 episodes",
        ),
        (["tasks", 1, "episode_returns"], [1, 2, 3, "4"], "`float`, got `str`"),
        (["tasks", 1, "episode_returns"], [1, 2, 3, math.nan], "(NaN|Infinity) is not finite"),
        (["tasks", 1, "episode_returns"], [1, 2, 3, math.inf], "(NaN|Infinity) is not finite"),
        (["tasks", 1, "episode_returns"], [1, 2, 3, 10**400], "out of range"),
        (["tasks", 0, "episode_successes"], [True], "has the successes of 1 episodes"),
        (["tasks", 0, "episode_successes"], [1, 1, 1, 1], "`bool`, got `int`"),
        (["tasks", 0, "episode_successes"], None, "the successes of reach-v3 do not fit"),
        (["protocol"], [], "`object`, got `array`"),
        (["protocol", "episodes"], 5, "has the returns of 4 episodes"),
        (["protocol", "episodes"], 0, ">= 1"),
        (["protocol", "episodes"], 10**30, "episodes"),
        (["protocol", "tasks"], [], "tasks"),
        (
            ["protocol", "success_rule"],
            None,
            "the successes of .* do not fit the protocol's success rule",
        ),
        (["protocol", "success_rule"], "never", "success_rule"),
        (["protocol", "target_returns"], [1.0], "has 1 target returns"),
        (["protocol", "target_returns"], [1.0, math.nan], "NaN is not finite"),
        (["protocol", "weather"], "fine", r"missing or unknown entries \(weather\)"),
        (["\ud800"], 7, "surrogates not allowed"),
        (["protocol", "environment"], {}, "environment"),
        (["protocol", "environment", "episode_length"], -1, ">= 1"),
        (["seconds"], "12", "`float`, got `str`"),
        (["seconds"], math.inf, "Infinity is not finite"),
        (["versions"], {"python": 3}, "`str`, got `int`"),
    ],
)
def test_what_cannot_be_is_refused_even_with_its_checksum(tmp_path, place, value, says):
    path = make_result().save(tmp_path)
    content = json.loads(path.read_text())
    del content["crc32"]
    *above, last = place
    part = content
    for key in above:
        part = part[key]
    part[last] = value
    text = json.dumps(content, sort_keys=True)
    path.write_text(json.dumps({**content, "crc32": f"{zlib.crc32(text.encode()):08x}"}))
    assert re.search(says, refused(path))


def test_json_holds_protocol_versions_and_every_episode(tmp_path):
    content = json.loads(make_result().save(tmp_path).read_text())
    assert content["protocol"]["goal_seed"] == 9 and content["protocol"]["episodes"] == 4
    assert content["protocol"]["success_rule"] == "any" and content["protocol"]["checkpoint"] == 70
    assert content["protocol"]["environment"]["reward_version"] == "v2"
    assert (content["protocol"]["backend"], content["protocol"]["device"]) == ("reference", "cpu")
    first = content["tasks"][0]
    assert (first["task"], first["successes"], first["success_rate"]) == ("reach-v3", 3, 0.75)
    assert first["mean_return"] == 25.125 and first["episode_returns"] == [10.5, 20, 30, 40]
    assert first["episode_successes"] == [True, True, False, True]
    assert content["average"]["success_rate"] == 0.375 and content["average"]["episodes"] == 8


def test_versions_are_of_the_packages_that_matter():
    assert {"python", "torch", "numpy"} <= versions().keys()
    assert "mujoco" in versions(["mujoco", "no-such-package"])
    assert "no-such-package" not in versions(["no-such-package"])


def read_csv(result: EvaluationResult) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(result.to_csv())))


def test_csv_holds_a_row_per_task_and_the_average():
    rows = read_csv(make_result())
    assert [row["task"] for row in rows] == [*TASKS, "average"]
    assert [float(row["success_rate"]) for row in rows] == [0.75, 0, 0.375]
    assert [float(row["mean_return"]) for row in rows] == [25.125, 2.5, 13.8125]
    assert {(row["success_rule"], row["goal_seed"]) for row in rows} == {("any", "9")}
    assert {(row["family"], row["reward_version"]) for row in rows} == {("metaworld", "v2")}
    low, high = wilson_interval(3, 4)
    assert (float(rows[0]["success_low"]), float(rows[0]["success_high"])) == (low, high)
    kinds = ["Wilson", "Wilson", "bootstrap over tasks and episodes"]
    assert [row["interval"] for row in rows] == kinds


def test_csv_of_returns_alone_knows_no_success():
    result = returns_alone()
    rows = read_csv(result)
    assert not [column for column in rows[0] if "success" in column]
    first, _, average = rows
    assert (float(average["return_low"]), float(average["return_high"])) == tuple(
        np.quantile(bootstrap_means(RETURNS[None]), (0.025, 0.975))
    )
    # Of one task's four episodes, 10.5 to 40: only its own returns count.
    assert 10.5 <= float(first["return_low"]) < 25.125 < float(first["return_high"]) <= 40


def test_an_evaluation_replaces_only_its_own_files(tmp_path):
    variants = [
        make_result(), make_result(), make_result(seed=6), make_result(success_rule="last"),
        make_result(checkpoint=80), make_result(target_returns=(4000.0, 3.0)),
        make_result(precision="bf16"), make_result(backend="triton"), make_result(device="cuda:0"),
        make_result(environment=replace(PROTOCOL.environment, reward_version="v1")),
    ]  # fmt: skip
    assert len({result.save(tmp_path) for result in variants}) == 9
    assert len(list(tmp_path.iterdir())) == 18


def test_what_a_killed_evaluation_left_goes_when_it_is_repeated(tmp_path):
    path = make_result().save(tmp_path)
    for name in (path.name, f"{path.stem}.csv"):
        (tmp_path / f".{name}.{ended_process()}.tmp").touch()
    make_result().save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f"{path.stem}.csv"}


def test_a_failing_write_leaves_the_old_files(tmp_path, monkeypatch):
    make_result().save(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    other = replace(make_result(), returns=RETURNS + 1)
    monkeypatch.setattr(EvaluationResult, "to_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        other.save(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def show(result: EvaluationResult) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(result.table())
    return console.export_text()


def test_table_shows_every_task_and_the_average():
    text = show(make_result())
    lines = [line for line in text.splitlines() if "│" in line]
    assert [line.split("│")[1].strip() for line in lines] == [*TASKS, "average"]
    assert "3/4" in lines[0] and "0.75" in lines[0] and "0.30 – 0.95" in lines[0]
    assert "3/8" in lines[2] and "0.38" in lines[2]
    average = make_result().average
    assert f"{average.low:.2f} – {average.high:.2f}" in lines[2]
    assert "Success at any step, checkpoint 70" in text
    assert "bootstrap over tasks and episodes" in text


def test_table_of_returns_alone_knows_no_success():
    text = show(returns_alone())
    assert "Return, checkpoint 70" in text and "mean return" in text
    assert "solved" not in text.lower() and "success" not in text.lower()
    assert "25" in text and "bootstrap over tasks and episodes" in text
