"""The door: whoever connects says first what for, and is led there.

    HELLO  a guest comes          -> `guest()`, once it is described; or to the one that is received
                                     where it is that one, come back; or sent away
           or is only thought of  -> the way here is measured, and nothing else (PROBE)
    JOIN   a channel of it        -> `lane()`
    QUERY  what became of one?    -> answered here (migrate.handover)

Somebody who says nothing, or no more than half of it, is let stand for a while; who has to go of
too many is in migrate.crowd. All of them are listened to at the same time.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from types import TracebackType

from migrate.address import Address
from migrate.cancellation import finished
from migrate.crowd import SHOWN, SILENT, SPEAKS, Crowd
from migrate.destination import Destination
from migrate.errors import MigrationError, PeerLost
from migrate.handover import Records, answer
from migrate.link import Link, close_all
from migrate.listening import Listener
from proto import ErrorCode, ProtoError
from proto.messages import MAX_CHANNELS, MessageType

FIRST_WORD_SECONDS = 15.0


class _Visit:
    """A connection, and the task that leads it."""

    task: asyncio.Task[None]

    def __init__(self, link: Link) -> None:
        self.link = link

    def end(self) -> None:
        self.task.cancel()
        self.link.abort()


class Door:
    """Leads connections from a listener where they belong, as long as its context lasts.

    greeter -- makes a destination for a link that brings a guest
    refused -- told of whoever is sent away: its name, and the reason
    """

    def __init__(
        self, listener: Listener, records: Records, greeter: Callable[[Link], Destination],
        refused: Callable[[str, str], None] = lambda _who, _why: None,
    ) -> None:  # fmt: skip
        self.records = records
        self._greeter = greeter
        self._current: Destination | None = None
        self._refused = refused
        self._listener = listener
        self._guests: asyncio.Queue[Destination] = asyncio.Queue(MAX_CHANNELS)
        self._lanes: asyncio.Queue[Link] = asyncio.Queue(MAX_CHANNELS)
        self._standing: Crowd[_Visit] = Crowd(_Visit.end)
        self._opening: asyncio.Task[None] | None = None

    @property
    def addresses(self) -> list[Address]:
        return self._listener.addresses

    async def __aenter__(self) -> Door:
        self._opening = asyncio.create_task(self._open())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await finished(self._close())

    async def _close(self) -> None:
        """Nobody is led any more, and nothing refers to who was."""
        assert self._opening is not None
        tasks = [self._opening, *(visit.task for visit in self._standing.members())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        links = [visit.link for visit in self._standing.members()]
        while not self._lanes.empty():
            links.append(self._lanes.get_nowait())
        while not self._guests.empty():
            links.append(self._guests.get_nowait().link)
        for link in links:
            link.abort()
        await close_all(links)
        await self._listener.close()
        self._current = None
        self._greeter = _closed

    async def guest(self) -> Destination:
        """The next guest that was described: run it. The last one is no concern any more."""
        self._current = None
        self._current = await self._guests.get()
        return self._current

    def _busy(self) -> bool:
        """Whether a guest is being received: another one is sent away then."""
        return self._current is not None and self._current.started

    async def lane(self) -> Link:
        """The next connection that is to be a channel."""
        return await self._lanes.get()

    async def _open(self) -> None:
        while True:
            link = await self._listener.accept()
            visit = _Visit(link)
            self._standing.come(visit, link.far, SHOWN if link.proved else SILENT)
            visit.task = asyncio.create_task(self._lead(visit))
            visit.task.add_done_callback(functools.partial(self._left, visit))

    def _left(self, visit: _Visit, _task: asyncio.Task[None]) -> None:
        self._standing.go(visit)

    async def _lead(self, visit: _Visit) -> None:
        link = visit.link
        try:
            async with asyncio.timeout(FIRST_WORD_SECONDS):
                kind = await link.first_type()
            self._standing.rise(visit, SPEAKS)
            if kind is MessageType.QUERY:
                await answer(link, self.records)
            elif kind is MessageType.JOIN and self._busy():
                self._lanes.put_nowait(link)
            elif kind is MessageType.HELLO:
                await self._greet(link)
            else:
                reason = "no migration waits for a channel here"
                await self._send_away(link, ErrorCode.PROTOCOL, reason)
        except PeerLost as error:
            self._refused(link.peer_name, str(error))
            await link.close()
        except TimeoutError:
            await self._send_away(link, ErrorCode.PROTOCOL, "nothing was said")
        except asyncio.QueueFull:
            await self._send_away(link, ErrorCode.NO_PLACE, "too many connections wait here")
        except (ProtoError, MigrationError) as error:
            code = getattr(error, "code", ErrorCode.PROTOCOL)
            await self._send_away(link, code, str(error))
        except asyncio.CancelledError:
            link.abort()
            raise

    async def _greet(self, link: Link) -> None:
        destination = self._greeter(link)
        if not await destination.greet(busy=self._busy()):
            await link.close()
            return
        if self._current is not None and self._current.take_in(destination):
            return
        if self._busy():
            reason = "another guest is being received here just now"
            await self._send_away(link, ErrorCode.NO_PLACE, reason)
        else:
            self._guests.put_nowait(destination)

    async def _send_away(self, link: Link, code: ErrorCode, reason: str) -> None:
        self._refused(link.peer_name, reason)
        await link.give_reason(code, reason)
        await link.close()


def _closed(_link: Link) -> Destination:
    raise PeerLost("nobody is let in any more")
