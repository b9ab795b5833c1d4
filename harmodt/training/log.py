"""Logs a run's steps: writes metrics and costs into the run's directory, and shows a live line."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ..algorithms import Setup, StepResult
from ..algorithms.optimiser import learning_rate
from ..progress import PlainConsole, progress_bar
from ..rundir import RunDirectory
from .advice import after_not_finite
from .costs import Costs
from .metrics import Metrics


class Log:
    """Collects the results of steps; `flush` writes their means.

    The results stay on the device until `flush`, so that no step waits for a GPU.

    Args:
        metrics: the run's metrics.
        costs: the run's costs.
        directory: the run's directory.
        setup: the run's settings, tasks and device.
        console: shows the live line.
    """

    def __init__(
        self,
        metrics: Metrics,
        costs: Costs,
        directory: RunDirectory,
        setup: Setup,
        console: PlainConsole,
    ):
        self.metrics = metrics
        self.costs = costs
        self.console = console
        self._directory = directory
        self._config = setup.config
        self._tasks = tuple(task.name for task in setup.conditioning)
        self._results: list[StepResult] = []
        self._line: _Line | None = None

    @contextlib.contextmanager
    def progress(self, step: int) -> Iterator[None]:
        """Show a live line while the steps after `step` are taken."""
        self._line = _Line(self._config.optimisation.steps, step, self.console)
        with self._line.bar:
            yield
        self._line = None

    def add(self, result: StepResult) -> None:
        """Collect the result of a step."""
        self._results.append(result)

    def flush(self, step: int) -> None:
        """Write the means over the collected results, and show the mean loss.

        Args:
            step: the step of the last result.

        Raises:
            UserError: a loss is NaN or infinite.
        """
        if not self._results:
            return
        losses = torch.stack([result.losses for result in self._results]).cpu()
        self._check_finite(step, losses)
        rate = learning_rate(step, self._config.optimisation)
        loss = self.metrics.write_steps(step, rate, self._tasks, self._results, losses)
        self.costs.write(step)
        self._results = []
        if self._line is not None:
            self._line.show(step, loss)

    def _check_finite(self, last: int, losses: Tensor) -> None:
        bad = (~torch.isfinite(losses)).nonzero().tolist()
        if bad:
            row, group = bad[0]
            step = last - len(losses) + 1 + row
            task = self._tasks[self._results[row].task_ids[group]]
            what = f"the loss of step {step}, task {task}, is NaN or infinite"
            raise after_not_finite(what, self._directory, self._config, changed=step > 1)


class _Line:
    """The live line of a training run. Without a terminal it prints a plain line about 20 times in
    a run.

    Attributes:
        bar: the progress bar; it is drawn inside a `with` block.
    """

    def __init__(self, steps: int, done: int, console: PlainConsole):
        self.bar = progress_bar("steps", "loss", "rate", console=console)
        self._training = self.bar.add_task("training", total=steps, completed=done)
        self._console = console
        self._steps = steps
        self._began = (time.monotonic(), done)
        self._printed = done

    def show(self, step: int, loss: float) -> None:
        """Show the step and its loss."""
        seconds = time.monotonic() - self._began[0]
        rate = (step - self._began[1]) / seconds
        self.bar.update(
            self._training, completed=step, loss=f"loss {loss:.4f}", rate=f"{rate:.1f} steps/s"
        )
        if not self._console.is_terminal and step - self._printed >= self._steps / 20:
            self._printed = step
            left = (self._steps - step) / rate
            self._console.print(
                f"step {step}/{self._steps}  loss {loss:.4f}  {rate:.1f} steps/s  {left:.0f} s left"
            )
