"""How a guest's memory is taken in at the destination, once it has been let in.

    Reception   what every kind of transfer is to the Destination
    Pages       PAGES are checked, then applied, by a worker thread; ROUND is confirmed when all of
                the round is in memory, digested where it came to rest, and on its way to disk

Another kind is a stream of QEMU's: see migrate.qemu.reception.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from migrate.cancellation import finished
from migrate.digest import Digest
from migrate.errors import MismatchError, PeerError, peer_error
from migrate.guests.guest import Place
from migrate.link import Link
from proto.frames import Frame
from proto.kernel import PageDecoder, PageHashes
from proto.messages import (
    HELD_PAGES,
    CacheSize,
    Complete,
    Error,
    GuestInfo,
    Held,
    MessageType,
    Round,
    RoundAck,
    unpack,
)


@dataclass
class Arrival:
    """How far a guest has come. Sizes in bytes, counts in pages."""

    info: GuestInfo | None = None
    status: str = "setup"
    received: int = 0
    rounds: int = 0
    zero: int = 0
    raw: int = 0
    delta: int = 0
    cache_size: int = 0
    capabilities: dict[str, bool] = field(default_factory=dict)
    running: str = ""
    """The place's sentence on the guest that runs."""
    runs: bool = True
    """Whether it does; a virtual machine may arrive paused."""


@dataclass
class Lanes:
    """The connections of one attempt; the first one carries everything but pages too.

    sparse -- the capability was agreed on for this attempt
    """

    link: Link
    others: dict[int, Link] = field(default_factory=dict)
    sparse: bool = False

    @property
    def links(self) -> list[Link]:
        """By their number: they join in any order."""
        return [self.link, *(self.others[channel] for channel in sorted(self.others))]

    @property
    def received_bytes(self) -> int:
        return sum(link.received_bytes for link in self.links)


class Reception(ABC):
    """Takes in one guest, over the connections of one attempt after the other.

    heard   -- to be called when the source has shown that it got ACCEPT
    resting -- to be called when what came before this attempt is of no use any more
    observe -- to be called with "round" as rounds end
    """

    def __init__(
        self, place: Place, arrival: Arrival, worker: ThreadPoolExecutor,
        heard: Callable[[], None], resting: Callable[[], None],
        observe: Callable[[str, Arrival], None],
    ) -> None:  # fmt: skip
        self._place = place
        self._arrival = arrival
        self._worker = worker
        self._heard = heard
        self._resting = resting
        self._observe = observe
        self.brought = 0
        """Batches, or pieces of a stream, that were taken in, over all connections."""

    @abstractmethod
    async def receive(self, lanes: Lanes, info: GuestInfo, *, held: bool) -> Complete:
        """Takes in what comes until COMPLETE; `held`: ACCEPT has said that some is here."""

    @abstractmethod
    async def verify(self, complete: Complete) -> float:
        """Proves that all of it is here, and right; the seconds that took. Raises MismatchError."""


