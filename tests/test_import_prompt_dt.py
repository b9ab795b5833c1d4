"""Prompt-DT's pickles: what is read of them, and that a hostile one runs and costs nothing."""

from __future__ import annotations

import builtins
import copyreg
import functools
import math
import operator
import os
import pickle
import struct
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from prompt_dt_files import GOALS, SIZES, dump, make_episode, write_source

from harmodt.data.importers import pickles
from harmodt.data.importers.pickles import Array, read_pickle
from harmodt.data.importing import ImportConfig, import_data
from harmodt.environments import family
from harmodt.errors import UserError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def config_of(source: Path, output: Path, *tasks: str) -> ImportConfig:
    return ImportConfig(source, output, tasks, format="prompt-dt")


@pytest.mark.parametrize("environment", SIZES)
def test_an_import_holds_each_tasks_episodes_and_prompts(tmp_path: Path, environment: str) -> None:
    write_source(tmp_path, environment)
    store = import_data(config_of(tmp_path, tmp_path / "store"), progress=False)
    assert store.environment == family(environment.replace("_", "-")).spec
    expected_tasks = {
        "cheetah_dir": ("cheetah-dir-forward", "cheetah-dir-backward"),
        "cheetah_vel": ("cheetah-vel-0.075", "cheetah-vel-0.150"),
        "ant_dir": tuple(f"ant-dir-{goal['goal']!r}" for goal in plain(GOALS["ant_dir"][:2])),
    }
    assert store.tasks == expected_tasks[environment]
    for number, name in enumerate(store.tasks):
        episodes = [make_episode(environment, 10 * number + seed) for seed in range(5)]
        task = store.task(name)
        for stored, expected in ((task.train, episodes[:3]), (task.prompts, episodes[3:])):
            assert stored.lengths.tolist() == [25] * len(expected)
            for key in ("observations", "actions", "rewards"):
                whole = np.concatenate([episode[key].reshape(25, -1) for episode in expected])
                found = getattr(stored, key).reshape(whole.shape)
                np.testing.assert_array_equal(found, whole.astype(np.float32))
    trainer = tiny.make_trainer(store)
    for _ in range(2):
        trainer.before_step()
        assert bool(trainer.train_step().losses.isfinite().all())


def plain(goals: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{key: float(value) for key, value in goal.items()} for goal in goals]


def test_the_source_is_any_folder_above_the_files(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "raw")
    for number, source in enumerate((folder, folder.parent, tmp_path / "raw")):
        output = tmp_path / f"store{number}"
        store = import_data(config_of(source, output), progress=False)
        assert store.tasks == ("cheetah-vel-0.075", "cheetah-vel-0.150")


def test_how_an_episode_ended_is_kept(tmp_path: Path) -> None:
    """An ant may fall; where there are no terminals it is not known."""
    folder = write_source(tmp_path / "raw", "ant_dir", (0,))
    episodes = [make_episode("ant_dir", seed) for seed in range(4)]
    episodes[0]["terminals"][-1] = True
    episodes[2]["timeouts"] = episodes[0]["terminals"]
    del episodes[3]["terminals"]
    dump(folder / "ant_dir-0-expert.pkl", episodes)
    store = import_data(config_of(folder, tmp_path / "store"), progress=False)
    [name] = store.tasks
    assert store.task(name).train.terminated.tolist() == [1, 0, 0, -1]
    assert store.task(name).prompts.terminated.tolist() == [0, 0]


def test_an_episode_that_is_longer_than_the_familys_is_refused(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "raw", length=201)
    with pytest.raises(
        UserError, match="the episode has 201 steps, but an episode of cheetah-vel has at most 200"
    ):
        import_data(config_of(folder, tmp_path / "store"), progress=False)


def test_a_bad_episode_is_skipped_where_this_is_asked(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "raw")
    _with("terminals", lambda a: np.arange(25) == 6)(folder / "cheetah_vel-1-expert.pkl")
    config = replace(config_of(folder, tmp_path / "store"), skip_bad_episodes=True)
    store = import_data(config, progress=False)
    assert [len(store.task(name).train) for name in store.tasks] == [3, 2]
    [reason] = store.provenance["skipped"]["cheetah-vel-0.150"]
    assert "cheetah_vel-1-expert.pkl, episode 1: terminals is true at step 6" in reason


def test_without_prompts_of_its_own_a_task_gets_the_best(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "raw")
    (folder / "cheetah_vel-1-prompt-expert.pkl").unlink()
    config = replace(config_of(folder, tmp_path / "store"), prompt_episodes=1)
    store = import_data(config, progress=False)
    counts = [(len(store.task(t).train), len(store.task(t).prompts)) for t in store.tasks]
    assert counts == [(3, 2), (2, 1)]
    best = make_episode("cheetah_vel", 12)["rewards"].astype(np.float32)
    np.testing.assert_array_equal(store.task("cheetah-vel-0.150").prompts.rewards, best)


