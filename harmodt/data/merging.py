"""Merges stores of one environment into a new store: `python -m harmodt.data merge`."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.progress import Progress

from .. import sealed
from ..errors import UserError
from ..progress import progress_bar
from .store import EPISODE_ARRAYS, KIND, PROMPTS, DataStore, Episode
from .writer import StoreWriter, make_or_open


@dataclass(frozen=True)
class MergeConfig:
    """Merge stores of one environment into a new store.

    The new store has the tasks of the first store, then the further tasks of the second store, and
    so on. If several stores have a task, the new store has the training episodes of the first
    store, then the training episodes of the second store, and so on; it orders prompts in the same
    way. To continue an interrupted merge, give the same command again.
    """

    stores: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of two or more stores."""
    output: Path
    """Directory of the new store."""


def merge_stores(config: MergeConfig, progress: bool = True) -> DataStore:
    """Merge stores, or continue an unfinished merge; return the opened new store.

    The new store is equal to a store that a `StoreWriter` makes from the same episodes. The merge
    verifies the checksums of the inputs while it reads them, one episode at a time.

    Raises:
        UserError: there are fewer than two stores; a store is damaged or named twice; the
            environments differ; the output is one of the stores, lies in one of them, or holds
            something else.
    """
    stores = [DataStore.open(path) for path in config.stores]
    _check(stores, config.output)
    settings = {
        "stores": [str(store.path) for store in stores],
        "checksums": [store.checksum for store in stores],
    }

    def make() -> None:
        inputs = [store.provenance for store in stores]
        provenance = {"merge": settings, "inputs": inputs}
        writer = StoreWriter(config.output, provenance, stores[0].environment)
        with progress_bar("episodes", enabled=progress) as bar:
            _merge(stores, writer, bar)

    return make_or_open(config.output, "merge", settings, make)


def _check(stores: Sequence[DataStore], output: Path) -> None:
    """Raise UserError if the stores cannot be merged, or cannot be merged into `output`."""
    if len(stores) < 2:
        named = "only one store is named" if stores else "no store is named"
        raise UserError(f"{named}: give two or more")
    first, *others = stores
    seen: dict[str, DataStore] = {}
    for store in stores:
        if store.checksum in seen:
            raise UserError(
                f"{seen[store.checksum].path} and {store.path} are the same store, so its episodes "
                "would occur twice: leave one of them out"
            )
        seen[store.checksum] = store
        if output.resolve().is_relative_to(store.path.resolve()):
            raise UserError(
                f"--output {output} lies in {store.path}, which is one of the stores to merge: "
                "choose another directory"
            )
    for store in others:
        if store.environment != first.environment:
            raise UserError(
                f"{first.path} and {store.path} have different environments "
                f"({_difference(first, store)}): merge only stores of one environment"
            )


def _difference(a: DataStore, b: DataStore) -> str:
    """The fields in which the environments of two stores differ, with both values."""
    left, right = a.environment.to_json(), b.environment.to_json()
    return ", ".join(f"{n}: {left[n]} and {right[n]}" for n in left if left[n] != right[n])


def _merge(stores: Sequence[DataStore], writer: StoreWriter, bar: Progress) -> None:
    """Write the missing tasks, and publish the store."""
    tasks = {
        name: [s for s in stores if name in s.tasks] for store in stores for name in store.tasks
    }
    counts = {name: sum(_count(store, name) for store in tasks[name]) for name in tasks}
    line = bar.add_task("merging", total=sum(counts.values()))
    for name, inputs in tasks.items():
        if name in writer.tasks:
            bar.advance(line, counts[name])
            continue
        with writer.task(name) as task_writer:
            for store in inputs:
                for episode in _read(store, name, "train"):
                    task_writer.add(episode)
                    bar.advance(line)
                # A store records how many prompts are shared, not which. So mark the first ones.
                shared = store.shared_prompts(name)
                for number, episode in enumerate(_read(store, name, "prompts")):
                    task_writer.add_prompt(episode, shared=number < shared)
                    bar.advance(line)
    writer.finish(tuple(tasks))


def _count(store: DataStore, name: str) -> int:
    """Number of episodes of a task, prompts included."""
    task = store.task(name)
    return len(task.train) + len(task.prompts)


def _read(store: DataStore, name: str, kind: Literal["train", "prompts"]) -> Iterator[Episode]:
    """Read the episodes of a task, with one at a time in memory.

    Raises:
        UserError: a checksum is wrong. Most checksums can be compared only after the last episode.
    """
    episodes = getattr(store.task(name), kind)
    prefix = f"{PROMPTS}/" if kind == "prompts" else ""
    files = {array: f"{name}/{prefix}{array}.npy" for array in EPISODE_ARRAYS}
    arrays = {
        array: _Reading(store, file, getattr(episodes, array))
        for array, file in files.items()
        if file in store.files
    }
    starts, successes = arrays.pop("episode_starts").whole(), arrays.pop("successes").whole()
    ends = arrays.pop("terminated").whole() if "terminated" in arrays else episodes.terminated
    for steps, success, end in zip(pairwise(starts), successes, ends, strict=True):
        found = {array: read.part(*steps) for array, read in arrays.items()}
        yield Episode(
            found["observations"], found["actions"], found["rewards"], int(success), int(end)
        )
    for read in arrays.values():
        read.check()


class _Reading:
    """Reads one array of a store from front to back in chunks, then verifies its checksum."""

    def __init__(self, store: DataStore, file: str, array: np.ndarray):
        self._path = store.path / file
        self._recorded = store.files[file]["crc32"]
        self._array = array
        self._crc32 = 0

    def part(self, start: int, stop: int) -> np.ndarray:
        """Copy the next chunk, rows [start, stop)."""
        copy = np.array(self._array[start:stop])
        self._crc32 = zlib.crc32(copy.data, self._crc32)
        return copy

    def check(self) -> None:
        sealed.check(self._path, f"{self._crc32:08x}", self._recorded, KIND.remedy)

    def whole(self) -> np.ndarray:
        """Copy the whole array, and verify its checksum."""
        copy = self.part(0, len(self._array))
        self.check()
        return copy
