"""Gives each new connection to what it is for, by the first message that it sends.

    HELLO  a source brings a guest   -> `guest()`, once it is described; to the Destination that is
                                        receiving if it resumes that migration; else refused
           or only measures the path -> greet() answers, and nothing comes of it (PROBE)
    JOIN   a channel of a migration  -> `channel()`
    QUERY  what became of a guest?   -> migrate.ownership.records answers

A connection is given some time for its first message. All are listened to at the same time, so a
silent one delays no other. If there are too many, the AdmissionQueue decides which one is dropped.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping
from types import TracebackType

from migrate.destination.destination import Destination
from migrate.destination.greeting import Introduction, NoPlaceError, greet
from migrate.errors import MigrationError, PeerLost
from migrate.ownership.records import Records, answer
from migrate.runtime.cancellation import finish
from migrate.transport.address import Address
from migrate.transport.admission import SHOWN, SILENT, SPEAKS, AdmissionQueue
from migrate.transport.link import Link, close_all
from migrate.transport.listen import Listener
from proto import ErrorCode, ProtoError
from proto.wire.messages import MAX_CHANNELS, MessageType

logger = logging.getLogger(__name__)

# Every peer of ours speaks as soon as it is connected: only the path can keep its first message
# back, by lost packets, and TCP repeats one that is lost three times in a row within 7 s.
FIRST_MESSAGE_SECONDS = 15.0


class Acceptor:
    """Dispatches the connections of a listener while its context lasts.

    welcome  -- makes a Destination of a source that has described its guest
    switches -- the optional capabilities, by name; asked for each source anew
    refused  -- called with the name of each peer that is refused, and why
    probed   -- called with the link of each source that has only measured the path
    """

    def __init__(
        self, listener: Listener, records: Records, welcome: Callable[[Introduction], Destination],
        *, switches: Callable[[], Mapping[str, bool]] = lambda: {},
        refused: Callable[[str, str], None] = lambda _name, _why: None,
        probed: Callable[[Link], None] = lambda _link: None,
    ) -> None:  # fmt: skip
        self.records = records
        self._listener = listener
        self._welcome = welcome
        self._switches = switches
        self._refused = refused
        self._probed = probed
        self._current: Destination | None = None
        self._guests: asyncio.Queue[Introduction] = asyncio.Queue(MAX_CHANNELS)
        self._channels: asyncio.Queue[Link] = asyncio.Queue(MAX_CHANNELS)
        self._undecided: AdmissionQueue[Link] = AdmissionQueue(self._drop)
        self._dispatching: dict[Link, asyncio.Task[None]] = {}
        self._accepting: asyncio.Task[None] | None = None

    @property
    def addresses(self) -> list[Address]:
        return self._listener.addresses

    async def __aenter__(self) -> Acceptor:
        self._accepting = asyncio.create_task(self._accept())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await finish(self._close())

    async def _close(self) -> None:
        """Close every connection that has no owner yet, and refer to no caller any more."""
        links, tasks = [*self._dispatching], [*self._dispatching.values()]
        if self._accepting is not None:
            tasks.append(self._accepting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while not self._channels.empty():
            links.append(self._channels.get_nowait())
        while not self._guests.empty():
            links.append(self._guests.get_nowait().link)
        for link in links:
            link.abort()
        await close_all(links)
        await self._listener.close()
        self._current = None
        self._welcome = _closed

    async def guest(self) -> Destination:
        """Return a Destination, to be run, for the next guest that is described.

        The one returned before is forgotten: its source cannot resume it any more.
        """
        self._current = None
        self._current = self._welcome(await self._guests.get())
        return self._current

    async def channel(self) -> Link:
        """Return the next connection that has said JOIN; the JOIN is still to be received."""
        return await self._channels.get()

    @property
    def _busy(self) -> bool:
        """Whether a guest is being received: another one is refused."""
        return self._current is not None and self._current.started

    async def _accept(self) -> None:
        while True:
            link = await self._listener.accept()
            self._undecided.add(link, link.peer_address, SHOWN if link.authenticated else SILENT)
            self._dispatching[link] = task = asyncio.create_task(self._dispatch(link))
            task.add_done_callback(functools.partial(self._dispatched, link))

    def _dispatched(self, link: Link, _task: asyncio.Task[None]) -> None:
        self._undecided.discard(link)
        del self._dispatching[link]

    def _drop(self, link: Link) -> None:
        """Drop a connection: there are too many."""
        logger.debug("%s is dropped: too many connections", link.peer_name)
        self._dispatching[link].cancel()
        link.abort()

    async def _dispatch(self, link: Link) -> None:
        """Give a connection to what it is for; never raises but for a cancellation."""
        try:
            async with asyncio.timeout(FIRST_MESSAGE_SECONDS):
                kind = await link.first_type()
            self._undecided.promote(link, SPEAKS)
            if kind is MessageType.QUERY:
                await answer(link, self.records)
            elif kind is MessageType.JOIN and self._busy:
                self._channels.put_nowait(link)
            elif kind is MessageType.HELLO:
                await self._greet(link)
            else:
                reason = "no migration waits for a channel here"
                await self._refuse(link, ErrorCode.PROTOCOL, reason)
        except PeerLost as error:
            self._refused(link.peer_name, str(error))
            await link.close()
        except TimeoutError:
            await self._refuse(link, ErrorCode.PROTOCOL, "nothing was said")
        except asyncio.QueueFull:
            await self._refuse(link, ErrorCode.NO_PLACE, "too many connections wait here")
        except (ProtoError, MigrationError) as error:
            code = getattr(error, "code", ErrorCode.PROTOCOL)
            await self._refuse(link, code, str(error))
        except asyncio.CancelledError:
            link.abort()
            raise

    async def _greet(self, link: Link) -> None:
        introduction = await greet(link, self._switches(), busy=self._busy)
        if introduction is None:
            self._probed(link)
            await link.close()
        elif self._current is not None and self._current.resume_with(introduction):
            logger.debug("%s resumes the migration that goes on here", link.peer_name)
        elif self._busy:
            raise NoPlaceError("another guest is being received here just now")
        else:
            self._guests.put_nowait(introduction)

    async def _refuse(self, link: Link, code: ErrorCode, reason: str) -> None:
        self._refused(link.peer_name, reason)
        await link.give_reason(code, reason)
        await link.close()


def _closed(_introduction: Introduction) -> Destination:
    raise PeerLost("no connection is accepted any more")
