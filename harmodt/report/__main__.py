"""Shows runs side by side on one page: `python -m harmodt.report RUN… [--output report.html]`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..devices import prepare_cpu
from ..errors import UserError, printable, run_command
from ..progress import PlainConsole
from ..settings import parse_arguments
from . import write_report
from .numbers import size


@dataclass(frozen=True)
class ReportConfig:
    """Write a page that shows runs side by side. The page is one file and needs no network.

    Raises:
        UserError: no run is named.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN…")]
    """Directories of the runs."""
    output: Path = Path("report.html")
    """File of the page."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("no run is named: give the directories of one or more runs")


def main() -> None:
    """Run the command line: write the page, and print its path."""
    prepare_cpu()
    config: ReportConfig = parse_arguments(ReportConfig, prog="python -m harmodt.report")
    write_report(config.runs, config.output)
    written = size(config.output.stat().st_size)
    PlainConsole().print(f"written to {printable(config.output)}, {written}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
