"""Minari's data sets: read as others write them, and written from a store and read again."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari_files import make_buffer, write_dataset
from tiny import make_episode, make_store

from harmodt.data import export
from harmodt.data.__main__ import main
from harmodt.data.export import ExportConfig, export_data
from harmodt.data.importing import ImportConfig, import_data
from harmodt.data.store import EPISODE_ARRAYS, DataStore, Episode
from harmodt.data.writer import StoreWriter
from harmodt.environments import family
from harmodt.errors import UserError, run_command

CHEETAH = family("cheetah-vel").spec


def config_for(tmp_path: Path, *pairs: str, **changes: object) -> ImportConfig:
    config = ImportConfig(
        tmp_path / "raw",
        tmp_path / "store",
        prompt_episodes=2,
        datasets=pairs or ("reach-v0=reach",),
        format="minari",
    )
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("storage", ["hdf5", "arrow", "parquet"])
def test_episodes_are_read_without_the_last_observation(tmp_path: Path, storage: str) -> None:
    write_dataset(tmp_path / "raw", "lab/reach-v0", storage=storage)
    before = dict(os.environ)
    store = import_data(config_for(tmp_path, "lab/reach-v0=reach-v2"), progress=False)
    assert os.environ == before
    store.verify()
    assert store.tasks == ("reach-v3",)
    task = store.task("reach-v3")
    expected = [make_buffer(number) for number in range(6)]
    for part, episodes in ((task.train, expected[:4]), (task.prompts, expected[4:])):
        observations = np.concatenate([episode.observations[:-1] for episode in episodes])
        np.testing.assert_array_equal(part.observations, observations.astype(np.float32))
        actions = np.concatenate([episode.actions for episode in episodes]).clip(-1, 1)
        np.testing.assert_array_equal(part.actions, actions)
        np.testing.assert_array_equal(part.rewards, np.concatenate([e.rewards for e in episodes]))
    assert task.train.successes.tolist() == [0, 1, 0, 1]
    assert task.prompts.successes.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("infos", "success"),
    [
        (None, -1),
        ({"grasp": np.ones(26)}, -1),
        ({"success": np.arange(25) == 3}, 1),
        ({"success": np.zeros((25, 1))}, 0),
        ({"success": np.eye(1, 26).T}, 0),  # solved at the reset alone
    ],
)
def test_success_is_what_the_steps_say(
    tmp_path: Path, infos: dict[str, np.ndarray] | None, success: int
) -> None:
    write_dataset(tmp_path / "raw", buffers=[make_buffer(i, infos=infos) for i in range(3)])
    store = import_data(config_for(tmp_path), progress=False)
    assert store.task("reach-v3").prompts.successes.tolist() == [success, success]


def test_a_task_may_have_several_data_sets_and_one_of_prompts(tmp_path: Path) -> None:
    for name, seeds in (("a-v0", [5, 6]), ("b-v1", [1]), ("reach-prompts-v0", [0, 2])):
        write_dataset(tmp_path / "raw", name, [make_buffer(seed) for seed in seeds])
    write_dataset(tmp_path / "raw", "push/expert-v0")
    pairs = ("b-v1=reach", "push/expert-v0=push", "reach-prompts-v0=reach", "a-v0=reach-v2")
    store = import_data(config_for(tmp_path, *pairs), progress=False)
    assert store.tasks == ("reach-v3", "push-v3")
    assert store.task("reach-v3").train.returns.tolist() == [50, 150, 175]
    assert store.task("reach-v3").prompts.returns.tolist() == [25, 75]
    assert store.task("push-v3").prompts.returns.tolist() == [125, 150]


def test_an_import_holds_few_episodes_in_memory(tmp_path: Path) -> None:
    write_dataset(tmp_path / "raw", buffers=[make_buffer(0, 500)] * 80)
    size = 500 * (39 * 8 + 4 * 4 + 8 + 8 + 2)
    config = config_for(tmp_path, prompt_episodes=1)
    import_data(replace(config, output=tmp_path / "warm"), progress=False)  # imports modules
    assert _peak(lambda: import_data(config, progress=False)) < 12 * size


def _peak(function: Callable[[], object]) -> int:
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def _metadata(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "data" / "metadata.json"
        metadata = json.loads(file.read_text())
        change(metadata)
        file.write_text(json.dumps(metadata))

    return edit


def _main_file(path: Path) -> Path:
    return path / "data" / "main_data.hdf5"


def _as_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _in_hdf5(change: Callable[[h5py.Group], object]) -> Callable[[Path], None]:
    """Change the group of episode 1."""

    def edit(path: Path) -> None:
        with h5py.File(_main_file(path), "a") as file:
            change(file["episode_1"])

    return edit


def _replace(key: str, value: object) -> Callable[[Path], None]:
    def change(group: h5py.Group) -> None:
        del group[key]
        group[key] = value

    return _in_hdf5(change)


def _claim(group: h5py.Group) -> None:
    """Rewards of a size that nobody has the memory for, none of which is there."""
    del group["rewards"]
    group.create_dataset("rewards", (10**10,), np.float64, chunks=(1000,))


def _set(key: str, value: float) -> Callable[[Path], None]:
    def change(group: h5py.Group) -> None:
        group[key][3] = value

    return _in_hdf5(change)


EPISODE = "reach-v0, episode 1:? "


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda path: os.truncate(_main_file(path), 3000), "reach-v0, episode 0 is damaged"),
        (lambda path: _main_file(path).write_bytes(b"hello" * 999), "episode 0 is damaged"),
        (lambda path: _main_file(path).unlink(), "reach-v0 is damaged or not Minari data"),
        (lambda path: (path / "data/metadata.json").unlink(), "reach-v0 is damaged"),
        (lambda path: (path / "data/metadata.json").write_text("{"), "reach-v0 is damaged"),
        (lambda path: (path / "data/metadata.json").write_text("[]"), "reach-v0 is damaged"),
        (
            lambda path: _as_pipe(path / "data/metadata.json"),
            r"metadata\.json is not a regular file",
        ),
        (lambda path: _as_pipe(_main_file(path)), r"main_data\.hdf5 is not a regular file"),
        (lambda path: (path / "data").rename(path / "date"), "there is no Minari data set"),
        (_metadata(lambda m: m.pop("action_space")), "does not describe its spaces"),
        (_metadata(lambda m: m.update(data_format="zarr")), "reach-v0 is damaged"),
        (_metadata(lambda m: m.update(total_episodes=7)), "reach-v0, episode 6 is damaged"),
        (
            _metadata(lambda m: m.update(total_episodes=10**400)),
            "more episodes than its files can hold",
        ),
        (
            _metadata(lambda m: m.update(total_episodes=10**10)),
            "more episodes than its files can hold",
        ),
        (_metadata(lambda m: m.update(total_episodes="7")), "reach-v0 is damaged"),
        (_metadata(lambda m: m.update(total_episodes=0)), "reach-v0 holds no episode"),
        (_in_hdf5(lambda group: group.pop("actions")), EPISODE + "is damaged"),
        (_in_hdf5(lambda group: group.pop("rewards")), EPISODE + "is damaged"),
        (_in_hdf5(_claim), "reach-v0, episode 1 would take 80.0 GB of memory"),
        (_replace("rewards", 3.0), EPISODE + "is damaged"),
        (_replace("observations", 3.0), EPISODE + "is damaged"),
        (_replace("rewards", np.ones(24)), EPISODE + "rewards has 24 steps, but obs.* has 25"),
        (_replace("actions", np.ones((25, 3))), EPISODE + r"actions has the shape \(25, 3\)"),
        (
            _replace("actions", np.ones((25, 4)) + 1j),
            EPISODE + "actions does not hold plain numbers",
        ),
        (_replace("actions", [b"no"] * 25), EPISODE + "actions does not hold plain numbers"),
        (_replace("terminations", np.arange(25) == 6), EPISODE + "terminations is true at step 6 "),
        (_replace("truncations", np.arange(25) > 22), EPISODE + "truncations is true at step 23 "),
        (_replace("truncations", np.ones(24)), EPISODE + "truncations has 24 steps"),
        (_in_hdf5(lambda g: g.attrs.update(total_steps=30)), "have 155 steps, but .* say 150"),
        (
            lambda path: (
                _in_hdf5(lambda g: g.attrs.update(total_steps=30))(path),
                _metadata(lambda m: m.update(total_steps=155))(path),
            ),
            EPISODE + "it has 25 steps, but its metadata say 30",
        ),
        (
            _replace("observations", np.ones((25, 39))),
            EPISODE + "it has 25 observations and 25 act",
        ),
        (
            _replace("observations", np.ones((28, 39))),
            EPISODE + "it has 28 observations and 25 act",
        ),
        (_replace("infos/success", np.ones(24)), EPISODE + "success has 24 steps"),
        (_replace("infos/success", 1), EPISODE + r"success has the shape \(\)"),
        (_replace("infos/success", np.full(26, np.nan)), EPISODE + "success holds NaN"),
        (_in_hdf5(lambda group: group.create_group("infos/x")), None),
        (_set("rewards", np.nan), EPISODE + "rewards holds NaN or infinity"),
        (_set("actions", np.inf), EPISODE + "actions holds NaN or infinity"),
        (_set("observations", np.uint64(0x7FF4 << 48).view(np.float64)), "observations holds NaN"),
        (_set("observations", 1e300), EPISODE + "observations holds NaN or infinity"),
        (_set("observations", -1e7), EPISODE + r"observations holds -1e[+]07, but .* up to"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_written(
    tmp_path: Path, edit: Callable[[Path], None], reason: str | None
) -> None:
    edit(write_dataset(tmp_path / "raw"))
    if reason is None:
        assert import_data(config_for(tmp_path), progress=False).tasks == ("reach-v3",)
        return
    with pytest.raises(UserError, match=reason):
        import_data(config_for(tmp_path), progress=False)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("file", "where"), [("1", "episode 1"), ("0", "episode 0")])
def test_damage_in_arrow_files_is_named(tmp_path: Path, file: str, where: str) -> None:
    path = write_dataset(tmp_path / "raw", storage="arrow")
    [arrow] = (path / "data" / file).glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:2000])
    with pytest.raises(UserError, match=f"reach-v0, {where} is damaged"):
        import_data(config_for(tmp_path), progress=False)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            {"observations": spaces.Dict({"arm": spaces.Box(-1, 1, (39,))})},
            "observations are dictionaries, .* FlattenObservation",
        ),
        ({"observations": spaces.Box(-1, 1, (20,))}, r"shape \(20,\), but a Box of shape \(39,\)"),
        ({"observations": spaces.Box(-1, 1, (3, 13))}, r"shape \(3, 13\), but a Box"),
        ({"actions": spaces.Discrete(4)}, r"action space is a Discrete of shape \(\)"),
        ({"actions": spaces.Dict({"arm": spaces.Box(-1, 1)})}, "action space is a Dict"),
    ],
)
def test_other_spaces_than_the_family_has_are_refused(
    tmp_path: Path, given: dict[str, spaces.Space], reason: str
) -> None:
    write_dataset(tmp_path / "raw", buffers=[], **given)
    metadata = _metadata(lambda values: values.update(total_episodes=6))
    metadata(tmp_path / "raw" / "reach-v0")
    with pytest.raises(UserError, match=reason):
        import_data(config_for(tmp_path), progress=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"datasets": ()}, "minari needs --dataset NAME=TASK"),
        ({"datasets": ("reach-v0=mt5",)}, "names 5 tasks"),
        ({"datasets": ("reach-v0=reech",)}, "did you mean"),
        ({"datasets": ("gone-v0=reach",)}, "there is no Minari data set .*gone-v0"),
        ({"source": Path("missing")}, "there is no Minari data set missing/reach-v0"),
        (
            {"tasks": ("push",)},
            "no --dataset gives episodes of push-v3: add --dataset NAME=push-v3",
        ),
        ({"datasets": ("reach-prompts-v0=reach",)}, "no --dataset gives episodes of reach-v3"),
        ({"family": "cheetah-vel"}, "there is no task 'reach'"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    write_dataset(tmp_path / "raw")
    with pytest.raises(UserError, match=reason):
        import_data(config_for(tmp_path, **changes), progress=False)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("package", "reason"),
    [("minari.dataset.minari_storage", r"pip install 'harmodt\[minari\]'"), ("h5py", "h5py")],
)
def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, reason: str
) -> None:
    write_dataset(tmp_path / "raw")
    store = make_store(tmp_path / "finished")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "minari.dataset._storages.hdf5_storage")
    with pytest.raises(UserError, match=reason):
        import_data(config_for(tmp_path), progress=False)
    with pytest.raises(UserError, match=reason):
        export_data(ExportConfig(store.path, tmp_path / "out"), progress=False)
    assert not (tmp_path / "out").exists()


def assert_same(found: DataStore, expected: DataStore) -> None:
    """Every array of every task is the same, to the bit."""
    assert found.tasks == expected.tasks
    for name in expected.tasks:
        for part in ("train", "prompts"):
            for array in EPISODE_ARRAYS:
                np.testing.assert_array_equal(
                    getattr(getattr(found.task(name), part), array),
                    getattr(getattr(expected.task(name), part), array),
                    strict=True,
                )


def make_cheetahs(path: Path) -> DataStore:
    """A store without success whose tasks' names have dots; one has no prompts."""
    writer = StoreWriter(path, {"collect": {}}, CHEETAH)
    tasks = ("cheetah-vel-0.600", "cheetah-vel-1.200")
    rng = np.random.default_rng(3)
    for number, name in enumerate(tasks):
        with writer.task(name) as task:
            for i in range(4):
                sizes = (CHEETAH.observation_size, CHEETAH.action_size)
                arrays = [rng.normal(size=(20 + i, size)).astype(np.float32) for size in sizes]
                episode = Episode(*arrays, rng.normal(size=20 + i).astype(np.float32), -1, 0)
                (task.add_prompt if i == 3 and not number else task.add)(episode)
    return writer.finish(tasks)


