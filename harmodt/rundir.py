"""A run's directory: what is where, and the description that makes it one.

RUN/run.json                       settings, tasks, environments, where it was computed
RUN/conditioning.safetensors       what a policy must know of each task
RUN/checkpoints/<step>/            state.safetensors and state.json
RUN/metrics.jsonl, RUN/tensorboard/
RUN/costs.jsonl                    time and memory that it took
RUN/evaluation/                    results as JSON and CSV, videos
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from .errors import UserError
from .files import read_sealed, write_sealed

FORMAT = "harmodt-run"
VERSION = 5


@dataclass(frozen=True)
class Part:
    """Where a part of a run was computed.

    Attributes:
        step: the part begins after this step and ends where the next part begins.
        device: the PyTorch device.
        backend: the implementation of the operations, with the instruction set on a CPU.
        versions: of Python and of packages.
    """

    step: int
    device: str
    backend: str
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """What run.json says that a run cannot go on, or a policy act, without.

    Attributes:
        id: drawn when the run began; its checkpoints and conditioning carry it.
        tasks: their names; index = task id.
        environment: the EnvironmentSpec as JSON.
        store: the checksum of the store that it trains on.
        conditioning: the checksum of that file.
        config: all settings as JSON.
        active_weights: of each task's mask, at every step; none where their number changes, and
            without masks.
        changes: settings that were changed when it went on, with the step, before and after.
        parts: where it was computed, in the order of the steps.
        preset, parameters: what it began with, for a report.
        device, backend, versions: the only part of a run that an earlier HarmoDT wrote.
    """

    id: str
    tasks: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    environment: dict[str, Any]
    store: str
    conditioning: str
    config: dict[str, Any]
    active_weights: tuple[int, ...] = ()
    changes: tuple[dict[str, Any], ...] = ()
    parts: tuple[Part, ...] = ()
    preset: str = "none"
    parameters: int | None = None
    device: str = "unknown"
    backend: str = "unknown"
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.active_weights and len(self.active_weights) != len(self.tasks):
            raise ValueError("active_weights is of another number of tasks")
        if not self.parts:
            only = Part(0, self.device, self.backend, self.versions)
            object.__setattr__(self, "parts", (only,))


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
    def costs(self) -> Path:
        """Time and memory that the run took, a JSON object a line."""
        return self.path / "costs.jsonl"

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
        content = {"format": FORMAT, "version": VERSION, **description}
        write_sealed(self.description, content)

    def update(self, values: dict[str, Any]) -> None:
        """Write other values of some keys into run.json."""
        self.write({**self._content(), **values})

    def read(self) -> Description:
        """Read run.json.

        Raises:
            UserError: there is no run, or it is damaged, changed or of another version.
        """
        try:
            return msgspec.convert(self._content(), Description)
        except (msgspec.ValidationError, UnicodeError) as error:
            raise UserError(
                f"{self.description} is damaged ({error}): restore it from a copy"
            ) from None

    def _content(self) -> dict[str, Any]:
        """What run.json says, format, version and checksum checked and taken out."""
        path = self.description
        try:
            found, intact = read_sealed(path)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.path} holds no run (run.json is missing): give the directory that "
                "`python -m harmodt.train` wrote"
            ) from None
        except (ValueError, RecursionError) as error:  # nested too deep, for reading or for writing
            raise UserError(f"{path} is not valid JSON ({error}): restore it from a copy") from None
        if found.pop("format", None) != FORMAT:
            raise UserError(
                f"{path} is not the description of a HarmoDT run: give the directory that "
                "`python -m harmodt.train` wrote"
            )
        version = found.pop("version", None)
        if version != VERSION:
            raise UserError(
                f"{path} is of version {version!r:.20}, and this HarmoDT reads version "
                f"{VERSION}: train the run again, or use the HarmoDT that wrote it"
            )
        if not intact:
            raise UserError(
                f"{path} has changed since it was written (its checksum fails): restore it from a "
                "copy, or begin a new run with other settings"
            )
        return found

    def clear_leftovers(self) -> None:
        """Delete the temporary files of a kill; for the directory's owner."""
        names = "|".join(
            re.escape(p.name)
            for p in (self.description, self.conditioning, self.metrics, self.costs)
        )
        for path in self.path.iterdir():
            if re.fullmatch(rf"\.({names})\.[0-9]+\.tmp", path.name) and path.is_file():
                path.unlink()

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
                f"{self.path} is not empty: go on with --resume {shlex.quote(str(self.path))}, or "
                "name another --output"
            )
