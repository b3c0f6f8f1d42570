"""Takes in pages of memory, round after round, and proves that they are the source's.

Per batch and per round:

    event loop                               worker thread (one)
    Link.receive -> PAGES --- a batch ------> check all of it, then apply it to memory
                 -> the next frame comes meanwhile
    ROUND n on each channel; the last batch is applied
                 ------ end of the round --> hash the pages at rest, start writing back
    ROUND_ACK n <----------------------------

The event loop never touches pages: applying 1 MiB takes about as long as receiving it, and PINGs
must be answered meanwhile. One batch is applied per channel while the next one is received, so a
slow place stops the reading (Link.receive), and with it the source. There is one worker thread, so
batches never race: a page may come again in the next round, over another channel.

Nothing of a batch is applied before all of it has been checked (see proto.codec): a hostile batch
changes no byte. That also holds for what a lost connection has left half-received.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass

from migrate.destination.channels import ReceivingChannels
from migrate.destination.receiver import Receiver, Reception
from migrate.errors import MismatchError, PeerError, peer_error
from migrate.events import DestinationEvent
from migrate.memory.digest import Digest
from migrate.runtime.cancellation import finish
from migrate.transport.link import Link, expect
from proto.codec.kernel import PageDecoder, PageHashes
from proto.wire.compressed import BatchOpener
from proto.wire.frames import Frame
from proto.wire.messages import (
    HELD_PAGES,
    CacheSize,
    Complete,
    Error,
    GuestInfo,
    Held,
    MessageType,
    Round,
    RoundAck,
    body_limits,
    unpack,
)

# xxh3_64, as HELD carries it
HASH_BYTES = 8


@dataclass(frozen=True)
class _PageState:
    """What is known of the pages in memory.

    seed    -- of the hashes
    hashes  -- of each page; stale where a delta has changed the page since
    decoder -- checks and applies batches, and counts them
    digest  -- of the whole memory
    """

    seed: bytes
    hashes: PageHashes
    decoder: PageDecoder
    digest: Digest


class PageReceiver(Receiver):
    """Takes in pages of memory, round after round."""

    def __init__(self, reception: Reception) -> None:
        super().__init__(reception)
        self._place = reception.place
        self._state: _PageState | None = None
        """None before the first attempt."""

    async def receive(
        self, channels: ReceivingChannels, info: GuestInfo, *, resumes: bool
    ) -> Complete:
        loop = asyncio.get_running_loop()
        self._state = state = await loop.run_in_executor(self._worker, self._adopt_pages, info)
        sparse = channels.agreement.sparse
        state.digest.by_sum = sparse
        if resumes:
            await send_held(channels.link, state.hashes, sparse=sparse)
        return await _Rounds(self, self._reception, channels, state, info.round).receive()

    def _adopt_pages(self, info: GuestInfo) -> _PageState:
        """Hash what an earlier attempt has left in memory. Runs in the worker thread.

        With the seed of the attempt before, the hashes of settled pages still hold, and only pages
        that deltas have changed are read. With another seed (another program at the source), all
        pages that may have come are read again.
        """
        before, place = self._state, self._place
        if before is not None and before.seed == info.hash_seed:
            hashes, decoder = before.hashes, before.decoder
            # A page that never came is zeros still, and its hash says so; or it may hold anything.
            decoder.mark_received(0, info.pages, not place.zeroed)
        else:
            hashes = PageHashes(info.pages, info.page_size, info.hash_seed)
            decoder = PageDecoder(hashes, info.size, zeroed=place.zeroed)
            if place.partial or before is not None:
                for page, count, data in place.content.extents(info.page_size):
                    decoder.mark_received(page, count, data)
        decoder.end_round()
        digest = Digest(place.content, hashes)
        digest.settle()
        return _PageState(info.hash_seed, hashes, decoder, digest)

    async def verify(self, complete: Complete) -> float:
        state = self._state
        assert state is not None, "there is nothing to verify before `receive` has returned"
        decoder = state.decoder
        if decoder.received_pages != decoder.pages:
            raise MismatchError(
                f"only {decoder.received_pages} of {decoder.pages} pages came: the guest is not "
                "complete"
            )
        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        ours = await loop.run_in_executor(self._worker, state.digest.digest)
        if ours != complete.digest:
            raise MismatchError(
                "the memories differ: the digest here is not the source's. If nothing stopped the "
                "guest's writer, it wrote during the last round"
            )
        return time.perf_counter() - began


async def send_held(link: Link, hashes: PageHashes, *, sparse: bool) -> None:
    """Send the hash of each page, in order; `sparse` leaves out pages of zeros."""
    pages, page = hashes.pages, 0
    while page < pages:
        first, part = hashes.nonzero_part(page, HELD_PAGES) if sparse else (page, b"")
        if not part:  # everything is said; or the last page, which ends it, is of zeros
            first = pages - 1 if sparse else page
            part = bytes(hashes.part(first, min(HELD_PAGES, pages - first)))
        await link.send(Held(first, part))
        page = first + len(part) // HASH_BYTES


class _Rounds:
    """The rounds of one attempt."""

    def __init__(
        self, receiver: Receiver, reception: Reception, channels: ReceivingChannels,
        state: _PageState, first: int,
    ) -> None:  # fmt: skip
        self._receiver = receiver
        self._reception = reception
        self._channels = channels
        self._decoder, self._digest = state.decoder, state.digest
        self._opener = BatchOpener(body_limits(channels.count, 0)[MessageType.PAGES])
        self._round = first
        self._ended = dict.fromkeys(channels.further, 0)
        """The last round that each further channel has ended."""
        self._channel_ended = asyncio.Event()
        self._apply_seconds = 0.0
        """Time of the worker thread's CPU spent on batches of this round."""

    async def receive(self) -> Complete:
        """Apply batches until COMPLETE comes."""
        further = [
            asyncio.create_task(self._follow(link, channel))
            for channel, link in self._channels.further.items()
        ]
        main = asyncio.create_task(self._lead())
        try:
            while not main.done():
                done, _ = await asyncio.wait([main, *further], return_when=asyncio.FIRST_COMPLETED)
                for task in done - {main}:
                    task.result()  # a further channel only ends by an error
            return main.result()
        finally:
            for task in (main, *further):
                task.cancel()
            # The worker may be applying a batch; it reads the frame's memory until it returns.
            await finish(asyncio.gather(main, *further, return_exceptions=True))

    async def _apply_batches(self, link: Link) -> tuple[MessageType, bytes]:
        """Apply the batches of one channel; return the first message that is none."""
        loop = asyncio.get_running_loop()
        busy: asyncio.Future[None] | None = None
        try:
            while True:
                frame = await link.receive()
                self._reception.on_confirmed()
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
                busy = loop.run_in_executor(self._reception.worker, self._apply, frame, self._round)
                # A bad batch must be answered even if nothing more comes on this channel.
                busy.add_done_callback(link.fail_with)
        finally:
            if busy is not None:
                with contextlib.suppress(BaseException):
                    await asyncio.shield(busy)

    async def _follow(self, link: Link, channel: int) -> None:
        """Receive a further channel: batches and the ends of rounds. Only an error ends it."""
        while True:
            message = expect(unpack(*await self._apply_batches(link)), Round)
            if message.number != self._round or self._ended[channel] == self._round:
                raise PeerError(
                    f"channel {channel}: round {message.number} ended while {self._round} went on"
                )
            self._ended[channel] = message.number
            self._channel_ended.set()

    async def _lead(self) -> Complete:
        """Receive the first channel, which carries everything else too; return COMPLETE."""
        while True:
            kind, body = await self._apply_batches(self._channels.link)
            message = unpack(kind, body)
            if isinstance(message, Complete):
                return message
            if isinstance(message, CacheSize):
                self._reception.arrival.cache_size = message.size
            elif isinstance(message, Error):
                raise peer_error(message)
            elif isinstance(message, Round):
                await self._all_channels_ended(message.number)
                await self._end_round(message)
            else:
                raise PeerError(f"{kind.name} came, which only a stream has")

    async def _all_channels_ended(self, number: int) -> None:
        """Wait until every channel has ended the round that channel 0 has ended."""
        if number != self._round:
            raise PeerError(f"round {number} ended while {self._round} went on")
        while any(ended != number for ended in self._ended.values()):
            self._channel_ended.clear()
            await self._channel_ended.wait()

    def _apply(self, frame: Frame, number: int) -> None:
        """Check a batch of round `number`, then apply it. Runs in the worker thread."""
        began, place, decoder = time.thread_time(), self._reception.place, self._decoder
        try:
            head, data = self._opener.open(frame)
            came, fresh = decoder.check(head, len(data))
            if came != number:
                raise PeerError(f"a batch of round {came} came in round {number}")
            for page in fresh:
                place.allocate(page)
            decoder.apply(head, data, place.memory, place.fd, place.fd_offset)
            self._receiver.progress += 1
            if decoder.delta and not self._reception.arrival.capabilities["xbzrle"]:
                raise PeerError("a delta came, though xbzrle was not agreed on")
        finally:
            frame.release()
            self._apply_seconds += time.thread_time() - began

    async def _end_round(self, message: Round) -> None:
        """Hash the pages that this round left alone, and confirm the round."""
        loop, decoder, arrival = asyncio.get_running_loop(), self._decoder, self._reception.arrival
        arrival.rounds, arrival.zero = message.number, decoder.zero
        arrival.raw, arrival.delta = decoder.raw, decoder.delta
        arrival.received = self._channels.received_bytes
        apply_seconds, self._apply_seconds = self._apply_seconds, 0.0
        began = time.perf_counter()
        settled = await loop.run_in_executor(self._reception.worker, self._settle, message.last)
        seconds = time.perf_counter() - began
        self._round += 1
        self._reception.on_superseded()
        await self._channels.link.send(
            RoundAck(message.number, apply_seconds, seconds, self._digest.stale(), settled)
        )
        self._reception.observe(DestinationEvent.ROUND_DONE, arrival)

    def _settle(self, last: bool) -> int:
        """Hash stale pages; return how many. Runs in the worker thread.

        A page that a delta has changed is stale: its hash is not known until the page is read.
        Between rounds we hash those that this round left alone: what it has written will probably
        be written again. After the last round, in the pause, we hash all: that is downtime.
        """
        if last:
            return self._digest.settle()
        settled = self._digest.settle(self._decoder.recent)
        self._decoder.end_round()
        self._reception.place.sync()
        return settled
