"""Make the batches of a round, in the source's worker thread.

    dirty pages, from the end of the last batch -> guest memory -> encoder -> a sealed PAGES frame

A channel gets the next pages whenever it can take a batch, so a slow channel gets fewer pages, and
no channel delays the end of the round for long. A page is sent once in a round, and a round ends on
all channels before the next begins. So a delta builds on a page that the destination has already
applied, whichever channel carried it.
"""

from __future__ import annotations

import time
from operator import add, sub
from typing import NamedTuple

from migrate.memory.drop_behind import PIECE_BYTES, DropBehind
from migrate.memory.memory import Memory
from proto.codec.kernel import PageEncoder
from proto.codec.pageset import PageSet
from proto.wire.frames import seal
from proto.wire.messages import MessageType

# A turn of the worker ends with a full batch, or after this many pages: a guest whose dirty pages
# are all unchanged fills no batch, and the event loop is to see progress all the same.
TURN_PAGES = 1 << 14


class PageCounts(NamedTuple):
    """Pages by what the encoder made of them; the names are those of Statistics."""

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
    def of(cls, encoder: PageEncoder) -> PageCounts:
        return cls(
            encoder.zero, encoder.raw, encoder.unchanged, encoder.delta_bytes, encoder.delta,
            encoder.hits, encoder.misses, encoder.overflows, encoder.spared,
        )  # fmt: skip

    @property
    def in_batches(self) -> int:
        """Pages that are in a batch."""
        return self.duplicate + self.normal + self.xbzrle_pages

    def plus(self, more: PageCounts) -> PageCounts:
        return PageCounts(*map(add, self, more))

    def since(self, before: PageCounts) -> PageCounts:
        return PageCounts(*map(sub, self, before))


class Turn(NamedTuple):
    """The result of one turn of the worker.

    batch  -- the head of a sealed frame and its raw pages; None if no batch is due
    pages  -- how many pages of the round are done
    over   -- no page of the round is left
    counts -- what the encoder made of these pages
    """

    batch: tuple[memoryview, memoryview] | None
    pages: int
    over: bool
    counts: PageCounts


class BatchMaker:
    """Walks the dirty pages of a round, for all channels.

    seconds -- CPU time spent
    sent    -- what was made of the pages that have been sent; its owner counts. The encoder is
               ahead of them, and its last batch may never be sent
    """

    def __init__(self, memory: Memory, encoder: PageEncoder) -> None:
        self.seconds = 0.0
        self.sent = PageCounts()
        self._memory = memory
        self._encoder = encoder
        self._cursor = 0
        # In the first round all of the guest is read; up to which page it was dropped again.
        self._behind: DropBehind | None = None
        self._dropped = 0

    def begin_round(self, number: int) -> None:
        self._drop_behind(self._cursor)
        self._behind = self._memory.drop_behind if number == 1 else None
        self._dropped = 0
        self._encoder.begin_round(number)
        # A hole that was written since the last walk is marked, and the mark has been taken.
        self._memory.forget_extents()
        self._cursor = 0

    def turn(self, dirty: PageSet, channel: int, *, holes: bool) -> Turn:
        """Return the next batch for this channel.

        holes -- look for holes of a sparse file: they are zeros that need not be read
        """
        began, before = time.thread_time(), PageCounts.of(self._encoder)
        pages = self._fill(dirty, holes and self._memory.view is None)
        batch = None
        if self._encoder.pending:
            batch = self._encoder.finish_batch()
            seal(batch[0], MessageType.PAGES, channel, len(batch[1]))
        self.seconds += time.thread_time() - began
        counts = PageCounts.of(self._encoder).since(before)
        return Turn(batch, pages, self._cursor >= self._encoder.pages, counts)

    def _fill(self, dirty: PageSet, holes: bool) -> int:
        """Encode until the batch is full, the turn is over or no page is left.

        Return how many pages of the round are done.
        """
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
                    # After a resume, zeros that the peer already holds were not due.
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
        if (cursor - self._dropped) * encoder.page_size >= PIECE_BYTES:
            self._drop_behind(cursor)
        return done

    def _drop_behind(self, cursor: int) -> None:
        """Drop from the page cache what the first round has read before page `cursor`."""
        if self._behind is not None:
            page_size = self._encoder.page_size
            self._behind.drop(self._dropped * page_size, cursor * page_size)
            self._dropped = cursor
