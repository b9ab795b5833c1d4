"""A training run and its directory: steps, metrics, checkpoints, evaluations."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal

from ..config import TrainConfig
from ..data.inputs import TaskConditioning, load_conditioning
from ..data.store import DataStore
from ..devices import check_device
from ..errors import UserError
from ..policies.decision import Policy
from ..progress import progress_bar
from ..results import EvaluationResult
from ..rollout import Request, play
from .checkpoint import (
    checkpoint_steps,
    load_checkpoint,
    prune_checkpoints,
    read_run,
    save_checkpoint,
)
from .metrics import Metrics
from .trainer import StepResult, Trainer

console = Console()


class Run:
    """Drives a trainer to its last step and keeps the run's directory.

    Args:
        path: the run's directory.
        config: the run's settings.
        trainer: at the step where the run stands.
        conditioning: one entry per task; index = task id.
    """

    def __init__(
        self,
        path: Path,
        config: TrainConfig,
        trainer: Trainer,
        conditioning: Sequence[TaskConditioning],
    ):
        self.path = path
        self.config = config
        self.trainer = trainer
        self.conditioning = conditioning
        self._unlogged: list[StepResult] = []
        self._stop: signal.Signals | None = None

    @classmethod
    def resume(cls, path: Path, config: TrainConfig) -> Run:
        """Take up a run at its last checkpoint, or at the start if it has none.

        Raises:
            UserError: data or device are not there, or the checkpoint is of another model size.
        """
        assert config.data is not None
        device = check_device(config.device)
        names = read_run(path)["tasks"]
        store = DataStore.open(config.data)
        store.verify()
        conditioning = load_conditioning(path / "conditioning.safetensors", names)
        trainer = Trainer(config, [store.task(name) for name in names], conditioning, device)
        if checkpoint_steps(path):
            trainer.load(load_checkpoint(path))
        return cls(path, config, trainer, conditioning)

    def train(self) -> None:
        """Train to the last step, evaluate, and print the result and where everything is.

        Ctrl-C and SIGTERM write a checkpoint and end the program.

        Raises:
            UserError: a loss became NaN or infinite.
        """
        self._announce()
        result: EvaluationResult | None = None
        with contextlib.closing(Metrics(self.path, self.trainer.step)) as metrics:
            while True:
                self._train_to(self._next_evaluation(), metrics)
                if self._evaluation_due() and self.trainer.step not in metrics.successes:
                    result = self._evaluate(metrics)
                if self.trainer.step == self.config.steps:
                    break
            self._report(result, metrics.best)

    def _next_evaluation(self) -> int:
        every, steps = self.config.evaluate_every, self.config.steps
        return min((self.trainer.step // every + 1) * every, steps) if every else steps

    def _evaluation_due(self) -> bool:
        step, every = self.trainer.step, self.config.evaluate_every
        scheduled = step == self.config.steps or (every and step and step % every == 0)
        return bool(scheduled and self.config.evaluation_episodes)

    def _train_to(self, step: int, metrics: Metrics) -> None:
        """Take the steps up to `step`, and save a checkpoint there."""
        with self._stoppable(), _Line(self.config.steps, self.trainer.step) as line:
            while self.trainer.step < step and self._stop is None:
                self._advance(metrics, line)
            if self._unlogged:
                line.show(self.trainer.step, self._flush(metrics))
        self._save(metrics)
        if self._stop is not None:
            console.print(
                f"stopped by {self._stop.name} after step {self.trainer.step}; go on with: "
                f"python -m harmodt.train --resume {self.path}",
                soft_wrap=True,
            )
            sys.exit(128 + self._stop)

    def _advance(self, metrics: Metrics, line: _Line) -> None:
        """One step, with the mask update, metrics and checkpoint that are due."""
        trainer, config = self.trainer, self.config
        if trainer.mask_update_due():
            self._update_masks(metrics)
        self._unlogged.append(trainer.train_step())
        if trainer.step % config.log_every == 0:
            line.show(trainer.step, self._flush(metrics))
        if trainer.step % config.checkpoint_every == 0:
            self._flush(metrics)
            self._save(metrics)

    def _update_masks(self, metrics: Metrics) -> None:
        self._flush(metrics)
        try:
            update = self.trainer.update_masks()
        except ValueError as error:
            what = f"a gradient or loss of the mask update after step {self.trainer.step}"
            raise UserError(self._broken(what)) from error
        values = {"harmony": update.harmony, "moved_weights": int(update.moved.max())}
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
            task = self.conditioning[self._unlogged[row].tasks[group]].name
            raise UserError(self._broken(f"the loss of step {step}, task {task},"))
        names = [task.name for task in self.conditioning]
        metrics.write_steps(self.trainer.step, self.config, names, self._unlogged, losses)
        self._unlogged = []
        return float(losses.mean())

    def _broken(self, what: str) -> str:
        steps = checkpoint_steps(self.path)
        last = (
            f"the last good checkpoint is {self.path / 'checkpoints' / f'{steps[-1]:08d}'}"
            if steps
            else "there is no checkpoint yet"
        )
        return f"{what} is NaN or infinite; {last}; try a lower learning_rate"

    def _save(self, metrics: Metrics) -> None:
        trainer = self.trainer
        if trainer.step not in checkpoint_steps(self.path):
            save_checkpoint(self.path, trainer.step, trainer.tensors())
        best = metrics.best[0] if metrics.best else None
        prune_checkpoints(self.path, self.config.keep_checkpoints, best)

    def _evaluate(self, metrics: Metrics) -> EvaluationResult:
        """Evaluate the present weights and save the result."""
        trainer = self.trainer
        bits = trainer.masks.bits if trainer.masks else None
        policy = Policy(
            trainer.model, bits, self.conditioning, self.config, trainer.step, trainer.backend,
            self.config.precision,
        )  # fmt: skip
        result = play(policy, Request(episodes=self.config.evaluation_episodes), console=console)
        trainer.model.train()
        result.save(self.path / "evaluation")
        values = {"success": result.average.mean, "mean_return": result.mean_return}
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
        trainer = self.trainer
        parameters = sum(p.numel() for p in trainer.model.parameters())
        masks = f"{decimal(trainer.masks.bits.nbytes)} of masks, " if trainer.masks else ""
        goes_on = f" (goes on after step {trainer.step})" if trainer.step else ""
        console.print(
            f"{self.config.algorithm} on {trainer.tasks} tasks: {parameters / 1e6:.2f} M "
            f"parameters, {masks}{self.config.device}, {trainer.backend.name} kernels\n"
            f"run: {self.path}{goes_on}",
            soft_wrap=True,
        )

    def _report(self, result: EvaluationResult | None, best: tuple[int, float] | None) -> None:
        if result is not None:
            console.print(result.table())
        if best is not None and best[0] != self.trainer.step:
            console.print(f"best success {best[1]:.2f} at step {best[0]}; the table is the last")
        console.print(f"run: {self.path}", soft_wrap=True)


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
