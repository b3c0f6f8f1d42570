"""The processes that can write a guest's file, found among all processes in /proc.

    WriterSearch(fd).search()      looks at everything
    WriterSearch(fd).search_new()  looks at what was started since then: a millisecond or two

A process is a writer if it has the file open for writing, or has it mapped so that it can write it:
see guest_file.py. Threads that do not share their table of open files are looked at one by one.

Reading all of /proc/PID/maps is what costs: 160 of 190 ms for 526 processes (AMD EPYC, 2 cores). A
further search reads the maps only of processes whose memory has another size than before, since a
new mapping changes it; that takes 35 ms. A search for what is new takes 2 ms: it compares the
inodes of /proc/PID, which differ when a number is given to another process.

No search shows files on their way through a socket, or registered with io_uring. The kernel counts
those too: it refuses a read lease while anything at all has the file open for writing
(`open_for_writing`), but does not say how many have.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from migrate.guests.guest_file import GuestFile, OutOfTime, open_for_writing
from migrate.guests.proc_view import (
    file_tables,
    memories,
    memory_size,
    why_unavailable,
)
from migrate.runtime import processes
from migrate.runtime._proc import list_processes
from migrate.runtime.hang_guard import HangGuard

MAX_NAMED = 5
# Of the processor, for the processes of all users but root, the guest's owner and ourselves: in the
# first search, while nothing is stopped; in a further one, which the pause may have to wait for; in
# one for what is new, which is in the pause. A process takes 0.1 to 0.4 ms, 1000 open files 2 ms.
FIRST_SECONDS = 0.5
FURTHER_SECONDS = 0.05
NEW_SECONDS = 0.01
MAX_SHARE = 0.25  # of that for one process
# On a busy machine processor time passes slowly: then that many times the budget, by the clock.
MAX_SLOWNESS = 4
# A look at one process hangs after the seconds above, by the clock, but not before these.
MIN_PATIENCE = 0.02
RECENT = 5


@dataclass(frozen=True)
class Writer:
    """A process that can write the guest; `name` is that of its program, printable."""

    pid: int
    start_time: str
    name: str

    def __str__(self) -> str:
        return f"{self.pid} ({self.name})"


@dataclass(frozen=True)
class _Seen:
    """What is known of a process.

    inode    -- of /proc/PID, which tells it from a later process with its number
    looked   -- the number of the last search that tried to examine it; 0: none yet
    size     -- of its memory
    maps     -- whether it has the guest mapped
    writer   -- what it is called, if it can write the guest
    hidden   -- it may not be looked into
    skipped  -- no search has had the time to look into it, or the last one hung there
    """

    inode: int
    looked: int = 0
    size: str = ""
    maps: bool = False
    writer: Writer | None = None
    hidden: bool = False
    skipped: bool = False


class _Budget:
    """The time that one search has for the processes of other users.

    seconds, used -- of the processor, in all and up to now
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.used = seconds, 0.0
        self._late = time.monotonic() + seconds * MAX_SLOWNESS

    def is_spent(self) -> bool:
        return self.used >= self.seconds or time.monotonic() >= self._late

    @contextlib.contextmanager
    def part(self) -> Iterator[float]:
        """Count what is used meanwhile; yield the deadline, in the time of time.thread_time."""
        began = time.thread_time()
        try:
            yield began + min(self.seconds - self.used, self.seconds * MAX_SHARE)
        finally:
            self.used += time.thread_time() - began


def named(writers: list[Writer]) -> str:
    """Name some of the writers, for a sentence."""
    some = ", ".join(map(str, writers[:MAX_NAMED]))
    more = len(writers) - MAX_NAMED
    text = f"process {some}" if len(writers) == 1 else f"processes {some}"
    return f"{text} and {more} more" if more > 0 else text


