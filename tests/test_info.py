from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from tiny import make_store

from harmodt.data.__main__ import main
from harmodt.data.describe import describe, show
from harmodt.data.store import DataStore, Episode
from harmodt.data.writer import StoreWriter
from harmodt.environments import EnvironmentSpec
from harmodt.errors import UserError
from harmodt.progress import PlainConsole

SPEC = EnvironmentSpec("small", 3, 2, 5, success=True)
WIDTHS = (1, 40, 80, 110, 200, None)
LONG = "a-task-whose-name-alone-is-longer-than-forty-columns-v3"


def write_store(path: Path, rewards: dict[str, list[list[float]]]) -> DataStore:
    """A store with the rewards of each task's episodes; of two episodes success is known."""
    writer = StoreWriter(path, {"collect": {"seed": 3}, "versions": {"numpy": "2"}}, SPEC)
    for name, episodes in rewards.items():
        with writer.task(name) as task:
            for values, success in zip(episodes, [1, 0, -1], strict=False):
                array = np.array(values, np.float32)
                zeros = np.zeros((len(array), 5), np.float32)
                task.add(Episode(zeros[:, :3], zeros[:, :2], array, success))
            task.add_prompt(Episode(zeros[:, :3], zeros[:, :2], array, 1))
    return writer.finish(list(rewards))


def facts(tasks: dict[str, tuple[float, float, float]], **counts: int) -> dict[str, Any]:
    """What `describe` would say of tasks with these returns and, each, these counts."""
    counts = {
        "episodes": 3,
        "steps": 81,
        "prompts": 2,
        "shared_prompts": 0,
        "bytes": 21_226,
    } | counts
    return {
        "path": "data/store",
        "checksum": "0123abcd",
        "environment": SPEC.to_json(),
        "provenance": {},
        **{name: len(tasks) * count for name, count in counts.items()},
        "skipped": 0,
        "tasks": {
            name: {
                "returns": dict(zip(("min", "mean", "max"), returns, strict=True)),
                "success": 0.5,
                "clipped": None,
                **counts,
            }
            for name, returns in tasks.items()
        },
    }