def test_tasks_are_named_by_number_or_goal(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "raw", numbers=(2, 10, 7))
    names = ("10", "cheetah-vel-0.225", "7", "2")
    store = import_data(config_of(folder, tmp_path / "store", *names), progress=False)
    assert store.tasks == ("cheetah-vel-0.825", "cheetah-vel-0.225", "cheetah-vel-0.600")
    store = import_data(config_of(folder, tmp_path / "all"), progress=False)
    assert store.tasks == ("cheetah-vel-0.225", "cheetah-vel-0.600", "cheetah-vel-0.825")


def test_goals_of_cheetahs_are_known_and_those_of_ants_are_needed(tmp_path: Path) -> None:
    for environment in SIZES:
        folder = write_source(tmp_path, environment)
        for file in (tmp_path / "config" / environment).iterdir():
            file.unlink()
        config = config_of(folder, tmp_path / f"store-{environment}")
        if environment != "ant_dir":
            known = family(environment.replace("_", "-"))
            names = import_data(config, progress=False).tasks
            assert names == known.task_sets[known.spec.family][:2]
            continue
        with pytest.raises(
            UserError, match=r"copy config_ant_dir_task0\.pkl from Prompt-DT's folder"
        ):
            import_data(config, progress=False)
        for number in (0, 1):  # beside the data, and without the list
            dump(folder / f"config_ant_dir_task{number}.pkl", {"goal": 0.5 + number})
        assert import_data(config, progress=False).tasks == ("ant-dir-0.500", "ant-dir-1.500")


def test_a_goal_of_the_configuration_goes_before_the_known_one(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "raw", numbers=(0,))
    dump(folder / "config_cheetah_vel_task0.pkl", [{"velocity": np.float64(1.25)}])
    store = import_data(config_of(folder, tmp_path / "store"), progress=False)
    assert store.tasks == ("cheetah-vel-1.250",)


def test_a_goal_whose_file_is_a_link_to_nothing_is_not_known(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "raw", numbers=(0,))
    (folder / "config_cheetah_vel_task0.pkl").symlink_to("gone")
    with pytest.raises(UserError, match=r"config_cheetah_vel_task0\.pkl is missing: download it"):
        import_data(config_of(folder, tmp_path / "store"), progress=False)


def _write(name: str, content: object) -> Callable[[Path], None]:
    return lambda folder: dump(folder / name, content)


def _goal(content: object) -> Callable[[Path], None]:
    return _write("config_cheetah_vel_task0.pkl", content)


@pytest.mark.parametrize(
    ("edit", "changes", "reason"),
    [
        (lambda folder: None, {"tasks": ("5",)}, "has no task 5: it has files of the tasks 0, 1"),
        (lambda folder: None, {"tasks": ("cheetah-vel-2.0",)}, "has no file for cheetah-vel-2.000"),
        (lambda folder: None, {"tasks": ("ant-dir",)}, "no file such as ant_dir-0-expert.pkl"),
        (lambda folder: None, {"family": "ant-dir"}, "no file such as ant_dir-0-expert.pkl"),
        (lambda folder: None, {"family": "metaworld"}, "prompt-dt has no data of metaworld"),
        (lambda folder: None, {"source": "missing"}, "no file such as cheetah_vel/"),
        (
            lambda folder: None,
            {"episodes": 4},
            "cheetah-vel-0.075 has 3 episodes, but --episodes asks",
        ),
        (_write("ant_dir-0-expert.pkl", []), {}, "files of cheetah-vel and of ant-dir: choose one"),
        (_write("cheetah_vel-0-medium.pkl", []), {}, "both cheetah_vel-0-expert.pkl and cheetah_v"),
        (
            _write("cheetah_vel-3-prompt-expert.pkl", []),
            {},
            "prompts of task 3, but there is no file",
        ),
        (_write("cheetah_vel-40-expert.pkl", []), {}, "the goal of task 40 in .* is not known"),
        (_goal([{"velocity": 0.15}]), {}, "the tasks 0 and 1 have the same goal"),
        (_goal([]), {}, "task0.pkl holds no goal: .* 'velocity'"),
        (_goal([{"goal": 0.5}]), {}, "holds no goal"),
        (_goal([{"velocity": 0.5}] * 2), {}, "holds no goal"),
        (_goal({"velocity": math.nan}), {}, "holds no goal"),
        (_goal({"velocity": "0.5"}), {}, "holds no goal"),
        (_goal({"velocity": 10**400}), {}, "holds no goal"),
        (_goal({"velocity": -1.0}), {}, "holds no goal"),
    ],
)
def test_what_cannot_be_is_named(
    tmp_path: Path, edit: Callable[[Path], None], changes: dict[str, Any], reason: str
) -> None:
    folder = write_source(tmp_path / "raw")
    edit(folder)
    changes = {"source": folder} | changes
    if isinstance(changes["source"], str):
        changes["source"] = tmp_path / changes["source"]
    config = replace(config_of(folder, tmp_path / "store"), **changes)
    with pytest.raises(UserError, match=reason):
        import_data(config, progress=False)
    assert not (tmp_path / "store").exists()


