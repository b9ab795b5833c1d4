"""LeRobot's Meta-World data set, `lerobot/metaworld_mt50`: Parquet files with a row per step.

SOURCE is its folder. Both layouts are read: data/chunk-*/episode_*.parquet, an episode each (v2.0),
and data/chunk-*/file-*.parquet, several each (v3.0). Columns read: episode_index, task_id,
observation.environment_state (39), action (4), next.reward, and next.success where there is one;
images are left alone.

The data set has 49 sentences for 50 tasks, since push and push-back share one, so tasks are told
by `task_id`. Its numbers are those of TASK_NAME_TO_ID in LeRobot's environment of Meta-World: the
tasks in alphabetical order, but window-open before window-close. An audit of the data set
(LeRobot's issue 4409) found all 50 in it with 50 episodes each, push-back's at 37, push's at 38.

Its episodes end at the first success, after 82 steps on average.
"""

from __future__ import annotations

import json
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...environments.metaworld_names import ALL_TASKS
from ...errors import UserError, raise_refusal
from ...files import read_bytes
from ..store import UNKNOWN, Episode
from . import Importer
from .arrays import as_float32, one_per_step, solved

TASK_IDS: tuple[str, ...] = (
    *sorted(task for task in ALL_TASKS if not task.startswith("window-")),
    "window-open-v3",
    "window-close-v3",
)
"""The task of every `task_id`."""

_OBSERVATIONS = "observation.environment_state"
_ACTIONS = "action"
_REWARDS = "next.reward"
_SUCCESS = "next.success"

_LARGEST = 2**26  # numbers read of one file; the whole data set has 10 million


class LeRobotEpisode(NamedTuple):
    """An episode that is not read yet: `length` rows of a file from `start` on."""

    file: Path
    number: int
    start: int
    length: int

    def __str__(self) -> str:
        return f"{self.file}, episode {self.number}"


class LeRobotImporter(Importer):
    """Reads a file at a time, which is kept until another one is read."""

    _last: tuple[Path, dict[str, np.ndarray]] | None = None

    def tasks(self) -> tuple[str, ...]:
        """The tasks in the order of their numbers."""
        return tuple(task for task in TASK_IDS if task in self._index)

    def episodes(self, task: str) -> list[LeRobotEpisode]:
        """The episodes of a task in the order of their numbers."""
        if task not in self._index:
            raise UserError(
                f"{self.source} has no episode of {task}: leave the task out of --tasks"
            )
        return self._index[task]

    def read(self, episode: LeRobotEpisode) -> Episode:
        """Read one episode."""
        where, file = str(episode), episode.file
        if self._last is None or self._last[0] != file:
            self._last = None  # before the next one takes its memory
            needed = (_OBSERVATIONS, _ACTIONS, _REWARDS)
            self._last = (file, _read_columns(file, needed, (_SUCCESS,)))
        rows = {
            key: as_float32(where, key, column[episode.start : episode.start + episode.length])
            for key, column in self._last[1].items()
        }
        success = rows.get(_SUCCESS)
        return Episode(
            observations=rows[_OBSERVATIONS],
            actions=rows[_ACTIONS],
            rewards=one_per_step(rows[_REWARDS]),
            success=UNKNOWN
            if success is None
            else solved(where, one_per_step(success), episode.length),
        )

    @cached_property
    def _index(self) -> dict[str, list[LeRobotEpisode]]:
        """The episodes of every task that has some."""
        expected = _read_total(self.source / "meta" / "info.json")
        episodes: dict[int, tuple[str, LeRobotEpisode]] = {}
        for file in sorted(self.source.glob("data/chunk-*/*.parquet")):
            for task, episode in _find_episodes(file):
                if episode.number in episodes:
                    raise UserError(
                        f"{file} and {episodes[episode.number][1].file} both have rows of episode "
                        f"{episode.number}, or one has them apart: download {self.source} again"
                    )
                episodes[episode.number] = (task, episode)
        if len(episodes) != expected:
            raise UserError(
                f"{self.source} has {len(episodes)} episodes and its meta/info.json says "
                f"{expected}: download the data set again, or change total_episodes there if you "
                "want these alone"
            )
        index: dict[str, list[LeRobotEpisode]] = {}
        for _, (task, episode) in sorted(episodes.items()):
            index.setdefault(task, []).append(episode)
        return index


