"""Sends the items of a QEMU's stream in order, and keeps each until the destination has taken it.

    Intake --worker--> unsent --SendWindow--> channels, in turn --> kept --TAKEN--> (done)
                          ^                                           |
                          +---------------- after a break ------------+

At any moment an item is unsent or kept, so a break loses none: what the destination has not taken
is sent again. The encoder knows what the destination will hold after all items, so its deltas are
as good over another connection.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator

import xxhash

from migrate.errors import PeerError
from migrate.policy.working_set import WorkingSet
from migrate.qemu.send_window import SendWindow
from migrate.qemu.stream.intake import Intake, Item
from migrate.source.page_sender import new_encoder
from migrate.source.transfer import TransferContext
from migrate.transport.channels import Channels
from proto.codec.kernel import PageHashes
from proto.wire import capabilities as caps
from proto.wire.frames import HEADER_BYTES, seal
from proto.wire.messages import Bytes, MessageType

_OVER = object()


class ItemSender:
    """Made when a destination has accepted the guest for the first time.

    all_read -- QEMU's stream is over, and all items have been made
    count    -- items sent; after a break, those that the destination has taken
    """

    def __init__(
        self, intake: Intake, context: TransferContext, agreement: caps.Agreement
    ) -> None:  # fmt: skip
        settings = context.settings
        hashes = PageHashes(settings.pages, settings.parameters.page_size, context.seed)
        self.encoder = new_encoder(settings, hashes, agreement)
        self.encoder.begin_round(intake.rounds)
        self.working = WorkingSet(settings.parameters.page_size)
        self.all_read = False
        self.count = 0
        self._intake = intake
        self._context = context
        self._items: Iterator[Item | None] = intake.items(self.encoder)
        self._sampled = intake.rounds
        # The item that the worker makes; it outlives an attempt.
        self._turn: asyncio.Future[object] | None = None
        self._unsent: deque[Item] = deque()
        self._kept: deque[Item] = deque()
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

    async def make_next(self) -> None:
        """Wait for the worker, which may have made another item, or seen the end of the stream."""
        if self._turn is None:
            self._turn = self._context.in_worker(self._make)
        made = await asyncio.shield(self._turn)
        self._turn = None
        if made is _OVER:
            self.all_read = True
        elif isinstance(made, Item):
            self._unsent.append(made)
            self._turn = self._context.in_worker(self._make)  # while this one is sent

    def _make(self) -> object:
        """Return the next item, None if none came yet, or _OVER. Runs in the worker thread."""
        if self._intake.rounds > self._sampled:
            self._sampled = self._intake.rounds
            self.working.learn(*self.encoder.sample_heat())
        self._context.settings.cache.resize()
        item = next(self._items, _OVER)
        if isinstance(item, Item):
            self._digest.update(item.body if item.head is None else item.head[HEADER_BYTES:])
        return item

    async def send(self, channels: Channels) -> None:
        """Send what is unsent, as far as the window allows it."""
        while self._unsent:
            item = self._unsent[0]
            while self._kept_bytes and self._kept_bytes + item.size > self._window.most:
                self._taken.clear()
                await self._taken.wait()
            channel = self._channel
            link = channels.links[channel]
            self._channel = (channel + 1) % len(channels.links)
            self._kept.append(self._unsent.popleft())
            self._kept_bytes += item.size
            self.count += 1
            self._window.sent(item.size, time.monotonic())
            if item.head is not None and item.data is not None:
                seal(item.head, MessageType.PAGES, channel, len(item.data))
                await link.send_batch(item.head, item.data)
            else:
                await link.send(Bytes(item.body, item.held))

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
        return sum(item.size for item in self._unsent)

    def _drop_oldest(self) -> None:
        self._kept_bytes -= self._kept.popleft().size