@pytest.mark.parametrize("storage", ["hdf5", "arrow"])
@pytest.mark.parametrize("make", [make_store, make_cheetahs])
def test_what_is_exported_is_imported_again_to_the_bit(
    tmp_path: Path, make: Callable[[Path], DataStore], storage: str
) -> None:
    store = make(tmp_path / "first")
    export = ExportConfig(store.path, tmp_path / "out", "lab/mine", storage=storage)  # type: ignore[arg-type]
    exported = export_data(export, progress=False)
    config = ImportConfig(
        tmp_path / "out",
        tmp_path / "second",
        prompt_episodes=0,
        min_length=1,
        datasets=tuple(f"{name}={task}" for name, task in exported.items()),
        clip_actions=False,
        format="minari",
        reward_version=store.environment.reward_version,
    )
    assert_same(import_data(config, progress=False), store)


def test_minari_finds_what_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_cheetahs(tmp_path / "store")
    config = ExportConfig(store.path, tmp_path / "out", tasks=("cheetah-vel-0.6",))
    exported = export_data(config, progress=False)
    task = "cheetah-vel-0.600"
    ids = ["harmodt/cheetah-vel-0_600-v0", "harmodt/cheetah-vel-0_600-prompts-v0"]
    assert exported == dict.fromkeys(ids, task)
    assert sorted(os.listdir(tmp_path / "out")) == ["harmodt"]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "out"))
    assert minari.list_local_datasets().keys() == set(ids)
    dataset = minari.load_dataset(ids[0])
    assert (dataset.total_episodes, dataset.total_steps) == (3, 63)
    train = store.task(task).train
    for episode, length in zip(dataset, (20, 21, 22), strict=True):
        assert dataset.observation_space.contains(episode.observations[0])
        assert len(episode.observations) == length + 1
        np.testing.assert_array_equal(episode.observations[-1], episode.observations[-2])
        assert episode.truncations.tolist() == [False] * (length - 1) + [True]
        assert not episode.terminations.any()
    np.testing.assert_array_equal(dataset[0].rewards, train.rewards[:20])
    np.testing.assert_array_equal(
        minari.load_dataset(ids[1])[0].actions, store.task(task).prompts.actions
    )


