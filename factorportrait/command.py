"""What every command line does around its work: one line per error, an exit code, no traceback."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from factorportrait.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
EXIT_BROKEN_PIPE = 141


def run_command(name: str, function: Callable[[], int | None]) -> int:
    """Run a command and return its exit code.

    An error of the user, or of a file or disk, becomes one line on stderr and code 2. Ctrl-C gives 130, a termination signal 143, a
    reader that went away (`| head`) 141; all of them unwind, so that nothing half-written is left. Mistakes in the program
    keep their traceback.

    Args:
        name: the command, as the user typed it.
        function: the work; returns an exit code, or None for 0.
    """
    previous = None
    try:
        # Only the main thread may set handlers.
        previous = signal.signal(signal.SIGTERM, _terminated)
    except ValueError:
        pass
    try:
        code = function() or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        return _say(name, f"error: {error}", EXIT_USER_ERROR)
    except KeyboardInterrupt:
        return _say(name, "interrupted", EXIT_INTERRUPTED)
    except _Terminated:
        return _say(name, "terminated", EXIT_TERMINATED)
    except BrokenPipeError:
        # Python would complain at exit when it flushes what nobody reads.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _say(name, f"error: {place}{error.strerror or error}", EXIT_USER_ERROR)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


class _Terminated(BaseException):
    """A termination signal, raised so that temporary files are removed."""


def _terminated(_signal, _frame) -> None:
    raise _Terminated


def _say(name: str, message: str, code: int) -> int:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return code
