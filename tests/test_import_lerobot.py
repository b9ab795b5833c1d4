"""LeRobot's Meta-World data set, in the columns and the two layouts that it has."""

from __future__ import annotations

import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from lerobot_files import (
    IDS,
    PUSH,
    PUSH_BACK,
    Columns,
    make_columns,
    write_source,
    write_total,
)
from pyarrow import parquet

from harmodt.data.importers import lerobot
from harmodt.data.importers.lerobot import TASK_IDS
from harmodt.data.importing import ImportConfig, import_data
from harmodt.data.transitions import is_terminal
from harmodt.environments.metaworld_names import ALL_TASKS
from harmodt.errors import UserError


def config_for(tmp_path: Path, **changes: object) -> ImportConfig:
    source, output = tmp_path / "raw", tmp_path / "store"
    return replace(ImportConfig(source, output, prompt_episodes=1, format="lerobot"), **changes)  # type: ignore[arg-type]


def check(tmp_path: Path) -> None:
    """Import the source; what is read has to be what `make_columns` wrote."""
    store = import_data(config_for(tmp_path), progress=False)
    store.verify()
    assert store.tasks == ("push-back-v3", "push-v3", "window-open-v3")
    expected = {"push-v3": (0, 3, 6), "push-back-v3": (1, 4, 7), "window-open-v3": (2, 5, 8)}
    for name, numbers in expected.items():
        task = store.task(name)
        episodes = [make_columns(number, 0) for number in numbers]
        for part, which in ((task.train, episodes[:2]), (task.prompts, episodes[2:])):
            for key, column in (
                ("observations", "observation.environment_state"),
                ("actions", "action"),
                ("rewards", "next.reward"),
            ):
                values = np.concatenate(
                    [np.array(e[column].to_pylist(), np.float32) for e in which]
                )
                values = values.clip(-1, 1) if key == "actions" else values
                np.testing.assert_array_equal(getattr(part, key), values)
        successes = [*task.train.successes, *task.prompts.successes]
        assert successes == [number % 2 == 0 for number in numbers]


def test_tasks_are_told_by_their_number_where_they_share_a_sentence(tmp_path: Path) -> None:
    write_source(tmp_path / "raw")
    check(tmp_path)


def test_the_numbers_are_those_of_lerobot() -> None:
    assert sorted(TASK_IDS) == sorted(ALL_TASKS)
    some = {0: "assembly", 4: "button-press-topdown", 6: "button-press", 18: "drawer-open"}
    some |= {32: "pick-place-wall", 33: "plate-slide-back-side", 36: "plate-slide", 40: "reach"}
    some |= {37: "push-back", 38: "push", 39: "push-wall", 48: "window-open", 49: "window-close"}
    for number, name in some.items():
        assert TASK_IDS[number] == f"{name}-v3"


@pytest.mark.parametrize("rows", [None, 7])
def test_files_of_several_episodes_are_read(tmp_path: Path, rows: int | None) -> None:
    """As v3.0 has them, with row groups that begin anywhere."""
    tables = [pa.table(make_columns(number, task_id)) for number, task_id in enumerate(IDS)]
    folder = tmp_path / "raw" / "data" / "chunk-000"
    folder.mkdir(parents=True)
    for file, part in enumerate((tables[:5], tables[5:], [tables[0][:0]])):
        table = pa.concat_tables(part)
        parquet.write_table(table, folder / f"file-{file:03d}.parquet", row_group_size=rows)
    write_total(tmp_path / "raw", len(IDS))
    check(tmp_path)


def test_other_forms_of_the_columns_are_understood(tmp_path: Path) -> None:
    write_source(tmp_path / "raw")
    for number, task_id in enumerate(IDS):
        columns = make_columns(number, task_id)
        [file] = (tmp_path / "raw").glob(f"data/*/episode_{number:06d}.parquet")
        for key, width in (("observation.environment_state", 39), ("action", 4)):
            flat = columns[key].flatten().cast(pa.float64())
            columns[key] = pa.FixedSizeListArray.from_arrays(flat, width)
        for key in ("next.reward", "next.success", "task_id", "frame_index", "timestamp"):
            columns[key] = pa.LargeListArray.from_arrays(
                pa.array(np.arange(26 + number)), columns[key]
            )
        parquet.write_table(pa.table(columns), file)
    check(tmp_path)


