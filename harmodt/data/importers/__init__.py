"""Formats of offline data that can be brought into a store.

A format is a module with a subclass of `Importer`, and a row of `IMPORTERS`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...environments import EnvironmentFamily, EnvironmentSpec
from ...errors import UserError
from ..store import Episode

IMPORTERS: dict[str, str] = {
    "npz": "harmodt.data.importers.npz:NpzImporter",
}
"""Name of every format, and the module and class that read it."""


class Importer(ABC):
    """Reads the data set in `source`, whose tasks are those of a family of environments.

    An episode that is not read yet is whatever the importer likes, such as its file; as a string
    it tells a person where the episode is.
    """

    def __init__(self, source: Path, family: EnvironmentFamily) -> None:
        self.source = source
        self.family = family

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

    @abstractmethod
    def read(self, episode: Any) -> Episode:
        """Read one episode: float32 arrays, of which `check_episode` looks at shapes and values.

        Raises:
            UserError: it is missing, damaged, or something else than an episode.
        """


def importer(format: str, source: Path, family: EnvironmentFamily) -> Importer:
    """The reader of a source in a format.

    Raises:
        UserError: there is no such format.
    """
    if format not in IMPORTERS:
        raise UserError(f"there is no format {format!r}: choose from {', '.join(IMPORTERS)}")
    module, _, attribute = IMPORTERS[format].partition(":")
    return getattr(importlib.import_module(module), attribute)(source, family)


def check_episode(
    where: str, episode: Episode, environment: EnvironmentSpec, min_length: int
) -> None:
    """Check that an episode can be stored and trained on; `where` tells a person where it is.

    Raises:
        UserError: an array has the wrong shape, or holds a value that is not finite, or the
            episode is shorter than `min_length` steps.
    """
    entries: dict[str, tuple[int, ...]] = {
        "observations": (environment.observation_size,),
        "actions": (environment.action_size,),
        "rewards": (),
    }
    for key, shape in entries.items():
        found = getattr(episode, key).shape
        if not found or found[1:] != shape:
            expected = ", ".join(["T", *map(str, shape)])
            raise UserError(
                f"{where}: {key} has the shape {found} and ({expected}) is needed: is this data "
                f"of {environment.family}?"
            )
    length = len(episode.observations)
    if length < max(1, min_length):
        raise UserError(
            f"{where}: the episode has {length} steps and training needs {min_length}: remove it, "
            "or lower --min-length if you train with a shorter context"
        )
    for key in entries:
        array = getattr(episode, key)
        if len(array) != length:
            raise UserError(
                f"{where}: {key} has {len(array)} steps and observations has {length}: download "
                "or write it again"
            )
        if not np.isfinite(array).all():
            raise UserError(f"{where}: {key} holds NaN or infinity: remove it or repair its values")
