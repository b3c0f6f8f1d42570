"""The connections of one attempt, as the source has them: opened, read and closed together.

All of them carry pages; the first one carries everything else. Where one of them ends, all do.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from migrate.cancellation import finished
from migrate.errors import PeerError, PeerLost, UsageError, peer_error
from migrate.link import SEND_HIGH, Link, close_all, give_reason_on
from proto import ErrorCode
from proto.messages import Error, Join, Joined, Message, Running

T = TypeVar("T")
# So long the destination has to read what comes before the reason why we hang up.
HEARD_SECONDS = 1.0
Dial = Callable[[], Awaitable[Link]]


class Channels:
    """Begins with one link; `open` adds the further ones.

    dial -- connects to the destination once more
    aside -- told each message first; True: it has taken it, and nobody waits for it
    """

    def __init__(
        self, link: Link, dial: Dial | None = None,
        aside: Callable[[Message], bool] = lambda _message: False,
    ) -> None:  # fmt: skip
        self.link = link
        self.links = [link]
        self.handed_over = False
        """GO was sent: an ERROR is an answer to it, and further channels mean nothing any more."""
        self._dial = dial
        self._aside = aside
        self._inbox: asyncio.Queue[Message] = asyncio.Queue(64)
        self._group: asyncio.TaskGroup | None = None
        self._readers: list[asyncio.Task[None]] = []

    @property
    def sent_bytes(self) -> int:
        return sum(link.sent_bytes for link in self.links)

    @property
    def lane_bytes(self) -> int:
        """What of it went over further channels."""
        return self.sent_bytes - self.link.sent_bytes

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """As long as this lasts, what the destination says is taken in.

        Raises what ends a channel, PeerLost or what the destination said, in an ExceptionGroup.
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

    async def _read_lane(self, lane: Link) -> None:
        """A further channel has nothing to say but why it ends; after GO, not even that."""
        try:
            message = await lane.receive_message()
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
        """The next message, which is of this kind. Raises PeerError, or what an ERROR says."""
        message = await self._inbox.get()
        if isinstance(message, Error):
            raise peer_error(message)
        if not isinstance(message, kind):
            raise PeerError(f"{type(message).__name__} came where {kind.__name__} was due")
        return message

    async def open(self, count: int, token: bytes) -> None:
        """Opens further channels, `count` in all, at the same time: one after the other costs two
        round trips each, and a second for each SYN that is lost."""
        async with asyncio.TaskGroup() as group:
            for channel in range(1, count):
                group.create_task(self._open(channel, token))
        self.links.sort(key=lambda link: link.session.channel)
        assert self._group is not None
        for link in self.links:
            # All of them together queue what a single one would, and a batch each.
            link.bound_sending(SEND_HIGH // len(self.links))
            if link is not self.link:
                self._readers.append(self._group.create_task(self._read_lane(link)))

    async def _open(self, channel: int, token: bytes) -> None:
        dial = self.link.beside or self._dial  # a name may have other machines too
        if dial is None:
            raise UsageError("several channels need a way to connect again")
        lane = await dial()
        lane.limit = self.link.limit
        self.links.append(lane)
        await lane.send(Join(token, channel))
        lane.session.channel = channel
        answer = await lane.receive_message()
        if isinstance(answer, Error):
            raise peer_error(answer)
        if not isinstance(answer, Joined):
            raise PeerError(f"{type(answer).__name__} came where JOINED was due")

    async def give_reason(self, code: ErrorCode, reason: str) -> None:
        """Tells the destination why we hang up, and lets it hear that, if it still can.

        It answers what came before; where we had closed the connection by then, that would reset
        it, and what it has not read yet, the reason among it, would be lost.
        """
        await give_reason_on(self.links, code, reason)
        await self.link.hung_up(HEARD_SECONDS)

    async def close(self) -> None:
        """Nothing that it was given is referred to any more."""
        self._aside = lambda _message: False
        await finished(close_all(self.links))
