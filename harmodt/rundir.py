"""A run's directory: its files, and the description in run.json.

RUN/run.json                       settings, tasks, environments, devices
RUN/conditioning.safetensors       normalisation, prompts and target return of each task
RUN/checkpoints/<step>/            state.safetensors and state.json
RUN/metrics.jsonl, RUN/tensorboard/
RUN/costs.jsonl                    time and memory that the run took
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
        versions: versions of Python and of packages, by name.
    """

    step: int
    device: str
    backend: str
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """The content of run.json that a resumed run or a policy needs.

    Attributes:
        id: a random id of the run. Its checkpoints and its conditioning contain it.
        tasks: names of the tasks; index = task id.
        environment: the EnvironmentSpec as JSON.
        store: the checksum of the store that the run trains on.
        conditioning: the checksum of conditioning.safetensors.
        config: all settings as JSON.
        active_weights: number of active weights in each task's mask, which is the same at every
            step. Empty without masks, or if the number changes.
        changes: the settings that a resumed run changed: step, name, old and new value.
        parts: the device and versions of each part of the run, in the order of the steps.
        preset, parameters: the preset and the number of parameters, for a report.
        episode_length: number of steps of the longest training episode. Episodes of evaluations
            have as many. None in a run of an earlier version; its evaluations have the
            environments' episode length.
        device, backend, versions: where the run was computed. Only earlier versions wrote them;
            `parts` replaces them.
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
            raise ValueError("active_weights and tasks have different lengths")
        if not self.parts:
            only = Part(0, self.device, self.backend, self.versions)
            object.__setattr__(self, "parts", (only,))


@dataclass(frozen=True)
class RunDirectory:
    """The paths in a run's directory."""

    path: Path

    @property
    def description(self) -> Path:
        """The file of the run's description."""
        return self.path / "run.json"

    @property
    def conditioning(self) -> Path:
        """The file of normalisation, prompts and target return of each task."""
        return self.path / "conditioning.safetensors"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints' folders."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.checkpoints / f"{step:08d}"

    @property
    def metrics(self) -> Path:
        """The file of numbers over training, with a JSON object on each line."""
        return self.path / "metrics.jsonl"

    @property
    def costs(self) -> Path:
        """The file of the run's time and memory, with a JSON object on each line."""
        return self.path / "costs.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's files, with the same numbers as `metrics`."""
        return self.path / "tensorboard"

    @property
    def evaluation(self) -> Path:
        """The folder of results and videos."""
        return self.path / "evaluation"

    def write(self, description: dict[str, Any]) -> None:
        """Write run.json."""
        content = {"format": FORMAT, "version": VERSION, **description}
        sealed.write(self.description, content)

    def update(self, values: dict[str, Any]) -> None:
        """Replace the values of some keys in run.json."""
        self.write({**self._read(dict[str, Any]), **values})

    def read(self) -> Description:
        """Read run.json.

        Raises:
            UserError: there is no run, or run.json is damaged, changed or of another version.
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
        """Delete the temporary files that a kill left. Only the directory's owner may call this."""
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
            UserError: the directory is not empty.
        """
        # A run that is killed before it writes run.json leaves at most this file and hidden files.
        leftovers = {self.conditioning.name}
        if self.path.exists() and any(
            file.name not in leftovers and not file.name.startswith(".")
            for file in self.path.iterdir()
        ):
            raise UserError(
                f"{self.path} is not empty: go on with --resume {shlex.quote(str(self.path))}, or "
                "name another --output"
            )
