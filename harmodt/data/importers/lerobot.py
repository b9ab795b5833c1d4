"""LeRobot's Meta-World data set, `lerobot/metaworld_mt50`: Parquet files with a row per step.

SOURCE is its folder. Both layouts are read: data/chunk-*/episode_*.parquet, an episode each (v2.0),
and data/chunk-*/file-*.parquet, several each (v3.0). Columns read: episode_index, task_id,
observation.environment_state (39), action (4), next.reward, and where there are any next.success,
next.done and those that count rows: frame_index, index and timestamp. Images are left alone.

The data set has 49 sentences for 50 tasks, since push and push-back share one, so tasks are told
by `task_id`. Its numbers are those of TASK_NAME_TO_ID in LeRobot's environment of Meta-World: the
tasks in alphabetical order, but window-open before window-close. An audit of the data set
(LeRobot's issue 4409) found all 50 in it with 50 episodes each, push-back's at 37, push's at 38.

Its episodes end at the first success, after 82 steps on average: next.done does not say that the
task came to its end there.
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
from .arrays import ENDS, as_float32, ending, flags_of, one_per_step, solved

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
_FRAME, _ROW, _TIME = "frame_index", "index", "timestamp"

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
            self._last = (file, _read_columns(file, needed, (_SUCCESS, _FRAME, _ROW, _TIME, *ENDS)))
        steps = slice(episode.start, episode.start + episode.length)
        columns = {key: column[steps] for key, column in self._last[1].items()}
        _check_order(where, columns, self._info.get("fps"))
        rows = {key: as_float32(where, key, column) for key, column in columns.items()}
        success = rows.get(_SUCCESS)
        return Episode(
            observations=rows[_OBSERVATIONS],
            actions=rows[_ACTIONS],
            rewards=one_per_step(rows[_REWARDS]),
            success=UNKNOWN
            if success is None
            else solved(where, one_per_step(success), episode.length),
            terminated=ending(where, flags_of(rows.keys(), rows.__getitem__), rows[_OBSERVATIONS]),
        )

    def files(self, task: str) -> list[Path]:
        """All files that were downloaded: any of them may hold episodes of the task."""
        return [*self._data_files, *self.source.glob("meta/**/*.*")]

    @cached_property
    def _data_files(self) -> list[Path]:
        return sorted(self.source.glob("data/chunk-*/*.parquet"))

    @cached_property
    def _info(self) -> dict[str, Any]:
        return _read_info(self.source / "meta" / "info.json")

    @cached_property
    def _index(self) -> dict[str, list[LeRobotEpisode]]:
        """The episodes of every task that has some."""
        expected = self._info["total_episodes"]
        episodes: dict[int, tuple[str, LeRobotEpisode]] = {}
        for file in self._data_files:
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
        self._check_lengths({number: found.length for number, (_, found) in episodes.items()})
        index: dict[str, list[LeRobotEpisode]] = {}
        for _, (task, episode) in sorted(episodes.items()):
            index.setdefault(task, []).append(episode)
        return index

    def _check_lengths(self, lengths: dict[int, int]) -> None:
        """Raise UserError where the rows of an episode, or all, are not as many as is declared."""
        meta = self.source / "meta"
        for number, declared in _read_lengths(meta).items():
            if lengths.get(number, declared) != declared:
                raise UserError(
                    f"{self.source}: episode {number} has {lengths[number]} rows and {meta} says "
                    f"{declared}: download the data set again"
                )
        rows = sum(lengths.values())
        if self._info.get("total_frames", rows) != rows:
            raise UserError(
                f"{self.source} has {rows} rows and its meta/info.json says "
                f"{self._info['total_frames']}: download the data set again, or change "
                "total_frames there if you want these alone"
            )


def _read_info(path: Path) -> dict[str, Any]:
    """What meta/info.json says: `total_episodes`, and `total_frames` and `fps` where they are."""
    if not path.exists():
        raise UserError(
            f"{path} is missing: give as SOURCE the folder of a LeRobot data set, which has meta "
            "and data"
        )
    try:
        content = json.loads(read_bytes(path))
        info: dict[str, Any] = {"total_episodes": int(content["total_episodes"])}
        if "total_frames" in content:
            info["total_frames"] = int(content["total_frames"])
        if "fps" in content:
            info["fps"] = float(content["fps"])
    except (ValueError, ArithmeticError, RecursionError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged: download it again") from error
    return info


def _read_lengths(meta: Path) -> dict[int, int]:
    """How many rows each episode has, says `meta`: episodes.jsonl (v2) or Parquet files (v3)."""
    lengths: dict[int, int] = {}
    if (file := meta / "episodes.jsonl").exists():
        try:
            for line in read_bytes(file).splitlines():
                entry = json.loads(line)
                lengths[int(entry["episode_index"])] = int(entry["length"])
        except (ValueError, ArithmeticError, RecursionError, LookupError, TypeError) as error:
            raise UserError(f"{file} is damaged: download it again") from error
    for file in sorted(meta.glob("episodes/chunk-*/*.parquet")):
        numbers, counts = _read_whole_numbers(file, "episode_index", "length")
        lengths |= dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    return lengths


def _check_order(where: str, columns: dict[str, np.ndarray], fps: float | None) -> None:
    """Raise UserError where a column that counts an episode's rows shows a gap or another order."""
    rows = np.arange(len(columns[_REWARDS]))
    for key in (_FRAME, _ROW, _TIME):
        if key not in columns or (key == _TIME and not fps):
            continue
        found = one_per_step(columns[key])
        if found.dtype.kind not in "iuf" or found.ndim != 1:
            raise UserError(f"{where}: {key} is not a number per row: download the file again")
        period = 1 / fps if key == _TIME and fps else 1
        due = rows * period + (found[0] if key == _ROW else 0)
        wrong = np.flatnonzero(~(np.abs(found - due) < period / 2))
        if len(wrong):
            row, digits = wrong[0], ".6g" if found.dtype.kind == "f" else ""
            raise UserError(
                f"{where}: {key} is {found[row]:{digits}} in its row {row}, where "
                f"{due[row]:{digits}} is due: rows are missing or in another order, so download "
                "the file again"
            )


def _find_episodes(file: Path) -> list[tuple[str, LeRobotEpisode]]:
    """The episodes of a file, with their tasks."""
    numbers, ids = _read_whole_numbers(file, "episode_index", "task_id")
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


def _read_whole_numbers(file: Path, *keys: str) -> list[np.ndarray]:
    """Columns of a file that have a whole number per row, int [rows]."""
    columns = []
    for key, values in _read_columns(file, keys).items():
        column = one_per_step(values)
        if column.dtype.kind not in "iu" or column.ndim != 1:
            raise UserError(f"{file}: {key} is not a whole number per row: download it again")
        columns.append(column)
    return columns


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
