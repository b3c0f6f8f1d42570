"""What the programs print, which changes neither what they do nor their exit codes.

    print, say, tracebacks --text--> Output --bytes--> Outlet --> descriptor

`program` starts a program. It first opens descriptors 0, 1 and 2 where they are closed, and puts
an Output in the place of standard output and standard error:

    migrate-src, migrate-dst    Nothing raises or blocks. What a full pipe or a stopped terminal
                                does not take is kept, within a bound, and tried again with the
                                next line; the end of the program waits some seconds for it.
    migrate-stream, migrate-ctl Printing is their work (`waits`): standard output waits for its
                                reader, and raises OSError once where it cannot be written.

`printable` is what makes text of others (names of files, a peer's words) safe to print.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import io
import os
import select
import signal
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, TextIO

# What may wait for a reader that does not read; beyond it the oldest lines are left out.
MAX_WAITING_BYTES = 1 << 20
# A pipe with room takes this much without blocking, whatever its mode.
PIECE = select.PIPE_BUF
LARGE_PIECE = 1 << 16
# How long the end of a program waits for a reader that takes nothing, and for a slow one.
EXIT_SECONDS = 3.0
MAX_EXIT_SECONDS = 30.0
AGAIN_SECONDS = 0.01
CANCELLED = 128 + signal.SIGINT
OUT, ERR = 1, 2
_given: set[int] = set()
"""The descriptors that the program was started with, once `install` has looked."""
STANDARD_OUTPUT = "standard output"


# ---------------------------------------------------------------- text


def printable(text: str, limit: int = 0) -> str:
    r"""Return `text` as one line that a terminal shows and does not obey.

    Control characters, line ends, marks of text direction and what else is not printable are
    escaped as in Python: \x1b, \n, \u202e. So are bytes of a file name that are no text: \xff.

    limit -- the most characters to return, escapes counted; what is cut ends in "..."
    """
    shown = text if text.isprintable() else "".join(map(_escaped, text))
    if limit and len(shown) > limit:
        shown = shown[: limit - 3] + "..."
    return shown


def _escaped(char: str) -> str:
    if char.isprintable():
        return char
    if "\udc80" <= char <= "\udcff":  # how Python keeps a byte that is no text (PEP 383)
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def say(text: str) -> None:
    """Print a sentence to standard error, on a line of its own."""
    print(printable(text), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a result to standard output, on a line of its own."""
    print(printable(text), flush=True)


# ---------------------------------------------------------------- descriptors


class Outlet:
    """Bytes for a descriptor that may not take them. Nothing here raises.

    O_NONBLOCK belongs to what is open, which other programs share, so it is not ours to set. A
    pipe or a terminal is opened once more, without blocking; of anything else `poll` tells whether
    there is room.
    """

    def __init__(self, fd: int) -> None:
        self._own = _opened_again(fd)
        self._fd = fd if self._own < 0 else self._own
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._taken = 0
        """Bytes of the first piece that are written."""
        self._left_out = 0
        self.lost = 0
        """Lines that were never written, all in all."""
        self.fault: OSError | None = None
        """Why the descriptor did not take something, the last time that happened."""
        self.lock = threading.RLock()
        self._piece = LARGE_PIECE if self._own >= 0 or _is_file(fd) else PIECE
        if self._own < 0 and os.isatty(fd):
            self._piece = 1  # another user's: `poll` promises no more room than that
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)

    @property
    def waiting_bytes(self) -> int:
        return self._bytes

    @property
    def behind(self) -> bool:
        """Whether something is left that the descriptor did not take by now."""
        self.flush()
        return bool(self._waiting)

    def put(self, data: bytes) -> None:
        """Queue whole lines; the oldest ones that wait are left out where they are too many."""
        with self.lock:
            self._waiting.append(data)
            self._bytes += len(data)
            while self._bytes > MAX_WAITING_BYTES and len(self._waiting) > 2:
                oldest = 1 if self._taken else 0
                self._bytes -= len(self._waiting[oldest])
                lines = max(self._waiting[oldest].count(b"\n"), 1)
                self._left_out += lines
                self.lost += lines
                del self._waiting[oldest]

    def flush(self, patience: float | None = 0.0) -> None:
        """Write what there is room for.

        patience -- seconds to wait for a reader that takes nothing; None: as long as it takes
        """
        began = progress = time.monotonic()
        with self.lock:
            while self._waiting:
                left = patience
                if patience:
                    now = time.monotonic()
                    left = min(progress + patience, began + MAX_EXIT_SECONDS) - now
                    if left <= 0:
                        return
                if not self._poll.poll(None if left is None else left * 1e3):
                    return
                if self._write_some():
                    progress = time.monotonic()
                elif patience == 0:
                    return
                else:
                    time.sleep(AGAIN_SECONDS)

    def _write_some(self) -> bool:
        """Write a piece of what waits; False where there is no room after all."""
        if self._left_out and not self._taken:
            note = b"... %d lines were left out: nobody read them in time\n" % self._left_out
            self._waiting.appendleft(note)
            self._bytes += len(note)
            self._left_out = 0
        first = self._waiting[0]
        try:
            taken = os.write(self._fd, first[self._taken : self._taken + self._piece])
        except BlockingIOError:
            return False
        except OSError as error:
            self.fault = error
            self.drop()
            return True
        self._taken += taken
        if self._taken == len(first):
            self._waiting.popleft()
            self._bytes -= len(first)
            self._taken = 0
        return True

    def drop(self) -> None:
        """Forget what waits."""
        self.lost += sum(max(piece.count(b"\n"), 1) for piece in self._waiting)
        self._waiting.clear()
        self._bytes = self._taken = self._left_out = 0

    def close(self) -> None:
        """Close what was opened here; the descriptor itself stays open."""
        if self._own >= 0:
            os.close(self._own)
            self._own = self._fd = -1
            self.drop()


