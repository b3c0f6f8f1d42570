"""Reserve a name in a directory: of all programs that receive a guest for it, only one may.

A reservation leaves no file behind, however the program ends. It is an open file description lock
on the directory itself, on one byte that a hash of the name chooses. A directory can be opened for
reading only, so these are read locks, which do not exclude each other; but the kernel tells of them
(F_OFD_GETLK). A program takes its own lock first and then looks for others. It does so in its turn,
with a brief flock of the directory: of two programs without a turn, each could see the other one's
lock, and both would be refused.

The directory counts by device and inode, whatever path leads to it and whatever the user is. A file
system without locks on directories (NFS) has no reservations: there the second program finds out
when its guest is complete, since the name exists by then.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Iterator

import xxhash

from migrate.errors import UsageError
from migrate.files.kernel_locks import FAR
from migrate.files.lock import try_flock
from proto import ErrorCode

# Another program keeps its turn for microseconds. After this time we go on without one.
TURN_SECONDS = 1.0
POLL_SECONDS = 0.005

_FLOCK = struct.Struct("hhqqi")


class NameTaken(UsageError):  # noqa: N818 - news of another program, not a fault
    """Another program receives a guest for this name."""

    code = ErrorCode.NO_PLACE


@contextlib.contextmanager
def turn(directory: str) -> Iterator[None]:
    """Exclude our other programs from changing something in a directory, for a moment.

    Goes on without the turn if it cannot be had in TURN_SECONDS.
    """
    fd = -1
    try:
        with contextlib.suppress(OSError):
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            end = time.monotonic() + TURN_SECONDS
            while not try_flock(fd) and time.monotonic() < end:
                time.sleep(POLL_SECONDS)
        yield
    finally:
        if fd >= 0:
            os.close(fd)


class Reservation:
    """A reservation of the name `path`, from its making to `close`.

    Raises NameTaken if another program has it.
    """

    def __init__(self, path: str) -> None:
        path = os.path.abspath(path)
        directory, name = os.path.split(path)
        hashed = xxhash.xxh3_64_intdigest(os.fsencode(name))
        self._at = FAR + (hashed & (FAR - 1))
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if self._fd < 0:
            return  # we may write in the directory, but not read it
        with turn(directory):
            taken = False
            with contextlib.suppress(OSError):  # the file system may have no such locks
                self._lock(fcntl.F_OFD_SETLK, fcntl.F_RDLCK)
                found = self._lock(fcntl.F_OFD_GETLK, fcntl.F_WRLCK)
                taken = found != fcntl.F_UNLCK
            if taken:
                self.close()
        if taken:
            raise NameTaken(
                f"--output {path}: another program receives a guest for it: wait until that has "
                "ended, or name another output"
            )

    def _lock(self, command: int, kind: int) -> int:
        wanted = _FLOCK.pack(kind, os.SEEK_SET, self._at, 1, 0)
        return int(_FLOCK.unpack(fcntl.fcntl(self._fd, command, wanted))[0])

    def close(self) -> None:
        """Give the name up. May be called again."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self._lock(fcntl.F_OFD_SETLK, fcntl.F_UNLCK)
            os.close(self._fd)
            self._fd = -1
