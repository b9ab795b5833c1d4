"""Reproduces a table or figure of the paper: `python -m harmodt.reproduce NAME --budget small`.

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
    """Train and evaluate the runs of a table or figure of the paper, and write the table.

    To go on after an interruption, give the same command again. It skips the jobs that are done and
    resumes the runs at their last checkpoints. Experiments of one budget share a folder, and share
    the data and runs that they have in common.
    """

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME")] = None
    """Name of the experiment to reproduce; --list shows all names."""
    budget: str = "smoke"
    """Size of data and runs: smoke only tests the program and takes minutes, small takes hours on
    two cores, cores has the paper's steps on data that two cores collect, paper is the paper's
    own size."""
    output: Path | None = None
    """Folder of data, runs and tables; by default runs/reproduce-BUDGET."""
    seeds: tuple[Whole, ...] = ()
    """Seeds of training, in place of the budget's seeds."""
    reference: str | None = None
    """Variant that the others are compared with, in place of the experiment's own reference. The
    names of the table's files then contain the name of the variant."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the runs: cuda uses all GPUs, cpu the CPU, auto the GPUs if there are some."""
    jobs: Count = 1
    """Number of runs at a time on each GPU, or on the CPU."""
    list: bool = False
    """Show all experiments."""
    dry_run: bool = False
    """Show the runs, and estimate their time from a few steps that are measured now."""


def main() -> None:
    """Run the command line."""
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
    """Refuse an unknown name, and suggest the most similar known name."""
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        names = ", ".join(map(repr, known))
        raise UserError(f"there is no {kind} {name!r}: did you mean {nearest!r}? Known: {names}")


def _reproduce(plan: Plan, folder: Folder, slots: Sequence[Mapping[str, str]]) -> None:
    """Do the jobs that are not done, print and write the table, and name the jobs that failed."""
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
    """Print the table; write the table, its figure and a page that shows the runs."""
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
    """Write a file and print its path. If this fails, print why and go on without the file."""
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
