"""Makes the batches of a round, in the source's worker thread.

    dirty pages of a channel -> guest memory -> encoder -> one sealed PAGES frame

A page always goes over the same channel: stripes of STRIPE_BYTES of the guest take turns.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from migrate.memory import Memory
from proto.frames import seal
from proto.kernel import PageEncoder
from proto.messages import STRIPE_BYTES, MessageType
from proto.pageset import PageSet

# A turn ends with a full batch, or after this many pages without one.
TURN_PAGES = 1 << 14


class Turn(NamedTuple):
    """batch: a sealed frame and its raw pages, or None; cursor: the page to go on from, the
    number of pages at the end; pages: how many were done."""

    batch: tuple[memoryview, memoryview] | None
    cursor: int
    pages: int


class Feeder:
    """Walks the dirty pages of `channels` channels. `seconds` is the CPU time that it took."""

    def __init__(self, memory: Memory, encoder: PageEncoder, channels: int) -> None:
        self.seconds = 0.0
        self._memory = memory
        self._encoder = encoder
        self._channels = channels

    def turn(self, dirty: PageSet, channel: int, cursor: int, *, holes: bool) -> Turn:
        """The next batch of a channel, from page `cursor` on.

        holes -- look for holes of a sparse file, which are zeros that nobody need read
        """
        began = time.thread_time()
        cursor, pages = self._fill(dirty, channel, cursor, holes and self._memory.view is None)
        batch = None
        if self._encoder.pending:
            batch = self._encoder.take()
            seal(batch[0], MessageType.PAGES, channel, len(batch[1]))
        self.seconds += time.thread_time() - began
        return Turn(batch, cursor, pages)

    def _fill(self, dirty: PageSet, channel: int, cursor: int, holes: bool) -> tuple[int, int]:
        """Encodes until the batch is full, the turn is over or nothing is left."""
        memory, encoder, done = self._memory, self._encoder, 0
        while done < TURN_PAGES and not encoder.full:
            cursor, end = self._stripe(channel, cursor)
            if cursor >= encoder.pages:
                break
            if holes:
                stop, data = memory.extent(cursor, encoder.page_size)
                end = min(end, stop)
                if not data:
                    zeros = encoder.feed_zeros(cursor, end - cursor)
                    cursor, done = cursor + zeros, done + zeros
                    continue
            if memory.view is not None:
                count, cursor = encoder.feed_memory(
                    memory.view, dirty.bits, cursor, end, TURN_PAGES - done
                )
            else:
                snapshot, numbers = encoder.space()
                count, cursor = memory.gather(
                    dirty.bits, cursor, end, encoder.page_size, snapshot, numbers
                )
                encoder.feed(count, dirty.bits)
            done += count
        return cursor, done

    def _stripe(self, channel: int, page: int) -> tuple[int, int]:
        """The next pages of a channel at or after `page`: where they begin and end."""
        pages = self._encoder.pages
        if self._channels == 1:
            return page, pages
        width = STRIPE_BYTES // self._encoder.page_size
        stripe = page // width
        ahead = (channel - stripe) % self._channels
        if ahead:
            stripe += ahead
            page = stripe * width
        return page, min((stripe + 1) * width, pages)
