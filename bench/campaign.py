"""All that is to be measured on a GPU, in parts, with one command.

    python bench/campaign.py --output results/                    what is not done yet
    python bench/campaign.py --output results/ --minutes 9        what fits into nine minutes of it
    python bench/campaign.py --output results/ --only kernels steps
    python bench/campaign.py --list                               the parts and their limits
    python bench/campaign.py --output /tmp/results --device cpu --quick    small, to try it out

A part that was done at this commit, on this device, is not done again; one that failed, was killed
or took longer than its limit is, and does not end the others. RESULTS/campaign.json holds the
results of all parts with what they depend on, campaign.md the tables of it, PART.log what a part
printed.
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
LOGGED = 40  # last lines of what a part prints
STEP_TESTS = ("graph", "costs", "draws", "feed", "windows")
PROCESSES = min(8, os.cpu_count() or 1)  # of tests: a kernel takes half a second to compile
SPARE = 60  # seconds of a part's limit for a benchmark that has begun before it


@dataclass(frozen=True)
class Part:
    """Something to measure.

    Attributes:
        name: on the command line and of its files.
        question: what it answers.
        limit: seconds, after which it is killed.
        command: its arguments to Python; RESULT stands for the file of its result.
        quick: further arguments that make it small.
        table: makes Markdown of its result, if it leaves one.
        needs: a module without which it is left out.
    """

    name: str
    question: str
    limit: int
    command: tuple[str, ...]
    quick: tuple[str, ...] = ()
    table: Callable[[Any], str] | None = None
    needs: str = "torch"


def benchmarks(limit: int, *files: str) -> tuple[str, ...]:
    """Arguments that run files of benchmarks for as long as there is time to begin another."""
    options = ("-q", "--benchmark-only", "--benchmark-json=RESULT")
    names = (f"{BENCH}/bench_{file}.py" for file in files)
    return ("-m", "pytest", *names, *options, f"--most-seconds={limit - SPARE}")


def all_parts(train_minutes: int = 0, output: Path = Path("results")) -> list[Part]:
    """Every part, in order; `train_minutes` of real training come last, if any.

    Args:
        output: of the campaign, where the real run goes, and goes on.
    """
    found = (f"tests/{path.name}" for path in (ROOT / "tests").glob("test_kernels_*.py"))
    tests = sorted({*found} - {"tests/test_kernels_targets.py"})  # which needs no GPU
    tests += [f"tests/test_{name}.py" for name in STEP_TESTS]
    run = output.resolve() / "mt5-run"
    start = ("--output", str(run)) if not run.exists() else ("--resume", str(run))
    parts = [
        Part(
            "tests",
            "are the kernels right, and the step that is made of them?",
            420,
            ("-m", "pytest", "-q", "-n", str(PROCESSES), *tests),
            ("-k", "words_for"),
        ),
        Part(
            "errors",
            "how far are results from float64, beside PyTorch's?",
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
            "steps",
            "how fast is a training step?",
            240,
            (*benchmarks(240, "train_step", "surgery"), "-k", "not graph"),
            ("-k", "sampling"),
            report.tables,
        ),
        Part(
            "graphs",
            "how fast is it as a CUDA graph?",
            210,
            (*benchmarks(210, "train_step"), "-k", "graph"),
            (),
            report.tables,
        ),
        Part(
            "profile",
            "where does its time go?",
            60,
            (f"{BENCH}/profile_kernels.py", "--output", "RESULT"),
            ("--tasks", "1"),
            profile_kernels.table,
        ),
        Part(
            "memory",
            "how much memory does it take?",
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
    ]
    real = Part(
        "meta-world",
        "does a run collect, train and succeed?",
        60 * train_minutes,
        ("-m", "harmodt.train", *start),
        needs="metaworld",
    )
    return parts + ([real] if train_minutes else [])


class Campaign:
    """The parts that are done, in a file that is written whole after each.

    Args:
        output: directory of the results.
        device: "cpu", or "cuda" for the GPU that PyTorch takes.
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
        """Whether the part was done with this code, on this device."""
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
            status = f"left out: {part.needs} is not installed"
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
        """What was measured, as Markdown."""
        texts = []
        for part in all_parts(1):
            record = self.parts.get(part.name)
            if record is None:
                continue
            heading = f"## {part.name}: {part.question}\n\n{record['status']}, "
            heading += f"{record['seconds']:.0f} s; `{' '.join(record['command'])}`"
            found, log = record.get("result") if part.table else None, record.get("log", [])
            if "pytest" in part.command and log:
                heading += f"\n\n{log[-1]}"  # how many passed, and how many were left out
            body = part.table(found) if part.table and found else _fenced(log)
            texts.append(f"{heading}\n\n{body.strip()}\n")
        return "\n".join(texts)


def main() -> None:
    """The command line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # it ends the part that runs
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts")
    parser.add_argument("--minutes", type=float, help="begin no part whose limit ends later")
    parser.add_argument("--train-minutes", type=int, default=0, help="for a real run on MT5")
    parser.add_argument("--quick", action="store_true", help="small, to try the campaign out")
    parser.add_argument("--list", action="store_true", help="the parts and their limits")
    arguments = parser.parse_args()
    parts = all_parts(arguments.train_minutes, arguments.output)
    unknown = {*(arguments.only or ())} - {part.name for part in parts}
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}: see --list")
    if arguments.list:
        print(listing(parts))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here: --device cpu --quick tries the campaign out")
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
    """Do the parts that are not done; returns those that still are not, and why."""
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    missing = {}
    for part in parts:
        if campaign.is_done(part):
            print(f"{part.name}: done before", flush=True)
            continue
        if time.monotonic() + part.limit > end:
            status = f"left out: its limit of {part.limit} s would end after --minutes"
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
    """Run a command and, where it must end early, all that it has started."""
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
    """A result without the time of every round, of which there are thousands."""
    if isinstance(result, dict):
        for benchmark in result.get("benchmarks", []):
            benchmark["stats"].pop("data", None)
    return result


def _fenced(lines: Sequence[str]) -> str:
    return "\n".join(["```text", *lines, "```"])


def machine() -> dict[str, Any]:
    """What the results depend on beside the code and the device."""
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
    """The checkout's commit, "+" if files differ from it, or "unknown"."""
    found = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return "unknown" if found is None else found + ("+" if changed else "")


def _output(*command: str) -> str | None:
    """What a command prints; None where there is no such command, or it fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    return result.stdout.strip() if result.returncode == 0 else None


if __name__ == "__main__":
    main()