def test_an_export_holds_few_episodes_in_memory(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", {"collect": {}}, CHEETAH)
    size = 500 * 4 * (20 + 6 + 1)
    with writer.task("cheetah-vel-0.600") as task:
        for _ in range(80):
            arrays = (np.ones((500, 20), np.float32), np.ones((500, 6), np.float32))
            task.add(Episode(*arrays, np.ones(500, np.float32), -1))
    writer.finish(["cheetah-vel-0.600"])
    config = ExportConfig(tmp_path / "store", tmp_path / "out")
    export_data(replace(config, namespace="warm"), progress=False)  # imports modules
    assert _peak(lambda: export_data(config, progress=False)) < 12 * size


def test_an_export_overwrites_nothing_and_leaves_nothing_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store")
    config = ExportConfig(store.path, tmp_path / "out")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "replace_directory", die)
        with pytest.raises(KeyboardInterrupt):
            export_data(config, progress=False)
        assert not (tmp_path / "out").exists()
        patch.setattr(export.shutil, "rmtree", lambda *_, **__: None)  # as after a kill
        with pytest.raises(KeyboardInterrupt):
            export_data(config, progress=False)
    assert os.listdir(tmp_path / "out") == [".harmodt.tmp"]
    export_data(config, progress=False)
    assert os.listdir(tmp_path / "out") == ["harmodt"]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    with pytest.raises(UserError, match="out/harmodt already exists: choose another"):
        export_data(config, progress=False)
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"store": Path("missing")}, "there is no store in missing"),
        ({"tasks": ("sweep",)}, "has no task 'sweep-v3'"),
        ({"namespace": "my.own"}, "--namespace my.own is not valid"),
        ({"namespace": "../up"}, r"--namespace \.\./up is not valid"),
        ({"namespace": "/tmp/up"}, "--namespace /tmp/up is not valid"),
    ],
)
def test_an_export_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    config = ExportConfig(make_store(tmp_path / "store").path, tmp_path / "out")
    with pytest.raises(UserError, match=reason):
        export_data(replace(config, **changes), progress=False)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_folder_may_be_named_from_where_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    exported = export_data(ExportConfig(Path("store"), Path("out")), progress=False)
    metadata = json.loads(
        (tmp_path / "out" / next(iter(exported)) / "data/metadata.json").read_text()
    )
    assert metadata["total_episodes"] == 3 and metadata["dataset_size"] >= 0


