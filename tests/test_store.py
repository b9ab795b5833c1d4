from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import as_version_2

from harmodt.data.store import (
    MANIFEST,
    UNFINISHED,
    UNKNOWN,
    DataStore,
    Episode,
    Episodes,
)
from harmodt.data.writer import StoreWriter
from harmodt.environments import EnvironmentSpec
from harmodt.environments.metaworld import MetaWorld
from harmodt.errors import UserError
from harmodt.files import json_checksum

SPEC = MetaWorld.spec
ARRAYS = (
    *("observations", "actions", "rewards", "returns_to_go"),
    *("episode_starts", "successes", "terminated"),
)


def make_episode(
    generator: np.random.Generator, length: int, success: int = 1, terminated: int = UNKNOWN
) -> Episode:
    # Far from zero, so that a careless variance would lose its digits.
    observations = (generator.normal(size=(length, 39)) + 50).astype(np.float32)
    actions = generator.uniform(-1, 1, (length, 4)).astype(np.float32)
    rewards = generator.random(length).astype(np.float32)
    return Episode(observations, actions, rewards, success, terminated)


def write_store(path: Path, tasks: tuple[str, ...] = ("reach-v3", "push-v3")) -> DataStore:
    generator = np.random.default_rng(0)
    writer = StoreWriter(path, {"test": 1}, SPEC)
    for task in tasks:
        with writer.task(task) as task_writer:
            for length in (30, 20, 25):
                task_writer.add(make_episode(generator, length))
            task_writer.add_prompt(make_episode(generator, 22))
    return writer.finish(tasks)


def edit_manifest(path: Path, **changes: object) -> None:
    file = path / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    prompt_lengths=st.lists(st.integers(1, 40), max_size=3),
    seed=st.integers(0, 2**32),
)
def test_a_store_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    prompt_lengths: list[int],
    seed: int,
) -> None:
    generator = np.random.default_rng(seed)
    train = [
        make_episode(generator, n, success, terminated)
        for n, success, terminated in zip(
            lengths, [1, 0, -1] * 2, [0, 0, -1, 1, 1, -1], strict=False
        )
    ]
    prompts = [make_episode(generator, length) for length in prompt_lengths]
    writer = StoreWriter(tmp_path_factory.mktemp("data") / "store", {}, SPEC)
    with writer.task("reach-v3") as task_writer:
        for episode in train:
            task_writer.add(episode)
        for episode in prompts:
            task_writer.add_prompt(episode)
    store = writer.finish(["reach-v3"])
    store.verify()
    task = store.task("reach-v3")
    _check_episodes(task.train, train)
    _check_episodes(task.prompts, prompts)
    observations = np.concatenate([e.observations for e in train]).astype(np.float64)
    np.testing.assert_allclose(task.observation_mean, observations.mean(0), rtol=1e-6)
    np.testing.assert_allclose(task.observation_std, observations.std(0), rtol=1e-6, atol=1e-12)
    assert task.best_return == task.train.returns.max()
    assert task.mean_return == pytest.approx(task.train.returns.mean(dtype=np.float64))
    assert store.steps == sum(lengths)


def _check_episodes(stored: Episodes, expected: list[Episode]) -> None:
    assert len(stored) == len(expected)
    assert stored.lengths.tolist() == [len(e.rewards) for e in expected]
    assert stored.successes.tolist() == [e.success for e in expected]
    assert stored.terminated.tolist() == [e.terminated for e in expected]
    for start, stop, episode in zip(
        stored.episode_starts[:-1], stored.episode_starts[1:], expected, strict=True
    ):
        np.testing.assert_array_equal(stored.observations[start:stop], episode.observations)
        np.testing.assert_array_equal(stored.actions[start:stop], episode.actions)
        np.testing.assert_array_equal(stored.rewards[start:stop], episode.rewards)
        for step in range(start, stop):
            rest = float(episode.rewards[step - start :].astype(np.float64).sum())
            assert stored.returns_to_go[step] == pytest.approx(rest, rel=1e-6)


