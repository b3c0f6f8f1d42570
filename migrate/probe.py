"""Measures the way to a destination, before anything is moved: round trip and bandwidth.

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
from typing import TypeVar

from migrate.errors import PeerError, PeerLost, peer_error
from migrate.link import Link
from proto import capabilities as caps
from proto.messages import MAX_PROBE, PROBE_BYTES, Error, Hello, Message, Probe, Probed

T = TypeVar("T")

PROBE_SECONDS = 1.5
# The destination waits 15 s for a guest to be described.
PATIENCE_SECONDS = 12.0
ROUND_TRIPS = 5
# At a rate limit, a piece of padding is what goes in so long.
PIECE_SECONDS = 0.05
LEAST_PIECE = 256
MOST_AHEAD = 8 << 20


@dataclass(frozen=True)
class Way:
    """round_trip in seconds, bandwidth in bytes per second, probed in bytes."""

    round_trip: float
    bandwidth: float
    probed: int


async def greet(link: Link, optional: frozenset[str]) -> tuple[caps.Agreement, Hello]:
    """The first words. Raises PeerLost, PeerError, CapabilityError, or what the destination
    says."""
    hello = caps.offer(optional, frozenset({caps.PROBE}))
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await link.send(hello)
            answer = _of_kind(await link.receive_message(), Hello)
    except TimeoutError:
        raise PeerLost(f"{link.peer_name} does not answer within {PATIENCE_SECONDS:g} s") from None
    return caps.agree(hello, answer), answer


async def measure(link: Link, seconds: float = PROBE_SECONDS) -> Way:
    """Over a link that was greeted; its rate limit is kept.

    Raises PeerLost, PeerError, or what the destination says.
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
    """One series of PROBE."""

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
            answer = _of_kind(await self._link.receive_message(), Probed)
            due = self._answered + self._piece
            if answer.received != due or due > self._sent:
                raise PeerError(f"PROBED {answer.received} came where {due} was due")
            self._answered = answer.received
            self._news.set()
            now = time.monotonic()
            if self._half[1] == 0 or now <= half_at:
                self._half = now, self._answered
            self._last = now, self._answered


def _of_kind(message: Message, kind: type[T]) -> T:
    if isinstance(message, Error):
        raise peer_error(message)
    if not isinstance(message, kind):
        raise PeerError(f"{type(message).__name__} came where {kind.__name__} was due")
    return message
