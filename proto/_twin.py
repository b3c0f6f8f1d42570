"""The kernels in plain Python: what proto/_kernel.pyx means, without how it is made fast.

Same names, same bytes, same counters, same evictions, same errors; a hundred times slower. It is
the oracle of the tests, and `XBMIGRATE_KERNEL=python` runs it for real. Where the compiled kernel
has bitmaps, hash tables and pointers, this has sets, dicts and slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proto.errors import CacheSizeError, DecodeError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MIN_PAGE = 1024
MAX_PAGE = 16384
HEAD = 12  # a PAGES body opens with its round (4 bytes) and first page (8)
OP_ZERO, OP_RAW, OP_DELTA = 0x00, 0x40, 0x80
OP_MASK = 0xC0
GAP_MASK = 0x3F
RUN_LIMIT = 0xFFFF  # a raw run counts its pages in 16 bits
RECORD_ROOM = 32  # more than any record takes beside its page data
LIFETIME = 2  # rounds an entry is safe after its last use (QEMU's figure)
PROBES = 16  # slots looked at to find one that may be evicted
MOST_ENTRIES = 1 << 31

SHORT = "the data ends inside a record"
BAD_LENGTH = "a length does not end where it must"
ZERO_RUN = "an empty zero run inside a delta"
PAST_PAGE = "a run goes past the end of the page"
EMPTY_RUN = "an empty non-zero run"
PAST_DELTA = "a non-zero run goes past the end of the delta"
BAD_OP = "an unknown record type"
PAST_GUEST = "a page number outside the guest"
NO_BASE = "a delta for a page that was never sent"
EMPTY_DELTA = "a delta with no bytes, or longer than a page"


class FaultError(Exception):
    """What is wrong with the bytes, before it is known where they stand."""


# ---------------------------------------------------------------- ULEB128


def put_uleb(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def get_uleb(data: bytes, at: int, most: int) -> tuple[int, int]:
    """The value at `at`, of at most `most` bytes, and the position after it."""
    value = 0
    for n in range(most):
        if at + n >= len(data):
            raise FaultError(SHORT)
        byte = data[at + n]
        value |= (byte & 0x7F) << 7 * n
        if byte < 0x80:
            return value, at + n + 1
    raise FaultError(BAD_LENGTH)


# ---------------------------------------------------------------- one page


def encode_page(old: bytes, new: bytes) -> bytes | None:
    """The canonical delta, b"" for equal pages, None where it would not fit a page."""
    size = len(new)
    out = bytearray()
    i = 0
    while i < size:
        if len(out) + 2 > size:
            return None
        start = i
        while i < size and old[i] == new[i]:
            i += 1
        if i == size:
            break
        out += put_uleb(i - start)
        if len(out) + 2 > size:
            return None
        start = i
        while i < size and old[i] != new[i]:
            i += 1
        out += put_uleb(i - start)
        if len(out) + i - start > size:
            return None
        out += new[start:i]
    return bytes(out)


def delta_runs(delta: bytes, size: int) -> list[tuple[int, bytes]]:
    """The runs of a delta as (position in the page, new bytes), all of them inside the page."""
    runs = []
    i = at = 0
    while i < len(delta):
        if len(delta) - i < 2:
            raise FaultError(SHORT)
        equal, after = get_uleb(delta, i, 2)
        if i and equal == 0:
            raise FaultError(ZERO_RUN)
        i = after
        at += equal
        if at > size:
            raise FaultError(PAST_PAGE)
        if len(delta) - i < 2:
            raise FaultError(SHORT)
        count, i = get_uleb(delta, i, 2)
        if count == 0:
            raise FaultError(EMPTY_RUN)
        if at + count > size:
            raise FaultError(PAST_PAGE)
        if i + count > len(delta):
            raise FaultError(PAST_DELTA)
        runs.append((at, delta[i : i + count]))
        i += count
        at += count
    return runs


def encode(old: Buffer, new: Buffer) -> bytes | None:
    """The delta that turns `old` into `new`: see proto.xbzrle.encode."""
    old, new = bytes(old), bytes(new)
    if len(old) != len(new) or not 1 <= len(old) <= MAX_PAGE:
        raise ValueError(
            f"pages of {len(old)} and {len(new)} bytes: they must be equally long, 1 to {MAX_PAGE}"
        )
    return encode_page(old, new)


def decode(delta: Buffer, page: Buffer) -> None:
    """Rewrites `page` in place: see proto.xbzrle.decode."""
    target = memoryview(page)
    if not 1 <= len(target) <= MAX_PAGE:
        raise ValueError(f"a page of {len(target)} bytes: it must have 1 to {MAX_PAGE}")
    try:
        runs = delta_runs(bytes(delta), len(target))
    except FaultError as fault:
        raise DecodeError(f"bad XBZRLE delta: {fault}") from None
    for at, content in runs:
        target[at : at + len(content)] = content


# ---------------------------------------------------------------- page cache


def is_page_size(size: int) -> bool:
    return MIN_PAGE <= size <= MAX_PAGE and size & (size - 1) == 0


def has_bit(bits: bytes, i: int) -> bool:
    return i < len(bits) * 8 and bool(bits[i >> 3] >> (i & 7) & 1)


@dataclass
class Entry:
    page: int
    content: bytes
    age: int  # round of its last use
    proven: bool  # was used again after it came in


class PageCache:
    """Old contents of pages, by page number; each equals what the peer holds.

    Fully associative: any `size / page_size` pages fit together, whichever they are. An entry
    stays in its slot; a hand that moves over the slots finds whom to evict.
    """

    def __init__(self, size: int, page_size: int) -> None:
        self.page_size = page_size
        self.capacity = self._entries_for(size)
        self.evictions = 0
        self._slots: list[Entry | None] = [None] * self.capacity
        self._index: dict[int, int] = {}  # page -> slot
        self._spare = list(reversed(range(self.capacity)))  # stack of free slots
        self._hand = 0

    def _entries_for(self, size: int) -> int:
        if not is_page_size(self.page_size):
            raise ValueError(
                f"a page of {self.page_size} bytes: it must be a power of two from {MIN_PAGE} "
                f"to {MAX_PAGE}"
            )
        if size < self.page_size or size & (size - 1):
            raise CacheSizeError(
                f"a cache of {size} bytes: the size must be a power of two and at least one page "
                f"({self.page_size} bytes)"
            )
        if size // self.page_size >= MOST_ENTRIES:
            raise CacheSizeError(
                f"a cache of {size} bytes: more than {MOST_ENTRIES} pages cannot be indexed"
            )
        return size // self.page_size

    @property
    def size(self) -> int:
        return self.capacity * self.page_size

    def __len__(self) -> int:
        return len(self._index)

    def _entry(self, page: int) -> Entry | None:
        slot = self._index.get(page)
        return None if slot is None else self._slots[slot]

    def _victim(self, now: int, todo: bytes) -> int | None:
        """A slot that may be evicted, or None: then the newcomer is refused.

        Refusing is what resists cyclic scans: of a working set larger than the cache, as many
        pages as fit keep their places and hit every round, where plain LRU would hit never.
        A page that is still to be sent this round is a certain hit and is never evicted.
        """
        for _ in range(min(PROBES, self.capacity)):
            slot = self._hand
            self._hand = (self._hand + 1) % self.capacity
            entry = self._slots[slot]
            assert entry is not None  # there are no spares
            if has_bit(todo, entry.page):
                continue
            if entry.age + (LIFETIME if entry.proven else 1) <= now:
                return slot
        return None

    def _insert(self, page: int, content: bytes, now: int, todo: bytes) -> bool:
        """Puts a page that is not there yet; False where it was refused."""
        if self._spare:
            slot = self._spare.pop()
        else:
            victim = self._victim(now, todo)
            if victim is None:
                return False
            slot = victim
            evicted = self._slots[slot]
            assert evicted is not None
            del self._index[evicted.page]
            self.evictions += 1
        self._slots[slot] = Entry(page, content, now, proven=now > 1)
        self._index[page] = slot
        return True

    def get(self, page: int) -> bytes | None:
        """The cached content of a page, or None."""
        entry = self._entry(page)
        return None if entry is None else entry.content

    def put(self, page: int, content: Buffer, now: int, todo: Buffer = b"") -> bool:
        """Caches `content` as of round `now`; False where the page was refused.

        `todo` is the dirty bitmap of the round: its pages are not evicted.
        """
        content = bytes(content)
        if len(content) != self.page_size:
            raise ValueError(f"a page has {self.page_size} bytes, not {len(content)}")
        entry = self._entry(page)
        if entry is None:
            return self._insert(page, content, now, bytes(todo))
        entry.content, entry.age, entry.proven = content, now, True
        return True

    def drop(self, page: int) -> None:
        """Forgets a page; nothing happens where it is not cached."""
        slot = self._index.pop(page, None)
        if slot is not None:
            self._slots[slot] = None
            self._spare.append(slot)

    def resize(self, size: int) -> None:
        """Changes the capacity in place. Every entry that still fits is kept, the newest first.

        Raises CacheSizeError, and changes nothing, for a size that breaks the rule.
        """
        capacity = self._entries_for(size)
        if capacity == self.capacity:
            return
        # newest age first, then the lower slot
        order = sorted(
            (-entry.age, slot, entry) for slot, entry in enumerate(self._slots) if entry is not None
        )
        slots: list[Entry | None] = [None] * capacity
        for _, slot, entry in order[:capacity]:  # those whose slot stays
            if slot < capacity:
                slots[slot] = entry
        for _, slot, entry in order[:capacity]:  # those that must move down
            if slot >= capacity:
                slots[slots.index(None)] = entry
        self._slots = slots
        self._index = {entry.page: slot for slot, entry in enumerate(slots) if entry is not None}
        self._spare = [slot for slot in reversed(range(capacity)) if slots[slot] is None]
        self._hand = 0
        self.capacity = capacity


# ---------------------------------------------------------------- encoder


def keyed_hash(content: bytes, key: bytes) -> int:
    """NH with 64-bit words: two pages that differ collide with probability 2^-64 over the keys."""
    data, mask = memoryview(content).cast("Q"), 2**64 - 1
    words = [(d + k) & mask for d, k in zip(data, memoryview(key).cast("Q"), strict=True)]
    return sum(a * b for a, b in zip(words[::2], words[1::2], strict=True)) % 2**128


class PageEncoder:
    """What the source knows about the peer's copy, and the batches that bring it up to date.

    See proto/README.md ("PAGES") for the record layout. A page is sent zero, unchanged (not at
    all), as a delta or raw. `_sent` pages are known to the peer; of those, `_zeros` are known to
    be zero there (which is a delta base that needs no cache), the cache holds some others in full,
    and with a `key` every page's keyed hash is kept, so that `scan` can tell what has changed.
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        cache: PageCache | None = None,
        key: bytes | None = None,
        room: int = 1 << 20,
    ) -> None:
        if not is_page_size(page_size):
            raise ValueError(f"a page of {page_size} bytes: a power of two from 1024 to 16384")
        if cache is not None and cache.page_size != page_size:
            raise ValueError("the cache has pages of another size")
        if cache is not None and len(cache):
            raise ValueError("the cache holds pages of another migration")
        if key is not None and len(key) != page_size:
            raise ValueError(f"the hash key must be as long as a page, {page_size} bytes")
        if pages == 0 or room < page_size + 2 * RECORD_ROOM:
            raise ValueError("no pages, or no room for one")
        self.pages = pages
        self.page_size = page_size
        self.cache_object = cache
        self.zero = self.unchanged = self.raw = self.delta = self.delta_bytes = 0
        self.hits = self.misses = self.overflows = 0
        self._key = key
        self._room = room
        self._sent: set[int] = set()
        self._zeros: set[int] = set()
        self._hashes: dict[int, int] = {}
        self._zero_page = bytes(page_size)
        self._now = 0
        self._out = bytearray()
        self._next_page = 0  # one past the last page of the batch
        self._zero_first = self._zero_count = 0  # a zero run that is not written yet
        self._raw_at = self._raw_count = 0  # where the open raw run has its count, 0 for none

    def begin_round(self, number: int) -> None:
        """Rounds count from 1; a batch belongs to one round, so none may be open."""
        if self.pending:
            raise ValueError("a batch of the last round was not taken")
        if number == 0 or number < self._now:
            raise ValueError(f"round {number} after round {self._now}")
        self._now = number

    @property
    def pending(self) -> int:
        """Bytes of the open batch; 0 where there is none."""
        return len(self._out) + (RECORD_ROOM if self._zero_count else 0)

    @property
    def full(self) -> bool:
        """Whether one more page might not fit the open batch."""
        return self._room - len(self._out) < self.page_size + 2 * RECORD_ROOM

    def _open_record(self, op: int, page: int) -> None:
        if not self._out:
            self._out += self._now.to_bytes(4, "big") + page.to_bytes(8, "big")
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
        if self.cache_object is not None:
            self.cache_object.drop(page)
        self._note_hash(page, self._zero_page)

    def _put_raw(self, page: int, content: bytes) -> None:
        if not (self._raw_at and page == self._next_page and self._raw_count < RUN_LIMIT):
            self._open_record(OP_RAW, page)
            self._raw_at = len(self._out)
            self._raw_count = 0
            self._out += bytes(2)
        self._raw_count += 1
        self._out[self._raw_at : self._raw_at + 2] = self._raw_count.to_bytes(2, "big")
        self._out += content
        self._next_page = page + 1
        self.raw += 1

    def _put_delta(self, page: int, delta: bytes) -> None:
        self._open_record(OP_DELTA, page)
        self._out += put_uleb(len(delta)) + delta
        self._next_page = page + 1
        self.delta += 1
        self.delta_bytes += len(delta)

    def _base(self, page: int) -> tuple[bytes | None, Entry | None]:
        """What a delta of this page can start from, and its entry where that is in the cache."""
        if self.cache_object is None or page not in self._sent:
            return None, None
        if page in self._zeros:
            return self._zero_page, None
        entry = self.cache_object._entry(page)
        if entry is None:
            return None, None
        entry.age, entry.proven = self._now, True
        return entry.content, entry

    def _put_page(self, page: int, content: bytes, todo: bytes) -> None:
        if content == self._zero_page:
            if page in self._zeros:
                self.unchanged += 1
            else:
                self._put_zero(page)
            return
        base, entry = self._base(page)
        delta = None
        if base is not None:
            self.hits += 1
            delta = encode_page(base, content)
            if delta == b"":
                self.unchanged += 1
                return
            self.overflows += delta is None
        elif self.cache_object is not None and page in self._sent:
            self.misses += 1
        self._flush_zeros()
        if delta is not None:
            self._put_delta(page, delta)
        else:
            self._put_raw(page, content)
        self._sent.add(page)
        self._zeros.discard(page)
        if entry is not None:
            entry.content = content
        elif self.cache_object is not None:
            self.cache_object._insert(page, content, self._now, todo)
        self._note_hash(page, content)

    def _note_hash(self, page: int, content: bytes) -> None:
        if self._key is not None:
            self._hashes[page] = keyed_hash(content, self._key)

    @property
    def _floor(self) -> int:
        """The lowest page that the open batch still takes."""
        if self._zero_count:
            return self._zero_first + self._zero_count
        return self._next_page if self._out else 0

    def feed(
        self, numbers: Buffer, count: int, snapshot: Buffer, todo: Buffer, start: int = 0
    ) -> int:
        """Encodes pages `start` to `count` of a snapshot; how many of them fitted the batch.

        numbers  -- page numbers (64 bits each), ascending, also across the feeds of one batch
        snapshot -- their contents, one page after the other: private memory
        todo     -- the dirty bitmap of the round, a bit per page (what the cache must not evict)
        """
        wanted, data, bits = memoryview(numbers), memoryview(snapshot), bytes(todo)
        floor = self._floor
        if self._now == 0:
            raise ValueError("no round was begun")
        if not 0 <= start <= count <= len(wanted):
            raise ValueError(f"{count} pages from {start}: {len(wanted)} numbers were given")
        if len(data) < count * self.page_size or len(bits) * 8 < self.pages:
            raise ValueError("the snapshot or the dirty bitmap is too short")
        for i in range(start, count):
            if not floor <= wanted[i] < self.pages:
                raise ValueError(f"page {wanted[i]} is out of order or outside the guest")
            if self.full:
                return i - start
            content = bytes(data[i * self.page_size : (i + 1) * self.page_size])
            self._put_page(wanted[i], content, bits)
            floor = wanted[i] + 1
        return count - start

    def feed_zeros(self, first: int, count: int) -> int:
        """Pages that are known to be zero without reading them (holes of a sparse file)."""
        if self._now == 0 or first < self._floor or first + count > self.pages:
            raise ValueError(f"pages {first} to {first + count} are out of order or outside")
        if self.full:
            raise ValueError("the batch is full")
        for page in range(first, first + count):
            if page in self._zeros:
                self.unchanged += 1
                continue
            if self.full:
                return page - first
            self._put_zero(page)
        return count

    def take(self, headroom: int = 0) -> bytearray:
        """The body of the batch, after `headroom` free bytes for a frame header; opens the next."""
        if headroom < 0:
            raise ValueError(f"a headroom of {headroom} bytes")
        self._flush_zeros()
        body = bytearray(headroom) + self._out
        self._out = bytearray()
        self._raw_at = 0
        return body

    def _differs(self, page: int, content: bytes) -> bool:
        assert self._key is not None
        if page not in self._sent:
            return True
        if page in self._zeros:
            return content != self._zero_page
        cached = None if self.cache_object is None else self.cache_object.get(page)
        if cached is not None:
            return content != cached
        return keyed_hash(content, self._key) != self._hashes[page]

    def scan(self, first: int, count: int, data: Buffer, changed: Buffer) -> int:
        """Sets a bit in `changed` for each of `count` pages in `data` that the peer lacks.

        Exact for pages in the cache and for zero pages; others by their keyed hash, which misses
        a change with probability 2^-64. Returns how many pages differ.
        """
        content, bits = memoryview(data), memoryview(changed)
        if self._key is None:
            raise ValueError("scan needs an encoder with a hash key")
        if first + count > self.pages:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        if len(content) < count * self.page_size or len(bits) * 8 < self.pages:
            raise ValueError("the data or the bitmap is too short")
        found = 0
        for i in range(count):
            page = first + i
            if self._differs(page, bytes(content[i * self.page_size : (i + 1) * self.page_size])):
                bits[page >> 3] |= 1 << (page & 7)
                found += 1
        return found

    def scan_zeros(self, first: int, count: int, changed: Buffer) -> int:
        """As `scan`, for pages that are known to be zero without reading them."""
        bits = memoryview(changed)
        if first + count > self.pages:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        if len(bits) * 8 < self.pages:
            raise ValueError("the bitmap is too short")
        differing = [page for page in range(first, first + count) if page not in self._zeros]
        for page in differing:
            bits[page >> 3] |= 1 << (page & 7)
        return len(differing)

    def known_zero(self, first: int, count: int) -> bool:
        """Whether the peer holds zeros in all of these pages."""
        return all(page in self._zeros for page in range(first, min(first + count, self.pages)))


