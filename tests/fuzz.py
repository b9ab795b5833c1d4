"""Coverage-guided fuzzing of every reader of what is on disk.

    pip install atheris
    python tests/fuzz.py npz --seconds 600

A reader returns, or raises what `harmodt.errors.describe` has a sentence for, within 2 s of
computing and 1 GB of memory. For anything else, the smallest input that led to it is kept with its
traceback in a folder, and the fuzzing goes on. At the end, libFuzzer prints how many inputs were
read and what they covered (`cov` and `ft`).

Every checksum of JSON and safetensors is a constant here: what is mutated is a file that someone
has changed on purpose, checksum included.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import atheris

with atheris.instrument_imports(include=["harmodt", "zipfile"]):
    import zipfile

    from harmodt import files

    CHECKSUM = "00000000"
    files.checksum = lambda content: CHECKSUM  # before others import it from there

    from runs import begin, play
    from tiny import SPEC, TASKS, make_store

    from harmodt.checkpoint import load_checkpoint
    from harmodt.data.describe import describe as describe_store
    from harmodt.data.importers import check_episode, importer
    from harmodt.data.inputs import load_conditioning
    from harmodt.data.store import MANIFEST, DataStore
    from harmodt.data.writer import make_or_open
    from harmodt.devices import Execution
    from harmodt.errors import describe
    from harmodt.report import figures, tables
    from harmodt.report.runs import read_runs
    from harmodt.results import EvaluationResult
    from harmodt.rollout import Request
    from harmodt.rundir import RunDirectory
    from harmodt.training import costs, metrics, policy, run

import numpy as np
import torch
from numpy.lib import _format_impl

for function in (_format_impl._read_array_header, _format_impl.read_array):
    atheris.instrument_func(function)

SECONDS, BYTES = 2, 2**30
"""What an input may take."""

STRANGE = [
    "null", "true", "0", "-1", "1", "3", "0.5", "-0.0", "1e308", "1e999", "NaN", "-Infinity",
    "2147483648", "9223372036854775808", "18446744073709551616", "9" * 400, "9" * 5000,
    *('""', '"."', '".."', '"/"', '"a/b"', '"\\u0000"', '"\\ud800"', '"λ"', '"\\u001b[2J"'),
    *('"cpu"', '"|O"', '"<f8"', '"F64"', '"I64"', '"BF16"', '"F8_E4M3"', '"C64"', '"BOOL"'),
    f'"{"x" * 5000}"', "[]", "{}", "[[]]", '{"": null}', '{"a":1,"a":[]}',
    '{"a":' * 400 + "1" + "}" * 400, "[" * 20_000 + "]" * 20_000, "[" * 20_000, '{"a":' * 20_000,
    *("[" * depth + "]" * depth for depth in range(900, 1000, 12)),
]  # fmt: skip
"""JSON, or nearly, that may stand in the place of any value."""

Mutate = Callable[[random.Random, bytes], bytes]


class Target(NamedTuple):
    """A file that is read: valid contents, how to read one, and how to mutate it."""

    seeds: list[bytes]
    read: Callable[[bytes], object]
    mutate: Mutate


def mutate_json(rng: random.Random, content: bytes) -> bytes:
    """Change some values, keys or types of a JSON document."""
    try:
        holder = [json.loads(content)]
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            _change_value(rng, holder)
        text = json.dumps(holder[0])
    except (ValueError, OverflowError, RecursionError):
        return _mutate_bytes(content)
    return re.sub('"@([0-9]+)"', lambda match: STRANGE[int(match[1])], text).encode()


def _change_value(rng: random.Random, holder: Any) -> None:
    """Change a value somewhere below; `"@<i>"` stands for STRANGE[i]."""
    key: Any = 0
    while isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.8:
        holder = holder[key]
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    value = holder[key]
    match rng.randrange(6):
        case 0 | 1:
            holder[key] = f"@{rng.randrange(len(STRANGE))}"
        case 2:
            holder[key] = [str(value), [value], {"a": value}][rng.randrange(3)]
        case 3 if isinstance(value, int | float):
            holder[key] = rng.choice([value + 1, value - 1, -value, value * 2, float(value)])
        case 4 if isinstance(holder, dict):
            holder[rng.choice(["", ".", "../x", "a/b", "\ud800", "\0", *holder])] = holder.pop(key)
        case 5 if isinstance(holder, dict):
            del holder[key]
        case _ if isinstance(holder, list):
            holder[key:] = holder[key + rng.choice([0, 1]) :] * rng.choice([1, 2])
            holder.append(value)


def _mutate_bytes(content: bytes) -> bytes:
    return atheris.Mutate(content, len(content) + 64)


def mutate_lines(rng: random.Random, content: bytes) -> bytes:
    """Change a line of JSON lines, or leave it out, repeat it, or cut off what follows."""
    lines = content.splitlines(keepends=True) or [b""]
    at = rng.randrange(len(lines))
    match rng.randrange(8):
        case 0:
            del lines[at]
        case 1:
            lines.insert(rng.randrange(len(lines)), lines[at])
        case 2:
            return _mutate_bytes(content)
        case _:
            lines[at] = mutate_json(rng, lines[at]) + rng.choice([b"\n", b"\n", b"\n", b"", b"\r"])
    return b"".join(lines)


DTYPES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1,
    "F8_E8M0": 1, "I8": 1, "BOOL": 1,
}  # fmt: skip
"""Of safetensors, with the bytes of a number."""
DATA = [b"\xff" * 8, b"\0" * 8, b"\0\0\0\0\0\0\xf0\x7f", b"\xff\xff\x7f\x7f", b"\1" * 8, b"\xff"]


def mutate_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Change the header, its length, a dtype in it, or bytes of the data."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    match rng.randrange(9):
        case 0:
            length = rng.choice([0, 1, length + 1, len(data), -1, 2**63])
            return (length % 2**64).to_bytes(8, "little") + header + data
        case 1:
            return _mutate_bytes(content)
        case 2 | 3:
            header = _mutate_dtype(rng, header)
        case 4 | 5 if data:
            at, value = rng.randrange(len(data)) & -8, rng.choice(DATA)
            data = data[:at] + value + data[at + len(value) :]
        case _:
            header = mutate_json(rng, header)
    return len(header).to_bytes(8, "little") + header + data


def _mutate_dtype(rng: random.Random, header: bytes) -> bytes:
    """Change the dtype of a tensor, and mostly its shape to what its bytes have room for."""
    try:
        entries = json.loads(header)
        entry = rng.choice([entry for entry in entries.values() if "dtype" in entry])
        entry["dtype"], width = rng.choice(list(DTYPES.items()))
        if rng.random() < 0.7:
            first, last = entry["data_offsets"]
            entry["shape"] = [(last - first) // width]
        return json.dumps(entries).encode()
    except Exception:  # of a header that was mutated
        return mutate_json(rng, header)


def mutate_npz(rng: random.Random, content: bytes) -> bytes:
    """Change an array, its name or header, the fields of the zip, or bytes anywhere."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
    except Exception:  # of a zip whose fields were mutated
        members = []
    if not members or rng.random() < 0.2:
        return _mutate_fields(rng, content) if rng.random() < 0.7 else _mutate_bytes(content)
    at = rng.randrange(len(members))
    name, array = members[at]
    match rng.randrange(8):
        case 0:
            del members[at]
        case 1:
            name = rng.choice([*(n for n, _ in members), "observations", "../x.npy", "success.npy"])
            members.insert(at, (name, array))
        case 2:
            members[at] = (name, _mutate_bytes(array))
        case 3:
            members[at] = (name, array[: rng.randrange(len(array) + 1)])
        case _:
            members[at] = (name, _mutate_header(rng, array))
    made = io.BytesIO()
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]
    (method,) = rng.choices(methods, [4, 4, 1])
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, array in members:
            archive.writestr(name, array)
    return made.getvalue()