def test_a_store_that_has_changed_is_not_exported(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    array = store.path / "push-v3" / "actions.npy"
    content = bytearray(array.read_bytes())
    content[-1] ^= 1
    array.write_bytes(content)
    with pytest.raises(UserError, match=r"push-v3/actions\.npy is damaged .its checksum fails"):
        export_data(ExportConfig(store.path, tmp_path / "out"), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_is_told(tmp_path: Path) -> None:
    """In a program of its own, which HDF5 would crash."""
    store = make_store(tmp_path / "store")
    words = ["-m", "harmodt.data", "export", str(store.path), "--output", str(tmp_path / "out")]
    command = shlex.join([sys.executable, *words])
    result = subprocess.run(
        ["bash", "-c", f"ulimit -f 20; {command}"], capture_output=True, text=True
    )
    assert (result.returncode, "larger than is allowed: raise" in result.stderr) == (2, True), (
        result
    )
    assert not (tmp_path / "out").exists()


def test_tasks_that_would_be_one_data_set_are_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", {"collect": {}}, CHEETAH)
    for name in ("a.b", "a_b"):
        with writer.task(name) as task:
            arrays = (np.ones((9, 20), np.float32), np.ones((9, 6), np.float32))
            task.add(Episode(*arrays, np.ones(9, np.float32), -1))
    writer.finish(["a.b", "a_b"])
    with pytest.raises(UserError, match=r"a_b and a\.b would both become harmodt/a_b-v0"):
        export_data(ExportConfig(tmp_path / "store", tmp_path / "out"), progress=False)


@pytest.mark.parametrize(
    "make",
    [make_store, lambda path: make_repeated(path), lambda path: make_repeated(path, 50.0)],
    ids=["with prompts", "of repeated actions", "in other units"],
)
def test_the_command_says_how_to_import_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], DataStore],
) -> None:
    store = make(tmp_path / "store")
    out = str(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["data", "export", str(store.path), "--output", out])
    run_command(main)
    command = capsys.readouterr().out.partition("imports the data again: python -m harmodt.")[2]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    run_command(main)
    again = DataStore.open(tmp_path / "STORE")
    assert again.environment == store.environment
    assert_same(again, store)


