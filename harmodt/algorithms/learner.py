"""What an algorithm is to the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ..checkpoint import Checkpoint
from ..config import AlgorithmSettings, TrainConfig
from ..data.inputs import TaskConditioning
from ..data.store import TaskData
from ..devices import Execution
from ..environments import EnvironmentSpec
from ..policies import Policy
from ..settings import settings


@dataclass(frozen=True)
class Setup:
    """What a learner or a policy is built from.

    Attributes:
        config: the run's settings.
        environment: what its tasks are tasks of.
        conditioning: one entry per task; index = task id.
        execution: where and how to compute.
    """

    config: TrainConfig
    environment: EnvironmentSpec
    conditioning: tuple[TaskConditioning, ...]
    execution: Execution


@dataclass(frozen=True)
class StepResult:
    """One training step: its tasks' ids, losses [G] and the norm of the unclipped gradient."""

    task_ids: Sequence[int]
    losses: Tensor
    gradient_norm: Tensor


class Learner(Protocol):
    """All that training changes, and the step that changes it.

    Networks, masks and optimisers are the learner's own. It counts no steps: a step is told its
    number, and whatever is random in it follows from that and the run's seed.
    """

    def train_step(self, step: int) -> StepResult:
        """Learn from a batch of some tasks; steps are numbered from 1."""

    def before_step(self, step: int) -> dict[str, float]:
        """Do what is due after `step` steps and before the next; returns what is to be logged.

        Raises:
            NotFinite: a gradient or a loss is NaN or infinite.
            UserError: it cannot be done with these gradients, though they are finite.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name.

        What is copied into them is taken up by `resume_training`.
        """

    def policy(self, step: int) -> Policy:
        """What was learned in `step` steps, as a policy; it shares the learner's tensors."""

    def describe(self) -> dict[str, Any]:
        """Numbers for the run's description: `parameters`, and what there is to say of masks."""

    def resume_training(self) -> None:
        """Take up training after the policy was used, or from tensors that were copied here."""


@dataclass(frozen=True)
class Algorithm:
    """A row of the table of algorithms.

    Attributes:
        settings: its own settings.
        learner: builds one from a setup and the data of its tasks.
        policy: builds one from a setup and a checkpoint.
        defaults: what other settings are where a preset does not say, by name.
        unread: other settings that mean nothing to it, by name: nobody is to give them.
    """

    settings: type[AlgorithmSettings]
    learner: Callable[[Setup, Sequence[TaskData]], Learner]
    policy: Callable[[Setup, Checkpoint], Policy]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def reads(self, name: str) -> bool:
        """Whether a setting of that name means something to it."""
        return name in dict(settings(self.settings())) or (
            name in dict(settings(TrainConfig())) and name not in self.unread
        )
