from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import assert_same, begin
from tiny import SPEC, TASKS, as_version_2, make_episode, make_store

from harmodt.data.__main__ import main
from harmodt.data.merging import MergeConfig, merge_stores
from harmodt.data.store import EPISODE_ARRAYS, MANIFEST, UNFINISHED, DataStore, Episode
from harmodt.data.writer import StoreWriter
from harmodt.environments import EnvironmentSpec
from harmodt.errors import UserError

REACH, PUSH, DRAWER = TASKS
Parts = dict[str, tuple[list[Episode], list[Episode]]]


def random_parts(seed: int, tasks: Sequence[str], prompts: int = 2, shortest: int = 1) -> Parts:
    """Training and prompt episodes of some tasks, of different lengths and successes."""
    rng = np.random.default_rng(seed)

    def episodes(count: int) -> list[Episode]:
        drawn = [make_episode(rng, int(rng.integers(shortest, 40)), 100.0) for _ in range(count)]
        return [
            episode._replace(success=int(rng.integers(-1, 2)), terminated=int(rng.integers(-1, 2)))
            for episode in drawn
        ]

    return {task: (episodes(3), episodes(prompts)) for task in tasks}


def write(path: Path, *parts: Parts, environment: EnvironmentSpec = SPEC, **more: Any) -> DataStore:
    """A store of all parts, written at once."""
    writer = StoreWriter(path, {"test": path.name, **more}, environment)
    tasks = list(dict.fromkeys(task for part in parts for task in part))
    for task in tasks:
        with writer.task(task) as task_writer:
            for train, prompts in (part[task] for part in parts if task in part):
                for episode in train:
                    task_writer.add(episode)
                for episode in prompts:
                    task_writer.add_prompt(episode)
    return writer.finish(tasks)


def merge(*stores: Path | DataStore, output: Path) -> DataStore:
    paths = tuple(s.path if isinstance(s, DataStore) else s for s in stores)
    return merge_stores(MergeConfig(paths, output), progress=False)


