"""Runs all measurements for a GPU with one command, in parts.

    python bench/campaign.py --output results/                  all parts that are not done yet
    python bench/campaign.py --output results/ --minutes 9      those that fit into nine minutes
    python bench/campaign.py --output results/ --only kernels steps
    python bench/campaign.py --list                             the parts and their time limits
    python bench/campaign.py --output /tmp/results --device cpu --quick    small, to try it out

The command repeats no part that was done at this commit on this device. It repeats a part that
failed, was killed or took longer than its limit; such a part does not stop the others.
RESULTS/campaign.json holds the results of all parts and their circumstances, campaign.md the
tables, and PART.log the output of a part.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import errors
import memory
import profile_kernels
import report
import torch
import training

from harmodt.errors import UserError
from harmodt.files import owned, read_bytes, write_bytes, write_json
from harmodt.results import versions

ROOT = Path(__file__).parents[1]
BENCH = "bench"
LOGGED = 40  # lines that are kept from the end of a part's output
STEP_TESTS = ("graph", "costs", "draws", "feed", "windows")
PROCESSES = min(8, os.cpu_count() or 1)  # that run tests: a kernel compiles in half a second
SPARE = 60  # seconds before a part's limit: no benchmark starts after this


@dataclass(frozen=True)
class Part:
    """One part of the measurements.

    Attributes:
        name: its name on the command line and in file names.
        question: the question that it answers.
        limit: the seconds after which it is killed.
        command: its arguments to Python; RESULT stands for the file of its result.
        quick: more arguments that make it small.
        table: makes a Markdown table of its result, if the part writes a result.
        needs: the module that it needs; without the module the part is skipped.
    """

    name: str
    question: str
    limit: int
    command: tuple[str, ...]
    quick: tuple[str, ...] = ()
    table: Callable[[Any], str] | None = None
    needs: str = "torch"


def benchmarks(limit: int, *files: str) -> tuple[str, ...]:
    """The arguments that run files of benchmarks until no time is left to start another."""
    options = ("-q", "--benchmark-only", "--benchmark-json=RESULT")
    names = (f"{BENCH}/bench_{file}.py" for file in files)
    return ("-m", "pytest", *names, *options, f"--most-seconds={limit - SPARE}")


def all_parts(train_minutes: int = 0, output: Path = Path("results")) -> list[Part]:
    """All parts, in order.

    Args:
        train_minutes: minutes of real training, which is the last part; 0 for none.
        output: the campaign's folder. The real run is in it, and resumes from it.
    """
    found = (f"tests/{path.name}" for path in (ROOT / "tests").glob("test_kernels_*.py"))
    tests = sorted({*found} - {"tests/test_kernels_targets.py"})  # this file needs no GPU
    tests += [f"tests/test_{name}.py" for name in STEP_TESTS]
    run = output.resolve() / "mt5-run"
    start = ("--output", str(run)) if not run.exists() else ("--resume", str(run))
    parts = [
        Part(
            "tests",
            "are the kernels and the training step right?",
            420,
            ("-m", "pytest", "-q", "-n", str(PROCESSES), *tests),
            ("-k", "words_for"),
        ),
        Part(
            "errors",
            "how large are the errors, compared with PyTorch's?",
            60,
            (f"{BENCH}/errors.py", "--output", "RESULT"),
            ("--rows", "8"),
            errors.table,
        ),
        Part(
            "kernels",
            "how fast are the kernels?",
            300,
            benchmarks(
                300,
                *("norm_linear", "masked_adamw", "harmony_selection"),
                *("mask_update", "masked_linear"),
            ),
            ("-k", "masked_adamw and 1458720"),
            report.tables,
        ),
        Part(
            "operations",
            "how fast are attention, LayerNorm, dropout and embedding, beside PyTorch's?",
            120,
            benchmarks(120, "operations"),
            ("-k", "dropout"),
            report.tables,
        ),
        Part(
            "steps",
            "how fast is a training step?",
            180,
            (*benchmarks(180, "train_step", "surgery"), "-k", "not graph and not compiled"),
            ("-k", "sampling"),
            report.tables,
        ),
        Part(
            "graphs",
            "how fast is a training step as a CUDA graph?",
            150,
            (*benchmarks(150, "train_step"), "-k", "graph and not compiled"),
            (),
            report.tables,
        ),
        Part(
            "profile",
            "which kernels take the time of a training step, and is tf32x3 faster than fp32?",
            90,
            *(
                (f"{BENCH}/profile_kernels.py", "--output", "RESULT", "--precision", *which)
                for which in (("fp32", "tf32x3", "bf16"), ("fp32", "--tasks", "1"))
            ),
            profile_kernels.table,
        ),
        Part(
            "memory",
            "how much memory does a training step take?",
            90,
            (f"{BENCH}/memory.py", "--output", "RESULT"),
            ("--tasks", "2"),
            memory.table,
        ),
        Part(
            "training",
            "how long do a million steps take?",
            120,
            (f"{BENCH}/training.py", "--seconds", "40", "--output", "RESULT"),
            ("--seconds", "1"),
            training.table,
        ),
        Part(
            "compiled",
            "how fast is a training step through torch.compile?",
            270,
            (*benchmarks(270, "train_step"), "-k", "compiled"),
            ("-k", "sampling"),
            report.tables,
        ),
    ]
    real = Part(
        "meta-world",
        "does a real run collect, train and succeed?",
        60 * train_minutes,
        ("-m", "harmodt.train", *start),
        needs="metaworld",
    )
    return parts + ([real] if train_minutes else [])


class Campaign:
    """The results of the parts. After each part the file is written anew as a whole.

    Args:
        output: the folder of the results.
        device: "cpu", or "cuda" for PyTorch's default GPU.
        quick: whether parts are small, to try them out.
    """

    def __init__(self, output: Path, device: str, quick: bool):
        self.output, self.quick = output, quick
        self.file = output / "campaign.json"
        self.at = {"commit": commit(), "device": device_name(device), "quick": quick}
        self._environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
        self.parts: dict[str, Any] = {}
        if self.file.exists():
            self.parts = json.loads(read_bytes(self.file))["parts"]

    def is_done(self, part: Part) -> bool:
        """Whether the part was done at this commit on this device."""
        record = self.parts.get(part.name, {})
        return record.get("status") == "done" and record["at"] == self.at

    def do(self, part: Part) -> str:
        """Run a part, record it, and return its status: "done", or what went wrong."""
        result = self.output / f"{part.name}.json"
        result.unlink(missing_ok=True)
        more = part.quick if self.quick else ()
        arguments = [str(result.resolve()).join(a.split("RESULT")) for a in part.command]
        command = ["python", *arguments, *more]
        record: dict[str, Any] = {"at": self.at, "machine": machine(), "command": command}
        begin = time.monotonic()
        if importlib.util.find_spec(part.needs) is None:
            status = f"skipped: {part.needs} is not installed"
        else:
            log = self.output / f"{part.name}.log"
            status = _run([sys.executable, *arguments, *more], part.limit, log, self._environment)
            record["log"] = log.read_text(errors="replace").splitlines()[-LOGGED:]
        if result.exists():
            record["result"] = _without_samples(json.loads(read_bytes(result)))
            result.unlink()
        self.parts[part.name] = {**record, "status": status, "seconds": time.monotonic() - begin}
        self._write()
        return status

    def _write(self) -> None:
        write_json(self.file, {"parts": self.parts})
        write_bytes(self.file.with_suffix(".md"), self.tables().encode())

    def tables(self) -> str:
        """The tables of all results, as Markdown."""
        texts = []
        for part in all_parts(1):
            record = self.parts.get(part.name)
            if record is None:
                continue
            heading = f"## {part.name}: {part.question}\n\n{record['status']}, "
            heading += f"{record['seconds']:.0f} s; `{' '.join(record['command'])}`"
            found, log = record.get("result") if part.table else None, record.get("log", [])
            if "pytest" in part.command and log:
                heading += f"\n\n{log[-1]}"  # pytest's summary: how many passed or were skipped
            body = part.table(found) if part.table and found else _fenced(log)
            texts.append(f"{heading}\n\n{body.strip()}\n")
        return "\n".join(texts)


def main() -> None:
    """The command line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # sys.exit also ends the running part
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run only these parts")
    parser.add_argument("--minutes", type=float, help="start no part that could end after this")
    parser.add_argument("--train-minutes", type=int, default=0, help="train on MT5 for so long")
    parser.add_argument("--quick", action="store_true", help="make the parts small, to try them")
    parser.add_argument("--list", action="store_true", help="print the parts and their limits")
    arguments = parser.parse_args()
    parts = all_parts(arguments.train_minutes, arguments.output)
    unknown = {*(arguments.only or ())} - {part.name for part in parts}
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}: see --list")
    if arguments.list:
        print(listing(parts))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU: use --device cpu --quick to try the campaign out")
    chosen = [part for part in parts if not arguments.only or part.name in arguments.only]
    try:
        with owned(arguments.output):
            campaign = Campaign(arguments.output, arguments.device, arguments.quick)
            missing = run_parts(campaign, chosen, arguments.minutes)
    except UserError as error:
        parser.error(str(error))
    sys.exit(1 if missing else 0)


