"""What the source moves: a running guest.

    source                                destination (see migrate.guests.place)
    Guest.lock
    Guest.memory  --pages-->              Place.memory
    Guest.pause, state  --COMPLETE-->     the digest is verified; Place.prepare(state)
    Guest.relinquish  --GO-->             Place.start(state)
    Guest.release                         (the guest runs here)
    Guest.resume on any failure           Place.discard on any failure

A paused guest must run again by itself if this program dies, unless the guest was relinquished.
Each kind of guest arranges that with a process that outlives this one (demo.process, watchdog).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from migrate.errors import UsageError
from migrate.memory.dirty import DirtyTracker, Look, Method, ScanTracker
from migrate.memory.memory import Memory
from migrate.units import format_size
from proto.codec.kernel import PageEncoder
from proto.wire.messages import MAX_SIZE

if TYPE_CHECKING:
    from migrate.policy.parameters import Parameters


def no_limit() -> float:
    """Return the downtime limit of a guest that may be stopped for any time."""
    return math.inf


def check_size(size: int, what: str) -> None:
    """Raise UsageError if a guest has more bytes than any page size can address."""
    if size > MAX_SIZE:
        raise UsageError(
            f"{what}: it has {format_size(size)}; the most that can be moved, whatever "
            f"--page-size, is {format_size(MAX_SIZE)}: make it smaller, or copy it by other means"
        )


class Guest(ABC):
    """A running guest."""

    kind: str
    # Whether `pause` really stops the guest. If not, the pause looks for its writes once more.
    stoppable = True
    # Whether `throttle` slows the guest.
    can_throttle = False
    # What the destination and the views call the guest.
    description = ""
    # The process that is the guest, if it is one that we started: its number and start time.
    pid, start_time = 0, ""
    # Whether the guest ran when we came. A virtual machine may have been paused.
    runs = True

    # Sentences for the user: what is true of the guest after a failed migration, while its owner
    # is unknown, and once it is known to be here or at the destination.
    after_failure = "the guest runs on here"
    while_undecided = "here it stays paused"
    if_here = "the guest runs here"
    if_there = "the guest runs at the destination, and no more here"
    # What went wrong while the guest was closed.
    close_warning = ""
    # How the guest is locked, and what else writes it.
    cautions: Sequence[str] = ()

    # Seconds that stopping all writers adds to the pause.
    stop_seconds = 0.0
    # Seconds that `check_writers` takes. It runs while the last round is sent.
    check_seconds = 0.0

    # Whether a migration moves the guest now.
    moving = False
    # Whether the guest was handed to a destination, where it runs or may run. A guest moves once.
    relinquished = False
    # Set while the owner of the guest is unknown and no journal file records it. Call it with the
    # seconds to ask for, and "here", "there" or "" (ask). It returns whether the destination owns
    # the guest.
    decide_owner: Callable[[float, str], Awaitable[bool]] | None = None

    # Called with what a user must know, even if the program is to be quiet.
    warn: Callable[[str], None] = staticmethod(lambda _text: None)

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes of guest memory."""

    async def lock(self) -> None:
        """Keep other programs from moving the guest until `unlock`, or until this program dies.

        Call it before anything is recorded or stopped. Does nothing if the guest is locked. Raises
        UsageError if another program moves the guest.
        """

    def confirm_lock(self) -> None:
        """Check, just before the guest is relinquished, that it is still locked.

        Raises MigrationError if it is not.
        """

    def unlock(self) -> None:
        """Let other programs move what is still here: the migration is over."""

    def check_available(self) -> None:
        """Raise UsageError if this program moves the guest already, or has moved it."""
        if self.moving:
            raise UsageError("this guest is being moved already: a guest moves to one place")
        if self.relinquished:
            error = UsageError(
                "this guest has moved, or may have: a guest moves once, and what is here is old"
            )
            error.guest_is = "there" if self.decide_owner is None else "unknown"
            raise error

    def refuse_if_moved(self) -> None:
        """Raise UsageError if the guest itself shows that it has moved away.

        The program that moved it may have kept a journal that we do not see.
        """

    async def make_ready(self) -> None:
        """Wait until the guest runs and can be paused."""

    def check(self) -> None:
        """Raise MigrationError if the guest can no longer be moved. Called after each round."""

    async def throttle(self, percent: int) -> None:
        """Take `percent` (0 to 99) of its time from the guest.

        The throttle lasts until the next call, or until this program dies. Sets `can_throttle` to
        False if nothing is left to slow. Raises MigrationError on failure; the guest then runs at
        full speed.
        """

    @abstractmethod
    async def pause(self) -> None:
        """Stop the guest; it writes nothing after the return. Raises MigrationError."""

    @abstractmethod
    async def resume(self) -> None:
        """Let a paused guest run here again. Does nothing if the guest runs."""

    async def check_writers(self) -> bool:
        """Stop every process that can write the guest and was not stopped by `pause`.

        Returns True if there was one: its writes must be looked for once more. Raises
        MigrationError if one cannot be stopped, or may not be stopped by us.
        """
        return False

    def state(self) -> bytes:
        """Return what the paused guest needs, beside its memory, to run at the destination."""
        return b""

    @abstractmethod
    async def relinquish(self) -> None:
        """Make sure that nothing here can run the guest, whatever dies. Comes before GO."""

    async def reclaim(self) -> None:
        """Own the guest again, still paused: the destination has said that it never runs it."""

    @abstractmethod
    async def release(self) -> None:
        """Free what the guest used here: it runs at the destination."""

    async def close(self) -> None:
        """End this program's part in the guest, which stays as it is."""

    def facts(self) -> dict[str, Any]:
        """Return what a later program needs to let the guest run, or to end it.

        The journal keeps it; see migrate.cli.reopen.
        """
        return {"kind": self.kind}


class MemoryGuest(Guest):
    """A guest whose memory can be read while it writes."""

    memory: Memory
    # Whether the guest marks the pages that it writes. If not, the source scans its memory, and
    # hashes what it sends.
    marks = False

    @property
    def size(self) -> int:
        return self.memory.size

    def check_parameters(self, parameters: Parameters) -> None:
        """Raise UsageError if the guest cannot be moved with these parameters."""

    def track(
        self, encoder: PageEncoder, downtime_limit: Callable[[], float] = no_limit
    ) -> DirtyTracker:
        """Start to track dirty pages for one migration.

        downtime_limit -- returns the limit, in seconds, that is in force
        """
        return ScanTracker(self.memory, encoder)

    def foresee_look(self, scan_seconds: float, downtime_limit: float) -> Look:
        """Return how written pages would be found in a migration. The guest is not touched.

        scan_seconds -- what a comparison of the whole guest takes
        """
        del downtime_limit
        return Look(Method.MARKS, 0.0) if self.marks else Look(Method.COMPARE, scan_seconds)
