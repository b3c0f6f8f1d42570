"""The kernel's record of what one process writes to the guest through its mappings."""

from __future__ import annotations

import errno

from migrate.tracking.injector import Injector
from migrate.tracking.mappings import Mapping, mappings_of
from migrate.tracking.protection import Protection
from migrate.tracking.record import Refused
from proto.codec.pageset import PageSet

# How often the mappings are read anew if they change while they are being protected.
MAX_ATTEMPTS = 4


class RecordedProcess:
    """Made when the process has a userfaultfd of ours. Closing it ends all protection.

    seconds -- that a thread of the process was stopped for it

    Raises Refused.
    """

    def __init__(
        self, injector: Injector, pid: int, start_time: str, name: list[bytes], size: int
    ) -> None:
        self.pid = pid
        self._name = name
        self._size = size
        self._mapped: list[Mapping] = []
        self._recorded: list[Mapping] = []
        fd, self.seconds = injector.userfaultfd(pid, start_time)
        self._protection = Protection(fd, pid)
        try:
            self.renew()
        except OSError as error:
            self.close()
            raise Refused(f"its mapping cannot be recorded: {error.strerror}") from None

    def renew(self) -> bool:
        """Record mappings that are new. Return whether any have come, gone or moved.

        Raises OSError: the process has ended, or a mapping cannot be recorded.
        """
        for attempt in range(MAX_ATTEMPTS):
            now = mappings_of(self.pid, self._name, self._size)
            if now == self._mapped:
                return attempt > 0
            try:
                self._recorded = [one for one in now if one in self._recorded or self._protect(one)]
            except OSError:
                # It may have gone while we looked.
                if attempt == MAX_ATTEMPTS - 1 or now == mappings_of(
                    self.pid, self._name, self._size
                ):
                    raise
            else:
                self._mapped = now
        return True

    def _protect(self, mapping: Mapping) -> bool:
        """Return False for a mapping that never can be written: its file was opened to be read."""
        try:
            self._protection.begin(mapping.start, mapping.end)
        except OSError as error:
            if error.errno != errno.EPERM:
                raise
            return False
        return True

    def collect(self, dirty: PageSet, page_size: int) -> None:
        """Add the pages that were written since the last call.

        Raises OSError: the process has ended, or a mapping has moved.
        """
        for one in self._recorded:
            self._protection.collect(one.start, one.end, one.offset, page_size, dirty)

    def close(self) -> None:
        """End the record: the process runs as before."""
        self._protection.close()