def _with(key: str, change: Callable[[np.ndarray], object] | np.ndarray) -> Callable[[Path], None]:
    """Change an array of the second episode, or add one."""

    def edit(file: Path) -> None:
        episodes = [make_episode("cheetah_vel", seed) for seed in range(3)]
        value = change if isinstance(change, np.ndarray) else change(episodes[1][key])
        dump(file, [episodes[0], episodes[1] | {key: value}, episodes[2]])

    return edit


def _without(key: str) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        episode = make_episode("cheetah_vel", 0)
        del episode[key]
        dump(file, [make_episode("cheetah_vel", 0), episode])

    return edit


def _as_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _flip(array: np.ndarray) -> np.ndarray:
    return np.where(np.arange(array.size).reshape(array.shape) == 7, np.nan, array)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is truncated or not a pickle"),
        (lambda file: file.write_bytes(file.read_bytes()[:3000]), "is truncated or not a pickle"),
        (lambda file: file.write_bytes(b""), "is truncated or not a pickle"),
        (lambda file: file.write_bytes(b"."), "is truncated or not a pickle"),
        (lambda file: file.write_bytes(b"hello" * 99), "is truncated or not a pickle"),
        (lambda file: (file.unlink(), file.symlink_to("gone")), "is missing"),
        (_as_pipe, "is not a regular file"),
        (lambda file: (file.unlink(), file.mkdir()), "is not a regular file"),
        (lambda file: dump(file, {"observations": 1}), "holds no list of episodes"),
        (lambda file: dump(file, []), "holds no list of episodes, or an empty list"),
        (
            lambda file: dump(file, [make_episode("cheetah_vel", 0)] * 9),
            "refers to the same array several",
        ),
        (lambda file: dump(file, [[1, 2]]), "episode 0 is not a dict of arrays"),
        (_without("rewards"), r"episode 1 has no key 'rewards' \(it has observations, next_obs"),
        (_with("actions", lambda a: a.tolist()), "episode 1: actions is not an array"),
        (
            _with("actions", lambda a: a[:20]),
            "episode 1: actions has 20 steps, but observations ha",
        ),
        (_with("actions", lambda a: a[:, :5]), r"episode 1: actions has the shape \(25, 5\)"),
        (_with("observations", lambda a: a[:, :, None]), "episode 1: observations has the shape"),
        (_with("observations", _flip), "episode 1: observations holds NaN"),
        (_with("observations", lambda a: a * 1e300), "episode 1: observations holds NaN or inf"),
        (
            _with("rewards", lambda a: a * 0 + 1e9),
            r"episode 1: rewards holds 1e[+]09, but .* up to",
        ),
        (_with("rewards", lambda a: np.array(1.0)), r"episode 1: rewards has the shape \(\)"),
        (
            _with("terminals", lambda a: np.arange(25) == 6),
            "episode 1: terminals is true at step 6 ",
        ),
        (_with("terminals", lambda a: a[:9]), "episode 1: terminals has 9 steps, but obser"),
        (_with("terminals", lambda a: a.tolist()), "episode 1: terminals is not an array"),
        (_with("timeouts", np.arange(25) > 9), "episode 1: timeouts is true at step 10 of 0 to 24"),
        (_with("rewards", lambda a: a.astype(object)), "holds an array of 'O8', but only numbers"),
        (_with("rewards", lambda a: a.astype(str)), "holds an array of 'U"),
        (_with("rewards", lambda a: a.astype(complex)), "holds an array of 'c16'"),
        (_with("rewards", lambda a: np.zeros(25, "f4,i4")), "holds an array of 'V8'"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_nothing_is_written(
    tmp_path: Path, edit: Callable[[Path], None], reason: str
) -> None:
    folder = write_source(tmp_path / "raw")
    edit(folder / "cheetah_vel-1-expert.pkl")
    with pytest.raises(UserError, match=rf"cheetah_vel-1-expert\.pkl.*({reason})"):
        import_data(config_of(folder, tmp_path / "store"), progress=False)
    assert not (tmp_path / "store").exists()


def _unwrap(value: Any) -> Any:
    """What was pickled, of what is read."""
    if isinstance(value, Array):
        return value.values
    if isinstance(value, dict):
        return {key: _unwrap(part) for key, part in value.items()}
    return type(value)(map(_unwrap, value)) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_all_that_data_hold_is_read_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    data = {
        "arrays": [array.astype(kind) for kind in ("f2", ">f4", "f8", "i1", "<i8", "u2", "?")],
        "layouts": [np.asfortranarray(array), array[::2, 1::2], array[:0], np.array([3.5])],
        "numbers": [0, -1, 255, 70_000, -(2**40), 2**70, 1e300, np.float32(0.1), np.int64(-3)],
        "rest": (None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, "", "é\n"),
        "bytes": [b"", b"\x00\xff", b"x" * 300],
        "shared": [array, array],
    }
    dump(tmp_path / "data.pkl", data, protocol)
    found = _unwrap(read_pickle(tmp_path / "data.pkl"))
    np.testing.assert_equal(found, data)
    for key in ("arrays", "layouts"):
        dtypes = [array.dtype for array in data[key]]
        assert [array.dtype for array in found[key]] == dtypes
    assert found["shared"][0] is found["shared"][1]


def test_arrays_of_numpy_1_are_read(tmp_path: Path) -> None:
    content = pickle.dumps([np.arange(3.0), np.float64(2)], protocol=3)
    older = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert older != content
    (tmp_path / "data.pkl").write_bytes(older)
    np.testing.assert_equal(_unwrap(read_pickle(tmp_path / "data.pkl")), [np.arange(3.0), 2.0])


class Call:
    """Pickled as a call, with a state if there is one."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


class Persistent(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return "mine" if value == "theirs" else None


def _persistent(file: Path) -> None:
    with open(file, "wb") as stream:
        Persistent(stream).dump(["theirs"])


def _extension(file: Path) -> None:
    copyreg.add_extension("os", "system", 0x70)
    try:
        dump(file, os.system, 2)
    finally:
        copyreg.remove_extension("os", "system", 0x70)


def _bytes(*parts: bytes) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_bytes(b"".join(parts))

    return write


def _as_name(module: bytes, name: bytes) -> bytes:
    """STACK_GLOBAL of a name, which may have dots."""
    texts = (b"\x8c" + bytes([len(text)]) + text for text in (module, name))
    return b"\x80\x04" + b"".join(texts) + b"\x93"


def _array(shape: tuple[int, ...], content: bytes = b"") -> Call:
    """An array of float64 that says it has a shape."""
    state, empty = (1, shape, np.dtype(np.float64), False, content), np.zeros(0)
    reconstruct: Any = empty.__reduce__()[0]
    return Call(reconstruct, np.ndarray, (0,), b"b", state=state)


def _dump(content: object) -> Callable[[Path], None]:
    return lambda file: dump(file, content)


HOSTILE = {
    "a command": _dump(Call(os.system, "touch ran")),
    "a command in a key": _dump([{"observations": Call(os.system, "touch ran")}]),
    "eval": _dump(Call(builtins.eval, "open('ran', 'w')")),
    "exec in protocol 0": lambda file: dump(file, Call(builtins.exec, "open('ran', 'w')"), 0),
    "getattr": _dump(Call(getattr, Call(__import__, "os"), "system")),
    "a chain of names": _bytes(_as_name(b"numpy", b"ndarray.__class__"), b"."),
    "a name below a name": _bytes(_as_name(b"numpy", b"os.system"), b"\x8c\x09touch ran\x85R."),
    "another name of NumPy": _bytes(b"cnumpy.core.multiarray\nfromfile\n."),
    "NumPy's own unpickling": _bytes(b"cnumpy\nload\n(V/tmp/x\nNI01\ntR."),
    "NumPy's lib": _bytes(b"cnumpy.testing._private.utils\nrunstring\n(Vopen('ran','w')\n}tR."),
    "an instance": _bytes(b"(Vtouch ran\nios\nsystem\n."),
    "an object": _bytes(b"(cos\nsystem\nVtouch ran\no."),
    "a new object": _bytes(b"\x80\x02cbuiltins\nlist\n)\x81."),
    "copyreg": _bytes(b"ccopyreg\n_reconstructor\n(c__main__\nX\nc__builtin__\nobject\nNtR."),
    "a partial": _dump(Call(functools.partial, os.system)),
    "an operator": _dump(Call(operator.methodcaller, "system")),
    "a state of a function": _bytes(b"cnumpy.core.multiarray\nscalar\n}V__name__\nVx\nsb."),
    "a state of a function's slots": _bytes(b"c_codecs\nencode\nN}V__code__\nNs\x86b."),
    "a state of a class": _bytes(b"cnumpy\ndtype\n}V_type\nNsb."),
    "a state of a list": _bytes(b"]}Vappend\nNsb."),
    "arguments to bytes": _bytes(b"c__builtin__\nbytes\n(I99999999999\ntR."),
    "another encoding": _bytes(b"c_codecs\nencode\n(Vx\nVrot13\ntR."),
    "a persistent id": _persistent,
    "a persistent id as text": _bytes(b"Pmine\n."),
    "an extension": _extension,
    "a buffer from elsewhere": _bytes(b"\x80\x05\x97."),
    "an array of objects": _dump([np.array([Call(os.system, "touch ran")], object)]),
    "a key that is no text": _dump({(1, 2): 3}),
    "an array as a key": _bytes(b"}]Nsb."),
    "an array that is too large": _dump(_array((2**40, 2**40))),
    "an array that is too large for its bytes": _dump(_array((10**9,), b"12345678")),
    "an array of a negative size": _dump(_array((-1,), b"12345678")),
    "an array of many dimensions": _dump(_array((1, 1, 1, 1), b"12345678")),
    "bytes that are not there": _bytes(b"\x80\x04\x8e", struct.pack("<Q", 2**40), b"x."),
    "a text that is not there": _bytes(b"\x80\x04\x8d", struct.pack("<Q", 2**62), b"x."),
    "bytes of an array that are not there": _bytes(b"\x80\x05\x96", struct.pack("<Q", 2**45), b"."),
    "a number that is not there": _bytes(b"\x80\x02\x8b", struct.pack("<i", 2**31 - 1), b"."),
    "a place far off in the memo": _bytes(b"]r", struct.pack("<I", 2**32 - 1), b"h\x00."),
    "a text that is encoded again and again": _bytes(
        b"](c_codecs\nencode\nq\x00(V", b"x" * 10**5, b"\nVlatin1\ntq\x01R",
        b"h\x00h\x01R" * 500, b"e.",
    ),
    "nesting as a key": _bytes(b"}", b")" + b"\x85" * 200_000, b"Ns."),
    "nesting as a dtype": _bytes(b"cnumpy\ndtype\n)", b"\x85" * 200_000, b"\x85R."),
    "an empty stack": _bytes(b"\x85."),
    "no mark": _bytes(b"t."),
    "an odd number of items": _bytes(b"(Vx\nd."),
    "items of a list": _bytes(b"]Vx\nNs."),
    "an entry of a text": _bytes(b"Vx\nNa."),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_runs_nothing_and_costs_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    HOSTILE[name](Path("data.pkl"))
    before = set(sys.modules)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"data\.pkl"):
            read_pickle(Path("data.pkl"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not Path("ran").exists()
    assert set(sys.modules) == before
    assert peak < 100 * Path("data.pkl").stat().st_size + 2**20


def test_instructions_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_INSTRUCTIONS", 100)
    for count in (99, 100):
        (tmp_path / f"{count}.pkl").write_bytes(b"N" * count + b".")
    assert read_pickle(tmp_path / "99.pkl") is None
    with pytest.raises(UserError, match=r"100\.pkl has more than 100 instructions"):
        read_pickle(tmp_path / "100.pkl")


def test_deep_nesting_is_read_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "data.pkl").write_bytes(b"]" * 200_000 + b"a" * 199_999 + b".")
    assert len(read_pickle(tmp_path / "data.pkl")) == 1


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "data.pkl", "wb") as file:
        file.truncate(2**31 + 1)
    with pytest.raises(
        UserError, match=r"data.pkl has 2\.1 GB, which is too large to read: split it"
    ):
        read_pickle(tmp_path / "data.pkl")


def test_memory_is_that_of_one_file(tmp_path: Path) -> None:
    episodes = [make_episode("cheetah_vel", seed, length=200) for seed in range(20)]
    size = len(pickle.dumps(episodes))
    peaks = []
    for count in (1, 4):
        folder = tmp_path / f"raw{count}" / "cheetah_vel"
        for number in range(count):
            dump(folder / f"cheetah_vel-{number}-expert.pkl", episodes)
            dump(folder / f"cheetah_vel-{number}-prompt-expert.pkl", episodes)
        tracemalloc.start()
        import_data(config_of(folder, tmp_path / f"store{count}"), progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < size / 4
    assert peaks[1] < 3 * size
