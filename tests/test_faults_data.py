"""What was done to a store or its sources by other hands: refused, in a sentence, every time."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_store

from harmodt.collect import CollectConfig, collect
from harmodt.collect import main as collect_main
from harmodt.data.__main__ import main as data_main
from harmodt.data.importing import ImportConfig, import_data
from harmodt.data.store import MANIFEST, UNFINISHED, DataStore
from harmodt.data.writer import StoreWriter
from harmodt.environments.metaworld import MetaWorld
from harmodt.errors import UserError, run_command
from harmodt.files import json_checksum, owned

Json = dict[str, Any]


def forge(path: Path, change: Callable[[Json], object]) -> None:
    """Change a manifest and compute its checksum anew, as who does so on purpose would."""
    manifest = json.loads(path.read_text())
    del manifest["crc32"]
    change(manifest)
    path.write_text(json.dumps({**manifest, "crc32": json_checksum(manifest)}))


def in_task(key: str, value: object) -> Callable[[Json], object]:
    return lambda manifest: manifest["tasks"]["reach-v3"].update({key: value})


def in_array(array: str, **values: object) -> Callable[[Json], object]:
    return lambda manifest: manifest["tasks"]["reach-v3"]["files"][array].update(values)


def rename_task(name: str) -> Callable[[Json], object]:
    return lambda m: m["tasks"].update({name: m["tasks"].pop("reach-v3")})


def rename_array(name: str) -> Callable[[Json], object]:
    def change(manifest: Json) -> None:
        files = manifest["tasks"]["reach-v3"]["files"]
        files[name] = files.pop("actions")

    return change


FORGED = {
    "a task outside": rename_task("../outside"),
    "a task at the root": rename_task("/outside"),
    "a task that is the parent": rename_task(".."),
    "a task that is the store": rename_task("."),
    "a task without a name": rename_task(""),
    "a task below": rename_task("a/b"),
    "a task with a zero byte": rename_task("a\0b"),
    "a task of half a character": rename_task("\ud800"),
    "an array of half a character": rename_array("\ud800"),
    "a key of half a character": lambda m: m["environment"].update({"\ud800": 1}),
    "a hidden task": rename_task(".reach-v3.tmp"),
    "an array outside": rename_array("../../outside/actions"),
    "an unknown array": rename_array("more"),
    "an array too few": lambda m: m["tasks"]["reach-v3"]["files"].pop("actions"),
    "an array of no entry": lambda m: m["tasks"]["reach-v3"]["files"].update(actions=None),
    "another type": in_array("actions", dtype="<f8"),
    "pickles": in_array("actions", dtype="|O"),
    "no type": in_array("actions", dtype="λ"),
    "another width": in_array("actions", shape=[81, 5]),
    "a negative length": in_array("actions", shape=[-81, 4]),
    "a huge length": in_array("actions", shape=[10**30, 4]),
    "no shape": in_array("actions", shape=7),
    "fewer steps": in_array("rewards", shape=[80]),
    "other episodes": in_array("successes", shape=[2]),
    "other prompts": in_array("prompts/episode_starts", shape=[9]),
    "no checksum": in_array("actions", crc32=5),
    "a count that differs": in_task("episodes", 4),
    "steps that differ": in_task("steps", 4),
    "prompts that differ": in_task("prompt_episodes", 4),
    "a return that is not finite": in_task("best_return", float("inf")),
    "a mean of NaN": in_task("mean_return", float("nan")),
    "a return of words": in_task("best_return", "high"),
    "a deviation of NaN": in_task("observation_std", [float("nan")] * 39),
    "a mean that is too short": in_task("observation_mean", [0.0] * 38),
    "a task of no entry": lambda m: m["tasks"].update({"reach-v3": []}),
    "tasks in a list": lambda m: m.update(tasks=["reach-v3"]),
    "no tasks": lambda m: m.pop("tasks"),
    "something more": lambda m: m.update(more=1),
    "no environment": lambda m: m.pop("environment"),
    "an environment of nothing": lambda m: m["environment"].update(observation_size=0),
    "an environment of words": lambda m: m["environment"].update(action_size="four"),
    "an environment with more": lambda m: m["environment"].update(more=1),
    "a source that is a list": lambda m: m.update(provenance=[]),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_a_forged_manifest_is_refused(tmp_path: Path, change: Callable[[Json], object]) -> None:
    store = make_store(tmp_path / "store")
    (tmp_path / "outside").symlink_to(store.path / "reach-v3")
    (store.path / "a").mkdir()
    (store.path / "a" / "b").symlink_to(store.path / "reach-v3")
    forge(store.path / MANIFEST, change)
    with pytest.raises(
        UserError, match=r"manifest\.json.* is damaged|bytes too few|unknown entries"
    ):
        DataStore.open(store.path)


NO_MANIFEST = r"is damaged|is not the manifest|is of version 1,"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"7",
        b"[" * 100_000,
        b'{"format":' * 100_000,
        b"\xff\xfe",
        b'{"format": "harmodt-store", "version": 2, "provenance": null}',
        b'{"format": "harmodt-store", "version": 1, "provenance": 7}',
        b'{"format": "harmodt-store", "version": NaN}',
        b'{"format": "harmodt-store", "version": 1e999}',
        b'{"format": "harmodt-store", "version": ' + b"9" * 10_000 + b"}",
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    store = make_store(tmp_path / "store")
    (store.path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=NO_MANIFEST) as refused:
        DataStore.open(store.path)
    assert len(str(refused.value)) < 1000
    (store.path / MANIFEST).rename(store.path / UNFINISHED)
    with pytest.raises(UserError, match=NO_MANIFEST):
        StoreWriter(store.path, {}, MetaWorld.spec)


@pytest.mark.parametrize(
    "starts", [[0, 30, 54, 82], [1, 30, 54, 81], [0, 54, 30, 81], [0, 0, 54, 81], [0, -5, 54, 81]]
)
def test_episodes_that_begin_elsewhere_are_refused(tmp_path: Path, starts: list[int]) -> None:
    store = make_store(tmp_path / "store")
    np.save(store.path / "reach-v3" / "episode_starts.npy", np.array(starts))
    with pytest.raises(UserError, match=r"episode_starts\.npy is damaged"):
        DataStore.open(store.path).task("reach-v3")


@pytest.mark.parametrize("name", [MANIFEST, UNFINISHED, "reach-v3/actions.npy"])
@pytest.mark.parametrize(
    "make",
    [
        Path.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to("gone"),
        lambda path: path.symlink_to("/dev/zero"),
    ],
    ids=["folder", "pipe", "dangling", "device"],
)
def test_what_is_no_file_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], object]
) -> None:
    store = make_store(tmp_path / "store")
    if name == UNFINISHED:
        (store.path / MANIFEST).unlink()
    (store.path / name).unlink(missing_ok=True)
    make(store.path / name)
    with pytest.raises(UserError):
        DataStore.open(store.path).task("reach-v3")
    with pytest.raises(UserError):
        StoreWriter(store.path, {"source": "random"}, MetaWorld.spec)


def write_npz(root: Path) -> Path:
    """A source of two episodes."""
    (root / "reach-v2").mkdir(parents=True)
    arrays = {
        "observations": np.ones((25, 39)),
        "actions": np.ones((25, 4)),
        "rewards": np.ones(25),
    }
    for number in range(2):
        np.savez(root / "reach-v2" / f"{number}.npz", **arrays)
    return root


def import_some(tmp_path: Path) -> DataStore:
    source = tmp_path / "raw"
    if not source.exists():
        write_npz(source)
    return import_data(ImportConfig(source, tmp_path / "store", prompt_episodes=1), progress=False)


def collect_some(tmp_path: Path) -> DataStore:
    config = CollectConfig(tmp_path / "store", ("reach",), 2, 1, episode_length=2, workers=1)
    return collect(config, progress=False)


COMMANDS = pytest.mark.parametrize("command", [import_some, collect_some])


def contents(path: Path) -> dict[Path, tuple[bytes, int]]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@COMMANDS
def test_a_command_that_is_repeated_changes_nothing(
    tmp_path: Path, command: Callable[[Path], DataStore]
) -> None:
    command(tmp_path)
    before = contents(tmp_path)
    assert command(tmp_path).checksum == DataStore.open(tmp_path / "store").checksum
    assert contents(tmp_path) == before


def test_an_import_with_other_settings_is_refused(tmp_path: Path) -> None:
    import_some(tmp_path)
    config = ImportConfig(tmp_path / "raw", tmp_path / "store", prompt_episodes=0)
    with pytest.raises(UserError, match="a store with prompt_episodes = 1 instead of 0"):
        import_data(config, progress=False)


@COMMANDS
def test_a_directory_that_another_command_writes_to_is_left_alone(
    tmp_path: Path, command: Callable[[Path], DataStore]
) -> None:
    with owned(tmp_path / "store"):
        with pytest.raises(UserError, match=f"store is in use .* process {os.getpid()}:"):
            command(tmp_path)
        assert [file.name for file in (tmp_path / "store").iterdir()] == [".lock"]
    command(tmp_path).verify()


@COMMANDS
@pytest.mark.parametrize("when", ["at the start", "at the end"])
def test_what_a_kill_leaves_besides_the_store_goes_with_the_next_command(
    tmp_path: Path, command: Callable[[Path], DataStore], when: str
) -> None:
    if when == "at the end":
        command(tmp_path)
        if command is collect_some:
            (tmp_path / "store" / "parts" / "reach-v3").mkdir(parents=True)
    else:
        (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".lock").write_text("1234567")
    command(tmp_path).verify()
    assert {file.name for file in (tmp_path / "store").iterdir()} == {MANIFEST, "reach-v3"}


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers in /proc")
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3, 1.0])
def test_ctrl_c_while_workers_start_is_quiet(tmp_path: Path, delay: float) -> None:
    words = ["--output", str(tmp_path / "store"), "--workers", "2"]
    with subprocess.Popen(
        [sys.executable, "-m", "harmodt.collect", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while process.poll() is None and len(children.read_text().split()) < 2:
            time.sleep(0.01)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr is not None
        printed = process.stderr.read()
    assert (process.returncode, printed) == (130, "interrupted\n")


COLLECT = "collect --tasks reach --episodes 2 --prompt-episodes 1 --episode-length 100 --workers 1"
IMPORT = "data import raw --prompt-episodes 1"
LONG = "x" * 300


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (f"{COLLECT} --output raw/reach-v2/0.npz", "0.npz is a file: choose a directory"),
        (f"{IMPORT} --output raw/reach-v2/0.npz", "0.npz is a file: choose a directory"),
        (f"{COLLECT} --output raw/reach-v2/0.npz/x", "a file is where a folder should be"),
        (f"{IMPORT} --output raw/reach-v2/0.npz/x", "a file is where a folder should be"),
        (f"{COLLECT} --output {LONG}", f"{LONG}/manifest.json: the name is too long"),
        (f"{IMPORT} --output {LONG}", f"{LONG}/manifest.json: the name is too long"),
        (f"data info {LONG}", "the name is too long"),
        (f"data verify {LONG}", "the name is too long"),
        (f"data import {LONG} --output x", "the name is too long"),
        ("data info loop", "symbolic links lead in a circle: remove them"),
        ("data info raw/reach-v2/0.npz", "there is no store in raw/reach-v2/0.npz"),
        ("data info nothing\033[31m", r"there is no store in nothing\x1b[31m"),
        ("data info a[/b]c", "there is no store in a[/b]c"),
    ],
)
def test_a_path_that_cannot_be_is_a_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    reason: str,
) -> None:
    write_npz(tmp_path / "raw")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command.split(" "))
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_command(data_main if command.startswith("data") else collect_main)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1
    assert reason in printed
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", [COLLECT, IMPORT])
def test_a_file_that_may_not_grow_is_a_sentence_whose_advice_works(
    tmp_path: Path, command: str
) -> None:
    write_npz(tmp_path / "raw")
    # As 3.13 does and Python before it in this mode alone, it says what is left open and unwritten.
    python = [sys.executable, "-X", "dev", "-W", "ignore"]

    def run(limit: int) -> tuple[int, str]:
        result = subprocess.run(
            [*python, "-m", *f"harmodt.{command} --output store".split()],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            capture_output=True,
            text=True,
        )
        return result.returncode, result.stderr

    status, printed = run(2500)
    assert status == 2 and printed.count("\n") == 1
    assert (
        "the file is larger than is allowed: raise the limit (ulimit -f), then give the" in printed
    )
    assert run(resource.RLIM_INFINITY) == (0, "")
    DataStore.open(tmp_path / "store").verify()


def test_a_path_that_is_not_utf8_works_in_an_ascii_locale(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff \xce\xbb")
    write_npz(folder / "raw")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for command in (IMPORT, IMPORT, "data info store", "data verify store", "data info raw"):
        output = ["--output", folder / "store"] if command == IMPORT else []
        words = [folder / word if word in ("raw", "store") else word for word in command.split()]
        result = subprocess.run(
            [sys.executable, "-m", f"harmodt.{words[0]}", *words[1:], *output],
            env=os.environ | ascii_only,
            capture_output=True,
        )
        printed = result.stdout + result.stderr
        assert result.returncode == (2 if command == "data info raw" else 0), printed
        assert rb"/\udcff " in printed and b"Traceback" not in printed