def test_without_a_column_of_success_it_is_not_known(tmp_path: Path) -> None:
    write_source(tmp_path / "raw")
    for file in (tmp_path / "raw").glob("data/*/*.parquet"):
        parquet.write_table(parquet.read_table(file).drop(["next.success"]), file)
    store = import_data(config_for(tmp_path, tasks=("push",)), progress=False)
    assert store.task("push-v3").train.successes.tolist() == [-1, -1]


@pytest.fixture
def arrow_peak() -> Iterator[Callable[[], int]]:
    """Most bytes that Arrow had at once since the beginning of the test."""
    before = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(before)
    pa.set_memory_pool(counted)
    yield counted.max_memory
    pa.set_memory_pool(before)


def test_an_import_holds_one_file_in_memory(tmp_path: Path, arrow_peak: Callable[[], int]) -> None:
    write_source(tmp_path / "raw", [])
    folder = tmp_path / "raw" / "data" / "chunk-000"
    folder.mkdir(parents=True)
    columns = make_columns(0, PUSH, 500)
    for number in range(80):
        columns["episode_index"] = pa.array(np.full(500, number))
        parquet.write_table(pa.table(columns), folder / f"episode_{number:06d}.parquet")
    write_total(tmp_path / "raw", 80)
    size = 500 * 4 * (39 + 4 + 1)
    tracemalloc.start()
    import_data(config_for(tmp_path), progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size < arrow_peak() < 8 * size
    assert peak < 12 * size


def _change(change: Callable[[Columns], object]) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        columns = make_columns(4, PUSH_BACK)
        change(columns)
        parquet.write_table(pa.table(columns), file)

    return edit


def _replace(key: str, value: object) -> Callable[[Path], None]:
    return _change(lambda columns: columns.update({key: pa.array(value)}))


def _garble(file: Path) -> None:
    """Zeros where the pages of the observations begin; the footer is as it was."""
    start = parquet.read_metadata(file).row_group(0).column(1).dictionary_page_offset
    content = bytearray(file.read_bytes())
    content[start : start + 100] = bytes(100)
    file.write_bytes(content)


def _state(width: int, value: float = 0.0) -> list[list[float]]:
    return [[value] * width] * 29


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:3000]), " is truncated or not a Parquet"),
        (lambda file: file.write_bytes(b""), " is truncated or not a Parquet"),
        (lambda file: file.write_text("version https://git-lfs"), " is truncated .* git lfs pull"),
        (_garble, " is truncated or not a Parquet"),
        (lambda file: (file.unlink(), os.mkfifo(file)), " is not a regular file"),
        (lambda file: (file.unlink(), file.symlink_to("gone")), " is not a regular file"),
        (_change(lambda columns: columns.pop("action")), " has no column action "),
        (_change(lambda columns: columns.pop("next.reward")), " has no column next.reward"),
        (_change(lambda columns: columns.pop("task_id")), " has no column task_id .*it has obs"),
        (_change(lambda columns: columns.pop("episode_index")), " has no column episode_index"),
        (_replace("task_id", [37.0] * 29), ": task_id is not a whole number per row"),
        (_replace("task_id", [37] * 28 + [None]), ": task_id is not a whole number per row"),
        (_replace("task_id", [[37, 38]] * 29), ": task_id is not a whole number per row"),
        (_replace("task_id", [50] * 29), ", episode 4: task_id is 50, but one number from 0 to 49"),
        (_replace("task_id", [-1] * 29), ", episode 4: task_id is -1, but one number from 0 to 49"),
        (_replace("task_id", [37] * 28 + [38]), ", episode 4: task_id is 37 and 38, but one"),
        (_replace("episode_index", [3] * 29), " has further rows of episode 3"),
        (_replace("episode_index", [4] * 9 + [99] + [4] * 19), " has further rows of episode 4"),
        (_replace("action", [["a"] * 4] * 29), ", episode 4: action does not hold plain numbers"),
        (_replace("frame_index", ["a"] * 29), ", episode 4: frame_index is not a number per row"),
        (_replace("frame_index", [[1, 2]] * 29), ", episode 4: frame_index is not a number per"),
        (_replace("frame_index", [0.5] + [1.0] * 28), ", episode 4: frame_index is 0.5 in row 0"),
        (_replace("frame_index", [None] * 29), ", episode 4: frame_index is "),
        (
            _replace("timestamp", [0.0] * 28 + [np.nan]),
            ", episode 4: timestamp is 0 in row 1",
        ),
        (
            _replace("next.reward", ["a"] * 29),
            ", episode 4: next.reward does not hold plain numbers",
        ),
        (_replace("next.reward", [{"a": 1}] * 29), ", episode 4: next.reward does not hold plain"),
        (_replace("next.reward", [1.0] * 28 + [None]), ", episode 4: rewards holds NaN"),
        (_replace("next.success", [1.0] * 28 + [np.nan]), ", episode 4: success holds NaN"),
        (_replace("action", [[0.0] * 4] * 28 + [[0.0] * 5]), ": the lists in action are"),
        (_replace("action", [[0.0] * 4] * 28 + [None]), ": the lists in action are"),
        (
            _replace("action", [[]] * 29),
            " is truncated or not a Parquet|the lists in action are empty",
        ),
        (_replace("action", [[0.0] * 3] * 29), r", episode 4: actions has the shape \(29, 3\)"),
        (_replace("observation.environment_state", _state(4)), r"shape \(29, 4\)"),
        (_replace("observation.environment_state", _state(39, np.nan)), "observations holds NaN"),
        (_replace("observation.environment_state", _state(39, 1e300)), "observations holds NaN"),
        (_replace("observation.environment_state", _state(39, 1e9)), "observations holds 1e[+]09"),
        (lambda file: file.unlink(), "has 8 episodes, but its meta/info.json says 9"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_nothing_is_written(
    tmp_path: Path, edit: Callable[[Path], None], reason: str
) -> None:
    source = write_source(tmp_path / "raw")
    file = source / "data" / "chunk-001" / "episode_000004.parquet"
    edit(file)
    where = "episode_000004.parquet.*" if file.exists() or file.is_symlink() else ""
    with pytest.raises(UserError, match=where + reason):
        import_data(config_for(tmp_path), progress=False)
    assert not (tmp_path / "store").exists()


def test_a_file_that_would_take_the_memory_is_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot, "_LARGEST", 31 * (39 + 4 + 6))
    write_source(tmp_path / "raw")
    with pytest.raises(UserError, match=r"000007.parquet would give 1,568 numbers"):
        import_data(config_for(tmp_path), progress=False)


