"""What there is to reproduce, and what a plan would take."""

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
    """Every experiment, with the number of its runs at each budget."""
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
    """A plan's runs, their steps, what is done of them, and how long the rest would train.

    Args:
        slots: how many runs go on at a time.
        console: where to draw a bar while steps are measured.

    Raises:
        UserError: a run that is there is damaged, or another's.
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
        f"About {_duration(total / slots)} of training, {slots} at a time: by the quickest of "
        f"{STEPS} steps of each kind of run, on random numbers, measured now. Collection and "
        "evaluation come on top."
    )


def _measure(plan: Plan, left: dict[str, int], console: PlainConsole) -> dict[object, float]:
    """Seconds per step of each kind of run that has steps left."""
    kinds = {_kind(run): run for run in plan.runs if left[run.name]}
    found = {}
    with progress_bar("kinds of run", console=console) as bar:
        line = bar.add_task("measuring", total=len(kinds))
        for kind, run in kinds.items():
            found[kind] = seconds_per_step(run)
            bar.advance(line)
    return found


def _kind(run: Run) -> object:
    """What the time of a step depends on: all settings but the seed."""
    return tuple((name, str(v)) for name, v in settings(run.config) if name != "seed")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