def test_the_arrays_are_contiguous_memory_maps(tmp_path: Path) -> None:
    train = write_store(tmp_path / "store").task("push-v3").train
    for name in ARRAYS:
        array = getattr(train, name)
        assert isinstance(array, np.memmap), name
        assert array.flags.c_contiguous, name
        assert not array.flags.writeable, name


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_opening_five_million_steps_takes_a_second_and_200_megabytes_at_most(
    tmp_path: Path,
) -> None:
    store = write_store(tmp_path / "store")
    tasks = store.manifest["tasks"]
    for task in tasks:
        tasks[task]["steps"] = 2_500_000
        starts = np.array([0, 30, 50, 2_500_000])
        np.save(tmp_path / "store" / task / "episode_starts.npy", starts)
        for name in ("observations", "actions", "rewards", "returns_to_go"):
            entry = tasks[task]["files"][name]
            entry["shape"][0] = 2_500_000
            file = tmp_path / "store" / task / f"{name}.npy"
            # A file with holes: it takes no room, and shows when somebody reads it all.
            np.lib.format.open_memmap(file, "w+", entry["dtype"], tuple(entry["shape"]))
    edit_manifest(tmp_path / "store", tasks=tasks, crc32=json_checksum(store.manifest))
    script = """
import re, sys, time
from pathlib import Path
from harmodt.data.store import DataStore
start = time.perf_counter()
store = DataStore.open(Path(sys.argv[1]))
steps = sum(len(store.task(name).train.rewards) for name in store.tasks)
seconds = time.perf_counter() - start
status = Path("/proc/self/status").read_text()
print(steps, seconds, int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1024)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    steps, seconds, megabytes = map(float, printed.split())
    assert steps == 5_000_000
    assert seconds <= 1
    assert megabytes <= 200


def test_a_store_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no store in .*nothing: make one with"):
        DataStore.open(tmp_path / "nothing")

    writer = StoreWriter(tmp_path / "begun", {}, SPEC)
    with writer.task("reach-v3") as task_writer:
        task_writer.add(make_episode(np.random.default_rng(0), 5))
    with pytest.raises(UserError, match=r"begun is unfinished: to continue, repeat the command"):
        DataStore.open(tmp_path / "begun")

    path = tmp_path / "store"
    write_store(path)
    manifest = (path / MANIFEST).read_bytes()
    edit_manifest(path, version=7)
    with pytest.raises(UserError, match=r"manifest.json is of version 7, .* versions 2 and 3"):
        DataStore.open(path)
    for damaged in (manifest[:100], manifest.replace(b'"test": 1', b'"test": 2'), b"\xff\x00"):
        (path / MANIFEST).write_bytes(damaged)
        with pytest.raises(UserError, match=r"manifest.json is damaged"):
            DataStore.open(path)
    for foreign in (b"[]", b'{"format": "other"}'):
        (path / MANIFEST).write_bytes(foreign)
        with pytest.raises(UserError, match=r"is not the manifest of a HarmoDT store"):
            DataStore.open(path)


@pytest.mark.parametrize("name", [*ARRAYS, "prompts/actions"])
def test_a_damaged_array_is_named(tmp_path: Path, name: str) -> None:
    store = write_store(tmp_path / "store")
    file = store.path / "push-v3" / f"{name}.npy"
    whole = file.read_bytes()

    changed = bytearray(whole)
    changed[-1] ^= 1
    file.write_bytes(changed)
    with pytest.raises(UserError, match=rf"push-v3/{name}.npy is damaged .its checksum fails"):
        DataStore.open(store.path).verify()

    file.write_bytes(whole[:-3])
    with pytest.raises(UserError, match=rf"push-v3/{name}.npy is damaged .it has 3 bytes too few"):
        DataStore.open(store.path)
    file.write_bytes(whole + b"0")
    with pytest.raises(UserError, match=rf"push-v3/{name}.npy is damaged .it has 1 bytes too many"):
        DataStore.open(store.path)

    file.write_bytes(b"x" * len(whole))
    with pytest.raises(UserError, match=rf"push-v3/{name}.npy is damaged"):
        DataStore.open(store.path).task("push-v3")
    header = whole[:128].replace(b"'<f4'", b"'<i4'").replace(b"'<i8'", b"'<u8'")
    file.write_bytes(header.replace(b"'|i1'", b"'|u1'") + whole[128:])
    with pytest.raises(UserError, match=rf"push-v3/{name}.npy is .* .its dtype or shape differs"):
        DataStore.open(store.path).task("push-v3")

    file.unlink()
    with pytest.raises(UserError, match=rf"push-v3/{name}.npy is missing"):
        DataStore.open(store.path)


def test_a_task_that_is_not_in_the_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no task 'sweep-v3': it holds reach-v3, push-v3"):
        write_store(tmp_path / "store").task("sweep-v3")


def test_an_interrupted_writer_goes_on_after_its_finished_tasks(tmp_path: Path) -> None:
    whole = write_store(tmp_path / "whole")

    generator = np.random.default_rng(0)
    writer = StoreWriter(tmp_path / "cut", {"test": 1}, SPEC)
    with writer.task("reach-v3") as task_writer:
        for length in (30, 20, 25):
            task_writer.add(make_episode(generator, length))
        task_writer.add_prompt(make_episode(generator, 22))
    with pytest.raises(OSError, match="full"), writer.task("push-v3") as task_writer:
        task_writer.add(make_episode(np.random.default_rng(5), 3))
        raise OSError("full")
    assert {file.name for file in (tmp_path / "cut").iterdir()} == {UNFINISHED, "reach-v3"}

    writer = StoreWriter(tmp_path / "cut", {"test": 1}, SPEC)
    assert writer.tasks == ("reach-v3",)
    with writer.task("push-v3") as task_writer:
        for length in (30, 20, 25):
            task_writer.add(make_episode(generator, length))
        task_writer.add_prompt(make_episode(generator, 22))
    writer.finish(("reach-v3", "push-v3"))
    assert _contents(tmp_path / "cut") == _contents(whole.path)


def _contents(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_a_directory_that_is_taken_is_left_as_it_was(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    StoreWriter(tmp_path / "begun", {"test": 1}, SPEC)
    (tmp_path / "other" / "reach-v3").mkdir(parents=True)
    (tmp_path / "other" / "reach-v3" / "0.npz").write_bytes(b"precious")
    (tmp_path / "file").write_bytes(b"precious")
    before = _contents(tmp_path)
    for name, reason in {
        "store": "already holds a store",
        "begun": "holds an unfinished store that was begun with other settings",
        "other": "holds other files",
        "file": "is a file",
    }.items():
        with pytest.raises(UserError, match=f"{name} {reason}"):
            StoreWriter(tmp_path / name, {"test": 2}, SPEC)
    assert _contents(tmp_path) == before
    assert (tmp_path / "begun" / UNFINISHED).exists()
    store.verify()


@pytest.mark.parametrize(
    ("origin", "command"), [("collect", "harmodt.collect"), ("import", "harmodt.data import")]
)
def test_a_store_of_the_first_version_says_how_to_make_it_again(
    tmp_path: Path, origin: str, command: str
) -> None:
    path = tmp_path / "old"
    path.mkdir()
    provenance = {origin: {"tasks": ["reach-v3"]}}
    first = {"format": "harmodt-store", "version": 1, "provenance": provenance, "tasks": {}}
    (path / MANIFEST).write_text(json.dumps(first))
    again = rf"version 1, and .* versions 2 and 3: make the store again .*`python -m {command}`"
    with pytest.raises(UserError, match=again):
        DataStore.open(path)


def test_a_store_of_version_2_does_not_know_how_episodes_ended(tmp_path: Path) -> None:
    new = write_store(tmp_path / "new")
    old = as_version_2(write_store(tmp_path / "old"))
    old.verify()
    for name in new.tasks:
        for part, count in (("train", 3), ("prompts", 1)):
            ours, theirs = getattr(old.task(name), part), getattr(new.task(name), part)
            assert ours.terminated.tolist() == [UNKNOWN] * count
            for array in ARRAYS[:-1]:
                np.testing.assert_array_equal(getattr(ours, array), getattr(theirs, array))


@pytest.mark.parametrize("version", [2, 3])
def test_the_arrays_are_those_of_the_version(tmp_path: Path, version: int) -> None:
    store = write_store(tmp_path / "store")
    if version == 3:
        as_version_2(store)
    manifest = json.loads((store.path / MANIFEST).read_text()) | {"version": version}
    del manifest["crc32"]
    manifest["crc32"] = json_checksum(manifest)
    (store.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"is damaged \(the entries of reach-v3 do not fit"):
        DataStore.open(store.path)


def test_a_store_of_version_2_that_was_begun_is_not_gone_on_with(tmp_path: Path) -> None:
    store = as_version_2(write_store(tmp_path / "store"))
    (store.path / MANIFEST).rename(store.path / UNFINISHED)
    with pytest.raises(UserError, match=r"unfinished store of version 2, but .* writes versio"):
        StoreWriter(store.path, {"test": 1}, SPEC)


def test_equal_stores_have_equal_checksums_and_others_do_not(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a")
    written = json.loads((store.path / MANIFEST).read_text())["crc32"]
    assert store.checksum == written == write_store(tmp_path / "b").checksum
    assert write_store(tmp_path / "c", ("push-v3",)).checksum != written


def test_the_environment_is_given_back_and_may_not_change_on_the_way(tmp_path: Path) -> None:
    assert write_store(tmp_path / "store").environment == SPEC
    StoreWriter(tmp_path / "begun", {}, SPEC)
    other = replace(SPEC, reward_version=None)
    with pytest.raises(UserError, match="an unfinished store that was begun with other settings"):
        StoreWriter(tmp_path / "begun", {}, other)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"observations": np.zeros((5, 39))},
            r"observations has the shape \(5, 39\), but \(5, 3\)",
        ),
        ({"actions": np.zeros((5, 4))}, r"actions has the shape \(5, 4\), but \(5, 2\)"),
        ({"actions": np.zeros((4, 2))}, r"actions has the shape \(4, 2\), but \(5, 2\)"),
        ({"rewards": np.zeros((5, 1))}, r"rewards has the shape \(5, 1\), but \(5,\)"),
        ({"success": 0}, "small defines no success"),
        (
            {"observations": np.zeros((0, 3)), "actions": np.zeros((0, 2)), "rewards": np.zeros(0)},
            "no steps",
        ),
    ],
)
def test_an_episode_that_does_not_fit_the_environment_is_refused(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    spec = EnvironmentSpec("small", 3, 2, 5, success=False)
    fitting = Episode(np.zeros((5, 3)), np.zeros((5, 2)), np.zeros(5), UNKNOWN)
    writer = StoreWriter(tmp_path / "store", {}, spec)
    with writer.task("a") as task:
        task.add(fitting)
        for add in (task.add, task.add_prompt):
            with pytest.raises(ValueError, match=reason):
                add(fitting._replace(**changes))
    data = writer.finish(["a"]).task("a")
    assert data.train.observations.shape == (5, 3) and data.observation_mean.shape == (3,)
    assert len(data.prompts) == 0
