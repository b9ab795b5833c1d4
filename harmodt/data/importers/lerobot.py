"""Reads LeRobot's Meta-World data set, `lerobot/metaworld_mt50`: Parquet files, one row per step.

SOURCE is the folder of the data set. Two layouts can be read: data/chunk-*/episode_*.parquet with
one episode per file (v2.0), and data/chunk-*/file-*.parquet with several episodes per file (v3.0).
The importer reads the columns episode_index, task_id, observation.environment_state (39), action
(4) and next.reward. If they exist, it also reads next.success, the flags of an episode's end such
as next.done, and the columns that count rows: frame_index, index and timestamp. It does not read
images.

The data set has 49 sentences for 50 tasks, because push and push-back share a sentence. The column
`task_id` therefore identifies the task. Its numbers come from TASK_NAME_TO_ID in LeRobot's
Meta-World environment: the tasks are in alphabetical order, except that window-open comes before
window-close. An audit of the data set (LeRobot's issue 4409) found all 50 tasks with 50 episodes
each; push-back has the number 37 and push has 38.

The episodes end at the first success, after 82 steps on average. Therefore next.done does not mean
that the task terminated there.
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
"""The task names; the index is the `task_id`."""

_OBSERVATIONS = "observation.environment_state"
_ACTIONS = "action"
_REWARDS = "next.reward"
_SUCCESS = "next.success"
_FRAME, _ROW, _TIME = "frame_index", "index", "timestamp"

_LARGEST = 2**26  # most numbers to read from one file; the whole data set has 10 million


class LeRobotEpisode(NamedTuple):
    """An unread episode: `length` rows of a file from row `start` on."""

    file: Path
    number: int
    start: int
    length: int

    def __str__(self) -> str:
        return f"{self.file}, episode {self.number}"


class LeRobotImporter(Importer):
    """Reads one file at a time, and keeps it in memory until it reads another file."""

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
            self._last = None  # frees the memory before the next file is read
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
        """All downloaded files, because each of them may hold episodes of the task."""
        return [*self._data_files, *self.source.glob("meta/**/*.*")]

    @cached_property
    def _data_files(self) -> list[Path]:
        return sorted(self.source.glob("data/chunk-*/*.parquet"))

    @cached_property
    def _info(self) -> dict[str, Any]:
        return _read_info(self.source / "meta" / "info.json")

    @cached_property
    def _index(self) -> dict[str, list[LeRobotEpisode]]:
        """The episodes of every task that occurs, by task."""
        expected = self._info["total_episodes"]
        episodes: dict[int, tuple[str, LeRobotEpisode]] = {}
        for file in self._data_files:
            for task, episode in _find_episodes(file):
                if episode.number in episodes:
                    raise UserError(
                        f"{file} has further rows of episode {episode.number}, whose rows had "
                        f"already ended in {episodes[episode.number][1].file}: download "
                        f"{self.source} again"
                    )
                episodes[episode.number] = (task, episode)
        if len(episodes) != expected:
            raise UserError(
                f"{self.source} has {len(episodes)} episodes, but its meta/info.json says "
                f"{expected}: download the data set again, or change total_episodes there if you "
                "want only these episodes"
            )
        self._check_lengths({number: found.length for number, (_, found) in episodes.items()})
        index: dict[str, list[LeRobotEpisode]] = {}
        for _, (task, episode) in sorted(episodes.items()):
            index.setdefault(task, []).append(episode)
        return index

    def _check_lengths(self, lengths: dict[int, int]) -> None:
        """Raise UserError if the data files have another number of rows than `meta` says.

        Args:
            lengths: the number of rows of each episode, by the episode's number.
        """
        meta = self.source / "meta"
        for number, declared in _read_lengths(meta).items():
            if lengths.get(number, declared) != declared:
                raise UserError(
                    f"{self.source}: episode {number} has {lengths[number]} rows, but {meta} says "
                    f"{declared}: download the data set again"
                )
        rows = sum(lengths.values())
        if self._info.get("total_frames", rows) != rows:
            raise UserError(
                f"{self.source} has {rows} rows, but its meta/info.json says "
                f"{self._info['total_frames']}: download the data set again, or change "
                "total_frames there if you want only these rows"
            )


def _read_info(path: Path) -> dict[str, Any]:
    """Read `total_episodes` from meta/info.json, and `total_frames` and `fps` if they exist."""
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
    """Read the number of rows of each episode from episodes.jsonl (v2) or Parquet files (v3)."""
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
    """Raise UserError if a column shows that rows of an episode are missing or in a wrong order."""
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
                f"{where}: {key} is {found[row]:{digits}} in row {row} of the episode, but it "
                f"should be {due[row]:{digits}}, so rows are missing or in a wrong order: download "
                "the file again"
            )


def _find_episodes(file: Path) -> list[tuple[str, LeRobotEpisode]]:
    """The episodes of a file, each with its task."""
    numbers, ids = _read_whole_numbers(file, "episode_index", "task_id")
    # The prepended number differs from the first one, so row 0 is a start too.
    starts = np.flatnonzero(np.diff(numbers, prepend=~numbers[:1])).tolist()
    found = []
    for start, end in pairwise([*starts, len(numbers)]):
        episode = LeRobotEpisode(file, int(numbers[start]), start, end - start)
        which = np.unique(ids[start:end]).tolist()
        if len(which) != 1 or not 0 <= which[0] < len(TASK_IDS):
            raise UserError(
                f"{episode}: task_id is {' and '.join(map(str, which))}, but one number from 0 to "
                f"{len(TASK_IDS) - 1} is needed: is this lerobot/metaworld_mt50?"
            )
        found.append((TASK_IDS[which[0]], episode))
    return found


def _read_whole_numbers(file: Path, *keys: str) -> list[np.ndarray]:
    """Read columns of a file that hold one whole number per row, int [rows]."""
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
    """Read columns of a file, [rows] or [rows, width]; the columns in `optional` may be missing."""
    try:
        from pyarrow import parquet  # an optional dependency
    except ImportError as error:
        raise UserError(
            "LeRobot's files need the package pyarrow: pip install 'harmodt[lerobot]'"
        ) from error
    if not file.is_file():
        raise UserError(f"{file} is missing, or is not a regular file: download it again")
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
    except Exception as error:  # damage leads to dozens of kinds of errors
        raise_refusal(error, file)
        raise UserError(
            f"{file} is truncated or not a Parquet file: download it again (after a git clone, "
            "with git lfs pull)"
        ) from error


def _check_size(file: Path, metadata: Any, keys: list[str]) -> None:
    """Raise UserError if the columns would take far more memory than in a genuine file."""
    numbers = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            path = column.path_in_schema
            if any(path == key or path.startswith(f"{key}.") for key in keys):
                numbers += column.num_values
    if numbers > _LARGEST:
        raise UserError(
            f"{file} would give {numbers:,} numbers, but a file of the data set has at most "
            f"{_LARGEST:,}: download it again"
        )


def _to_numpy(file: Path, key: str, column: Any) -> np.ndarray:
    """Convert an Arrow array of numbers, or of lists of equal length; nulls become NaN."""
    from pyarrow import compute, types

    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    if not any(is_list(column.type) for is_list in lists):
        return column.to_numpy(zero_copy_only=False)
    widths = compute.unique(compute.list_value_length(column)).to_pylist()
    if len(widths) != 1 or not widths[0]:
        raise UserError(
            f"{file}: the lists in {key} are empty or differ in length: download it again"
        )
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, widths[0])
