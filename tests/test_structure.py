"""Which way imports run: from commands down to the kernels, and never in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A module may import those of its own line, where that makes no circle, and
# those of the lines before.
FLOORS = [
    {"harmodt_kernels"},
    {
        "harmodt.cores",
        "harmodt.draws",
        "harmodt.errors",
        "harmodt.files",
        "harmodt.graph",
        "harmodt.progress",
        "harmodt.sealed",
        "harmodt.settings",
        "harmodt.statistics",
        "harmodt.workers",
    },
    {"harmodt.batch", "harmodt.config", "harmodt.devices", "harmodt.rundir", "harmodt.checkpoint"},
    {"harmodt.environments", "harmodt.results"},
    {"harmodt.data"},
    {"harmodt.masks"},
    {"harmodt.networks"},
    {"harmodt.policies"},
    {"harmodt.algorithms", "harmodt.rollout"},
    {"harmodt.training"},
    {
        "harmodt.collect",
        "harmodt.data.__main__",
        "harmodt.evaluate",
        "harmodt.import_checkpoint",
        "harmodt.report",
        "harmodt.reproduce",
        "harmodt.train",
    },
]


def modules() -> dict[str, Path]:
    """Every module of the two packages by its name."""
    found = {}
    for package, folder in (("harmodt", ROOT / "harmodt"), ("harmodt_kernels", ROOT / "kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of ours that a module imports while it is imported itself."""
    tree, found = ast.parse(MODULES[name].read_text()), set()
    is_package = MODULES[name].name == "__init__.py"
    for node in _outside_functions(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level + is_package or None] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            below = {f"{module}.{alias.name}" for alias in node.names}
            found |= (below & MODULES.keys()) or {module}
    return {module for module in found if module in MODULES} - {name}


def _outside_functions(tree: ast.AST) -> list[ast.AST]:
    """Nodes that run when a module is imported; what is for type checkers alone does not."""
    nodes = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        nodes += [node, *_outside_functions(node)]
    return nodes


def floor(module: str) -> int:
    """The line of FLOORS that names the module or, with most of its name, its package."""
    named = [
        (len(prefix), number)
        for number, prefixes in enumerate(FLOORS)
        for prefix in prefixes
        if f"{module}.".startswith(f"{prefix}.")
    ]
    assert named, f"{module} has no floor: name it in FLOORS"
    return max(named)[1]


def test_the_imports_that_are_read_are_those_there_are() -> None:
    assert "harmodt.data.store" in imports("harmodt.data.inputs")
    assert "harmodt.algorithms.learner" in imports("harmodt.algorithms")
    assert "harmodt_kernels" in imports("harmodt.devices")
    assert "harmodt_kernels.masked_linear.reference" in imports("harmodt_kernels.backend")
    assert imports("harmodt") == set()  # PyTorch is imported when it is needed


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"harmodt"}))
def test_no_import_runs_up(name: str) -> None:
    up = {other for other in imports(name) if other != "harmodt" and floor(other) > floor(name)}
    assert not up


def test_no_import_runs_in_a_circle() -> None:
    left = {name: imports(name) - {"harmodt", "harmodt_kernels"} for name in MODULES}
    while left:
        free = {name for name, needed in left.items() if not needed & left.keys()}
        assert free, f"a circle is among {sorted(left)}"
        left = {name: needed for name, needed in left.items() if name not in free}


def test_the_kernels_do_without_the_rest() -> None:
    for name in MODULES:
        if name.startswith("harmodt_kernels"):
            assert all(module.startswith("harmodt_kernels") for module in imports(name)), name


def test_a_long_function_says_why() -> None:
    """More than 60 lines, or than 8 parameters, need a word on the arguments in the docstring.

    For the functions that Triton compiles, the docstring of launch.py has this word once.
    """
    of_triton = ast.get_docstring(ast.parse(MODULES["harmodt_kernels.launch"].read_text()))
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                parameters = [a for a in arguments if a.arg not in ("self", "cls", "ctx")]
                long = node.end_lineno - node.lineno >= 60 or len(parameters) > 8
                compiled = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
                text = of_triton if compiled else ast.get_docstring(node)
                reason = re.search("argument", text or "")
                assert not long or reason, f"{name}.{node.name}"


def test_the_table_of_contributing_is_true() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = text.partition("| question | file | name |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(rows) == 51
    for row in rows:
        _, file, name = (cell.strip().strip("`") for cell in row.strip("|").split("|"))
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8")), row


def calls(source: str) -> set[str]:
    """The names of everything that is called, without what stands before the last dot."""
    called = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {ast.unparse(function).rpartition(".")[2] for function in called}


def texts(source: str) -> str:
    """All texts of a module that are no docstrings."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [
        n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docstrings
    ]
    return "\n".join(node.value for node in constants if isinstance(node.value, str))


def modules_where(holds: Callable[[str], bool]) -> set[str]:
    """The modules of harmodt whose source fulfils a condition."""
    ours = {name: path for name, path in MODULES.items() if not name.startswith("harmodt_kernels")}
    return {name for name, path in ours.items() if holds(path.read_text())}


def test_there_is_one_base_learner_and_all_learners_are_its_own() -> None:
    from harmodt.algorithms import ALGORITHMS, Learner

    for row in ALGORITHMS.values():
        learner = getattr(row.learner, "func", row.learner)
        assert issubclass(learner, Learner)
        for shared in ("train_step", "_compute", "load", "weights"):
            assert getattr(learner, shared) is getattr(Learner, shared)


def test_gradients_take_one_route() -> None:
    assert modules_where(lambda source: "backward" in calls(source)) == {
        "harmodt.algorithms.learner",
        "harmodt.algorithms.sequence",  # calls that of masks.gradients
        "harmodt.masks.gradients",
    }
    assert modules_where(lambda source: "masked_adamw" in calls(source)) == {
        "harmodt.algorithms.optimiser"
    }


def test_one_file_starts_processes() -> None:
    starting = {"Popen", "Process", "Pool", "ProcessPoolExecutor", "fork", "execv", "prctl"}
    assert modules_where(lambda source: bool(starting & calls(source))) == {"harmodt.workers"}


def test_one_file_calls_our_files_damaged() -> None:
    of_others = {  # formats that other programs write
        *("harmodt.training.authors", "harmodt.data.importers.lerobot"),
        *("harmodt.data.importers.minari", "harmodt.data.importers.npz"),
    }
    assert modules_where(lambda s: "is damaged" in texts(s)) == {"harmodt.sealed", *of_others}


def test_one_gather_reads_stored_steps() -> None:
    from harmodt.algorithms.mtdiff import PlanSampler
    from harmodt.data.windows import WindowSampler

    assert modules_where(lambda source: "np.take" in source) == {"harmodt.data.trajectories"}
    assert PlanSampler.gather is WindowSampler.gather