def _opened_again(fd: int) -> int:
    """Return a descriptor that does not block, on the pipe or terminal of `fd`; -1 for others."""
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    with contextlib.suppress(OSError):  # another user's, or no /proc
        if writable(fd) and (stat.S_ISFIFO(os.fstat(fd).st_mode) or os.isatty(fd)):
            return os.open(f"/proc/self/fd/{fd}", flags)
    return -1


def writable(fd: int) -> bool:
    """Whether a descriptor is open, for writing."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    except OSError:
        return False


def _is_file(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False


def given(fd: int) -> bool:
    """Whether a user may name a descriptor to write to: not one that was opened here."""
    return writable(fd) and (not _given or fd in _given)


def open_descriptors() -> None:
    """Open those of 0, 1 and 2 that are closed on /dev/null, for our children too.

    Else the next file that is opened gets the number, and is printed to; and libuv aborts.
    """
    for number in (0, OUT, ERR):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free


# ---------------------------------------------------------------- streams


class Output(io.TextIOBase):
    """A text stream on an outlet. What its encoding lacks is escaped.

    waits -- `flush` waits for the reader, and raises the first OSError; after that nothing more is
             written. Else nothing raises or waits.
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
        self.told = False
        """Whether a fault was raised."""
        self._terminal = os.isatty(fd)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        return self._escapes

    @property
    def behind(self) -> bool:
        """Whether the reader has not taken all of it yet."""
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
            self.give(None if self.waits else 0.0)

    def give(self, patience: float | None) -> None:
        """Flush, with this patience (see Outlet.flush)."""
        outlet = self.outlet
        with outlet.lock:
            line, self._line = bytes(self._line), bytearray()
            if self.told:
                return
            if line:
                outlet.put(line)
            outlet.flush(patience)
            if self.waits and outlet.fault is not None:
                self.told = True
                raise OSError(outlet.fault.errno, outlet.fault.strerror, STANDARD_OUTPUT)


def behind(stream: TextIO) -> bool:
    """Whether a stream's reader has not taken all of it yet; False where that is not known."""
    return bool(getattr(stream, "behind", False))


def install(*, waits: bool = False) -> None:
    """Make the standard streams unfailing. The first thing in a program.

    A stream that is not the interpreter's own, as in a test, is left as it is.
    """
    open_descriptors()
    if not waits:
        # Where `stty tostop` is on, a program in the background that prints to its terminal would
        # be stopped, its guest perhaps in the pause.
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the program runs
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    outlet: Outlet | None = None
    if sys.stdout is sys.__stdout__:
        with contextlib.suppress(OSError):
            _given.update(fd for fd in map(int, os.listdir("/proc/self/fd")) if writable(fd))
        outlet = Outlet(OUT)
        sys.stdout = Output(OUT, outlet, _encoding(sys.stdout), waits=waits)
    if sys.stderr is sys.__stderr__:
        # What goes to one place goes there in order.
        one = not waits and writable(OUT) and os.path.sameopenfile(OUT, ERR)
        sys.stderr = Output(ERR, outlet if one else None, _encoding(sys.stderr))


def _encoding(stream: TextIO | None) -> str:
    return getattr(stream, "encoding", None) or sys.getfilesystemencoding()


ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class _Enough(BaseException):
    """A signal came while the end of the program waited for a reader."""


def program(name: str, run: Callable[[], int | None], *, waits: bool = False) -> NoReturn:
    """Run a program with unfailing streams, and exit with the code that `run` returns."""
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
    with contextlib.suppress(_Enough), _signals_end_it():
        code = _finish(name, code)
    _on_signals(signal.SIG_IGN)  # the interpreter takes other handlers away before it has ended
    sys.exit(code)


@contextlib.contextmanager
def _signals_end_it() -> Iterator[None]:
    """Have signals end what is waited for in here, and change nothing from then on: the exit code
    stays what it is."""
    waits = True

    def enough(_number: int, _frame: object) -> None:
        nonlocal waits
        if waits:
            waits = False
            raise _Enough

    try:
        _on_signals(enough)
        yield
    finally:
        waits = False


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Have signals do nothing in here, whatever becomes of their handlers, nor behind it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        _on_signals(lambda _number, _frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup(1) has it
                signal.signal(number, handler)


def _finish(name: str, code: int) -> int:
    """Give the readers a moment for what is left, and say what was lost; the exit code."""
    out, err = sys.stdout, sys.stderr
    if isinstance(out, Output):
        patience = None if out.waits and code != CANCELLED else EXIT_SECONDS
        told = out.told
        try:
            out.give(patience)
        except OSError:
            code = code or 1
        fault = out.outlet.fault
        if fault is not None and fault.errno != errno.EPIPE and not told:
            say(f"{name}: {STANDARD_OUTPUT}: {fault.strerror}")
    if isinstance(err, Output):
        err.give(EXIT_SECONDS)
    return code
