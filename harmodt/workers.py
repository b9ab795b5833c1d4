"""Child processes that end with their parent. Only this module ties a child to its parent.

A `Worker` is a separate Python interpreter that holds an object and calls the object's methods.
`start_command` starts a whole command, such as a training run, which saves its work before it ends.

Each child is a new program. A fork would be unsafe with PyTorch's threads. A child of
`multiprocessing` would import the parent's main module, and with it PyTorch. Each child leads its
own session. Ctrl-C therefore reaches only the parent, and a kill ends a child together with all
processes that the child started. (For example, MuJoCo's glfw starts a program when it is imported.)
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import IO, Any, TypeVar

from .cores import share
from .errors import UserError

_SERVE = """
import sys
sys.path[:] = sys.argv[4:]
from harmodt.workers import serve
serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
"""

_REQUESTS_AHEAD = 2  # a worker already has its next request, so it does not wait for the parent

_PR_SET_PDEATHSIG = 1  # an option of prctl(2); the setting stays after execve

Request = TypeVar("Request")


class WorkerError(RuntimeError):
    """A worker failed or died; the message has the worker's name and report."""


class WorkerDied(WorkerError, UserError):
    """A worker was killed or ended early. The machine is the cause, not the program."""


class Served:
    """An object that a worker holds and whose methods its parent calls."""

    def close(self) -> None:
        """Clean up. The worker calls this after an error, or if the parent calls `let_go` or
        dies."""


