"""QEMU's events, handed to those that listen for them.

    Client --publish--> Listeners --> Events, Events, ...     each keeps what its reader has not
                                                              fetched, up to MAX_KEPT_EVENTS

QEMU sends an event once, so open an iterator before the command whose events it is to get. The last
event of each iterator is CLOSED.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType

from migrate.qemu.qmp.messages import CLOSED, Event, closed

# QEMU does not limit the rate of migration events: more than 100 passes a second have been seen.
MAX_KEPT_EVENTS = 1024


class Listeners:
    """The open iterators over the events of one connection.

    ended -- why the connection has ended; None while it is open
    """

    def __init__(self) -> None:
        self.ended: str | None = None
        self._open: set[Events] = set()

    def add(self, events: Events) -> None:
        """Pass events on to an iterator from now on; CLOSED at once if the connection has ended."""
        self._open.add(events)
        if self.ended is not None:
            events.put(closed(self.ended))

    def discard(self, events: Events) -> None:
        """Pass nothing on to this iterator any more."""
        self._open.discard(events)

    def publish(self, event: Event) -> None:
        """Pass an event on to every open iterator."""
        for events in list(self._open):
            events.put(event)

    def end(self, why: str) -> None:
        """End every iterator, now and later: the connection has ended."""
        self.ended = why
        self.publish(closed(why))


class Events:
    """An iterator over the events that arrive while its context is open. CLOSED ends it.

    names -- the events to keep, beside CLOSED; empty: all

    It keeps the latest MAX_KEPT_EVENTS events that were not fetched; `missed` counts older ones
    that it has dropped.
    """

    def __init__(self, listeners: Listeners, names: tuple[str, ...]) -> None:
        self.missed = 0
        self._listeners = listeners
        self._names = frozenset(names)
        self._kept: deque[Event] = deque(maxlen=MAX_KEPT_EVENTS)
        self._arrived = asyncio.Event()
        self._over = False

    def __enter__(self) -> Events:
        self._listeners.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listeners.discard(self)

    def put(self, event: Event) -> None:
        """Keep an event that has just arrived, if it is one of `names`."""
        if event.name == CLOSED or not self._names or event.name in self._names:
            self.missed += len(self._kept) == MAX_KEPT_EVENTS
            self._kept.append(event)
            self._over = event.name == CLOSED
            self._arrived.set()

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> Event:
        """Wait for the next event. Cancellation, as by a timeout, loses no event."""
        while not self._kept:
            if self._over:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._kept.popleft()
