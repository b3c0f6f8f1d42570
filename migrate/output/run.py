"""Start a program with streams that do not fail, and end it with its exit code.

At the end, the readers of its output have some seconds for what they have not read yet. A signal
ends that wait, and does not change the exit code.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from migrate.output.streams import STANDARD_OUTPUT, Output, install
from migrate.output.text import say

# Seconds that the end of a program waits for a reader that reads nothing.
EXIT_SECONDS = 3.0
CANCELLED = 128 + signal.SIGINT
ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class _StopWaiting(BaseException):
    """A signal came while the end of the program waited for a reader."""


def run_program(name: str, run: Callable[[], int | None], *, waits: bool = False) -> NoReturn:
    """Run a program with streams that do not fail, and exit with the code that `run` returns."""
    install(waits=waits)
    try:
        code = run() or 0
    except OSError as error:
        if error.filename != STANDARD_OUTPUT:
            raise
        if not isinstance(error, BrokenPipeError):
            say(f"{name}: {error.filename}: {error.strerror}")
        code = 1
    except SystemExit as ended:  # --help
        if isinstance(ended.code, str):
            say(ended.code)
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    with contextlib.suppress(_StopWaiting), _signals_end_the_wait():
        code = _finish(name, code)
    _on_signals(signal.SIG_IGN)  # the interpreter removes other handlers before it has ended
    sys.exit(code)


@contextlib.contextmanager
def _signals_end_the_wait() -> Iterator[None]:
    """Let a signal end the wait in this context, and ignore those after it.

    The exit code stays as it is.
    """
    waits = True

    def stop(_number: int, _frame: object) -> None:
        nonlocal waits
        if waits:
            waits = False
            raise _StopWaiting

    try:
        _on_signals(stop)
        yield
    finally:
        waits = False


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Have signals do nothing in this context and after it, whatever becomes of their handlers."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        _on_signals(lambda _number, _frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup(1) sets it
                signal.signal(number, handler)


def _finish(name: str, code: int) -> int:
    """Give the readers time for the rest, and report an error. Return the exit code."""
    out, err = sys.stdout, sys.stderr
    if isinstance(out, Output):
        patience = None if out.waits and code != CANCELLED else EXIT_SECONDS
        has_raised = out.has_raised
        try:
            out.flush_for(patience)
        except OSError:
            code = code or 1
        fault = out.outlet.fault
        if fault is not None and fault.errno != errno.EPIPE and not has_raised:
            say(f"{name}: {STANDARD_OUTPUT}: {fault.strerror}")
    if isinstance(err, Output):
        err.flush_for(EXIT_SECONDS)
    return code
