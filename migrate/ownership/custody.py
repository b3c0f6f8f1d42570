"""One complete guest at the destination, from PREPARED until its owner is decided.

    prepare()      -> PREPARED, and the caller says READY
    take_over()    PREPARED -> OWNER, and the guest is started: on GO, or when an operator says so
    give_up()      PREPARED -> ABORTED
    end_doubt()    an operator says whether a guest that may have been started is running

Which claim may follow is in proto.wire.ownership. Each is written to the journal before it is acted
on. GO, a returning source and a timeout may come at the same moment, so a lock orders these steps.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from migrate.errors import JournalError, MigrationError, NotStartedError
from migrate.guests.place import Place
from migrate.ownership.journal import Journal, record
from migrate.runtime.cancellation import finish
from migrate.runtime.threads import in_thread
from proto.wire.ownership import Claim, Event

STARTED_EARLIER = "it was started by an earlier program"


class Custody:
    """A complete guest at the destination.

    state   -- the guest's device state, for the place to start it with
    running -- what the place said when the guest was started; "" if it does not run
    doubt   -- why it is unknown whether the guest was started; "" if it is known
    """

    def __init__(
        self, place: Place, journal: Journal, state: bytes = b"", *,
        running: str = "", doubt: str = "",
    ) -> None:  # fmt: skip
        self.place = place
        self.journal = journal
        self.running = running
        self.doubt = doubt
        # Called when the guest has been started.
        self.on_taken: Callable[[Custody], None] = lambda _custody: None
        # Whether the guest was given up with its pages kept, because the source resumes.
        self.place_kept = False
        # Set once the claim is OWNER and the guest runs, or the claim is ABORTED.
        self.decided = asyncio.Event()
        # Set once the source has said that it knows.
        self.told = asyncio.Event()
        self._state = state
        self._place_closed = False
        self._lock = asyncio.Lock()

    async def prepare(self, **facts: Any) -> None:
        """Record PREPARED: the source may be told READY. Raises JournalError."""
        async with self._lock:
            await record(self.journal, Event.VERIFIED, place=self.place.facts(), **facts)
            self.place.mark_complete()

    async def take_over(self, event: Event = Event.GO) -> str:
        """Record OWNER, start the guest if it does not run yet, and return the place's sentence.

        Raises NotStartedError if the guest will never run here, JournalError if nothing is decided,
        and MigrationError if it is unknown whether the guest was started.
        """
        running: str = await finish(self._take_over(event))
        return running

    async def _take_over(self, event: Event) -> str:
        async with self._lock:
            if self.journal.claim not in (Claim.PREPARED, Claim.OWNER):
                raise NotStartedError("the guest was given up here before GO came")
            if self.running:
                return self.running
            if self.doubt:
                raise MigrationError(self.doubt)
            await record(self.journal, event)
            if self.place.irrevocable:
                await in_thread(self.journal.mark_begun)
            try:
                running = await self.place.start(self._state)
            except Exception as error:
                raise await self._not_started(error) from error
            self.running = running
            # Without this line a later program starts the guest again, or asks an operator.
            with contextlib.suppress(JournalError):
                self.journal.mark_started()
            self.decided.set()
            self.on_taken(self)
            return running

    async def _not_started(self, error: Exception) -> MigrationError:
        """Give up the guest after a failed start; return the error for the source.

        A place raises MigrationError only if the guest did not start. After any other error it may
        have started, if the start is irrevocable: then the guest is not given up.
        """
        why = (
            str(error) if isinstance(error, MigrationError) else f"{type(error).__name__}: {error}"
        )
        if self.place.irrevocable and not isinstance(error, MigrationError):
            self.doubt = f"whether the guest was started is not known: {why}"
            return MigrationError(self.doubt)
        await record(self.journal, Event.NOT_STARTED)
        try:
            await self.place.discard()
        finally:
            self.decided.set()
        return NotStartedError(why)

    async def give_up(self, event: Event = Event.GIVE_UP, *, keep_place: bool = False) -> bool:
        """Record ABORTED, unless the guest is ours; return whether it is given up.

        keep_place -- keep the pages: the source resumes, under another name

        Raises JournalError.
        """
        gone: bool = await finish(self._give_up(event, keep_place))
        return gone

    async def _give_up(self, event: Event, keep_place: bool) -> bool:
        async with self._lock:
            if self.journal.claim is Claim.PREPARED:
                await record(self.journal, event)
                self.place_kept = keep_place
                if not keep_place:
                    await self.place.discard()
                self.decided.set()
            return self.journal.claim is Claim.ABORTED

    async def end_doubt(self, *, runs: bool) -> None:
        """Record what an operator found out: whether the guest was started. Raises JournalError."""
        async with self._lock:
            if runs:
                self.journal.mark_started()
                self.running = STARTED_EARLIER
            else:
                await record(self.journal, Event.NOT_STARTED)
            self.doubt = ""

    async def answer(self) -> Claim:
        """Return the claim to answer QUERY with. A guest that is ours is started first.

        Raises MigrationError if it is unknown whether the guest was started.
        """
        if self.journal.claim is Claim.OWNER and not self.running:
            with contextlib.suppress(NotStartedError):
                await self.take_over()
        return self.journal.claim

    def close_place(self) -> None:
        """Once the guest runs, free what was needed to receive it. Later calls do nothing."""
        if self.running and not self._place_closed:
            self._place_closed = True
            self.place.close()

    def release_memory(self) -> None:
        """Drop the place and the device state: the guest is running here, or will never arrive."""
        self.place, self._state = GonePlace(), b""


class GonePlace(Place):
    """The place of a guest whose memory is gone."""

    async def start(self, state: bytes) -> str:
        raise MigrationError("the memory of the guest is gone")

    async def discard(self) -> None:
        pass
