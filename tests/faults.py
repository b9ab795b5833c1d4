"""What may happen to a command, and what must hold then: `python tests/faults.py FOLDER --full`.

The table is COMMANDS × FAULTS; a new command is a row, a new fault a function. Commands run as
forks of this program, so that modules are imported once, in folders of their own with all that they
read. After a fault the command is given again, as its own message says where there is one, and must
end with what it would have written without the fault, bit for bit; a message is one sentence.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# A fork of a program whose OpenMP has started threads would wait for them for ever.
os.environ["OMP_NUM_THREADS"] = "1"

import lerobot_files
import numpy as np
import prompt_dt_files
import tiny_experiment
import torch
from authors_files import make_content
from chunks import CHEETAH_RUN, PUSH, REACH, write_source
from damages import (
    DAMAGES,
    cut,
    empty,
    flipped,
    gone,
    link_to_nothing,
    of_another_version,
    swapped,
)
from runs import assert_same, final, small_flags
from safetensors.numpy import load_file

from harmodt import collect, evaluate, import_checkpoint, train
from harmodt.data import __main__ as data
from harmodt.data import writer
from harmodt.environments import family as family_named
from harmodt.errors import run_command
from harmodt.files import LOCK
from harmodt.report import __main__ as report
from harmodt.reproduce import __main__ as reproduce
from harmodt.reproduce.jobs import Folder, jobs_of
from harmodt.reproduce.plan import make_plan

MAINS = {
    "collect": collect,
    "data": data,
    "evaluate": evaluate,
    "import_checkpoint": import_checkpoint,
    "report": report,
    "reproduce": reproduce,
    "train": train,
}
TASKS = {"toy": ("slow", "quick"), "metaworld": ("reach-v3", "drawer-open-v3")}
STARTED_BY = "STARTED_BY"
"""The environment variable that tells which command has started a program."""
LONGEST = 300
"""Seconds after which a command is taken to wait for ever."""
EVALUATED = "--steps 8 --checkpoint-every 3 --keep-checkpoints 1 --evaluate-every 4"


@dataclasses.dataclass(frozen=True)
class Command:
    """A command as it is typed in a folder that holds the inputs.

    Attributes:
        words: without `python -m harmodt.`.
        output: the directory that it writes.
        same: asserts that two outputs are equal.
        again: what goes on with a run that exists; by default the same words.
        last: what is there from its end on, where it refuses to be given again.
    """

    words: str
    output: str
    same: Callable[[Path, Path], None]
    again: str | None = None
    last: str | None = None

    def next(self, folder: Path) -> str:
        """What to give after a kill."""
        begun = self.again and (folder / self.output / "run.json").exists()
        return self.again if begun and self.again else self.words


def same_bytes(a: Path, b: Path) -> None:
    """Two directories hold the same files."""
    assert contents(a) == contents(b)


def same_results(a: Path, b: Path) -> None:
    """Two evaluations of copies of a run came to the same, and left the run as it was."""
    of_a, of_b = contents(a), contents(b)
    for content in (of_a, of_b):
        for name in content:
            if "evaluation/" in name and name.endswith(".json"):
                content[name] = re.sub(rb'"(seconds|crc32)": [^,}\n]*', b"", content[name])
    assert of_a == of_b


def same_imports(a: Path, b: Path) -> None:
    """Two runs of one checkpoint are the same but for their ids."""
    for name, tensor in final(a).items():
        assert torch.equal(tensor, final(b)[name]), name
    arrays = [load_file(run / "conditioning.safetensors") for run in (a, b)]
    np.testing.assert_equal(arrays[0], arrays[1])
    assert contents(a).keys() == contents(b).keys()
    descriptions = []
    for run in (a, b):
        found = json.loads((run / "run.json").read_text().replace(str(run.parent), ""))
        descriptions.append({k: v for k, v in found.items() if k not in OF_ONE_RUN})
    assert descriptions[0] == descriptions[1]


OF_ONE_RUN = ("id", "conditioning", "crc32")


@dataclasses.dataclass(frozen=True)
class Format:
    """Of data to import, in whatever family they are; npz files are of each family in turn.

    Attributes:
        write: makes a data set in a folder.
        files: patterns of what is read, below the folder, each with those of the damages that an
            import cannot tell, or need not.
        words: what the import needs beside the folder's name.
        whole: a folder that is downloaded as one, and may be named in place of its files.
    """

    write: Callable[[Path], object]
    files: dict[str, tuple[Callable[[Path], None], ...]]
    words: str = ""
    whole: str = "nothing"


def write_chunks(folder: Path) -> None:
    """TD-MPC2's data: two chunks."""
    tasks = [REACH, CHEETAH_RUN, REACH, PUSH, PUSH]
    write_source(folder, {"chunk_0.pt": tasks, "chunk_1.pt": tasks[::-1]})


