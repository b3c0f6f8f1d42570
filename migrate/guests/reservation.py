"""Reserves a name in a directory: of all programs that receive a guest for it, one may.

No file marks the reservation, so nothing is left of it however a program ends. It is an open file
description lock on the directory itself; a hash of the name decides which byte is locked. A
directory can be opened for reading only, so these are read locks, which do not exclude each other,
but the kernel tells of them (F_OFD_GETLK). A program takes its own lock, then looks for others. A
brief flock of the directory lets one of two programs be first; without that both would be refused.

The directory counts by device and inode, whatever path leads to it, and whoever the user is. A
file system that has no locks on directories (NFS) has no reservations: there the one that is
second finds out when its guest is complete, since the name exists by then.
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
from migrate.guests.hold import FAR, try_flock
from proto import ErrorCode

# Another program has the turn for microseconds.
TURN_SECONDS = 1.0
POLL_SECONDS = 0.005

_FLOCK = struct.Struct("hhqqi")


class NameTaken(UsageError):  # noqa: N818 - news of another program, not a fault
    """Another program receives a guest for this name."""

    code = ErrorCode.NO_PLACE


@contextlib.contextmanager
def turn(directory: str) -> Iterator[None]:
    """Be the only one of our programs that changes something in a directory, for a moment.

    It is done without the turn where that cannot be had.
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
    """`path`, until `close`. Raises NameTaken where another program has it."""

    def __init__(self, path: str) -> None:
        path = os.path.abspath(path)
        directory, name = os.path.split(path)
        hashed = xxhash.xxh3_64_intdigest(os.fsencode(name))
        self._at = FAR + (hashed & (FAR - 1))
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if self._fd < 0:
            return  # it can be written, but not be read
        with turn(directory):
            taken = False
            with contextlib.suppress(OSError):  # this file system has no such locks
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
        """Let another program have it. May be called again."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self._lock(fcntl.F_OFD_SETLK, fcntl.F_UNLCK)
            os.close(self._fd)
            self._fd = -1
