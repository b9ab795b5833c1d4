from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmodt import environments
from harmodt.data import importers
from harmodt.data.__main__ import main
from harmodt.data.importers.arrays import ending
from harmodt.data.importing import ImportConfig, import_data
from harmodt.data.store import DataStore, Episode
from harmodt.data.writer import StoreWriter
from harmodt.environments.metaworld import MetaWorld
from harmodt.errors import UserError, run_command

Arrays = dict[str, np.ndarray]


def make_arrays(seed: int, length: int = 25) -> Arrays:
    """An episode in the public layout; its return grows with the seed."""
    generator = np.random.default_rng(seed)
    return {
        "observations": generator.normal(size=(length, 39)).astype(np.float32),
        "next_observations": np.zeros((length, 39), np.float32),
        "actions": generator.normal(size=(length, 4)).astype(np.float32),
        "rewards": np.full((length, 1), seed + 1, np.float32),
        "terminals": np.zeros((length, 1)),
    }


def write_source(root: Path, episodes: int = 12, tasks: tuple[str, ...] = ("reach-v2",)) -> Path:
    for task in tasks:
        (root / task).mkdir(parents=True)
        for number in range(episodes):
            np.savez(root / task / f"{number}.npz", **make_arrays(number))
    return root


def run(*arguments: object) -> None:
    sys.argv = ["data", *map(str, arguments)]
    run_command(main)


@pytest.fixture(autouse=True)
def keep_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


def test_an_import_holds_the_episodes_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    source = write_source(tmp_path / "raw", tasks=("reach-v2", "push-v2"))
    config = ImportConfig(source, tmp_path / "store", ("reach", "push-v2"), prompt_episodes=3)
    store = import_data(config, progress=False)
    store.verify()
    assert store.tasks == ("reach-v3", "push-v3")
    for name in store.tasks:
        train, prompts = store.task(name).train, store.task(name).prompts
        expected = [make_arrays(number) for number in range(12)]
        for key in ("observations", "actions", "rewards"):
            whole = [arrays[key].squeeze() for arrays in expected]
            if key == "actions":
                whole = [np.clip(actions, -1, 1) for actions in whole]
            np.testing.assert_array_equal(getattr(train, key), np.concatenate(whole[:9]))
            np.testing.assert_array_equal(getattr(prompts, key), np.concatenate(whole[9:]))
        assert train.returns.tolist() == [25 * (number + 1) for number in range(9)]
        assert train.successes.tolist() == [-1] * 9


def test_every_task_that_is_found_is_imported_by_default(tmp_path: Path) -> None:
    source = write_source(tmp_path / "raw", 3, ("sweep-v2", "reach-v2", "notes", "mt5"))
    store = import_data(ImportConfig(source, tmp_path / "store", prompt_episodes=1), progress=False)
    assert store.tasks == ("reach-v3", "sweep-v3")


def test_the_layout_of_mtdiff_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "reach" / "run-1" / "dataset"
    folder.mkdir(parents=True)
    for number in range(3):
        np.savez_compressed(folder / f"{number}.npz", **make_arrays(number))
    config = ImportConfig(tmp_path / "raw", tmp_path / "store", ("reach-v2",), prompt_episodes=1)
    assert len(import_data(config, progress=False).task("reach-v3").train) == 2


def test_only_the_first_episodes_are_read_where_this_is_asked(tmp_path: Path) -> None:
    source = write_source(tmp_path / "raw")
    config = ImportConfig(source, tmp_path / "store", ("reach",), episodes=4, prompt_episodes=1)
    train = import_data(config, progress=False).task("reach-v3").train
    assert train.returns.tolist() == [25, 50, 75]