def contents(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def assert_same_but_for_provenance(a: DataStore, b: DataStore) -> None:
    of_a, of_b = contents(a.path), contents(b.path)
    of_a.pop(MANIFEST), of_b.pop(MANIFEST)
    assert of_a == of_b
    assert list(a.manifest["tasks"]) == list(b.manifest["tasks"])
    assert a.manifest | {"provenance": {}} == b.manifest | {"provenance": {}}


def test_a_merged_store_is_the_one_written_at_once(tmp_path: Path) -> None:
    parts = (
        random_parts(0, (PUSH, REACH)),
        random_parts(1, (DRAWER, REACH), prompts=0),
        random_parts(2, (REACH, "sweep-v3", PUSH)),
    )
    stores = [write(tmp_path / name, part) for name, part in zip("abc", parts, strict=True)]
    merged = merge(*stores, output=tmp_path / "merged")
    merged.verify()
    assert merged.tasks == (PUSH, REACH, DRAWER, "sweep-v3")
    assert_same_but_for_provenance(merged, write(tmp_path / "whole", *parts))

    reach = merged.task(REACH)
    trained, held = ([e for part in parts for e in part[REACH][kind]] for kind in (0, 1))
    for episodes, expected in ((reach.train, trained), (reach.prompts, held)):
        for name in ("observations", "actions", "rewards"):
            whole = np.concatenate([getattr(episode, name) for episode in expected])
            np.testing.assert_array_equal(getattr(episodes, name), whole)
        assert episodes.successes.tolist() == [episode.success for episode in expected]
        assert episodes.terminated.tolist() == [episode.terminated for episode in expected]
    observations = np.concatenate([e.observations for e in trained]).astype(np.float64)
    np.testing.assert_allclose(reach.observation_mean, observations.mean(0), rtol=1e-6)
    np.testing.assert_allclose(reach.observation_std, observations.std(0), rtol=1e-4, atol=1e-6)


def test_the_provenance_names_the_inputs(tmp_path: Path) -> None:
    a = write(tmp_path / "a", random_parts(0, (REACH,)), collect={"seed": 0})
    b = write(tmp_path / "b", random_parts(1, (PUSH,)), collect={"seed": 1})
    assert merge(a, b, output=tmp_path / "merged").provenance == {
        "merge": {"stores": [str(a.path), str(b.path)], "checksums": [a.checksum, b.checksum]},
        "inputs": [
            {"test": "a", "collect": {"seed": 0}},
            {"test": "b", "collect": {"seed": 1}},
        ],
    }


def test_a_store_can_be_merged_again(tmp_path: Path) -> None:
    parts = [random_parts(seed, (REACH,)) for seed in range(3)]
    a, b, c = (write(tmp_path / n, part) for n, part in zip("abc", parts, strict=True))
    merged = merge(merge(a, b, output=tmp_path / "ab"), c, output=tmp_path / "abc")
    assert_same_but_for_provenance(merged, write(tmp_path / "whole", *parts))


def test_a_store_of_version_2_can_be_merged(tmp_path: Path) -> None:
    parts = [random_parts(seed, (REACH,)) for seed in range(2)]
    a, b = (write(tmp_path / n, part) for n, part in zip("ab", parts, strict=True))
    merged = merge(as_version_2(a), b, output=tmp_path / "merged")
    merged.verify()
    for part, kind in ((merged.task(REACH).train, 0), (merged.task(REACH).prompts, 1)):
        known = [episode.terminated for episode in parts[1][REACH][kind]]
        assert part.terminated.tolist() == [-1] * len(parts[0][REACH][kind]) + known


def test_the_same_command_again_opens_what_is_there(tmp_path: Path) -> None:
    a, b = (write(tmp_path / n, random_parts(i, (REACH,))) for i, n in enumerate("ab"))
    output = tmp_path / "merged"
    merge(a, b, output=output)
    before = contents(output)
    merge(a, b, output=output)
    with pytest.raises(UserError, match=r"already holds a store with stores = .*/a'.* instead of"):
        merge(b, a, output=output)
    shutil.rmtree(a.path)
    write(a.path, random_parts(7, (REACH,)))
    with pytest.raises(UserError, match="already holds a store with checksums = "):
        merge(a, b, output=output)
    assert contents(output) == before


def test_an_interrupted_merge_goes_on_after_its_finished_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = (random_parts(0, (REACH, PUSH)), random_parts(1, (PUSH, DRAWER)))
    a, b = (write(tmp_path / n, part) for n, part in zip("ab", parts, strict=True))
    file = b.path / PUSH / "rewards.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    output = tmp_path / "merged"
    with pytest.raises(UserError, match=r"b/push-v3/rewards\.npy is damaged .its checksum"):
        merge(a, b, output=output)
    assert {path.name for path in output.iterdir()} == {UNFINISHED, REACH}
    with pytest.raises(
        UserError, match="is unfinished: to continue, repeat the command that began"
    ):
        DataStore.open(output)
    with pytest.raises(UserError, match="an unfinished store that was begun with other settings"):
        merge(b, a, output=output)

    file.write_bytes(whole)
    begun: list[str] = []
    task = StoreWriter.task
    monkeypatch.setattr(StoreWriter, "task", lambda w, name: (begun.append(name), task(w, name))[1])
    merged = merge(a, b, output=output)
    assert begun == [PUSH, DRAWER]
    assert contents(merged.path) == contents(merge(a, b, output=tmp_path / "other").path)


@pytest.mark.parametrize("array", [p + a for p in ("", "prompts/") for a in EPISODE_ARRAYS])
@pytest.mark.parametrize("which", ["a", "b"])
def test_an_array_that_changed_is_named(tmp_path: Path, which: str, array: str) -> None:
    for index, name in enumerate("ab"):
        write(tmp_path / name, random_parts(index, (REACH,), shortest=5))
    file = tmp_path / which / REACH / f"{array}.npy"
    content = bytearray(file.read_bytes())
    # The second number, where the store looks right: a step more or less in the first episode.
    content[129 if array.endswith(("successes", "terminated")) else 136] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{which}/{REACH}/{array}\.npy is damaged .its checksum"):
        merge(tmp_path / "a", tmp_path / "b", output=tmp_path / "merged")
    assert not (tmp_path / "merged" / MANIFEST).exists()
    assert not (tmp_path / "merged" / REACH).exists()


def test_stores_that_cannot_be_merged_are_named(tmp_path: Path) -> None:
    a = write(tmp_path / "a", random_parts(0, (REACH,)))
    b = write(tmp_path / "b", random_parts(1, (REACH,)))
    older = replace(SPEC, reward_version="v1", episode_length=200)
    old = write(tmp_path / "old", random_parts(2, (PUSH,)), environment=older)
    shutil.copytree(a.path, tmp_path / "copy")
    (tmp_path / "link").symlink_to(b.path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").touch()
    before = contents(tmp_path)
    cases: list[tuple[list[Any], str, str]] = [
        ([], "c", "no store is named: give two or more"),
        ([a], "c", "only one store is named: give two or more"),
        ([a, b, a], "c", "a and .*/a are the same store"),
        ([a, b, tmp_path / "copy"], "c", "a and .*/copy are the same store, .* leave one of them"),
        ([a, b], "b", "--output .*/b lies in .*/b"),
        ([a, b], "b/c", "--output .*/b/c lies in .*/b"),
        ([a, b], "link/c", "--output .*/link/c lies in .*/b"),
        ([a, tmp_path / "link"], "b", "--output .*/b lies in .*/link"),
        (
            [a, b, old],
            "c",
            r"a and .*/old have different .* \(episode_length: 500 and 200, reward_version",
        ),
        ([a, tmp_path / "c"], "d", "there is no store in .*/c"),
        ([a, b], "taken", "taken holds other files"),
        ([a, b], "", "holds other files"),
    ]
    for stores, output, reason in cases:
        with pytest.raises(UserError, match=reason):
            merge(*stores, output=tmp_path / output)
    assert contents(tmp_path) == before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_merge_holds_few_episodes_in_memory(tmp_path: Path) -> None:
    episode = make_episode(np.random.default_rng(0), 2000)
    size = sum(array.nbytes for array in episode[:3])
    for name in "ab":
        writer = StoreWriter(tmp_path / name, {"name": name}, SPEC)
        with writer.task(REACH) as task:
            for _ in range(60):
                task.add(episode)
        writer.finish([REACH])
    script = """
import re, resource, sys
from pathlib import Path
from harmodt.data.merging import MergeConfig, merge_stores
a, b, output, more = sys.argv[1:]
status = Path("/proc/self/status").read_text()
now = 1024 * int(re.search(r"VmData:\\s+(\\d+) kB", status)[1])
resource.setrlimit(resource.RLIMIT_DATA, (now + int(more), resource.RLIM_INFINITY))
merge_stores(MergeConfig((Path(a), Path(b)), Path(output)), progress=False)
"""
    paths = [str(tmp_path / name) for name in ("a", "b", "merged")]
    # Of 120 episodes that are written, in 15 times the memory of one.
    command = [sys.executable, "-c", script, *paths, str(15 * size)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(DataStore.open(tmp_path / "merged").task(REACH).train) == 120


def test_a_merged_store_trains_as_the_one_written_at_once(tmp_path: Path) -> None:
    parts = [random_parts(i, tasks, shortest=5) for i, tasks in enumerate((TASKS[:2], TASKS[1:]))]
    stores = [write(tmp_path / name, part) for name, part in zip("ab", parts, strict=True)]
    begin(merge(*stores, output=tmp_path / "merged"), tmp_path / "run")
    begin(write(tmp_path / "whole", *parts), tmp_path / "other")
    assert_same(tmp_path / "run", tmp_path / "other")


def test_the_command_merges_and_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate("ab"):
        make_store(tmp_path / name, (REACH,), seed=seed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data", "merge", "a", "b", "--output", "c"])
    main()
    printed = capsys.readouterr().out
    assert "12/12 episodes" in printed
    assert "nothing was merged" not in printed
    main()
    assert "nothing was merged: c was complete already" in capsys.readouterr().out
    assert [line.split()[:3] for line in printed.splitlines() if "v3" in line] == [
        [REACH, "6", "162"]
    ]
