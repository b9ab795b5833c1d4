"""Reads the 50 Meta-World tasks of mt80, TD-MPC2's data of 80 tasks (Hansen et al., 2024).

The source is the folder of the chunks `chunk_0.pt`, `chunk_1.pt` and so on. `torch.save` wrote each
chunk as a TensorDict with n episodes of 101 rows. The importer reads these keys: obs (n, 101, 39);
action (n, 101, 6), of which Meta-World uses the first four numbers; reward (n, 101); and task
(n, 101), the index in the list TASK_SET["mt80"] of TD-MPC2's tdmpc2/common/__init__.py. If they
exist, it also reads the flags of an episode's end (n, 101), such as terminated. A row holds an
action, its reward and flags, and the observation after it. The first row's action, reward and
flags have no meaning. The data do not give the success.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.serialization import (
    add_safe_globals,
    clear_safe_globals,
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
)

from ...environments import EnvironmentFamily
from ...environments.metaworld import RepeatedMetaWorld
from ...errors import UserError
from ..store import UNKNOWN, Episode
from . import Importer
from .arrays import ENDS, ending, flags_of, reading

SPEC = RepeatedMetaWorld.spec
_NAMES = (
    "assembly basketball button-press-topdown button-press-topdown-wall button-press "
    "button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-open "
    "door-close drawer-close drawer-open faucet-open faucet-close hammer handle-press-side "
    "handle-press handle-pull-side handle-pull lever-pull peg-insert-side peg-unplug-side "
    "pick-out-of-hole pick-place pick-place-wall plate-slide plate-slide-side plate-slide-back "
    "plate-slide-back-side push-back push push-wall reach reach-wall shelf-place soccer "
    "stick-push stick-pull sweep-into sweep window-open window-close bin-picking box-close "
    "door-lock door-unlock hand-insert"
)
TASKS = tuple(f"{name}-v3" for name in _NAMES.split())
"""The tasks of Meta-World in the order of mt80, which has the tasks of DMControl before them."""
FIRST = 30
"""The number of the first Meta-World task in mt80."""

_ROWS = SPEC.episode_length + 1
_WIDTHS = {"obs": (39,), "action": (6,), "reward": (), "task": ()}
_FLAGS: dict[str, tuple[int, ...]] = dict.fromkeys(ENDS, ())  # a chunk may lack them
_LARGEST = 2**20  # most bytes of a chunk's data.pkl, which describes its tensors; TD-MPC2's has 600


class _Which(NamedTuple):
    """An unread episode."""

    chunk: Path
    number: int

    def __str__(self) -> str:
        return f"{self.chunk}, episode {self.number}"


class TdMpc2Importer(Importer):
    """Reads a folder of chunks, whose files are mapped into memory.

    The importer keeps only an index of the episodes, about 100 bytes per episode.
    """

    def __init__(self, source: Path, family: EnvironmentFamily, *others: Any) -> None:
        super().__init__(source, family, *others)
        if family.spec != SPEC:
            raise UserError(
                f"TD-MPC2 executed every action twice, so its data belong to {SPEC.family} and not "
                f"to {family.spec.family}: leave --family out"
            )

    @classmethod
    def default_family(cls, source: Path, tasks: Sequence[str]) -> str:
        """The family that repeats every action, as TD-MPC2 does."""
        return SPEC.family

    def tasks(self) -> tuple[str, ...]:
        """The Meta-World tasks that have an episode, in the order of mt80."""
        tasks = tuple(task for task, episodes in self._episodes.items() if episodes)
        if not tasks:
            raise UserError(
                f"{self.source} holds no episode of Meta-World: give the folder of mt80, whose "
                f"tasks {FIRST} to {FIRST + len(TASKS) - 1} belong to Meta-World"
            )
        return tasks

    def episodes(self, task: str) -> list[_Which]:
        """The episodes of a task, in the order of the chunks and of the rows in a chunk."""
        if not self._episodes[task]:
            raise UserError(
                f"{self.source} holds no episode of {task}: add the missing chunks, or leave the "
                "task out of --tasks"
            )
        return self._episodes[task]

    def read(self, episode: _Which) -> Episode:
        """Read one episode: a row's observation goes with the action of the next row."""
        chunk, number = self._chunks[episode.chunk], episode.number
        tasks = chunk["task"][number]
        if (tasks != tasks[0]).any():
            raise UserError(f"{episode}: task changes within the episode: download the chunk again")
        observations = _as_array(chunk["obs"][number, :-1])
        flags = flags_of(chunk.keys(), lambda key: _as_array(chunk[key][number, 1:]))
        return Episode(
            observations=observations,
            actions=_as_array(chunk["action"][number, 1:, : SPEC.action_size]),
            rewards=_as_array(chunk["reward"][number, 1:]),
            success=UNKNOWN,
            terminated=ending(str(episode), flags, observations),
        )

    def files(self, task: str) -> list[Path]:
        """All chunks, because each of them may hold episodes of the task."""
        return self._paths

    @cached_property
    def _paths(self) -> list[Path]:
        """The chunks' files in the order of their numbers."""
        if not self.source.is_dir():
            raise UserError(f"{self.source} is not a folder: give the folder that holds chunk_0.pt")
        paths = sorted(self.source.glob("*.pt"), key=lambda path: (len(path.name), path.name))
        if not paths:
            raise UserError(
                f"{self.source} holds no .pt file: give the folder that holds chunk_0.pt"
            )
        return paths

    @cached_property
    def _chunks(self) -> dict[Path, dict[str, torch.Tensor]]:
        """The tensors of every chunk, by chunk and key."""
        return {path: _open_chunk(path) for path in self._paths}

    @cached_property
    def _episodes(self) -> dict[str, list[_Which]]:
        """The episodes of every task, by task."""
        found: dict[str, list[_Which]] = {task: [] for task in TASKS}
        for path, chunk in self._chunks.items():
            numbers = chunk["task"][:, 0].numpy()
            unknown = numbers[(numbers < 0) | (numbers >= FIRST + len(TASKS))]
            if len(unknown):
                raise UserError(
                    f"{path}: task holds {unknown[0]}, but mt80 has only the tasks 0 to "
                    f"{FIRST + len(TASKS) - 1}: download the chunk again"
                )
            for number, task in enumerate(TASKS, start=FIRST):
                rows = np.flatnonzero(numbers == number).tolist()
                found[task].extend(_Which(path, row) for row in rows)
        return found


