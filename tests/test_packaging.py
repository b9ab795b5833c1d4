"""The repository's face: what README, CI and metadata say is what is there."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import get_args

import pytest

import harmodt
from harmodt.config import PRESETS, Algorithm

ROOT = Path(__file__).parents[1]
TEXTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_lines(name: str) -> list[str]:
    """Lines of a text's bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", read(name), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def module_commands() -> list[tuple[str, ...]]:
    """Every `python -m harmodt...` command that a text shows, as (module, arguments...)."""
    found = set()
    for name in TEXTS:
        for line in code_lines(name):
            match = re.search(r"python -m (harmodt\.\w+)(.*)", line)
            if match:
                found.add((match[1], *shlex.split(match[2], comments=True)))
    return sorted(found)


def pip_arguments(line: str) -> list[str]:
    return shlex.split(line.split(" && ")[1])[1:]


def test_readme_has_one_command_for_the_job_and_one_for_the_tests() -> None:
    job, tests = (line for line in code_lines("README.md") if line.startswith("python3 -m venv"))
    assert job.endswith("&& .venv/bin/python -m harmodt.train")
    assert tests.endswith("&& .venv/bin/python -m pytest")
    assert pip_arguments(job) == ["install", "-c", "constraints.txt", "-e", "."]
    assert pip_arguments(tests) == ["install", "-c", "constraints.txt", "-e", ".[dev]"]


def test_ci_runs_the_readme_test_command_and_fails_with_it(tmp_path: Path) -> None:
    """CI in a checkout whose test command fails: it ran that command and nothing after it."""
    script = tmp_path / ".ci" / "run"
    script.parent.mkdir()
    script.write_bytes((ROOT / ".ci" / "run").read_bytes())
    readme = "python3 -m venv x\npython3 -m venv --help >/dev/null && false -m pytest\n"
    (tmp_path / "README.md").write_text(f"```bash\n{readme}```\n")
    result = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stdout == "+ python3 -m venv --help >/dev/null && false -m pytest\n"
    assert "ruff" not in result.stderr


def test_ci_script_can_be_executed() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_version_is_the_same_everywhere() -> None:
    assert metadata.version("harmodt") == harmodt.__version__
    assert f"\nversion: {harmodt.__version__}\n" in read("CITATION.cff")
    newest = re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)
    assert newest and newest[1] == harmodt.__version__


def test_constraints_pin_every_direct_dependency_but_triton() -> None:
    def name(requirement: str) -> str:
        return re.split(r"[^\w-]", requirement, maxsplit=1)[0].lower()

    pins = [line for line in read("constraints.txt").splitlines() if line[:1] not in ("#", "")]
    assert all("==" in pin for pin in pins)
    required = {name(requirement) for requirement in metadata.requires("harmodt") or []}
    assert {name(pin) for pin in pins} == required - {"triton"}


@pytest.mark.parametrize("text", TEXTS)
def test_links_lead_somewhere(text: str) -> None:
    targets = re.findall(r"\]\(([^)]+)\)", read(text))
    for target in targets:
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        linked = (ROOT / text).parent / path if path else ROOT / text
        assert linked.exists(), target
        if anchor:
            assert anchor in headings(linked), target


def headings(path: Path) -> set[str]:
    """GitHub's anchors of a text's headings."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("text", TEXTS)
def test_named_files_exist(text: str) -> None:
    """Files in `backquotes` are in the repository, unless a run makes them."""
    for name in re.findall(
        r"`([\w./<>*-]+/|[\w./<>*-]+\.(?:py|md|txt|toml|cff|npy|npz))`", read(text)
    ):
        if "<" in name or name.startswith(("runs/", "evaluation/", "tensorboard/")):
            continue
        assert (ROOT / name).exists() or any(
            f"/{path}".endswith(f"/{name}") for path in sources()
        ), name


def test_readme_tables_are_of_the_settings_there_are() -> None:
    def table(first_cell: str) -> dict[str, list[str]]:
        rows = read("README.md").partition(f"| {first_cell} |")[2].partition("\n\n")[0].splitlines()
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
        return {row[0].split("`")[1]: row for row in cells}

    presets = table("`--preset`")
    assert list(presets) == list(PRESETS)
    for name, config in PRESETS.items():
        *_, model, steps = presets[name]
        assert (
            model == f"{config.size.replace('M', ' M')} parameters, d = {config.model().embed_dim}"
        )
        assert int(steps.replace(",", "")) == config.steps
    assert tuple(table("`--algorithm`")) == get_args(Algorithm)


@pytest.mark.parametrize("command", module_commands(), ids=" ".join)
def test_shown_flags_are_accepted(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *arguments = command
    subcommand = arguments[:1] if module == "harmodt.data" else []
    monkeypatch.setattr(sys, "argv", [module, *subcommand, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        package = importlib.util.find_spec(module).submodule_search_locations is not None
        importlib.import_module(f"{module}.__main__" if package else module).main()
    assert not ended.value.code
    help_text = capsys.readouterr().out
    for argument in arguments:
        if argument.startswith("--"):
            assert re.search(rf"{argument}(?![\w-])", help_text), argument


def test_wheel_holds_both_packages(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for path in sources() | {Path("setup.py"), Path("pyproject.toml"), Path("README.md")}:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes((ROOT / path).read_bytes())
    (tree / "LICENSE").write_bytes((ROOT / "LICENSE").read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(tree)], check=True)
    (wheel,) = tmp_path.glob("harmodt-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    assert packed == {
        re.sub("^kernels/", "harmodt_kernels/", path.as_posix()) for path in sources()
    }


def sources() -> set[Path]:
    """Every module of the two packages, relative to the repository."""
    folders = (ROOT / "harmodt", ROOT / "kernels")
    return {path.relative_to(ROOT) for folder in folders for path in folder.rglob("*.py")}


def test_packages_are_found_from_anywhere(tmp_path: Path) -> None:
    for package in ("harmodt", "harmodt_kernels"):
        program = f"from importlib.util import find_spec; print(find_spec({package!r}).origin)"
        python = [sys.executable, "-c", program]
        result = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert (Path(result.stdout.strip()).parent / "__init__.py").is_file()
