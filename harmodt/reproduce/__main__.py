"""Reproduce a table or figure of the paper: `python -m harmodt.reproduce NAME --budget small`.

python -m harmodt.reproduce --list
python -m harmodt.reproduce table2 --budget small --dry-run
python -m harmodt.reproduce table2 --budget small
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..devices import prepare_cpu
from ..errors import UserError, going_on, run_command
from ..files import owned
from ..progress import PlainConsole
from ..report import write_report
from ..settings import Count, Whole, check, parse_arguments
from ..training.stop import Output, Stop
from .execute import Work, command_of, find_slots
from .experiments import BUDGETS, EXPERIMENTS
from .figure import write_figure
from .jobs import Folder, Job, jobs_of
from .overview import listing, overview
from .plan import Plan, make_plan
from .tables import tabulate

output = Output()
console = PlainConsole(file=output)


@dataclass(frozen=True)
class ReproduceConfig:
    """Train and measure what a table or figure of the paper compares; end in its table.

    An interrupted reproduction goes on when the same command is given again: what is done is
    skipped, and what a run had come to is taken up. Experiments share a folder, and in it what they
    have in common.
    """

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME")] = None
    """What to reproduce: see --list."""
    budget: str = "smoke"
    """How much is spent: smoke proves the machinery in minutes, small is hours on two cores, paper
    is the paper's own."""
    output: Path | None = None
    """Folder of data, runs and tables; by default runs/reproduce-BUDGET."""
    seeds: tuple[Whole, ...] = ()
    """Of training, in place of the budget's."""
    reference: str | None = None
    """Variant that the others are compared with, in place of the experiment's own; its name is in
    those of the table's files."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where runs are placed: one on each GPU there is, or all on the CPU."""
    jobs: Count = 1
    """Runs at a time on each GPU, or on the CPU."""
    list: bool = False
    """Show what there is to reproduce."""
    dry_run: bool = False
    """Show the runs and how long they would take, by a few steps of each kind taken now."""


def main() -> None:
    """The command line."""
    prepare_cpu()
    config: ReproduceConfig = parse_arguments(
        ReproduceConfig,
        prog="python -m harmodt.reproduce",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    check(config)
    if config.list:
        console.print(listing())
        return
    plan = _plan(config)
    folder = Folder(config.output or Path("runs") / f"reproduce-{config.budget}")
    slots = find_slots(config.device, config.jobs)
    if config.dry_run:
        for part in overview(plan, folder, len(slots), console):
            console.print(part)
        return
    _reproduce(plan, folder, slots)


def _plan(config: ReproduceConfig) -> Plan:
    if config.name is None:
        raise UserError(f"no experiment is named: name one of {', '.join(EXPERIMENTS)}")
    _find("experiment", config.name, EXPERIMENTS)
    _find("budget", config.budget, BUDGETS)
    if config.reference is not None:
        variants = [variant.name for variant in EXPERIMENTS[config.name].variants]
        _find(f"variant of {config.name}", config.reference, variants)
    return make_plan(config.name, config.budget, config.seeds, config.reference)


def _find(kind: str, name: str, known: Collection[str]) -> None:
    """Refuse a name that there is not, with the nearest that there is."""
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        names = ", ".join(map(repr, known))
        raise UserError(f"there is no {kind} {name!r}: did you mean {nearest!r}? There are {names}")


def _reproduce(plan: Plan, folder: Folder, slots: Sequence[Mapping[str, str]]) -> None:
    """Do all that is not done, print and write the table, and name what failed."""
    command = command_of(["harmodt.reproduce", *sys.argv[1:]])
    stop = output.stop = Stop()
    try:
        with stop.handled(), going_on(f"go on with: {command}"), owned(folder.path):
            jobs = jobs_of(plan, folder)
            work = Work(jobs, slots, folder, console)
            work.do(stop)
            if stop.signal is not None:
                how = f"stopped by {stop.signal.name}; go on with: {command}"
                console.print(how, soft_wrap=True)
                sys.exit(128 + stop.signal)
            _report(plan, folder)
    finally:
        output.stop = None
    if work.failed:
        for job in jobs:
            if job.name in work.failed:
                console.print(_failure(job, work.failed[job.name], folder), soft_wrap=True)
        sys.exit(1)


def _report(plan: Plan, folder: Folder) -> None:
    """Print the table, and write it, a figure of it and a page of the runs beside them."""
    outcome, path = tabulate(plan, folder), folder.path / plan.table_name
    outcome.save(path)
    console.print(outcome.table(console.width))
    for note in outcome.notes:
        console.print(note)
    console.print(f"written to {path}.md, .csv and .json", soft_wrap=True)
    figure, page = path.with_suffix(".svg"), path.with_suffix(".html")
    _draw("figure", figure, lambda: write_figure(outcome, figure))
    runs = [folder.run(run).path for run in plan.runs if folder.run(run).description.exists()]
    if runs:
        _draw("all runs side by side", page, lambda: write_report(runs, page))


def _draw(what: str, path: Path, draw: Callable[[], None]) -> None:
    """Write a file and say so, or why not: the table is there without it."""
    try:
        draw()
    except UserError as error:
        console.print(f"{what}: {error}", soft_wrap=True)
    else:
        console.print(f"{what}: {path}", soft_wrap=True)


def _failure(job: Job, why: str, folder: Folder) -> str:
    log = folder.log(job.name)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = next((line for line in reversed(lines) if line.startswith("error: ")), None)
    parts = [f"FAILED {job.name}: {why}", *([said] if said else []), f"log: {log}"]
    return "\n  ".join([*parts, f"repeat it with: {command_of(job.words())}"])


if __name__ == "__main__":
    run_command(main)
