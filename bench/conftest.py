"""Synthetic data for the benchmarks, and what every result records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from measuring import ON_GPU, tiny

from harmodt.data.store import DataStore
from harmodt.devices import prepare_cpu
from harmodt.environments import METAWORLD, family


@pytest.fixture(scope="session", autouse=True)
def _as_in_training() -> None:
    prepare_cpu()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    """Five tasks of 20 episodes of random numbers."""
    return random_store(tmp_path_factory.mktemp("bench") / "store", episodes=20)


def random_store(path: Path, episodes: int) -> DataStore:
    """A store of MT5 whose episodes hold random numbers."""
    metaworld = family(METAWORLD)
    length = metaworld.spec.episode_length
    return tiny.make_store(path, metaworld.task_sets["mt5"], [length] * episodes, [length])


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list, output_json: dict
) -> None:
    """Store what a figure depends on beside it."""
    output_json["torch"] = {
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
