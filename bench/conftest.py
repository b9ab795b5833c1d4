"""Synthetic data for the benchmarks, and what every result records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from measuring import ON_GPU

from harmodt.data.store import DataStore, Episode, StoreWriter
from harmodt.devices import prepare_cpu
from harmodt.environments.metaworld_names import EPISODE_LENGTH, TASK_SETS


@pytest.fixture(scope="session", autouse=True)
def _as_in_training() -> None:
    prepare_cpu()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    """Five tasks of 20 episodes of random numbers."""
    return random_store(tmp_path_factory.mktemp("bench") / "store", episodes=20)


def random_store(path: Path, episodes: int) -> DataStore:
    """A store of MT5 whose episodes hold random numbers."""
    rng = np.random.default_rng(0)
    writer = StoreWriter(path, {"source": "random"})
    for name in TASK_SETS["mt5"]:
        episode = Episode(
            observations=rng.normal(size=(EPISODE_LENGTH, 39)).astype(np.float32),
            actions=rng.uniform(-1, 1, size=(EPISODE_LENGTH, 4)).astype(np.float32),
            rewards=rng.uniform(0, 10, size=EPISODE_LENGTH).astype(np.float32),
            success=1,
        )
        with writer.task(name) as task:
            for _ in range(episodes):
                task.add(episode)
            task.add_prompt(episode)
    return writer.finish(TASK_SETS["mt5"])


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