HEADER_VALUES = {
    b"'shape': [^}]*": [
        b"(5,)", b"(0,)", b"(5, 39)", b"(-1,)", b"(5, 0)", b"()", b"(99999999999,)", b"(1,) * 9",
        b"(2**62, 4)", b"(True,)", b"(5.0,)", b"5", b"(" * 200, b"(9" + b"9" * 400 + b",)",
        b"(0, 99999999999999999999)", b"(1, " + b"1, " * 70 + b")",
    ],
    b"'descr': '[^']*'": [
        b"'<f8'", b"'>f4'", b"'<f2'", b"'|O'", b"'<U9'", b"'|V999999999'", b"'<c16'", b"'|b1'",
        b"'<M8[ns]'", b"'<i8'", b"'|S0'", b"[('a', '<f4')]", b"[('a', '<f4', (9999, 9999))]",
        b"''", b"7", b"None", b"'<f8' + 1", b"('<f4', (9, 9))", b"'<g16'",
    ],
    b"'fortran_order': [^,]*": [b"True", b"False", b"None", b"[]"],
}  # fmt: skip
"""What may stand in a header of an npy file."""


def _mutate_header(rng: random.Random, array: bytes) -> bytes:
    """Change a value of an npy header, its length or its version."""
    length = int.from_bytes(array[8:10], "little")
    header, data = array[10 : 10 + length], array[10 + length :]
    pattern, values = rng.choice(list(HEADER_VALUES.items()))
    value = rng.choice(values)
    key = pattern.partition(b": ")[0]
    header = re.sub(pattern, lambda _: key + b": " + value, header, count=1)
    length = len(header) if rng.random() < 0.9 else rng.choice([0, 9, 65535, length + 1])
    version = array[:8] if rng.random() < 0.9 else array[:6] + bytes([rng.randrange(5), 0])
    return version + min(length, 65535).to_bytes(2, "little") + header + data


