"""The channels of one attempt, as the destination has them.

For the side of the source see migrate.transport.channels.

    channel 0    the connection that said HELLO; it carries everything that is not pages, too
    channel n    another connection: JOIN with the token of ACCEPT --> <-- JOINED; pages and the
                 ends of rounds only

A connection becomes a channel only if it knows the token, which only the source has heard: any
program may connect, and a stranger's pages must not get into the guest.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from migrate.destination.greeting import HANDSHAKE_SECONDS
from migrate.errors import MigrationError, PeerLost
from migrate.transport.link import Link
from proto import ErrorCode, ProtoError
from proto.wire.capabilities import Agreement
from proto.wire.errors import MessageError
from proto.wire.messages import Join, Joined


@dataclass
class ReceivingChannels:
    """The TCP connections of one attempt.

    link      -- channel 0
    agreement -- the capabilities that are used in this attempt
    further   -- the links of the other channels, by their number
    """

    link: Link
    agreement: Agreement
    further: dict[int, Link] = field(default_factory=dict)

    @property
    def links(self) -> list[Link]:
        """All links in the order of their numbers; they join in any order."""
        return [self.link, *(self.further[channel] for channel in sorted(self.further))]

    @property
    def count(self) -> int:
        return 1 + len(self.further)

    @property
    def received_bytes(self) -> int:
        return sum(link.received_bytes for link in self.links)

    async def gather(
        self, token: bytes, count: int, accept: Callable[[], Awaitable[Link]],
        on_join: Callable[[], None],
    ) -> None:  # fmt: skip
        """Wait until `count` channels in all have joined.

        token   -- what ACCEPT told the source
        accept  -- returns the next connection that says JOIN
        on_join -- called as a channel joins

        Raise PeerLost if they do not all join in time, or the reason that the source gives.
        """
        gathering = _Gathering(self, token, count, on_join)
        admitting = asyncio.create_task(gathering.admit(accept))
        watching = asyncio.create_task(gathering.watch())
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                while len(self.further) < count - 1:
                    await gathering.next_event()
                    if watching.done():
                        await self.link.expect(Joined)  # raises the reason why it hung up
        except TimeoutError:
            raise PeerLost(
                f"only {len(self.further)} of {count - 1} further channels came within "
                f"{HANDSHAKE_SECONDS:g} s"
            ) from None
        finally:
            for task in (admitting, watching, *gathering.joining):
                task.cancel()


class _Gathering:
    """Admits connections until all channels have joined."""

    def __init__(
        self, channels: ReceivingChannels, token: bytes, count: int, on_join: Callable[[], None]
    ) -> None:
        self.joining: list[asyncio.Task[None]] = []
        self._channels = channels
        self._token = token
        self._count = count
        self._on_join = on_join
        self._changed = asyncio.Event()

    async def next_event(self) -> None:
        """Wait until a channel has joined or the first one has ended."""
        self._changed.clear()
        await self._changed.wait()

    async def admit(self, accept: Callable[[], Awaitable[Link]]) -> None:
        """Talk to each connection that comes, to all of them at the same time."""
        while True:
            link = await accept()
            self.joining.append(asyncio.create_task(self._join(link)))

    async def watch(self) -> None:
        """Wait for the end of channel 0: the source may hang up meanwhile."""
        await self._channels.link.ended()
        self._changed.set()

    async def _join(self, link: Link) -> None:
        """Make a connection a channel if its JOIN is right; else refuse and close it."""
        try:
            message = await link.receive_message()
            if not isinstance(message, Join) or not hmac.compare_digest(message.token, self._token):
                raise MessageError("this is no channel of the migration that goes on here")
            if message.channel >= self._count or message.channel in self._channels.further:
                raise MessageError(f"channel {message.channel} is not to be had")
            link.session.channel = message.channel
            link.share_receiving(self._count, compressed=self._channels.agreement.zstd)
            self._channels.further[message.channel] = link
            self._on_join()
            self._changed.set()
            await link.send(Joined())
        except (ProtoError, MigrationError) as error:
            await link.give_reason(getattr(error, "code", ErrorCode.PROTOCOL), str(error))
            await link.close()
        except asyncio.CancelledError:
            link.abort()
            raise
