"""Limits the bandwidth of a migration: bytes are admitted evenly, at a rate that may change.

    take(n)  --->  asked += n, then wait until gone >= asked
    time     --->  gone  += rate * seconds, but never ahead of `asked` by more than a burst

`gone` is what the limit would have let through so far. It may run ahead of `asked` by the bytes of
BURST_SECONDS only: an idle hour does not buy an hour's worth of traffic at once. Callers are served
in the order in which they asked, since each waits for its own value of `asked`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time


class RateLimit:
    """Admits `rate` bytes per second; 0 admits everything.

    All channels of a migration share one. A new rate holds at once, also for callers that wait.
    """

    # Short against a round trip, so that a limit looks even to the network; long against the timer
    # of the event loop, which is a millisecond late now and then.
    BURST_SECONDS = 0.02

    def __init__(self, rate: int = 0) -> None:
        self._rate = rate
        self._asked = 0.0
        self._gone = 0.0
        self._updated_at = 0.0
        self._changed = asyncio.Event()
        """Set once, when the rate changes; each rate has its own."""

    @property
    def rate(self) -> int:
        return self._rate

    @rate.setter
    def rate(self, rate: int) -> None:
        self._update()
        if not rate:
            self._gone = self._asked  # all who wait may go
        self._rate = rate
        self._changed.set()
        self._changed = asyncio.Event()

    def _update(self) -> None:
        """Add to `gone` what the time since the last call has let through."""
        now = time.monotonic()
        gone = self._gone + self._rate * (now - self._updated_at)
        self._gone = min(gone, self._asked + self._rate * self.BURST_SECONDS)
        self._updated_at = now

    async def take(self, count: int) -> None:
        """Wait until `count` bytes may be sent."""
        if not self._rate:
            return
        self._update()
        self._asked += count
        mine = self._asked
        while self._rate and mine - self._gone >= 1:
            await self._wait((mine - self._gone) / self._rate)
            self._update()

    async def _wait(self, seconds: float) -> None:
        """Wait for that long, or until the rate changes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