def info(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    sys.argv = ["data", "info", *map(str, arguments)]
    main()
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def keep_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


def printed(description: dict[str, Any], width: int | None = None) -> str:
    """What `show` prints on a terminal of that width, or into a pipe."""
    console = PlainConsole(file=io.StringIO(), width=width)
    show(description, console, width)
    return console.file.getvalue()


def tables(text: str) -> list[list[str]]:
    """The lines of each table, without its rules."""
    _, *parts = text.split("\n\n")
    return [[line for line in part.splitlines() if "─" not in line] for part in parts]


def rows(text: str) -> list[list[str]]:
    """The words of each row, those of a row in all tables put together."""
    first, *others = ([line.split() for line in table] for table in tables(text))
    for table in others:
        for row, more in zip(first, table, strict=True):
            names = 2 if row[1:2] == ["tasks"] else 1
            assert more[:names] == row[:names]
            row += more[names:]
    return first


@pytest.mark.parametrize("width", WIDTHS)
def test_no_number_is_cut_at_any_width(width: int | None) -> None:
    tasks = {f"task-{number}": (-27.25 - number, 1.5, 8.0**number) for number in range(38)}
    tasks |= {LONG: (0.0, -1.0, 5.0), "名[/b]": (0.0, -1.0, 5.0), "b\033[1m": (0.0, -1.0, 5.0)}
    big = {"episodes": 10**9, "steps": 5 * 10**11, "prompts": 10**7, "bytes": 123_400_000}
    head, *found, whole = rows(printed(facts(tasks, **big), width))
    counts = ["1,000,000,000", "500,000,000,000"], ["50%", "10,000,000", "123.4", "MB"]
    expected = [
        [name, *counts[0], f"{-27.25 - number:.1f}", "1.50", str(8**number), *counts[1]]
        for number, name in enumerate(list(tasks)[:38])
    ]
    expected += [
        [name, *counts[0], "0.0", "-1.00", "5", *counts[1]]
        for name in (LONG, "名[/b]", r"b\x1b[1m")
    ]
    assert found == expected
    headings = "task episodes steps return min return mean return max success prompts size"
    assert head == headings.split()
    total = "41 tasks 41,000,000,000 20,500,000,000,000 410,000,000 5.1 GB"
    assert " ".join(whole) == total


@pytest.mark.parametrize("width", WIDTHS)
def test_lines_fit_and_columns_stand_one_below_the_other(width: int | None) -> None:
    names = ("button-press-topdown-wall-v3", "名前", "reach-v3")
    found = tables(printed(facts(dict.fromkeys(names, (-3.5, 20.0, 300.0))), width))
    assert len(found) == {1: 8, 40: 8, 80: 2, 110: 1, 200: 1, None: 1}[width]
    for table in found:
        lines = [line.rstrip() for line in table]
        assert len(lines) == 5
        # A name is never broken, and one column stands beside it however narrow it is.
        assert all(cell_len(line) <= max(width or 1000, 45) for line in lines)
        assert len({cell_len(line) for line in lines[:-1]}) == 1


@pytest.mark.parametrize(
    ("returns", "shown"),
    [
        ((-27.31, -80.02), ["-27.3", "-80.0"]),
        ((250.1, 300), ["250.1", "300.0"]),
        ((4321.2, 1000), ["4321", "1000"]),
        ((3.204, 88), ["3.20", "88.00"]),
        ((0.0512, 0.7), ["0.0512", "0.7000"]),
        ((0, 0), ["0", "0"]),
        ((0, 4.5), ["0.00", "4.50"]),
        ((0.001, 4321), ["0.00", "4321.00"]),  # a float32 has no more digits
        ((5, 4321987), ["5", "4321987"]),
    ],
)
def test_decimals_tell_returns_apart(returns: tuple[float, ...], shown: list[str]) -> None:
    tasks = {f"task-{number}": (value, 1.0, 1e4) for number, value in enumerate(returns)}
    found = rows(printed(facts(tasks)))[1:-1]
    # Each column has its own.
    assert [row[3:6] for row in found] == [[value, "1.00", "10000"] for value in shown]


def test_the_facts_are_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = {"first": [[1.5, 2.0], [-4.25], [0.5]], "second": [[8.0]]}
    store = write_store(tmp_path / "store", tasks)
    files = {name: list((store.path / name).rglob("*.npy")) for name in tasks}
    sizes = {name: sum(file.stat().st_size for file in found) for name, found in files.items()}
    assert json.loads(info(capsys, store.path, "--json")) == {
        "path": str(store.path),
        "checksum": json.loads((store.path / "manifest.json").read_text())["crc32"],
        "environment": {
            "family": "small",
            "observation_size": 3,
            "action_size": 2,
            "episode_length": 5,
            "success": True,
            "reward_version": None,
        },
        "provenance": {"collect": {"seed": 3}, "versions": {"numpy": "2"}},
        "episodes": 4,
        "steps": 5,
        "prompts": 2,
        "shared_prompts": 0,
        "bytes": sum(sizes.values()),
        "skipped": 0,
        "tasks": {
            "first": {
                "episodes": 3,
                "steps": 4,
                "returns": {"min": -4.25, "mean": -0.25 / 3, "max": 3.5},
                "success": 0.5,
                "clipped": None,
                "prompts": 1,
                "shared_prompts": 0,
                "bytes": sizes["first"],
            },
            "second": {
                "episodes": 1,
                "steps": 1,
                "returns": {"min": 8.0, "mean": 8.0, "max": 8.0},
                "success": 1.0,
                "clipped": None,
                "prompts": 1,
                "shared_prompts": 0,
                "bytes": sizes["second"],
            },
        },
    }
    head = info(capsys, store.path).splitlines()[:2]
    assert head == [
        f"{store.path}: small (3 observations, 2 actions)",
        f"checksum {store.checksum}, provenance: collect, versions (--json prints all of it)",
    ]


def test_success_that_is_not_known_is_null(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", {}, SPEC)
    with writer.task("a") as task:
        task.add(Episode(np.zeros((1, 3)), np.zeros((1, 2)), np.ones(1), -1))
    description = describe(writer.finish(["a"]))
    assert description["tasks"]["a"]["success"] is None
    row = rows(printed(description))[1]
    assert row[:8] == [
        "a",
        "1",
        "1",
        "1.00",
        "1.00",
        "1.00",
        "unknown",
        "0",
    ]


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_return_that_became_no_number_is_named(tmp_path: Path, value: float) -> None:
    store = write_store(tmp_path / "store", {"a": [[1.0], [2.0]]})
    file = store.path / "a" / "returns_to_go.npy"
    np.lib.format.open_memmap(file, "r+")[1] = value
    with pytest.raises(UserError, match=r"a/returns_to_go.npy is damaged .a return is"):
        describe(store)


def _at_terminal(width: int, command: list[str], environment: dict[str, str]) -> str:
    """What a command prints on a terminal of some width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, env=environment):
        os.close(theirs)
        printed = b""
        with suppress(OSError):  # which is how a terminal ends
            while part := os.read(ours, 1 << 16):
                printed += part
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;]*m", "", printed.decode().replace("\r\n", "\n"))


def test_the_width_is_the_terminals_and_there_is_none_in_a_pipe(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", ("button-press-topdown-wall-v3",))
    command = [sys.executable, "-m", "harmodt.data", "info", str(store.path)]
    environment = {name: v for name, v in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUTF8": "1"}
    description = describe(store)
    narrow = _at_terminal(40, command, environment)
    assert narrow == printed(description, 40) != printed(description)
    piped = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert piped.stdout == printed(description)