def _read_total(path: Path) -> int:
    """How many episodes the data set has, says its meta/info.json."""
    if not path.exists():
        raise UserError(
            f"{path} is missing: give as SOURCE the folder of a LeRobot data set, which has meta "
            "and data"
        )
    try:
        return int(json.loads(read_bytes(path))["total_episodes"])
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: download it again") from error


def _find_episodes(file: Path) -> list[tuple[str, LeRobotEpisode]]:
    """The episodes of a file, with their tasks."""
    columns = _read_columns(file, ("episode_index", "task_id"))
    for key, values in columns.items():
        columns[key] = one_per_step(values)
        if columns[key].dtype.kind not in "iu" or columns[key].ndim != 1:
            raise UserError(f"{file}: {key} is not a whole number per row: download it again")
    numbers, ids = columns["episode_index"], columns["task_id"]
    starts = np.flatnonzero(np.diff(numbers, prepend=~numbers[:1])).tolist()
    found = []
    for start, end in pairwise([*starts, len(numbers)]):
        episode = LeRobotEpisode(file, int(numbers[start]), start, end - start)
        which = np.unique(ids[start:end]).tolist()
        if len(which) != 1 or not 0 <= which[0] < len(TASK_IDS):
            raise UserError(
                f"{episode}: task_id is {' and '.join(map(str, which))} and one of 0 to "
                f"{len(TASK_IDS) - 1} is needed: is this lerobot/metaworld_mt50?"
            )
        found.append((TASK_IDS[which[0]], episode))
    return found


def _read_columns(
    file: Path, needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Columns of a file, [rows] or [rows, width]; those of `optional` where there are some."""
    try:
        from pyarrow import parquet  # an optional dependency
    except ImportError as error:
        raise UserError(
            "LeRobot's files need the package pyarrow: pip install 'harmodt[lerobot]'"
        ) from error
    if not file.is_file():
        raise UserError(f"{file} is no regular file, or is missing: download it again")
    try:
        with parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            for key in needed:
                if key not in names:
                    raise UserError(
                        f"{file} has no column {key} (it has {', '.join(names) or 'none'}): is "
                        "this lerobot/metaworld_mt50?"
                    )
            keys = [*needed, *(key for key in optional if key in names)]
            _check_size(file, opened.metadata, keys)
            table = opened.read(columns=keys, use_threads=False)
            return {key: _to_numpy(file, key, table[key].combine_chunks()) for key in keys}
    except UserError:
        raise
    except Exception as error:  # damage shows as dozens of kinds
        raise_refusal(error, file)
        raise UserError(
            f"{file} is truncated or no Parquet file: download it again (after a git clone, with "
            "git lfs pull)"
        ) from error


def _check_size(file: Path, metadata: Any, keys: list[str]) -> None:
    """Raise UserError where the columns would take more memory than an honest file's."""
    numbers = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            path = column.path_in_schema
            if any(path == key or path.startswith(f"{key}.") for key in keys):
                numbers += column.num_values
    if numbers > _LARGEST:
        raise UserError(
            f"{file} has {numbers:,} numbers to read, more than a file of the data set has: "
            "download it again"
        )


def _to_numpy(file: Path, key: str, column: Any) -> np.ndarray:
    """An Arrow array of numbers, or of lists that are of one length; nulls become NaN."""
    from pyarrow import compute, types

    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    if not any(is_list(column.type) for is_list in lists):
        return column.to_numpy(zero_copy_only=False)
    widths = compute.unique(compute.list_value_length(column)).to_pylist()
    if len(widths) != 1 or not widths[0]:
        raise UserError(f"{file}: {key} has lists of several lengths, or empty: download it again")
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, widths[0])
