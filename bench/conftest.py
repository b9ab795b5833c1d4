"""Synthetic data for the benchmarks, and the circumstances that every result records."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from datetime import datetime, timezone
from typing import Any

import pytest
import report
import torch
from measuring import ON_GPU, random_store

from harmodt.data.store import DataStore
from harmodt.devices import prepare_cpu

DEADLINE = pytest.StashKey[float]()


@pytest.fixture(scope="session", autouse=True)
def _as_in_training() -> None:
    prepare_cpu()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    """Five tasks of 20 episodes of random numbers."""
    return random_store(tmp_path_factory.mktemp("bench") / "store", episodes=20)


@pytest.fixture(scope="session")
def store_mt50(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    """Fifty tasks of 5 episodes of random numbers."""
    return random_store(tmp_path_factory.mktemp("bench") / "mt50", episodes=5, tasks="mt50")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--most-seconds",
        type=float,
        default=math.inf,
        help="skip all benchmarks that have not started after this many seconds",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[DEADLINE] = time.monotonic() + config.getoption("--most-seconds")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() > item.config.stash[DEADLINE]:
        pytest.skip("--most-seconds have passed")


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the outermost hook, so that the tables come last
def pytest_terminal_summary(
    terminalreporter: Any, config: pytest.Config
) -> Generator[None, None, None]:
    """Print a table per question. pytest-benchmark's own tables are for comparing runs."""
    session = config._benchmarksession  # type: ignore[attr-defined]
    compares = session.compare or session.verbose
    session.quiet = session.quiet or not compares
    yield
    measured = [b.as_dict(include_data=False) for b in session.benchmarks if not b.has_error]
    if measured and not compares:
        results = {
            "benchmarks": measured,
            "machine_info": session.get_machine_info(),
            "commit_info": config.hook.pytest_benchmark_generate_commit_info(config=config),
            "datetime": datetime.now(timezone.utc).isoformat(),
            "torch": circumstances(),
        }
        terminalreporter.write_sep("=", "benchmarks")
        width = min(max(terminalreporter._tw.fullwidth, 60), 100)
        terminalreporter.write_line(report.text_tables(results, width).rstrip())


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list, output_json: dict
) -> None:
    """Store the circumstances with the results."""
    output_json["torch"] = circumstances()


def circumstances() -> dict[str, Any]:
    """The versions, the number of threads and the device of the benchmarks."""
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if ON_GPU else "CPU",
        "triton": _triton_version(),
    }


def _triton_version() -> str | None:
    try:
        import triton
    except ModuleNotFoundError:
        return None
    return triton.__version__