FORMATS = {
    # A chunk more or less, or another one, is for the person to say, and a zip file has its
    # entries' flags twice, of which those at the end hold.
    "td-mpc2": Format(write_chunks, {"*.pt": (gone, swapped, of_another_version)}),
    # Pickles have no checksum; prompts may be missing, and cheetahs' goals are known.
    "prompt-dt": Format(
        lambda folder: prompt_dt_files.write_source(folder, "cheetah_dir", length=5),
        {
            "data/*/*.pkl": (flipped, gone, of_another_version, swapped),
            "config/*/*.pkl": (gone, of_another_version),
        },
    ),
    "lerobot": Format(
        lambda folder: lerobot_files.write_source(folder, lerobot_files.IDS[:2] * 2),
        # It begins with the images, which are left alone.
        {"meta/info.json": (), "data/*/*.parquet": (flipped, of_another_version)},
        whole="lerobot",
    ),
}
MINARI = sys.version_info >= (3, 11)  # which it needs
if MINARI:
    import minari_files

    FORMATS["minari"] = Format(
        lambda folder: minari_files.write_dataset(
            folder, buffers=[minari_files.make_buffer(seed, 12) for seed in range(3)]
        ),
        {"reach-v0/data/metadata.json": (), "reach-v0/data/main_data.hdf5": (flipped,)},
        "--dataset reach-v0=reach",
        whole="minari/reach-v0",
    )


def commands(family: str) -> dict[str, Command]:
    """The rows of the table."""
    tasks = " ".join(TASKS[family])
    collected = f"collect --family {family} --tasks {tasks} --episodes 12 --prompt-episodes 2"
    walked = "collect --tasks cheetah-dir --episodes 12 --prompt-episodes 2 --episode-length 20"
    imported = f"data import raw --family {family} --prompt-episodes 2 --min-length 1"
    if family == "metaworld":
        collected += " --episode-length 100"
    others = {
        f"import-{name}": f"data import {name} --format {name} --prompt-episodes 1 {format.words}"
        for name, format in FORMATS.items()
    }
    trained = f"train --data store {shlex.join(small_flags())} {EVALUATED} --evaluation-episodes 2"
    sizes = "--heads 4 --context-length 4 --prompt-length 2"
    theirs = f"import_checkpoint theirs/model_iter_7 --data store {sizes} --output made"
    # Its runs are there: what happens to them is in the rows of their own commands.
    toys = "reproduce toy --budget toy --output reproduction"
    reproduced = {"reproduce": Command(toys, "reproduction", same_bytes)} if family == "toy" else {}
    to_minari = "data export store --output made"
    exported = {"export": Command(to_minari, "made", same_bytes, last="made/harmodt")}
    unseen = "evaluate run --unseen other --mask voted none --episodes 3 --workers 1"
    return {
        "collect": Command(f"{collected} --workers 1 --output made", "made", same_bytes),
        "collect-walkers": Command(f"{walked} --workers 1 --output made", "made", same_bytes),
        "merge": Command("data merge store other --output made", "made", same_bytes),
        **(exported if MINARI else {}),
        "import": Command(f"{imported} --output made", "made", same_bytes),
        **{n: Command(f"{words} --output made", "made", same_bytes) for n, words in others.items()},
        "train": Command(f"{trained} --output made", "made", assert_same, "train --resume made"),
        "evaluate": Command("evaluate run --episodes 3 --workers 1", "run", same_results),
        "evaluate, unseen": Command(unseen, ".", same_results),
        "import-checkpoint": Command(theirs, "made", same_imports, last="made/run.json"),
        "report": Command("report run --output made/report.html", "made", same_bytes),
        **reproduced,
    }


