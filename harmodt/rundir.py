"""A run's directory: what is where, and the description that makes it one.

RUN/run.json                       settings, tasks, environments, backend, versions
RUN/conditioning.safetensors       what a policy must know of each task
RUN/checkpoints/<step>/            state.safetensors and state.json
RUN/metrics.jsonl, RUN/tensorboard/
RUN/evaluation/                    results as JSON and CSV, videos
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import write_json

FORMAT = "harmodt-run"
VERSION = 2


@dataclass(frozen=True)
class RunDirectory:
    """The paths in a run's directory."""

    path: Path

    @property
    def description(self) -> Path:
        """Everything that the run depends on, and what it is made of."""
        return self.path / "run.json"

    @property
    def conditioning(self) -> Path:
        """Normalisation, prompts and target return of each task."""
        return self.path / "conditioning.safetensors"

    @property
    def checkpoints(self) -> Path:
        """A folder for each checkpoint."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.checkpoints / f"{step:08d}"

    @property
    def metrics(self) -> Path:
        """Numbers over training, a JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The same for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def evaluation(self) -> Path:
        """Results and videos."""
        return self.path / "evaluation"

    def write(self, description: dict[str, Any]) -> None:
        """Write run.json."""
        write_json(self.description, {"format": FORMAT, "version": VERSION, **description})

    def read(self) -> dict[str, Any]:
        """Read run.json.

        Raises:
            UserError: there is no run, or it is damaged or of another version.
        """
        path = self.description
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{self.path} holds no run (run.json is missing): give the directory that "
                "`python -m harmodt.train` wrote"
            ) from None
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}): restore it from a copy") from None
        found = description if isinstance(description, dict) else {}
        if found.get("format") != FORMAT:
            raise UserError(
                f"{path} is not the description of a HarmoDT run: give the directory that "
                "`python -m harmodt.train` wrote"
            )
        if found.get("version") != VERSION:
            raise UserError(
                f"{path} is of version {found.get('version')}, and this HarmoDT reads version "
                f"{VERSION}: train the run again, or use the HarmoDT that wrote it"
            )
        tasks = found.get("tasks")
        if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
            raise UserError(f"{path} names no tasks: restore it from a copy")
        return found

    def check_empty(self) -> None:
        """Check that a run can begin here.

        Raises:
            UserError: there is something in the directory.
        """
        # A run that was killed before its run.json was written leaves no more than this.
        leftovers = {self.conditioning.name}
        if self.path.exists() and any(
            file.name not in leftovers and not file.name.startswith(".")
            for file in self.path.iterdir()
        ):
            raise UserError(
                f"{self.path} is not empty: go on with --resume {self.path}, or name another "
                "--output"
            )
