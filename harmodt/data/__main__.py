"""Bring data into a store and out, join stores, show what one holds, and check it.

python -m harmodt.data import SOURCE --output DIR --tasks mt50
python -m harmodt.data export DIR --output ~/.minari/datasets
python -m harmodt.data info DIR
python -m harmodt.data merge DIR DIR --output DIR
python -m harmodt.data verify DIR
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from ..errors import printable, run_command
from ..progress import PlainConsole, progress_bar
from ..settings import parse_arguments
from .describe import describe, show
from .export import ExportConfig, export_data
from .importing import ImportConfig, import_data
from .merging import MergeConfig, merge_stores
from .store import DataStore


@dataclass(frozen=True)
class InfoConfig:
    """Show what a store holds."""

    store: tyro.conf.Positional[Path]
    """Directory of the store."""
    json: bool = False
    """Print one JSON object, with the provenance in full."""


@dataclass(frozen=True)
class VerifyConfig:
    """Read a whole store and compare its checksums."""

    store: tyro.conf.Positional[Path]
    """Directory of the store."""


def _show(store: DataStore) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    show(describe(store), PlainConsole(), width)


def _info(config: InfoConfig) -> None:
    store = DataStore.open(config.store)
    if config.json:
        print(json.dumps(describe(store), indent=2))
    else:
        _show(store)


def _export(config: ExportConfig) -> None:
    pairs = [f"{name}={task}" for name, task in export_data(config).items()]
    words = ["import", str(config.output), "--format", "minari", "--dataset", *pairs]
    again = f"python -m harmodt.data {shlex.join(words)} --output STORE"
    print(printable(f"written, and read again by: {again}"))


def _verify(config: VerifyConfig) -> None:
    store = DataStore.open(config.store)
    with progress_bar("files") as bar:
        line = bar.add_task("verifying", total=len(store.files))
        store.verify(lambda _: bar.advance(line))
    print(f"{printable(config.store)}: every checksum is right")


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "import": (ImportConfig, lambda config: _show(import_data(config))),
    "export": (ExportConfig, _export),
    "info": (InfoConfig, _info),
    "merge": (MergeConfig, lambda config: _show(merge_stores(config))),
    "verify": (VerifyConfig, _verify),
}
"""Name of every sub-command, its settings and what it does."""


def main() -> None:
    kinds = tuple(
        Annotated[kind, tyro.conf.subcommand(name)] for name, (kind, _) in COMMANDS.items()
    )
    command = parse_arguments(
        Union[kinds],  # noqa: UP007
        prog="python -m harmodt.data",
        description="Bring data into stores and out, join, show and check them.",
    )
    actions = dict(COMMANDS.values())
    actions[type(command)](command)


if __name__ == "__main__":
    run_command(main)
