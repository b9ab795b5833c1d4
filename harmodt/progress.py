"""What every command prints on: a console, and the progress bar."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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

from .errors import printable


class PlainConsole(Console):
    """A console that shows strings as they are, line by line.

    A name in them is neither taken for rich's markup nor for an order to the terminal.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, *arguments: Any, **options: Any) -> Text:
        """A string as text, in a table as well."""
        lines = map(printable, text.split("\n"))
        return super().render_str("\n".join(lines), *arguments, **options)


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
        _Words(lambda task: task.description),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        *(_Words(partial(_field, name)) for name in fields),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not enabled,
        console=console or PlainConsole(),
    )


def _field(name: str, task: Task) -> object:
    return task.fields.get(name, "")


class _Words(TextColumn):
    """What `words` says of a task, shown as it is."""

    def __init__(self, words: Callable[[Task], object]):
        super().__init__("")
        self._words = words

    def render(self, task: Task) -> Text:
        return Text(printable(self._words(task)))
