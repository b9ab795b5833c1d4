from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

# Workers of pytest-xdist, and commands that tests start, have a thread for every processor each, so
# that kernels are tried in parallel: idle ones are not to spin. Read when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch
from torch import Tensor

# Without a GPU, Triton's interpreter runs the kernels; this is read when Triton or a kernel is
# imported, so Triton is imported before a test takes it out of the environment.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ModuleNotFoundError):
        import interpreter

        interpreter.replace_once()

from harmodt_kernels import PYTORCH, REFERENCE, Backend, fused_backend  # noqa: E402
from harmodt_kernels.native import library  # noqa: E402

with contextlib.suppress(ModuleNotFoundError):
    # Other kernels call functions of this one: all are to be read in one way.
    import harmodt_kernels.masked_linear.triton  # noqa: F401

# Minari needs a later Python.
collect_ignore = ["test_import_minari.py"] if sys.version_info < (3, 11) else []

# OpenMP's threads begin as the thread that starts them computes: here, before a command that a
# test runs has denormals flushed to zero, for good in threads that begin then.
torch.ones(1 << 22).sum()

# A busy machine may take any time for an example.
hypothesis.settings.register_profile("any machine", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("any machine")

# A runner in the background may ignore these, and programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

IN_PYTORCH = {"reference": REFERENCE, "pytorch": PYTORCH}
IMPLEMENTATIONS = [*IN_PYTORCH, "triton", "cpu"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults", default="quick", choices=("quick", "full"), help="how many test_faults.py tries"
    )
    parser.addoption("--full", action="store_true", help="also the cases that are marked as full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases of large grids that are marked as full, unless they are asked for.

    Begin with the compilation for all targets. It takes longest, so it must not be the last to end.
    """
    items.sort(key=lambda item: item.path.name != "test_kernels_targets.py")
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out and not config.getoption("--full"):
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_configure() -> None:
    if "interpreter" in globals():
        interpreter.refuse_numpy()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every implementation in turn for a `backend`, the fused ones for a `device` alone.

    A module whose operations have other implementations names them as IMPLEMENTATIONS.
    """
    marks = metafunc.definition.iter_markers("parametrize")
    chosen = any("implementation" in mark.args[0] for mark in marks)
    if "implementation" in metafunc.fixturenames and not chosen:
        names = getattr(metafunc.module, "IMPLEMENTATIONS", IMPLEMENTATIONS)
        if "backend" not in metafunc.fixturenames:
            names = [name for name in names if name not in IN_PYTORCH]
        metafunc.parametrize("implementation", names, indirect=True)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> str:
    """The name of an implementation, and the environment that chooses it."""
    if request.param == "cpu":
        if not library.PATH.exists() and shutil.which("g++") is None:
            pytest.skip("the CPU kernels were not built, and there is no compiler")
        request.getfixturevalue("native")
    return request.param


@pytest.fixture
def device(implementation: str) -> torch.device:
    """Where an implementation runs; without a GPU, Triton's kernels are interpreted on the CPU."""
    return torch.device("cpu" if implementation == "cpu" else DEVICE)


@pytest.fixture
def backend(implementation: str, device: torch.device) -> Backend:
    return IN_PYTORCH.get(implementation) or fused_backend(device)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU kernels for tensors on a CPU, in place of Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(params=["amx", "avx512bf16", "avx512", "avx2", "portable"])
def cpu(request: pytest.FixtureRequest, native: None) -> Iterator[Backend]:
    """The CPU kernels held to an instruction set."""
    best = fused_backend("cpu").name.removeprefix("cpu-")
    if not library.library().harmodt_use_isa(request.param.encode()):
        pytest.skip(f"this machine has no {request.param}")
    backend = fused_backend("cpu")
    assert backend.name == f"cpu-{request.param}"
    yield backend
    library.library().harmodt_use_isa(best.encode())


@pytest.fixture
def stationary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs go through several tiles of rows, as of many tasks, also where there are few."""
    kernels = pytest.importorskip("harmodt_kernels.masked_linear.triton")
    plan, plans = kernels.product_plan, []

    def remembered(*operands: Any) -> Any:
        plans.append(plan(*operands))
        return plans[-1]

    monkeypatch.setattr(kernels, "ENOUGH", 3)  # more than one program for the rows of a group
    monkeypatch.setattr(kernels, "product_plan", remembered)
    yield
    several = [plan for plan in plans if plan.stationary]
    assert several and all(plan.tiles_of_program > 1 for plan in several)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that PyTorch hands out holds NaN."""

    def poisoned(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poison(*args: object, **options: object) -> Tensor:
            values = create(*args, **options)
            return values.fill_(torch.nan) if values.is_floating_point() else values

        return poison

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _denormals_as_usual() -> Iterator[None]:
    """Undo what a command run inside a test sets for the whole process."""
    yield
    torch.set_flush_denormal(False)
    torch.backends.mkldnn.matmul.fp32_precision = "none"