class WriterSearch:
    """The search for the writers of one guest, among all processes but this one.

    guest       -- the file or device
    unavailable -- why no process can be seen at all, or ""
    hidden      -- how many processes may not be looked into, or only in part; process 1 is not
                   counted here but in `init_hidden`
    skipped     -- how many processes of other users no search has had the time to look into, and
                   at how many one hangs
    seconds, new_seconds -- of the processor, for a further search, and for one for what is new

    Any user may have thousands of processes, each with hundreds of thousands of open files and
    mappings. All of them together must neither keep the guest from moving nor lengthen its pause.
    So the processes of root, of the guest's owner and our own are looked into wholly, and those of
    all other users have a budget of processor time in each search. Those that were not looked at
    for longest come first, and of new ones those with the fewest open files. If the time is not
    enough for a process, what an earlier search has found of it stays true.

    A process can also make every read of its maps hang: it holds the lock of its memory while it
    waits for a FUSE file system of its own, which need not answer. So the processes of other users
    are looked into in a thread that may be left behind (HangGuard). While it hangs there, that
    process is not looked into again.
    """

    def __init__(self, fd: int, but: int = 0) -> None:
        """Search for writers of the file behind `fd`; the process `but` is none."""
        self.guest = GuestFile(fd)
        self._but = {os.getpid(), but}
        self._owners = processes.owners(os.fstat(fd))
        self.hidden, self.init_hidden, self.skipped = 0, False, 0
        self.seconds = self.new_seconds = 0.0
        self._recent: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._guard = HangGuard[tuple[int, int], _Seen | None]()
        self.unavailable = why_unavailable()
        self._known: dict[int, _Seen] = {}
        self._searches = 0

    def search(self, cancelled: Callable[[], bool] = lambda: False) -> list[Writer]:
        """Look at all processes; return the writers.

        cancelled -- called between two processes; if it returns true, the search ends, and nothing
                     of it is remembered
        """
        began = time.thread_time()
        self._searches += 1
        known: dict[int, _Seen] = {}
        others: list[tuple[int, int]] = []
        for pid, inode, owner in self._processes():
            if cancelled():
                return []
            if not self._is_owners(pid, owner):
                others.append((pid, inode))
            elif seen := self._examine(pid, inode):
                known[pid] = seen
        budget = _Budget(FURTHER_SECONDS if self._known else FIRST_SECONDS)
        known |= self._look_at_others(others, budget, cancelled)
        if cancelled():
            return []
        first, self._known = not self._known, known
        if not first:
            self._recent.append(time.thread_time() - began + budget.used)
            self.seconds = min(self._recent)
        self.init_hidden = 1 in known and known[1].hidden
        self.hidden = sum(seen.hidden for seen in known.values()) - self.init_hidden
        self.skipped = sum(seen.skipped for seen in known.values())
        found = [seen.writer for seen in known.values() if seen.writer]
        if self.skipped and not found and open_for_writing(self.guest.fd) is False:
            self.skipped = 0  # none of them can write it
        return found

    def search_new(self, stopped: Container[int] = ()) -> list[Writer]:
        """Look at processes that were started since the last whole search.

        stopped -- processes that need not be looked at again: they cannot open or close anything

        Returns all writers, also those of the last search that still have the guest open.
        """
        began = time.thread_time()
        found: list[_Seen | None] = []
        others: list[tuple[int, int]] = []
        for pid, inode, owner in self._processes():
            seen = self._before(pid, inode)
            if seen is not None and (not seen.writer or pid in stopped):
                found.append(seen)
            elif self._is_owners(pid, owner):
                found.append(self._examine(pid, inode))
            else:
                others.append((pid, inode))
        budget = _Budget(NEW_SECONDS)
        found += self._look_at_others(others, budget).values()
        self.new_seconds = time.thread_time() - began + budget.used
        return [seen.writer for seen in found if seen and seen.writer]

    def _processes(self) -> Iterator[tuple[int, int, int]]:
        """Yield PID, inode and owner of /proc/PID, of all processes that may be writers."""
        if self.unavailable:
            return
        table = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = list_processes(table)
        finally:
            os.close(table)
        for one in found:
            if one[0] not in self._but:
                yield one

    def _is_owners(self, pid: int, owner: int) -> bool:
        """Return whether a process acts for root, the guest's owner or us, and for no other user.

        owner -- of /proc/PID; that is root for a process that has changed its user, so all its
                 users are looked at then
        """
        if owner not in self._owners:
            return False
        acting = processes.user_ids(pid)
        return bool(acting) and acting <= self._owners

    def _before(self, pid: int, inode: int) -> _Seen | None:
        seen = self._known.get(pid)
        return seen if seen is not None and seen.inode == inode else None

    def _look_at_others(
        self,
        others: list[tuple[int, int]],
        budget: _Budget,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> dict[int, _Seen]:
        """Look into processes of other users, (PID, inode), as far as the budget goes."""

        def look(one: tuple[int, int]) -> _Seen | None:
            pid, inode = one
            before = self._before(pid, inode)
            if budget.is_spent() or cancelled():
                return before or _Seen(inode, skipped=True)
            try:
                with budget.part() as deadline:
                    return self._examine(pid, inode, deadline)
            except OutOfTime:
                seen = before or _Seen(inode, skipped=True)
                return dataclasses.replace(seen, looked=self._searches)

        turns = sorted(others, key=lambda one: self._turn(*one))
        looked = self._guard.each(turns, look, max(budget.seconds, MIN_PATIENCE))
        found: dict[int, _Seen] = {}
        for pid, inode in turns:
            if (pid, inode) not in looked:  # it hangs
                seen = self._before(pid, inode) or _Seen(inode)
                found[pid] = dataclasses.replace(seen, skipped=True)
            elif one := looked[pid, inode]:
                found[pid] = one
        return found

    def _turn(self, pid: int, inode: int) -> tuple[int, int]:
        """Return the key by which processes of other users are ordered."""
        before = self._before(pid, inode)
        if before is not None:
            return before.looked, 0
        with contextlib.suppress(OSError):
            return 0, os.stat(f"/proc/{pid}/fd").st_size  # how many, from Linux 6.2 on
        return 0, 0

    def _examine(self, pid: int, inode: int, deadline: float = math.inf) -> _Seen | None:
        """Look into a process; return None if it has ended. Raises OutOfTime."""
        before = self._before(pid, inode)
        try:
            size = memory_size(pid)
            opened = any(self.guest.open_in(one, deadline) for one in file_tables(pid, deadline))
            maps = False
            if before is None or before.skipped or before.maps or before.size != size:
                maps = any(self._mapped(base, deadline) for base in memories(pid))
            writer = None
            if opened or maps:
                writer = Writer(pid, processes.start_time_of(pid), processes.command_name(pid))
            return _Seen(inode, self._searches, size, maps, writer)
        except PermissionError:
            return _Seen(inode, self._searches, hidden=not processes.is_kernel_thread(pid))
        except OSError:
            return None

    def _mapped(self, base: str, deadline: float) -> bool:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return self.guest.mapped_in(base, deadline)
        return False  # a thread that has ended