# Running


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit status, or minus the signal, and what it printed."""

    status: int
    printed: str
    folder: Path

    def check(self, *statuses: int) -> Outcome:
        """Assert how it ended, and that there is no traceback."""
        assert self.status in statuses, (self.status, self.printed, self.folder)
        assert "Traceback" not in self.printed, (self.printed, self.folder)
        return self

    @property
    def sentence(self) -> str:
        """The message of a command that could not do what it was asked to: one line."""
        errors = [line for line in self.printed.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and self.printed.rstrip().endswith(errors[0]), self
        return errors[0]


def start(words: str, folder: Path, before: Callable[[], object] = lambda: None) -> int:
    """Fork; the child runs the command in the folder, in a session of its own, and exits."""
    printed = _printed(folder)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        os.environ[STARTED_BY] = str(os.getpid())
        os.chdir(folder)
        out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        name, *rest = shlex.split(words)
        main = MAINS[name]
        sys.argv = [str(main.__file__), *rest]
        signal.alarm(LONGEST)
        before()
        run_command(main.main)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        print(f"Traceback: {error!r}", flush=True)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def end(child: int, folder: Path) -> Outcome:
    """Wait for a child to end."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    path = _printed(folder)
    printed = path.read_text(errors="replace") if path.exists() else ""  # killed before it
    path.unlink(missing_ok=True)
    return Outcome(status, printed, folder)


def _printed(folder: Path) -> Path:
    """Where a command's output goes: not into its folder, whose disk may be full."""
    return folder.with_name(f"{folder.name}.printed")


def run(words: str, folder: Path, before: Callable[[], object] = lambda: None) -> Outcome:
    """Run a command to its end."""
    return end(start(words, folder, before), folder)


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a directory, but the lock that a kill leaves."""
    files = (p for p in path.rglob("*") if p.is_file() and not p.is_symlink() and p.name != LOCK)
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def wait_until_alone(command: int) -> None:
    """What a killed command had started ends by itself."""
    deadline = time.monotonic() + 20
    while any(_started_by(command, process) for process in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < deadline, f"processes that {command} started are left over"
        time.sleep(0.02)


def _started_by(command: int, process: Path) -> bool:
    """Whether a folder of /proc is that of a program that a command has started."""
    try:
        variables = (process / "environ").read_bytes().split(b"\0")
        return f"{STARTED_BY}={command}".encode() in variables
    except OSError:  # it has ended
        return False


class Bench:
    """Inputs for all commands, and what each writes when it is left alone.

    Args:
        folder: where everything goes; it must not exist.
        family: of the environments.
    """

    def __init__(self, folder: Path, family: str = "toy"):
        tiny_experiment.register()
        os.environ.update(tiny_experiment.children())
        self.folder = folder
        self.family = family
        self.commands = commands(family)
        self.inputs = folder / "inputs"
        self.inputs.mkdir(parents=True)
        self._make_inputs(family)
        self.seconds: dict[str, float] = {}
        for name, command in self.commands.items():
            whole = self.fresh(f"whole-{name}")
            began = time.monotonic()
            run(command.words, whole).check(0)
            self.seconds[name] = time.monotonic() - began

    def _make_inputs(self, family: str) -> None:
        for task, episode in itertools.product(TASKS[family], range(6)):
            path = self.inputs / "raw" / task / f"{episode}.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **_episode(family, seed=episode))
        for name, format in FORMATS.items():
            format.write(self.inputs / name)
        spec = family_named(family).spec
        (self.inputs / "theirs").mkdir()
        content = make_content(TASKS[family], spec.observation_size, spec.action_size)
        torch.save(content, self.inputs / "theirs" / "model_iter_7")
        made = (("collect", "store", ""), ("collect", "other", " --seed 1"), ("train", "run", ""))
        for name, output, more in made:
            run(self.commands[name].words + more, self.inputs).check(0)
            (self.inputs / self.commands[name].output).rename(self.inputs / output)
        for job in jobs_of(make_plan("toy", "toy"), Folder(Path("reproduction"))):
            if family == "toy":
                run(shlex.join(job.words()).removeprefix("harmodt."), self.inputs).check(0)
        run(self.commands["import"].words, self.inputs, _end_before_publishing).check(9)
        (self.inputs / "made").rename(self.inputs / "begun-import")
        run(self.commands["collect"].words, self.inputs, _end_before_last_task).check(9)
        (self.inputs / "made").rename(self.inputs / "begun")

    def fresh(self, name: str) -> Path:
        """A folder with a copy of all inputs."""
        return Path(shutil.copytree(self.inputs, self.folder / name, symlinks=True))

    def same(self, name: str, folder: Path) -> None:
        """Assert that a command's output is what it would have been."""
        command = self.commands[name]
        command.same(self.folder / f"whole-{name}" / command.output, folder / command.output)
        hidden = (folder / command.output).rglob(".*")
        temporary = [p for p in hidden if not (self.inputs / p.relative_to(folder)).exists()]
        assert not temporary, temporary


