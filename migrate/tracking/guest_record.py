"""The kernel's record of all that is written to a guest, by all processes that map it."""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections.abc import Iterable
from typing import Protocol

from migrate.runtime import processes
from migrate.runtime.proc_lines import proc_lines
from migrate.tracking._kernel import walk
from migrate.tracking.changes import FileWatch, MappingWatch, Seen
from migrate.tracking.injector import Injector, check_recordable
from migrate.tracking.mappings import PAGE, mappings_of
from migrate.tracking.own_record import OwnRecord
from migrate.tracking.process_record import RecordedProcess
from migrate.tracking.record import Refused
from proto.codec.pageset import PageSet

# A writer that does the same unusual thing at more looks than this does it always.
MAX_UNUSUAL = 3
WRITTEN = "a process writes it by a descriptor (write), which the record does not see"
UNMAPPED = "no process has the guest mapped"

logger = logging.getLogger(__name__)


class WrittenGuest(Protocol):
    """What the record asks of a guest that is a file."""

    def writers(self) -> Iterable[tuple[int, str]]:
        """Return number and start time of the processes that can write it.

        The first call finds all of them; later ones need not find what mappings and forks tell.
        """

    def kernel_writes(self) -> str:
        """Name what in the kernel writes it: a loop device, swap; "" for nothing."""


class GuestRecord:
    """Begins when it is made.

    fd        -- the guest's file
    name      -- how /proc/PID/maps names it: device and inode
    size      -- its bytes
    page_size -- bytes of a page of the migration
    seconds   -- for how long, at most, a writer was stopped to begin the record

    Raises Refused.
    """

    def __init__(
        self, guest: WrittenGuest, fd: int, name: list[bytes], size: int, page_size: int
    ) -> None:
        self._guest = guest
        self._name = name
        self._size = size
        self._page_size = page_size
        self._unusual: dict[str, int] = {}
        self._injector = Injector()
        self._processes: dict[int, RecordedProcess] = {}
        # Processes that may write the guest, and are not recorded.
        self._suspects: set[int] = set()
        # Processes whose children may write the guest: recorded, suspect, or just ended.
        self._family: set[int] = set()
        self._watches: list[FileWatch | MappingWatch] = []
        self.seconds = 0.0
        try:
            self._files = FileWatch(fd)
            self._watches.append(self._files)
            self._mappings = MappingWatch(name)
            self._watches.append(self._mappings)
            self._add_processes()
            if not self._processes:
                raise Refused(UNMAPPED)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes whose writes are recorded."""
        return tuple(self._processes)

    def look(self, dirty: PageSet) -> str:
        """See Record."""
        written, seen = self._files.look(), self._mappings.look()
        if seen.lost:
            raise Refused("more has happened on this machine than could be noted")
        self._family |= set(self._processes)
        happened = [word for word in (self._changed(), self._suspicion(seen)) if word]
        if written:
            happened.append(WRITTEN)
        for pid, process in list(self._processes.items()):
            try:
                process.collect(dirty, self._page_size)
            except OSError:
                happened.append(f"the mapping of process {pid} has changed")
                self._drop(pid)
        for one in happened:
            self._unusual[one] = self._unusual.get(one, 0) + 1
            if self._unusual[one] > MAX_UNUSUAL:
                raise Refused(f"{one}, again and again")
        if written and self._unusual[WRITTEN] > 1:
            raise Refused(WRITTEN)
        return "; ".join(happened)

    def _suspicion(self, seen: Seen) -> str:
        """Return why a process may have written the guest without a record; "" if none may have.

        A process that was forked, or has mapped the guest, is suspect from then on, until it is
        recorded, or has been seen to have ended or to map the guest no more. Whatever it wrote, it
        wrote before that, so the comparison that follows finds it.
        """
        suspects = self._suspects | seen.descendants(self._family) | seen.mappers
        # Those that have ended are family for one more look: they may have forked since `seen`.
        self._family = suspects | set(self._processes)
        suspects -= set(self._processes)
        self._suspects = {pid for pid in suspects if self._maps(pid)}
        if seen.mappers:
            return "a process has mapped the guest"
        return "a process that maps the guest has forked" if suspects else ""

    def _maps(self, pid: int) -> bool:
        try:
            return bool(mappings_of(pid, self._name, self._size))
        except OSError:  # it has ended, or is not to be seen
            return processes.exists(pid)

    def _changed(self) -> str:
        """Bring the processes and their mappings up to date; return what has changed."""
        changed = ""
        for pid, process in list(self._processes.items()):
            try:
                if process.renew():
                    changed = f"process {pid} has mapped the guest anew, or unmapped it"
            except OSError:
                changed = f"process {pid} has ended"
                self._drop(pid)
        if self._add_processes():
            changed = "another process has mapped the guest"
        return changed

    def _add_processes(self) -> bool:
        """Begin the record of further processes that map the guest; return whether there are any.

        Raises Refused: one cannot be recorded, or the kernel itself writes the guest.
        """
        _refuse_kernel(self._guest)
        added = False
        for pid, start_time in self._guest.writers():
            self._family.add(pid)
            if pid in self._processes:
                continue
            try:
                if not mappings_of(pid, self._name, self._size):
                    continue
                process = RecordedProcess(self._injector, pid, start_time, self._name, self._size)
            except (OSError, Refused) as error:
                if not processes.exists(pid):
                    continue
                raise _about(pid, error) from None
            self._processes[pid] = process
            self._suspects.discard(pid)
            self.seconds = max(self.seconds, process.seconds)
            logger.debug("process %d was stopped %.6f s to record it", pid, process.seconds)
            added = True
        return added

    def _drop(self, pid: int) -> None:
        self._processes.pop(pid).close()

    def close(self) -> None:
        """End the record: the writers run as before."""
        for pid in self.pids:
            self._processes.pop(pid).close()
        for watch in self._watches:
            watch.close()
        self._watches.clear()
        self._injector.close()


def _refuse_kernel(guest: WrittenGuest) -> None:
    if writer := guest.kernel_writes():
        raise Refused(f"{writer} writes it without a mapping")


def _about(pid: int, error: OSError | Refused) -> Refused:
    reason = error.strerror if isinstance(error, OSError) else error
    return Refused(f"process {pid} ({processes.command_name(pid)}): {reason}")


def rehearse(guest: WrittenGuest, name: list[bytes], size: int) -> float:
    """Return the seconds that a look at a record would take. No writer is touched.

    Raises Refused if it can be seen without touching them that there would be no record.
    """
    _refuse_kernel(guest)
    page = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    OwnRecord(memoryview(page), PAGE).close()  # this kernel can record writes
    began, mapped = time.perf_counter(), False
    for pid, _ in guest.writers():
        try:
            if not (mappings := mappings_of(pid, name, size)):
                continue
            check_recordable(pid, proc_lines(f"/proc/{pid}/maps"))
            pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            try:
                for one in mappings:
                    walk(pagemap, one.start, one.end)
            finally:
                os.close(pagemap)
        except (OSError, Refused) as error:
            if not processes.exists(pid):
                continue
            raise _about(pid, error) from None
        mapped = True
    if not mapped:
        raise Refused(UNMAPPED)
    return time.perf_counter() - began
