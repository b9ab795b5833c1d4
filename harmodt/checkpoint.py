"""Checkpoints of a run: written whole or not at all, read, pruned.

A checkpoint is a directory that is renamed into place when it is complete. Every random draw of a
run is seeded by (seed, purpose, step), so the step is all of its random state and data position.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import UserError
from .files import remove_directory, replace_directory, write_bytes, write_json
from .rundir import RunDirectory

VERSION = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after some step: named tensors on the CPU."""

    path: Path
    step: int
    tensors: dict[str, Tensor]

    def copy_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of these names into those that are given.

        Raises:
            UserError: one is missing or of another shape.
        """
        for name, tensor in tensors.items():
            saved = self.tensors.get(name)
            if saved is None or saved.shape != tensor.shape:
                has = "does not have it" if saved is None else f"has it as {list(saved.shape)}"
                raise UserError(
                    f"the checkpoint {self.path} is of another model size: {name} should be "
                    f"{list(tensor.shape)}, and it {has}"
                )
            tensor.data.copy_(saved)


def checkpoint_steps(run: RunDirectory) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    if not run.checkpoints.is_dir():
        return []
    return sorted(int(path.name) for path in run.checkpoints.iterdir() if path.name.isdigit())


def save_checkpoint(run: RunDirectory, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint whole or not at all."""
    run.checkpoints.mkdir(exist_ok=True)
    final = run.checkpoint(step)
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        on_cpu = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        write_bytes(temporary / "state.safetensors", save(on_cpu))
        write_json(temporary / "state.json", {"version": VERSION, "step": step})
        replace_directory(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def prune_checkpoints(run: RunDirectory, keep: int, best: int | None = None) -> None:
    """Delete all checkpoints but the last `keep` and the one of step `best`."""
    for step in checkpoint_steps(run)[:-keep]:
        if step != best:
            remove_directory(run.checkpoint(step))
    for leftover in run.checkpoints.glob(".*"):  # of a kill
        shutil.rmtree(leftover)


def load_checkpoint(run: RunDirectory, step: int | None = None) -> Checkpoint:
    """Read a checkpoint of a run, the last one by default.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    steps = checkpoint_steps(run)
    if not steps:
        raise UserError(f"{run.path} has no checkpoint yet: train it first")
    if step is None:
        step = steps[-1]
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"{run.path} has no checkpoint of step {step}: it has those of {there}")
    path = run.checkpoint(step)
    try:
        values = json.loads((path / "state.json").read_text())
        with safe_open(path / "state.safetensors", framework="pt") as file:
            names = file.keys()  # a safe_open is no dict: it cannot be iterated
            tensors = {name: file.get_tensor(name) for name in names}
        return Checkpoint(path, values["step"], tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the checkpoint {path} is damaged ({error}): delete it and go on from another one"
        ) from None
