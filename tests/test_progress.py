from __future__ import annotations

import io

from rich.table import Table

from harmodt.progress import PlainConsole, progress_bar

ODD = "s6/a[/b]c x[bold]y [red] :smile: \x1b]0;title\x07\u202etxt"
SHOWN = r"s6/a[/b]c x[bold]y [red] :smile: \x1b]0;title\x07\u202etxt"


def printed(*objects: object) -> str:
    console = PlainConsole(file=io.StringIO(), width=200)
    for shown in objects:
        console.print(shown)
    return console.file.getvalue()


def test_names_are_printed_as_they_are() -> None:
    assert printed(f"run: {ODD}\ndone") == f"run: {SHOWN}\ndone\n"


def test_names_in_a_table_are_printed_as_they_are() -> None:
    table = Table(title=f"{ODD}: title")
    table.add_column(f"{ODD} column")
    table.add_row(f"{ODD} cell")
    text = printed(table)
    for part in ("title", "column", "cell"):
        assert SHOWN in text and part in text
    assert text.count(SHOWN) == 3 and "\x1b" not in text


def test_names_beside_a_bar_are_printed_as_they_are() -> None:
    console = PlainConsole(file=io.StringIO(), width=250)
    with progress_bar("steps", "loss", console=console) as bar:
        bar.add_task(ODD, total=1, loss=ODD)
    text = console.file.getvalue()
    assert text.count(SHOWN) == 2 and "\x1b" not in text
