"""What ends a run before its last step: signals, and an output that nobody reads any more."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

MOMENT = 1.0
"""Seconds after the first signal in which another one still counts as the same: a terminal or a
scheduler may send one twice."""


class Stopped(BaseException):
    """A run has ended before its last step because it was asked to."""


class Stop:
    """Remembers that a run is asked to end, until the run gets to a place where it can.

    Attributes:
        signal: the first signal that asked for the end, or None. SIGPIPE stands for an output that
            nobody reads any more.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._at_once = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Remember Ctrl-C, SIGTERM and SIGHUP. A signal that is ignored, as under nohup, stays so.

        A second Ctrl-C or SIGTERM, more than a moment after the first signal, ends the process at
        once, even while a step hangs. Only the main thread can call this.
        """
        heeded = [s for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        with _second_signal_ends(heeded):
            handlers = {s: signal.signal(s, self._remember) for s in heeded}
            try:
                yield
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Stopped at a signal. For long work that can be done again from its start."""
        self._at_once = True
        try:
            if self.signal:
                raise Stopped
            yield
        finally:
            self._at_once = False

    def _remember(self, number: int, frame: Any) -> None:
        self.signal = self.signal or signal.Signals(number)
        if self._at_once:
            self._at_once = False
            raise Stopped


@contextlib.contextmanager
def _second_signal_ends(heeded: list[signal.Signals]) -> Iterator[None]:
    """End the process at a second signal.

    Python calls a signal's handler between two instructions of the main thread, and so never while
    a call of a library hangs. But the system writes the signal's number to the wake-up socket right
    away, and a thread of its own reads it there.
    """
    written, read = socket.socketpair()
    written.setblocking(False)
    before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read, heeded), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        written.close()  # ends the thread, which closes the other end


def _watch(numbers: socket.socket, heeded: list[signal.Signals]) -> None:
    """Read the numbers of signals until the other end is closed."""
    first: float | None = None
    with numbers:
        while number := numbers.recv(1):
            if number[0] not in heeded:
                continue
            name = signal.Signals(number[0]).name
            if first is None:
                first = time.monotonic()
                _tell(f"{name}: ending in good order; Ctrl-C or SIGTERM ends this at once")
            elif number[0] != signal.SIGHUP and time.monotonic() - first > MOMENT:
                _tell(f"{name}: ended at once; what was written to the disk is kept")
                os._exit(128 + number[0])


def _tell(text: str) -> None:
    """Write a line to standard error, past Python's buffers, which the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


class Output:
    """Standard output for a console. Once nobody reads it any more, the run is asked to stop.

    Attributes:
        stop: of the run; None while none is under way.
    """

    def __init__(self) -> None:
        self.stop: Stop | None = None

    def write(self, text: str) -> int:
        """Write text."""
        with self._until_closed():
            sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with self._until_closed():
            sys.stdout.flush()

    def isatty(self) -> bool:
        """Whether standard output is a terminal."""
        return sys.stdout.isatty()

    def fileno(self) -> int:
        """The descriptor of standard output."""
        return sys.stdout.fileno()

    @property
    def encoding(self) -> str:
        """The encoding of standard output."""
        return sys.stdout.encoding

    @contextlib.contextmanager
    def _until_closed(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            if self.stop is None:
                raise
            self.stop.signal = self.stop.signal or signal.SIGPIPE
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())  # Python's buffer is still to be written somewhere
            os.close(null)