def _mutate_fields(rng: random.Random, content: bytes) -> bytes:
    """Change a few bytes of a local header, a central one or the end of a zip."""
    places = [match.start() for match in re.finditer(b"PK(\x01\x02|\x03\x04|\x05\x06)", content)]
    if not places:
        return _mutate_bytes(content)
    at = rng.choice(places) + rng.randrange(4, 30)
    width = rng.choice([1, 2, 4])
    value = rng.choice([0, 1, 8, 9, 12, 14, 20, 93, 99, 255, 2**31 - 1, 2**32 - 1])
    field = (value or rng.getrandbits(32)).to_bytes(4, "little")[:width]
    return content[:at] + field + content[at + width :]


def manifest(folder: Path) -> Target:
    """manifest.json of a store, and what the commands do with it."""
    path = make_store(folder / "store", TASKS[:2]).path
    settings = {"episodes": 5, "tasks": list(TASKS[:2])}
    seed = json.loads((path / MANIFEST).read_bytes()) | {"provenance": {"import": settings}}

    def read(content: bytes) -> None:
        (path / MANIFEST).write_bytes(content)
        describe_store(DataStore.open(path))
        make_or_open(path, "import", settings, Mock())

    return Target([json.dumps(seed).encode()], read, mutate_json)


def _small_run(folder: Path) -> RunDirectory:
    store = make_store(folder / "store", TASKS[:2])
    more = ["--embed-dim", "8", "--max-timesteps", "20", "--keep-checkpoints", "1"]
    with contextlib.redirect_stdout(io.StringIO()):
        begin(store, folder / "run", *more)
    return RunDirectory(folder / "run")


def description(folder: Path) -> Target:
    """run.json."""
    directory = _small_run(folder)

    def read(content: bytes) -> None:
        directory.description.write_bytes(content)
        saved = run.SavedRun.open(directory.path)
        settings = saved.config.run
        Execution.choose(settings.device, settings.fused, settings.precision)
        load_checkpoint(directory)

    return Target([directory.description.read_bytes()], read, mutate_json)


def conditioning(folder: Path) -> Target:
    """conditioning.safetensors."""
    directory = _small_run(folder)

    def read(content: bytes) -> None:
        directory.conditioning.write_bytes(content)
        load_conditioning(directory.conditioning, TASKS[:2], SPEC, CHECKSUM)

    return Target([directory.conditioning.read_bytes()], read, mutate_safetensors)


def _checkpoint(folder: Path, name: str, mutate: Mutate) -> Target:
    directory = _small_run(folder)
    file = directory.checkpoint(12) / name
    whole = load_checkpoint(directory).tensors

    def read(content: bytes) -> None:
        file.write_bytes(content)
        load_checkpoint(directory).copy_to({n: tensor.clone() for n, tensor in whole.items()})

    return Target([file.read_bytes()], read, mutate)


def state(folder: Path) -> Target:
    """state.json of a checkpoint."""
    return _checkpoint(folder, "state.json", mutate_json)


def tensors(folder: Path) -> Target:
    """state.safetensors of a checkpoint."""
    return _checkpoint(folder, "state.safetensors", mutate_safetensors)


def metrics_lines(folder: Path) -> Target:
    """metrics.jsonl, with evaluations in it."""
    directory = _small_run(folder)
    seed = directory.metrics.read_bytes() + b'{"step": 12, "mean_return": 5.5, "success": 0.25}\n'
    metrics.SummaryWriter = Mock()

    def read(content: bytes) -> None:
        directory.metrics.write_bytes(content)
        with contextlib.closing(metrics.Metrics(directory, 12)) as found:
            found.best  # noqa: B018

    return Target([seed], read, mutate_lines)


