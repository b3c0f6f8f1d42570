"""The wait for GO, once the whole guest is here and PREPARED is written.

    READY sent --GO--------------------------------------------------------> the guest is ours
        |
        +--the source hangs up with a reason, or gives up------------------> ABORTED, raise it
        |
        +--the connection breaks--> wait for the source, `timeout` seconds
                                        |
                                        +--it comes back and asks (Custody.decided)--> as it says
                                        +--it comes back and resumes--> give up, but keep the place
                                        +--it does not come-----------> ABORTED, raise PeerLost

Between READY and GO either side may own the guest, and only the source knows which. Giving up is
therefore written down before anything else is done: a source that asks later hears ABORTED, and its
guest runs there. The rules are in proto.wire.ownership.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from migrate.destination.returning import ReturningSource
from migrate.errors import NotStartedError, PeerLost
from migrate.ownership.custody import Custody
from migrate.transport.link import Link
from proto.wire.messages import Go, MessageType
from proto.wire.ownership import Claim


class GoWait:
    """Waits for the source's decision on a guest in our custody.

    link    -- the connection that READY was sent on
    timeout -- seconds to wait for a source whose connection broke
    on_lost -- called when the connection has broken, and the source is not back yet
    stream  -- the guest comes as a QEMU's stream
    """

    def __init__(
        self, custody: Custody, link: Link, returning: ReturningSource, timeout: float,
        on_lost: Callable[[], None], *, stream: bool,
    ) -> None:  # fmt: skip
        self.resumed = False
        """The source resumes: the guest was given up here, and its place is kept."""
        self._custody = custody
        self._link = link
        self._returning = returning
        self._timeout = timeout
        self._on_lost = on_lost
        self._stream = stream

    async def run(self) -> bool:
        """Wait for GO. Return whether it came on this connection; another one may bring it.

        A source whose connection broke may be back soon and ask; or resume, if it never said GO.
        One that says why it gives up is not waited for.

        Raise PeerLost if the guest is given up because the source is gone or resumes, and what the
        source says if it gives up.
        """
        custody, returning = self._custody, self._returning
        go = asyncio.create_task(self._expect_go())
        decided = asyncio.create_task(custody.decided.wait())
        back = asyncio.create_task(returning.here())
        try:
            await asyncio.wait({go, decided}, return_when=asyncio.FIRST_COMPLETED)
            try:
                if go.done():
                    go.result()
                    return True
            except PeerLost:
                if not returning.is_here:
                    self._on_lost()
                    await asyncio.wait(
                        {decided, back}, timeout=self._timeout,
                        return_when=asyncio.FIRST_COMPLETED,
                    )  # fmt: skip
                if returning.is_here and await custody.give_up(keep_place=True):
                    custody.place.unprepare()
                    self.resumed = True
                    raise
                if not decided.done() and await custody.give_up():
                    raise
            if custody.journal.claim is Claim.ABORTED:
                raise NotStartedError("the guest was given up before GO came")
            return False
        finally:
            for task in (go, decided, back):
                task.cancel()

    async def _expect_go(self) -> None:
        while self._stream and await self._link.first_type() is MessageType.TAKEN:
            await self._link.receive_message()  # it has crossed with READY
        await self._link.expect(Go)
