from __future__ import annotations

import errno
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from served import Place, Step, Sum, Unmade, Waiting

from harmodt.errors import UserError, describe
from harmodt.workers import (
    Served,
    Worker,
    WorkerDied,
    WorkerError,
    end_commands,
    end_workers,
    spread,
    start_command,
)

LONG = 6  # seconds in which whatever a test waits for has happened, on a busy machine


@contextmanager
def working(make: Callable[[], Served], count: int = 1) -> Iterator[list[Worker]]:
    """Some workers, which are ended at last."""
    workers: list[Worker] = []
    try:
        for _ in range(count):
            workers.append(Worker(make, "a test's worker", "do less"))
        yield workers
    finally:
        end_workers(workers)


def call(worker: Worker, function: Callable, *arguments: object) -> object:
    worker.send(function, *arguments)
    return worker.receive()


def test_a_worker_keeps_its_object_and_answers_in_order() -> None:
    with working(functools.partial(Sum, 10)) as [worker]:
        worker.send(Sum.add, 1)
        worker.send(Sum.add, 2)
        assert worker.receive() == 11 and worker.receive() == 13
        assert call(worker, Sum.add, -20) == -7


@pytest.mark.parametrize(
    "error",
    [UserError("mend it"), OSError(errno.ENOSPC, "full", "x"), MemoryError("too large")],
)
def test_an_error_with_a_sentence_has_the_same_sentence_here(error: Exception) -> None:
    with working(Sum) as [worker], pytest.raises(type(error)) as raised:
        call(worker, Sum.fail, error)
    assert describe(raised.value) == describe(error) is not None


def test_a_request_after_an_error_does_not_hide_it() -> None:
    """The worker ends after its error; only then does the parent make another request."""
    with working(Sum) as [worker]:
        worker.send(Sum.fail, OSError(errno.ENOSPC, "full", "x"))
        worker.process.wait(LONG)
        worker.send(Sum.add, 1)
        with pytest.raises(OSError, match="full") as raised:
            worker.receive()
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("function", "arguments", "says"),
    [
        (Sum.fail, (ValueError("what is this"),), "in fail\n.*ValueError: what is this"),
        (Sum.fail, (SystemExit(0),), "SystemExit"),
        # As the end of the parent would be seen: it is none.
        (Sum.fail, (EOFError("of a file"),), "EOFError: of a file"),
        (Sum.lambda_of, (), "lambda"),
    ],
)
def test_another_error_is_told_with_its_traceback(
    function: Callable, arguments: tuple, says: str
) -> None:
    match = rf"(?s)^a test's worker failed:\nTraceback.*{says}"
    with working(Sum) as [worker], pytest.raises(WorkerError, match=match):
        call(worker, function, *arguments)


def test_an_object_that_cannot_be_made_is_an_error_at_the_first_answer() -> None:
    with working(Unmade) as [worker], pytest.raises(WorkerError, match="ValueError: no such thing"):
        worker.receive()


def test_a_broken_connection_of_the_objects_own_is_an_error_as_others() -> None:
    with working(Sum) as [worker], pytest.raises(ConnectionResetError, match="of a server"):
        call(worker, Sum.fail, ConnectionResetError(errno.ECONNRESET, "of a server"))


@pytest.mark.parametrize("how", ["killed", "ended"])
@pytest.mark.parametrize("reaped", [False, True])
def test_a_death_is_told_in_a_sentence(how: str, reaped: bool) -> None:
    with working(Sum) as [worker]:
        assert call(worker, Sum.add, 1) == 1
        if how == "killed":
            worker.process.kill()
        else:
            worker.send(Sum.exit_at_once, 3)
        if reaped:
            worker.process.wait()
        with pytest.raises(WorkerDied) as death:
            worker.receive()
        with pytest.raises(WorkerDied):
            call(worker, Sum.add, 1)
    how = {"killed": "was killed by signal 9", "ended": "ended with exit status 3"}[how]
    assert describe(death.value) == (
        f"a test's worker {how}: if the machine ran out of memory, do less; else give the same "
        "command again"
    )


def test_a_worker_imports_what_it_needs_alone() -> None:
    assert {"torch", "pytest", __name__} <= sys.modules.keys()
    with working(Place) as [worker]:
        modules = call(worker, Place.modules)
    assert isinstance(modules, set) and "served" in modules
    assert not modules & {"torch", "pytest", __name__, "tyro", "harmodt.train"}


def test_a_worker_leads_a_group_that_ctrl_c_does_not_reach() -> None:
    with working(Place) as [worker]:
        process, group, session = call(worker, Place.group)  # type: ignore[misc]
    assert process == group == session == worker.process.pid
    assert session != os.getsid(0)


def test_a_worker_has_one_core_and_the_variables_that_are_asked_for() -> None:
    worker = Worker(Place, "", "", variables={"MUJOCO_GL": "x"})
    try:
        variables = call(worker, Place.variables)
        assert isinstance(variables, dict)
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            assert variables[name] == "1"
        assert variables["MUJOCO_GL"] == "x" and variables["PATH"] == os.environ["PATH"]
        assert call(worker, Place.cores) == 1
    finally:
        end_workers([worker])


