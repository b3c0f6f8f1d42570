"""What a guest is to the source, and what a place for one is to the destination.

    source                                destination
    Guest.memory  --pages-->              Place.memory
    Guest.pause, state  --COMPLETE-->     Place.verify-ed by the digest
    Guest.give_up  --GO-->                Place.start(state)
    Guest.release                         (the guest runs here)
    Guest.resume on any failure           Place.discard on any failure

A guest that is paused and whose program dies must run again by itself, unless it was given up:
each kind arranges that with somebody who outlives us (see demo.py, guard.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from migrate.errors import UsageError
from migrate.memory import Memory
from migrate.quantities import format_size
from migrate.tracking import DirtyTracker, ScanTracker
from proto.kernel import PageEncoder
from proto.messages import MAX_SIZE

if TYPE_CHECKING:
    from migrate.journal import Journal
    from migrate.link import Link
    from migrate.parameters import Parameters
    from migrate.reception import Reception


def check_size(size: int, what: str) -> None:
    """Raise UsageError for a guest of more bytes than any page size can carry."""
    if size > MAX_SIZE:
        raise UsageError(
            f"{what}: it has {format_size(size)}; the most that can be moved, whatever "
            f"--page-size, is {format_size(MAX_SIZE)}: make it smaller, or copy it by other means"
        )


class Guest(ABC):
    """A running guest."""

    kind: str
    stoppable = True
    """Whether `pause` really stops it; else what it writes in the pause is looked for again."""
    can_throttle = False
    """Whether `throttle` slows it."""
    description = ""
    pid, born = 0, ""
    """Of the process that is the guest, where there is one of ours: number and start time."""
    runs = True
    """Whether it runs; a virtual machine may have been paused before we came."""
    remains = "the guest runs on here"
    """What is true of it after a migration that failed."""
    trouble = ""
    """What went wrong as it was closed."""
    waits = "here it stays paused"
    """What is true of it while nobody knows whose it is."""
    ours = "the guest runs here"
    theirs = "the guest runs at the destination, and no more here"
    """What is true of it once that is found out."""

    stop_seconds = 0.0
    """What the pause takes longer, to see that everything that writes it has stopped."""
    check_seconds = 0.0
    """What `check_writers` takes, beside the last round."""
    warn: Callable[[str], None] = staticmethod(lambda _text: None)
    """Told what a user must know, however quiet the program is to be."""
    moving = False
    """Whether a migration moves it now."""
    given_up = False
    """Whether it was given up to a destination, where it runs, or may: it moves once."""
    undecided: tuple[Journal, Sequence[Callable[[], Awaitable[Link]]]] | None = None
    """Where nobody knows whose it is, and no file says so: what is to be asked, and how."""
    cautions: Sequence[str] = ()
    """Sentences for the user on how it is held, and on what else writes it."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Of its memory, in bytes."""

    async def hold(self) -> None:
        """Hold the guest: no other program can move it until `unhold`, or until we die.

        Comes before anything is written down or stopped. Does nothing while it is held. Raises
        UsageError where another program moves it.
        """

    def check_home(self) -> None:
        """Raise UsageError if this program moves it already, or has moved it."""
        if self.moving:
            raise UsageError("this guest is being moved already: a guest moves to one place")
        if self.given_up:
            error = UsageError(
                "this guest has moved, or may have: a guest moves once, and what is here is old"
            )
            error.guest_is = "there" if self.undecided is None else "unknown"
            raise error

    def refuse_if_moved(self) -> None:
        """Raise UsageError if the guest has moved away, as far as can be told from the guest
        itself: an earlier program may have had a journal of its own."""

    def confirm_hold(self) -> None:
        """Make sure that it is still held, just before it is given up. Raises MigrationError."""

    def unhold(self) -> None:
        """The migration is over: other programs may move what is still here."""

    async def started(self) -> None:
        """Waits until the guest runs and can be paused."""

    @abstractmethod
    async def pause(self) -> None:
        """Stops the guest; when this returns it writes no more. Raises MigrationError."""

    @abstractmethod
    async def resume(self) -> None:
        """Lets a paused guest go on here. Does nothing where it runs."""

    async def check_writers(self) -> bool:
        """Looks, in the pause, whether anything can write the guest that was not stopped.

        True: there was something, and it is stopped now; what it wrote is to be looked for again.
        Raises MigrationError where it cannot be stopped, or is not ours to stop.
        """
        return False

    async def throttle(self, percent: int) -> None:
        """Takes so much of its time from the guest (0 to 99), until told otherwise or we die.

        Raises MigrationError where that fails; the guest runs at its own speed then. Where there is
        nothing left to slow, `can_throttle` is false when it returns.
        """

    def check(self) -> None:
        """Called after each round. Raises MigrationError where the guest can no longer be moved."""

    def state(self) -> bytes:
        """What the guest needs beside its memory to go on elsewhere; it is paused."""
        return b""

    @abstractmethod
    async def give_up(self) -> None:
        """From here on nothing here may run the guest, whatever dies. Comes before GO."""

    async def take_back(self) -> None:
        """The destination said it will never run it: it is ours again (still paused)."""

    @abstractmethod
    async def release(self) -> None:
        """It runs at the destination: free what it used here."""

    async def close(self) -> None:
        """The migration is over; the guest stays as it is."""

    def facts(self) -> dict[str, Any]:
        """What a later program needs to let the guest go on, or to end it (see reopen)."""
        return {"kind": self.kind}


