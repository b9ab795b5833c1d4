"""A run: opened in one place; its steps, metrics, checkpoints and evaluations."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from rich.filesize import decimal

from ..algorithms import Setup, StepResult, config_from_json, find
from ..algorithms.optimiser import learning_rate
from ..algorithms.unseen import Unseen, unseen_policy
from ..checkpoint import (
    checkpoint_steps,
    clear_temporaries,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from ..config import Precision, TrainConfig
from ..data.inputs import TaskConditioning, load_conditioning, save_conditioning
from ..data.store import DataStore, TaskData
from ..devices import Execution
from ..environments import EnvironmentSpec, family
from ..errors import UserError, going_on
from ..policies import Policy, Sampler
from ..progress import PlainConsole, progress_bar
from ..results import EvaluationResult, versions
from ..rollout import Request, play
from ..rundir import RunDirectory
from ..settings import change, check, from_json, settings, to_json
from .costs import Costs
from .metrics import Metrics
from .stop import Output, Stop, Stopped
from .trainer import Trainer

output = Output()
console = PlainConsole(file=output)


@dataclass(frozen=True)
class SavedRun:
    """What a run's directory says of the run.

    Attributes:
        directory: where it is.
        config: its settings.
        environment: what its tasks are tasks of.
        conditioning: one entry per task; index = task id.
        store: the checksum of the store that it trains on.
    """

    directory: RunDirectory
    config: TrainConfig
    environment: EnvironmentSpec
    conditioning: tuple[TaskConditioning, ...]
    store: str

    @classmethod
    def open(cls, path: Path) -> SavedRun:
        """Read a run's directory.

        Raises:
            UserError: there is no run, or it is damaged or of another version.
        """
        directory = RunDirectory(path)
        description, where = directory.read(), directory.description
        config = config_from_json(description.config, f"config in {where}")
        environment = from_json(EnvironmentSpec, description.environment, f"environment in {where}")
        conditioning = load_conditioning(
            directory.conditioning, description.tasks, environment, description.conditioning
        )
        return cls(directory, config, environment, tuple(conditioning), description.store)

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
    unseen: Unseen | None = None,
    sampler: Sampler | None = None,
    sampling_steps: int | None = None,
) -> Policy:
    """What a run has learned; the same as `harmodt.load_policy`, which describes it."""
    saved = _with_plans(SavedRun.open(path), sampler, sampling_steps)
    trained = saved.config.run
    execution = Execution.choose(
        trained.device if device is None else device,
        trained.fused if fused is None else fused,
        trained.precision if precision is None else precision,
        trained.graph,
    )
    setup = saved.setup(execution)
    state = load_checkpoint(saved.directory, checkpoint)
    if unseen is None:
        return find(saved.config.algorithm).policy(setup, state)
    return unseen_policy(setup, state, unseen, *_open_unseen(unseen, saved))


def _with_plans(saved: SavedRun, sampler: Sampler | None, steps: int | None) -> SavedRun:
    """The run with its plans drawn in the way that is asked for, if any is."""
    if sampler is None and steps is None:
        return saved
    if sampler not in (None, *get_args(Sampler)):
        raise UserError(f"sampler is {sampler!r}: give {' or '.join(get_args(Sampler))}")
    if sampler == "ddpm" and steps is not None:
        raise UserError("ddpm goes through all steps of the diffusion: leave sampling_steps out")
    asked = {"sampler": sampler or "ddim"} | ({} if steps is None else {"sampling_steps": steps})
    if asked.keys() - dict(settings(saved.config)).keys():
        raise UserError(
            "the run's algorithm does not plan: leave --sampler and --sampling-steps out"
        )
    config = change(saved.config, asked)
    check(config)
    return replace(saved, config=config)


def _open_unseen(unseen: Unseen, saved: SavedRun) -> tuple[list[TaskData], str]:
    """The data of the unseen tasks, and the checksum of their store."""
    store = DataStore.open(unseen.store)
    ours, theirs = saved.environment, store.environment
    if replace(theirs, reward_version=ours.reward_version) != ours:
        raise UserError(
            f"{store.path} holds data of {theirs.family} and the run was trained on {ours.family}: "
            "name a store of the run's family"
        )
    names = family(ours.family).resolve_tasks(unseen.tasks) if unseen.tasks else store.tasks
    tasks = [store.task(name) for name in names]
    store.verify(prompts_of=names)
    return tasks, store.checksum


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
        self._stop = Stop()

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
        execution = _execution(config)
        data = [store.task(name) for name in tasks]
        conditioning = tuple(TaskConditioning.from_data(task, config) for task in data)
        setup = Setup(config, store.environment, conditioning, execution)
        trainer = Trainer(setup, data)
        directory = RunDirectory(path)
        directory.check_empty()
        path.mkdir(parents=True, exist_ok=True)
        run = uuid.uuid4().hex
        places = {"output": path.absolute(), "data": store.path.absolute()}
        directory.write(
            {
                "id": run,
                "preset": preset,
                "tasks": list(tasks),
                "environment": store.environment.to_json(),
                "store": store.checksum,
                "episode_length": store.longest_episode(tasks),
                "conditioning": save_conditioning(directory.conditioning, conditioning, run),
                "device": str(execution.device),
                "backend": execution.backend.name,
                "operations": dict(execution.backend.implementations),
                **trainer.learner.describe(),
                "versions": versions(family(store.environment.family).packages),
                "config": to_json(change(config, places)),
            }
        )
        return cls(directory, trainer)

    @classmethod
    def resume(cls, saved: SavedRun, config: TrainConfig) -> Run:
        """Take up a run at its last checkpoint, or at the start if it has none.

        Args:
            config: its settings; those that differ from the saved ones are recorded in run.json.

        Raises:
            UserError: data or device are not there, the data are others, or the checkpoint is
                damaged, of another model size or beyond the last step.
        """
        execution = _execution(config)
        store = _open_store(saved, config)
        setup = replace(saved.setup(execution), config=config)
        trainer = Trainer(setup, [store.task(task.name) for task in saved.conditioning])
        if checkpoint_steps(saved.directory):
            trainer.load(load_checkpoint(saved.directory))
        if trainer.step > config.optimisation.steps:
            raise UserError(
                f"the last checkpoint of {saved.directory.path} is of step {trainer.step}, and its "
                f"run.json asks for {config.optimisation.steps} steps: restore run.json from a copy"
            )
        _record_changes(saved, config, trainer.step)
        return cls(saved.directory, trainer)

    def train(self) -> None:
        """Train to the last step, evaluate, and print the result and where everything is.

        Ctrl-C, SIGTERM, SIGHUP and an output that is closed write a checkpoint and end the
        program.

        Raises:
            UserError: a loss or a weight became NaN or infinite.
        """
        output.stop = self._stop
        try:
            with self._stop.handled(), going_on(f"go on with: {self._command()}"):
                self._announce()
                with (
                    contextlib.closing(Metrics(self.directory, self.trainer.step)) as metrics,
                    contextlib.closing(self._open_costs()) as self._costs,
                ):
                    result = self._train(metrics)
                self._report(result, metrics.best)
        finally:
            output.stop = None

    def _open_costs(self) -> Costs:
        device = self.trainer.setup.execution.device
        return Costs(self.directory, self.trainer.step, device)

    def _train(self, metrics: Metrics) -> EvaluationResult | None:
        """Train to the last step; returns the last evaluation, if there was one."""
        clear_temporaries(self.directory)
        result: EvaluationResult | None = None
        while True:
            # First, because a run that goes on may have ended just before an evaluation.
            if self._evaluation_due() and self.trainer.step not in metrics.scores:
                result = self._evaluate(metrics)
            if self.trainer.step >= self.steps:
                return result
            self._train_to(self._next_evaluation(), metrics)

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
        with _Line(self.steps, self.trainer.step) as line:
            while self.trainer.step < step and self._stop.signal is None:
                self._advance(metrics, line)
            if self._unlogged:
                line.show(self.trainer.step, self._flush(metrics))
        self._save(metrics)
        if self._stop.signal is not None:
            self._end()

    def _end(self) -> NoReturn:
        """Say why the run ends before its last step, and how to go on."""
        assert self._stop.signal is not None
        closed = self._stop.signal is signal.SIGPIPE
        with contextlib.suppress(OSError):
            (PlainConsole(stderr=True) if closed else console).print(
                f"stopped by {self._stop.signal.name} after step {self.trainer.step}; go on with: "
                f"{self._command()}",
                soft_wrap=True,
            )
        sys.exit(128 + self._stop.signal)

    def _command(self) -> str:
        return f"python -m harmodt.train --resume {shlex.quote(str(self.directory.path))}"

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
            with self._costs.of("masks and harmony"):
                values = self.trainer.before_step()
        except ValueError as error:
            self._flush(metrics)  # names the task if its loss was the first to break
            what = f"a gradient or loss of the mask update after step {self.trainer.step}"
            raise UserError(self._broken(what, self.trainer.step > 0)) from error
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
            raise UserError(self._broken(f"the loss of step {step}, task {task},", step > 1))
        step = self.trainer.step
        rate = learning_rate(step, self.config.optimisation)
        metrics.write_steps(step, rate, self.tasks, self._unlogged, losses)
        self._unlogged = []
        self._costs.write(step)
        return float(losses.mean())

    def _broken(self, what: str, changed: bool) -> str:
        """What to do about a number that is not finite; `changed`: a step was taken before it."""
        if not changed:
            return (
                f"{what} is NaN or infinite before any weight was changed: look at the data with "
                f"python -m harmodt.data info {shlex.quote(str(self.config.data.data))}"
            )
        steps = checkpoint_steps(self.directory)
        last = (
            f"from the last good checkpoint, {self.directory.checkpoint(steps[-1])},"
            if steps
            else "from the start"
        )
        rate = self.config.optimisation.learning_rate / 3
        return (
            f"{what} is NaN or infinite: go on {last} at a lower rate with {self._command()} "
            f"--learning-rate {rate:.2g}"
        )

    def _save(self, metrics: Metrics) -> None:
        trainer = self.trainer
        metrics.sync()
        if trainer.step not in checkpoint_steps(self.directory):
            tensors = trainer.tensors()
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise UserError(self._broken(f"{name} after step {trainer.step}", True))
            with self._costs.of("checkpoints"):
                save_checkpoint(self.directory, trainer.step, tensors)
            self._costs.write(trainer.step)
        best = metrics.best[0] if metrics.best else None
        prune_checkpoints(self.directory, self.config.run.keep_checkpoints, best)

    def _evaluate(self, metrics: Metrics) -> EvaluationResult:
        """Evaluate the present weights and save the result."""
        trainer = self.trainer
        request = Request(
            episodes=self.config.evaluation.evaluation_episodes,
            episode_length=self.directory.read().episode_length,
        )
        try:
            with self._stop.at_once(), self._costs.of("evaluations"):
                result = play(trainer.learner.policy(trainer.step), request, console=console)
        except Stopped:  # the checkpoint is there; the evaluation is repeated
            self._end()
        trainer.learner.resume_training()
        result.save(self.directory.evaluation)
        values = {"mean_return": result.mean_return}
        if result.success_rate is not None:
            values["success"] = result.success_rate
        metrics.write(trainer.step, values)
        self._costs.write(trainer.step)
        return result

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
        run = self.directory.path
        console.print(f"run: {run}", soft_wrap=True)
        report = f"python -m harmodt.report {shlex.quote(str(run))}"
        console.print(f"as a page to look at: {report}", soft_wrap=True)


def _execution(config: TrainConfig) -> Execution:
    run = config.run
    return Execution.choose(run.device, run.fused, run.precision, run.graph)


def _open_store(saved: SavedRun, config: TrainConfig) -> DataStore:
    """The store that a run trains on, wherever it is now.

    Raises:
        UserError: it is not there, or another one is.
    """
    path = config.data.data
    assert path is not None
    if not path.exists():
        raise UserError(
            f"the store {path} of the run {saved.directory.path} is not there: name where it is "
            "now with --data"
        )
    store = DataStore.open(path)
    if store.checksum != saved.store:
        raise UserError(
            f"the store {path} is not the one that the run {saved.directory.path} was trained on: "
            "name that one, wherever it is now, with --data"
        )
    store.verify()
    return store


def _record_changes(saved: SavedRun, config: TrainConfig, step: int) -> None:
    """Write settings that differ from the saved ones into run.json."""
    assert config.data.data is not None
    config = change(config, {"data": config.data.data.absolute()})
    before, after = dict(settings(saved.config)), dict(settings(config))
    changes = [
        {"step": step, "setting": name, "from": _plain(before[name]), "to": _plain(after[name])}
        for name in after
        if after[name] != before[name]
    ]
    if changes:
        earlier = saved.directory.read().changes
        saved.directory.update({"config": to_json(config), "changes": [*earlier, *changes]})


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


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
