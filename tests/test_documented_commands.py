"""Every command that README and docs show goes through its real parser and its real checks."""

from __future__ import annotations

import importlib
import importlib.util
import re
import runpy
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

import harmodt.data.__main__
import harmodt.report.__main__
import harmodt.reproduce.__main__
from harmodt import collect, evaluate, files, import_checkpoint
from harmodt.algorithms import ALGORITHMS, preset
from harmodt.data import importing, merging
from harmodt.data.importers import IMPORTERS, Importer
from harmodt.data.store import DataStore
from harmodt.environments import family, family_of
from harmodt.environments.locomotion import measure_expert, train_expert
from harmodt.errors import UserError
from harmodt.rundir import RunDirectory
from harmodt.training import run
from harmodt.training.run import SavedRun

ROOT = Path(__file__).parents[1]
TEXTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))


class AtWork(BaseException):
    """The command was accepted: all that is checked before its work begins was checked."""


def at_work(*_: Any, **__: Any) -> Any:
    raise AtWork


def commands(line: str) -> Iterator[tuple[str, ...]]:
    """The Python commands of a shell line, as (module or script, arguments...)."""
    for command in line.split(" && "):
        words = shlex.split(command.replace("…", "..."), comments=True)
        words = ["python", "-m", *words] if words[:1] == ["pytest"] else words
        if not words or not re.fullmatch(r"(\.venv/bin/)?python", words[0]):
            continue
        yield tuple(words[2:] if words[1] == "-m" else words[1:])


