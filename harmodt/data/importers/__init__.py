"""Importers: each reads one format of offline data, which is then written to a store.

Each format has a module with a subclass of `Importer`, and an entry in `IMPORTERS`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...environments import METAWORLD, EnvironmentFamily, EnvironmentSpec, family_of
from ...environments import family as family_named
from ...errors import UserError
from ..store import Episode

IMPORTERS: dict[str, str] = {
    "npz": "harmodt.data.importers.npz:NpzImporter",
    "prompt-dt": "harmodt.data.importers.prompt_dt:PromptDTImporter",
    "minari": "harmodt.data.importers.minari:MinariImporter",
    "lerobot": "harmodt.data.importers.lerobot:LeRobotImporter",
    "td-mpc2": "harmodt.data.importers.tdmpc2:TdMpc2Importer",
}
"""The module and the class that read each format, by its name."""

LIMIT = 1e6
"""The largest absolute value of a number in an episode. With this limit, the float32 sums and
squares in training stay far from infinity."""


class Importer(ABC):
    """Reads a data set whose tasks belong to one family of environments.

    An unread episode is an object of any type, such as the path of its file. The object's string
    tells a person where the episode is.

    Args:
        source: the path of the data set.
        family: the family of the environments.
        datasets: the task of each of the source's data sets, for formats that do not name tasks.
    """

    takes_datasets = False
    """Whether the format needs `datasets`."""

    def __init__(self, source: Path, family: EnvironmentFamily, datasets: Mapping[str, str]):
        self.source = source
        self.family = family
        self.datasets = datasets

    @classmethod
    def default_family(cls, source: Path, tasks: Sequence[str]) -> str:
        """The name of the family that is used if the user names none.

        Args:
            source: the path of the data set.
            tasks: the tasks on the command line, including the tasks of `datasets`; may be empty.

        Raises:
            UserError: the family cannot be determined.
        """
        return family_of(tasks).spec.family if tasks else METAWORLD

    def resolve_tasks(self, names: Sequence[str]) -> tuple[str, ...]:
        """Turn the user's names into task names; a name may be the source's or the family's.

        Raises:
            UserError: there is no such task.
        """
        return self.family.resolve_tasks(names)

    @abstractmethod
    def tasks(self) -> tuple[str, ...]:
        """The tasks in the source.

        Raises:
            UserError: there is no such source, or it holds no task.
        """

    @abstractmethod
    def episodes(self, task: str) -> Sequence[Any]:
        """The unread episodes of a task, in their order.

        Raises:
            UserError: the source holds no episode of the task.
        """

    def prompts(self, task: str) -> Sequence[Any]:
        """The unread episodes that the source provides as prompts; many sources have none."""
        return ()

    @abstractmethod
    def read(self, episode: Any) -> Episode:
        """Read one episode as float32 arrays. `check_episode` checks their shapes and values later.

        Raises:
            UserError: the episode is missing or damaged; the source shows that its steps are
                incomplete or out of order, or that they are several episodes; or the data are not
                an episode.
        """

    def files(self, task: str) -> Iterable[Path]:
        """The files that hold a task's episodes; by default all files in the source.

        Their sizes and times show whether the source has changed. Their content is not read.

        Raises:
            UserError: the source holds no episode of the task.
        """
        return (file for file in self.source.rglob("*") if file.is_file())


def importer(
    format: str,
    source: Path,
    family: str | None = None,
    tasks: Sequence[str] = (),
    datasets: Mapping[str, str] | None = None,
) -> Importer:
    """Make the importer for a source; the arguments come from the command line.

    Args:
        format: a name in `IMPORTERS`.
        source: the path of the data set.
        family: the name of the family; with None the format chooses it.
        tasks: names of tasks; may be empty.
        datasets: the task of each of the source's data sets, for formats that do not name tasks.

    Raises:
        UserError: there is no such format or family, or the format needs other arguments.
    """
    if format not in IMPORTERS:
        raise UserError(f"there is no format {format!r}: choose from {', '.join(IMPORTERS)}")
    module, _, attribute = IMPORTERS[format].partition(":")
    kind: type[Importer] = getattr(importlib.import_module(module), attribute)
    datasets = datasets or {}
    if bool(datasets) != kind.takes_datasets:
        raise UserError(
            f"the format {format} needs --dataset NAME=TASK for each of its data sets"
            if kind.takes_datasets
            else f"the format {format} names its tasks itself: leave --dataset out"
        )
    name = family or kind.default_family(source, [*tasks, *datasets.values()])
    return kind(source, family_named(name), datasets)


def check_episode(
    where: str, episode: Episode, environment: EnvironmentSpec, min_length: int
) -> None:
    """Check that an episode can be stored and used for training.

    Args:
        where: tells a person where the episode is.
        episode: the episode.
        environment: gives the sizes, and the largest number of steps.
        min_length: the smallest number of steps.

    Raises:
        UserError: an array has a wrong shape, or holds a value that is not finite or is beyond
            LIMIT; or the episode has no steps, or too few, or too many.
    """
    entries: dict[str, tuple[int, ...]] = {
        "observations": (environment.observation_size,),
        "actions": (environment.action_size,),
        "rewards": (),
    }
    for key, shape in entries.items():
        _check_shape(where, key, getattr(episode, key), shape, environment.family)
    length = len(episode.observations)
    if not length:
        raise UserError(f"{where}: the episode has 0 steps: remove it")
    if length > environment.episode_length:
        raise UserError(
            f"{where}: the episode has {length} steps, but an episode of {environment.family} has "
            f"at most {environment.episode_length}: split it if it holds several episodes, or give "
            "its family with --family"
        )
    if length < min_length:
        raise UserError(
            f"{where}: the episode has {length} steps, but --min-length is {min_length}: remove "
            "the episode, or lower --min-length"
        )
    for key, shape in entries.items():
        check_array(where, key, getattr(episode, key), shape, length)


def check_array(
    where: str, key: str, array: np.ndarray, shape: tuple[int, ...], length: int
) -> None:
    """Check one array of an episode.

    Args:
        where: tells a person where the episode is.
        key: the name of the array.
        array: the array.
        shape: the shape of the entry of one step.
        length: the number of steps of the episode.

    Raises:
        UserError: the array has another shape, or holds a value that is not finite or is beyond
            LIMIT.
    """
    _check_shape(where, key, array, shape)
    if len(array) != length:
        raise UserError(
            f"{where}: {key} has {len(array)} steps, but observations has {length}: download "
            "or write it again"
        )
    if not length:
        return
    if not np.isfinite(array).all():
        raise UserError(
            f"{where}: {key} holds NaN or infinity: remove the episode or repair its values"
        )
    largest = max(array.min(), array.max(), key=abs)
    if abs(largest) > LIMIT:
        raise UserError(
            f"{where}: {key} holds {largest:.3g}, but training can use only numbers up to "
            f"{LIMIT:g}: remove the episode or repair its values"
        )


def _check_shape(
    where: str, key: str, array: np.ndarray, shape: tuple[int, ...], family: str = ""
) -> None:
    if array.ndim and array.shape[1:] == shape:
        return
    expected = ", ".join(["T", *map(str, shape)])
    advice = f"is this data of {family}?" if family else "download or write it again"
    raise UserError(
        f"{where}: {key} has the shape {array.shape}, but ({expected}) is needed: {advice}"
    )
