"""A guest's file, found among the open files and mappings of processes: by inode, never by name.

Other names of the file, bind mounts and mount namespaces make no difference. /proc/PID/fd leads to
the inode itself, and /proc/PID/maps names it by device and inode. A mapping counts if it is shared
and its file was open for writing, although the mapping may be read-only: mprotect(2) makes it
writable without asking.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import math
import mmap
import os
import re
import signal
import stat
import time

from migrate.files.identity import Identity, identity_of
from migrate.files.kernel_locks import MARK, descriptor_locks
from migrate.runtime import processes
from migrate.runtime._proc import find_descriptors
from migrate.runtime.proc_lines import proc_lines

WRITABLE = 0o200  # of the links in /proc/PID/fd and map_files: how the file was opened
MAPS_BYTES = 1 << 16
F_SETSIG = getattr(fcntl, "F_SETSIG", 10)
SHARED = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) .(.).s ")


class OutOfTime(Exception):  # noqa: N818 - the end of a budget, not a fault
    """The processor time for a process of another user is spent."""


class GuestFile:
    """The file or block device behind `fd`, as other processes have it open or mapped.

    migrates -- whether a descriptor was found that has the lock of a migration on it
    """

    def __init__(self, fd: int) -> None:
        here = os.fstat(fd)
        self.fd = fd
        self.block = stat.S_ISBLK(here.st_mode)
        self.identity = identity_of(here)
        self.device = here.st_rdev
        self.migrates = False
        # A block device has many nodes, so no one name in /proc/PID/maps.
        self.name_in_maps = [] if self.block else _name_in_maps(fd, self.identity)

    def is_at(self, link: str) -> bool:
        """Return whether a link in /proc leads here. Raises OSError."""
        return self.matches(os.stat(link))

    def matches(self, status: os.stat_result) -> bool:
        """Return whether a status is that of this file or device."""
        if self.block:
            return stat.S_ISBLK(status.st_mode) and status.st_rdev == self.device
        return identity_of(status) == self.identity

    def open_in(self, folder: str, deadline: float = math.inf) -> bool:
        """Return whether it is open for writing by a table of open files.

        folder   -- in /proc, like /proc/PID/fd
        deadline -- processor time of this thread (time.thread_time) at which to end

        Raises OSError, and OutOfTime if it was not found until then.
        """
        device, inode = (self.device, 0) if self.block else self.identity
        table = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found, complete = find_descriptors(
                table, device, inode, block=self.block, writable=True, deadline=deadline
            )
        finally:
            os.close(table)
        if any(not self._is_lock(folder, descriptor) for descriptor in found):
            return True
        if not complete:
            raise OutOfTime
        return False

    def _is_lock(self, folder: str, descriptor: int) -> bool:
        """Return whether a descriptor is the lock of a program that moves the guest.

        Such a descriptor is open for writing, but nothing writes by it. It is known by its file
        position. Any user can set the position of a descriptor of his own, so it must have the lock
        as well, in a process of root's or ours.
        """
        task = folder.removeprefix("/proc/").removesuffix("/fd")
        locks, position = descriptor_locks(task, descriptor)
        if position != MARK or not any(lock.migrates for lock in locks):
            return False
        acting = processes.user_ids(int(task.partition("/")[0]))
        if not acting or not acting <= {0, os.geteuid()}:
            return False
        self.migrates = True
        return True

    def mapped_in(self, base: str, deadline: float = math.inf) -> bool:
        """Return whether a process can write here through a mapping.

        base     -- its folder in /proc
        deadline -- see `open_in`
        """
        try:
            return self._mapped_in(base, deadline)
        except FileNotFoundError:
            # Of a mapping in the maps there is no link: it has been changed in between. Of one that
            # is changed all the time, and where /proc has no such links, the maps must do.
            return self._mapped_in(base, deadline, believe=True)

    def _mapped_in(self, base: str, deadline: float, *, believe: bool = False) -> bool:
        with open(f"{base}/maps", "rb", buffering=0) as maps:
            rest = b""
            while data := maps.read(MAPS_BYTES):  # at most a page, in whole lines
                lines, _, rest = (rest + data).rpartition(b"\n")
                if self._maps_to_write(base, lines, believe):
                    return True
                if time.thread_time() >= deadline:
                    raise OutOfTime
        return False

    def _maps_to_write(self, base: str, lines: bytes, believe: bool) -> bool:
        """Return whether one of these lines of the maps is a mapping that can write the file."""
        if b" ".join(self.name_in_maps) not in lines:
            return False  # nearly always, and much faster than a look at each line
        # A line ends with the name of the file, which any user can choose: it has no newline, but
        # may have any other character.
        return any(
            self._writes(base, *found.groups(), believe=believe)
            for line in lines.split(b"\n")
            if (found := SHARED.match(line))
            and (self.block or line.split(b" ", 5)[3:5] == self.name_in_maps)
        )

    def _writes(self, base: str, first: bytes, end: bytes, write: bytes, *, believe: bool) -> bool:
        """Return whether the file can be written through the mapping from `first` to `end`.

        Raises FileNotFoundError if there is no such mapping now, unless we are to believe in it.
        """
        process, _, task = base.partition("/task/")
        link = f"{process}/map_files/{int(first, 16):x}-{int(end, 16):x}"
        here = not self.block
        try:
            here = self.is_at(link)
        except FileNotFoundError:
            # Links exist for the main thread alone, so there are none if it has ended.
            if here and not task and not believe:
                raise
        except OSError:
            pass  # we may not follow it: the device and the inode in the maps must do
        if not here:
            return False
        if write == b"w":
            return True
        with contextlib.suppress(OSError):
            return bool(os.lstat(link).st_mode & WRITABLE)
        return False


@functools.cache
def libc() -> ctypes.CDLL:
    """Return the C library, with mmap and munmap declared."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


def _name_in_maps(fd: int, identity: Identity) -> list[bytes]:
    """Return how /proc/PID/maps names the file behind `fd`: the words for device and inode.

    We map the file ourselves and read its name there, since the numbers are not always those of
    stat(2) (btrfs, overlayfs).
    """
    library = libc()
    address = library.mmap(None, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    try:
        if address is not None and address != ctypes.c_void_p(-1).value:
            with contextlib.suppress(OSError):
                for line in proc_lines("/proc/self/maps"):
                    span, _, _, device, inode = line.split(b" ", 5)[:5]
                    first, _, end = span.partition(b"-")
                    if int(first, 16) <= address < int(end, 16):
                        return [device, inode]
    finally:
        if address is not None and address != ctypes.c_void_p(-1).value:
            library.munmap(address, mmap.PAGESIZE)
    return f"{os.major(identity[0]):02x}:{os.minor(identity[0]):02x} {identity[1]}".encode().split()


def open_for_writing(fd: int) -> bool | None:
    """Return whether anything has the file open for writing, this program and the kernel included.

    The kernel refuses a read lease then. Returns None if that cannot be known: for a block
    device, another user's file, and a file system without leases.
    """
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # If another program opens the file in this instant, the kernel tells us by a signal: by one
        # that is ignored, where SIGIO would end us.
        fcntl.fcntl(own, F_SETSIG, signal.SIGURG)
        fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(own)
    return False


def opened_here(guest: GuestFile) -> bool:
    """Return whether this program has the guest open for writing itself."""
    with contextlib.suppress(OSError):
        return guest.open_in("/proc/self/fd") or guest.mapped_in("/proc/self")
    return False