def code(name: str) -> list[str]:
    """The lines in the code blocks of a text, and what stands between its `backquotes`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    block = re.compile(r"^ *```\w*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
    lines = [line for lines in block.findall(text) for line in lines.splitlines()]
    spans = re.findall(r"`([^`]+)`", block.sub("", text))
    return lines + [" ".join(span.split()) for span in spans]


def documented() -> list[tuple[str, ...]]:
    """The commands of all texts, each once."""
    found = set()
    for line in (line for name in TEXTS for line in code(name)):
        line = line.partition("as a page to look at: ")[2] or line  # in a command's output
        if re.match(r"(\.venv/bin/python|python|python3|pytest) |pytest$", line):
            found |= set(commands(line))
    return sorted(found)


class Store:
    """Stands in for any store: it holds all tasks of a family, and reading data is work."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.checksum = f"checksum of {path}"
        name = self.path.name if self.path.name in ("cheetah-vel", "cheetah-dir") else "metaworld"
        self.environment = family(name).spec
        self.tasks = tuple(t for tasks in family(name).task_sets.values() for t in tasks)

    def verify(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        raise AtWork


def tasks_of_datasets(source: Importer) -> tuple[str, ...]:
    """Those that a command names for the source's data sets."""
    return source.resolve_tasks([*source.datasets.values()]) if source.datasets else ()


def check_evaluation(config: evaluate.EvaluateConfig, *_: Any) -> None:
    """What an evaluation checks once its run is there."""
    if config.episodes.tasks:
        family_of(config.episodes.tasks)
    torch.device(config.policy.device or "cpu")
    raise AtWork


@pytest.fixture
def stop_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands check what they were given, and raise `AtWork` where they would begin to work."""
    monkeypatch.chdir(tmp_path)
    # A source whose files tell the family.
    source = tmp_path / "prompt-dt" / "data" / "ant_dir"
    source.mkdir(parents=True)
    (source / "ant_dir-0-expert.pkl").touch()
    monkeypatch.setattr(DataStore, "open", Store)
    for row in IMPORTERS.values():
        module, _, name = row.partition(":")
        kind = getattr(importlib.import_module(module), name)
        monkeypatch.setattr(kind, "__init__", Importer.__init__)
        monkeypatch.setattr(kind, "tasks", tasks_of_datasets)
    for module in (collect, importing, merging):
        monkeypatch.setattr(module, "make_or_open", at_work)
    monkeypatch.setattr(RunDirectory, "read", lambda self: None)
    saved = Namespace(config=preset("quickstart", "harmodt-f"))
    monkeypatch.setattr(SavedRun, "open", lambda path: saved)
    monkeypatch.setattr(run, "begin", at_work)
    monkeypatch.setattr(run, "resume", at_work)
    monkeypatch.setattr(evaluate, "_load", check_evaluation)
    monkeypatch.setattr(evaluate, "find_backend", lambda: None)
    monkeypatch.setattr(import_checkpoint.AuthorsCheckpoint, "read", at_work)
    monkeypatch.setattr(harmodt.report.__main__, "write_report", at_work)
    for name in ("listing", "find_slots"):
        monkeypatch.setattr(harmodt.reproduce.__main__, name, at_work)
    monkeypatch.setattr(measure_expert, "load_expert", at_work)
    monkeypatch.setattr(train_expert, "SAC", at_work)
    monkeypatch.setitem(sys.modules, "atheris", MagicMock())  # a fuzzer that is installed by hand


def give(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, config: pytest.Config) -> None:
    """Give a command to its parser and its checks.

    Raises:
        UserError, SystemExit, Exception: it is refused.
    """
    program, *arguments = command
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    try:
        if program == "pytest":
            check_pytest(arguments, config)
        elif program.endswith(".py"):
            run_script(ROOT / program, monkeypatch)
        else:
            main_of(program)()
    except AtWork:
        pass
    except SystemExit as ended:  # of --help
        if ended.code:
            raise


def main_of(module: str) -> Any:
    package = importlib.util.find_spec(module).submodule_search_locations is not None
    return importlib.import_module(f"{module}.__main__" if package else module).main


def check_pytest(arguments: list[str], config: pytest.Config) -> None:
    """Parse with the options of pytest, its plugins and conftest.py; the paths are there."""
    known, unknown = config._parser.parse_known_and_unknown_args(arguments)
    assert not unknown
    for path in known.file_or_dir:
        assert (ROOT / path).exists(), path


def run_script(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script up to where its arguments are parsed; one without a parser takes none."""
    if "ArgumentParser" not in path.read_text(encoding="utf-8"):
        assert sys.argv[1:] == []
        return
    parse = ArgumentParser.parse_args

    def parsed(*arguments: Any, **options: Any) -> Any:
        parse(*arguments, **options)
        raise AtWork

    monkeypatch.setattr(ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(files, "checksum", files.checksum)  # a fuzzer replaces it: put it back
    monkeypatch.syspath_prepend(path.parent)
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("command", documented(), ids=" ".join)
def test_documented_commands_are_accepted(
    command: tuple[str, ...],
    stop_at_work: None,
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
) -> None:
    give(command, monkeypatch, pytestconfig)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("python -m harmodt.reproduce tabel9 --budget small", "tabel9"),
        ("python -m harmodt.reproduce table2 --budget nosuch", "nosuch"),
        ("python -m harmodt.reproduce table2 --seeds 0 x", "seeds"),
        ("python -m harmodt.reproduce table2 --reference HarmoDT-G", "HarmoDT-G"),
        ("python -m harmodt.train --preset papers --data data/mt50", "papers"),
        ("python -m harmodt.train --preset paper --data data/mt50 --sparsity 7", "sparsity"),
        ("python -m harmodt.train --preset paper --data data/mt50 --seed x", "seed"),
        ("python -m harmodt.train --algorithm harmodt-g", "harmodt-g"),
        ("python -m harmodt.train --data data/mt10 --tasks reech", "reech"),
        ("python -m harmodt.train --size 1.48M", "size"),
        ("python -m harmodt.train --resume runs/a --seed 1", "seed"),
        ("python -m harmodt.collect --output data/a --tasks mt11", "mt11"),
        ("python -m harmodt.collect --output data/a --composition best", "composition"),
        ("python -m harmodt.data import a --output b --format lerobt", "lerobt"),
        ("python -m harmodt.data import a --output b --tasks mt49", "mt49"),
        ("python -m harmodt.data verfy data/mt10", "verfy"),
        ("python -m harmodt.data merge data/a --output data/b", "two"),
        ("python -m harmodt.evaluate runs/a --tasks mt11", "mt11"),
        ("python -m harmodt.evaluate runs/a --success first", "success"),
        ("python -m harmodt.evaluate runs/a --mask nearest", "--unseen"),
        ("python -m harmodt.import_checkpoint model_iter_5 --data data/mt50", "output"),
        ("python -m harmodt.environments.locomotion.measure_expert cat-dir", "cat-dir"),
        ("python bench/campaign.py --device tpu", "tpu"),
        ("pytest tests/test_faults.py --faults fully", "fully"),
    ],
)
def test_wrong_commands_are_refused(
    line: str,
    what: str,
    stop_at_work: None,
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (command,) = commands(line)
    with pytest.raises((UserError, SystemExit, pytest.UsageError)) as refused:
        give(command, monkeypatch, pytestconfig)
    said = capsys.readouterr()
    assert what in f"{refused.value}{said.out}{said.err}"


def help_of(program: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    monkeypatch.setattr(sys, "argv", [*program, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        if program[0].endswith(".py"):
            runpy.run_path(str(ROOT / program[0]), run_name="__main__")
        else:
            main_of(program[0])()
    return capsys.readouterr().out


def test_flags_in_the_texts_are_flags_of_some_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that no whole command shows."""
    programs = [("harmodt.train", "--algorithm", name) for name in ALGORITHMS]
    programs += [("harmodt.data", name) for name in harmodt.data.__main__.COMMANDS]
    names = ("collect", "evaluate", "import_checkpoint", "report", "reproduce")
    expert = "environments.locomotion.train_expert"
    programs += [(f"harmodt.{name}",) for name in (*names, expert)]
    scripts = ("tests/compile_for_targets.py", "bench/profile_step.py", "bench/campaign.py")
    monkeypatch.syspath_prepend(ROOT / "bench")
    shown = "\n".join(help_of(p, monkeypatch, capsys) for p in [*programs, *zip(scripts)])
    known = set(re.findall(r"--[a-z][a-z0-9-]*", shown))
    known |= {"--help", "--preset", "--algorithm", "--resume"}  # which harmodt.train takes itself
    known |= {"--faults", "--full", "--benchmark-only", "--benchmark-disable"}  # pytest's
    words = [word for name in TEXTS for line in code(name) for word in line.split()]
    flags = {re.match(r"--[a-z][a-z0-9-]*", w)[0] for w in words if re.match(r"--[a-z]", w)}
    of_others = {"--build", "--test-dir", "--logdir", "--dist"}  # CMake's, TensorBoard's, pytest's
    of_others |= {"--no-deps", "--wheel-dir", "--exclude"}  # pip's and auditwheel's
    assert flags - of_others <= known
