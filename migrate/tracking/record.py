"""What a tracker asks of a record, and how a record is refused."""

from __future__ import annotations

from typing import Protocol

from proto.codec.pageset import PageSet


class Refused(Exception):  # noqa: N818 - a reason for comparing, not a fault
    """The kernel's record cannot be had, or not be trusted; the reason is a phrase for the user."""


class Record(Protocol):
    """The kernel's record of the written pages of one guest.

    pids    -- the processes whose writes are recorded; none: this one
    seconds -- for how long, at most, one was stopped to begin the record
    """

    seconds: float

    @property
    def pids(self) -> tuple[int, ...]: ...

    def look(self, dirty: PageSet) -> str:
        """Add the pages that were written since the last look.

        Return "", or what has happened that the record may have missed: the guest must be compared
        as a whole then, after this. Raises Refused: the record is of no use any more.
        """

    def close(self) -> None:
        """End the record: the writers run as before."""