def make_repeated(path: Path, scale: float = 0.5) -> DataStore:
    """A store of the family whose tasks are another family's as well, without prompts."""
    environment = replace(family("metaworld-repeat-2").spec, reward_version="v1")
    writer = StoreWriter(path, {"collect": {}}, environment)
    rng = np.random.default_rng(0)
    with writer.task("reach-v3") as task:
        for length in (100, 30):
            episode = make_episode(rng, length)
            task.add(episode._replace(actions=scale * episode.actions))
    return writer.finish(["reach-v3"])


def test_how_episodes_ended_goes_out_and_in(tmp_path: Path) -> None:
    """Where a store does not know it, an ant that ended early fell."""
    spec = family("ant-dir").spec
    writer = StoreWriter(tmp_path / "first", {"collect": {}}, spec)
    with writer.task("ant-dir-0.500") as task:
        for length, terminated in ((90, 1), (90, 0), (90, -1), (200, -1), (200, 1)):
            arrays = np.ones((length, 27), np.float32), np.ones((length, 8), np.float32)
            task.add(Episode(*arrays, np.ones(length, np.float32), -1, terminated))
    writer.finish(["ant-dir-0.500"])
    export_data(ExportConfig(tmp_path / "first", tmp_path / "raw"), progress=False)
    name = "harmodt/ant-dir-0_500-v0"
    config = config_for(tmp_path, f"{name}=ant-dir-0.500", prompt_episodes=0)
    train = import_data(config, progress=False).task("ant-dir-0.500").train
    assert train.terminated.tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("flags", "terminated"),
    [
        ({"terminations": np.zeros(25, bool)}, 0),
        ({"terminations": np.arange(25) == 24, "truncations": np.zeros(25, bool)}, 0),
        ({"truncations": np.zeros(25, bool)}, 0),
    ],
)
def test_an_episode_that_was_stopped_in_meta_world_did_not_terminate(
    tmp_path: Path, flags: dict[str, np.ndarray], terminated: int
) -> None:
    """Its environments go on after a success, whatever ended the recording."""
    write_dataset(tmp_path / "raw", buffers=[make_buffer(i, **flags) for i in range(3)])
    train = import_data(config_for(tmp_path), progress=False).task("reach-v3").train
    assert train.terminated.tolist() == [terminated]


