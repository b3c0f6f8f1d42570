"""PINGs that wait for their PONG.

Most PINGs of a link only show that it lives (see liveness.py), and no PONG of theirs is waited for.
`Link.round_trip` waits for one. Tokens tell the two apart, and a PONG that nothing waits for is
ignored: the waiter may have been cancelled.
"""

from __future__ import annotations

import asyncio
import itertools


class Pings:
    """The PINGs of one link."""

    def __init__(self) -> None:
        self._tokens = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[float]] = {}

    def next_token(self) -> int:
        """Return a token that no PING of this link had before."""
        return next(self._tokens)

    def expect(self, token: int) -> asyncio.Future[float]:
        """Return a future that becomes the time at which the PONG with this token came."""
        waiter: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting[token] = waiter
        return waiter

    def answered(self, token: int, now: float) -> None:
        """Complete the future that waits for this PONG, if any."""
        waiter = self._waiting.pop(token, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(now)

    def forget(self, token: int) -> None:
        """Wait for this PONG no longer."""
        self._waiting.pop(token, None)

    def fail(self, fault: Exception) -> None:
        """Fail the waiters."""
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(fault)
