"""Sends the items of a QEMU's stream in order, and keeps each until the destination has taken it.

    Intake --worker--> unsent --SecondStage, SendWindow--> channels, in turn --> kept --TAKEN-->
                          ^                                                        |
                          +----------------------- after a break ------------------+

At any moment an item is unsent or kept, so a break loses none: what the destination has not taken
is sent again. The encoder knows what the destination will hold after all items, so its deltas are
as good over another connection. A batch is kept as it was sent: compressed.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import xxhash

from migrate.errors import PeerError
from migrate.policy.working_set import WorkingSet
from migrate.qemu.send_window import SendWindow
from migrate.qemu.stream.intake import Intake, Item
from migrate.runtime.cancellation import checked
from migrate.source.batches import PageCounts
from migrate.source.page_sender import new_encoder
from migrate.source.second_stage import Batch, SecondStage
from migrate.source.transfer import TransferContext
from migrate.transport.channels import Channels
from proto.codec.kernel import PageHashes
from proto.wire import capabilities as caps
from proto.wire.frames import HEADER_BYTES, seal
from proto.wire.messages import Bytes, MessageType

_OVER = object()


class _Outgoing:
    """An item on its way.

    coming -- a batch that may still be compressed; None for a piece
    pages  -- of a batch
    """

    def __init__(self, item: Item, coming: asyncio.Future[Batch] | None, pages: int) -> None:
        self.item = item
        self.coming = coming
        self.pages = pages

    @property
    def pending(self) -> set[asyncio.Future[Any]]:
        """What must be awaited before it can be sent."""
        return set() if self.coming is None or self.coming.done() else {self.coming}

    @property
    def size(self) -> int:
        """Bytes; of a batch that is ready, those on the wire."""
        return self.item.size if self.coming is None else self.coming.result().size


class ItemSender:
    """Made when a destination has accepted the guest for the first time.

    check    -- raises an error if the migration has used up its time

    all_read -- QEMU's stream is over, and all items have been made
    count    -- items sent; after a break, those that the destination has taken
    """

    def __init__(
        self, intake: Intake, context: TransferContext, agreement: caps.Agreement,
        check: Callable[[], object],
    ) -> None:  # fmt: skip
        settings = context.settings
        hashes = PageHashes(settings.pages, settings.parameters.page_size, context.seed)
        self.encoder = new_encoder(settings, hashes, agreement)
        self.encoder.begin_round(intake.rounds)
        self.working = WorkingSet(settings.parameters.page_size)
        self.stage = SecondStage(settings, agreement)
        self.all_read = False
        self.count = 0
        self._intake = intake
        self._check = check
        self._context = context
        self._items: Iterator[Item | None] = intake.items(self.encoder)
        self._sampled = intake.rounds
        # The item that the worker makes; it outlives an attempt.
        self._turn: asyncio.Future[tuple[object, int]] | None = None
        self._made = PageCounts()
        self._unsent: deque[_Outgoing] = deque()
        self._kept: deque[_Outgoing] = deque()
        self._kept_bytes = 0
        self._channel = 0
        self._digest = xxhash.xxh3_128()
        self._window = SendWindow()
        self._taken = asyncio.Event()

    @property
    def digest(self) -> bytes:
        """The digest of all items."""
        return self._digest.digest()

    def pages_gone(self, *, zeros: bool = False) -> int:
        """Return how many pages have gone by.

        Pages of zeros are left out by default: they take no time, and those that are dirty in the
        end are hardly ever zeros.
        """
        encoder = self.encoder
        return encoder.unchanged + encoder.raw + encoder.delta + zeros * encoder.zero

    async def send_all(self, channels: Channels, look: Callable[[], Awaitable[None]]) -> None:
        """Send item after item until the stream is over; the next one is made while one is sent.

        look -- awaited after each
        """
        await self._send(channels)
        while not self.all_read:
            await self._make_next()
            await self._send(channels)
            await look()

    async def _make_next(self) -> None:
        """Wait for the worker, which may have made another item, or seen the end of the stream."""
        if self._turn is None:
            self._turn = self._context.in_worker(self._make)
        compressed = self._unsent[0].pending if self._unsent else set()
        await asyncio.wait({self._turn, *compressed}, return_when=asyncio.FIRST_COMPLETED)
        if not self._turn.done():
            return
        made, pages = self._turn.result()
        self._turn = None
        if made is _OVER:
            self.all_read = True
        elif isinstance(made, Item):
            self._turn = self._context.in_worker(self._make)  # while this one is sent
            coming = None
            if made.head is not None and made.data is not None:
                paused = self._intake.stopped_at is not None
                coming = self.stage.start(made.head, made.data, 0, paused=paused)
            self._unsent.append(_Outgoing(made, coming, pages))

    def _make(self) -> tuple[object, int]:
        """Return the next item, None if none came yet, or _OVER; and the pages of a batch.

        Runs in the worker thread.
        """
        if self._intake.rounds > self._sampled:
            self._sampled = self._intake.rounds
            self.working.learn(*self.encoder.sample_heat())
        self._context.settings.cache.resize()
        item = next(self._items, _OVER)
        if isinstance(item, Item):
            self._digest.update(item.body if item.head is None else item.head[HEADER_BYTES:])
        counts = PageCounts.of(self.encoder)
        before, self._made = self._made, counts
        return item, counts.since(before).in_batches

    async def _send(self, channels: Channels) -> None:
        """Send what is unsent, as far as the window allows it."""
        while self._unsent:
            outgoing = self._unsent[0]
            if outgoing.pending and len(self._unsent) <= self.stage.depth and not self.all_read:
                return
            if outgoing.coming is not None:
                await self.stage.finish(outgoing.coming)
            size = outgoing.size
            while self._kept_bytes and self._kept_bytes + size > self._window.most:
                self._taken.clear()
                await checked(self._taken.wait(), self._check)
            channel = self._channel
            link = channels.links[channel]
            self._channel = (channel + 1) % len(channels.links)
            self._kept.append(self._unsent.popleft())
            self._kept_bytes += size
            self.count += 1
            self._window.sent(size, time.monotonic())
            if outgoing.coming is not None:
                batch = outgoing.coming.result()
                seal(
                    batch.head, MessageType.PAGES, channel, len(batch.data),
                    compressed=batch.compressed,
                )  # fmt: skip
                await self.stage.send(link, batch, outgoing.pages, len(channels.links))
            else:
                await link.send(Bytes(outgoing.item.body, outgoing.item.held))

    # -- what the destination takes

    def note_taken(self, items: int) -> None:
        """Drop the items up to number `items`: the destination has taken them. Raises PeerError."""
        first = self.count - len(self._kept)
        if not first < items <= self.count:
            raise PeerError(f"{items} items were taken, {first} to {self.count} were sent")
        now = time.monotonic()
        for _ in range(items - first):
            self._drop_oldest()
            self._window.taken(now)
        self._taken.set()

    def resume(self, items: int) -> int:
        """Prepare to send again what the destination has not taken, after the first `items`.

        Return how many bytes that is. Raises PeerError.
        """
        first = self.count - len(self._kept)
        if not first <= items <= self.count:
            raise PeerError(f"{items} items were taken, {first} to {self.count} were sent")
        for _ in range(items - first):
            self._drop_oldest()
        self._window.clear()
        self._unsent.extendleft(reversed(self._kept))
        self._kept.clear()
        self.count, self._kept_bytes, self._channel = items, 0, 0
        return sum(one.item.size if one.pending else one.size for one in self._unsent)

    def _drop_oldest(self) -> None:
        self._kept_bytes -= self._kept.popleft().size