def test_success_and_flat_float64_arrays_are_understood(tmp_path: Path) -> None:
    source = write_source(tmp_path / "raw", 3)
    for number in range(3):
        arrays = {key: value.astype(np.float64) for key, value in make_arrays(number).items()}
        arrays["rewards"] = arrays["rewards"][:, 0]
        arrays["success"] = np.arange(25)[:, None] == (7 if number else -1)
        np.savez(source / "reach-v2" / f"{number}.npz", **arrays)
    config = ImportConfig(
        source, tmp_path / "store", ("reach",), prompt_episodes=1, clip_actions=False
    )
    task = import_data(config, progress=False).task("reach-v3")
    assert task.train.successes.tolist() == [0, 1]
    assert task.prompts.successes.tolist() == [1]
    np.testing.assert_array_equal(task.train.actions[:25], make_arrays(0)["actions"])


def test_an_import_holds_few_episodes_in_memory(tmp_path: Path) -> None:
    source = write_source(tmp_path / "raw", 0)
    arrays = make_arrays(0, length=500)
    size = sum(array.nbytes for array in arrays.values())
    for number in range(80):
        np.savez(source / "reach-v2" / f"{number}.npz", **arrays)
    tracemalloc.start()
    import_data(ImportConfig(source, tmp_path / "store"), progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15 * size


def _replace(key: str, value: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        arrays = make_arrays(1)
        np.savez(file, **{**arrays, key: value(arrays[key])})

    return edit


def _without(key: str) -> Callable[[Path], None]:
    return lambda file: np.savez(file, **{k: v for k, v in make_arrays(1).items() if k != key})


def _with(key: str, value: np.ndarray) -> Callable[[Path], None]:
    return lambda file: np.savez(file, **make_arrays(1), **{key: value})


def _encrypt(file: Path) -> None:
    """Set the flag of encryption wherever the archive has its flags."""
    content = bytearray(file.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := content.find(mark, at + 1)) >= 0:
            content[at + offset] |= 1
    file.write_bytes(content)


def _claim(file: Path, shape: object) -> None:
    """Observations whose header claims a shape that nobody has the memory for, or none at all."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode()
    start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(file, "w") as archive:
        for key, array in make_arrays(1).items():
            content = io.BytesIO()
            np.save(content, array)
            archive.writestr(f"{key}.npy", start if key == "observations" else content.getvalue())


def _bomb(file: Path) -> None:
    """A small archive that says in its directory that an array unpacks to gigabytes."""
    np.savez_compressed(file, **make_arrays(1))
    content = bytearray(file.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (2**31).to_bytes(4, "little")
    file.write_bytes(content)


def _with_nan(array: np.ndarray) -> np.ndarray:
    array[7] = np.nan
    return array


def _flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[1000] ^= 1  # within the observations
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (
            lambda file: file.write_bytes(file.read_bytes()[:3000]),
            "is truncated or not an npz file",
        ),
        (lambda file: file.write_bytes(b""), "is truncated or not an npz file"),
        (lambda file: file.write_bytes(b"hello" * 99), "is truncated or not an npz file"),
        (lambda file: np.save(file.open("wb"), np.zeros(3)), "is a single array"),
        (_flip_a_byte, "observations is damaged"),
        (_without("actions"), "has no key 'actions' .*it has observations, next_observations"),
        (_without("rewards"), "has no key 'rewards'"),
        (_replace("observations", lambda a: a[:, :38]), r"observations has the shape \(25, 38\)"),
        (_replace("actions", lambda a: a[:, :, None]), r"actions has the shape \(25, 4, 1\)"),
        (_replace("rewards", lambda a: np.array(1.0)), r"rewards has the shape \(\), but \(T\)"),
        (_replace("actions", lambda a: a[:20]), "actions has 20 steps, but observations has 25"),
        (_replace("observations", _with_nan), "observations holds NaN or infinity"),
        (_replace("actions", _with_nan), "actions holds NaN or infinity"),
        (_replace("rewards", _with_nan), "rewards holds NaN or infinity"),
        (_replace("rewards", lambda a: a.astype(float) + 1e300), "rewards holds NaN or infinity"),
        (_replace("actions", lambda a: a.astype(object)), "actions .*does not hold plain"),
        (_replace("actions", lambda a: a.astype(str)), "actions .*does not hold plain"),
        (lambda file: np.savez(file, **make_arrays(1, 0)), "the episode has 0 steps"),
        (
            lambda file: np.savez(file, **make_arrays(1, 19)),
            "the episode has 19 steps, but --min-length is 20",
        ),
        (lambda file: (file.unlink(), file.symlink_to("gone")), "is missing"),
        (lambda file: (file.unlink(), os.mkfifo(file)), "is not a regular file"),
        (lambda file: (file.unlink(), file.mkdir()), "is not a regular file"),
        (lambda file: (file.unlink(), file.symlink_to("/dev/zero")), "is not a regular file"),
        (_with("success", np.full((25, 1), np.nan)), "success holds NaN or infinity"),
        (_with("success", np.ones(24)), "success has 24 steps, but observations has 25"),
        (_with("success", np.ones((25, 2))), r"success has the shape \(25, 2\)"),
        (_with("success", np.array(1)), r"success has the shape \(\)"),
        (_replace("rewards", lambda a: a + 1e30), "rewards holds 1e[+]30, but .* up to 1e[+]06"),
        (
            _replace("observations", lambda a: a * 0 - 3e38),
            r"observations holds -3e[+]38, but .* up to",
        ),
        (_with("timeouts", np.arange(25) == 6), "timeouts is true at step 6 of 0 to 24"),
        (_with("dones", (np.arange(25) > 20)[:, None]), "dones is true at step 21 of 0 to 24"),
        (_replace("terminals", lambda a: a + 1), "terminals is true at step 0 of 0 to 24"),
        (_replace("terminals", lambda a: a * np.nan), "terminals holds NaN"),
        (_replace("terminals", lambda a: a[:9]), "terminals has 9 steps, but observations has 25"),
        (
            lambda file: np.savez(file, **make_arrays(1, 501)),
            "the episode has 501 steps, but an episode of",
        ),
        (_encrypt, "is encrypted"),
        (lambda file: _claim(file, (10**12, 39)), "observations is damaged or does not hold plain"),
        (
            lambda file: _claim(file, (2**40, 2**40)),
            "observations is damaged or does not hold plain",
        ),
        (lambda file: _claim(file, "(25,\n"), "observations is damaged or does not hold plain"),
        (lambda file: _claim(file, "[" * 5000), "observations is damaged or does not hold plain"),
        (_bomb, "observations would take 2.1 GB of memory"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_nothing_is_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    edit: Callable[[Path], None],
    reason: str,
) -> None:
    source = write_source(tmp_path / "raw", tasks=("reach-v2", "push-v2"))
    edit(source / "push-v2" / "1.npz")
    config = ImportConfig(source, tmp_path / "store", ("reach", "push"), min_length=20)
    with pytest.raises(UserError, match=rf"push-v2/1\.npz:? {reason}"):
        import_data(config, progress=False)
    assert not (tmp_path / "store").exists()

    with pytest.raises(SystemExit) as stop:
        run("import", source, "--output", tmp_path / "store", "--tasks", "push", "--min-length", 20)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


def test_an_empty_episode_is_refused_even_without_a_context(tmp_path: Path) -> None:
    """Without the advice to lower --min-length, which can be no lower."""
    source = write_source(tmp_path / "raw")
    np.savez(source / "reach-v2" / "1.npz", **make_arrays(1, 0))
    with pytest.raises(UserError, match=r"the episode has 0 steps: remove it$"):
        import_data(ImportConfig(source, tmp_path / "store", min_length=1), progress=False)


ENDS = ("terminals", "terminations", "terminated", "timeouts", "truncations", "truncated", "dones")


@pytest.mark.parametrize("key", [*ENDS, "done"])
def test_a_table_of_several_episodes_is_refused(tmp_path: Path, key: str) -> None:
    """As D4RL has them: 6 episodes of 75 steps one after the other."""
    source = write_source(tmp_path / "raw", 3)
    arrays = make_arrays(1, 450)
    np.savez(source / "reach-v2" / "1.npz", **arrays | {key: np.arange(1, 451) % 75 == 0})
    with pytest.raises(UserError, match=rf"1\.npz: {key} is true at step 74 of 0 to 449, so ano"):
        import_data(ImportConfig(source, tmp_path / "store", prompt_episodes=1), progress=False)


LAST, NEVER = np.arange(25) == 24, np.zeros(25)


@pytest.mark.parametrize(
    ("flags", "terminated"),
    [
        ({}, -1),
        ({"terminals": LAST}, 1),
        ({"terminals": LAST[:, None], "timeouts": NEVER}, 1),
        ({"terminals": LAST, "timeouts": LAST}, 1),
        ({"terminals": NEVER}, 0),
        ({"terminals": NEVER, "timeouts": LAST}, 0),
        ({"timeouts": LAST}, 0),
        ({"timeouts": NEVER}, -1),
        ({"truncations": LAST, "dones": LAST}, 0),
        ({"terminated": LAST, "truncated": NEVER}, 1),
        ({"dones": LAST}, -1),
        ({"dones": NEVER}, -1),
    ],
)
def test_a_file_says_how_its_episode_ended(tmp_path: Path, flags: Arrays, terminated: int) -> None:
    for task, sizes in (("ant-dir-0.500", (27, 8)), ("reach-v2", (39, 4))):
        (tmp_path / task).mkdir()
        arrays = {"observations": np.ones((25, sizes[0])), "actions": np.ones((25, sizes[1]))}
        np.savez(tmp_path / task / "0.npz", **arrays, rewards=np.ones(25), **flags)
        config = ImportConfig(tmp_path, tmp_path / f"store-{task}", (task,), prompt_episodes=0)
        store = import_data(config, progress=False)
        # An ant may fall. Meta-World goes on after a success, so that all its episodes are cut.
        expected = min(terminated, 0) if task == "reach-v2" else terminated
        assert store.task(store.tasks[0]).train.terminated.tolist() == [expected]


@given(
    flags=st.dictionaries(
        st.sampled_from([*ENDS, "done"]), st.lists(st.booleans(), min_size=3, max_size=3)
    )
)
def test_an_ending_is_what_the_flags_of_the_last_step_say(flags: dict[str, list[bool]]) -> None:
    arrays = {key: np.array(values, np.float32) for key, values in flags.items()}
    if any(first or second for first, second, _ in flags.values()):
        with pytest.raises(UserError, match=r"is true at step [01] of 0 to 2"):
            ending("here", arrays, np.zeros((3, 39)))
        return
    says = {key: values[2] for key, values in flags.items()}
    expected = 0 if any(key.startswith("termin") for key in says) else -1
    if any(says.get(key) for key in ("timeouts", "truncations", "truncated")):
        expected = 0
    if any(says.get(key) for key in ("terminals", "terminations", "terminated")):
        expected = 1
    assert ending("here", arrays, np.zeros((3, 39))) == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"reward_version": "banana"}, "metaworld has no reward version 'banana': give v1 or v2"),
        ({"reward_version": ""}, "metaworld has no reward version ''"),
        (
            {"reward_version": "v2", "family": "cheetah-vel"},
            "cheetah-vel has no reward version 'v2': leave --reward-version out",
        ),
    ],
)
def test_a_reward_version_that_a_family_lacks_is_refused(
    tmp_path: Path, changes: dict[str, str], reason: str
) -> None:
    source = write_source(tmp_path / "raw")
    with pytest.raises(UserError, match=reason):
        import_data(ImportConfig(source, tmp_path / "store", **changes), progress=False)  # type: ignore[arg-type]


def test_bad_episodes_are_skipped_and_listed_where_this_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path / "raw", 7, ("reach-v2", "push-v2"))
    _with_nan_file, short = source / "reach-v2" / "2.npz", source / "reach-v2" / "5.npz"
    _replace("rewards", _with_nan)(_with_nan_file)
    short.write_bytes(short.read_bytes()[:900])
    options = ("--output", tmp_path / "store", "--prompt-episodes", 2)
    with pytest.raises(SystemExit):
        run("import", source, *options)
    assert not (tmp_path / "store").exists()
    capsys.readouterr()
    run("import", source, *options, "--skip-bad-episodes")
    printed = capsys.readouterr().out
    store = DataStore.open(tmp_path / "store")
    reasons = [f"{_with_nan_file}: rewards holds NaN", f"{short} is truncated or not an npz file"]
    for listed in (printed.splitlines(), store.provenance["skipped"]["reach-v3"]):
        found = [line for line in listed if "2.npz" in line or "5.npz" in line]
        assert [reason in line for reason, line in zip(reasons, found, strict=True)] == [True] * 2
    assert "the import skipped 2 episodes" in printed
    assert store.task("reach-v3").train.returns.tolist() == [25, 50, 100]
    assert store.task("reach-v3").prompts.returns.tolist() == [125, 175]
    assert len(store.task("push-v3").train) == 5


def test_a_task_is_refused_where_too_few_episodes_are_left(tmp_path: Path) -> None:
    source = write_source(tmp_path / "raw", 3)
    config = ImportConfig(
        source, tmp_path / "store", prompt_episodes=2, skip_bad_episodes=True, min_length=25
    )
    for number, reason in (
        (0, "none is left for training"),
        (1, "none is"),
        (2, "can be used: .*"),
    ):
        np.savez(source / "reach-v2" / f"{number}.npz", **make_arrays(number, 24))
        with pytest.raises(UserError, match=reason):
            import_data(config, progress=False)


def test_what_the_system_refuses_to_read_is_not_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "raw")
    load = np.load

    def fail(file: Path, **options: object) -> object:
        if file.name == "3.npz":
            raise OSError(errno.EMFILE, "Too many open files")
        return load(file, **options)

    monkeypatch.setattr(np, "load", fail)
    config = ImportConfig(source, tmp_path / "store", skip_bad_episodes=True, prompt_episodes=1)
    with pytest.raises(OSError, match=r"Too many open files: .*3\.npz"):
        import_data(config, progress=False)


def test_actions_in_other_units_are_refused_unless_this_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path / "raw", 4, ("reach-v2", "push-v2"))
    for number in range(4):
        arrays = make_arrays(number)
        arrays["actions"] = np.where(np.arange(100).reshape(25, 4) < 63, 100.0, 0.5)
        np.savez(source / "push-v2" / f"{number}.npz", **arrays)
    options = ("--output", tmp_path / "store", "--prompt-episodes", 1)
    with pytest.raises(SystemExit):
        run("import", source, *options)
    assert "push-v3: 63.0% of the action values lie beyond [-1, 1]" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
    run("import", source, *options, "--max-clipped", "0.63")  # as the sentence advises
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    reach = np.mean([abs(make_arrays(number)["actions"]) > 1 for number in range(4)])
    (heading,) = (row for row in rows if row and row[0] == "task")
    assert heading[-3:] == ["clipped", "prompts", "size"]
    shown = {row[0]: row[7] for row in rows if row and row[0] in ("reach-v3", "push-v3")}
    assert shown == {"push-v3": "63.0%", "reach-v3": f"{reach:.1%}"}
    run("info", tmp_path / "store", "--json")
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert {name: task["clipped"] for name, task in tasks.items()} == {
        "push-v3": 0.63,
        "reach-v3": pytest.approx(reach),
    }


def test_an_import_that_is_repeated_says_that_nothing_was_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path / "raw", 3)
    command = ("import", source, "--output", tmp_path / "store", "--tasks", "reach")
    command = (*command, "--prompt-episodes", 1)
    run(*command)
    assert "nothing was imported" not in capsys.readouterr().out
    run(*command)
    assert "store was complete already, and its source has not changed" in capsys.readouterr().out
    shutil.rmtree(source)
    run(*command)
    printed = capsys.readouterr().out
    assert "nothing was imported" in printed and "its source was not checked for changes" in printed


def _touch(file: Path) -> None:
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize(
    "change",
    [
        _touch,
        lambda file: np.savez(file, **make_arrays(8)),
        lambda file: np.savez(file.with_name("9.npz"), **make_arrays(9)),
        lambda file: file.unlink(),
        lambda file: file.rename(file.with_name("7.npz")),
    ],
    ids=["touched", "written again", "one more", "one less", "renamed"],
)
@pytest.mark.parametrize("complete", [True, False])
def test_a_source_that_changed_since_the_import_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], object],
    complete: bool,
) -> None:
    source = write_source(tmp_path / "raw", 3, ("push-v2", "reach-v2"))
    config = ImportConfig(source, tmp_path / "store", ("reach", "push"), prompt_episodes=1)
    if complete:
        import_data(config, progress=False)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(StoreWriter, "finish", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                import_data(config, progress=False)
    before = {file: file.read_bytes() for file in (tmp_path / "store").rglob("*") if file.is_file()}
    change(source / "push-v2" / "1.npz")
    what = "an import" if complete else "an unfinished import"
    reason = rf"^nothing was imported: .*store holds {what} of .* files of push-v3 have changed"
    with pytest.raises(UserError, match=reason):
        import_data(config, progress=False)
    assert before == {file: file.read_bytes() for file in before}


def test_an_interrupted_import_of_the_same_source_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "raw", 3)
    config = ImportConfig(source, tmp_path / "store", prompt_episodes=1)
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            import_data(config, progress=False)
    import_data(config, progress=False).verify()


def test_a_source_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "raw", 3)
    task = StoreWriter.task

    def meanwhile(writer: StoreWriter, name: str) -> object:
        _touch(source / "reach-v2" / "0.npz")
        return task(writer, name)

    monkeypatch.setattr(StoreWriter, "task", meanwhile)
    config = ImportConfig(source, tmp_path / "store", prompt_episodes=1)
    with pytest.raises(UserError, match="the source's files of reach-v3 have changed since"):
        import_data(config, progress=False)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_the_store_says_what_is_known_of_the_environment(tmp_path: Path) -> None:
    source = write_source(tmp_path / "raw", 2)
    config = ImportConfig(source, tmp_path / "store", prompt_episodes=1)
    unknown = replace(MetaWorld.spec, reward_version=None)
    assert import_data(config, progress=False).environment == unknown
    config = replace(config, output=tmp_path / "v1", reward_version="v1")
    assert import_data(config, progress=False).environment == replace(unknown, reward_version="v1")


def test_another_family_has_its_own_sizes_and_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(environments.FAMILIES, "toy", "toy_family:Toy")
    for folder in ("slow", "quick", "reach-v2"):
        (tmp_path / "raw" / folder).mkdir(parents=True)
    arrays = {"observations": np.ones((7, 3)), "actions": np.ones((7, 2)), "rewards": np.ones(7)}
    for file in ("slow/0.npz", "slow/1.npz", "quick/0.npz", "quick/1.npz"):
        np.savez(tmp_path / "raw" / file, **arrays, success=np.ones(7))
    config = ImportConfig(
        tmp_path / "raw", tmp_path / "store", prompt_episodes=1, min_length=7, family="toy"
    )
    store = import_data(config, progress=False)
    assert store.tasks == ("quick", "slow")
    assert store.environment == environments.family("toy").spec
    assert store.task("slow").train.observations.shape == (7, 3)
    assert store.task("slow").train.successes.tolist() == [-1]  # the family has no success
    np.savez(tmp_path / "raw" / "slow" / "1.npz", **arrays | {"actions": np.ones((7, 4))})
    with pytest.raises(UserError, match=r"\(7, 4\), but \(T, 2\) is needed: is this data of toy"):
        import_data(replace(config, output=tmp_path / "other"), progress=False)


def test_a_format_is_a_class_and_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importers.IMPORTERS, "numbers", f"{__name__}:Numbers")
    config = ImportConfig(Path("3"), tmp_path / "store", prompt_episodes=1, format="numbers")
    task = import_data(config, progress=False).task("reach-v3")
    assert task.train.returns.tolist() == [0, 25]
    assert task.prompts.returns.tolist() == [50]


class Numbers(importers.Importer):
    """The source is the number of episodes; an episode is its number."""

    def tasks(self) -> tuple[str, ...]:
        return self.family.resolve_tasks(["reach"])

    def episodes(self, task: str) -> range:
        return range(int(self.source.name))

    def read(self, episode: int) -> Episode:
        zeros = np.zeros((25, 39), np.float32)
        return Episode(zeros, zeros[:, :4], np.full(25, episode, np.float32), 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "hdf"}, "no format 'hdf': choose from npz"),
        ({"family": "atari"}, "no environment family 'atari'"),
        ({"source": "missing"}, "missing is not a folder"),
        ({"source": "empty"}, "empty holds no folder named after a task"),
        ({"tasks": ("push",)}, "raw has no folder for push-v3"),
        ({"tasks": ("reech",)}, "did you mean 'reach-v3'"),
        ({"tasks": ("sweep",)}, "sweep-v2 holds no .npz file"),
        ({"tasks": ("soccer",)}, "several folders for soccer-v3, soccer and soccer-v2"),
        ({"prompt_episodes": 12}, "reach-v3 has 12 episodes, and none is left"),
        ({"prompt_episodes": -1}, "prompt_episodes is -1"),
        ({"episodes": 0}, "episodes is 0"),
        ({"episodes": 13}, "reach-v3 has 12 episodes, but --episodes asks for 13"),
        ({"min_length": 0}, "min_length is 0"),
        ({"output": "taken"}, "taken holds other files"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    write_source(tmp_path / "raw")
    for folder in ("empty", "raw/sweep-v2", "raw/soccer", "raw/soccer-v2", "taken/precious"):
        (tmp_path / folder).mkdir(parents=True)
    options: dict[str, object] = {"source": "raw", "output": "store", "tasks": ("reach",)}
    options |= {"tasks": ()} if "source" in changes else {}
    options |= changes
    for name in ("source", "output"):
        options[name] = tmp_path / str(options[name])
    with pytest.raises(UserError, match=reason):
        import_data(ImportConfig(**options), progress=False)  # type: ignore[arg-type]
    assert not (tmp_path / "store").exists()
    assert (tmp_path / "taken" / "precious").exists()


def test_the_commands_import_show_and_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path / "raw", tasks=("button-press-topdown-wall-v2",))
    options = ["--prompt-episodes", 2, "--reward-version", "v1"]
    run("import", source, "--output", tmp_path / "store", *options)
    run("info", tmp_path / "store")
    beyond = np.mean([abs(make_arrays(number)["actions"]) > 1 for number in range(12)])
    row = f"button-press-topdown-wall-v3 10 250 25.0 137.5 250.0 unknown {beyond:.1%} 2"
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    # Printed after the import and by the second command.
    assert sum(line.startswith(row) for line in lines) == 2
    environment = "metaworld (39 observations, 4 actions, reward version v1)"
    assert " ".join(lines).count(environment) == 2
    run("verify", tmp_path / "store")
    assert "every checksum is right" in capsys.readouterr().out

    file = tmp_path / "store" / "button-press-topdown-wall-v3" / "rewards.npy"
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        run("verify", tmp_path / "store")
    assert stop.value.code == 2
    assert f"error: {file} is damaged (its checksum fails)" in capsys.readouterr().err
    assert DataStore.open(tmp_path / "store").tasks == ("button-press-topdown-wall-v3",)
