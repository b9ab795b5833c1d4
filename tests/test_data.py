from __future__ import annotations

import io
import os
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harmodt import environments
from harmodt.data import importers
from harmodt.data.__main__ import main
from harmodt.data.importing import ImportConfig, import_data
from harmodt.data.store import DataStore, Episode
from harmodt.environments.metaworld import MetaWorld
from harmodt.errors import UserError, run_command

Arrays = dict[str, np.ndarray]


def make_arrays(seed: int, length: int = 25) -> Arrays:
    """An episode in the public layout; its return grows with the seed."""
    generator = np.random.default_rng(seed)
    return {
        "observations": generator.normal(size=(length, 39)).astype(np.float32),
        "next_observations": np.zeros((length, 39), np.float32),
        "actions": generator.normal(size=(length, 4)).astype(np.float32) * 2,
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
        (lambda file: file.write_bytes(file.read_bytes()[:3000]), "is truncated or no npz file"),
        (lambda file: file.write_bytes(b""), "is truncated or no npz file"),
        (lambda file: file.write_bytes(b"hello" * 99), "is truncated or no npz file"),
        (lambda file: np.save(file.open("wb"), np.zeros(3)), "is a single array"),
        (_flip_a_byte, "observations is damaged"),
        (_without("actions"), "has no key 'actions' .*it has observations, next_observations"),
        (_without("rewards"), "has no key 'rewards'"),
        (_replace("observations", lambda a: a[:, :38]), r"observations has the shape \(25, 38\)"),
        (_replace("actions", lambda a: a[:, :, None]), r"actions has the shape \(25, 4, 1\)"),
        (_replace("rewards", lambda a: np.array(1.0)), r"rewards has the shape \(\) and \(T\)"),
        (_replace("actions", lambda a: a[:20]), "actions has 20 steps and observations has 25"),
        (_replace("observations", _with_nan), "observations holds NaN or infinity"),
        (_replace("actions", _with_nan), "actions holds NaN or infinity"),
        (_replace("rewards", _with_nan), "rewards holds NaN or infinity"),
        (_replace("rewards", lambda a: a.astype(float) + 1e300), "rewards holds NaN or infinity"),
        (_replace("actions", lambda a: a.astype(object)), "actions .*holds no plain"),
        (_replace("actions", lambda a: a.astype(str)), "actions .*holds no plain"),
        (lambda file: np.savez(file, **make_arrays(1, 0)), "the episode has 0 steps"),
        (lambda file: np.savez(file, **make_arrays(1, 19)), "the episode has 19 steps and 20 are"),
        (lambda file: (file.unlink(), file.symlink_to("gone")), "is missing"),
        (lambda file: (file.unlink(), os.mkfifo(file)), "is no regular file"),
        (lambda file: (file.unlink(), file.mkdir()), "is no regular file"),
        (lambda file: (file.unlink(), file.symlink_to("/dev/zero")), "is no regular file"),
        (_with("success", np.full((25, 1), np.nan)), "success holds NaN or infinity"),
        (_with("success", np.ones(24)), "success has 24 steps and observations has 25"),
        (_with("success", np.ones((25, 2))), r"success has the shape \(25, 2\)"),
        (_with("success", np.array(1)), r"success has the shape \(\)"),
        (_replace("rewards", lambda a: a + 1e30), "rewards holds 1e[+]30, beyond 1e[+]06"),
        (_replace("observations", lambda a: a * 0 - 3e38), r"observations holds -3e[+]38, beyond"),
        (_encrypt, "is encrypted"),
        (lambda file: _claim(file, (10**12, 39)), "observations is damaged or holds no plain"),
        (lambda file: _claim(file, (2**40, 2**40)), "observations is damaged or holds no plain"),
        (lambda file: _claim(file, "(25,\n"), "observations is damaged or holds no plain"),
        (lambda file: _claim(file, "[" * 5000), "observations is damaged or holds no plain"),
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
    source = write_source(tmp_path / "raw")
    np.savez(source / "reach-v2" / "1.npz", **make_arrays(1, 0))
    with pytest.raises(UserError, match="the episode has 0 steps"):
        import_data(ImportConfig(source, tmp_path / "store", min_length=1), progress=False)


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
    with pytest.raises(UserError, match=r"\(7, 4\) and \(T, 2\) is needed: is this data of toy"):
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
        ({"episodes": 13}, "reach-v3 has 12 episodes and 13 are asked for"),
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
    row = "button-press-topdown-wall-v3 10 250 25.0 137.5 250.0 unknown 2"
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
