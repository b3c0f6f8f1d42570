"""The kernels in plain Python: what the compiled ones mean, without how they are made fast.

Same names, same bytes, same counters, same evictions, same errors; a hundred times slower. It is
the oracle of the tests, and `XBMIGRATE_KERNEL=python` runs it for real. Where the compiled kernel
has bitmaps, hash tables and pointers, this has sets, dicts and slices.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from proto.errors import CacheSizeError, DecodeError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MIN_PAGE = 1024
MAX_PAGE = 16384
HEAD = 20  # round (4 bytes), first page (8), check of the raw pages (8)
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
BAD_DATA = "the raw records do not name as many pages as came"
BAD_CHECK = "the content of its raw pages does not match their check"

SNAPSHOT_BYTES = 256 << 10
SENDING = 32  # what one sending adds to the heat of a page
HOTTEST = 255
COOL_SURVEYS = 4  # after so many surveys, heat is halved
MOST_OVERFLOWS = 6  # in a row: a page is left out for 16 sendings then
WIDE = 32
STEP = 0x9E3779B97F4A7C15
WORD = 64  # gaps of two are looked at in pieces of so many bytes
DENSE = 21  # of those, so many changed bytes could become all of them
SIMD = "none"
# Of a RamReader: page, where its body begins, how long that is, its kind.
RAM_RECORD = struct.Struct("=QQII")
RAM_ZERO, RAM_PAGE, RAM_DELTA = range(3)


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


def runs_of(changed: list[bool]) -> list[tuple[int, int]]:
    """The runs of True, as (start, end)."""
    edges = [i for i, flag in enumerate(changed) if flag != (i > 0 and changed[i - 1])]
    if len(edges) % 2:
        edges.append(len(changed))
    return list(zip(edges[::2], edges[1::2], strict=True))


def merged(changed: list[bool]) -> list[bool]:
    """Closes the gaps that are cheaper sent than skipped: see xb_filled in proto/_diff.h."""
    size = len(changed)

    def at(flags: list[bool], i: int) -> bool:
        return 0 <= i < size and flags[i]

    one = [c or (at(changed, i - 1) and at(changed, i + 1)) for i, c in enumerate(changed)]
    result = list(one)
    for start in range(0, size, WORD):
        end = start + WORD
        if not any(changed[start:end]):
            continue
        both = one[start:end]
        for i in range(start, min(end, size) - 1):
            if not (one[i] or one[i + 1]) and at(one, i - 1) and at(one, i + 2):
                both[i - start] = both[i + 1 - start] = True
        around = sum(changed[max(start - WORD, 0) : start]), sum(changed[end : end + WORD])
        if not (len(both) == WORD and all(both)) and max(around) < DENSE:
            result[start:end] = both
    return result


def encode_page(old: bytes, new: bytes, merge: bool = False) -> bytes | None:
    """The delta, b"" for equal pages, None where it would not fit a page."""
    size = len(new)
    changed = [a != b for a, b in zip(old, new, strict=True)]
    runs = runs_of(merged(changed) if merge else changed)
    out = bytearray()
    at = 0
    for start, end in runs:
        if not merge and len(out) + 2 > size:
            return None
        out += put_uleb(start - at)
        if not merge and len(out) + 2 > size:
            return None
        out += put_uleb(end - start) + new[start:end]
        if len(out) > size:
            return None
        at = end
    if not merge and runs and at < size and len(out) + 2 > size:
        return None
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


def encode(old: Buffer, new: Buffer, merge: bool = False) -> bytes | None:
    """The delta that turns `old` into `new`: see proto.xbzrle.encode."""
    old, new = bytes(old), bytes(new)
    if len(old) != len(new) or not 1 <= len(old) <= MAX_PAGE:
        raise ValueError(
            f"pages of {len(old)} and {len(new)} bytes: they must be equally long, 1 to {MAX_PAGE}"
        )
    return encode_page(old, new, merge)


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


def encode_pages(
    old: Buffer, new: Buffer, page_size: int, out: Buffer, lengths: Buffer, merge: bool = False
) -> int:
    """Encodes many pages in one call: see proto.xbzrle.encode_pages."""
    olds, news, room, sizes = bytes(old), bytes(new), memoryview(out), memoryview(lengths)
    pages = len(sizes)
    if not 1 <= page_size <= MAX_PAGE:
        raise ValueError(f"a page of {page_size} bytes: it must have 1 to {MAX_PAGE}")
    if not len(olds) == len(news) == pages * page_size:
        raise ValueError(f"{len(olds)} and {len(news)} bytes are not {pages} pages of {page_size}")
    if len(room) < (pages + 1) * page_size + WIDE:
        raise ValueError(
            f"{len(room)} bytes of room: {pages} deltas can need up to "
            f"{(pages + 1) * page_size + WIDE}"
        )
    done = 0
    for i in range(pages):
        page = slice(i * page_size, (i + 1) * page_size)
        delta = encode_page(olds[page], news[page], merge)
        sizes[i] = -1 if delta is None else len(delta)
        if delta:
            room[done : done + len(delta)] = delta
            done += len(delta)
    return done


def decode_pages(deltas: Buffer, lengths: Buffer, pages: Buffer, page_size: int) -> None:
    """Applies many deltas in one call: see proto.xbzrle.decode_pages."""
    data, sizes, target = memoryview(deltas), memoryview(lengths), memoryview(pages)
    if not 1 <= page_size <= MAX_PAGE or len(target) != len(sizes) * page_size:
        raise ValueError(f"{len(target)} bytes are not {len(sizes)} pages of {page_size}")
    at = 0
    for i, length in enumerate(sizes):
        if length <= 0:
            continue
        try:
            if at + length > len(data):
                raise FaultError(SHORT)
            for place, run in delta_runs(bytes(data[at : at + length]), page_size):
                start = i * page_size + place
                target[start : start + len(run)] = run
        except FaultError as fault:
            raise DecodeError(f"page {i}: bad XBZRLE delta: {fault}") from None
        at += length


# ---------------------------------------------------------------- bitmaps


def bitmap(pages: int) -> bytearray:
    return bytearray((pages + 63) // 64 * 8)


def zeros(size: int) -> memoryview:
    """Writable memory of so many zeros."""
    return memoryview(bytearray(max(size, 1)))


def _number(bits: Buffer, others: Buffer, *, both: bool = True) -> tuple[int, int]:
    one, other = bytes(bits), bytes(others)
    if len(one) % 8 or ((both or other) and len(one) != len(other)):
        raise ValueError(f"bitmaps of {len(one)} and {len(other)} bytes")
    return int.from_bytes(one, "little"), int.from_bytes(other, "little")


def count_bits(bits: Buffer, others: Buffer = b"") -> int:
    """How many bits are set in a bitmap, or in either of two."""
    one, other = _number(bits, others, both=False)
    return (one | other).bit_count()


def unite_bits(bits: Buffer, others: Buffer) -> None:
    """Sets the bits of another bitmap too."""
    one, other = _number(bits, others)
    memoryview(bits)[:] = (one | other).to_bytes(len(memoryview(bits)), "little")


def keep_bits(bits: Buffer, others: Buffer) -> None:
    """Clears the bits that are not set in another bitmap."""
    one, other = _number(bits, others)
    memoryview(bits)[:] = (one & other).to_bytes(len(memoryview(bits)), "little")


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

    def clear(self) -> None:
        """Forgets all pages."""
        self._slots = [None] * self.capacity
        self._index.clear()
        self._spare = list(reversed(range(self.capacity)))
        self._hand = 0

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


class PageHashes:
    """A keyed 64-bit hash of every page, as the destination holds it; at first those of zeros.

    table -- the hashes, 8 bytes each, little-endian
    stale -- a bit per page: it was changed by a delta, and its hash is of an older content
    """

    def __init__(self, pages: int, page_size: int, seed: bytes) -> None:
        if not is_page_size(page_size):
            raise ValueError(f"a page of {page_size} bytes: a power of two from 1024 to 16384")
        if pages == 0:
            raise ValueError("no pages")
        self.pages = pages
        self.page_size = page_size
        words = page_size // 8
        key = hashlib.shake_256(seed).digest(page_size + 32)
        every = [int.from_bytes(key[i : i + 8], "little") for i in range(0, len(key), 8)]
        self._key, rest = every[:words], every[words:]
        self._fold = rest[0] | rest[1] << 64, rest[2] | rest[3] << 64
        self.zero = self.hash_of(bytes(page_size))
        self.table = bytearray(self.zero.to_bytes(8, "little")) * pages
        self.stale = bitmap(pages)

    def hash_of(self, content: bytes) -> int:
        """NH with 64-bit words and a sum of 128 bits, then multiply-shift to 64 bits: two pages
        that differ collide with a probability below 2^-62 over the choice of the key."""
        mask = 2**64 - 1
        data = memoryview(content).cast("Q")
        words = [(d + k) & mask for d, k in zip(data, self._key, strict=True)]
        sum_ = sum(a * b for a, b in zip(words[::2], words[1::2], strict=True)) % 2**128
        low, high = self._fold
        return (low * (sum_ & mask) + high * (sum_ >> 64)) % 2**128 >> 64

    def note(self, page: int, value: int) -> None:
        self.table[8 * page : 8 * page + 8] = value.to_bytes(8, "little")
        self.stale[page >> 3] &= ~(1 << (page & 7))

    def touch(self, page: int) -> None:
        self.stale[page >> 3] |= 1 << (page & 7)

    def is_stale(self, page: int) -> bool:
        return bool(self.stale[page >> 3] >> (page & 7) & 1)

    def matches(self, page: int, content: bytes) -> bool:
        value = self.hash_of(content).to_bytes(8, "little")
        return self.table[8 * page : 8 * page + 8] == value

    def clear(self) -> None:
        """All pages are zeros again."""
        self.table[:] = self.zero.to_bytes(8, "little") * self.pages
        self.stale[:] = bytes(len(self.stale))

    @property
    def sum(self) -> bytes:
        """The digest that leaves out zeros, 16 bytes: see proto/README.md."""
        total = xxhash.xxh3_128_intdigest(struct.pack("<QQ", self.pages, self.zero))
        for page, (value,) in enumerate(struct.iter_unpack("<Q", self.table)):
            if value != self.zero:
                total += xxhash.xxh3_128_intdigest(struct.pack("<QQ", page, value))
        return (total % 2**128).to_bytes(16, "big")

    def part(self, first: int, count: int) -> bytearray:
        """The hashes of `count` pages, 8 bytes each, little-endian."""
        if first + count > self.pages:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        return self.table[8 * first : 8 * (first + count)]

    def filled_part(self, first: int, most: int) -> tuple[int, bytes]:
        """(the first page from `first` on whose hash is not that of zeros, the hashes from there
        on to the last such one of `most` pages); at the end (pages, b"")."""
        zero = self.zero.to_bytes(8, "little")
        filled = [
            page for page in range(first, self.pages)
            if self.table[8 * page : 8 * page + 8] != zero
        ]  # fmt: skip
        if not filled or not most:
            return self.pages, b""
        start = filled[0]
        end = max(page for page in filled if page < start + most) + 1
        return start, bytes(self.part(start, end - start))

    def note_pages(self, numbers: Buffer, count: int, content: Buffer) -> None:
        """Hashes `count` pages whose numbers and content are given; they are stale no more."""
        wanted, data, size = memoryview(numbers), memoryview(content), self.page_size
        if not 0 <= count <= len(wanted) or len(data) < count * size:
            raise ValueError("there are fewer pages than that")
        for i in range(count):
            if wanted[i] >= self.pages:
                raise ValueError(f"page {wanted[i]} is outside the guest")
        for i in range(count):
            self.note(wanted[i], self.hash_of(bytes(data[i * size : (i + 1) * size])))


class PageEncoder:
    """What the source knows about the peer's copy, and the batches that bring it up to date.

    See proto/README.md ("PAGES") for the layout. A page is sent zero, unchanged (not at all), as
    a delta or raw. `_sent` pages are known to the peer; of those, `_zeros` are known to be zero
    there (which is a delta base that needs no cache), and the cache holds some others in full.

    hashes   -- keeps the hash of every page that is sent
    merge    -- deltas are those of xbzrle.encode(merge=True)
    headroom -- bytes left free for a frame header at the start of a batch
    room     -- bytes that a batch may have

    A page whose deltas overflow is left out of the cache for 1, 2, 4 ... 16 of its sendings, from
    the second overflow in a row on: `spared` counts those sendings. With the last of them it is
    cached again, and tried at the next; a delta that fits ends it.

    How hot a page is tells how large a cache would pay. Each sending of a page that the peer has,
    and that is zero neither there nor here, adds 32. A `survey` is made after each round; every
    fourth halves all heat, so that a phase of long ago is forgotten, but not before half as many
    pages were sent as are warm: rounds of few pages do not let the others cool.
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
        self.pages = hashes.pages
        self.page_size = hashes.page_size
        if cache is not None and cache.page_size != self.page_size:
            raise ValueError("the cache has pages of another size")
        if cache is not None and len(cache):
            raise ValueError("the cache holds pages of another migration")
        if headroom < 0 or room < self.page_size + 3 * RECORD_ROOM:
            raise ValueError("no room for a page")
        self.zero = self.unchanged = self.raw = self.delta = self.delta_bytes = 0
        self.hits = self.misses = self.overflows = self.spared = 0
        self._hashes = hashes
        self._cache = cache
        self._merge = merge
        self._headroom = headroom
        self._room = room
        self._sent: set[int] = set()
        self._zeros: set[int] = set()
        self._zero_page = bytes(self.page_size)
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
        self._active = cache is not None
        self._heat: dict[int, int] = {}
        self._resent = self._surveys = 0  # sendings and surveys since heat was halved
        self._sendings = [0] * (HOTTEST + 1)  # since the last survey, by the heat before them
        self._overflowed: dict[int, int] = {}  # page -> how often in a row
        self._wait: dict[int, int] = {}  # page -> sendings for which it is left out

    @property
    def active(self) -> bool:
        """Whether deltas are made. Set to False it empties the cache: no base in it grows old."""
        return self._active

    @active.setter
    def active(self, on: bool) -> None:
        if on and self._cache is None:
            raise ValueError("there is no cache to make deltas from")
        if self._active and not on:
            assert self._cache is not None
            self._cache.clear()
        self._active = on

    def survey(self) -> tuple[list[int], list[int]]:
        """What was sent again, and what is hot now, after each round: (sendings since the last
        survey by the heat of their pages before, pages by their heat), each from 0 to 255.
        """
        sendings, self._sendings = self._sendings, [0] * (HOTTEST + 1)
        self._surveys += 1
        if self._surveys >= COOL_SURVEYS and 2 * self._resent >= len(self._heat):
            self._heat = {page: heat // 2 for page, heat in self._heat.items() if heat > 1}
            self._resent = self._surveys = 0
        pages = [0] * (HOTTEST + 1)
        for heat in self._heat.values():
            pages[heat] += 1
        pages[0] = self.pages - len(self._heat)
        return sendings, pages

    def _warm(self, page: int) -> None:
        heat = self._heat.get(page, 0)
        self._sendings[heat] += 1
        self._heat[page] = min(heat + SENDING, HOTTEST)
        self._resent += 1

    def _note_overflow(self, page: int) -> None:
        self.overflows += 1
        times = min(self._overflowed.get(page, 0) + 1, MOST_OVERFLOWS)
        self._overflowed[page] = times
        if times > 1:
            self._wait[page] = 1 << (times - 2)

    def begin_round(self, number: int) -> None:
        """Rounds count from 1; a batch belongs to one round, so none may be open."""
        if self.pending:
            raise ValueError("a batch of the last round was not taken")
        if number == 0 or number < self._now:
            raise ValueError(f"round {number} after round {self._now}")
        self._now = number
        self._past = 0

    def _drop_batch(self) -> None:
        self._out, self._data = bytearray(), bytearray()
        self._snapshot = memoryview(bytearray())
        self._raw_at = self._check = self._zero_count = 0

    def adopt(self, first: int, table: Buffer) -> None:
        """Takes in what the peer says it holds: the hashes of pages from `first` on, 8 bytes each.

        All of those pages count as sent. The cache keeps what has the hash that is said. An open
        batch is dropped: it will not be sent. Raises ValueError for pages outside the guest.
        """
        raw = bytes(table)
        if len(raw) % 8 or first + len(raw) // 8 > self.pages:
            raise ValueError(f"{len(raw)} bytes of hashes from page {first} on")
        self._drop_batch()
        for i in range(len(raw) // 8):
            page, value = first + i, int.from_bytes(raw[8 * i : 8 * i + 8], "little")
            self._hashes.note(page, value)
            self._sent.add(page)
            self._zeros.discard(page)
            if value == self._hashes.zero:
                self._zeros.add(page)
            if self._cache is None:
                continue
            cached = self._cache.get(page)
            if cached is not None and (
                value == self._hashes.zero or self._hashes.hash_of(cached) != value
            ):
                self._cache.drop(page)

    def adopt_zeros(self, first: int, count: int) -> None:
        """As `adopt`, for pages that the peer holds as zeros."""
        if first + count > self.pages:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        self.adopt(first, self._hashes.zero.to_bytes(8, "little") * count)

    def forget(self) -> None:
        """The peer holds nothing that is known of: every page is to be sent as in round 1."""
        self._drop_batch()
        self._sent.clear()
        self._zeros.clear()
        self._overflowed.clear()
        self._wait.clear()
        self._hashes.clear()
        for page in range(self.pages):
            if self._cache is not None:
                self._cache.drop(page)

    @property
    def pending(self) -> bool:
        """Whether the open batch has anything to send."""
        return bool(self._out or self._zero_count)

    def _left(self) -> int:
        """Pages that still fit the batch, whatever becomes of them."""
        free = self._room - len(self._out) - len(self._data) - HEAD - RECORD_ROOM
        return max(free // (self.page_size + RECORD_ROOM), 0)

    @property
    def full(self) -> bool:
        """Whether one more page might not fit the open batch."""
        return self._left() == 0

    def space(self) -> tuple[memoryview, memoryview]:
        """Where the next pages are to be copied: (memory, their numbers), for the same number of
        pages; none where the batch is full."""
        offered = min(self._left(), SNAPSHOT_BYTES // self.page_size)
        self._snapshot = memoryview(bytearray(offered * self.page_size))
        return self._snapshot, self._numbers[:offered]

    def _open_record(self, op: int, page: int) -> None:
        if not self._out:
            # the check is written when the batch is taken
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
        self._check = (self._check * STEP + value) % 2**64
        self._hashes.note(page, value)
        self._next_page = page + 1
        self.raw += 1

    def _put_delta(self, page: int, delta: bytes) -> None:
        self._open_record(OP_DELTA, page)
        self._out += put_uleb(len(delta)) + delta
        self._next_page = page + 1
        self.delta += 1
        self.delta_bytes += len(delta)
        self._hashes.touch(page)

    def _base(self, page: int) -> tuple[bytes | None, Entry | None]:
        """What a delta of this page can start from, and its entry where that is in the cache."""
        assert self._cache is not None
        if page in self._zeros:
            return self._zero_page, None
        entry = self._cache._entry(page)
        if entry is None:
            return None, None
        entry.age, entry.proven = self._now, True
        return entry.content, entry

    def _tried(self, page: int, content: bytes) -> tuple[bytes | None, Entry | None]:
        """The delta, None where the page is to be sent raw; and the entry that is its base."""
        if self._wait.get(page):
            self._wait[page] -= 1
            self.spared += 1
            return None, None
        base, entry = self._base(page)
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

    def _put_page(self, page: int, content: bytes, todo: bytes) -> None:
        if content == self._zero_page:
            if page in self._zeros:
                self.unchanged += 1
            else:
                self._put_zero(page)
            return
        known = page in self._sent
        if known and page not in self._zeros:
            self._warm(page)
        delta, entry = self._tried(page, content) if self._active and known else (None, None)
        if delta == b"":
            # It was written all the same: its hash may be of a moment in between.
            self.unchanged += 1
            self._hashes.touch(page)
            return
        self._flush_zeros()
        if delta is not None:
            self._put_delta(page, delta)
        else:
            self._put_raw(page, content)
        self._sent.add(page)
        self._zeros.discard(page)
        if self._active:
            self._keep(page, entry, content, todo)

    def _keep(self, page: int, entry: Entry | None, content: bytes, todo: bytes) -> None:
        """Brings the cache to what the peer holds now, or lets it hold nothing of that page."""
        assert self._cache is not None
        if self._wait.get(page):
            self._cache.drop(page)
        elif entry is not None:
            entry.content = content
        else:
            self._cache._insert(page, content, self._now, todo)

    @property
    def _floor(self) -> int:
        """The lowest page that the open batch still takes."""
        if self._zero_count:
            return self._zero_first + self._zero_count
        return self._next_page if self._out else 0

    def feed(self, count: int, todo: Buffer) -> None:
        """Takes in the first `count` pages of the last `space`, in ascending order.

        todo -- the round's dirty bitmap: the cache evicts none of its pages

        Raises ValueError for a page out of order or outside the guest; those before it are in.
        """
        bits, data, size = bytes(todo), self._snapshot, self.page_size
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
        self, memory: Buffer, todo: Buffer, first: int, end: int, most: int
    ) -> tuple[int, int]:
        """Takes in the dirty pages from `first` to `end`, from guest memory itself.

        memory -- the guest's, which may be written meanwhile; what its last page lacks are zeros
        todo   -- the round's dirty bitmap, in whole 8-byte words
        most   -- stops after so many pages, or where the batch is full

        Returns (pages taken in, the page to go on from).
        """
        live, bits, size = memoryview(memory), bytes(todo), self.page_size
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
        """Takes in pages as somebody else sends them: records `first` to `count` of a RamReader.

        A delta changes what the peer holds as it is, and what the cache holds with it; a page that
        is not cached is not known any more, and the next time is sent whole. There are deltas
        though `active` is not set.

        Returns (the first record that was not taken, whether it begins a new round): the batch is
        full, or a page comes that does not follow on the last one. Raises DecodeError for a delta
        that is none, or that has no base.
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
        """A delta that somebody else has made."""
        if page not in self._sent:
            raise FaultError(NO_BASE)
        if not delta:
            self.unchanged += 1
            return
        if len(delta) > self.page_size:
            raise FaultError(EMPTY_DELTA)
        zero = page in self._zeros
        entry = self._cache._entry(page) if self._cache is not None and self._active else None
        content = bytearray(self._zero_page if entry is None else entry.content)
        for at, run in delta_runs(delta, self.page_size):
            content[at : at + len(run)] = run
        if not zero:
            self._warm(page)
        if entry is not None:
            entry.content, entry.age, entry.proven = bytes(content), self._now, True
        elif zero and self._active and not self._wait.get(page):
            assert self._cache is not None
            self._cache._insert(page, bytes(content), self._now, b"")
        self._flush_zeros()
        self._put_delta(page, delta)
        self._zeros.discard(page)

    def feed_zeros(self, first: int, count: int) -> int:
        """Pages that are known to be zero without reading them (holes of a sparse file).

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

    def take(self) -> tuple[memoryview, memoryview]:
        """The batch as (head, pages), and opens the next one.

        head  -- `headroom` free bytes, then round, first page, check and records
        pages -- the raw pages, in the order of their records
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

    def _differs(self, page: int, content: bytes) -> bool:
        if page not in self._sent:
            return True
        if page in self._zeros:
            return content != self._zero_page
        cached = None if self._cache is None else self._cache.get(page)
        if cached is None:
            return self._hashes.is_stale(page) or not self._hashes.matches(page, content)
        if content == cached and self._hashes.is_stale(page):
            self._hashes.note(page, self._hashes.hash_of(content))
        return content != cached

    def scan(self, first: int, count: int, data: Buffer, changed: Buffer) -> int:
        """Sets a bit in `changed` for each of `count` pages in `data` that the peer lacks.

        Exact for pages in the cache and for zero pages; others by their hash, which misses a
        change with a probability below 2^-62. A page that equals the cached one gets its hash
        where that was stale. Returns how many pages differ.
        """
        content, bits = memoryview(data), memoryview(changed)
        if first + count > self.pages:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        if len(bits) * 8 < self.pages:
            raise ValueError("the data or the bitmap is too short")
        if len(content) < count * self.page_size:
            raise ValueError("the data is too short")
        found = 0
        for i in range(count):
            page = first + i
            if self._differs(page, bytes(content[i * self.page_size : (i + 1) * self.page_size])):
                bits[page >> 3] |= 1 << (page & 7)
                found += 1
        return found

    def scan_file(
        self, fd: int, size: int, first: int, count: int, changed: Buffer, buffer: Buffer
    ) -> int:
        """As `scan`, for pages of a file of `size` bytes, read with pread(2) into `buffer`, some at
        a time. What the file lacks are zeros. Raises OSError where reading fails.

        Several threads may scan at once, each its own pages with a buffer of its own, while nobody
        else uses the encoder.
        """
        page_size = self.page_size
        step, found, end = len(memoryview(buffer)) // page_size, 0, first + count
        if end > self.pages:
            raise ValueError(f"pages {first} to {end} are outside the guest")
        if step == 0:
            raise ValueError("the buffer is shorter than a page")
        for page in range(first, end, step):
            some = min(step, end - page)
            want = min(some * page_size, max(size - page * page_size, 0))
            content = bytearray()
            while len(content) < want:
                read = os.pread(fd, want - len(content), page * page_size + len(content))
                if not read:
                    break
                content += read
            found += self.scan(page, some, content.ljust(some * page_size, b"\0"), changed)
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


# ---------------------------------------------------------------- decoder


@dataclass(frozen=True)
class Record:
    op: int
    first: int
    count: int
    delta: bytes

    @property
    def pages(self) -> range:
        return range(self.first, self.first + self.count)


def read_record(
    head: bytes, at: int, next_page: int, pages: int, page_size: int
) -> tuple[Record, int]:
    """The record at `at` and the position after it; nothing is believed before it is compared.

    Raises FaultError.
    """
    op, first = head[at] & OP_MASK, head[at] & GAP_MASK
    at += 1
    if first == GAP_MASK:
        more, at = get_uleb(head, at, 9)
        if more >= pages:
            raise FaultError(PAST_GUEST)
        first += more
    first += next_page
    if first >= pages:
        raise FaultError(PAST_GUEST)
    count, length = 1, 0
    if op == OP_ZERO:
        count, at = get_uleb(head, at, 9)
    elif op == OP_RAW:
        if len(head) - at < 2:
            raise FaultError(SHORT)
        count, at = int.from_bytes(head[at : at + 2], "big"), at + 2
    elif op == OP_DELTA:
        length, at = get_uleb(head, at, 3)
        if not 0 < length <= page_size:
            raise FaultError(EMPTY_DELTA)
    else:
        raise FaultError(BAD_OP)
    if not 0 < count <= pages - first:
        raise FaultError(PAST_GUEST)
    if length > len(head) - at:
        raise FaultError(SHORT)
    return Record(op, first, count, head[at : at + length]), at + length


class PageDecoder:
    """Applies batches to the destination's memory, and knows what has come.

    hashes -- keeps the hashes of raw and zero pages; those of deltas are stale
    size   -- bytes of the guest: what its last page has beyond them is not written to a file
    zeroed -- whether the memory is all zeros at first, so that pages of zeros need no writing
    recent -- a bit per page that a delta has changed since `end_round`
    """

    def __init__(self, hashes: PageHashes, size: int, *, zeroed: bool = True) -> None:
        self.pages = hashes.pages
        self.page_size = hashes.page_size
        if not (self.pages - 1) * self.page_size < size <= self.pages * self.page_size:
            raise ValueError(f"{size} bytes are not {self.pages} pages of {self.page_size}")
        self.size = size
        self.recent = bitmap(self.pages)
        self.zero = self.raw = self.delta = 0
        self._hashes = hashes
        self._received: set[int] = set()
        self._written: set[int] = set() if zeroed else set(range(self.pages))

    @property
    def received_pages(self) -> int:
        return len(self._received)

    def hold(self, first: int, count: int, written: bool) -> None:
        """These pages are here from before: a delta may change them.

        written -- whether anything but zeros may be there: their hashes are stale then
        """
        if first + count > self.pages:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        pages = range(first, first + count)
        self._received.update(pages)
        if written:
            self._written.update(pages)
            for page in pages:
                self._hashes.touch(page)

    def end_round(self) -> None:
        """Forgets which pages are `recent`."""
        self.recent[:] = bytes(len(self.recent))

    def check(self, head: Buffer, data_bytes: int) -> tuple[int, list[int]]:
        """Validates the records of a batch, but not what its deltas hold; touches nothing.

        Returns (its round, pages that a delta writes for the first time): the caller makes room
        for those. Raises DecodeError, naming the page and the byte.
        """
        head = bytes(head)
        if len(head) <= HEAD:
            raise DecodeError(f"a batch of {len(head)} bytes holds no record")
        next_page = page = int.from_bytes(head[4:12], "big")
        at, raw, fresh = HEAD, 0, []
        try:
            if next_page >= self.pages:
                at = 4
                raise FaultError(PAST_GUEST)
            while at < len(head):
                where = at
                record, after = read_record(head, at, next_page, self.pages, self.page_size)
                page = record.first
                if record.op == OP_RAW:
                    raw += record.count
                elif record.op == OP_DELTA:
                    if page not in self._received:
                        raise FaultError(NO_BASE)
                    if page not in self._written:
                        fresh.append(page)
                next_page, at = record.first + record.count, after
            if raw * self.page_size != data_bytes:
                at = where
                raise FaultError(BAD_DATA)
        except FaultError as fault:
            raise DecodeError(f"page {page}, byte {at} of the batch: {fault}") from None
        return int.from_bytes(head[:4], "big"), fresh

    def apply(
        self, head: Buffer, data: Buffer, memory: Buffer, fd: int = -1, fd_offset: int = 0
    ) -> int:
        """Writes a batch into the guest's memory; how many pages it held.

        data   -- its raw pages
        memory -- whole pages, at least those of the guest
        fd     -- of the file that `memory` maps: raw pages are written to it; -1 for none
        fd_offset -- where the guest begins in that file

        No raw page is written unless all of them match the check of the batch, and no delta that
        is not wholly right. Raises DecodeError at the first record that is not; those before it
        are applied. Raises OSError where writing fails.
        """
        head, content, target = bytes(head), bytes(data), memoryview(memory)
        if len(target) < self.pages * self.page_size:
            raise ValueError("the memory is shorter than the guest")
        if len(head) <= HEAD:
            raise DecodeError(f"a batch of {len(head)} bytes holds no record")
        next_page, at, done = int.from_bytes(head[4:12], "big"), HEAD, 0
        if next_page >= self.pages:
            raise DecodeError(f"page {next_page}: {PAST_GUEST}")
        size = self.page_size
        raw = [content[i : i + size] for i in range(0, len(content) // size * size, size)]
        values = [self._hashes.hash_of(page) for page in raw]
        check = 0
        for value in values:
            check = (check * STEP + value) % 2**64
        try:
            if check != int.from_bytes(head[12:HEAD], "big"):
                raise FaultError(BAD_CHECK)
            while at < len(head):
                record, after = read_record(head, at, next_page, self.pages, self.page_size)
                self._apply_record(record, raw, values, target, fd, fd_offset)
                done += record.count
                next_page, at = record.first + record.count, after
        except FaultError as fault:
            raise DecodeError(f"byte {at} of the batch: {fault}") from None
        return done

    def _apply_record(
        self, record: Record, raw: list[bytes], values: list[int], target: memoryview, fd: int,
        fd_offset: int,
    ) -> None:  # fmt: skip
        size = self.page_size
        base = record.first * size
        if record.op == OP_DELTA:
            if record.first not in self._received:
                raise FaultError(NO_BASE)
            for at, run in delta_runs(record.delta, size):
                target[base + at : base + at + len(run)] = run
            self.delta += 1
            self._hashes.touch(record.first)
            self.recent[record.first >> 3] |= 1 << (record.first & 7)
        elif record.op == OP_RAW:
            if record.count > len(raw):
                raise FaultError(BAD_DATA)
            content = b"".join(raw[: record.count])
            if fd < 0:
                target[base : base + len(content)] = content
            else:
                os.pwrite(fd, content[: self.size - base], fd_offset + base)
            for page in record.pages:
                self._hashes.note(page, values.pop(0))
                raw.pop(0)
            self.raw += record.count
        else:
            for page in record.pages:
                if page in self._written:
                    target[page * size : (page + 1) * size] = bytes(size)
                self._hashes.note(page, self._hashes.zero)
            self.zero += record.count
        self._received.update(record.pages)
        if record.op != OP_ZERO:
            self._written.update(record.pages)
