"""What fuzzing (`fuzz.py`) found that readers could not bear, as small as it goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from runs import begin
from tiny import TASKS, make_store

from harmodt.data import store
from harmodt.data.store import MANIFEST, DataStore, manifest_checksum
from harmodt.data.writer import make_or_open
from harmodt.errors import UserError
from harmodt.rundir import FORMAT, VERSION, RunDirectory
from harmodt.training.run import SavedRun

Json = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and a run."""
    folder = tmp_path_factory.mktemp("made")
    begin(make_store(folder / "store", TASKS[:2]), folder / "run")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def nested(depth: int) -> str:
    """Lists in lists; Python reads them a little deeper than it writes them."""
    return "[" * depth + "]" * depth


DEPTHS = range(900, 1000)


def test_a_manifest_that_can_be_read_but_not_written_is_refused(tmp_path: Path) -> None:
    for depth in DEPTHS:
        text = f'{{"format": "{store.FORMAT}", "version": {store.VERSION}, "a": {nested(depth)}}}'
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            DataStore.open(tmp_path)


def test_a_description_that_can_be_read_but_not_written_is_refused(tmp_path: Path) -> None:
    for depth in DEPTHS:
        text = f'{{"format": "{FORMAT}", "version": {VERSION}, "id": {nested(depth)}}}'
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match=r"is not valid JSON|its checksum fails"):
            RunDirectory(tmp_path).read()


@pytest.mark.parametrize("source", [None, 5, "", [], {}, {"seed": []}])
def test_a_store_of_odd_provenance_is_of_other_settings(folder: Path, source: object) -> None:
    path = folder / "store"
    manifest = json.loads((path / MANIFEST).read_text()) | {"provenance": {"collect": source}}
    del manifest["crc32"]
    manifest["crc32"] = manifest_checksum(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="already holds a store with seed = "):
        make_or_open(path, "collect", {"seed": 1}, Mock())


DEEP: Json = json.loads('{"a":' * 800 + "1" + "}" * 800)
HALF = {"\ud800": 1}


@pytest.mark.parametrize(
    ("where", "more"),
    [("", HALF), ("config", HALF), ("environment", HALF), ("config", DEEP), ("environment", DEEP)],
)
def test_a_description_with_odd_keys_is_refused(folder: Path, where: str, more: Json) -> None:
    directory = RunDirectory(folder / "run")
    directory.update({where: {**getattr(directory.read(), where), **more}} if where else more)
    with pytest.raises(UserError, match=r"run\.json (is damaged|lacks, or has)"):
        SavedRun.open(folder / "run")