class _Pickled:
    """Stands for any class of tensordict in a file: it keeps the state and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = arguments[-1] if arguments else None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _open_chunk(path: Path) -> dict[str, torch.Tensor]:
    """Read a whole chunk once to verify its checksums, and map its tensors into memory.

    Raises:
        UserError: the chunk is missing or damaged, or is not a chunk of mt80.
    """
    with reading(path, "damaged or not a TensorDict that torch.save wrote: download it again"):
        _check_archive(path)
        fields = _load(path).state["_tensordict"]
        widths = _WIDTHS | {key: width for key, width in _FLAGS.items() if key in fields}
        chunk = {key: fields[key] for key in fields.keys() & widths.keys()}
    for key, width in widths.items():
        _check_tensor(path, key, chunk.get(key), (_ROWS, *width))
    if len(set(map(len, chunk.values()))) > 1:
        raise UserError(f"{path} has different numbers of episodes per key: download it again")
    return chunk


def _check_archive(path: Path) -> None:
    """Verify the checksums of a file of `torch.save`, which is a zip archive.

    Raises:
        UserError: the archive is compressed.
        Exception: the file is not a zip archive, or has changed.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{path} is compressed: write it again with torch.save")
            if entry.filename.endswith(".pkl") and entry.file_size > _LARGEST:
                raise ValueError(entry)
        if name := archive.testzip():
            raise ValueError(name)


def _load(path: Path) -> _Pickled:
    """Read a file of `torch.save` without running anything that it names."""
    allowed = get_safe_globals()  # other code, such as tensordict, may have allowed some classes
    clear_safe_globals()
    try:
        for name in get_unsafe_globals_in_checkpoint(path):
            if not name.startswith("tensordict."):
                raise UserError(
                    f"{path} names {name}, which data do not need, so the file is not read: "
                    "download it again from TD-MPC2's own page"
                )
            # Early versions of tensordict kept the fields in a subclass of dict.
            known = dict if name.endswith("._StringOnlyDict") else _Pickled
            add_safe_globals([(known, name)])
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    finally:
        clear_safe_globals()
        add_safe_globals(allowed)


def _check_tensor(path: Path, key: str, tensor: Any, shape: tuple[int, ...]) -> None:
    """Raise UserError if `tensor` is not a tensor of numbers, with the given shape per episode."""
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{path} has no tensor {key!r}: download it again")
    if tensor.shape[1:] != shape:
        raise UserError(
            f"{path}: {key} has the shape {tuple(tensor.shape)}, but "
            f"(n, {', '.join(map(str, shape))}) is needed: give mt80, and not mt30"
        )
    whole = key == "task"
    kinds = (torch.int32, torch.int64) if whole else (torch.float16, torch.float32, torch.float64)
    flags = (torch.bool,) if key in _FLAGS else ()
    plain = (
        tensor.dtype in (*kinds, *flags) and tensor.layout == torch.strided and not tensor.is_meta
    )
    # A stride of 0 could make a huge tensor from one stored number.
    if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise UserError(f"{path}: {key} does not hold plain numbers: download it again")


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor as a float32 array."""
    return tensor.detach().to(torch.float32, copy=True).numpy()
