"""Data sets as Minari itself writes them, for tests."""

from __future__ import annotations

from pathlib import Path

import minari
import numpy as np
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage


def make_buffer(seed: int, length: int = 25, **changes: object) -> EpisodeBuffer:
    """An episode as Minari's collector records it; its return grows with the seed."""
    generator = np.random.default_rng(seed)
    values = {
        "observations": generator.normal(size=(length + 1, 39)),
        "actions": generator.normal(size=(length, 4)).astype(np.float32),
        "rewards": np.full(length, seed + 1.0),
        "terminations": np.zeros(length, bool),
        "truncations": np.arange(length) == length - 1,
        "infos": {"success": [0.0] * 8 + [float(seed % 2)] + [0.0] * (length - 8)},
    }
    return EpisodeBuffer(**values | changes)


def write_dataset(
    root: Path,
    name: str = "reach-v0",
    buffers: list[EpisodeBuffer] | None = None,
    storage: str = "hdf5",
    observations: spaces.Space = spaces.Box(-np.inf, np.inf, (39,), np.float64),  # noqa: B008
    actions: spaces.Space = spaces.Box(-1, 1, (4,), np.float32),  # noqa: B008
) -> Path:
    """A data set by Minari's own means; returns its folder."""
    path = root / name
    path.mkdir(parents=True)
    dataset = MinariStorage.new(path / "data", observations, actions, data_format=storage)
    dataset.update_metadata({"dataset_id": name, "minari_version": minari.__version__})
    dataset.update_episodes([make_buffer(i) for i in range(6)] if buffers is None else buffers)
    return path
