"""What the kernel's record of written pages does not see, noticed by other means.

    inotify   the file was written by a descriptor (write, io_uring, splice)
    perf      a process somewhere has mapped the file to write it, or a process that maps it has
              forked: its child has the mapping, without the record

Neither says what was written. They say that something may have been, so that the guest is compared
as a whole. Descriptors are watched for all of the file's names; perf events come from all processes
of the machine, so that a process that maps, writes and unmaps between two looks is noticed too.

Any user can cause perf events, half a million a second on each processor. So a thread takes them
out of the rings, which would else be full within 20 ms, and keeps those that may matter.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
import threading
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from migrate.runtime.proc_lines import proc_lines
from migrate.tracking._kernel import drain
from migrate.tracking.record import Refused

_IN_MODIFY = 0x2
_PERF_NUMBERS = {"x86_64": 298, "aarch64": 241}
_RING_PAGES = 512  # of data, for each processor: 30000 events of the usual size
# Mappings of the guest and forks of all processes that are kept from one look to the next.
_PAIRS = 1 << 16
# The time between two looks of the thread.
_DRAIN_SECONDS = 0.005
_SOFTWARE, _DUMMY = 1, 9
_SAMPLE_TID = 1 << 1
# Bits of perf_event_attr's flags: see linux/perf_event.h.
_MMAP, _TASK, _MMAP_DATA, _SAMPLE_ID_ALL, _MMAP2 = 1 << 8, 1 << 13, 1 << 17, 1 << 18, 1 << 23


class Seen(NamedTuple):
    """What has happened on the whole machine since the last look.

    mappers -- processes that have mapped the file to write it
    forks   -- (parent, child), of all processes
    lost    -- there was no room to note all of it
    """

    mappers: set[int]
    forks: list[tuple[int, int]]
    lost: bool

    def descendants(self, pids: set[int]) -> set[int]:
        """Return the processes that those in `pids` have forked, and these, and so on."""
        found: set[int] = set()
        while more := {
            child for parent, child in self.forks
            if (parent in pids or parent in found) and child not in found
        }:  # fmt: skip
            found |= more
        return found


class FileWatch:
    """Notices that the file is written by a descriptor. Raises Refused."""

    def __init__(self, fd: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        path = f"/proc/self/fd/{fd}".encode()
        if self._fd < 0 or libc.inotify_add_watch(self._fd, path, _IN_MODIFY) < 0:
            error = os.strerror(ctypes.get_errno())
            self.close()
            raise Refused(f"writes by a descriptor cannot be noticed: inotify: {error}")

    def look(self) -> bool:
        """Return whether it was written since the last look."""
        found = False
        while True:
            try:
                data = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return found
            found |= bool(data)  # also if there was no room to note all of them

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Ring:
    """The events of one processor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, (_RING_PAGES + 1) * mmap.PAGESIZE, mmap.MAP_SHARED)
        self._view = memoryview(self._map)

    def drain(self, file: bytes, seen: array[int], count: int) -> tuple[int, bool]:
        return drain(self._view, mmap.PAGESIZE, file, seen, count)

    def close(self) -> None:
        self._view.release()
        self._map.close()
        os.close(self.fd)


class MappingWatch:
    """Notices mappings of a file, and forks, on all processors.

    name -- how /proc/PID/maps names the file: device and inode

    Raises Refused: it takes root, CAP_PERFMON, or kernel.perf_event_paranoid at 0 or less.
    """

    def __init__(self, name: list[bytes]) -> None:
        device, inode = name
        major, minor = (int(number, 16) for number in device.split(b":"))
        self._file = struct.pack("=IIQ", major, minor, int(inode))
        self._rings: list[_Ring] = []
        self._seen = array("I", bytes(_PAIRS * 8))
        self._count, self._lost = 0, False
        self._turn = threading.Lock()
        self._closed = threading.Event()
        try:
            for cpu in _processors():
                self._rings.append(_Ring(_open_events(cpu)))
        except OSError as error:
            self.close()
            raise Refused(
                "new mappings of the guest cannot be noticed: perf_event_open: "
                f"{error.strerror}: run as root, or with CAP_PERFMON"
            ) from None
        thread = threading.Thread(target=self._keep_draining, name="mappings", daemon=True)
        with contextlib.suppress(RuntimeError):  # this user may have no more threads: `look` drains
            thread.start()

    def look(self) -> Seen:
        """Return what has happened since the last look."""
        with self._turn:
            self._drain()
            numbers, lost = self._seen[: 2 * self._count].tolist(), self._lost
            self._count, self._lost = 0, False
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        return Seen(
            {pid for parent, pid in pairs if not parent},
            [pair for pair in pairs if pair[0]], lost,
        )  # fmt: skip

    def _keep_draining(self) -> None:
        while not self._closed.wait(_DRAIN_SECONDS):
            with self._turn:
                self._drain()

    def _drain(self) -> None:
        for ring in self._rings:
            self._count, lost = ring.drain(self._file, self._seen, self._count)
            self._lost |= lost

    def close(self) -> None:
        self._closed.set()
        with self._turn:
            for ring in self._rings:
                ring.close()
            self._rings.clear()


def _processors() -> Iterator[int]:
    for part in proc_lines("/sys/devices/system/cpu/online")[0].split(b","):
        first, _, last = part.partition(b"-")
        yield from range(int(first), int(last or first) + 1)


def _open_events(cpu: int) -> int:
    number = _PERF_NUMBERS.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _MMAP | _TASK | _MMAP_DATA | _MMAP2 | _SAMPLE_ID_ALL
    # type, size, config, period, sample_type, read_format, flags
    attributes = struct.pack("=IIQQQQQ", _SOFTWARE, 128, _DUMMY, 0, _SAMPLE_TID, 0, flags)
    # pid -1: all processes; PERF_FLAG_FD_CLOEXEC
    fd = libc.syscall(number, attributes.ljust(128, b"\0"), -1, cpu, -1, 8)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(fd)
