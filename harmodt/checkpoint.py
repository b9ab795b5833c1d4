"""Writes, reads and deletes the checkpoints of a run. A checkpoint is written whole or not at all.

A checkpoint is a directory that gets its final name when it is complete. The tuple (seed, purpose,
step) seeds every random draw of a run, also of its batches. A checkpoint therefore stores no state
of a random generator and no position in the data, only the step.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from harmodt_kernels import count_bits

from . import sealed
from .errors import UserError
from .files import checksum, names_in, remove_directory, replace_directory, write_bytes, write_json
from .rundir import Description, RunDirectory

VERSION = 3

_AWAY = "move the checkpoint's folder away, and go on from the one before"
_REMEDY = f"{sealed.RESTORE}, or {_AWAY}"
KIND = sealed.Kind(
    name="the state of a checkpoint",
    format=None,
    version=VERSION,
    instead=_REMEDY,
    again=_AWAY,
    remedy=_REMEDY,
    sealed=False,  # its entry `crc32` is the checksum of the tensors
)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes in which PyTorch can check for NaN and infinity."""

_TENSORS, _STATE = "state.safetensors", "state.json"
_NAME = re.compile(r"[0-9]{8}")
_TEMPORARY = re.compile(r"\.[0-9]{8}\.(tmp|deleted)")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after some step: named tensors on the CPU."""

    path: Path
    step: int
    tensors: dict[str, Tensor]

    def copy_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the checkpoint's tensors into tensors of the same names.

        Raises:
            UserError: the checkpoint lacks a tensor, or it has another shape or dtype.
        """
        for name, tensor in tensors.items():
            saved = self.tensors.get(name)
            if saved is None or saved.shape != tensor.shape:
                has = "lacks it" if saved is None else f"has it as {list(saved.shape)}"
                raise UserError(
                    f"the checkpoint {self.path} is of another model size: {name} should be "
                    f"{list(tensor.shape)}, but the checkpoint {has}"
                )
            if saved.dtype != tensor.dtype:
                raise _damaged(self.path, f"{name} is {saved.dtype}, not {tensor.dtype}")
        for name, tensor in tensors.items():
            tensor.data.copy_(self.tensors[name])


@dataclass(frozen=True)
class _State:
    """The content of state.json: run and step of the tensors, and their checksum."""

    version: int
    run: str
    step: int
    crc32: str


def checkpoint_steps(run: RunDirectory) -> list[int]:
    """The steps of a run's checkpoints, in ascending order."""
    names = names_in(run.checkpoints)
    return [int(name) for name in names if _holds_checkpoint(run.checkpoints / name)]


def save_checkpoint(run: RunDirectory, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint whole or not at all.

    Raises:
        UserError: another file or folder has the checkpoint's name.
    """
    run.checkpoints.mkdir(exist_ok=True)
    final = run.checkpoint(step)
    if final.is_symlink() or (final.exists() and not _is_ours(final)):
        raise UserError(f"{final} is in the way of a checkpoint: move it away, then go on")
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        content = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
        state = _State(VERSION, run.read().id, step, checksum(content))
        write_bytes(temporary / _TENSORS, content)
        write_json(temporary / _STATE, msgspec.to_builtins(state))
        replace_directory(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def prune_checkpoints(run: RunDirectory, keep: int, best: int | None = None) -> None:
    """Delete all checkpoints except the last `keep` and the one of step `best`.

    It deletes no files of other names, no links, and no folders that contain other files.
    """
    for step in checkpoint_steps(run)[:-keep]:
        if step != best and _is_ours(run.checkpoint(step)):
            with contextlib.suppress(OSError):  # the next call tries again
                remove_directory(run.checkpoint(step))
    clear_temporaries(run)


def clear_temporaries(run: RunDirectory) -> None:
    """Delete unfinished and half deleted checkpoints that a kill left."""
    if not run.checkpoints.is_dir():
        return
    for path in run.checkpoints.iterdir():
        if _TEMPORARY.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(run: RunDirectory, step: int | None = None) -> Checkpoint:
    """Read a checkpoint of a run, by default the last one.

    Raises:
        UserError: there is no such checkpoint, or it is damaged or belongs to another version or
            another run.
    """
    steps = checkpoint_steps(run)
    if not steps:
        raise UserError(f"{run.path} has no checkpoint yet: train it first")
    if step is None:
        step = steps[-1]
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(
            f"{run.path} has no checkpoint of step {step}: it has checkpoints of the steps {there}"
        )
    path, description = run.checkpoint(step), run.read()
    state = _read_state(path, description.id)
    if state.step != step:
        raise _damaged(path, f"{_STATE} is of step {state.step}")
    content = sealed.read_binary(path / _TENSORS, state.crc32, _REMEDY)
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None
    _check(path, tensors, description)
    return Checkpoint(path, step, tensors)


def _holds_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint; the checkpoint may be damaged."""
    named = _NAME.fullmatch(path.name) is not None
    return named and not {_STATE, _TENSORS}.isdisjoint(names_in(path))


def _is_ours(path: Path) -> bool:
    """Whether a path is a folder that contains only a checkpoint."""
    if path.is_symlink() or not path.is_dir():
        return False
    return all(file.name in (_STATE, _TENSORS) for file in path.iterdir())


def _read_state(path: Path, run: str) -> _State:
    try:
        state = sealed.read(path / _STATE, _State, KIND)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path / _STATE} is missing: {_REMEDY}") from None
    if state.run != run:
        raise UserError(
            f"the checkpoint {path} is of another run: move it back to the run that wrote it"
        )
    return state


def _check(path: Path, tensors: Mapping[str, Tensor], description: Description) -> None:
    """Check that all numbers are finite and that the masks have their first densities.

    Raises:
        UserError: a number is not finite, or a task's mask has another density than its first mask.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            if tensor.dtype not in _FLOATS:
                raise _damaged(path, f"{name} is {tensor.dtype}")
            if not bool(torch.isfinite(tensor).all()):
                raise _damaged(path, f"{name} has numbers that are NaN or infinite")
    masks = tensors.get("masks")
    if masks is None or not description.active_weights:
        return
    if masks.dtype != torch.int32 or masks.shape[:1] != (len(description.tasks),):
        raise _damaged(path, f"masks is {masks.dtype} {list(masks.shape)}")
    found = count_bits(masks).tolist()
    for task, active, at_first in zip(
        description.tasks, found, description.active_weights, strict=True
    ):
        if active != at_first:
            raise _damaged(
                path, f"the mask of {task} has {active} active weights and began with {at_first}"
            )


def _damaged(path: Path, why: object) -> UserError:
    return sealed.damaged(f"the checkpoint {path}", why, _REMEDY)
