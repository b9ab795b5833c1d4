from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunks import CHEETAH_RUN, PUSH, REACH, make_fields, save, write_source
from tiny import make_store
from torch import Tensor

from harmodt.data.importers import importer
from harmodt.data.importers.tdmpc2 import FIRST, TASKS, TdMpc2Importer
from harmodt.data.importing import ImportConfig, import_data
from harmodt.data.merging import MergeConfig, merge_stores
from harmodt.environments import METAWORLD, family
from harmodt.environments.metaworld_names import ALL_TASKS
from harmodt.errors import UserError


def configure(source: Path, *tasks: str) -> ImportConfig:
    output = source.with_name("store")
    return ImportConfig(source, output, tasks, prompt_episodes=1, format="td-mpc2")


@pytest.mark.parametrize("version", ["0.1", "0.2", "0.3", "today"])
def test_what_is_seen_in_a_row_goes_with_the_action_of_the_next(
    tmp_path: Path, version: str
) -> None:
    if version == "today":
        pytest.importorskip("tensordict")
    chunks = {"chunk_10.pt": [REACH, REACH], "chunk_9.pt": [CHEETAH_RUN, PUSH, REACH, PUSH]}
    source = write_source(tmp_path / "raw", chunks, version)
    store = import_data(configure(source), progress=False)
    store.verify()
    assert store.tasks == ("push-v3", "reach-v3")
    assert store.environment == replace(family("metaworld-repeat-2").spec, reward_version=None)
    tenth, ninth = (make_fields(tasks, seed) for seed, tasks in enumerate(chunks.values()))
    reach = [(ninth, 2), (tenth, 0), (tenth, 1)]  # the first has the highest return
    for fields, number, episodes in (
        (ninth, 2, store.task("reach-v3").prompts),
        (ninth, 1, store.task("push-v3").train),
    ):
        assert episodes.lengths.tolist() == [100]
        np.testing.assert_array_equal(episodes.observations, fields["obs"][number, :100])
        np.testing.assert_array_equal(episodes.actions, fields["action"][number, 1:, :4])
        np.testing.assert_array_equal(episodes.rewards, fields["reward"][number, 1:])
    train = store.task("reach-v3").train
    seen = np.concatenate([fields["obs"][number, :100] for fields, number in reach[1:]])
    np.testing.assert_array_equal(train.observations, seen)
    assert train.returns.tolist() == [0, 100]
    assert train.successes.tolist() == [-1, -1]


def test_the_list_is_that_of_mt80() -> None:
    assert sorted(TASKS) == sorted(ALL_TASKS)
    known = {30: "assembly", 44: "drawer-open", REACH: "reach", 75: "bin-picking"}
    known |= {PUSH: "push", 79: "hand-insert"}
    assert {number: TASKS[number - FIRST] for number in known} == {
        number: f"{name}-v3" for number, name in known.items()
    }


@pytest.mark.parametrize(
    ("flags", "terminated"), [({}, -1), ({"terminated": 0}, 0), ({"terminated": 100}, 0)]
)
def test_flags_of_an_episodes_end_are_read(
    tmp_path: Path, flags: dict[str, int], terminated: int
) -> None:
    """The first row's are filler. The environments go on after a success, so that all are cut."""
    source = write_source(tmp_path / "raw", {"chunk_0.pt": [REACH, REACH]})
    fields = make_fields([REACH, REACH])
    for key, row in flags.items():
        fields[key] = (torch.arange(101) == row).repeat(2, 1)
    save(source / "chunk_0.pt", fields)
    train = import_data(configure(source), progress=False).task("reach-v3").train
    assert train.terminated.tolist() == [terminated]


