"""The write protection of one process's memory: a userfaultfd of it, and its pagemap."""

from __future__ import annotations

import os

from migrate.tracking._kernel import collect, negotiate, protect
from migrate.tracking.mappings import PAGE
from migrate.tracking.record import Refused
from proto.codec.pageset import PageSet


class Protection:
    """Owns `fd`, a new userfaultfd. Closing it ends all protection: the process runs as before.

    pid -- the process that made it, as a name in /proc

    Raises Refused; `fd` is closed then.
    """

    def __init__(self, fd: int, pid: int | str) -> None:
        self._fds = [fd]
        try:
            negotiate(fd)
            self._fds.append(os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            self.close()
            raise Refused(
                f"the kernel cannot record writes (Linux 6.7 can): {error.strerror}"
            ) from None

    def begin(self, start: int, end: int) -> None:
        """Protect a range of whole pages. Raises OSError.

        All of it would count as written until it was collected once. That says nothing: the guest
        is compared as a whole after each beginning.
        """
        fd, pagemap = self._fds
        protect(fd, start, end - start)
        collect(pagemap, start, end, 0, PAGE, bytearray(8), 0)

    def collect(
        self, start: int, end: int, offset: int, page_size: int, dirty: PageSet, lead: int = 0
    ) -> None:
        """Add the pages written in a range, and protect them again: see `_kernel.collect`."""
        _, pagemap = self._fds
        collect(pagemap, start, end, offset, page_size, dirty.bits, dirty.pages, lead)

    def close(self) -> None:
        """End the protection. May be called again."""
        while self._fds:
            os.close(self._fds.pop())
