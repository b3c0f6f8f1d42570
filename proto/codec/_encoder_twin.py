"""The source's kernel in plain Python: see _encoder.pyx for what it does and why."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from proto.codec._batch_twin import (
    GAP_MASK,
    HEAD,
    OP_DELTA,
    OP_RAW,
    OP_ZERO,
    RAM_PAGE,
    RAM_RECORD,
    RAM_ZERO,
    RECORD_ROOM,
    RUN_LIMIT,
    add_to_check,
)
from proto.codec._cache_twin import Entry, PageCache
from proto.codec._hashes_twin import PageHashes
from proto.codec._heat_twin import PageHeat
from proto.codec._peer_copy_twin import PeerCopy
from proto.codec._xbzrle_twin import delta_runs, encode_page, put_uleb
from proto.codec.faults import EMPTY_DELTA, NO_BASE, PAST_GUEST, FaultError
from proto.wire.errors import DecodeError

if TYPE_CHECKING:
    from typing_extensions import Buffer

SNAPSHOT_BYTES = 256 << 10
MOST_OVERFLOWS = 6


class PageEncoder(PeerCopy):
    """The batches that bring the peer's copy up to date.

    hashes   -- keeps the hash of every page that is sent
    cache    -- of old contents; without one there are no deltas
    merge    -- deltas are those of xbzrle.encode(merge=True)
    headroom -- bytes left free for a frame header at the start of a batch
    room     -- most bytes of a batch, without the headroom
    """

    def __init__(
        self,
        hashes: PageHashes,
        cache: PageCache | None = None,
        *,
        merge: bool = False,
        headroom: int = 0,
        room: int = 1 << 20,
    ) -> None:
        super().__init__(hashes, cache)
        if headroom < 0 or room < self.page_size + 3 * RECORD_ROOM:
            raise ValueError("no room for a page")
        self.zero = self.unchanged = self.raw = self.delta = self.delta_bytes = 0
        self.hits = self.misses = self.overflows = self.spared = 0
        self._merge = merge
        self._headroom = headroom
        self._room = room
        self._now = 0
        self._snapshot = memoryview(bytearray())
        self._numbers = memoryview(array("Q", bytes(8 * (SNAPSHOT_BYTES // self.page_size))))
        self._out = bytearray()
        self._data = bytearray()
        self._check = 0
        self._next_page = 0  # one past the last page of the batch
        self._past = 0  # one past the last page of `feed_records` in this round
        self._zero_first = self._zero_count = 0  # a zero run that is not written yet
        self._raw_at = self._raw_count = 0  # where the open raw run has its count, 0 for none
        self._bases = cache  # of deltas; None: there are none
        self._heat = PageHeat(self.pages)
        self._overflowed: dict[int, int] = {}  # page -> how often in a row
        self._wait: dict[int, int] = {}  # page -> sendings for which it is left out

    @property
    def active(self) -> bool:
        """Whether deltas are made. Setting it to False empties the cache: no base in it ages."""
        return self._bases is not None

    @active.setter
    def active(self, on: bool) -> None:
        if on and self._cache is None:
            raise ValueError("there is no cache to make deltas from")
        if self._bases is not None and not on:
            self._bases.clear()
        self._bases = self._cache if on else None

    def _note_overflow(self, page: int) -> None:
        self.overflows += 1
        times = min(self._overflowed.get(page, 0) + 1, MOST_OVERFLOWS)
        self._overflowed[page] = times
        if times > 1:
            self._wait[page] = 1 << (times - 2)

    def begin_round(self, number: int) -> None:
        """Begin a round. Rounds count from 1.

        Raises ValueError for a number below that of the last round, and if a batch is open: a
        batch belongs to one round.
        """
        if self.pending:
            raise ValueError("a batch of the last round was not taken")
        if number == 0 or number < self._now:
            raise ValueError(f"round {number} after round {self._now}")
        self._now = number
        self._past = 0

    def sample_heat(self) -> tuple[list[int], list[int]]:
        """Return what was sent again and what is hot now: see PageHeat.sample."""
        return self._heat.sample()

    def _drop_batch(self) -> None:
        self._out, self._data = bytearray(), bytearray()
        self._snapshot = memoryview(bytearray())
        self._raw_at = self._check = self._zero_count = 0

    def adopt(self, first: int, table: Buffer) -> None:
        """As PeerCopy.adopt. An open batch is dropped: it will not be sent."""
        super().adopt(first, table)
        self._drop_batch()

    def forget(self) -> None:
        """As PeerCopy.forget. An open batch is dropped: it will not be sent."""
        super().forget()
        self._overflowed.clear()
        self._wait.clear()
        self._drop_batch()

    @property
    def pending(self) -> bool:
        """Whether the open batch has anything to send."""
        return bool(self._out or self._zero_count)

    def _left(self) -> int:
        """Return how many pages still fit the batch, whatever becomes of them."""
        free = self._room - len(self._out) - len(self._data) - HEAD - RECORD_ROOM
        return max(free // (self.page_size + RECORD_ROOM), 0)

    @property
    def full(self) -> bool:
        """Whether one more page might not fit the open batch."""
        return self._left() == 0

    def space(self) -> tuple[memoryview, memoryview]:
        """Return where to copy the next pages: (memory, their numbers), both writable.

        Both have room for the same number of pages, 0 if the batch is full. The memory is where the
        next raw pages of the batch belong: those up to the first that is not sent raw are in place.
        """
        offered = min(self._left(), SNAPSHOT_BYTES // self.page_size)
        self._snapshot = memoryview(bytearray(offered * self.page_size))
        return self._snapshot, self._numbers[:offered]

    def _open_record(self, op: int, page: int) -> None:
        if not self._out:
            # the check is written at the end of the batch
            self._out += self._now.to_bytes(4, "big") + page.to_bytes(8, "big") + bytes(8)
            self._next_page = page
        gap = page - self._next_page
        if gap < GAP_MASK:
            self._out.append(op | gap)
        else:
            self._out.append(op | GAP_MASK)
            self._out += put_uleb(gap - GAP_MASK)
        self._raw_at = 0

    def _flush_zeros(self) -> None:
        if self._zero_count:
            self._open_record(OP_ZERO, self._zero_first)
            self._out += put_uleb(self._zero_count)
            self._next_page = self._zero_first + self._zero_count
            self._zero_count = 0

    def _put_zero(self, page: int) -> None:
        if self._zero_count and page != self._zero_first + self._zero_count:
            self._flush_zeros()
        if self._zero_count == 0:
            self._zero_first = page
        self._zero_count += 1
        self.zero += 1
        self._sent.add(page)
        self._zeros.add(page)
        if self._cache is not None:
            self._cache.drop(page)
        self._hashes.note(page, self._hashes.zero)

    def _put_raw(self, page: int, content: bytes) -> None:
        if not (self._raw_at and page == self._next_page and self._raw_count < RUN_LIMIT):
            self._open_record(OP_RAW, page)
            self._raw_at = len(self._out)
            self._raw_count = 0
            self._out += bytes(2)
        self._raw_count += 1
        self._out[self._raw_at : self._raw_at + 2] = self._raw_count.to_bytes(2, "big")
        self._data += content
        value = self._hashes.hash_of(content)
        self._check = add_to_check(self._check, value)
        self._hashes.note(page, value)
        self._next_page = page + 1
        self.raw += 1

    def _put_delta(self, page: int, delta: bytes) -> None:
        self._open_record(OP_DELTA, page)
        self._out += put_uleb(len(delta)) + delta
        self._next_page = page + 1
        self.delta += 1
        self.delta_bytes += len(delta)
        self._hashes.mark_stale(page)

    def _base(self, page: int, bases: PageCache) -> tuple[bytes | None, Entry | None]:
        """Return the base of a delta of this page, and the cache entry that has it, if any."""
        if page in self._zeros:
            return self._zero_page, None
        entry = bases.entry(page)
        if entry is None:
            return None, None
        entry.age, entry.reused = self._now, True
        return entry.content, entry

    def _tried(
        self, page: int, content: bytes, bases: PageCache
    ) -> tuple[bytes | None, Entry | None]:
        """Return the delta, None if the page is to be sent raw; and the entry that is its base."""
        if self._wait.get(page):
            self._wait[page] -= 1
            self.spared += 1
            return None, None
        base, entry = self._base(page, bases)
        if base is None:
            self.misses += 1
            return None, None
        self.hits += 1
        delta = encode_page(base, content, self._merge)
        if delta is None:
            self._note_overflow(page)
        else:
            self._overflowed.pop(page, None)
        return delta, entry

    def _put_page(self, page: int, content: bytes, dirty: bytes) -> None:
        if content == self._zero_page:
            if page in self._zeros:
                self.unchanged += 1
            else:
                self._put_zero(page)
            return
        known = page in self._sent
        if known and page not in self._zeros:
            self._heat.warm(page)
        bases, delta, entry = self._bases, None, None
        if bases is not None and known:
            delta, entry = self._tried(page, content, bases)
        if delta == b"":
            # Equal now, but it was written: its hash may be of a moment in between.
            self.unchanged += 1
            self._hashes.mark_stale(page)
            return
        self._flush_zeros()
        if delta is not None:
            self._put_delta(page, delta)
        else:
            self._put_raw(page, content)
        self._sent.add(page)
        self._zeros.discard(page)
        if bases is not None:
            self._keep(page, entry, content, dirty, bases)

    def _keep(
        self, page: int, entry: Entry | None, content: bytes, dirty: bytes, bases: PageCache
    ) -> None:
        """Cache what the peer holds now, or forget the page if it is left out."""
        if self._wait.get(page):
            bases.drop(page)
        elif entry is not None:
            entry.content = content
        else:
            bases.insert(page, content, self._now, dirty)

    @property
    def _floor(self) -> int:
        """Return the lowest page that the open batch still takes."""
        if self._zero_count:
            return self._zero_first + self._zero_count
        return self._next_page if self._out else 0

    def feed(self, count: int, dirty: Buffer) -> None:
        """Encode the first `count` pages of the last `space`, in ascending order.

        dirty -- the round's dirty bitmap: the cache evicts none of its pages

        Raises ValueError for a page out of order or outside the guest; those before it are in the
        batch.
        """
        bits, data, size = bytes(dirty), self._snapshot, self.page_size
        floor = self._floor
        if self._now == 0:
            raise ValueError("no round was begun")
        if not 0 <= count <= len(data) // size:
            raise ValueError(f"{count} pages: there was space for {len(data) // size}")
        if len(bits) * 8 < self.pages:
            raise ValueError("the dirty bitmap is too short")
        if count:
            self._snapshot = memoryview(bytearray())
        for i in range(count):
            page = self._numbers[i]
            if not floor <= page < self.pages:
                raise ValueError(f"page {page} is out of order or outside the guest")
            self._put_page(page, bytes(data[i * size : (i + 1) * size]), bits)
            floor = page + 1

    def feed_memory(
        self, memory: Buffer, dirty: Buffer, first: int, end: int, most: int
    ) -> tuple[int, int]:
        """Encode the dirty pages from `first` up to `end`, from guest memory itself.

        memory -- the guest's, which may be written meanwhile; zeros fill up its last page
        dirty  -- the round's dirty bitmap, in whole 8-byte words
        most   -- stop after this many pages; it also stops when the batch is full

        Returns (pages encoded, the page to go on from).
        """
        live, bits, size = memoryview(memory), bytes(dirty), self.page_size
        if self._now == 0 or first < self._floor or end > self.pages:
            raise ValueError(f"pages {first} to {end} are out of order or outside the guest")
        if len(bits) * 8 < self.pages or len(bits) % 8:
            raise ValueError("the dirty bitmap is too short")
        if not (self.pages - 1) * size < len(live) <= self.pages * size:
            raise ValueError(f"{len(live)} bytes are not {self.pages} pages of {size}")
        self._snapshot = memoryview(bytearray())
        count = 0
        for page in range(first, end):
            if count == most or self.full:
                return count, page
            if bits[page >> 3] >> (page & 7) & 1:
                content = bytes(live[page * size : (page + 1) * size])
                self._put_page(page, content.ljust(size, b"\0"), bits)
                count += 1
        return count, max(first, end)

    def feed_records(
        self, data: Buffer, records: Buffer, first: int, count: int
    ) -> tuple[int, bool]:
        """Encode pages as QEMU sends them: the records `first` to `count` of a RamReader.

        QEMU's deltas are passed on as they are, even if `active` is not set. Such a delta is also
        applied to the cached content. A page that is not cached is unknown after it, and is sent
        raw the next time.

        Returns (the first record that was not encoded, whether it begins a new round). It stops
        when the batch is full, and before a page that does not follow the last one. Raises
        DecodeError for a bad delta, and for one without a base.
        """
        content, table = memoryview(data), memoryview(records)
        if self._now == 0:
            raise ValueError("no round was begun")
        if not 0 <= first <= count or len(table) < count * RAM_RECORD.size:
            raise ValueError("there are fewer records than that")
        if first < count:
            self._snapshot = memoryview(bytearray())
        for i in range(first, count):
            if self.full:
                return i, False
            page, at, length, kind = RAM_RECORD.unpack_from(table, i * RAM_RECORD.size)
            if page < self._past:
                return i, True
            try:
                if (
                    page >= self.pages
                    or at + length > len(content)
                    or (kind == RAM_PAGE and length != self.page_size)
                ):
                    raise FaultError(PAST_GUEST)
                if kind == RAM_ZERO:
                    self._put_page(page, self._zero_page, b"")
                elif kind == RAM_PAGE:
                    self._put_page(page, bytes(content[at : at + length]), b"")
                else:
                    self._pass_delta(page, bytes(content[at : at + length]))
            except FaultError as fault:
                raise DecodeError(f"page {page}: {fault}") from None
            self._past = page + 1
        return count, False

    def _pass_delta(self, page: int, delta: bytes) -> None:
        """Pass on a delta that QEMU has made. Raise FaultError."""
        if page not in self._sent:
            raise FaultError(NO_BASE)
        if not delta:
            self.unchanged += 1
            return
        if len(delta) > self.page_size:
            raise FaultError(EMPTY_DELTA)
        zero = page in self._zeros
        bases = self._bases
        entry = bases.entry(page) if bases is not None else None
        content = bytearray(self._zero_page if entry is None else entry.content)
        for at, run in delta_runs(delta, self.page_size):
            content[at : at + len(run)] = run
        if not zero:
            self._heat.warm(page)
        if entry is not None:
            entry.content, entry.age, entry.reused = bytes(content), self._now, True
        elif zero and bases is not None and not self._wait.get(page):
            bases.insert(page, bytes(content), self._now, b"")
        self._flush_zeros()
        self._put_delta(page, delta)
        self._zeros.discard(page)

    def feed_zeros(self, first: int, count: int) -> int:
        """Encode pages that are known to be zeros without reading them: holes of a sparse file.

        Returns how many fitted the batch.
        """
        if self._now == 0 or first < self._floor or first + count > self.pages:
            raise ValueError(f"pages {first} to {first + count} are out of order or outside")
        self._snapshot = memoryview(bytearray())
        for page in range(first, first + count):
            if page in self._zeros:
                self.unchanged += 1
                continue
            if self.full:
                return page - first
            self._put_zero(page)
        return count

    def finish_batch(self) -> tuple[memoryview, memoryview]:
        """End the batch. Return it as (head, pages), two writable views.

        head  -- `headroom` free bytes, then round, first page, check and records
        pages -- the raw pages, in the order of their records

        Raises ValueError if nothing is pending.
        """
        self._flush_zeros()
        if not self._out:
            raise ValueError("the batch is empty")
        self._out[12:HEAD] = self._check.to_bytes(8, "big")
        head, data = bytearray(self._headroom) + self._out, self._data
        self._out, self._data = bytearray(), bytearray()
        self._snapshot = memoryview(bytearray())
        self._raw_at = self._check = 0
        return memoryview(head), memoryview(data)
