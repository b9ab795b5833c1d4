"""What readers could not bear: found by fuzzing (`fuzz.py`) or while writing its mutations."""

from __future__ import annotations

import json
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from runs import begin
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors
from tiny import SPEC, TASKS, make_store

from harmodt.checkpoint import load_checkpoint
from harmodt.data import store
from harmodt.data.importers.npz import NpzImporter
from harmodt.data.inputs import load_conditioning
from harmodt.data.store import MANIFEST, DataStore
from harmodt.data.writer import make_or_open
from harmodt.environments.metaworld import MetaWorld
from harmodt.errors import UserError
from harmodt.files import checksum, json_checksum
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
        with pytest.raises(UserError, match=r"is damaged \((it is not JSON|its checksum fails)"):
            RunDirectory(tmp_path).read()


@pytest.mark.parametrize("source", [None, 5, "", [], {}, {"seed": []}])
def test_a_store_of_odd_provenance_is_of_other_settings(folder: Path, source: object) -> None:
    path = folder / "store"
    manifest = json.loads((path / MANIFEST).read_text()) | {"provenance": {"collect": source}}
    del manifest["crc32"]
    manifest["crc32"] = json_checksum(manifest)
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
    with pytest.raises(UserError, match=r"run\.json (is damaged|has missing or unknown entries)"):
        SavedRun.open(folder / "run")


def infinite(starts: np.ndarray) -> np.ndarray:
    return np.where(starts == 0, 0.0, np.inf)


def around(starts: np.ndarray) -> np.ndarray:
    return np.array([0, 2**63 - 1, -2, starts[-1]])


def complex_numbers(starts: np.ndarray) -> np.ndarray:
    return starts.astype(np.complex64)


@pytest.mark.parametrize("change", [infinite, around, complex_numbers])
def test_prompts_that_end_nowhere_are_refused(
    folder: Path, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    path = folder / "run" / "conditioning.safetensors"
    arrays = load_file(path)
    name = f"{TASKS[0]}/prompts/episode_starts"
    arrays[name] = change(arrays[name])
    successes = f"{TASKS[0]}/prompts/successes"
    arrays[successes] = np.resize(arrays[successes], len(arrays[name]) - 1)
    save_file(arrays, path)
    with pytest.raises(UserError, match=r"safetensors is damaged \(.*/episode_starts"):
        load_conditioning(path, TASKS[:2], SPEC, checksum(path.read_bytes()))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float64])
def test_a_checkpoint_of_other_numbers_is_refused(folder: Path, dtype: torch.dtype) -> None:
    path = RunDirectory(folder / "run").checkpoint(12)
    save_tensors({"model.w": torch.ones(4).to(dtype)}, path / "state.safetensors")
    state = json.loads((path / "state.json").read_text())
    state["crc32"] = checksum((path / "state.safetensors").read_bytes())
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="00000012"):
        load_checkpoint(RunDirectory(folder / "run")).copy_to({"model.w": torch.ones(4)})


def test_episodes_that_go_around_are_refused(folder: Path) -> None:
    path = folder / "store" / TASKS[0] / "episode_starts.npy"
    np.save(path, around(np.load(path)))
    with pytest.raises(UserError, match=r"episode_starts\.npy is damaged"):
        DataStore.open(folder / "store").task(TASKS[0])


@pytest.fixture
def used() -> Iterator[Callable[[], int]]:
    """The most memory that NumPy had since the test began, in bytes."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def zeros(file: BinaryIO, size: int) -> None:
    """An npy file of so many bytes that are 0; what a file system or a zip makes small."""
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": (size,)}
    )


def test_zeros_that_unpack_to_gigabytes_are_not_unpacked(
    tmp_path: Path, used: Callable[[], int]
) -> None:
    path = tmp_path / "0.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("observations", "actions", "rewards"):
            with archive.open(f"{name}.npy", "w") as file:
                zeros(file, 2**27)
                for _ in range(2**7):
                    file.write(bytes(2**20))
    with pytest.raises(UserError, match=r"observations would take 0\.1 GB of memory"):
        NpzImporter(tmp_path, MetaWorld(), {}).read(path)
    assert used() < 2**24


def test_a_large_array_that_is_no_npz_is_not_read(tmp_path: Path, used: Callable[[], int]) -> None:
    path = tmp_path / "0.npz"
    with open(path, "wb") as file:
        zeros(file, 2**28)
        file.truncate(file.tell() + 2**28)
    with pytest.raises(UserError, match="is a single array"):
        NpzImporter(tmp_path, MetaWorld(), {}).read(path)
    assert used() < 2**24