def test_other_kinds_of_numbers_are_read(tmp_path: Path) -> None:
    fields = make_fields([REACH, REACH])
    halves = {key: tensor.half() for key, tensor in fields.items()} | {
        "task": fields["task"].long(),
        "obs": fields["obs"].double(),
    }
    (tmp_path / "raw").mkdir()
    save(tmp_path / "raw" / "chunk_0.pt", halves)
    train = import_data(configure(tmp_path / "raw"), progress=False).task("reach-v3").train
    np.testing.assert_array_equal(train.observations, fields["obs"][0, :100])
    np.testing.assert_array_equal(train.actions, fields["action"][0, 1:, :4].half())


def test_chunks_stay_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [CHEETAH_RUN] * 3000 + [REACH] * 40
    source = write_source(tmp_path / "raw", {"chunk_0.pt": tasks})
    size = (source / "chunk_0.pt").stat().st_size
    measured, read = [], TdMpc2Importer.read

    def measure(self: TdMpc2Importer, episode: Any) -> Any:
        measured.append(own_memory())
        return read(self, episode)

    monkeypatch.setattr(TdMpc2Importer, "read", measure)
    before = own_memory()
    import_data(configure(source), progress=False)
    assert len(measured) == 80 and size > 50e6
    assert max(measured) - before < size / 4


def own_memory() -> int:
    """Bytes of this process that are no file's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _hostile(marker: Path) -> dict[str, Callable[[Path], None]]:
    """Files that would make a folder if anything in them were run."""
    call = Call(os.mkdir, str(marker))
    whole = make_fields([REACH, REACH])

    def at_once(file: Path) -> None:
        torch.save(call, file)

    def among_the_fields(file: Path) -> None:
        save(file, {**whole, "more": call})

    def as_a_tensor(file: Path) -> None:
        save(file, {**whole, "obs": call})

    def evaluated(file: Path) -> None:
        save(file, {**whole, "more": Call(eval, f"__import__('os').mkdir({str(marker)!r})")})

    def by_its_parent(file: Path) -> None:
        """Names a function as an attribute of something in tensordict."""
        name = str(marker).encode()
        argument = b"X" + len(name).to_bytes(4, "little") + name
        pickled = b"\x80\x02ctensordict.utils\nos.mkdir\n" + argument + b"\x85R."
        save(file, whole)
        _copy(file, pickled=pickled)

    def by_a_newer_protocol(file: Path) -> None:
        torch.save(call, file, pickle_protocol=4)

    def before_zip_files(file: Path) -> None:
        torch.save(call, file, _use_new_zipfile_serialization=False)

    def bare(file: Path) -> None:
        file.write_bytes(pickle.dumps(call))

    found = at_once, among_the_fields, as_a_tensor, evaluated, by_its_parent
    return {f.__name__: f for f in (*found, by_a_newer_protocol, before_zip_files, bare)}


def _copy(file: Path, packing: int = zipfile.ZIP_STORED, pickled: bytes | None = None) -> None:
    """Write a chunk again, packed in another way or with another pickle in it."""
    with zipfile.ZipFile(file) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", packing) as new:
        for name, content in entries.items():
            new.writestr(name, pickled if pickled and name.endswith("data.pkl") else content)


@pytest.mark.parametrize("name", _hostile(Path()))
def test_nothing_that_a_file_names_is_run(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    source = write_source(tmp_path / "raw", {"chunk_0.pt": [REACH, REACH]})
    _hostile(marker)[name](source / "chunk_1.pt")
    allowed = set(torch.serialization.get_safe_globals())
    with pytest.raises(UserError, match=r"chunk_1\.pt (names|is damaged or not a TensorDict)"):
        import_data(configure(source), progress=False)
    assert not marker.exists()
    assert set(torch.serialization.get_safe_globals()) == allowed
    if name == "at_once":  # the file would do it
        torch.load(source / "chunk_1.pt", weights_only=False)
        assert marker.exists()


def _with(key: str, edit: Callable[[Tensor], Any]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        fields = make_fields([REACH, CHEETAH_RUN, REACH])
        save(file, {**fields, key: edit(fields[key])})

    return write


def _with_flags(key: str, row: int, dtype: torch.dtype = torch.bool) -> Callable[[Path], None]:
    """Flags of an episode's end that are true in one row of the second episode of task REACH."""

    def write(file: Path) -> None:
        fields = make_fields([REACH, REACH, CHEETAH_RUN])
        flags = torch.zeros(3, 101)
        flags[1, row] = 1
        save(file, {**fields, key: flags.to(dtype)})

    return write


