"""The channels of one attempt, as the source has them: opened, read and closed together.

A channel is one TCP connection. All of them carry pages; the first one carries everything else. If
one of them ends, the attempt does. The destination has them in migrate.destination.channels.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from migrate.errors import PeerError, PeerLost, UsageError, peer_error
from migrate.runtime.cancellation import finish
from migrate.transport.link import SEND_HIGH, Link, close_all, expect, give_reason_on
from proto import ErrorCode
from proto.wire.messages import Error, Join, Joined, Message, Running

T = TypeVar("T")
# Time for the destination to read what was sent before the reason why we hang up.
HEARD_SECONDS = 1.0
Dial = Callable[[], Awaitable[Link]]


class Channels:
    """The channels of one attempt: one at first; `open` adds the further ones.

    link  -- the first channel
    dial  -- connects to the destination once more
    aside -- called with each message first; returns True if it has handled the message, which
             `expect` does not see then
    """

    def __init__(
        self, link: Link, dial: Dial | None = None,
        aside: Callable[[Message], bool] = lambda _message: False,
    ) -> None:  # fmt: skip
        self.link = link
        self.links = [link]
        self.handed_over = False
        """GO was sent: an ERROR answers it, and the end of a further channel means nothing."""
        self._dial = dial
        self._aside = aside
        self._inbox: asyncio.Queue[Message] = asyncio.Queue(64)
        self._group: asyncio.TaskGroup | None = None
        self._readers: list[asyncio.Task[None]] = []

    @property
    def sent_bytes(self) -> int:
        return sum(link.sent_bytes for link in self.links)

    @property
    def channel_bytes(self) -> int:
        """How much of `sent_bytes` went over further channels."""
        return self.sent_bytes - self.link.sent_bytes

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Receive what the destination says while this context lasts.

        Raise what ends a channel, PeerLost or what the destination said, in an ExceptionGroup.
        """
        try:
            async with asyncio.TaskGroup() as self._group:
                self._readers = [self._group.create_task(self._read())]
                try:
                    yield
                finally:
                    for task in self._readers:
                        task.cancel()
        finally:
            self._group, self._readers = None, []

    async def _read(self) -> None:
        while True:
            message = await self.link.receive_message()
            if isinstance(message, Error) and not self.handed_over:
                raise peer_error(message)
            if not self._aside(message):
                await self._inbox.put(message)
                if isinstance(message, Running | Error):
                    return

    async def _read_channel(self, link: Link) -> None:
        """Receive a further channel. Only why it ends may come; after GO that does not count."""
        try:
            message = await link.receive_message()
        except PeerLost:
            if self.handed_over:
                return
            raise
        if isinstance(message, Error):
            if self.handed_over:
                return  # the first channel says so too, and the answer to GO is taken there alone
            raise peer_error(message)
        raise PeerError(f"{type(message).__name__} came on a channel that only carries pages")

    async def expect(self, kind: type[T]) -> T:
        """Return the next message, which must be of this kind.

        Raise PeerError, or what an ERROR says.
        """
        return expect(await self._inbox.get(), kind)

    async def open(self, count: int, token: bytes) -> None:
        """Open further channels, so that there are `count` in all.

        All at the same time: one after the other would cost two round trips each, and a second for
        each SYN that is lost (RFC 6298).
        """
        async with asyncio.TaskGroup() as group:
            for channel in range(1, count):
                group.create_task(self._open(channel, token))
        self.links.sort(key=lambda link: link.session.channel)
        assert self._group is not None
        for link in self.links:
            # All of them together queue what a single one would, and a batch each.
            link.limit_write_buffer(SEND_HIGH // len(self.links))
            if link is not self.link:
                self._readers.append(self._group.create_task(self._read_channel(link)))

    async def _open(self, channel: int, token: bytes) -> None:
        dial = self.link.redial or self._dial  # a name may have other machines too
        if dial is None:
            raise UsageError("several channels need a way to connect again")
        link = await dial()
        link.limit = self.link.limit
        self.links.append(link)
        await link.send(Join(token, channel))
        link.session.channel = channel
        await link.expect(Joined)

    async def give_reason(self, code: ErrorCode, reason: str) -> None:
        """Tell the destination why we hang up, and give it time to read that.

        The destination still answers what came before. If we had closed the connection by then, its
        answer would reset the connection, and what it has not read yet, the reason too, is lost.
        """
        await give_reason_on(self.links, code, reason)
        await self.link.until_peer_closes(HEARD_SECONDS)

    async def close(self) -> None:
        """Close all channels, and refer to no caller any more."""
        self._aside = lambda _message: False
        await finish(close_all(self.links))