# ---------------------------------------------------------------- decoder


@dataclass(frozen=True)
class Record:
    op: int
    first: int
    count: int
    data: bytes

    @property
    def pages(self) -> range:
        return range(self.first, self.first + self.count)


class PageDecoder:
    """Applies batches to the destination's memory, and knows what has come.

    stale -- a byte per chunk of `chunk_pages` pages, set to 1 when the chunk is written
    """

    def __init__(self, pages: int, page_size: int, chunk_pages: int) -> None:
        if not is_page_size(page_size):
            raise ValueError(f"a page of {page_size} bytes: a power of two from 1024 to 16384")
        if pages == 0 or chunk_pages == 0:
            raise ValueError("no pages")
        self.pages = pages
        self.page_size = page_size
        self.chunk_pages = chunk_pages
        self.stale = bytearray(b"\1") * -(-pages // chunk_pages)
        self.zero = self.raw = self.delta = 0
        self._received: set[int] = set()
        self._written: set[int] = set()

    @property
    def received_pages(self) -> int:
        return len(self._received)

    def _read_record(self, body: bytes, at: int, next_page: int) -> tuple[Record, int]:
        """The record at `at` and the position after it; nothing is believed before it is compared.

        Raises FaultError.
        """
        op, first = body[at] & OP_MASK, body[at] & GAP_MASK
        at += 1
        if first == GAP_MASK:
            more, at = get_uleb(body, at, 9)
            if more >= self.pages:
                raise FaultError(PAST_GUEST)
            first += more
        first += next_page
        if first >= self.pages:
            raise FaultError(PAST_GUEST)
        count, length = 1, 0
        if op == OP_ZERO:
            count, at = get_uleb(body, at, 9)
        elif op == OP_RAW:
            if len(body) - at < 2:
                raise FaultError(SHORT)
            count, at = int.from_bytes(body[at : at + 2], "big"), at + 2
            length = count * self.page_size
        elif op == OP_DELTA:
            length, at = get_uleb(body, at, 3)
            if not 0 < length <= self.page_size:
                raise FaultError(EMPTY_DELTA)
        else:
            raise FaultError(BAD_OP)
        if not 0 < count <= self.pages - first:
            raise FaultError(PAST_GUEST)
        if length > len(body) - at:
            raise FaultError(SHORT)
        return Record(op, first, count, body[at : at + length]), at + length

    def _fresh_pages(self, record: Record) -> Iterator[int]:
        """The pages of a record that get their first bytes (zeros need none)."""
        if record.op != OP_ZERO:
            yield from (page for page in record.pages if page not in self._written)

    def check(self, body: Buffer, fresh: list[tuple[int, int]] | None = None) -> int:
        """Validates a whole batch and touches nothing. Returns the round it belongs to.

        Runs of pages that it will write for the first time are appended to the list `fresh` as
        (first, count), so that the caller can make room for them.

        Raises DecodeError, naming the page and the byte; `fresh` is as it was then.
        """
        body = bytes(body)
        if len(body) <= HEAD:
            raise DecodeError(f"a batch of {len(body)} bytes holds no record")
        next_page = page = int.from_bytes(body[4:HEAD], "big")
        if next_page >= self.pages:
            raise DecodeError(f"page {page}, byte 4 of the batch: {PAST_GUEST}")
        at = HEAD
        runs: list[tuple[int, int]] = []
        while at < len(body):
            try:
                record, after = self._read_record(body, at, next_page)
                page = record.first
                if record.op == OP_DELTA:
                    self._check_delta(record)
            except FaultError as fault:
                raise DecodeError(f"page {page}, byte {at} of the batch: {fault}") from None
            for new in self._fresh_pages(record):
                if runs and sum(runs[-1]) == new:
                    runs[-1] = (runs[-1][0], runs[-1][1] + 1)
                else:
                    runs.append((new, 1))
            next_page, at = record.first + record.count, after
        if fresh is not None:
            fresh += runs
        return int.from_bytes(body[:4], "big")

    def _check_delta(self, record: Record) -> list[tuple[int, bytes]]:
        if record.first not in self._received:
            raise FaultError(NO_BASE)
        return delta_runs(record.data, self.page_size)

    def apply(self, body: Buffer, memory: Buffer) -> int:
        """Writes a batch into the guest's memory; how many pages it held.

        A DecodeError leaves the bad page and those after it as they were; run `check` first to
        have all of the batch or nothing.
        """
        body, target = bytes(body), memoryview(memory)
        if len(target) < self.pages * self.page_size:
            raise ValueError("the memory is shorter than the guest")
        if len(body) <= HEAD:
            raise DecodeError(f"a batch of {len(body)} bytes holds no record")
        next_page, at, done = int.from_bytes(body[4:HEAD], "big"), HEAD, 0
        if next_page >= self.pages:
            raise DecodeError(f"page {next_page}: {PAST_GUEST}")
        while at < len(body):
            try:
                record, after = self._read_record(body, at, next_page)
                self._apply_record(record, target)
            except FaultError as fault:
                raise DecodeError(f"byte {at} of the batch: {fault}") from None
            done += record.count
            next_page, at = record.first + record.count, after
        return done

    def _apply_record(self, record: Record, target: memoryview) -> None:
        base = record.first * self.page_size
        if record.op == OP_DELTA:
            for at, content in self._check_delta(record):
                target[base + at : base + at + len(content)] = content
            self.delta += 1
        elif record.op == OP_RAW:
            target[base : base + len(record.data)] = record.data
            self.raw += record.count
        else:
            for page in self._written.intersection(record.pages):
                start = page * self.page_size
                target[start : start + self.page_size] = bytes(self.page_size)
                self.stale[page // self.chunk_pages] = 1
            self.zero += record.count
        self._received.update(record.pages)
        if record.op != OP_ZERO:
            self._written.update(record.pages)
            for page in record.pages:
                self.stale[page // self.chunk_pages] = 1

    def ever_written(self, first: int, count: int) -> bool:
        """Whether any of these pages ever held something other than its first zeros."""
        return any(page in self._written for page in range(first, min(first + count, self.pages)))
