"""Standard output and standard error that do not fail.

migrate-src, migrate-dst    Nothing raises or blocks. Text that a full pipe or a stopped
                            terminal does not accept is kept, within a bound, and tried again
                            with the next line; the end of the program waits some seconds.
migrate-stream, migrate-ctl Printing is their work (`waits`): standard output waits for its
                            reader, and raises OSError once if it cannot be written.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import signal
import sys
from typing import TextIO

from migrate.output.outlet import ERR, LARGE_PIECE, OUT, Outlet, open_descriptors, writable

STANDARD_OUTPUT = "standard output"
# The descriptors that the program was started with, once `install` has looked.
_inherited: set[int] = set()


class Output(io.TextIOBase):
    """A text stream on an outlet. Characters that its encoding lacks are escaped.

    waits -- whether `flush` waits for the reader, and raises the first OSError, after which nothing
             more is written. Otherwise nothing raises or waits
    """

    _escapes = "backslashreplace"

    def __init__(
        self, fd: int, outlet: Outlet | None = None, encoding: str = "utf-8", *, waits: bool = False
    ) -> None:
        self._number = fd
        self.outlet = outlet or Outlet(fd)
        self._encoding = encoding
        self._encoder = codecs.getincrementalencoder(encoding)(self._escapes)
        self._line = bytearray()
        self.waits = waits
        self.has_raised = False
        self._terminal = os.isatty(fd)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        return self._escapes

    @property
    def behind(self) -> bool:
        """Whether some text waits for the reader."""
        return self.outlet.behind

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return self._terminal

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self.outlet.lock:
            self._line += self._encoder.encode(text)
            by_lines = self._terminal or not self.waits
            if len(self._line) >= LARGE_PIECE or (by_lines and "\n" in text):
                self.flush()
        return len(text)

    def flush(self) -> None:
        if not sys.is_finalizing():  # a thread that has ended may hold the lock
            self.flush_for(None if self.waits else 0.0)

    def flush_for(self, patience: float | None) -> None:
        """Flush with a patience in seconds (see Outlet.flush)."""
        outlet = self.outlet
        with outlet.lock:
            line, self._line = bytes(self._line), bytearray()
            if self.has_raised:
                return
            if line:
                outlet.put(line)
            outlet.flush(patience)
            if self.waits and outlet.fault is not None:
                self.has_raised = True
                raise OSError(outlet.fault.errno, outlet.fault.strerror, STANDARD_OUTPUT)


def behind(stream: TextIO) -> bool:
    """Return whether text waits for the reader of a stream; False if that is not known."""
    return bool(getattr(stream, "behind", False))


def install(*, waits: bool = False) -> None:
    """Replace the standard streams by such that do not fail. Call it first in a program.

    A stream that is not the interpreter's own, as in a test, is left as it is.
    """
    open_descriptors()
    if not waits:
        # With `stty tostop`, a program in the background that prints to its terminal would be
        # stopped, perhaps with its guest paused.
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the program runs
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    outlet: Outlet | None = None
    if sys.stdout is sys.__stdout__:
        with contextlib.suppress(OSError):
            _inherited.update(fd for fd in map(int, os.listdir("/proc/self/fd")) if writable(fd))
        outlet = Outlet(OUT)
        sys.stdout = Output(OUT, outlet, _encoding(sys.stdout), waits=waits)
    if sys.stderr is sys.__stderr__:
        # Two streams to one file share an outlet, to keep their order.
        shared = not waits and writable(OUT) and os.path.sameopenfile(OUT, ERR)
        sys.stderr = Output(ERR, outlet if shared else None, _encoding(sys.stderr))


def _encoding(stream: TextIO | None) -> str:
    return getattr(stream, "encoding", None) or sys.getfilesystemencoding()


def is_inherited(fd: int) -> bool:
    """Return whether a descriptor is writable, and one that the program was started with.

    A user may name only such a descriptor to write to, not one that this program has opened.
    """
    return writable(fd) and (not _inherited or fd in _inherited)
