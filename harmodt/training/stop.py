"""Ends a run before its last step: after a signal, or when its output is closed."""

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
"""Seconds after the first signal in which further signals are ignored, because a terminal or a
scheduler may send the same signal twice."""


class Stopped(BaseException):
    """Raised to end a run before its last step."""


class Stop:
    """Remembers a request to end, until the run reaches a point where it can end.

    Attributes:
        signal: the first signal that asked for the end, or None. SIGPIPE stands for a closed
            output.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._at_once = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Remember Ctrl-C, SIGTERM and SIGHUP inside the `with` block.

        A signal that the process already ignores stays ignored, as SIGHUP under nohup. A second
        Ctrl-C or SIGTERM, more than `MOMENT` after the first signal, ends the process at once, even
        while a step hangs. Only the main thread can call this.
        """
        watched = [s for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        with _second_signal_ends(watched):
            handlers = {s: signal.signal(s, self._remember) for s in watched}
            try:
                yield
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `Stopped` at a signal inside the `with` block.

        This is for long work that can be repeated from its start.
        """
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
            self._at_once = False  # further signals do not raise
            raise Stopped


@contextlib.contextmanager
def _second_signal_ends(watched: list[signal.Signals]) -> Iterator[None]:
    """End the process at a second signal.

    Python calls a signal's handler between two instructions of the main thread. While a
    library call hangs, it cannot call the handler. But Python writes the signal's number to the
    wake-up socket at once. A separate thread reads the number from this socket.
    """
    written, read = socket.socketpair()
    written.setblocking(False)
    before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read, watched), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        written.close()  # ends the thread, which closes the other end


def _watch(numbers: socket.socket, watched: list[signal.Signals]) -> None:
    """Read the numbers of signals until the other end is closed."""
    first: float | None = None
    with numbers:
        while number := numbers.recv(1):
            if number[0] not in watched:
                continue
            name = signal.Signals(number[0]).name
            if first is None:
                first = time.monotonic()
                _tell(f"{name}: saving and ending; a second Ctrl-C or SIGTERM ends this at once")
            elif number[0] != signal.SIGHUP and time.monotonic() - first > MOMENT:
                _tell(f"{name}: ended at once; what was written to the disk is kept")
                os._exit(128 + number[0])


def _tell(text: str) -> None:
    """Write a line to standard error without Python's buffers, which the main thread may lock."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


class Output:
    """Standard output for a console. If its reader closes it, this object asks the run to stop.

    Attributes:
        stop: the run's `Stop`; None while no run is active.
    """

    def __init__(self) -> None:
        self.stop: Stop | None = None

    def write(self, text: str) -> int:
        """Write text; return its length."""
        with self._until_closed():
            sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        """Write the buffered text."""
        with self._until_closed():
            sys.stdout.flush()

    def isatty(self) -> bool:
        """Tell whether standard output is a terminal."""
        return sys.stdout.isatty()

    def fileno(self) -> int:
        """Return the file descriptor of standard output."""
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
            os.dup2(null, sys.stdout.fileno())  # Python still writes its buffer at exit
            os.close(null)
