"""Reads Prompt-DT's public pickles of Cheetah-dir, Cheetah-vel and Ant-dir.

    data/<env>/<env>-<i>-<quality>.pkl         the episodes of task i: a list of dicts
    data/<env>/<env>-<i>-prompt-<quality>.pkl  its prompts
    config/<env>/config_<env>_task<i>.pkl      its goal: a list of one dict

`env` is cheetah_dir, cheetah_vel or ant_dir; the quality is a word such as expert. The importer
reads an episode's keys observations (T, observation_size), actions (T, action_size) and rewards
(T,) or (T, 1), and if they exist, terminals and other flags of an episode's end. In the dict
of a goal, it reads the key direction (1 or -1), velocity (m/s) or goal (radians). The file of
prompts may be missing. The file of the goal may be missing for cheetahs, because their goals are
known.

The importer reads each pickle whole, but only one at a time. The largest file therefore determines
the memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...environments import EnvironmentFamily, family_of
from ...environments.locomotion import Locomotion
from ...errors import UserError
from ..store import UNKNOWN, Episode
from . import Importer
from .arrays import ending, flags_of, one_per_step
from .pickles import Array, read_pickle

_FILE = re.compile(r"(cheetah_dir|cheetah_vel|ant_dir)-([0-9]{1,4})-(prompt-)?[\w-]+\.pkl")

_KEYS = ("observations", "actions", "rewards")

_GOAL = {"cheetah-dir": "direction", "cheetah-vel": "velocity", "ant-dir": "goal"}
"""The key of the goal in a configuration, by family."""


class Place(NamedTuple):
    """An unread episode: its file, and its index in the file's list."""

    file: Path
    number: int

    def __str__(self) -> str:
        return f"{self.file}, episode {self.number}"


class _Files(NamedTuple):
    """The files of a task; `prompts` is None if there is no file of prompts."""

    episodes: Path
    prompts: Path | None


