"""The repository's face: what README, CI and metadata say is what is there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import numpy
import pytest
import torch
from tiny import make_store

import harmodt
import harmodt_kernels
from harmodt.algorithms import ALGORITHMS, preset
from harmodt.config import PRESETS, SIZES
from harmodt.settings import settings

ROOT = Path(__file__).parents[1]
TEXTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_lines(name: str) -> list[str]:
    """Lines of a text's bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", read(name), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def pip_arguments(line: str) -> list[str]:
    return shlex.split(line.split(" && ")[1])[1:]


def test_readme_has_one_command_for_the_job_and_one_for_the_tests() -> None:
    job, tests = (line for line in code_lines("README.md") if line.startswith("python3 -m venv"))
    assert job.endswith("&& .venv/bin/python -m harmodt.train")
    assert tests.endswith("&& .venv/bin/python -m pytest -n auto --dist loadfile")
    assert pip_arguments(job) == ["install", "-c", "constraints.txt", "-e", "."]
    assert pip_arguments(tests) == ["install", "-c", "constraints.txt", "-e", ".[dev]"]


def ci(tree: Path, prints: str, status: int = 0, **programs: str) -> tuple[int, str, str]:
    """Run CI in a checkout where every program but Bash's own is a stand-in.

    Args:
        prints: what the tests print.
        status: that of the test command.
        programs: what a program does beside writing its name and its arguments to `called`.

    Returns:
        The status, stdout and stderr, without what Bash traces.
    """
    (tree / ".ci").mkdir(parents=True)
    for name in ("run", "skips"):
        (tree / ".ci" / name).write_bytes((ROOT / ".ci" / name).read_bytes())
    (tree / "printed").write_text(prints)
    path = {"python3": f"cat printed; exit {status}", "id": "echo 1000"}
    path |= dict.fromkeys(("cmake", "ctest", "gcc"), ":")
    tests = path | programs
    tests |= dict.fromkeys(("ruff", "mypy", "python"), ":")
    for name, does in tests.items():
        file = tree / ("bin" if name in path | programs else ".venv/bin") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'#!/bin/bash\necho "{name} $*" >> "{tree}/called"\n{does}\n')
        file.chmod(0o755)
    (tree / ".ci" / "audit").write_text("#!/bin/bash\n")
    (tree / ".ci" / "audit").chmod(0o755)
    (tree / "README.md").write_text(f"```bash\n{CI_COMMAND}\n```\n")
    environment = os.environ | {"PATH": f"{tree / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(tree / ".ci" / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = [line for line in ended.stderr.splitlines() if not line.startswith("+")]
    return ended.returncode, ended.stdout, "\n".join(said)


CI_COMMAND = "python3 -m venv x -m pytest -n auto --dist loadfile"
SKIP = "SKIPPED [15] tests/test_graph.py:161: needs a GPU\n"


def test_ci_runs_the_readme_test_command_and_fails_with_it(tmp_path: Path) -> None:
    """It runs that command, and nothing after it."""
    status, printed, _ = ci(tmp_path / "fails", "1 failed\n", status=1)
    assert status != 0
    assert printed == f"+ {CI_COMMAND}\n1 failed\n"
    called = (tmp_path / "fails" / "called").read_text()
    assert "python3" in called and "ruff" not in called and "--full" not in called
    status, printed, _ = ci(tmp_path / "passes", SKIP)
    assert status == 0 and printed.startswith(f"+ {CI_COMMAND}\n{SKIP}")
    called = (tmp_path / "passes" / "called").read_text()
    assert "python -m pytest -n auto --dist loadfile --full -m full" in called
    assert "ruff" in called and "mypy" in called and "bench/" in called
    assert "cmake -B build/sanitize -DHARMODT_SANITIZE=ON" in called and "odd_shapes.py" in called


def test_ci_fails_where_a_test_is_skipped_for_another_reason(tmp_path: Path) -> None:
    other = "SKIPPED [1] tests/test_report.py:511: there is no Chromium\n"
    status, _, said = ci(tmp_path, SKIP + other)
    assert status == 1
    assert said == (
        "skipped for reasons that .ci/skips does not list: "
        "tests/test_report.py: there is no Chromium"
    )


@pytest.mark.parametrize("user", [0, 1000])
@pytest.mark.parametrize("stand_ins", [True, False])
def test_ci_installs_missing_programs_as_root(tmp_path: Path, user: int, stand_ins: bool) -> None:
    names = ("chromium", "aarch64-linux-gnu-g++", "qemu-aarch64-static")
    programs = {"id": f"echo {user}", "apt-get": ":"}
    programs |= dict.fromkeys(names if stand_ins else (), ":")
    status, *_ = ci(tmp_path, SKIP, **programs)
    assert status == 0
    called = (tmp_path / "called").read_text()
    packages = "chromium g++-aarch64-linux-gnu qemu-user-static"
    there = stand_ins or all(shutil.which(name) for name in names)
    assert (f"install -y -qq --no-install-recommends {packages}" in called) == (
        user == 0 and not there
    )


def test_ci_script_can_be_executed() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_version_is_the_same_everywhere() -> None:
    assert metadata.version("harmodt") == harmodt.__version__ == harmodt_kernels.__version__
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
        if "<" in name or name.startswith(("runs/", "results/", "evaluation/", "tensorboard/")):
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
    for name in PRESETS:
        values = dict(settings(preset(name, "harmodt-f")))
        size, *_, model, steps = values["size"], *presets[name]
        assert model == f"{size.replace('M', ' M')} parameters, d = {SIZES[size][0]}"
        assert int(steps.replace(",", "")) == values["steps"]
    assert list(table("`--algorithm`")) == list(ALGORITHMS)


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution of the tracked files."""
    tree = tmp_path_factory.mktemp("source")
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    build = "import setuptools.build_meta as b; print(b.build_sdist('.'))"
    built = subprocess.check_output([sys.executable, "-c", build], cwd=tree, text=True)
    shutil.unpack_archive(tree / built.splitlines()[-1], tree / "unpacked")
    (unpacked,) = (tree / "unpacked").iterdir()
    return unpacked


def test_a_source_distribution_has_every_source(source_distribution: Path) -> None:
    cpp = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").rglob("*.[ch]*")}
    cpp = {name for name in cpp if name.endswith((".h", ".cpp"))}
    for name in {path.as_posix() for path in sources()} | cpp | {"CMakeLists.txt"}:
        assert (source_distribution / name).is_file(), name


USE_WHEEL = """
import harmodt, harmodt_kernels, torch

layer = harmodt_kernels.MaskedLinear(5, 3)
layer(torch.ones(2, 7, 5)).sum().backward()
assert torch.equal(layer.weight.grad, torch.full((3, 5), 14.0))
maps = open("/proc/self/maps").read().split()
runtimes = {m for m in maps if "libgomp" in m or "libomp" in m or "libiomp" in m}
backend = harmodt_kernels.fused_backend("cpu").name
print(harmodt.__file__, harmodt_kernels.__file__, backend, *runtimes, sep="\\n")
"""


def test_a_wheel_for_many_distributions_trains_where_no_compiler_is(
    source_distribution: Path, tmp_path: Path
) -> None:
    """From the source distribution, with the commands of CONTRIBUTING.md, to a wheel to an
    environment that has nothing else of ours. The wheel brings no OpenMP: PyTorch's is used."""
    pytest.importorskip("auditwheel")
    left_out = ("PYTHONPATH", "TRITON_INTERPRET", "HARMODT_ISA")
    alone = {name: value for name, value in os.environ.items() if name not in left_out}
    here = Path(sys.executable).parent
    # Optimised kernels take a minute to compile.
    building = alone | {"PATH": f"{here}:{alone['PATH']}", "CMAKE_BUILD_TYPE": "Debug"}
    lines = [line for line in code_lines("CONTRIBUTING.md") if "wheel" in line]
    commands = "\n".join(lines).replace("pip wheel", "pip wheel --no-build-isolation")
    subprocess.run(
        ["bash", "-e", "-c", commands], check=True, cwd=source_distribution, env=building
    )
    (path,) = (source_distribution / "dist" / "manylinux").iterdir()
    assert re.search(r"-manylinux_\d+_\d+_\w+\.whl$", path.name)
    held = set(zipfile.ZipFile(path).namelist())
    assert {name for name in held if name.endswith(".py")} == {
        re.sub("^kernels/", "harmodt_kernels/", source.as_posix()) for source in sources()
    }
    assert {name for name in held if ".so" in name} == {"harmodt_kernels/native/libharmodt.so"}

    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    install = [*pip, "--python", str(python), "install", "--no-deps", str(path)]
    subprocess.run(install, check=True, env=alone)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # Dependencies come from here; the editable installation beside them is not followed.
    dependencies = {Path(module.__file__).parents[1] for module in (numpy, torch)}
    (site / "dependencies.pth").write_text("".join(f"{folder}\n" for folder in dependencies))
    alone["PATH"] = str(python.parent)
    assert shutil.which("g++", path=alone["PATH"]) is None
    used = [python, "-c", USE_WHEEL]
    printed = subprocess.check_output(used, cwd=tmp_path, env=alone, text=True).split()
    assert all(name.startswith(str(site)) for name in printed[:2])
    assert printed[2].startswith("cpu-")
    (runtime,) = printed[3:]
    assert not runtime.startswith(str(site))
    store = make_store(tmp_path / "store")
    flags = "--steps 2 --embed-dim 32 --layers 1 --heads 2 --context-length 4 --prompt-length 2"
    flags += " --tasks-per-step 2 --evaluation-episodes 0 --fused --output run"
    command = [python, "-m", "harmodt.train", "--data", store.path, *flags.split()]
    subprocess.run(command, check=True, cwd=tmp_path, env=alone)
    assert (tmp_path / "run" / "checkpoints" / "00000002").is_dir()


def test_where_no_compiler_is_the_rest_is_installed(tmp_path: Path) -> None:
    build = ["setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path]
    ended = subprocess.run(
        [sys.executable, *build], cwd=ROOT, env=os.environ | {"CXX": "/nonexistent"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0 and "the CPU kernels were not built" in ended.stderr
    assert not (tmp_path / "lib" / "harmodt_kernels" / "native" / "libharmodt.so").exists()


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
