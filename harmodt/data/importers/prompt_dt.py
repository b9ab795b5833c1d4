"""Pickles of Cheetah-dir, Cheetah-vel and Ant-dir, as Prompt-DT's public code reads them.

    data/<env>/<env>-<i>-<quality>.pkl         the episodes of task i: a list of dicts
    data/<env>/<env>-<i>-prompt-<quality>.pkl  its prompts
    config/<env>/config_<env>_task<i>.pkl      its goal: a list of one dict

`env` is cheetah_dir, cheetah_vel or ant_dir; the quality is a word such as expert. Keys read of an
episode: observations (T, observation_size), actions (T, action_size), rewards (T,) or (T, 1), and
terminals and other flags of an episode's end where there are any; of a goal: direction (1 or -1),
velocity (m/s) or goal (radians). Prompts and, for cheetahs, whose goals are known, the
configuration may be missing.

A pickle is read whole, but only one at a time: memory is that of the largest task's file.
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
"""Of each family, the key under which a configuration has the goal."""


class Place(NamedTuple):
    """An episode: its file, and its place in the file's list."""

    file: Path
    number: int

    def __str__(self) -> str:
        return f"{self.file}, episode {self.number}"


class _Files(NamedTuple):
    """The files of a task."""

    episodes: Path
    prompts: Path | None


class PromptDTImporter(Importer):
    """Reads two files per task; the source is the folder of an environment, or one above."""

    family: Locomotion

    def __init__(self, source: Path, family: EnvironmentFamily, datasets: Mapping[str, str]):
        if not isinstance(family, Locomotion):
            raise UserError(
                f"the format prompt-dt has no data of {family.spec.family}: choose --family from "
                f"{', '.join(_GOAL)}"
            )
        super().__init__(source, family, datasets)
        self._environment = family.spec.family.replace("-", "_")
        self._folder = _folders(source).get(self._environment, source)
        self._files = self._find_files()
        self._last: tuple[Path, list[Any]] | None = None

    @classmethod
    def default_family(cls, source: Path, tasks: Sequence[str]) -> str:
        """That of the tasks' names, or the one whose files are there."""
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
        """Numbers are those of the source's files; other names are the family's."""
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
        """All of them, by number."""
        return tuple(self._numbers)

    def episodes(self, task: str) -> list[Place]:
        """Those of the file, in its order."""
        return self._places(self._files_of(task).episodes)

    def prompts(self, task: str) -> list[Place]:
        """Those of the file of prompts; none where there is no such file."""
        file = self._files_of(task).prompts
        return [] if file is None else self._places(file)

    def files(self, task: str) -> list[Path]:
        """The file of its episodes, and that of its prompts if there is one."""
        return [file for file in self._files_of(task) if file is not None]

    def read(self, episode: Place) -> Episode:
        """Read one episode."""
        content = self._read(episode.file)[episode.number]
        observations, actions, rewards = (_read_array(episode, content, key) for key in _KEYS)
        flags = flags_of(content.keys(), lambda key: _read_array(episode, content, key))
        terminated = ending(str(episode), flags, observations)
        return Episode(observations, actions, one_per_step(rewards), UNKNOWN, terminated)

    def _find_files(self) -> dict[int, _Files]:
        """The files of every task, by its number."""
        found: dict[int, dict[bool, Path]] = {}
        for path in sorted(self._folder.glob(f"{self._environment}-*.pkl")):
            if (name := _FILE.fullmatch(path.name)) is None:
                continue
            of_task = found.setdefault(int(name[2]), {})
            other = of_task.setdefault(bool(name[3]), path)
            if other != path:
                raise UserError(
                    f"{self._folder} has both {other.name} and {path.name}: move one of them away"
                )
        if not found:
            raise UserError(
                f"{self.source} has no file such as {self._environment}-0-expert.pkl: give the "
                "folder data of Prompt-DT"
            )
        for number, of_task in found.items():
            if False not in of_task:
                raise UserError(
                    f"{of_task[True]} has prompts of task {number}, whose episodes are missing: "
                    f"add {self._environment}-{number}-expert.pkl"
                )
        return {
            number: _Files(found[number][False], found[number].get(True))
            for number in sorted(found)
        }

    def _files_of(self, task: str) -> _Files:
        if task not in self._numbers:
            raise UserError(
                f"{self._folder} has no file for {task}: {self._what_there_is()}, such as "
                f"{next(iter(self._numbers))}; --tasks takes numbers as well"
            )
        return self._files[self._numbers[task]]

    def _what_there_is(self) -> str:
        return f"it has those of the tasks {', '.join(map(str, self._files))}"

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """The number of every task, by its name."""
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
        """The name of a task, by its goal."""
        file = f"config_{self._environment}_task{number}.pkl"
        folders = [self._folder, *self._folder.absolute().parents[:2]]
        places = [f / below for f in folders for below in ("", f"config/{self._environment}")]
        for place in places:
            if os.path.lexists(place / file):  # a link to nothing stands for some goal
                return self._named_by_goal(place / file)
        if self.family.spec.family == "ant-dir" or number >= len(self.family.task_goals):
            raise UserError(
                f"the goal of task {number} in {self._folder} is not known: put {file} of "
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
                f"{file} holds no goal: a list of one dict is needed with the key {key!r} and a "
                "number that the family knows as a goal; download it again"
            ) from None
        return task

    def _places(self, file: Path) -> list[Place]:
        return [Place(file, number) for number in range(len(self._read(file)))]

    def _read(self, file: Path) -> list[Any]:
        """What a file holds; of the last one it is remembered."""
        if self._last is None or self._last[0] != file:
            self._last = None  # before the next is read, not after
            content = read_pickle(file)
            if not isinstance(content, list) or not content:
                raise UserError(
                    f"{file} holds no list of episodes, or an empty one: download it again"
                )
            if sum(map(_size, content)) > file.stat().st_size:
                raise UserError(
                    f"{file} holds some array several times, and each would be written as another: "
                    "download it again"
                )
            self._last = file, content
        return self._last[1]


def _folders(source: Path) -> dict[str, Path]:
    """The folder of every environment whose files are in a source."""
    found: dict[str, Path] = {}
    for environment in (family.replace("-", "_") for family in _GOAL):
        for folder in (source, source / environment, source / "data" / environment):
            if any(folder.glob(f"{environment}-*.pkl")):
                found.setdefault(environment, folder)
    return found


def _size(content: Any) -> int:
    """Bytes of an episode's arrays."""
    arrays = [content.get(key) for key in _KEYS] if isinstance(content, dict) else []
    values = [array.values for array in arrays if isinstance(array, Array)]
    return sum(array.nbytes for array in values if array is not None)


def _read_array(place: Place, content: Any, key: str) -> np.ndarray:
    """One array as float32."""
    if not isinstance(content, dict):
        raise UserError(f"{place} is no dict of arrays: download the file again")
    if key not in content:
        raise UserError(
            f"{place} has no key {key!r} (it has {', '.join(content) or 'none'}): rename or add it"
        )
    array = content[key]
    if not isinstance(array, Array) or array.values is None:
        raise UserError(f"{place}: {key} is no array: download or write the file again")
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused as such
        return array.values.astype(np.float32)
