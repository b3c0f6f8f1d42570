"""The kernel's record of what this process writes to a buffer of its own.

It takes no privilege, and needs no other process: each write is a fault of ours. What is around the
buffer in its first and last page of the processor is recorded with it.

A shared mapping may be written by other processes too, which no record of ours sees. Only a fork
hands on one without a name, as mmap.mmap(-1, size) makes it. So such a buffer is recorded while no
other process has it. A mapping of a file is refused: any process may map it at any time.
"""

from __future__ import annotations

import os

from migrate.runtime.hang_guard import HangGuard
from migrate.runtime.proc_lines import proc_lines
from migrate.tracking._kernel import address_of, forks, open_own
from migrate.tracking.mappings import PAGE
from migrate.tracking.protection import Protection
from migrate.tracking.record import Refused
from proto.codec.pageset import PageSet

# The name in /proc/PID/maps of a shared mapping without a name.
NAMELESS = b"/dev/zero (deleted)"
# Seconds after which a look at the mappings of another process hangs.
HANG_SECONDS = 1.0


class OwnRecord:
    """Begins when it is made. Raises Refused.

    view -- the guest
    """

    pids: tuple[int, ...] = ()
    seconds = 0.0

    def __init__(self, view: memoryview, page_size: int) -> None:
        address = address_of(view)
        self._page_size = page_size
        self._start = address // PAGE * PAGE
        self._end = -(-(address + len(view)) // PAGE) * PAGE
        self._lead = address - self._start
        self._shared = _shared(self._start, self._end)
        self._forks = forks()
        self._refuse_sharing()
        try:
            fd = open_own()
        except OSError as error:
            raise Refused(f"userfaultfd: {error.strerror}") from None
        self._protection = Protection(fd, "self")
        try:
            self._protection.begin(self._start, self._end)
        except OSError as error:
            self.close()
            raise Refused(f"the buffer cannot be recorded: {error.strerror}") from None

    def look(self, dirty: PageSet) -> str:
        """Add the pages that were written since the last look; see Record."""
        forked = self._shared and self._forks != (now := forks())
        if forked:
            self._forks = now
            self._refuse_sharing()
        try:
            self._protection.collect(self._start, self._end, 0, self._page_size, dirty, self._lead)
        except OSError as error:
            raise Refused(f"the buffer was mapped anew: {error.strerror}") from None
        return "this process has forked" if forked else ""

    def _refuse_sharing(self) -> None:
        """Raise Refused if a child has the buffer too."""
        if self._shared and (pid := _other_process(self._shared)):
            raise Refused(f"process {pid}, which this one has forked, may write the buffer too")

    def close(self) -> None:
        """End the record."""
        self._protection.close()


def _shared(start: int, end: int) -> set[tuple[bytes, bytes]]:
    """Return device and inode of each shared mapping from `start` to `end`. Raises Refused."""
    found = set()
    for line in proc_lines("/proc/self/maps"):
        addresses, access, _, device, inode, path = line.split(b" ", 5)
        first, last = (int(word, 16) for word in addresses.split(b"-"))
        if first >= end or start >= last or not access.endswith(b"s"):
            continue
        if path.strip(b" ") != NAMELESS:
            raise Refused("the buffer is a mapping of a file, which other processes may write")
        found.add((device, inode))
    return found


def _other_process(shared: set[tuple[bytes, bytes]]) -> int:
    """Return another process that has one of the mappings, as far as we may see; 0 for none."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    pids.remove(os.getpid())

    def maps(pid: int) -> bool:
        try:
            return any(
                tuple(line.split(b" ", 5)[3:5]) in shared
                for line in proc_lines(f"/proc/{pid}/maps")
            )
        except OSError:
            return False

    found = HangGuard[int, bool]().each(pids, maps, HANG_SECONDS)
    return next((pid for pid, has in found.items() if has), 0)