class Worker:
    """A process that holds an object and calls its methods in the order of the requests.

    The worker computes in one thread, and searches for modules only in the parent's `sys.path`.
    When the parent lets go of the worker or dies, the worker ends with all processes that it
    started. It also ends after the first error.

    Args:
        make: makes the object in the worker, without arguments; usually a class. It must be
            importable.
        name: the worker's name in error messages, as "a simulation worker (reach-v3)".
        relief: advice for a person if memory runs out, as "simulate fewer environments".
        patience: seconds that the worker has to finish a request and close its object after the
            parent lets go or dies. Then it is killed.
        variables: environment variables to set in the worker.

    Attributes:
        process: the child process.
        connection: the connection to the worker. `multiprocessing.connection.wait` tells when it
            has an answer for `receive`.
    """

    def __init__(
        self,
        make: Callable[[], Served],
        name: str,
        relief: str,
        patience: float = 0.0,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._relief = relief
        self._patience = patience
        self.connection, requests = Pipe()
        lifeline, self._lifeline = Pipe(duplex=False)
        with requests, lifeline:  # only the worker keeps these ends; its death closes them
            numbers = requests.fileno(), lifeline.fileno()
            self.process = subprocess.Popen(
                # With -I, Python imports nothing from the user's or the current folder before
                # _SERVE sets sys.path.
                [sys.executable, "-I", "-c", _SERVE, *map(str, (*numbers, patience, *sys.path))],
                env={**os.environ, **share(1), **(variables or {})},
                stdin=subprocess.DEVNULL,
                pass_fds=numbers,
                start_new_session=True,
            )
        self.send(make)

    def send(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Request a call. `receive` returns the answers in the order of the requests.

        If the worker has ended, this raises nothing, because the reason may wait among the answers:
        `receive` raises it.

        Args:
            function: a method of the object's class, as `Class.method`.
            arguments: the method's arguments after `self`.
        """
        with contextlib.suppress(OSError):
            self.connection.send((function, arguments))

    def receive(self) -> Any:
        """Wait for the answer to the oldest request that is not yet answered, and return it.

        Raises:
            UserError, OSError, MemoryError: the method raised this error.
            WorkerError: the method, or making the object, raised another error; the message has its
                traceback.
            WorkerDied: the worker was killed or has ended.
        """
        try:
            outcome, value = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if outcome == "refused":
            raise value
        if outcome == "failed":
            raise WorkerError(f"{self.name} failed:\n{value}")
        return value

    def let_go(self) -> None:
        """Tell the worker to end, without waiting for it."""
        self.connection.close()
        self._lifeline.close()

    def wait(self) -> None:
        """Wait until the worker has ended; call `let_go` before."""
        _wait_or_kill(self.process, self._patience)

    def _death(self) -> WorkerDied:
        # The worker may be about to end by itself: its own exit status says more than a kill.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        _kill(self.process)  # and all processes that it started
        code = self.process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        return WorkerDied(
            f"{self.name} {how}: if the machine ran out of memory, {self._relief}; else give the "
            "same command again"
        )


def end_workers(workers: Sequence[Worker]) -> None:
    """End workers, and wait until they have ended."""
    for worker in workers:
        worker.let_go()
    for worker in workers:
        worker.wait()


def spread(
    workers: Sequence[Worker], function: Callable[..., Any], requests: Iterable[Request]
) -> Iterator[Request]:
    """Have workers call a method for each request; yield each request once it is answered.

    Args:
        workers: workers without unanswered requests.
        function: as in `Worker.send`; a request is its only argument.
        requests: the requests, in the order in which free workers get them.

    Raises:
        UserError, OSError, MemoryError, WorkerError: as in `Worker.receive`.
    """
    left = iter(requests)
    given: dict[object, tuple[Worker, deque[Request]]]
    given = {worker.connection: (worker, deque()) for worker in workers}

    def give(worker: Worker, unanswered: deque[Request]) -> None:
        for request in islice(left, 1):
            worker.send(function, request)
            unanswered.append(request)

    for _ in range(_REQUESTS_AHEAD):
        for worker, unanswered in given.values():
            give(worker, unanswered)
    while busy := [worker.connection for worker, unanswered in given.values() if unanswered]:
        for connection in wait(busy):
            worker, unanswered = given[connection]
            worker.receive()
            answered = unanswered.popleft()
            give(worker, unanswered)
            yield answered


def serve(requests: int, lifeline: int, patience: float) -> None:
    """The worker's side: answer the parent's requests until it lets go or dies.

    Args:
        requests: descriptor of the socket for requests and answers.
        lifeline: descriptor of a pipe that closes when the parent lets go or dies.
        patience: seconds to finish a request after that.
    """

    def end_at_once(*_: object) -> None:
        os.kill(0, signal.SIGKILL)  # the whole group, with all programs that a simulator started

    def end_with_parent() -> None:
        os.read(lifeline, 1)  # waits until the parent's end is closed
        time.sleep(patience)
        end_at_once()

    signal.signal(signal.SIGTERM, end_at_once)
    threading.Thread(target=end_with_parent, daemon=True).start()
    connection, held = Connection(requests), None
    try:
        while (request := _next_request(connection)) is not None:
            function, arguments = ForkingPickler.loads(request)
            if held is None:  # the first request makes the object
                held = function(*arguments)
            else:
                connection.send(("done", function(held, *arguments)))
    except BaseException as error:
        with contextlib.suppress(OSError):  # the parent died or let go
            connection.send(_told(error))
    finally:
        if held is not None:
            held.close()


def _next_request(connection: Connection) -> bytes | None:
    try:
        return connection.recv_bytes()
    except (EOFError, ConnectionError):
        return None  # the parent let go or died


def _told(error: BaseException) -> tuple[str, Any]:
    """The message to the parent about an error.

    `errors.py` has sentences for three types of errors, so the parent gets these errors unchanged.
    It gets the traceback of any other error.
    """
    if isinstance(error, (UserError, OSError, MemoryError)):
        return "refused", error
    return "failed", "".join(traceback.format_exception(error))


def start_command(
    words: Sequence[str], variables: Mapping[str, str], output: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start `python -m WORDS`; it gets SIGTERM when this process dies in any way.

    Linux sends the signal when the thread that started the command ends. So call this in a thread
    that lives as long as the process, such as the main thread.

    Args:
        words: the name of a module, and its arguments.
        variables: environment variables to set for the command.
        output: file for everything that the command prints.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "harmodt.workers", str(os.getpid()), *words],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def end_commands(commands: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    """Send SIGTERM to commands, and wait until they have ended.

    Args:
        patience: seconds to wait; commands that still run after that are killed.
    """
    for command in commands:
        command.terminate()
    deadline = time.monotonic() + patience
    for command in commands:
        _wait_or_kill(command, max(0.0, deadline - time.monotonic()))


def _wait_or_kill(leader: subprocess.Popen[Any], seconds: float) -> None:
    """Wait some seconds for a child that leads a process group; then kill the whole group."""
    try:
        leader.wait(seconds)
    except subprocess.TimeoutExpired:
        _kill(leader)


def _kill(leader: subprocess.Popen[Any]) -> None:
    """Kill the process group that a child leads, even if the child itself has just ended."""
    if leader.returncode is None:  # until its status is read, no other process gets its number
        os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()


def _become_command(parent: int, words: Sequence[str]) -> None:
    """Become `python -m WORDS`, which gets SIGTERM when its parent dies."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # the parent died before prctl was called
        sys.exit(128 + signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, "-m", *words])


if __name__ == "__main__":
    _become_command(int(sys.argv[1]), sys.argv[2:])