def _rows(choose: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Rows of the file, chosen or put into another order."""

    def edit(file: Path) -> None:
        table = parquet.read_table(file)
        parquet.write_table(table.take(choose(np.arange(len(table)))), file)

    return edit


def _drop(file: Path, *columns: str) -> None:
    parquet.write_table(parquet.read_table(file).drop(list(columns)), file)


@pytest.mark.parametrize(
    "choose",
    [
        lambda rows: np.random.default_rng(0).permutation(rows),
        lambda rows: rows[::-1],
        lambda rows: np.delete(rows, range(9, 18)),
        lambda rows: np.insert(rows, 1, 1),
        lambda rows: rows[[*range(5), 7, 6, 5, *range(8, 29)]],
    ],
    ids=["permuted", "backwards", "a third is missing", "twice", "exchanged"],
)
@pytest.mark.parametrize("counted_by", ["frame_index", "index", "timestamp"])
def test_rows_that_are_missing_or_in_another_order_are_refused(
    tmp_path: Path, counted_by: str, choose: Callable[[np.ndarray], np.ndarray]
) -> None:
    source = write_source(tmp_path / "raw")
    file = source / "data" / "chunk-001" / "episode_000004.parquet"
    others = {"frame_index", "index", "timestamp"} - {counted_by}
    _drop(file, *others, "next.done")
    (source / "meta" / "episodes.jsonl").unlink()
    write_total(source, len(IDS))
    import_data(config_for(tmp_path, output=tmp_path / "whole"), progress=False)
    _rows(choose)(file)
    rows = choose(np.arange(29)).tolist()
    begin = rows[0] if counted_by == "index" else 0  # an episode's may be anything
    row = next(i for i, found in enumerate(rows) if found != begin + i)
    reason = (
        rf"000004\.parquet, episode 4: {counted_by} is \S+ in row {row} .*, but it should be \S+,"
    )
    with pytest.raises(UserError, match=reason):
        import_data(config_for(tmp_path), progress=False)
    store = import_data(config_for(tmp_path, skip_bad_episodes=True), progress=False)
    assert len(store.provenance["skipped"]["push-back-v3"]) == 1


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_an_episode_without_its_last_rows_is_refused(tmp_path: Path, layout: str) -> None:
    """Only the declared length shows it."""
    source = write_source(tmp_path / "raw")
    write_total(source, len(IDS))
    if layout == "parquet":
        (source / "meta" / "episodes.jsonl").unlink()
        file = source / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
        file.parent.mkdir(parents=True)
        lengths = {"length": pa.array(25 + np.arange(9)), "episode_index": pa.array(np.arange(9))}
        parquet.write_table(pa.table(lengths), file)
    import_data(config_for(tmp_path, output=tmp_path / "whole"), progress=False)
    _rows(lambda rows: rows[:-3])(source / "data" / "chunk-001" / "episode_000004.parquet")
    with pytest.raises(UserError, match=r"episode 4 has 26 rows, but .*meta says 29: download"):
        import_data(config_for(tmp_path), progress=False)


def test_all_rows_that_are_declared_have_to_be_there(tmp_path: Path) -> None:
    source = write_source(tmp_path / "raw")
    (source / "meta" / "episodes.jsonl").unlink()
    _rows(lambda rows: rows[:-3])(source / "data" / "chunk-001" / "episode_000004.parquet")
    with pytest.raises(UserError, match=r"raw has 258 rows, but its meta/info\.json says 261"):
        import_data(config_for(tmp_path), progress=False)


def test_rows_of_another_episode_are_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "raw")
    done = pa.array(np.arange(29) % 10 == 9)
    _change(lambda columns: columns.update({"next.done": done}))(
        source / "data" / "chunk-001" / "episode_000004.parquet"
    )
    with pytest.raises(UserError, match=r"episode 4: next\.done is true at step 9 of 0 to 28"):
        import_data(config_for(tmp_path), progress=False)


def test_an_episode_that_was_stopped_at_its_success_did_not_terminate(tmp_path: Path) -> None:
    """What `next.done` says of its end is not known, and MTIQL is to take none for terminal."""
    write_source(tmp_path / "raw")
    store = import_data(config_for(tmp_path), progress=False)
    for name in store.tasks:
        train = store.task(name).train
        assert train.terminated.tolist() == [-1, -1]
        assert not is_terminal(train.terminated, train.lengths, store.environment).any()


@pytest.mark.parametrize("content", ["{", "[]", "[1]", "3", '{"episode_index": 0}', "[" * 99999])
def test_a_damaged_list_of_lengths_is_named(tmp_path: Path, content: str) -> None:
    write_source(tmp_path / "raw")
    (tmp_path / "raw" / "meta" / "episodes.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"episodes\.jsonl is damaged: download it again"):
        import_data(config_for(tmp_path), progress=False)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"total_episodes": "many"}', "3", "[" * 99999]
)
def test_a_damaged_list_of_contents_is_named(tmp_path: Path, content: str) -> None:
    write_source(tmp_path / "raw")
    (tmp_path / "raw" / "meta" / "info.json").write_text(content)
    with pytest.raises(UserError, match=r"info.json is damaged: download it again"):
        import_data(config_for(tmp_path), progress=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"source": Path("missing")}, "missing/meta/info.json is missing: give as SOURCE"),
        ({"tasks": ("reach",)}, "has no episode of reach-v3: leave the task out"),
        ({"datasets": ("0=reach",)}, "lerobot .*: leave --dataset out"),
        ({"family": "cheetah-vel"}, "is this data of cheetah-vel"),
        ({"min_length": 26}, "the episode has 25 steps, .*26"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    write_source(tmp_path / "raw")
    with pytest.raises(UserError, match=reason):
        import_data(config_for(tmp_path, **changes), progress=False)


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "raw")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'harmodt\[lerobot\]'"):
        import_data(config_for(tmp_path), progress=False)