class PromptDTImporter(Importer):
    """Reads one or two files per task.

    The source is the folder of an environment, or one of the two folders above it.
    """

    family: Locomotion

    def __init__(self, source: Path, family: EnvironmentFamily, datasets: Mapping[str, str]):
        if not isinstance(family, Locomotion):
            raise UserError(
                f"the format prompt-dt has no data of {family.spec.family}: choose one of "
                f"{', '.join(_GOAL)} with --family"
            )
        super().__init__(source, family, datasets)
        self._environment = family.spec.family.replace("-", "_")
        self._folder = _folders(source).get(self._environment, source)
        self._files = self._find_files()
        self._last: tuple[Path, list[Any]] | None = None

    @classmethod
    def default_family(cls, source: Path, tasks: Sequence[str]) -> str:
        """The family of the named tasks, or else the family whose files the source holds."""
        if named := [task for task in tasks if not task.isdecimal()]:
            return family_of(named).spec.family
        found = [environment.replace("_", "-") for environment in _folders(source)]
        if len(found) != 1:
            raise UserError(
                f"{source} has files of {' and of '.join(found)}: choose one with --family"
                if found
                else f"{source} has no file such as cheetah_vel/cheetah_vel-0-expert.pkl: give the "
                "folder data of Prompt-DT"
            )
        return found[0]

    def resolve_tasks(self, names: Sequence[str]) -> tuple[str, ...]:
        """Turn the user's names into task names; a number means the number in a file's name."""
        tasks: list[str] = []
        for name in names:
            if not name.isdecimal():
                tasks.extend(self.family.resolve_tasks([name]))
                continue
            if int(name) not in self._files:
                raise UserError(f"{self._folder} has no task {name}: {self._what_there_is()}")
            tasks.append(self._task_of(int(name)))
        return tuple(dict.fromkeys(tasks))

    def tasks(self) -> tuple[str, ...]:
        """All tasks, in the order of their numbers."""
        return tuple(self._numbers)

    def episodes(self, task: str) -> list[Place]:
        """The episodes in the task's file, in the order of the file."""
        return self._places(self._files_of(task).episodes)

    def prompts(self, task: str) -> list[Place]:
        """The episodes in the task's file of prompts; empty if there is no such file."""
        file = self._files_of(task).prompts
        return [] if file is None else self._places(file)

    def files(self, task: str) -> list[Path]:
        """The file of the task's episodes and, if there is one, the file of its prompts."""
        return [file for file in self._files_of(task) if file is not None]

    def read(self, episode: Place) -> Episode:
        """Read one episode."""
        content = self._read(episode.file)[episode.number]
        observations, actions, rewards = (_read_array(episode, content, key) for key in _KEYS)
        flags = flags_of(content.keys(), lambda key: _read_array(episode, content, key))
        terminated = ending(str(episode), flags, observations)
        return Episode(observations, actions, one_per_step(rewards), UNKNOWN, terminated)

    def _find_files(self) -> dict[int, _Files]:
        """The files of every task, by the task's number."""
        found: dict[int, dict[bool, Path]] = {}
        for path in sorted(self._folder.glob(f"{self._environment}-*.pkl")):
            if (name := _FILE.fullmatch(path.name)) is None:
                continue
            task_files = found.setdefault(int(name[2]), {})  # by whether they hold prompts
            other = task_files.setdefault(bool(name[3]), path)
            if other != path:
                raise UserError(
                    f"{self._folder} has both {other.name} and {path.name}: move one of them away"
                )
        if not found:
            raise UserError(
                f"{self.source} has no file such as {self._environment}-0-expert.pkl: give the "
                "folder data of Prompt-DT"
            )
        for number, task_files in found.items():
            if False not in task_files:
                raise UserError(
                    f"{task_files[True]} has prompts of task {number}, but there is no file of its "
                    f"episodes: add {self._environment}-{number}-expert.pkl"
                )
        return {
            number: _Files(found[number][False], found[number].get(True))
            for number in sorted(found)
        }

    def _files_of(self, task: str) -> _Files:
        if task not in self._numbers:
            raise UserError(
                f"{self._folder} has no file for {task}: {self._what_there_is()} (the first is "
                f"{next(iter(self._numbers))}); --tasks also takes these numbers"
            )
        return self._files[self._numbers[task]]

    def _what_there_is(self) -> str:
        return f"it has files of the tasks {', '.join(map(str, self._files))}"

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """The number of every task, by the task's name."""
        numbers: dict[str, int] = {}
        for number in self._files:
            other = numbers.setdefault(self._task_of(number), number)
            if other != number:
                raise UserError(
                    f"{self._folder}: the tasks {other} and {number} have the same goal: move the "
                    "files of one of them away"
                )
        return numbers

    def _task_of(self, number: int) -> str:
        """The name of a task, which follows from its goal."""
        file = f"config_{self._environment}_task{number}.pkl"
        folders = [self._folder, *self._folder.absolute().parents[:2]]
        places = [f / below for f in folders for below in ("", f"config/{self._environment}")]
        for place in places:
            if os.path.lexists(place / file):  # also finds a broken link, so that reading fails
                return self._named_by_goal(place / file)
        if self.family.spec.family == "ant-dir" or number >= len(self.family.task_goals):
            raise UserError(
                f"the goal of task {number} in {self._folder} is not known: copy {file} from "
                f"Prompt-DT's folder config/{self._environment} into {self._folder}"
            )
        return self.family.task_of(self.family.task_goals[number])

    def _named_by_goal(self, file: Path) -> str:
        content, key = read_pickle(file), _GOAL[self.family.spec.family]
        if isinstance(content, list) and len(content) == 1:
            content = content[0]
        try:
            if not isinstance(content[key], int | float):
                raise TypeError(type(content[key]))
            task = self.family.task_of(float(content[key]))
            self.family.goal_of(task)
        except (LookupError, TypeError, ValueError, OverflowError, UserError):
            raise UserError(
                f"{file} holds no goal: it must be a list of one dict, whose key {key!r} has a "
                "number that is a goal of the family; download it again"
            ) from None
        return task

    def _places(self, file: Path) -> list[Place]:
        return [Place(file, number) for number in range(len(self._read(file)))]

    def _read(self, file: Path) -> list[Any]:
        """Read the episodes of a file; the last file stays in memory."""
        if self._last is None or self._last[0] != file:
            self._last = None  # frees the memory before the next file is read
            content = read_pickle(file)
            if not isinstance(content, list) or not content:
                raise UserError(
                    f"{file} holds no list of episodes, or an empty list: download it again"
                )
            if sum(map(_size, content)) > file.stat().st_size:
                raise UserError(
                    f"{file} refers to the same array several times, so the store would become "
                    "larger than the file: download it again"
                )
            self._last = file, content
        return self._last[1]


def _folders(source: Path) -> dict[str, Path]:
    """The folder of every environment that has files in the source, by environment."""
    found: dict[str, Path] = {}
    for environment in (family.replace("-", "_") for family in _GOAL):
        for folder in (source, source / environment, source / "data" / environment):
            if any(folder.glob(f"{environment}-*.pkl")):
                found.setdefault(environment, folder)
    return found


def _size(content: Any) -> int:
    """The size of an episode's arrays in bytes."""
    arrays = [content.get(key) for key in _KEYS] if isinstance(content, dict) else []
    values = [array.values for array in arrays if isinstance(array, Array)]
    return sum(array.nbytes for array in values if array is not None)


def _read_array(place: Place, content: Any, key: str) -> np.ndarray:
    """Read one array as float32."""
    if not isinstance(content, dict):
        raise UserError(f"{place} is not a dict of arrays: download the file again")
    if key not in content:
        raise UserError(
            f"{place} has no key {key!r} (it has {', '.join(content) or 'none'}): rename or add it"
        )
    array = content[key]
    if not isinstance(array, Array) or array.values is None:
        raise UserError(f"{place}: {key} is not an array: download or write the file again")
    with np.errstate(over="ignore"):  # too large values become infinite and are refused later
        return array.values.astype(np.float32)
