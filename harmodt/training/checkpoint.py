"""Runs and their checkpoints on disk.

    RUN/run.json                       settings, tasks, backend, versions
    RUN/conditioning.safetensors       what the policy must know of each task
    RUN/checkpoints/<step>/            state.safetensors and state.json
    RUN/metrics.jsonl, RUN/tensorboard/

A checkpoint is a directory that is renamed into place when it is complete. Every random draw of a
run is seeded by (seed, purpose, step), so the step is all of its random state and data position.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import UserError
from ..files import remove_directory, replace_directory, write_bytes, write_json

RUN_FORMAT = "harmodt-run"
VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after some step: named tensors on the CPU, and JSON values."""

    path: Path
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def write_run(run: Path, description: dict[str, Any]) -> None:
    """Write RUN/run.json."""
    write_json(run / "run.json", {"format": RUN_FORMAT, "version": VERSION, **description})


def read_run(run: Path) -> dict[str, Any]:
    """Read RUN/run.json.

    Raises:
        UserError: there is no run, or it is of another version.
    """
    path = run / "run.json"
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{run} holds no run (run.json is missing): give the directory that "
            "`python -m harmodt.train` wrote"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}): restore it from a copy") from None
    if (description.get("format"), description.get("version")) != (RUN_FORMAT, VERSION):
        raise UserError(
            f"{path} is of format {description.get('format')} version "
            f"{description.get('version')}, but this HarmoDT reads {RUN_FORMAT} version {VERSION}"
        )
    return description


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def save_checkpoint(run: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint whole or not at all."""
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    temporary = folder / f".{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        on_cpu = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        write_bytes(temporary / "state.safetensors", save(on_cpu))
        write_json(temporary / "state.json", {"version": VERSION, "step": step})
        replace_directory(temporary, folder / f"{step:08d}")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def prune_checkpoints(run: Path, keep: int, best: int | None = None) -> None:
    """Delete all checkpoints but the last `keep` and the one of step `best`."""
    for step in checkpoint_steps(run)[:-keep]:
        if step != best:
            remove_directory(run / "checkpoints" / f"{step:08d}")
    for leftover in (run / "checkpoints").glob(".*"):  # of a kill
        shutil.rmtree(leftover)


def load_checkpoint(run: Path, step: int | None = None) -> Checkpoint:
    """Read a checkpoint of a run, the last one by default.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    steps = checkpoint_steps(run)
    if not steps:
        raise UserError(f"{run} has no checkpoint yet: train it first")
    if step is None:
        step = steps[-1]
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"{run} has no checkpoint of step {step}: it has those of {there}")
    path = run / "checkpoints" / f"{step:08d}"
    try:
        values = json.loads((path / "state.json").read_text())
        with safe_open(path / "state.safetensors", framework="pt") as file:
            names = file.keys()  # a safe_open is no dict: it cannot be iterated
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"the checkpoint {path} is damaged ({error}): delete it and go on from another one"
        ) from None
    return Checkpoint(path, tensors, values)


def load_parameters(
    checkpoint: Checkpoint, parameters: dict[str, Tensor], prefix: str = "model."
) -> None:
    """Copy a checkpoint's tensors into those of a model of the same size.

    Raises:
        UserError: a tensor is missing or of another shape.
    """
    for name, parameter in parameters.items():
        saved = checkpoint.tensors.get(prefix + name)
        if saved is None or saved.shape != parameter.shape:
            has = "does not have it" if saved is None else f"has it as {list(saved.shape)}"
            raise UserError(
                f"the checkpoint {checkpoint.path} is of another model size: "
                f"{prefix}{name} should be {list(parameter.shape)}, and it {has}"
            )
        parameter.data.copy_(saved)
