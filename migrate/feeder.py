"""Makes the batches of a round, in the source's worker thread.

    dirty pages, from where the last batch ended -> guest memory -> encoder -> a sealed PAGES frame

A channel gets the next pages whenever it can take a batch, so a slow one gets fewer, and none keeps
the round waiting for long. A page is sent once in a round, and a round ends on all channels before
the next begins: which of them carries a page makes no difference to what it builds on.
"""

from __future__ import annotations

import time
from operator import add, sub
from typing import NamedTuple

from migrate.memory import Memory
from proto.frames import seal
from proto.kernel import PageEncoder
from proto.messages import MessageType
from proto.pageset import PageSet

# A turn ends with a full batch, or after this many pages without one.
TURN_PAGES = 1 << 14


class Counts(NamedTuple):
    """What was made of pages, by the names of Statistics."""

    duplicate: int = 0
    normal: int = 0
    skipped: int = 0
    xbzrle_bytes: int = 0
    xbzrle_pages: int = 0
    cache_hits: int = 0
    cache_miss: int = 0
    overflow: int = 0
    overflow_skipped: int = 0

    @classmethod
    def of(cls, encoder: PageEncoder) -> Counts:
        return cls(
            encoder.zero, encoder.raw, encoder.unchanged, encoder.delta_bytes, encoder.delta,
            encoder.hits, encoder.misses, encoder.overflows, encoder.spared,
        )  # fmt: skip

    def and_(self, more: Counts) -> Counts:
        return Counts(*map(add, self, more))

    def since(self, before: Counts) -> Counts:
        return Counts(*map(sub, self, before))


class Turn(NamedTuple):
    """batch: a sealed frame and its raw pages, or None; pages: how many were done; over: nothing
    is left of the round; counts: what was made of these pages."""

    batch: tuple[memoryview, memoryview] | None
    pages: int
    over: bool
    counts: Counts


class Feeder:
    """Walks the dirty pages of a round, for all channels.

    seconds -- the CPU time it took
    sent    -- what was made of the pages that are sent, as whoever sends them counts: the encoder
               is ahead of them, and what was made last may never go
    """

    def __init__(self, memory: Memory, encoder: PageEncoder) -> None:
        self.seconds = 0.0
        self.sent = Counts()
        self._memory = memory
        self._encoder = encoder
        self._cursor = 0

    def begin_round(self, number: int) -> None:
        self._encoder.begin_round(number)
        self._cursor = 0

    def turn(self, dirty: PageSet, channel: int, *, holes: bool) -> Turn:
        """The next batch, for this channel.

        holes -- look for holes of a sparse file, which are zeros that nobody need read
        """
        began, before = time.thread_time(), Counts.of(self._encoder)
        pages = self._fill(dirty, holes and self._memory.view is None)
        batch = None
        if self._encoder.pending:
            batch = self._encoder.take()
            seal(batch[0], MessageType.PAGES, channel, len(batch[1]))
        self.seconds += time.thread_time() - began
        counts = Counts.of(self._encoder).since(before)
        return Turn(batch, pages, self._cursor >= self._encoder.pages, counts)

    def _fill(self, dirty: PageSet, holes: bool) -> int:
        """Encodes until the batch is full, the turn is over or nothing is left; how many pages."""
        memory, encoder, cursor, done = self._memory, self._encoder, self._cursor, 0
        while done < TURN_PAGES and not encoder.full and cursor < encoder.pages:
            end = encoder.pages
            if holes:
                stop, data = memory.extent(cursor, encoder.page_size)
                end = min(end, stop)
                if not data:
                    before = encoder.unchanged
                    zeros = encoder.feed_zeros(cursor, end - cursor)
                    cursor += zeros
                    # What the peer holds already was not to be sent (after a resume).
                    done += zeros - (encoder.unchanged - before)
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
        self._cursor = cursor
        return done
