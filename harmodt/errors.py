"""Errors that are addressed to the person at the keyboard."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the person running the command can mend.

    The message is one sentence: what is wrong, where (file, key, task) and what to do.
    """


def run_command(main: Callable[[], None]) -> None:
    """Run a command line's `main`; turn the user's mistakes into one line and exit status 2."""
    try:
        main()
    except UserError as error:
        sys.exit(_report(str(error)))
    except BrokenPipeError:  # whoever read the output has gone, as in `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        sys.exit(_report(f"the disk is full{where}: free some space and run the command again"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _report(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
