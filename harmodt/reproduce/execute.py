"""Executes jobs, each in its own process on a device, until no more job can run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cores import SHARE, count_cores, share
from ..errors import UserError
from ..files import LOCK, owned
from ..progress import PlainConsole, progress_bar
from ..training.stop import Stop
from ..workers import end_commands, start_command
from .jobs import Folder, Job

POLL_SECONDS = 0.1
END_SECONDS = 60
"""Time that a job gets to save a checkpoint and end, after it was asked to end."""


@dataclass(frozen=True)
class _Running:
    """A running job, with its process, its slot and the time at which it began."""

    job: Job
    process: subprocess.Popen[bytes]
    slot: Mapping[str, str]
    began: float


def find_slots(device: str, jobs: int) -> Sequence[Mapping[str, str]]:
    """Return the slots of this machine. Each slot runs one job at a time.

    A slot consists of environment variables for its jobs. They name the slot's GPU, or no GPU. If
    there are several slots, the variables also limit a job to its share of the cores. A variable
    such as OMP_NUM_THREADS that is already set keeps its value.

    Args:
        device: "cuda", "cpu", or "auto", which takes the GPUs if there are some.
        jobs: the number of slots on each GPU, or on the CPU.

    Raises:
        UserError: there is no GPU.
    """
    count = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not count:
        raise UserError("there is no GPU here: leave --device out, or name cpu")
    gpus = [""]  # on the CPU
    if count:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = named.split(",")[:count] if named else list(map(str, range(count)))
    slots = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] * jobs
    if len(slots) == 1:
        return slots
    shared = {
        name: value
        for name, value in share(max(1, count_cores() // len(slots))).items()
        if name == SHARE or name not in os.environ
    }
    return [slot | shared for slot in slots]


class Work:
    """Executes jobs, and knows which jobs are done, running, waiting or failed.

    Args:
        jobs: the jobs, in the order in which they begin.
        slots: the slots that `find_slots` returns.
        folder: the folder that holds the jobs' logs.
        console: prints a line for each job that has ended.

    Attributes:
        failed: for each failed job, by name, the reason.

    Raises:
        UserError: a job's directory holds other data or runs, or a damaged file.
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

        After a signal or an error, this asks the running jobs to end, and waits for them.
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
                end_commands([running.process for running in self._running], END_SECONDS)

    def _begin(self, wait: bool) -> None:
        """Begin the jobs that can begin.

        Args:
            wait: whether to put off jobs whose directory is in use. A job of an earlier, killed
                reproduction may still use it, and ends by itself.
        """
        for job in list(self._waiting):
            if self.failed.keys() & {*job.needs}:
                self._waiting.remove(job)
                self.failed[job.name] = f"not begun, because it needs {', '.join(job.needs)}"
            elif not self._free or not self._done >= {*job.needs}:
                continue
            elif not (wait and _in_use(job.directory)):
                self._waiting.remove(job)
                self._running.append(_start(job, self._free.pop(0), self._folder))

    def _take_back(self) -> None:
        """Free the slots of jobs that have ended, and print how each job ended."""
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
    """Start the process of a job. It ends when this process ends."""
    words = job.words()
    with open(folder.log(job.name), "ab") as log:
        log.write(f"$ {command_of(words)}\n".encode())
        log.flush()
        process = start_command(words, slot, log)
    return _Running(job, process, slot, time.monotonic())


def command_of(words: Sequence[str]) -> str:
    """Return a job's command as a person types it."""
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
    """Return the reason why a job that has ended is not done; None if it is done."""
    status = ended.process.returncode
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    if status:
        return f"ended with status {status}"
    try:
        return None if ended.job.is_done() else "ended without a result"
    except UserError as error:
        return str(error)