def test_an_episode_with_as_many_observations_as_actions_is_named_and_may_be_skipped(
    tmp_path: Path,
) -> None:
    buffers = [make_buffer(i) for i in range(6)]
    buffers[2] = make_buffer(2, observations=make_buffer(2).observations[:25])
    write_dataset(tmp_path / "raw", buffers=buffers)
    reason = (
        "reach-v0, episode 2: it has 25 observations and 25 actions, but an episode in Minari ha"
    )
    with pytest.raises(UserError, match=reason):
        import_data(config_for(tmp_path), progress=False)
    store = import_data(config_for(tmp_path, skip_bad_episodes=True), progress=False)
    assert store.task("reach-v3").train.returns.tolist() == [25, 50, 100]
    assert store.task("reach-v3").prompts.returns.tolist() == [125, 150]
    [skipped] = store.provenance["skipped"]["reach-v3"]
    assert reason in skipped


def test_a_data_set_with_fewer_steps_than_it_says_is_refused(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "raw")
    _metadata(lambda values: values.update(total_steps=151))(path)
    with pytest.raises(UserError, match="its episodes have 150 steps, but its metadata say 151"):
        import_data(config_for(tmp_path), progress=False)


def test_prompts_that_cannot_be_used_are_not_replaced_by_others(tmp_path: Path) -> None:
    write_dataset(tmp_path / "raw")
    write_dataset(tmp_path / "raw", "reach-prompts-v0", [make_buffer(0, rewards=np.full(25, 1e9))])
    pairs = ("reach-v0=reach", "reach-prompts-v0=reach")
    config = config_for(tmp_path, *pairs, skip_bad_episodes=True)
    with pytest.raises(UserError, match=r"reach-v3: none of its prompts can be used: .*up to"):
        import_data(config, progress=False)
