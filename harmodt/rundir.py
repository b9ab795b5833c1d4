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
from typing import Annotated, Any, TypeVar

import msgspec

from . import sealed
from .errors import UserError

FORMAT = "harmodt-run"
VERSION = 5
KIND = sealed.Kind(
    name="the description of a HarmoDT run",
    format=FORMAT,
    version=VERSION,
    instead="give the directory that `python -m harmodt.train` wrote",
    again="train the run again",
    remedy=f"{sealed.RESTORE}, or train the run again",
)

Content = TypeVar("Content")


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
        episode_length: steps of its longest training episode; its evaluations play so many. None
            in a run of an earlier version, whose evaluations play the environments' length.
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
    episode_length: Annotated[int, msgspec.Meta(ge=1)] | None = None
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
        sealed.write(self.description, content)

    def update(self, values: dict[str, Any]) -> None:
        """Write other values of some keys into run.json."""
        self.write({**self._read(dict[str, Any]), **values})

    def read(self) -> Description:
        """Read run.json.

        Raises:
            UserError: there is no run, or it is damaged, changed or of another version.
        """
        return self._read(Description)

    def _read(self, content: type[Content]) -> Content:
        try:
            return sealed.read(self.description, content, KIND)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.path} holds no run (run.json is missing): {KIND.instead}"
            ) from None

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
