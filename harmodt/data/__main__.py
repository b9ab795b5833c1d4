"""Import and export data, merge stores, show what a store holds, and verify a store.

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
from .export import ExportConfig, export_data, options_of_import
from .importing import ImportConfig, import_data
from .merging import MergeConfig, merge_stores
from .sources import read_record
from .store import MANIFEST, DataStore


@dataclass(frozen=True)
class InfoConfig:
    """Show the content of a store."""

    store: tyro.conf.Positional[Path]
    """Directory of the store."""
    json: bool = False
    """Print one JSON object. It includes the whole provenance: how the store was made."""


@dataclass(frozen=True)
class VerifyConfig:
    """Read a whole store and verify its checksums."""

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


def _import(config: ImportConfig) -> None:
    complete = (config.output / MANIFEST).exists()
    store = import_data(config)
    record = read_record(store.provenance, store.path)
    for reasons in record.skipped.values():
        for reason in reasons:
            print(printable(f"skipped {reason}"))
    _show(store)
    if complete:
        compared = config.source.exists() and record.files
        print(
            printable(
                f"nothing was imported: {config.output} was complete already, and "
                + (
                    "its source has not changed"
                    if compared
                    else "its source was not checked for changes"
                )
            )
        )


def _merge(config: MergeConfig) -> None:
    complete = (config.output / MANIFEST).exists()
    _show(merge_stores(config))
    if complete:
        print(printable(f"nothing was merged: {config.output} was complete already"))


def _export(config: ExportConfig) -> None:
    pairs = [f"{name}={task}" for name, task in export_data(config).items()]
    words = [
        "import",
        str(config.output),
        "--format",
        "minari",
        *options_of_import(config),
        "--dataset",
        *pairs,
    ]
    command = f"python -m harmodt.data {shlex.join(words)} --output STORE"
    print(printable(f"exported; this command imports the data again: {command}"))


def _verify(config: VerifyConfig) -> None:
    store = DataStore.open(config.store)
    with progress_bar("files") as bar:
        line = bar.add_task("verifying", total=len(store.files))
        store.verify(lambda _: bar.advance(line))
    print(f"{printable(config.store)}: every checksum is right")


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "import": (ImportConfig, _import),
    "export": (ExportConfig, _export),
    "info": (InfoConfig, _info),
    "merge": (MergeConfig, _merge),
    "verify": (VerifyConfig, _verify),
}
"""The settings class and the function of every sub-command, by the sub-command's name."""


def main() -> None:
    kinds = tuple(
        Annotated[kind, tyro.conf.subcommand(name)] for name, (kind, _) in COMMANDS.items()
    )
    command = parse_arguments(
        Union[kinds],  # noqa: UP007
        prog="python -m harmodt.data",
        description="Import and export data; merge, show and verify stores.",
    )
    actions = dict(COMMANDS.values())
    actions[type(command)](command)


if __name__ == "__main__":
    run_command(main)
