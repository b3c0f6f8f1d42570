"""The locks on files that the kernel shows, in /proc/PID/fdinfo and in /proc/locks.

/proc/PID/fdinfo/FD lists the locks that were set through one descriptor. Reading it costs as much
as there are locks on that one file.

/proc/locks lists the locks of the whole machine and the requests that wait for each. A read returns
at most 4 KiB, and for each read the kernel walks the list from its beginning, so reading the whole
list costs the square of its length: 26 s of processor time for 200000 locks, which one process of
any user can make in a second (AMD EPYC, Linux 6.18). It is therefore read up to MAX_TABLE_BYTES,
which costs 7 ms at most.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterable
from typing import NamedTuple

from migrate.runtime._proc import find_descriptors, leads_to

# The locks of a migration begin here or behind it: no file has data that far.
FAR = 1 << 62
# The file position of a descriptor that has a lock of a migration.
MARK = 0x58424D48
# About 4700 locks. A busy host has tens to hundreds.
MAX_TABLE_BYTES = 256 << 10
# About 300 locks.
FDINFO_BYTES = 16 << 10
TABLE = "/proc/locks"
# Of the processor, to find who has a lock: some 500000 open files.
SEARCH_SECONDS = 1.0


class KernelLock(NamedTuple):
    """A line of /proc/locks or /proc/PID/fdinfo/FD.

    waits -- a request that waits for the last lock before it that does not wait
    kind  -- FLOCK, POSIX or OFDLCK (F_OFD_SETLK)
    pid   -- the process; -1 for OFDLCK, 0 if it is in another PID namespace
    file  -- "major:minor:inode": see `file_key`
    start -- the first byte
    """

    waits: bool
    kind: str
    pid: int
    file: str
    start: int

    @property
    def migrates(self) -> bool:
        """Whether a program that moves a guest may have set it."""
        return self.kind == "FLOCK" or (self.kind == "OFDLCK" and self.start >= FAR)


class LockTable(NamedTuple):
    """What /proc/locks shows, as far as it was read; empty if the kernel does not show it."""

    locks: list[KernelLock]
    complete: bool


def read_lock_table() -> LockTable:
    """Read /proc/locks up to MAX_TABLE_BYTES."""
    text = bytearray()
    with contextlib.suppress(OSError):
        table = os.open(TABLE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while len(text) < MAX_TABLE_BYTES:
                data = os.read(table, MAX_TABLE_BYTES)
                if not data:
                    return LockTable(_parsed_lines(text), complete=True)
                text += data
        finally:
            os.close(table)
    return LockTable(_parsed_lines(text), complete=not text)


def _parsed_lines(text: bytearray) -> list[KernelLock]:
    lines = text.decode("ascii", "replace").split("\n")
    return [lock for line in lines if (lock := _parsed(line.split())) is not None]


def _parsed(words: list[str]) -> KernelLock | None:
    """Parse the words of `1: [->] FLOCK ADVISORY WRITE 1425 fe:00:753923 0 EOF`."""
    waits = words[1:2] == ["->"]
    if waits:
        del words[1]
    try:
        _, kind, _, _, pid, file, start = words[:7]
        return KernelLock(waits, kind, int(pid), file, int(start))
    except ValueError:
        return None  # a lease, or a line of a later kernel


def file_key(fd: int) -> str:
    """Return how the kernel names the file of `fd` in lists of locks, `major:minor:inode`.

    A lock that was set through `fd` shows it. Without one, the numbers are those of stat(2), which
    differ on btrfs and on overlays.
    """
    locks, _ = descriptor_locks("self", fd)
    if locks:
        return locks[0].file
    named = os.fstat(fd)
    return f"{os.major(named.st_dev):02x}:{os.minor(named.st_dev):02x}:{named.st_ino}"


def descriptor_locks(pid: int | str, fd: int | str) -> tuple[list[KernelLock], int]:
    """Return the locks that were set through a descriptor, and its file position.

    None if we may not see them, or if the descriptor is closed. Of another process, those that fit
    into FDINFO_BYTES: a migration sets one or two through a descriptor, and a stranger any number.
    """
    found, position = [], 0
    most = -1 if pid == "self" else FDINFO_BYTES
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/fdinfo/{fd}", "rb", buffering=0) as file:
            text = (file.read(most) or b"").decode("ascii", "replace")
        for line in text.split("\n")[:-1]:  # the last one may have been cut
            words = line.split()
            if words[:1] == ["pos:"]:
                position = int(words[1])
            elif words[:1] == ["lock:"] and (lock := _parsed(words[1:])) is not None:
                found.append(lock)
    return found, position


def lock_owners(
    fd: int, kind: str, processes: Iterable[int | str] | None = None
) -> list[tuple[int, int]]:
    """Return (PID, file position) of each descriptor with a lock of that kind on the file of `fd`.

    Finds only descriptors that we may see, in SEARCH_SECONDS. Those of other files are skipped: any
    user can have hundreds of thousands of locks on a file of his own.

    processes -- those to look at; None: all, which takes a while
    """
    found, status, deadline = [], os.fstat(fd), time.thread_time() + SEARCH_SECONDS
    for pid in numbers_in("/proc") if processes is None else processes:
        for number in descriptors_of(pid, status, deadline=deadline):
            locks, position = descriptor_locks(pid, number)
            found += [(int(pid), position) for lock in locks if lock.kind == kind]
    return found


def descriptors_of(
    pid: int | str, file: os.stat_result, *, writable: bool = False, deadline: float = math.inf
) -> list[int]:
    """Return the descriptors of a process that lead to a file, as far as they are shown.

    writable -- only those that were opened for writing
    deadline -- processor time of this thread at which to end
    """
    with contextlib.suppress(OSError):
        table = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return find_descriptors(
                table, file.st_dev, file.st_ino, writable=writable, deadline=deadline
            )[0]
        finally:
            os.close(table)
    return []


def is_descriptor_of(pid: int | str, fd: int, file: os.stat_result) -> bool:
    """Return whether a descriptor of a process leads to a file, as far as that is shown."""
    with contextlib.suppress(OSError):
        table = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return leads_to(table, fd, file.st_dev, file.st_ino)
        finally:
            os.close(table)
    return False


def numbers_in(folder: str) -> list[str]:
    """Return the names in a folder of /proc that are numbers; none if we may not read it."""
    with contextlib.suppress(OSError):
        return [name for name in os.listdir(folder) if name.isdecimal()]
    return []
