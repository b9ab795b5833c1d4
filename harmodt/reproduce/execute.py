"""Does jobs, each in a process of its own on a device, until none is left that can be done."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..environments.simulation import available_cores
from ..errors import UserError
from ..files import LOCK, owned
from ..progress import PlainConsole, progress_bar
from ..training.stop import Stop
from .jobs import Folder, Job

POLL_SECONDS = 0.1
END_SECONDS = 60
"""How long a process that was told to end may take to, its checkpoint included."""


@dataclass(frozen=True)
class _Running:
    """A job's process, what it was given of the machine, and when it began."""

    job: Job
    process: subprocess.Popen[bytes]
    slot: Mapping[str, str]
    began: float


def find_slots(device: str, jobs: int) -> Sequence[Mapping[str, str]]:
    """Where jobs run, each a few environment variables: one GPU each, or all jobs on the CPU.

    Args:
        device: "cuda", "cpu", or "auto" for the GPUs where there are some.
        jobs: how many at a time on each GPU, or on the CPU.

    Raises:
        UserError: there is no GPU.
    """
    count = torch.cuda.device_count() if device != "cpu" else 0
    if count:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = named.split(",")[:count] if named else map(str, range(count))
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] * jobs
    if device == "cuda":
        raise UserError("there is no GPU here: leave --device out, or name cpu")
    slot: dict[str, str] = {"CUDA_VISIBLE_DEVICES": ""}
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        slot["OMP_NUM_THREADS"] = str(max(1, available_cores() // jobs))
    return [slot] * jobs


class Work:
    """Jobs that are done, that run, that wait, and that failed.

    Args:
        jobs: in the order in which they begin.
        slots: as `find_slots` returns them.
        folder: for logs.
        console: told of each job that has ended.

    Attributes:
        failed: names of jobs and why they are not done.

    Raises:
        UserError: what a job makes is damaged, or another's.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        slots: Sequence[Mapping[str, str]],
        folder: Folder,
        console: PlainConsole,
    ):
        self._waiting = [job for job in jobs if not job.is_done()]
        self._done = {job.name for job in jobs} - {job.name for job in self._waiting}
        self._free = list(slots)
        self._running: list[_Running] = []
        self._total = len(jobs)
        self._folder = folder
        self._console = console
        self.failed: dict[str, str] = {}

    def do(self, stop: Stop) -> None:
        """Do all jobs that can be done.

        Where a signal or an error stops the work, what runs is told to end, and waited for.
        """
        self._folder.logs.mkdir(parents=True, exist_ok=True)
        orphans_end = time.monotonic() + END_SECONDS
        with progress_bar("jobs", "now", console=self._console) as bar:
            line = bar.add_task("reproducing", total=self._total)
            try:
                while (self._waiting or self._running) and stop.signal is None:
                    self._begin(wait=time.monotonic() < orphans_end)
                    self._take_back()
                    now = ", ".join(running.job.name for running in self._running)
                    bar.update(line, completed=len(self._done), now=now)
                    time.sleep(POLL_SECONDS)
            finally:
                _end([running.process for running in self._running])

    def _begin(self, wait: bool) -> None:
        """Begin what can be begun.

        Args:
            wait: for directories in use: what a killed reproduction began there ends by itself.
        """
        for job in list(self._waiting):
            if self.failed.keys() & {*job.needs}:
                self._waiting.remove(job)
                self.failed[job.name] = f"not begun, for it needs {', '.join(job.needs)}"
            elif not self._free or not self._done >= {*job.needs}:
                continue
            elif not (wait and _in_use(job.directory)):
                self._waiting.remove(job)
                self._running.append(_start(job, self._free.pop(0), self._folder))

    def _take_back(self) -> None:
        """See what has ended, and how."""
        for ended in [r for r in self._running if r.process.poll() is not None]:
            self._running.remove(ended)
            self._free.append(ended.slot)
            name, why, seconds = ended.job.name, _why_not(ended), time.monotonic() - ended.began
            if why is None:
                self._done.add(name)
            else:
                self.failed[name] = why
            self._console.print(f"{name}: {why or 'done'}, {seconds:.0f} s", soft_wrap=True)


def _start(job: Job, slot: Mapping[str, str], folder: Folder) -> _Running:
    """Start a job's process, in a session of its own, which Ctrl-C does not reach."""
    words = job.words()
    launched = ["-m", "harmodt.reproduce.launch", str(os.getpid()), *words]
    with open(folder.log(job.name), "ab") as log:
        log.write(f"$ {command_of(words)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [sys.executable, *launched],
            env={**os.environ, **slot},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Running(job, process, slot, time.monotonic())


def command_of(words: Sequence[str]) -> str:
    """A job's command as a person types it."""
    return f"python -m {shlex.join(words)}"


def _in_use(directory: Path) -> bool:
    if not (directory / LOCK).exists():
        return False
    try:
        with owned(directory):
            return False
    except UserError:
        return True


def _why_not(ended: _Running) -> str | None:
    """Why a job that has ended is not done, if so."""
    status = ended.process.returncode
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    if status:
        return f"ended with status {status}"
    try:
        return None if ended.job.is_done() else "ended without a result"
    except UserError as error:
        return str(error)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Tell processes to end, and wait until they have."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + END_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
