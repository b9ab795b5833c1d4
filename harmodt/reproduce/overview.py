"""Lists the experiments, and shows the runs of a plan with their estimated times."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table, box

from ..progress import PlainConsole, progress_bar
from ..settings import settings
from .estimate import STEPS, seconds_per_step
from .experiments import BUDGETS, EXPERIMENTS
from .jobs import Folder, Train
from .plan import Plan, Run, make_plan


def listing() -> Table:
    """Return a table of all experiments, with the number of runs at each budget."""
    table = Table(title="Experiments, and the number of runs at each budget", box=box.SIMPLE_HEAD)
    table.add_column("name", no_wrap=True)
    table.add_column("what")
    for budget in BUDGETS:
        table.add_column(budget, justify="right", no_wrap=True)
    for name, experiment in EXPERIMENTS.items():
        runs = (len(make_plan(name, budget).runs) for budget in BUDGETS)
        table.add_row(name, experiment.title, *map(str, runs))
    return table


def overview(
    plan: Plan, folder: Folder, slots: int, console: PlainConsole
) -> Iterator[RenderableType]:
    """Yield a table of a plan's runs and their estimated times, and a sentence on the total.

    Args:
        plan: the plan.
        folder: the folder of data and runs.
        slots: the number of runs at a time.
        console: draws a bar while steps are measured.

    Raises:
        UserError: the directory of a run holds a damaged run, or something else.
    """
    left = {run.name: run.steps - (Train(folder, run).step or 0) for run in plan.runs}
    step = _measure(plan, left, console)
    table = Table(title=f"{plan.name}: {plan.experiment.title}", box=box.SIMPLE_HEAD)
    for heading in ("column", "variant", "runs", "steps each", "done", "a step", "left"):
        table.add_column(heading, justify="left" if heading in ("column", "variant") else "right")
    total, counted = 0.0, set[str]()
    for cell in plan.cells:
        rest, steps = sum(left[run.name] for run in cell.runs), cell.runs[0].steps
        shared = all(run.name in counted for run in cell.runs)
        counted |= {run.name for run in cell.runs}
        seconds = step.get(_kind(cell.runs[0]), 0.0)
        total += 0.0 if shared else rest * seconds
        table.add_row(
            cell.column.name,
            cell.variant.name,
            str(len(cell.runs)),
            f"{steps:,}",
            f"{1 - rest / (steps * len(cell.runs)):.0%}",
            f"{1000 * seconds:.0f} ms" if rest else "",
            "as above" if shared else _duration(rest * seconds),
        )
    yield table
    yield (
        f"{len(plan.runs)} runs and {len(plan.collections)} collections of data in {folder.path}. "
        f"Training takes about {_duration(total / slots)} with {slots} at a time. This is an "
        f"estimate from the quickest of {STEPS} steps of each kind of run, measured now on random "
        "data. Collection and evaluation take further time."
    )


def _measure(plan: Plan, left: dict[str, int], console: PlainConsole) -> dict[object, float]:
    """Measure the seconds per step of each kind of run that has steps left."""
    kinds = {_kind(run): run for run in plan.runs if left[run.name]}
    found = {}
    with progress_bar("kinds of run", console=console) as bar:
        line = bar.add_task("measuring", total=len(kinds))
        for kind, run in kinds.items():
            found[kind] = seconds_per_step(run)
            bar.advance(line)
    return found


def _kind(run: Run) -> object:
    """Return all settings on which the time of a step depends: all except the seed."""
    return tuple((name, str(v)) for name, v in settings(run.config) if name != "seed")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
