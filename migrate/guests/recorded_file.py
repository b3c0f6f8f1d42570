"""A file guest as the kernel's record sees it: who writes it, as far as searches have found."""

from __future__ import annotations

import os
from collections.abc import Callable

from migrate.guests.guest_file import GuestFile
from migrate.guests.kernel_writers import kernel_writers
from migrate.guests.proc_view import narrow_view
from migrate.guests.writer_search import WriterSearch
from migrate.runtime.processes import command_name, owners, user_ids
from migrate.tracking.guest_record import GuestRecord, rehearse
from migrate.tracking.record import Refused


class RecordedFile:
    """See migrate.tracking.guest_record.WrittenGuest.

    known   -- returns number and start time of the processes that can write the file
    skipped -- returns how many processes no search had the time to look at
    """

    def __init__(
        self, fd: int, known: Callable[[], list[tuple[int, str]]], skipped: Callable[[], int]
    ) -> None:
        # It maps the file for a moment, which a record would take for a writer's mapping.
        self._file = GuestFile(fd)
        self._owners = owners(os.fstat(fd))
        self._known = known
        self._skipped = skipped
        # What the first call of `writers` has found: forks since the last search, too.
        self._found: dict[int, str] | None = None

    def begin(self, size: int, page_size: int) -> GuestRecord:
        """Begin the record. Raises Refused."""
        return GuestRecord(self, self._file.fd, self._file.name_in_maps, size, page_size)

    def rehearse(self, size: int) -> float:
        """Return the seconds that a look at the record would take. Raises Refused."""
        return rehearse(self, self._file.name_in_maps, size)

    def writers(self) -> list[tuple[int, str]]:
        """Return the processes that can write the file. Raises Refused if there may be others."""
        if hidden := narrow_view():
            raise Refused(f"{hidden} may write it")
        skipped = self._skipped()
        if self._found is None:
            search = WriterSearch(self._file.fd)
            self._found = {one.pid: one.start_time for one in search.search()}
            skipped = skipped or search.skipped
        if skipped:
            raise Refused(f"{skipped} processes could not be looked at")
        known = list((self._found | dict(self._known())).items())
        for pid, _ in known:
            # A process of another user may hang what looks at it, or change its code meanwhile.
            if not user_ids(pid) <= self._owners:
                raise Refused(f"process {pid} ({command_name(pid)}) belongs to another user")
        return known

    def kernel_writes(self) -> str:
        return ", ".join(kernel_writers(self._file))
