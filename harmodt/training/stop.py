"""What ends a run before its last step, in good order: signals, and an output that is closed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """Raised inside `Stop.at_once`."""


class Stop:
    """Remembers the first signal until the run can end; later ones change nothing.

    Attributes:
        signal: what asks for the end, or None; SIGPIPE for an output that nobody reads any more.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._at_once = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Remember Ctrl-C, SIGTERM and SIGHUP, unless they are ignored, as by nohup."""
        heeded = [s for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        handlers = {s: signal.signal(s, self._remember) for s in heeded}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Stopped at a signal: for what is long, and can be done again from its start."""
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


class Output:
    """Standard output for a console; once nobody reads it any more, the run is asked to stop."""

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
        """Whether a person reads along."""
        return sys.stdout.isatty()

    def fileno(self) -> int:
        """The descriptor of standard output."""
        return sys.stdout.fileno()

    @property
    def encoding(self) -> str:
        """Of standard output."""
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
            os.dup2(null, sys.stdout.fileno())  # what is still buffered goes there
            os.close(null)