def costs_lines(folder: Path) -> Target:
    """costs.jsonl, as a run that goes on and a page read it."""
    directory = _small_run(folder)

    def read(content: bytes) -> None:
        directory.costs.write_bytes(content)
        (found,) = read_runs([directory.path])
        figures.throughput(found), figures.time_by_part([found])
        tables.costs([found]), tables.overview([found])
        with contextlib.closing(costs.Costs(directory, 12, torch.device("cpu"))) as going_on:
            going_on.write(12)

    return Target([directory.costs.read_bytes()], read, mutate_lines)


def npz(folder: Path) -> Target:
    """A file of an import."""
    path = folder / "reach-v2" / "0.npz"
    path.parent.mkdir()
    reader = importer("npz", folder)
    arrays = {"observations": np.ones((5, 39)), "actions": np.ones((5, 4)), "rewards": np.ones(5)}
    seeds = []
    for save, more in [(np.savez, {}), (np.savez_compressed, {"success": np.ones((5, 1), bool)})]:
        save(path, **arrays, **more)
        seeds.append(path.read_bytes())

    def read(content: bytes) -> None:
        path.write_bytes(content)
        check_episode(str(path), reader.read(path), SPEC, 1)

    return Target(seeds, read, mutate_npz)


def evaluation(folder: Path) -> Target:
    """A saved evaluation."""
    acting = policy.load_policy(_small_run(folder).path)
    path = play(acting, Request(episodes=2), None).save(folder)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        EvaluationResult.load(path).to_csv()

    return Target([path.read_bytes()], read, mutate_json)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "manifest": manifest,
    "run": description,
    "conditioning": conditioning,
    "state": state,
    "tensors": tensors,
    "metrics": metrics_lines,
    "costs": costs_lines,
    "npz": npz,
    "evaluation": evaluation,
}


class Watch:
    """Reads one input after the other, and keeps those that a reader cannot bear."""

    def __init__(self, name: str, read: Callable[[bytes], object], found: Path):
        self.name, self.read, self.found = name, read, found
        self.most_memory = _memory() + BYTES

    def __call__(self, content: bytes) -> None:
        began = time.process_time()
        try:
            self.read(content)
        except Exception as error:
            if describe(error) is None:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{type(error).__name__}-{Path(last.filename).stem}-{last.lineno}"
                self._keep(where, content, traceback.format_exc())
        seconds = time.process_time() - began
        if seconds > SECONDS:
            self._keep("slow", content, f"{seconds:.1f} s")
        if _memory() > self.most_memory:
            self._keep("memory", content, f"{_memory() / 1e9:.1f} GB")
            self.most_memory = _memory() + BYTES

    def _keep(self, what: str, content: bytes, why: str) -> None:
        path = self.found / f"{self.name}-{what}"
        if not path.exists() or path.stat().st_size > len(content):
            print(f"found: {path}\n{why}", file=sys.stderr)
            path.write_bytes(content)
            path.with_name(f"{path.name}.txt").write_text(why, errors="backslashreplace")


def _memory() -> int:
    """The most bytes that this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(name: str, folder: Path, seconds: int, found: Path) -> None:
    """Fuzz a target with its files in a folder; ends the process."""
    (folder / "seeds").mkdir()
    (folder / "files").mkdir()
    target = TARGETS[name](folder / "files")
    for number, seed in enumerate(target.seeds):
        (folder / "seeds" / str(number)).write_bytes(seed)
        target.read(seed)
    arguments = [
        sys.argv[0],
        str(folder / "seeds"),
        f"-max_total_time={seconds}",
        f"-max_len={2 * max(map(len, target.seeds)) + 2**16}",
        f"-timeout={10 * SECONDS}",  # ends the fuzzing, which a slow input does not
        f"-rss_limit_mb={6 * BYTES >> 20}",
        f"-artifact_prefix={found}/{name}-",
        "-mutate_depth=2",  # a mutator here makes several changes
        "-print_final_stats=1",
    ]

    def mutate(content: bytes, most: int, seed: int) -> bytes:
        return target.mutate(random.Random(seed), content)[:most]

    atheris.Setup(arguments, Watch(name, target.read, found), custom_mutator=mutate)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="what broke")
    arguments = parser.parse_args()
    arguments.found.mkdir(parents=True, exist_ok=True)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        child = os.fork()  # which libFuzzer ends; the folder is removed here
        if not child:
            fuzz(arguments.target, Path(folder), arguments.seconds, arguments.found)
        _, status = os.waitpid(child, 0)
    broken = sorted(arguments.found.glob(f"{arguments.target}-*"))
    print(f"{len(broken)} files of inputs that broke {arguments.target} are in {arguments.found}")
    sys.exit(bool(status or broken))


if __name__ == "__main__":
    main()
