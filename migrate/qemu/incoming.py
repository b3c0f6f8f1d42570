"""Receives a stream of QEMU's at the destination: item by item, in the source's order.

    channels --item k from channel k modulo n--> worker: check, write records --> Loader
    channels <-------- TAKEN, BYTES of the return path ------------------------- Loader

The source deals the items of the stream to the channels in turn; the loader needs them in order. An
item is checked as a whole before any byte of it reaches the loader, and what is withheld reaches it
after GO. TAKEN counts the items that the loader has been sent: after a broken connection the source
sends the others.

Two items are under way at most: one that the worker writes for the loader, and the next one, which
is being received. A channel is only received from in its turn, so its link stops reading, and TCP
stops the source. The first channel is an exception: TAKEN, ERROR and COMPLETE must not wait behind
its items, so up to QUEUED_ITEMS of them are set aside.

The worker writes an item to its end even if the connection breaks meanwhile. So an item counts once
it is written, whatever became of its connection: else the source would send it again, and QEMU
would read it twice.

The guest's memory is QEMU's alone: deltas are passed on as they are, and QEMU applies them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

import xxhash

from migrate.destination.channels import ReceivingChannels
from migrate.destination.receiver import Receiver, Reception
from migrate.errors import MismatchError, PeerError, peer_error
from migrate.memory.memory import private_buffer
from migrate.qemu.stream.place import StreamPlace
from migrate.runtime.cancellation import finish
from migrate.transport.link import Link
from proto.codec.kernel import PageHashes
from proto.qemu.kernel import RamWriter
from proto.wire.compressed import BatchOpener
from proto.wire.frames import Frame
from proto.wire.messages import (
    MAX_RETURNED,
    Blocks,
    Bytes,
    CacheSize,
    Complete,
    Error,
    GuestInfo,
    MessageType,
    Taken,
    body_limits,
    unpack,
)

logger = logging.getLogger(__name__)

# The records of an item are written for the loader in pieces of this size.
RECORD_BYTES = 1 << 20
# Items of the first channel that may wait for their turn (see above).
QUEUED_ITEMS = 2
# The state in COMPLETE: be64 number of items, u8 whether the stream opens its return path.
STATE_BYTES = 9


@dataclass
class _Attempt:
    """The state of one connection: from GUEST to COMPLETE, or to a break.

    queue    -- items of the first channel that wait for their turn
    complete -- the result is COMPLETE, which ends the attempt
    begun    -- items that came, of all attempts: the last one may not have reached the loader yet
    """

    channels: ReceivingChannels
    opener: BatchOpener
    writer: RamWriter
    queue: asyncio.Queue[Frame]
    complete: asyncio.Future[Complete]
    begun: int


class StreamReceiver(Receiver):
    """Receives a stream, for a StreamPlace."""

    def __init__(self, reception: Reception) -> None:
        super().__init__(reception)
        assert isinstance(reception.place, StreamPlace)
        self._place = reception.place
        self._info: GuestInfo | None = None
        self._writer: RamWriter | None = None
        self._records = private_buffer(RECORD_BYTES)
        self._digest = xxhash.xxh3_128()
        self._items = 0  # sent to the loader
        self._returned = ReturnedMessages()

    async def receive(
        self, channels: ReceivingChannels, info: GuestInfo, *, resumes: bool
    ) -> Complete:
        """Receive items until COMPLETE; see Receiver.

        Raises MigrationError if the loader is lost.
        """
        ours = self._info or info
        if (info.hash_seed, info.channels) != (ours.hash_seed, ours.channels):
            raise PeerError("the stream goes on with another seed, or over other channels")
        self._info = info
        if resumes:
            await channels.link.send(Taken(self._items))
        if self._writer is None or not self._items:
            self._writer = await self._begin(channels.link, info)
        self._returned.restart(resumes=resumes)
        attempt = _Attempt(
            channels, BatchOpener(body_limits(channels.count, 0)[MessageType.PAGES]),
            self._writer, asyncio.Queue(QUEUED_ITEMS),
            asyncio.get_running_loop().create_future(), self._items,
        )  # fmt: skip
        sequence = asyncio.create_task(self._sequence(attempt))
        beside = [
            asyncio.create_task(self._receive_first(attempt)),
            asyncio.create_task(self._returned.send_all(channels.link)),
        ]
        waited: set[asyncio.Future[None]] = {sequence, *beside, self._place.loader.lost}
        try:
            while not sequence.done():
                done, waited = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    one.result()
            return attempt.complete.result()
        finally:
            for task in (sequence, *beside):
                task.cancel()
            await finish(asyncio.gather(sequence, *beside, return_exceptions=True))
            while not attempt.queue.empty():
                attempt.queue.get_nowait().release()

    async def _begin(self, link: Link, info: GuestInfo) -> RamWriter:
        """Receive the list of RAM blocks, and return what writes records for them."""
        blocks = await link.expect(Blocks)
        self._reception.on_confirmed()
        if sum(pages for _, pages in blocks.blocks) != info.pages:
            raise PeerError("the blocks have other pages than the guest")
        logger.debug("the stream has the RAM blocks %s", blocks.blocks)
        self._place.announce(blocks.blocks, info.page_size)
        self._place.loader.on_return = self._return
        hashes = PageHashes(info.pages, info.page_size, info.hash_seed)
        return RamWriter(hashes, blocks.blocks)

    async def _receive_first(self, attempt: _Attempt) -> None:
        """Receive what comes over the first channel: queue its items, handle other messages."""
        link = attempt.channels.link
        while True:
            frame = await link.receive()
            self._reception.on_confirmed()
            if frame.type in (MessageType.PAGES, MessageType.BYTES):
                await attempt.queue.put(frame)
                continue
            try:
                message = unpack(frame.type, frame.head)
            finally:
                frame.release()
            if isinstance(message, Complete):
                attempt.complete.set_result(message)
                return
            if isinstance(message, Error):
                raise peer_error(message)
            if isinstance(message, CacheSize):
                self._arrival.cache_size = message.size
            elif isinstance(message, Taken):
                self._returned.confirm(message.items)
            else:
                raise PeerError(f"{type(message).__name__} came, which no stream has")

    async def _sequence(self, attempt: _Attempt) -> None:
        """Give the loader item after item until all have come.

        While one item is written, the next one is received.
        """
        links, channel = attempt.channels.links, 0
        writing: asyncio.Task[None] | None = None
        try:
            while (frame := await self._next(attempt, links, channel)) is not None:
                if writing is not None:
                    await asyncio.shield(writing)
                attempt.begun += 1
                channel = (channel + 1) % len(links)
                writing = asyncio.create_task(self._take(frame, attempt))
                writing.add_done_callback(attempt.channels.link.fail_with)
            if writing is not None:
                await asyncio.shield(writing)
        finally:
            # The worker thread writes an item to its end even if we are cancelled meanwhile, so
            # the item must be counted.
            if writing is not None:
                with contextlib.suppress(BaseException):
                    await asyncio.shield(writing)

    async def _take(self, frame: Frame, attempt: _Attempt) -> None:
        """Give the loader one item, and confirm it to the source."""
        loop, writer, arrival = asyncio.get_running_loop(), attempt.writer, self._arrival
        await loop.run_in_executor(self._worker, self._write, frame, attempt)
        self._items += 1
        self.progress += 1
        arrival.zero, arrival.raw, arrival.delta = writer.zero, writer.raw, writer.delta
        arrival.received = attempt.channels.received_bytes
        self._reception.on_superseded()
        await attempt.channels.link.send(Taken(self._items))

    async def _next(self, attempt: _Attempt, links: list[Link], channel: int) -> Frame | None:
        """Return the next item, which comes over `channel`; None if all have come."""
        complete = attempt.complete
        while True:
            if complete.done():
                count, _ = _state(complete.result())
                if count < attempt.begun:
                    raise PeerError(f"{attempt.begun} items came, but COMPLETE says {count}")
                if count == attempt.begun:
                    return None
            coming = attempt.queue.get() if channel == 0 else links[channel].receive()
            getting: asyncio.Future[Frame] = asyncio.ensure_future(coming)
            either: set[asyncio.Future[Any]] = {getting, complete}
            try:
                if complete.done():
                    return await getting
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if getting.done():
                    return getting.result()
            finally:
                getting.cancel()

    def _write(self, frame: Frame, attempt: _Attempt) -> None:
        """Check an item, and send it to the loader. Runs in the worker thread."""
        loader, writer = self._place.loader, attempt.writer
        try:
            if frame.type is MessageType.PAGES:
                head, data = attempt.opener.open(frame)
                writer.begin(head, data)
                self._digest.update(head)
                while count := writer.fill(self._records):
                    loader.send(self._records[:count])
                return
            message = unpack(frame.type, frame.head)
            if not isinstance(message, Bytes):
                raise PeerError(f"{frame.type.name} came as an item of a stream")
            self._digest.update(message.data)
            if message.held:
                loader.withhold(message.data)
            else:
                loader.send(message.data)
        finally:
            writer.drop()
            frame.release()

    def _return(self, message: bytes) -> None:
        """Queue what the loader says to the QEMU at the source."""
        if not self._returned.add(message):
            self._place.loader.fail("says more on its return path than the other one takes")

    async def verify(self, complete: Complete) -> float:
        """Prove that the loader has loaded what the source sent; see Receiver."""
        _, return_path = _state(complete)
        if self._digest.digest() != complete.digest:
            raise MismatchError("what came of the stream is not what was sent")
        loop = asyncio.get_running_loop()
        began = loop.time()
        await self._place.prove(return_path=return_path)
        return loop.time() - began


class ReturnedMessages:
    """Messages of the return path that the source has not confirmed, MAX_RETURNED at most."""

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque()
        self._confirmed = 0  # of all messages
        self._next = 0  # the one in `_messages` that is sent next
        self._added = asyncio.Event()
        self._may_send = asyncio.Event()

    def restart(self, *, resumes: bool) -> None:
        """Begin anew over another connection.

        resumes -- the source is going to say how many messages it has; none is sent before
        """
        self._next = 0
        if resumes:
            self._may_send.clear()
        else:
            self._may_send.set()

    def add(self, message: bytes) -> bool:
        """Add a message; return False if there are too many."""
        if len(self._messages) == MAX_RETURNED:
            return False
        self._messages.append(message)
        self._added.set()
        return True

    def confirm(self, count: int) -> None:
        """Drop messages: the source has `count` of all of them. Raises PeerError."""
        if not self._confirmed <= count <= self._confirmed + len(self._messages):
            raise PeerError(f"{count} pieces of the return path were taken, which were not sent")
        for _ in range(count - self._confirmed):
            self._messages.popleft()
            self._next = max(self._next - 1, 0)
        self._confirmed = count
        self._may_send.set()

    async def send_all(self, link: Link) -> None:
        """Send messages as they are added, until this is cancelled."""
        await self._may_send.wait()
        while True:
            while self._next < len(self._messages):
                message = self._messages[self._next]
                self._next += 1
                await link.send(Bytes(message))
            self._added.clear()
            await self._added.wait()


def _state(complete: Complete) -> tuple[int, bool]:
    """Return the number of items of the stream, and whether it opens its return path."""
    if len(complete.state) != STATE_BYTES:
        raise PeerError("COMPLETE does not say how many items the stream has")
    return int.from_bytes(complete.state[:8], "big"), bool(complete.state[8])