class MemoryGuest(Guest):
    """A guest whose memory can be read while it writes."""

    memory: Memory
    marks = False
    """Whether it marks what it writes; else the source scans, and hashes what it sends."""

    @property
    def size(self) -> int:
        return self.memory.size

    def check_parameters(self, parameters: Parameters) -> None:
        """Raise UsageError where this guest cannot be moved with them."""

    def track(self, encoder: PageEncoder) -> DirtyTracker:
        """Starts tracking for one migration."""
        return ScanTracker(self.memory, encoder)


class Place(ABC):
    """Where the destination puts a guest."""

    reception: Callable[..., Reception] | None = None
    """How it is received, where that is not page by page into `memory`."""
    memory: memoryview
    """Writable, whole pages."""
    zeroed = True
    """Whether `memory` is all zeros at first, but for what is `held`."""
    held = False
    """Whether an earlier program has received some of the guest here."""
    lasting = False
    """Whether it outlives this program: a later one can go on with it."""
    fd = -1
    """Of the file that `memory` maps, or -1: raw pages are written to it."""
    fd_offset = 0
    """Where the guest begins in that file."""
    reads: Memory
    """The same bytes as they are hashed."""
    pid, born = 0, ""
    """Of the process that is the guest, where there is one of ours: number and start time."""
    runs = True
    """Whether the guest runs once it is started; a virtual machine may arrive paused."""
    irrevocable = False
    """Whether `start` may have been heard though it has not returned: no later program can know."""

    async def ready(self) -> None:
        """Waits until the place can take a guest; the source is told to begin after that."""

    def make_room(self, page: int) -> None:
        """A page is written through `memory` for the first time. Raises OSError where it cannot
        be: a mapping has only SIGBUS to say so."""

    def sync(self) -> None:
        """Brings what was written to where it is safe; called as rounds end."""

    @abstractmethod
    async def start(self, state: bytes) -> str:
        """The guest is ours: let it run. Returns a sentence for the user.

        Raises MigrationError where it cannot; then it did not run and never will.
        """

    async def look(self, running: str) -> str:
        """The sentence of `start`, or a truer one, when the source knows that the guest is ours."""
        return running

    async def prepare(self, state: bytes) -> None:
        """Everything that can fail before the guest is ours, so that `start` cannot."""

    def persist(self) -> None:
        """Its facts are written down: where it is `lasting`, it outlives this program from here
        on. Raises MigrationError."""

    def unprepare(self) -> None:
        """Undoes `prepare` and `secure`: more pages will come."""

    def secure(self) -> None:
        """It is written that the guest is whole: from here on it outlives this program."""

    def facts(self) -> dict[str, Any]:
        """What a later program needs to start a prepared guest, or to discard it (see reopen)."""
        return {"kind": "buffer"}

    def close(self) -> None:
        """The guest runs and the source knows it: lets go of what was only needed to receive it.

        Not part of `start`, since unmapping a large memory would lengthen the pause.
        """

    @abstractmethod
    async def discard(self) -> None:
        """The guest does not come: leave nothing behind."""
