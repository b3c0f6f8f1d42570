"""How a stream of QEMU's is taken in at the destination: item by item, in the source's order.

    channels --item k from channel k modulo n--> worker: check, write records --> QEMU
    channels <-------- TAKEN, BYTES of the return path ------------------------- QEMU

Nothing of an item reaches QEMU before all of it was checked, and nothing that is held before GO.
The guest's memory is QEMU's alone: deltas are passed on as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import xxhash

from migrate.cancellation import finished
from migrate.errors import MismatchError, PeerError, peer_error
from migrate.guests.guest import Place
from migrate.link import Link
from migrate.memory import private_buffer
from migrate.reception import Arrival, Lanes, Reception
from proto.errors import LocalError
from proto.frames import Frame
from proto.kernel import PageHashes, RamWriter
from proto.messages import (
    MAX_RETURNED,
    Blocks,
    Bytes,
    CacheSize,
    Complete,
    Error,
    GuestInfo,
    Message,
    MessageType,
    Taken,
    unpack,
)
from proto.session import State

if TYPE_CHECKING:
    from migrate.qemu.place import QemuPlace

OUT_BYTES = 1 << 20
# Items of the first channel that wait for their turn.
AHEAD = 2
STATE_BYTES = 9


class StreamReception(Reception):
    """Takes in a stream, for a QemuPlace."""

    _place: QemuPlace

    def __init__(
        self, place: Place, arrival: Arrival, worker: ThreadPoolExecutor,
        heard: Callable[[], None], resting: Callable[[], None],
        observe: Callable[[str, Arrival], None],
    ) -> None:  # fmt: skip
        super().__init__(place, arrival, worker, heard, resting, observe)
        self._info: GuestInfo | None = None
        self._writer: RamWriter | None = None
        self._out = private_buffer(OUT_BYTES)
        self._digest = xxhash.xxh3_128()
        self._items = self._begun = 0
        self._complete: asyncio.Future[Complete] | None = None
        self._queue: asyncio.Queue[Frame] = asyncio.Queue(AHEAD)
        self._returned: deque[bytes] = deque()  # said by QEMU, not taken by the source
        self._returned_before = 0
        self._to_return = 0  # the next of them to send
        self._news = asyncio.Event()
        self._may_return = asyncio.Event()

    async def receive(self, lanes: Lanes, info: GuestInfo, *, held: bool) -> Complete:
        place, link = self._place, lanes.link
        ours = self._info or info
        if (info.hash_seed, info.channels) != (ours.hash_seed, ours.channels):
            raise PeerError("the stream goes on with another seed, or over other channels")
        self._info = info
        if held:
            await link.send(Taken(self._items))
        if not self._items:
            blocks = await link.expect(Blocks)
            self._heard()
            if sum(pages for _, pages in blocks.blocks) != info.pages:
                raise PeerError("the blocks have other pages than the guest")
            hashes = PageHashes(info.pages, info.page_size, info.hash_seed)
            self._writer = RamWriter(hashes, blocks.blocks)
            place.announce(blocks.blocks, info.page_size)
            place.on_return = self._return
        self._to_return = 0
        self._may_return.set()
        if held:
            self._may_return.clear()  # before it has said what it has of that
        self._queue = asyncio.Queue(AHEAD)
        self._complete = asyncio.get_running_loop().create_future()
        assert place.lost is not None
        main = asyncio.create_task(self._sequence(lanes))
        tasks = [
            asyncio.create_task(self._lead(link)),
            asyncio.create_task(self._pass_back(link)),
        ]
        waited: set[asyncio.Future[None]] = {main, *tasks, place.lost}
        try:
            while not main.done():
                done, waited = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    one.result()
            return self._complete.result()
        finally:
            for task in (main, *tasks):
                task.cancel()
            await finished(asyncio.gather(main, *tasks, return_exceptions=True))
            while not self._queue.empty():
                self._queue.get_nowait().release()

    async def _lead(self, link: Link) -> None:
        """The first channel: its items wait for their turn, all else is dealt with at once."""
        assert self._complete is not None
        while True:
            frame = await link.receive()
            self._heard()
            if frame.type in (MessageType.PAGES, MessageType.BYTES):
                await self._queue.put(frame)
                continue
            try:
                message = unpack(frame.type, frame.head)
            finally:
                frame.release()
            if isinstance(message, Complete):
                self._complete.set_result(message)
                return
            if isinstance(message, Error):
                raise peer_error(message)
            if isinstance(message, CacheSize):
                self._arrival.cache_size = message.size
            elif isinstance(message, Taken):
                self._source_has(message.items)
            else:
                raise PeerError(f"{type(message).__name__} came, which no stream has")

    async def _sequence(self, lanes: Lanes) -> None:
        """Item after item, until all of them are with QEMU; one is on its way to it while the next
        one comes."""
        links, lane = lanes.links, 0
        writing: asyncio.Task[None] | None = None
        self._begun = self._items
        try:
            while (frame := await self._next(links, lane)) is not None:
                if writing is not None:
                    await asyncio.shield(writing)
                self._begun += 1
                lane = (lane + 1) % len(links)
                writing = asyncio.create_task(self._take(frame, lanes))
                writing.add_done_callback(lanes.link.fail_with)
            if writing is not None:
                await asyncio.shield(writing)
        finally:
            # What is cancelled while it waits has written all the same, in a thread: it must count.
            if writing is not None:
                with contextlib.suppress(BaseException):
                    await asyncio.shield(writing)

    async def _take(self, frame: Frame, lanes: Lanes) -> None:
        loop, writer, arrival = asyncio.get_running_loop(), self._writer, self._arrival
        await loop.run_in_executor(self._worker, self._write, frame)
        assert writer is not None
        self._items += 1
        self.brought += 1
        arrival.zero, arrival.raw, arrival.delta = writer.zero, writer.raw, writer.delta
        arrival.received = lanes.received_bytes
        self._resting()
        await _tell(lanes.link, Taken(self._items))

    async def _next(self, links: list[Link], lane: int) -> Frame | None:
        """The next item; None: all of them came."""
        complete = self._complete
        assert complete is not None
        while True:
            if complete.done():
                count, _ = _state(complete.result())
                if count < self._begun:
                    raise PeerError(f"{self._begun} items came, where COMPLETE says {count}")
                if count == self._begun:
                    return None
            coming = self._queue.get() if lane == 0 else links[lane].receive()
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

    def _write(self, frame: Frame) -> None:
        """In the worker thread."""
        place, writer = self._place, self._writer
        assert writer is not None
        try:
            if frame.type is MessageType.PAGES:
                writer.begin(frame.head, frame.data)
                self._digest.update(frame.head)
                while count := writer.fill(self._out):
                    place.send(self._out[:count])
                return
            message = unpack(frame.type, frame.head)
            if not isinstance(message, Bytes):
                raise PeerError(f"{frame.type.name} came as an item of a stream")
            self._digest.update(message.data)
            if message.held:
                place.hold(message.data)
            else:
                place.send(message.data)
        finally:
            writer.drop()
            frame.release()

    # -- the return path

    def _return(self, data: bytes) -> None:
        """QEMU says something to the other one."""
        if len(self._returned) == MAX_RETURNED:
            self._place.fail("says more on its return path than the other one takes")
            return
        self._returned.append(data)
        self._news.set()

    def _source_has(self, items: int) -> None:
        if not self._returned_before <= items <= self._returned_before + len(self._returned):
            raise PeerError(f"{items} pieces of the return path were taken, which were not sent")
        for _ in range(items - self._returned_before):
            self._returned.popleft()
            self._to_return = max(self._to_return - 1, 0)
        self._returned_before = items
        self._may_return.set()

    async def _pass_back(self, link: Link) -> None:
        await self._may_return.wait()
        while True:
            while self._to_return < len(self._returned):
                data = self._returned[self._to_return]
                self._to_return += 1
                await _tell(link, Bytes(data))
            self._news.clear()
            await self._news.wait()

    # -- the end

    async def verify(self, complete: Complete) -> float:
        _, return_path = _state(complete)
        if self._digest.digest() != complete.digest:
            raise MismatchError("what came of the stream is not what was sent")
        loop = asyncio.get_running_loop()
        began = loop.time()
        await self._place.prove(return_path=return_path)
        return loop.time() - began


async def _tell(link: Link, message: Message) -> None:
    """Not where the source has just given up: it says why, and that is what counts."""
    try:
        await link.send(message)
    except LocalError:
        if link.session.state is not State.FAILED:
            raise


def _state(complete: Complete) -> tuple[int, bool]:
    """What COMPLETE says of a stream: how many items it has, whether its return path is open."""
    if len(complete.state) != STATE_BYTES:
        raise PeerError("COMPLETE does not say how many items the stream has")
    return int.from_bytes(complete.state[:8], "big"), bool(complete.state[8])