def run_parts(
    campaign: Campaign, parts: Sequence[Part], minutes: float | None = None
) -> dict[str, str]:
    """Run the parts that are not done. Returns the parts that failed, with the reasons."""
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    missing = {}
    for part in parts:
        if campaign.is_done(part):
            print(f"{part.name}: done already", flush=True)
            continue
        if time.monotonic() + part.limit > end:
            status = f"skipped: its limit of {part.limit} s would end after --minutes"
        else:
            print(f"{part.name}: {part.question} (at most {part.limit} s)", flush=True)
            status = campaign.do(part)
        if status != "done":
            missing[part.name] = status
    for name, status in missing.items():
        print(f"NOT DONE: {name}: {status}; see {campaign.output / name}.log")
    print(f"results: {campaign.file}, {campaign.file.with_suffix('.md')}")
    return missing


def listing(parts: Sequence[Part]) -> str:
    """The parts and their limits, for a terminal."""
    lines = [f"{part.name:<11} {part.limit:>5} s   {part.question}" for part in parts]
    return "\n".join([*lines, f"{'all':<11} {sum(p.limit for p in parts):>5} s"])


def _run(command: Sequence[str], limit: float, log: Path, environment: dict[str, str]) -> str:
    """Run a command. If it must end early, kill it and all processes that it has started."""
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"killed: it took longer than its limit of {limit} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return "done" if status == 0 else f"failed with status {status}"


def _without_samples(result: Any) -> Any:
    """A result without the times of the single rounds, which are thousands."""
    if isinstance(result, dict):
        for benchmark in result.get("benchmarks", []):
            benchmark["stats"].pop("data", None)
    return result


def _fenced(lines: Sequence[str]) -> str:
    return "\n".join(["```text", *lines, "```"])


def machine() -> dict[str, Any]:
    """The circumstances of the results, apart from the commit and the device."""
    return {
        "versions": versions(("triton",)),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }


def device_name(device: str) -> str:
    """The GPU's name, or "CPU"."""
    return "CPU" if device == "cpu" else torch.cuda.get_device_name()


def commit() -> str:
    """The checkout's commit, with a "+" if files were changed, or "unknown"."""
    found = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return "unknown" if found is None else found + ("+" if changed else "")


def _output(*command: str) -> str | None:
    """The output of a command; None if there is no such command, or it fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    return result.stdout.strip() if result.returncode == 0 else None


if __name__ == "__main__":
    main()
