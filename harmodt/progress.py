"""The console on which every command prints, and the progress bar."""

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
    """A console that shows strings without interpreting them.

    A name can look like rich's markup or hold a control sequence of the terminal; neither takes
    effect.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, *arguments: Any, **options: Any) -> Text:
        """Make a string printable, line by line. Tables use this method too."""
        lines = map(printable, text.split("\n"))
        return super().render_str("\n".join(lines), *arguments, **options)


def progress_bar(
    unit: str, *fields: str, enabled: bool = True, console: Console | None = None
) -> Progress:
    """Return a bar with a description, a count, further fields, and the time elapsed and left.

    Args:
        unit: the word after the count, such as "steps".
        fields: the names of further texts, such as a loss; `Progress.update` sets them.
        enabled: False draws nothing.
        console: the console that shows the bar; by default standard output.
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
    """A column with the text that the function `words` returns for a task."""

    def __init__(self, words: Callable[[Task], object]):
        super().__init__("")
        self._words = words

    def render(self, task: Task) -> Text:
        return Text(printable(self._words(task)))
