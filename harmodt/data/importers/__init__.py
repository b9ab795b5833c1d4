"""Formats of offline data that can be brought into a store.

A format is a module with a subclass of `Importer`, and a row of `IMPORTERS`.
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
"""Name of every format, and the module and class that read it."""

LIMIT = 1e6
"""Of a number in an episode: the float32 sums and squares of training stay far from infinity."""


class Importer(ABC):
    """Reads the data set in `source`, whose tasks are those of a family of environments.

    An episode that is not read yet is whatever the importer likes, such as its file; as a string
    it tells a person where the episode is.

    Args:
        source: where it is.
        family: of its environments.
        datasets: for formats that know no tasks, the task of each of the source's data sets.
    """

    takes_datasets = False
    """Whether it has to be told which of its data sets is which task."""

    def __init__(self, source: Path, family: EnvironmentFamily, datasets: Mapping[str, str]):
        self.source = source
        self.family = family
        self.datasets = datasets

    @classmethod
    def default_family(cls, source: Path, tasks: Sequence[str]) -> str:
        """The environments that data are of if a person does not say.

        Args:
            tasks: what was named on the command line, with the tasks of `datasets`; may be empty.

        Raises:
            UserError: they cannot be told.
        """
        return family_of(tasks).spec.family if tasks else METAWORLD

    def resolve_tasks(self, names: Sequence[str]) -> tuple[str, ...]:
        """The tasks that a person's names mean, those of the source or of the family.

        Raises:
            UserError: there is no such task.
        """
        return self.family.resolve_tasks(names)

    @abstractmethod
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the source holds.

        Raises:
            UserError: there is no such source, or it holds none.
        """

    @abstractmethod
    def episodes(self, task: str) -> Sequence[Any]:
        """The episodes of a task in their order, not read yet.

        Raises:
            UserError: the source holds none.
        """

    def prompts(self, task: str) -> Sequence[Any]:
        """Episodes that the source itself holds apart as prompts, not read yet; often none."""
        return ()

    @abstractmethod
    def read(self, episode: Any) -> Episode:
        """Read one episode: float32 arrays, of which `check_episode` looks at shapes and values.

        Raises:
            UserError: it is missing, damaged, several episodes, not in order or not complete by
                what the source says of that, or something else than an episode.
        """

    def files(self, task: str) -> Iterable[Path]:
        """The files that hold a task's episodes; by default all files in the source.

        They are not read: their sizes and times show whether the source has changed.

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
    """The reader of a source in a format; arguments are those of the command line.

    Raises:
        UserError: there is no such format or family, or the format wants other arguments.
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
            else f"the format {format} takes no --dataset: its data sets are the tasks' own"
        )
    name = family or kind.default_family(source, [*tasks, *datasets.values()])
    return kind(source, family_named(name), datasets)


def check_episode(
    where: str, episode: Episode, environment: EnvironmentSpec, min_length: int
) -> None:
    """Check that an episode can be stored and trained on; `where` tells a person where it is.

    Raises:
        UserError: an array has the wrong shape, or holds a value that is not finite or beyond
            LIMIT, or the episode has no steps, fewer than `min_length`, or more than an episode of
            the environments has.
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
            f"{where}: the episode has {length} steps and one of {environment.family} has "
            f"{environment.episode_length} at most: split it if it holds several episodes, or name "
            "the --family that it is of"
        )
    if length < min_length:
        raise UserError(
            f"{where}: the episode has {length} steps and {min_length} are asked for: remove it, "
            "or lower --min-length"
        )
    for key, shape in entries.items():
        check_array(where, key, getattr(episode, key), shape, length)


def check_array(
    where: str, key: str, array: np.ndarray, shape: tuple[int, ...], length: int
) -> None:
    """Check an array of an episode of `length` steps; `shape` is that of one step.

    Raises:
        UserError: it has another shape, or holds a value that is not finite or beyond LIMIT.
    """
    _check_shape(where, key, array, shape)
    if len(array) != length:
        raise UserError(
            f"{where}: {key} has {len(array)} steps and observations has {length}: download "
            "or write it again"
        )
    if not length:
        return
    if not np.isfinite(array).all():
        raise UserError(f"{where}: {key} holds NaN or infinity: remove it or repair its values")
    largest = max(array.min(), array.max(), key=abs)
    if abs(largest) > LIMIT:
        raise UserError(
            f"{where}: {key} holds {largest:.3g}, beyond {LIMIT:g}, which training cannot use: "
            "remove it or repair its values"
        )


def _check_shape(
    where: str, key: str, array: np.ndarray, shape: tuple[int, ...], family: str = ""
) -> None:
    if array.ndim and array.shape[1:] == shape:
        return
    expected = ", ".join(["T", *map(str, shape)])
    advice = f"is this data of {family}?" if family else "download or write it again"
    raise UserError(
        f"{where}: {key} has the shape {array.shape} and ({expected}) is needed: {advice}"
    )
