"""A source whose connection broke: how long it has to come back, and its new connection.

    break --time_left--> wait --come--> take: the next attempt
                           |
                           +--time is over--> the migration has failed, or is kept on disk

A source may be back before its old connection is seen to break: the kernel reports a lost peer
late, if at all. So `come` may precede the break, and the new connection is held until then.

A connection alone is no progress. A source that comes back again and again and brings nothing has
`retry` seconds from its first break, not from its last (see migrate.transport.retry_budget).
"""

from __future__ import annotations

import asyncio
import contextlib

from migrate.destination.greeting import Introduction
from migrate.errors import NoProgress, PeerLost
from migrate.transport.link import Link
from migrate.transport.retry_budget import Budget
from proto import ErrorCode


class ReturningSource:
    """Holds a source that has come back over a new connection until the destination goes on.

    retry -- seconds that it has to come back, from the first break after it has brought anything
    """

    def __init__(self, retry: float) -> None:
        self._retry = retry
        self._introduction: Introduction | None = None
        self._came = asyncio.Event()
        self._budget = Budget()
        self._progress = 0
        """What `Receiver.progress` was at the last break."""

    @property
    def is_here(self) -> bool:
        """Whether the source is connected, and waits for the destination to go on."""
        return self._introduction is not None

    @property
    def link(self) -> Link | None:
        """The connection that it has come back over, while it waits."""
        return self._introduction.link if self._introduction is not None else None

    def come(self, introduction: Introduction) -> None:
        """Note that the source is here. A connection that it has made before is aborted: a source
        only connects once more if that one is of no use to it."""
        if self._introduction is not None:
            self._introduction.link.abort()
        self._introduction = introduction
        self._came.set()

    async def wait(self, seconds: float) -> None:
        """Wait until the source is here, or for that long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.here()

    async def here(self) -> None:
        """Wait until the source is here."""
        await self._came.wait()

    def take(self) -> Introduction | None:
        """Return how the source introduces itself if it is here; it is not waiting any more."""
        introduction, self._introduction = self._introduction, None
        self._came.clear()
        return introduction

    # -- the time it has

    def time_left(self, progress: int) -> float:
        """Note that the connection broke. Return the seconds that the source has to come back.

        progress -- Receiver.progress: if it has grown since the last break, the time begins anew
        """
        if progress > self._progress:
            self._progress = progress
            self._budget.renew()
        self._budget.broke()
        return self._budget.left(self._retry)

    async def no_progress(self, error: PeerLost) -> NoProgress:
        """Tell a source that is back why it is not taken again. Return that as an error."""
        budget = self._budget
        why = (
            f"nothing new has come for {budget.used():.3g} s, and the connection broke "
            f"{budget.breaks} times"
        )
        if self.link is not None:
            await self.link.give_reason(ErrorCode.INTERNAL, why)
        return NoProgress(f"{error}; {why}")
