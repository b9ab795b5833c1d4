"""Parquet files as LeRobot's Meta-World data set has them, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

Columns = dict[str, pa.Array]

PUSH_BACK, PUSH, WINDOW_OPEN = 37, 38, 48
FPS = 80


def make_columns(number: int, task_id: int, length: int | None = None) -> Columns:
    """An episode, longer with its number, as its return is; solved at its end if that is even."""
    length = length or 25 + number
    rng = np.random.default_rng(number)
    vectors = {
        "observation.environment_state": rng.normal(size=(length, 39)).astype(np.float32),
        "action": rng.normal(size=(length, 4)).astype(np.float32),
    }
    solved = np.arange(length) == (length - 1 if number % 2 == 0 else -1)
    return {
        "observation.image": pa.array([b"png"] * length),
        **{key: pa.array(list(values), pa.list_(pa.float32())) for key, values in vectors.items()},
        "next.reward": pa.array(np.full(length, number + 1, np.float32)),
        "next.success": pa.array(solved),
        "next.done": pa.array(np.arange(length) == length - 1),
        "frame_index": pa.array(np.arange(length)),
        "index": pa.array(1000 * number + np.arange(length)),
        "timestamp": pa.array((np.arange(length) / FPS).astype(np.float32)),
        "task_id": pa.array(np.full(length, task_id, np.int16)),
        "episode_index": pa.array(np.full(length, number)),
        "task_index": pa.array(np.full(length, 40)),  # one sentence for several tasks
    }


# Tasks by turns, not one after the other.
IDS = [PUSH, PUSH_BACK, WINDOW_OPEN] * 3


def write_source(root: Path, ids: list[int] = IDS, chunk: int = 4) -> Path:
    """The layout v2.0: a file per episode."""
    for number, task_id in enumerate(ids):
        file = root / "data" / f"chunk-{number // chunk:03d}" / f"episode_{number:06d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table(make_columns(number, task_id)), file)
    lengths = [25 + number for number in range(len(ids))]
    write_total(root, len(ids), total_frames=sum(lengths))
    entries = [{"episode_index": n, "tasks": ["?"], "length": le} for n, le in enumerate(lengths)]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return root


def write_total(root: Path, episodes: object, **more: object) -> None:
    (root / "meta").mkdir(parents=True, exist_ok=True)
    info = {"codebase_version": "v2.0", "fps": FPS, "total_episodes": episodes, **more}
    (root / "meta" / "info.json").write_text(json.dumps(info))
