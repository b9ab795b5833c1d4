"""The progress bar of every command."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


def progress_bar(
    unit: str, *fields: str, enabled: bool = True, console: Console | None = None
) -> Progress:
    """A bar with a description, a count of `unit`, more fields, time elapsed and remaining.

    Args:
        unit: what is counted.
        fields: names of texts that `Progress.update` may set, such as a loss.
        enabled: whether anything is drawn.
        console: where to draw; standard output by default.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        *(_Field(name) for name in fields),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not enabled,
        console=console,
    )


class _Field(TextColumn):
    """A text that is empty until it is set."""

    def __init__(self, name: str):
        super().__init__("")
        self._name = name

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get(self._name, "")))
