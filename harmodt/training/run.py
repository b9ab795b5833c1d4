"""A run: opened in one place; its steps, metrics, checkpoints and evaluations."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from ..algorithms import Setup, StepResult, config_from_json, find
from ..algorithms.optimiser import learning_rate
from ..checkpoint import checkpoint_steps, load_checkpoint, prune_checkpoints, save_checkpoint
from ..config import Precision, TrainConfig
from ..data.inputs import TaskConditioning, load_conditioning, save_conditioning
from ..data.store import DataStore
from ..devices import Execution
from ..environments import EnvironmentSpec, family
from ..errors import UserError
from ..policies import Policy
from ..progress import PlainConsole, progress_bar
from ..results import EvaluationResult, versions
from ..rollout import Request, play
from ..rundir import RunDirectory
from ..settings import from_json, to_json
from .metrics import Metrics
from .trainer import Trainer

console = PlainConsole()


@dataclass(frozen=True)
class SavedRun:
    """What a run's directory says of the run.

    Attributes:
        directory: where it is.
        config: its settings.
        environment: what its tasks are tasks of.
        conditioning: one entry per task; index = task id.
    """

    directory: RunDirectory
    config: TrainConfig
    environment: EnvironmentSpec
    conditioning: tuple[TaskConditioning, ...]

    @classmethod
    def open(cls, path: Path) -> SavedRun:
        """Read a run's directory.

        Raises:
            UserError: there is no run, or it is damaged or of another version.
        """
        directory = RunDirectory(path)
        description, where = directory.read(), directory.description
        environment = description.get("environment")
        return cls(
            directory,
            config_from_json(description.get("config"), f"config in {where}"),
            from_json(EnvironmentSpec, environment, f"environment in {where}"),
            tuple(load_conditioning(directory.conditioning, description["tasks"])),
        )

    def setup(self, execution: Execution) -> Setup:
        """What its learner or policy is built from."""
        return Setup(self.config, self.environment, self.conditioning, execution)


def load_policy(
    path: Path,
    checkpoint: int | None = None,
    *,
    device: str | None = None,
    fused: bool | None = None,
    precision: Precision | None = None,
) -> Policy:
    """What a run has learned; the same as `harmodt.load_policy`, which describes it."""
    saved = SavedRun.open(path)
    trained = saved.config.run
    execution = Execution.choose(
        trained.device if device is None else device,
        trained.fused if fused is None else fused,
        trained.precision if precision is None else precision,
    )
    state = load_checkpoint(saved.directory, checkpoint)
    return find(saved.config.algorithm).policy(saved.setup(execution), state)


class Run:
    """Drives a trainer to its last step and keeps the run's directory.

    Args:
        directory: the run's directory.
        trainer: at the step where the run stands.
    """

    def __init__(self, directory: RunDirectory, trainer: Trainer):
        self.directory = directory
        self.trainer = trainer
        self.config = trainer.setup.config
        self.tasks = tuple(task.name for task in trainer.setup.conditioning)
        self._unlogged: list[StepResult] = []
        self._stop: signal.Signals | None = None

    @classmethod
    def begin(
        cls,
        path: Path,
        preset: str,
        config: TrainConfig,
        store: DataStore,
        tasks: Sequence[str],
    ) -> Run:
        """Begin a run: build everything, then make its directory.

        Raises:
            UserError: settings, data or device that cannot work; nothing is written then.
        """
        settings = config.run
        execution = Execution.choose(settings.device, settings.fused, settings.precision)
        data = [store.task(name) for name in tasks]
        conditioning = tuple(TaskConditioning.from_data(task, config) for task in data)
        setup = Setup(config, store.environment, conditioning, execution)
        trainer = Trainer(setup, data)
        directory = RunDirectory(path)
        directory.check_empty()
        path.mkdir(parents=True, exist_ok=True)
        save_conditioning(directory.conditioning, conditioning)
        in_place = dataclasses.replace(config, run=dataclasses.replace(settings, output=path))
        directory.write(
            {
                "preset": preset,
                "tasks": list(tasks),
                "environment": store.environment.to_json(),
                "store": store.checksum,
                "device": str(execution.device),
                "backend": execution.backend.name,
                "operations": dict(execution.backend.implementations),
                **trainer.learner.describe(),
                "versions": versions(family(store.environment.family).packages),
                "config": to_json(in_place),
            }
        )
        return cls(directory, trainer)

    @classmethod
    def resume(cls, saved: SavedRun, config: TrainConfig) -> Run:
        """Take up a run at its last checkpoint, or at the start if it has none.

        Args:
            config: its settings, which may differ in those that its result does not depend on.

        Raises:
            UserError: data or device are not there, or the checkpoint is of another model size.
        """
        assert config.data.data is not None
        settings = config.run
        execution = Execution.choose(settings.device, settings.fused, settings.precision)
        store = DataStore.open(config.data.data)
        store.verify()
        setup = dataclasses.replace(saved.setup(execution), config=config)
        trainer = Trainer(setup, [store.task(task.name) for task in saved.conditioning])
        if checkpoint_steps(saved.directory):
            trainer.load(load_checkpoint(saved.directory))
        return cls(saved.directory, trainer)

    def train(self) -> None:
        """Train to the last step, evaluate, and print the result and where everything is.

        Ctrl-C and SIGTERM write a checkpoint and end the program.

        Raises:
            UserError: a loss became NaN or infinite.
        """
        self._announce()
        result: EvaluationResult | None = None
        with contextlib.closing(Metrics(self.directory, self.trainer.step)) as metrics:
            while True:
                self._train_to(self._next_evaluation(), metrics)
                if self._evaluation_due() and self.trainer.step not in metrics.scores:
                    result = self._evaluate(metrics)
                if self.trainer.step == self.steps:
                    break
            self._report(result, metrics.best)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.optimisation.steps

    def _next_evaluation(self) -> int:
        every = self.config.evaluation.evaluate_every
        return min((self.trainer.step // every + 1) * every, self.steps) if every else self.steps

    def _evaluation_due(self) -> bool:
        step, every = self.trainer.step, self.config.evaluation.evaluate_every
        scheduled = step == self.steps or (every and step and step % every == 0)
        return bool(scheduled and self.config.evaluation.evaluation_episodes)

    def _train_to(self, step: int, metrics: Metrics) -> None:
        """Take the steps up to `step`, and save a checkpoint there."""
        with self._stoppable(), _Line(self.steps, self.trainer.step) as line:
            while self.trainer.step < step and self._stop is None:
                self._advance(metrics, line)
            if self._unlogged:
                line.show(self.trainer.step, self._flush(metrics))
        self._save(metrics)
        if self._stop is not None:
            console.print(
                f"stopped by {self._stop.name} after step {self.trainer.step}; go on with: "
                f"python -m harmodt.train --resume {self.directory.path}",
                soft_wrap=True,
            )
            sys.exit(128 + self._stop)

    def _advance(self, metrics: Metrics, line: _Line) -> None:
        """One step, with the mask update, metrics and checkpoint that are due."""
        trainer, settings = self.trainer, self.config.run
        self._before_step(metrics)
        self._unlogged.append(trainer.train_step())
        if trainer.step % settings.log_every == 0:
            line.show(trainer.step, self._flush(metrics))
        if trainer.step % settings.checkpoint_every == 0:
            self._flush(metrics)
            self._save(metrics)

    def _before_step(self, metrics: Metrics) -> None:
        try:
            values = self.trainer.before_step()
        except ValueError as error:
            self._flush(metrics)  # names the task if its loss was the first to break
            what = f"a gradient or loss of the mask update after step {self.trainer.step}"
            raise UserError(self._broken(what)) from error
        if values:
            self._flush(metrics)
            metrics.write(self.trainer.step, values)

    def _flush(self, metrics: Metrics) -> float:
        """Write the steps since the last call to the metrics; returns their mean loss, or NaN.

        Raises:
            UserError: a loss was NaN or infinite.
        """
        if not self._unlogged:
            return float("nan")
        losses = torch.stack([result.losses for result in self._unlogged]).cpu()
        bad = (~torch.isfinite(losses)).nonzero().tolist()
        if bad:
            row, group = bad[0]
            step = self.trainer.step - len(losses) + 1 + row
            task = self.tasks[self._unlogged[row].task_ids[group]]
            raise UserError(self._broken(f"the loss of step {step}, task {task},"))
        step = self.trainer.step
        rate = learning_rate(step, self.config.optimisation)
        metrics.write_steps(step, rate, self.tasks, self._unlogged, losses)
        self._unlogged = []
        return float(losses.mean())

    def _broken(self, what: str) -> str:
        steps = checkpoint_steps(self.directory)
        last = (
            f"the last good checkpoint is {self.directory.checkpoint(steps[-1])}"
            if steps
            else "there is no checkpoint yet"
        )
        return f"{what} is NaN or infinite; {last}; try a lower learning_rate"

    def _save(self, metrics: Metrics) -> None:
        trainer = self.trainer
        if trainer.step not in checkpoint_steps(self.directory):
            save_checkpoint(self.directory, trainer.step, trainer.tensors())
        best = metrics.best[0] if metrics.best else None
        prune_checkpoints(self.directory, self.config.run.keep_checkpoints, best)

    def _evaluate(self, metrics: Metrics) -> EvaluationResult:
        """Evaluate the present weights and save the result."""
        trainer = self.trainer
        request = Request(episodes=self.config.evaluation.evaluation_episodes)
        result = play(trainer.learner.policy(trainer.step), request, console=console)
        trainer.learner.resume_training()
        result.save(self.directory.evaluation)
        values = {"mean_return": result.mean_return}
        if result.success_rate is not None:
            values["success"] = result.success_rate
        metrics.write(trainer.step, values)
        return result

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the run after the present step."""
        handlers = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        self._stop = signal.Signals(number)

    def _announce(self) -> None:
        trainer, execution = self.trainer, self.trainer.setup.execution
        numbers = trainer.learner.describe()
        masks = f"{decimal(numbers['mask_bytes'])} of masks, " if "mask_bytes" in numbers else ""
        goes_on = f" (goes on after step {trainer.step})" if trainer.step else ""
        console.print(
            f"{self.config.algorithm} on {trainer.task_count} tasks: "
            f"{numbers['parameters'] / 1e6:.2f} M parameters, {masks}{execution.device}, "
            f"{execution.backend.name} kernels\n"
            f"run: {self.directory.path}{goes_on}",
            soft_wrap=True,
        )

    def _report(self, result: EvaluationResult | None, best: tuple[int, float] | None) -> None:
        if result is not None:
            console.print(result.table())
        if best is not None and best[0] != self.trainer.step:
            success = self.trainer.setup.environment.success
            name = "success" if success else "mean return"
            console.print(f"best {name} {best[1]:.2f} at step {best[0]}; the table is the last")
        console.print(f"run: {self.directory.path}", soft_wrap=True)


class _Line:
    """The live line of a training run; without a terminal, a plain line now and then."""

    def __init__(self, steps: int, done: int):
        self._progress = progress_bar("steps", "loss", "rate", console=console)
        self._bar = self._progress.add_task("training", total=steps, completed=done)
        self._steps = steps
        self._began = (time.monotonic(), done)
        self._printed = done

    def __enter__(self) -> _Line:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def show(self, step: int, loss: float) -> None:
        """Show the step and its loss."""
        seconds = time.monotonic() - self._began[0]
        rate = (step - self._began[1]) / seconds
        self._progress.update(
            self._bar, completed=step, loss=f"loss {loss:.4f}", rate=f"{rate:.1f} steps/s"
        )
        if not console.is_terminal and step - self._printed >= self._steps / 20:
            self._printed = step
            left = (self._steps - step) / rate
            console.print(
                f"step {step}/{self._steps}  loss {loss:.4f}  {rate:.1f} steps/s  {left:.0f} s left"
            )