PARENT = """
import functools, sys
from pathlib import Path
from harmodt.workers import Worker, end_workers
from served import Waiting
closed, patience, what = sys.argv[1:]
make = functools.partial(Waiting, Path(closed))
worker = Worker(make, "a worker", "do less", float(patience))
if what == "busy":
    worker.send(Waiting.run_long)
else:
    worker.send(Waiting.wait_for, Path("/"))
    worker.receive()
    print("started", flush=True)
print(worker.process.pid, flush=True)
sys.stdin.readline()
end_workers([worker])
"""


@contextmanager
def parent(tmp_path: Path, patience: float, what: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """A process with a worker, which is idle, or busy with a program that it has started.

    Yields the process and the worker's id. At the end nobody holds the process's output open: not
    the worker, nor what it has started.
    """
    command = [sys.executable, "-c", PARENT, str(tmp_path / "closed"), str(patience), what]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        words = {process.stdout.readline().strip() for _ in range(2)} - {"started"}
        yield process, int(words.pop())
        assert process.communicate(timeout=LONG) == ("", None)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="sees in /proc that a worker has ended")
@pytest.mark.parametrize("how", ["let go", "SIGKILL", "SIGTERM", "SIGINT", "worker terminated"])
def test_a_worker_ends_with_its_parent_and_with_all_that_it_has_started(
    tmp_path: Path, how: str
) -> None:
    with parent(tmp_path, 0, "busy") as (process, worker):
        if how == "worker terminated":
            os.kill(worker, signal.SIGTERM)
            while not Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].startswith(" Z"):
                time.sleep(0.01)
        elif how != "let go":  # else its input ends
            process.send_signal(signal.Signals[how])


@pytest.mark.parametrize("how", ["let go", "SIGKILL"])
def test_an_idle_worker_closes_its_object(tmp_path: Path, how: str) -> None:
    with parent(tmp_path, LONG, "idle") as (process, _):
        if how == "SIGKILL":
            process.kill()
    assert (tmp_path / "closed").read_text() == "closed"


@pytest.mark.parametrize("how", ["let go", "SIGKILL"])
def test_patience_has_an_end(tmp_path: Path, how: str) -> None:
    with parent(tmp_path, 0.2, "busy") as (process, _):
        if how == "SIGKILL":
            process.kill()
    assert not (tmp_path / "closed").exists()


def test_a_worker_may_finish_while_its_parent_is_patient(tmp_path: Path) -> None:
    worker = Worker(functools.partial(Waiting, tmp_path / "closed"), "", "", patience=LONG)
    worker.send(Waiting.wait_for, tmp_path / "awaited")
    worker.let_go()
    (tmp_path / "awaited").touch()
    worker.wait()
    assert worker.process.returncode == 0
    assert (tmp_path / "closed").exists()


def test_what_a_dead_worker_had_started_ends_too(tmp_path: Path) -> None:
    """Where the worker alone is killed, as the system does when memory runs out."""
    program = PARENT.replace("sys.stdin.readline()", "worker.process.kill(); worker.receive()")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(tmp_path / "closed"), str(LONG), "busy"]
    # run() waits until nobody holds the output open.
    result = subprocess.run(command, env=environment, capture_output=True, timeout=LONG)
    assert b"WorkerDied: a worker was killed by signal 9" in result.stderr


def test_requests_go_to_the_worker_that_is_free(tmp_path: Path) -> None:
    awaited = tmp_path / "awaited"
    requests = [(i, None, None) for i in range(7)]
    requests[0], requests[6] = (0, awaited, None), (6, None, awaited)  # it waits for the last
    with working(Step, 2) as workers:
        answered = [number for number, *_ in spread(workers, Step.do, requests)]
    # Request 2 is ahead at the first worker; all others go to the second one.
    assert answered[:4] == [1, 3, 4, 5] and sorted(answered) == [*range(7)]
    assert answered.index(0) < answered.index(2)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_there_may_be_fewer_requests_than_workers(count: int) -> None:
    requests = [(i, None, None) for i in range(count)]
    with working(Step, 3) as workers:
        assert sorted(spread(workers, Step.do, requests)) == requests


def test_an_error_ends_the_spreading() -> None:
    with working(Sum, 2) as workers, pytest.raises(UserError, match="mend it"):
        list(spread(workers, Sum.fail, [UserError("mend it")]))


def test_a_command_that_does_not_end_is_killed_with_what_it_has_started(tmp_path: Path) -> None:
    program = """
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.run(["sh", "-c", "sleep 60 & echo started; wait"], stdin=subprocess.DEVNULL)
"""
    (tmp_path / "stubborn.py").write_text(program)
    read, write = os.pipe()
    with open(read, "rb") as output, open(write, "wb") as written:
        command = start_command(["stubborn"], {"PYTHONPATH": str(tmp_path)}, written)
        written.close()
        assert output.readline() == b"started\n"
        end_commands([command], 0.2)
        assert command.returncode == -signal.SIGKILL
        assert output.read() == b""  # nobody holds it open


def test_a_command_whose_parent_has_died_already_does_not_begin() -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    command = [sys.executable, "-m", "harmodt.workers", str(dead.pid), "this"]  # Python's zen
    result = subprocess.run(command, capture_output=True)
    assert (result.returncode, result.stdout) == (128 + signal.SIGTERM, b"")