class Pages(Reception):
    """Pages of memory, round after round."""

    def __init__(
        self, place: Place, arrival: Arrival, worker: ThreadPoolExecutor,
        heard: Callable[[], None], resting: Callable[[], None],
        observe: Callable[[str, Arrival], None],
    ) -> None:  # fmt: skip
        super().__init__(place, arrival, worker, heard, resting, observe)
        self._hashes: PageHashes | None = None
        self._decoder: PageDecoder | None = None
        self._digest: Digest | None = None
        self._seed = b""
        self._apply_seconds = 0.0
        self._round = 1
        self._ended: dict[int, int] = {}
        self._news = asyncio.Event()

    async def receive(self, lanes: Lanes, info: GuestInfo, *, held: bool) -> Complete:
        self._ended = dict.fromkeys(lanes.others, 0)
        loop = asyncio.get_running_loop()
        decoder, digest = await loop.run_in_executor(self._worker, self._take_stock, info)
        self._decoder, self._digest = decoder, digest
        digest.by_sum = lanes.sparse
        if held:
            assert self._hashes is not None
            await self._say_what_is_held(lanes.link, self._hashes, sparse=lanes.sparse)
        self._round = info.round
        return await self._rounds(lanes, decoder, digest)

    def _take_stock(self, info: GuestInfo) -> tuple[PageDecoder, Digest]:
        """In the worker thread: hashes what an earlier attempt has left here."""
        hashes, decoder, place = self._hashes, self._decoder, self._place
        if hashes is not None and decoder is not None and self._seed == info.hash_seed:
            # What never came is zeros still, and its hash says so, or anything.
            decoder.hold(0, info.pages, not place.zeroed)
        else:
            anything = place.held or hashes is not None
            hashes = PageHashes(info.pages, info.page_size, info.hash_seed)
            decoder = PageDecoder(hashes, info.size, zeroed=place.zeroed)
            if anything:
                for page, count, data in place.reads.extents(info.page_size):
                    decoder.hold(page, count, data)
        decoder.end_round()
        digest = Digest(place.reads, hashes)
        digest.settle()
        self._hashes, self._seed = hashes, info.hash_seed
        return decoder, digest

    async def _say_what_is_held(self, link: Link, hashes: PageHashes, *, sparse: bool) -> None:
        pages, page = hashes.pages, 0
        while page < pages:
            first, part = hashes.filled_part(page, HELD_PAGES) if sparse else (page, b"")
            if not part:  # everything is said; or the last page, which ends it, is of zeros
                first = pages - 1 if sparse else page
                part = bytes(hashes.part(first, min(HELD_PAGES, pages - first)))
            await link.send(Held(first, part))
            page = first + len(part) // 8

    # -- rounds

    async def _rounds(self, lanes: Lanes, decoder: PageDecoder, digest: Digest) -> Complete:
        """Applies batches until COMPLETE comes."""
        tasks = [
            asyncio.create_task(self._follow(lane, channel, decoder))
            for channel, lane in lanes.others.items()
        ]
        main = asyncio.create_task(self._lead(lanes, decoder, digest))
        try:
            while not main.done():
                done, _ = await asyncio.wait([main, *tasks], return_when=asyncio.FIRST_COMPLETED)
                for task in done - {main}:
                    task.result()  # a channel only ends by an error
            return main.result()
        finally:
            for task in (main, *tasks):
                task.cancel()
            # A batch that is being applied is let finish: its frame is memory that it reads.
            await finished(asyncio.gather(main, *tasks, return_exceptions=True))

    async def _batches(self, link: Link, decoder: PageDecoder) -> tuple[MessageType, bytes]:
        """Applies the batches of one channel up to its next other message."""
        loop = asyncio.get_running_loop()
        busy: asyncio.Future[None] | None = None
        try:
            while True:
                frame = await link.receive()
                self._heard()
                if busy is not None:
                    await busy
                    busy = None
                if frame.type is not MessageType.PAGES:
                    body = bytes(frame.head)
                    frame.release()
                    return frame.type, body
                if self._ended.get(link.session.channel) == self._round:
                    raise PeerError(
                        f"a batch came after the end of round {self._round} on its channel"
                    )
                busy = loop.run_in_executor(self._worker, self._apply, decoder, frame, self._round)
                # Nothing more may come, and a bad batch must be answered all the same.
                busy.add_done_callback(link.fail_with)
        finally:
            if busy is not None:
                with contextlib.suppress(BaseException):
                    await asyncio.shield(busy)

    async def _follow(self, lane: Link, channel: int, decoder: PageDecoder) -> None:
        """One further channel: batches and the ends of rounds."""
        while True:
            kind, body = await self._batches(lane, decoder)
            message = unpack(kind, body)
            if isinstance(message, Error):
                raise peer_error(message)
            if not isinstance(message, Round):
                raise PeerError(f"channel {channel}: {kind.name} came where a round goes on")
            if message.number != self._round or self._ended[channel] == self._round:
                raise PeerError(
                    f"channel {channel}: round {message.number} ended while {self._round} went on"
                )
            self._ended[channel] = message.number
            self._news.set()

    async def _lead(self, lanes: Lanes, decoder: PageDecoder, digest: Digest) -> Complete:
        """The first channel, which carries all the rest; returns at COMPLETE."""
        apply_before = self._apply_seconds
        while True:
            kind, body = await self._batches(lanes.link, decoder)
            message = unpack(kind, body)
            if isinstance(message, Complete):
                return message
            if isinstance(message, CacheSize):
                self._arrival.cache_size = message.size
            elif isinstance(message, Error):
                raise peer_error(message)
            elif isinstance(message, Round):
                if message.number != self._round:
                    raise PeerError(f"round {message.number} ended while {self._round} went on")
                while any(number != self._round for number in self._ended.values()):
                    self._news.clear()
                    await self._news.wait()
                spent = self._apply_seconds - apply_before
                await self._end_round(lanes, decoder, digest, message, spent)
                apply_before = self._apply_seconds
            else:
                raise PeerError(f"{kind.name} came, which only a stream has")

    def _apply(self, decoder: PageDecoder, frame: Frame, number: int) -> None:
        """In the worker thread."""
        began, place = time.thread_time(), self._place
        try:
            came, fresh = decoder.check(frame.head, len(frame.data))
            if came != number:
                raise PeerError(f"a batch of round {came} came in round {number}")
            for page in fresh:
                place.make_room(page)
            decoder.apply(frame.head, frame.data, place.memory, place.fd, place.fd_offset)
            self.brought += 1
            if decoder.delta and not self._arrival.capabilities["xbzrle"]:
                raise PeerError("a delta came, though xbzrle was not agreed on")
        finally:
            frame.release()
            self._apply_seconds += time.thread_time() - began

    async def _end_round(
        self, lanes: Lanes, decoder: PageDecoder, digest: Digest, message: Round,
        apply_seconds: float,
    ) -> None:  # fmt: skip
        """Hashes what came to rest, and confirms the round."""
        loop = asyncio.get_running_loop()
        arrival = self._arrival
        arrival.rounds, arrival.zero = message.number, decoder.zero
        arrival.raw, arrival.delta = decoder.raw, decoder.delta
        arrival.received = lanes.received_bytes
        began = time.perf_counter()
        settled = await loop.run_in_executor(
            self._worker, self._settle, decoder, digest, message.last
        )
        seconds = time.perf_counter() - began
        self._round += 1
        self._resting()
        await lanes.link.send(
            RoundAck(message.number, apply_seconds, seconds, digest.stale(), settled)
        )
        self._observe("round", arrival)

    def _settle(self, decoder: PageDecoder, digest: Digest, last: bool) -> int:
        """All stale pages in the pause; before it, those that this round left alone."""
        if last:
            return digest.settle()
        settled = digest.settle(decoder.recent)
        decoder.end_round()
        self._place.sync()
        return settled

    # -- the end

    async def verify(self, complete: Complete) -> float:
        decoder, digest = self._decoder, self._digest
        assert decoder is not None
        assert digest is not None
        if decoder.received_pages != decoder.pages:
            raise MismatchError(
                f"only {decoder.received_pages} of {decoder.pages} pages came: the guest is not "
                "complete"
            )
        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        ours = await loop.run_in_executor(self._worker, digest.digest)
        if ours != complete.digest:
            raise MismatchError(
                "the memories differ: the digest here is not the source's. If nothing stopped the "
                "guest's writer, it wrote during the last round"
            )
        return time.perf_counter() - began