def _without(key: str) -> Callable[[Path], None]:
    fields = make_fields([REACH, REACH])
    del fields[key]
    return lambda file: save(file, fields)


def _set(index: tuple[int, ...], value: float) -> Callable[[Tensor], Tensor]:
    def edit(tensor: Tensor) -> Tensor:
        tensor[index] = value
        return tensor

    return edit


def _flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # within the observations
    file.write_bytes(content)


def _of_mt30(file: Path) -> None:
    fields = {"obs": torch.zeros(2, 501, 24), "action": torch.zeros(2, 501, 6)}
    fields |= {"reward": torch.zeros(2, 501), "task": torch.zeros(2, 501, dtype=torch.int32)}
    save(file, fields)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-3]), "is damaged or not a TensorDict"),
        (
            lambda file: file.write_bytes(file.read_bytes()[:30000]),
            "is damaged or not a TensorDict",
        ),
        (lambda file: file.write_bytes(b""), "is damaged or not a TensorDict"),
        (lambda file: file.write_bytes(b"hello" * 99), "is damaged or not a TensorDict"),
        (_flip_a_byte, "is damaged or not a TensorDict"),
        (lambda file: _copy(file, pickled=b"(" * 2**21), "is damaged or not a TensorDict"),
        (lambda file: torch.save(torch.zeros(3), file), "is damaged or not a TensorDict"),
        (lambda file: torch.save(make_fields([REACH]), file), "is damaged or not a TensorDict"),
        (lambda file: np.savez(file.open("wb"), obs=np.zeros(3)), "is damaged or not a TensorDict"),
        (
            lambda file: _copy(file, zipfile.ZIP_DEFLATED),
            "is compressed: write it again with torch.save",
        ),
        (_without("obs"), "has no tensor 'obs'"),
        (_without("task"), "has no tensor 'task'"),
        (_with("reward", lambda t: 3), "has no tensor 'reward'"),
        (_of_mt30, r"obs has the shape \(2, 501, 24\), but \(n, 101, 39\).* not mt30"),
        (_with("action", lambda t: t[:, :, :4]), r"action has the shape \(3, 101, 4\)"),
        (_with("reward", lambda t: t[:, :, None]), r"reward has the shape \(3, 101, 1\)"),
        (_with("obs", lambda t: t[0, 0, 0]), r"obs has the shape \(\)"),
        (_with("reward", lambda t: t[:2]), "has different numbers of episodes per key"),
        (_with("task", lambda t: t[:0]), "has different numbers of episodes per key"),
        (_with("task", lambda t: t.float()), "task does not hold plain numbers"),
        (_with("obs", lambda t: t.int()), "obs does not hold plain numbers"),
        (_with("obs", lambda t: t.to_sparse()), "obs does not hold plain numbers"),
        (_with("obs", lambda t: t.to("meta")), "obs does not hold plain numbers"),
        (
            _with("obs", lambda t: t[:1].clone().expand(3, 101, 39)),
            "obs does not hold plain numbers",
        ),
        (_with("task", _set((1,), 80)), "task holds 80, but mt80 has only the tasks 0 to 79"),
        (_with("task", _set((1,), -1)), "task holds -1, but mt80"),
        (_with("task", _set((2, 50), 3)), "episode 2: task changes within the episode"),
        (_with("obs", _set((2, 0, 7), np.nan)), "episode 2: observations holds NaN or infinity"),
        (_with("action", _set((2, 1), np.nan)), "episode 2: actions holds NaN or infinity"),
        (_with("reward", _set((2, 100), np.inf)), "episode 2: rewards holds NaN or infinity"),
        (_with("reward", lambda t: t.double() + 1e300), "episode 0: rewards holds NaN or infinity"),
        (_with_flags("terminated", 40), "episode 1: terminated is true at step 39 of 0 to 99"),
        (_with_flags("done", 99, torch.float32), "episode 1: done is true at step 98 of 0 to 99"),
        (_with_flags("done", 1, torch.complex64), "done does not hold plain numbers"),
        (lambda file: (file.unlink(), file.symlink_to("gone")), "is missing"),
        (lambda file: (file.unlink(), os.mkfifo(file)), "is not a regular file"),
        (lambda file: (file.unlink(), file.mkdir()), "is not a regular file"),
        (lambda file: (file.unlink(), file.symlink_to("/dev/zero")), "is not a regular file"),
    ],
)
def test_a_chunk_that_cannot_be_used_is_named_and_nothing_is_written(
    tmp_path: Path, edit: Callable[[Path], None], reason: str
) -> None:
    chunks = {"chunk_0.pt": [REACH, PUSH], "chunk_1.pt": [REACH, REACH, CHEETAH_RUN]}
    source = write_source(tmp_path / "raw", chunks)
    edit(source / "chunk_1.pt")
    with pytest.raises(UserError, match=rf"chunk_1\.pt[:,]? {reason}"):
        import_data(configure(source, "reach"), progress=False)
    assert not (tmp_path / "store").exists()