def _end_before_publishing() -> None:
    """Have a store end as by a kill once all its tasks are written."""
    writer.StoreWriter.finish = lambda *_: os._exit(9)


def _end_before_last_task() -> None:
    """Have a collection end as by a kill once all parts and the first task are written."""
    write_task = collect._write_task

    def write_first(config, store, task):
        if store.tasks:
            os._exit(9)
        write_task(config, store, task)

    collect._write_task = write_first


def _episode(family: str, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    observations, actions, steps = (3, 2, 7) if family == "toy" else (39, 4, 40)
    return {
        "observations": rng.normal(size=(steps, observations)),
        "actions": rng.uniform(-1, 1, (steps, actions)),
        "rewards": rng.uniform(0, 10, steps),
    }


# Kills


def kill_at_any_moment(bench: Bench, name: str, times: int, seed: int = 0) -> int:
    """SIGKILL at random moments, every other one a second time while the command goes on."""
    moments, command = random.Random(f"{name}{seed}"), bench.commands[name]
    kills = 0
    while kills < times:
        folder = bench.fresh(f"{name}-killed")
        for _ in range(1 + kills % 2):
            child = start(command.next(folder), folder)
            time.sleep(moments.uniform(0, bench.seconds[name]))
            os.kill(child, signal.SIGKILL)
            killed = end(child, folder).status == -signal.SIGKILL
            wait_until_alone(child)
            kills += killed
        go_on(command, folder)
        bench.same(name, folder)
        shutil.rmtree(folder)
    return kills


def kill_at_writes(bench: Bench, name: str, times: int, seed: int = 0) -> int:
    """The end on the spot at a change of a file: before, half-way through or after it."""
    command, folder = bench.commands[name], bench.fresh(f"{name}-counted")
    count = folder / "count"
    run(command.words, folder, lambda: _count_changes(count)).check(0)
    moments = range(3 * int(count.read_text()))
    shutil.rmtree(folder)
    chosen = random.Random(seed).sample(moments, min(times, len(moments)))
    for moment in chosen:
        folder = bench.fresh(f"{name}-at-{moment}")
        run(command.words, folder, lambda m=moment: PRELOADED.die_at(m)).check(9)
        go_on(command, folder, 9, before=lambda: PRELOADED.die_at(20))
        go_on(command, folder)
        bench.same(name, folder)
        shutil.rmtree(folder)
    return len(chosen)


def go_on(
    command: Command, folder: Path, *statuses: int, before: Callable[[], object] = lambda: None
) -> None:
    """Give a command again; it ends well, or with one of some statuses, or has come to its end."""
    ended = command.last is not None and (folder / command.last).exists()
    outcome = run(command.next(folder), folder, before).check(2 if ended else 0, *statuses)
    if outcome.status == 2:
        assert command.output in outcome.sentence, outcome


PRELOADED = ctypes.CDLL(None)
"""With the functions of die_at_write.cpp, which `preload` has put before the system's."""


def preload(folder: Path) -> None:
    """Start this program again with die_at_write.cpp compiled and preloaded, unless it is."""
    if hasattr(PRELOADED, "die_at"):
        return
    folder.mkdir(parents=True)
    source, library = Path(__file__).with_name("die_at_write.cpp"), folder / "die_at_write.so"
    compiled = ["g++", "-O1", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"]
    subprocess.run(compiled, check=True)
    os.environ["LD_PRELOAD"] = str(library)
    os.execv(sys.executable, [sys.executable, *sys.argv])


def _count_changes(file: Path) -> None:
    PRELOADED.die_at(-1)
    leave_at_once = os._exit

    def leave(status: int) -> None:
        file.write_text(str(PRELOADED.changes()))
        leave_at_once(status)

    os._exit = leave


# What the file system refuses

PAGE = resource.getpagesize()


def full_disk(bench: Bench, name: str, times: int) -> int:
    """A disk that is full after so many bytes, for sizes up to what the command needs."""
    limited = small_disk if can_mount() else limited_files
    for number in range(times):
        limited(bench, name, (number + 0.5) / times)
    return times


def small_disk(bench: Bench, name: str, share: float) -> None:
    """A tmpfs with room for a share of what the command writes."""
    command = bench.commands[name]
    needed = _pages(bench.folder / f"whole-{name}") - _pages(bench.inputs)
    folder = bench.folder / f"{name}-disk"
    with disk(folder, bench.inputs):
        room = _used(folder) + int(share * needed)
        subprocess.run(["mount", "-o", f"remount,nr_blocks={room}", folder], check=True)
        sentence = run(command.words, folder).check(2).sentence
        assert "the disk is full: free some space, then " in sentence, sentence
        subprocess.run(["mount", "-o", "remount,nr_blocks=100000", folder], check=True)
        run(advised(sentence, command), folder).check(0)
        bench.same(name, folder)


def limited_files(bench: Bench, name: str, share: float) -> None:
    """Files that may not grow beyond a share of the largest that the command writes."""
    command, folder = bench.commands[name], bench.fresh(f"{name}-limited")
    before = contents(bench.inputs)
    written = contents(bench.folder / f"whole-{name}")
    largest = max(len(c) for path, c in written.items() if before.get(path) != c)
    limit = max(1, round(share * largest))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    sentence = run(command.words, folder, limited).check(2).sentence
    assert "raise the limit (ulimit -f), then " in sentence, sentence
    run(advised(sentence, command), folder).check(0)
    bench.same(name, folder)
    shutil.rmtree(folder)


def read_only(bench: Bench, name: str, times: int) -> int:
    """A file system on which nothing may be written."""
    if not can_mount() or not times:
        return 0
    command, folder = bench.commands[name], bench.folder / f"{name}-read-only"
    with disk(folder, bench.inputs):
        before = contents(folder)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        sentence = run(command.words, folder).check(2).sentence
        assert "the file system is read-only: choose another path" in sentence, sentence
        assert contents(folder) == before
    return 1


def advised(sentence: str, command: Command) -> str:
    """The words that a message tells to give."""
    _, told, words = sentence.partition("go on with: python -m harmodt.")
    assert told or "then give the same command again" in sentence, sentence
    return words if told else command.words


@contextlib.contextmanager
def disk(folder: Path, inputs: Path) -> Iterator[None]:
    """A file system in memory with a copy of the inputs, as long as the block runs."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_blocks=100000", "tmpfs", folder], check=True)
    try:
        shutil.copytree(inputs, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


def can_mount() -> bool:
    """Whether this process may mount a file system."""
    check = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return os.geteuid() == 0 and subprocess.run(check, capture_output=True).returncode == 0


def _used(folder: Path) -> int:
    """Pages in use on a file system."""
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize // PAGE


def _pages(path: Path) -> int:
    return sum(-(-len(content) // PAGE) for content in contents(path).values())


# Damaged inputs


@dataclasses.dataclass(frozen=True)
class Reader:
    """A command that reads files which may be damaged.

    Attributes:
        words: as typed; without damage it succeeds.
        files: patterns of what it reads.
        accepts: pairs of a pattern and the damage that need be no error there.
        mends: a pattern of files that may also be made again: the output is the same then.
        begins: a store that may be left unfinished, where damage is met while it is written.
        whole: a folder that may be named in place of its files.
    """

    words: str
    files: tuple[str, ...]
    accepts: tuple[tuple[str, Callable[[Path], None]], ...] = ()
    mends: str = "nothing"
    begins: str = "nothing"
    whole: str = "nothing"


ARRAYS = ("*/*.npy", "*/prompts/*.npy")


def readers(family: str) -> dict[str, Reader]:
    """Every command that reads, and what."""
    store = ("store/manifest.json", *(f"store/{pattern}" for pattern in ARRAYS))
    policy = ("run/run.json", "run/conditioning.safetensors", "run/checkpoints/00000008/*")
    made = {name: command.words for name, command in commands(family).items()}
    # What a kill leaves of the metrics and costs, which are a record and no more.
    records = ("run/metrics.jsonl", "run/costs.jsonl")
    cuts = tuple((r, d) for r in records for d in (cut, empty, gone, link_to_nothing))
    runs = "reproduction/runs/*"
    # An evaluation that is not there is made again.
    results = (f"{runs}/evaluation/*.json", gone)
    toys = Reader(made.get("reproduce", ""), (f"{runs}/run.json", results[0]), (results,))
    return {
        **({"reproduce": toys} if "reproduce" in made else {}),
        "info": Reader("data info store", ("store/manifest.json",)),
        "verify": Reader("data verify store", store),
        # An episode more or less, or another one, is for the person to say.
        "import": Reader(
            made["import"], ("raw/*/3.npz",), (("raw/*/3.npz", gone), ("raw/*/3.npz", swapped))
        ),
        **{
            f"import-{name}": Reader(
                made[f"import-{name}"],
                tuple(f"{name}/{pattern}" for pattern in format.files),
                tuple((pattern, d) for pattern, known in format.files.items() for d in known),
                whole=format.whole,
            )
            for name, format in FORMATS.items()
        },
        "collect, continued": Reader(
            made["collect"].replace("--output made", "--output begun"),
            ("begun/unfinished.json", *(f"begun/{p}" for p in ARRAYS), "begun/parts/*/*"),
            mends="begun/parts/*/*",
        ),
        "import, continued": Reader(
            made["import"].replace("--output made", "--output begun-import"),
            ("begun-import/unfinished.json", *(f"begun-import/{p}" for p in ARRAYS)),
        ),
        "merge": Reader(
            made["merge"],
            ("other/manifest.json", *(f"other/{pattern}" for pattern in ARRAYS)),
            begins="made",
        ),
        **({"export": Reader(made["export"], store)} if "export" in made else {}),
        "train": Reader(made["train"], store),
        "train, continued": Reader("train --resume run", (*policy, *records), cuts),
        "train, continued on moved data": Reader("train --resume run --data store", store),
        "evaluate": Reader("evaluate run --episodes 1 --workers 1", policy),
        # A zip file has its entries' flags twice, of which those at the end hold.
        "import-checkpoint": Reader(
            made["import-checkpoint"], ("theirs/*", *store), (("theirs/*", of_another_version),)
        ),
        "report": Reader(
            made["report"],
            (*policy, *records, "run/evaluation/*.json"),
            # An evaluation less, or another one, is for the person to say.
            (*cuts, ("run/evaluation/*", gone), ("run/evaluation/*", swapped)),
        ),
        "evaluate, unseen": Reader(
            made["evaluate, unseen"], ("other/manifest.json", "other/*/prompts/*.npy")
        ),
    }


REMEDY = re.compile(
    r"\b(add|copy|restore|make|give|delete|move|remove|train|evaluate|go on|choose|mend|put"
    r"|download|check)\b"
)


def damaged(bench: Bench, name: str, times: int, seed: int = 0) -> int:
    """Each of a reader's files in turn with each damage: refused by name, all left as it was."""
    reader = readers(bench.family)[name]
    where = bench.fresh(f"{name.replace(', ', '-')}-damaged")
    before = contents(where)
    cases = [
        (path.relative_to(where), damage)
        for pattern in reader.files
        for path in sorted(where.glob(pattern))
        for damage in DAMAGES
    ]
    tried = 0
    for path, damage in random.Random(seed).sample(cases, min(times, len(cases))):
        damage(where / path)
        if (where / path).is_file() and (where / path).read_bytes() == before[str(path)]:
            continue  # there is nothing of the kind in it
        check_damaged(bench, reader, where, path, damage)
        tried += 1
        shutil.rmtree(where)
        bench.fresh(where.name)
    shutil.rmtree(where)
    return tried


def check_damaged(bench: Bench, reader: Reader, where: Path, path: Path, damage: Callable) -> None:
    """Refused with the file's name and what to do, and everything is as it was; or made again."""
    before = contents(where)
    outcome = run(reader.words, where)
    case = path, damage.__name__, outcome
    if outcome.status == 0 and any(path.match(p) and damage is d for p, d in reader.accepts):
        return
    if outcome.status == 0 and path.match(reader.mends):
        assert contents(where / "begun") == contents(bench.folder / "whole-collect" / "made"), case
        return
    sentence = outcome.check(2).sentence
    whole = re.search(rf"{re.escape(reader.whole)}(?!/)", sentence)
    assert path.name in sentence or path.parent.name in sentence or whole, case
    assert REMEDY.search(sentence), case
    after = contents(where)
    assert f"{reader.begins}/manifest.json" not in after, case
    kept = {name: after[name] for name in after if not name.startswith(f"{reader.begins}/")}
    assert kept == before, case


# The table


def whole_table(bench: Bench, numbers: dict[str, int], chosen: Sequence[str] = ()) -> None:
    """Every fault on every command; prints how many of each there were.

    Args:
        numbers: of each kind of fault, for each command or reader.
        chosen: rows to try alone; all by default.

    Raises:
        AssertionError: something was lost, silently accepted, or not told in one sentence.
    """
    for kind, number in numbers.items():
        attack = FAULTS[kind]
        rows = readers(bench.family) if attack is damaged else bench.commands
        names = [name for name in rows if not chosen or name in chosen]
        print(f"{kind}: { ({name: attack(bench, name, number) for name in names}) }", flush=True)


FAULTS: dict[str, Callable[[Bench, str, int], int]] = {
    "killed at any moment": kill_at_any_moment,
    "killed at a write": kill_at_writes,
    "full disk": full_disk,
    "read-only disk": read_only,
    "damaged input": damaged,
}
QUICK = {
    "killed at any moment": 1,
    "killed at a write": 1,
    "full disk": 1,
    "read-only disk": 1,
    "damaged input": 2,
}
FULL = {
    "killed at any moment": 100,
    "killed at a write": 100,
    "full disk": 10,
    "read-only disk": 1,
    "damaged input": 100,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for what is written; it must not exist")
    parser.add_argument("--family", default="toy", choices=TASKS)
    parser.add_argument("--full", action="store_true", help="as docs/reliability.md has it")
    parser.add_argument("--only", choices=FAULTS, help="one kind of fault")
    parser.add_argument("--rows", nargs="+", default=(), help="these commands and readers alone")
    arguments = parser.parse_args()
    preload(arguments.folder.absolute() / "preload")
    numbers = FULL if arguments.full else QUICK
    if arguments.only:
        numbers = {arguments.only: numbers[arguments.only]}
    whole_table(Bench(arguments.folder.absolute(), arguments.family), numbers, arguments.rows)
