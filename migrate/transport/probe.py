"""Measures the path to a destination before anything is moved: round trip and bandwidth.

    HELLO (probe) --> <-- HELLO        who is there, and what it can
    PING          --> <-- PONG         the round trip, the shortest of some
    PROBE ...     --> <-- PROBED ...   padding, as fast as it is taken, for a second and a half

No more is on the way than was answered already, so a slow path is measured as soon as a fast one.
The first half of the time lets TCP find its pace; the second half is what counts.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass

from migrate.errors import PeerError, PeerLost
from migrate.transport.link import Link
from proto.wire import capabilities as caps
from proto.wire.messages import MAX_PROBE, PROBE_BYTES, Hello, Probe, Probed

PROBE_SECONDS = 1.5
# Less than the destination waits for GUEST (migrate.destination.greeting.HANDSHAKE_SECONDS).
PATIENCE_SECONDS = 12.0
ROUND_TRIPS = 5
# At a rate limit, a piece of padding is what the limit lets through in this time.
PIECE_SECONDS = 0.05
LEAST_PIECE = 256
MOST_AHEAD = 8 << 20


@dataclass(frozen=True)
class Way:
    """The measurements of a path.

    round_trip -- seconds, the shortest of ROUND_TRIPS
    bandwidth  -- bytes per second
    probed     -- bytes of padding that were sent
    """

    round_trip: float
    bandwidth: float
    probed: int


async def greet(link: Link, optional: frozenset[str]) -> tuple[caps.Agreement, Hello]:
    """Exchange HELLO. Return the agreed capabilities and the destination's HELLO.

    Raise PeerLost, PeerError, CapabilityError, or what the destination says.
    """
    hello = caps.offer(optional, frozenset({caps.PROBE}))
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await link.send(hello)
            answer = await link.expect(Hello)
    except TimeoutError:
        raise PeerLost(f"{link.peer_name} does not answer within {PATIENCE_SECONDS:g} s") from None
    return caps.agree(hello, answer), answer


async def measure(link: Link, seconds: float = PROBE_SECONDS) -> Way:
    """Measure the path of a link that was greeted, within its rate limit.

    seconds -- how long padding is sent

    Raise PeerLost, PeerError, or what the destination says.
    """
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            round_trip = min([await link.round_trip() for _ in range(ROUND_TRIPS)])
            return await _Padding(link, seconds).run(round_trip)
    except TimeoutError:
        raise PeerLost(f"the way could not be measured in {PATIENCE_SECONDS:g} s") from None
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None


class _Padding:
    """One series of PROBE messages, and the answers to them."""

    def __init__(self, link: Link, seconds: float) -> None:
        self._link = link
        self._seconds = seconds
        piece = int(link.limit.rate * PIECE_SECONDS) or PROBE_BYTES
        self._piece = min(max(piece, LEAST_PIECE), PROBE_BYTES)
        self._sent = self._answered = 0
        self._over = False
        self._news = asyncio.Event()
        self._half: tuple[float, int] = (0.0, 0)
        self._last: tuple[float, int] = (0.0, 0)

    async def run(self, round_trip: float) -> Way:
        began = time.monotonic()
        self._half = self._last = began, 0
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send(began + self._seconds))
            group.create_task(self._hear(began + self._seconds / 2))
        (half_at, half), (last_at, last) = self._half, self._last
        if half == last:  # so slow that one answer is all there is
            half_at, half = began, 0
        bandwidth = (last - half) / max(last_at - half_at, 1e-9)
        return Way(round_trip, bandwidth, self._sent)

    async def _send(self, end: float) -> None:
        padding = os.urandom(self._piece)
        while time.monotonic() < end and self._sent + len(padding) <= MAX_PROBE:
            ahead = min(max(2 * self._piece, self._answered), MOST_AHEAD)
            while self._sent - self._answered >= ahead:
                self._news.clear()
                await self._news.wait()
            await self._link.limit.take(len(padding))
            self._sent += len(padding)
            await self._link.send(Probe(padding))
        self._over = True

    async def _hear(self, half_at: float) -> None:
        while not self._over or self._answered < self._sent:
            answer = await self._link.expect(Probed)
            due = self._answered + self._piece
            if answer.received != due or due > self._sent:
                raise PeerError(f"unexpected PROBED {answer.received}; expected {due}")
            self._answered = answer.received
            self._news.set()
            now = time.monotonic()
            if self._half[1] == 0 or now <= half_at:
                self._half = now, self._answered
            self._last = now, self._answered