def test_what_is_not_needed_may_be_anything(tmp_path: Path) -> None:
    source = write_source(tmp_path / "raw", {"chunk_0.pt": [REACH, REACH]})
    fields = make_fields([CHEETAH_RUN, REACH])
    fields["obs"][0] = np.nan
    fields["reward"][:, 0] = fields["action"][:, 0] = 0  # NaN in some of the public chunks alone
    save(source / "chunk_1.pt", {**fields, "episode": torch.zeros(2)})
    store = import_data(configure(source, "reach"), progress=False)
    assert len(store.task("reach-v3").train) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"family": METAWORLD},
            "belong to metaworld-repeat-2 and not to metaworld: leave --family",
        ),
        ({"source": "missing"}, "missing is not a folder"),
        ({"source": "empty"}, r"empty holds no .pt file"),
        ({"source": "control"}, "control holds no episode of Meta-World"),
        ({"tasks": ("sweep",)}, "raw holds no episode of sweep-v3"),
        ({"tasks": ("reech",)}, "did you mean 'reach-v3'"),
        ({"datasets": ("a=reach",)}, "leave --dataset out"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    source = write_source(tmp_path / "raw", {"chunk_0.pt": [REACH, REACH]})
    write_source(tmp_path / "control", {"chunk_0.pt": [CHEETAH_RUN]})
    (tmp_path / "empty").mkdir()
    if "source" in changes:
        changes = {"source": tmp_path / changes["source"]}
    with pytest.raises(UserError, match=reason):
        import_data(replace(configure(source), **changes), progress=False)
    assert not (tmp_path / "store").exists()


def test_data_of_repeated_actions_do_not_mix_with_others(tmp_path: Path) -> None:
    source = write_source(tmp_path / "raw", {"chunk_0.pt": [REACH, REACH]})
    repeated = import_data(replace(configure(source), reward_version="v2"), progress=False)
    plain = make_store(tmp_path / "plain", ["reach-v3"])
    with pytest.raises(UserError, match="metaworld-repeat-2"):
        merge_stores(MergeConfig((plain.path, repeated.path), tmp_path / "both"), progress=False)
    assert not (tmp_path / "both").exists()


def test_an_episode_tells_where_it_is(tmp_path: Path) -> None:
    source = write_source(tmp_path / "raw", {"chunk_0.pt": [PUSH, REACH]})
    (episode,) = importer("td-mpc2", source).episodes("reach-v3")
    assert str(episode) == f"{source}/chunk_0.pt, episode 1"
