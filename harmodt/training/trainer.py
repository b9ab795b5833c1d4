"""Takes the steps of a run, and makes evaluations and checkpoints when they are due."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from harmodt_kernels import NotFinite

from ..algorithms import Learner, Setup, StepResult, find
from ..checkpoint import (
    Checkpoint,
    checkpoint_steps,
    clear_temporaries,
    prune_checkpoints,
    save_checkpoint,
)
from ..data.store import TaskData
from ..draws import INITIALISE, Seeds
from ..errors import UserError
from ..progress import PlainConsole
from ..results import EvaluationResult
from ..rollout import Request, play
from ..rundir import RunDirectory
from .advice import after_not_finite
from .costs import Costs
from .log import Log
from .metrics import Metrics
from .stop import Stop, Stopped


class Trained(NamedTuple):
    """The result of training.

    Attributes:
        evaluation: the last evaluation of this call; None if none was due.
        best: step and score of the run's best evaluation; None without evaluations.
    """

    evaluation: EvaluationResult | None
    best: tuple[int, float] | None


class Trainer:
    """Trains a learner of any algorithm to the last step of its run.

    Every random draw of a step depends only on (seed, purpose, step). A resumed run therefore
    draws the same numbers as a run without interruption.

    Args:
        setup: the run's settings, tasks and device.
        data: one entry per task; index = task id.
        directory: the run's directory; only `train` writes there.

    Attributes:
        learner: the learner of the run's algorithm.
        step: the number of steps done so far.
        stop: if its signal is set, `train` ends before the last step.

    Raises:
        UserError: tasks_per_step is above the number of tasks, or a setting of the algorithm does
            not fit the model.
    """

    def __init__(self, setup: Setup, data: Sequence[TaskData], directory: RunDirectory):
        self.setup = setup
        self.directory = directory
        self.step = 0
        self.stop = Stop()
        self.learner = build_learner(setup, data)

    @property
    def steps(self) -> int:
        """Number of steps of the whole run."""
        return self.setup.config.optimisation.steps

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks; index = task id."""
        return tuple(task.name for task in self.setup.conditioning)

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: the checkpoint does not fit the model.
        """
        self.learner.load(checkpoint)
        self.step = checkpoint.step

    def before_step(self) -> dict[str, float]:
        """Let the learner prepare the next step, for example with a mask update.

        Returns:
            The numbers to log, by name.

        Raises:
            NotFinite: a gradient or a loss is NaN or infinite.
        """
        return self.learner.before_step(self.step)

    def train_step(self) -> StepResult:
        """Take the next training step."""
        self.step += 1
        return self.learner.train_step(self.step)

    def train(self, console: PlainConsole | None = None) -> Trained:
        """Train to the last step; evaluate, log and save checkpoints when they are due.

        Args:
            console: shows progress; by default a console on standard output.

        Raises:
            Stopped: `stop` has asked for the end. A checkpoint has the steps so far.
            UserError: a loss, a gradient or a weight became NaN or infinite.
        """
        clear_temporaries(self.directory)
        device = self.setup.execution.device
        with (
            contextlib.closing(Metrics(self.directory, self.step)) as metrics,
            contextlib.closing(Costs(self.directory, self.step, device)) as costs,
        ):
            console = console or PlainConsole()
            return self._train(Log(metrics, costs, self.directory, self.setup, console))

    def _train(self, log: Log) -> Trained:
        evaluation: EvaluationResult | None = None
        while True:
            # Evaluate first, because a resumed run may have ended just before an evaluation.
            if self._evaluation_is_due() and self.step not in log.metrics.scores:
                evaluation = self._evaluate(log)
            if self.step >= self.steps:
                return Trained(evaluation, log.metrics.best)
            self._train_to(self._next_evaluation(), log)

    def _next_evaluation(self) -> int:
        every = self.setup.config.evaluation.evaluate_every
        return min((self.step // every + 1) * every, self.steps) if every else self.steps

    def _evaluation_is_due(self) -> bool:
        evaluation = self.setup.config.evaluation
        every = evaluation.evaluate_every
        scheduled = self.step == self.steps or (every and self.step and self.step % every == 0)
        return bool(scheduled and evaluation.evaluation_episodes)

    def _train_to(self, step: int, log: Log) -> None:
        """Take the steps up to `step`, or until `stop` asks for the end, and save a checkpoint."""
        with log.progress(self.step):
            while self.step < step and self.stop.signal is None:
                self._advance(log)
            log.flush(self.step)
        self._save(log)
        if self.stop.signal is not None:
            raise Stopped

    def _advance(self, log: Log) -> None:
        """Take one step, with the mask update before it and the log and checkpoint after it."""
        run = self.setup.config.run
        self._update(log)
        log.add(self.train_step())
        saves = self.step % run.checkpoint_every == 0
        if saves or self.step % run.log_every == 0:
            log.flush(self.step)
        if saves:
            self._save(log)

    def _update(self, log: Log) -> None:
        """Prepare the next step, and log the numbers of the mask update or harmony score."""
        try:
            with log.costs.measure("masks and harmony"):
                values = self.before_step()
        except NotFinite as error:
            log.flush(self.step)  # if a step's loss is not finite, this error names the step
            what = f"after step {self.step}, task {self.tasks[error.task]}: {error.reason}"
            raise self._not_finite(what, changed=self.step > 0) from error
        if values:
            log.flush(self.step)
            log.metrics.write(self.step, values)

    def _save(self, log: Log) -> None:
        """Save a checkpoint, and delete old checkpoints."""
        log.metrics.sync()
        if self.step not in checkpoint_steps(self.directory):
            tensors = self.learner.tensors()
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    what = f"{name} after step {self.step} is NaN or infinite"
                    raise self._not_finite(what, changed=True)
            with log.costs.measure("checkpoints"):
                save_checkpoint(self.directory, self.step, tensors)
            log.costs.write(self.step)
        self._prune(log)

    def _prune(self, log: Log) -> None:
        """Delete all checkpoints except the last ones and the one with the best evaluation."""
        best = log.metrics.best[0] if log.metrics.best else None
        prune_checkpoints(self.directory, self.setup.config.run.keep_checkpoints, best)

    def _not_finite(self, what: str, changed: bool) -> UserError:
        return after_not_finite(what, self.directory, self.setup.config, changed)

    def _evaluate(self, log: Log) -> EvaluationResult:
        """Evaluate the present weights and save the result.

        Raises:
            Stopped: a signal came. The checkpoint of this step exists, so that a resumed run can
                repeat the evaluation.
        """
        request = Request(
            episodes=self.setup.config.evaluation.evaluation_episodes,
            episode_length=self.directory.read().episode_length,
        )
        with self.stop.at_once(), log.costs.measure("evaluations"):
            result = play(self.learner.policy(self.step), request, console=log.console)
        self.learner.resume_training()
        result.save(self.directory.evaluation)
        values = {"mean_return": result.mean_return}
        if result.success_rate is not None:
            values["success"] = result.success_rate
        log.metrics.write(self.step, values)
        log.costs.write(self.step)
        log.metrics.sync()
        self._prune(log)  # this evaluation may be the new best one
        return result


def build_learner(setup: Setup, data: Sequence[TaskData]) -> Learner[Any]:
    """Return the learner of the run's algorithm, with initial weights drawn from the run's seed."""
    Seeds(setup.config.run.seed).begin(INITIALISE, 0)
    learner = find(setup.config.algorithm).learner(setup)
    learner.prepare_training(data)
    return learner
