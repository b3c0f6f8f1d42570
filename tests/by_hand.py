"""The two ends of a migration, each played step by step by a test.

They use links and the kernel alone, so that they can do what no honest peer does.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace
from typing import Any

import pytest
import xxhash

import migrate
from migrate.destination.destination import Destination
from migrate.errors import (
    PeerLost,
)
from migrate.guests.buffer import BufferPlace
from migrate.source.options import DEFAULT_OPTIONS, SourceOptions
from migrate.source.precopy import Source
from migrate.transport.address import Address
from migrate.transport.connect import connect
from migrate.transport.link import Link
from migrate.transport.listen import Listener, listen
from proto.codec.kernel import PageDecoder, PageEncoder, PageHashes
from proto.codec.pageset import PageSet
from proto.wire import capabilities
from proto.wire.frames import HEADER_BYTES, seal
from proto.wire.messages import (
    BATCH_BYTES,
    Accept,
    CacheSize,
    Complete,
    Error,
    Go,
    GuestInfo,
    Hello,
    Join,
    Joined,
    MessageType,
    Ready,
    Round,
    RoundAck,
    Running,
    unpack,
)
from tests.receiving import receive

PAGE = 4096
# A source of ours by hand deals out stripes of so many pages.
WIDTH = 256
SIZE = 4 * WIDTH * PAGE + 5
PAGES = 4 * WIDTH + 1
CONTENT = random.Random(7).randbytes(SIZE) + bytes(PAGES * PAGE - SIZE)
SEED = bytes(range(16))


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.005)


class Place(BufferPlace):
    discarded = False

    async def discard(self) -> None:
        self.discarded = True


class HandSource:
    """A source whose every step a test takes, connected to a real Destination."""

    def __init__(self, listener: Listener, near: Link, far: Link, accepts: bool) -> None:
        self.listener = listener
        self.links = [near]
        self.places: list[Place] = []
        self.token = b""
        accept = listener.accept if accepts else None
        self.destinations: list[Destination] = []
        self.running = asyncio.create_task(
            receive(far, self._placer, self.destinations.append, accept_channel=accept)
        )
        hashes = PageHashes(PAGES, PAGE, SEED)
        self.hashes = hashes
        self.encoder = PageEncoder(hashes, headroom=HEADER_BYTES, room=BATCH_BYTES)

    def _placer(self, info: GuestInfo) -> Place:
        self.places.append(Place(info))
        return self.places[-1]

    async def describe(self, channels: int) -> None:
        main = self.links[0]
        await main.send(capabilities.offer(capabilities.OPTIONAL))
        assert isinstance(await main.receive_message(), Hello)
        await main.send(GuestInfo("buffer", SIZE, PAGE, SEED, channels))
        answer = await main.receive_message()
        assert isinstance(answer, Accept), answer
        self.token = answer.token

    async def knock(self, message: Any) -> tuple[Link, Any]:
        """Open a connection with this first message; return its link and the answer."""
        link = await connect(self.listener.address)
        await link.send(message)
        if isinstance(message, Join):
            link.session.channel = message.channel
        return link, await link.receive_message()

    async def join(self, channel: int) -> None:
        link, answer = await self.knock(Join(self.token, channel))
        assert answer == Joined()
        self.links.append(link)

    def batch(self, number: int, pages: range, channel: int) -> tuple[memoryview, memoryview]:
        self.encoder.begin_round(number)
        page = pages.start
        while page < pages.stop:
            snapshot, numbers = self.encoder.space()
            count = min(len(numbers), pages.stop - page)
            for i in range(count):
                numbers[i] = page + i
            snapshot[: count * PAGE] = CONTENT[page * PAGE : (page + count) * PAGE]
            self.encoder.feed(count, PageSet.full(PAGES).bits)
            page += count
        head, data = self.encoder.finish_batch()
        seal(head, MessageType.PAGES, channel, len(data))
        return head, data

    async def send_pages(self, number: int = 1, to: int | None = None) -> None:
        """All pages, each over its channel, or a stripe over the channel that is named."""
        step = WIDTH // 8  # many channels take short batches
        start, stop = (0, PAGES) if to is None else (to * WIDTH, min((to + 1) * WIDTH, PAGES))
        for first in range(start, stop, step):
            pages = range(first, min(first + step, PAGES))
            channel = first // WIDTH % len(self.links) if to is None else to
            await self.links[channel].send_batch(*self.batch(number, pages, channel))

    async def end_round(self, number: int, last: bool = False) -> None:
        for link in reversed(self.links):
            await link.send(Round(number, 0, 0, last))

    async def complete(self) -> None:
        """The rest of a migration that nothing has disturbed."""
        main = self.links[0]
        await self.send_pages()
        await self.end_round(1)
        ack = await main.receive_message()
        assert isinstance(ack, RoundAck)
        assert (ack.number, ack.stale_pages) == (1, 0)
        await self.end_round(2, last=True)
        await main.send(Complete(xxhash.xxh3_128_digest(self.hashes.table), b""))
        assert isinstance(await main.receive_message(), RoundAck)
        assert isinstance(await main.receive_message(), Ready)
        await main.send(Go())
        assert await main.receive_message() == Running()
        await self.running
        assert bytes(self.places[0].received) == CONTENT[:SIZE]

    async def refused(self, kind: type[Exception], match: str, exit_code: int = 4) -> str:
        """Assert that the destination fails, says why on each channel, and keeps nothing."""
        with pytest.raises(migrate.MigrationError, match=match) as raised:
            await self.running
        assert isinstance(raised.value.__cause__ or raised.value, kind)
        assert raised.value.exit_code == exit_code
        assert self.places[0].discarded
        if kind is not PeerLost:
            for link in self.links:
                with contextlib.suppress(PeerLost):
                    answer = await link.receive_message()
                    while not isinstance(answer, Error):
                        answer = await link.receive_message()
                    assert answer.reason == str(raised.value)
        return str(raised.value)


@contextlib.asynccontextmanager
async def hand_source(channels: int = 3, *, accepts: bool = True, describe: bool = True):
    async with asyncio.timeout(60):
        listener = await listen(Address("127.0.0.1", 0))
        near = await connect(listener.address)
        hand = HandSource(listener, near, await listener.accept(), accepts)
        try:
            if describe:
                await hand.describe(channels)
            yield hand
        finally:
            hand.running.cancel()
            await asyncio.wait([hand.running])
            for link in hand.links:
                link.abort()
                await link.close()
            await listener.close()


class HandDestination:
    """A destination whose every step a test takes, connected to a real Source."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.links: list[Link] = []
        self.memory = bytearray(PAGES * PAGE)
        self.info: GuestInfo | None = None
        self.seen: list[tuple[int, str, int]] = []
        self.capable = capabilities.OPTIONAL

    async def accept(self, capable: frozenset[str] | None = None) -> None:
        await self.accept_as(Accept(bytes(16)), capable)

    async def accept_as(self, answer: Accept, capable: frozenset[str] | None = None) -> None:
        capable = self.capable if capable is None else capable
        main = await self.listener.accept()
        self.links.append(main)
        hello = await main.receive_message()
        assert isinstance(hello, Hello)
        await main.send(capabilities.answer(hello, capable)[0])
        info = await main.receive_message()
        assert isinstance(info, GuestInfo)
        self.info = info
        self.decoder = PageDecoder(PageHashes(PAGES, PAGE, info.hash_seed), SIZE)
        await main.send(answer)

    async def admit(self) -> None:
        link = await self.listener.accept()
        join = await link.receive_message()
        assert isinstance(join, Join)
        assert (join.token, join.channel) == (bytes(16), len(self.links))
        link.session.channel = join.channel
        self.links.append(link)
        await link.send(Joined())

    async def admit_all(self) -> None:
        assert self.info is not None
        while len(self.links) < self.info.channels:
            await self.admit()

    async def take_round(self, channel: int) -> Round:
        """Apply what arrives on a channel up to the end of a round."""
        while True:
            frame = await self.links[channel].receive()
            if frame.type is MessageType.PAGES:
                number, _ = self.decoder.check(frame.head, len(frame.data))
                first = int.from_bytes(frame.head[4:12], "big")
                self.seen.append((channel, f"batch {number}", first))
                self.decoder.apply(frame.head, frame.data, self.memory)
                frame.release()
                continue
            message = unpack(frame.type, frame.head)
            frame.release()
            if isinstance(message, Round):
                self.seen.append((channel, "round", message.number))
                return message
            assert isinstance(message, CacheSize)

    async def take_rounds(self) -> Round:
        ended = await asyncio.gather(*map(self.take_round, range(len(self.links))))
        assert len(set(ended)) == 1, "every channel says the same of a round"
        return ended[0]

    async def acknowledge(self, number: int) -> None:
        await self.links[0].send(RoundAck(number, 0.0, 0.0, 0, 0))

    async def finish(self) -> Complete:
        while True:
            ended = await self.take_rounds()
            await self.acknowledge(ended.number)
            if ended.last:
                break
        complete = await self.links[0].receive_message()
        assert isinstance(complete, Complete)
        await self.links[0].send(Ready(0.0))
        assert await self.links[0].receive_message() == Go()
        return complete


@contextlib.asynccontextmanager
async def hand_destination(
    channels: int = 3, *, content: bytes = CONTENT[:SIZE], options: SourceOptions = DEFAULT_OPTIONS,
    dials: bool = True, **parameters: Any,
):  # fmt: skip
    """Run a source against a destination that the test plays by hand.

    dials -- whether the source has a way to connect again
    """
    async with asyncio.timeout(60):
        listener = await listen(Address("127.0.0.1", 0))
        guest = migrate.BufferGuest(bytearray(content))
        near = await connect(listener.address)
        address = listener.address
        if dials and options.dial is None:
            options = replace(options, dial=lambda: connect(address))
        source = Source(guest, near, migrate.Parameters(channels=channels, **parameters), options)
        hand = HandDestination(listener)
        running = asyncio.create_task(source.run())
        try:
            yield hand, source, running
        finally:
            running.cancel()
            await asyncio.wait([running])
            for link in hand.links:
                link.abort()
                await link.close()
            await listener.close()


async def assert_kept(source: Source) -> None:
    """The guest is the source's, and its writers get in."""
    assert not source.committed
    async with source.guest.writing():
        source.guest.memory.view[0] ^= 1
