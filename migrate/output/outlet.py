"""Write to a descriptor that may be slow, stopped, full or closed, without blocking or failing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
import threading
import time
from collections import deque

# Bytes that may wait for a slow reader; beyond them the oldest lines are left out.
MAX_WAITING_BYTES = 1 << 20
# A pipe that `poll` calls writable accepts this much without blocking, whatever its mode.
PIECE = select.PIPE_BUF
# For descriptors that cannot block.
LARGE_PIECE = 1 << 16
# Seconds that `flush` waits at most for a slow reader, if it has a patience.
MAX_EXIT_SECONDS = 30.0
# Between two attempts, if `poll` was wrong.
AGAIN_SECONDS = 0.01
OUT, ERR = 1, 2


class Outlet:
    """Writes to a descriptor without blocking, and keeps what it does not accept. Never raises.

    O_NONBLOCK belongs to the open file description, which other programs share: it is not ours to
    set. So a pipe or a terminal is opened once more, with that flag. For anything else, `poll`
    tells whether it can be written.
    """

    def __init__(self, fd: int) -> None:
        self._own = _reopen_nonblocking(fd)
        self._fd = fd if self._own < 0 else self._own
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        # Bytes of the first piece that are written.
        self._written = 0
        # Lines left out since the last note about such lines.
        self._left_out = 0
        # Lines that were never written, in total.
        self.lost = 0
        # The last error of the descriptor.
        self.fault: OSError | None = None
        self.lock = threading.RLock()
        self._piece = LARGE_PIECE if self._own >= 0 or _is_file(fd) else PIECE
        if self._own < 0 and os.isatty(fd):
            self._piece = 1  # another user's terminal: `poll` promises room for one byte only
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)

    @property
    def waiting_bytes(self) -> int:
        return self._bytes

    @property
    def behind(self) -> bool:
        """Whether something waits, after another attempt to write it."""
        self.flush()
        return bool(self._waiting)

    def put(self, data: bytes) -> None:
        """Queue whole lines. Leave out the oldest lines if too many bytes wait."""
        with self.lock:
            self._waiting.append(data)
            self._bytes += len(data)
            while self._bytes > MAX_WAITING_BYTES and len(self._waiting) > 2:
                oldest = 1 if self._written else 0
                self._bytes -= len(self._waiting[oldest])
                lines = max(self._waiting[oldest].count(b"\n"), 1)
                self._left_out += lines
                self.lost += lines
                del self._waiting[oldest]

    def flush(self, patience: float | None = 0.0) -> None:
        """Write as much as the descriptor accepts.

        patience -- seconds to wait for a reader that reads nothing; None: without a limit
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
        """Write a piece of what waits. Return False if the descriptor does not accept it."""
        if self._left_out and not self._written:
            note = b"... %d lines were left out: they were not read in time\n" % self._left_out
            self._waiting.appendleft(note)
            self._bytes += len(note)
            self._left_out = 0
        first = self._waiting[0]
        try:
            written = os.write(self._fd, first[self._written : self._written + self._piece])
        except BlockingIOError:
            return False
        except OSError as error:
            self.fault = error
            self.drop()
            return True
        self._written += written
        if self._written == len(first):
            self._waiting.popleft()
            self._bytes -= len(first)
            self._written = 0
        return True

    def drop(self) -> None:
        """Discard what waits."""
        self.lost += sum(max(piece.count(b"\n"), 1) for piece in self._waiting)
        self._waiting.clear()
        self._bytes = self._written = self._left_out = 0

    def close(self) -> None:
        """Close the second descriptor, if there is one. The given one stays open."""
        if self._own >= 0:
            os.close(self._own)
            self._own = self._fd = -1
            self.drop()


def _reopen_nonblocking(fd: int) -> int:
    """Open the pipe or terminal of `fd` once more, without blocking. Return -1 for others."""
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    with contextlib.suppress(OSError):  # another user's, or there is no /proc
        if writable(fd) and (stat.S_ISFIFO(os.fstat(fd).st_mode) or os.isatty(fd)):
            return os.open(f"/proc/self/fd/{fd}", flags)
    return -1


def writable(fd: int) -> bool:
    """Return whether a descriptor is open for writing."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    except OSError:
        return False


def _is_file(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False


def open_descriptors() -> None:
    """Open /dev/null for those of 0, 1 and 2 that are closed, also for our children.

    Otherwise the next file that is opened would get the number, and be printed to; libuv aborts.
    """
    for number in (0, OUT, ERR):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(
                os.open(os.devnull, os.O_RDWR), True
            )  # open(2) returns the lowest free number
