# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""The hot path: XBZRLE codec, page cache, and the batch walkers, without the GIL.

Every class and function here has a readable twin of the same name in proto/_twin.py, which says
what is meant; this file says how to be fast. The two give the same bytes on every input.

Memory rules. The encoder reads only private snapshots, never guest memory: the bytes it encodes,
the bytes it caches and the bytes the peer ends up with are the same bytes. The decoder reads
hostile bytes: `check` walks a whole batch before `apply` touches the first page, and both use the
same record reader, which compares every length with what is left before it moves.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcmp, memcpy, memset

from proto.errors import CacheSizeError, DecodeError

cdef extern from "endian.h" nogil:
    uint64_t le64toh(uint64_t)
    uint64_t htobe64(uint64_t)
    uint32_t htobe32(uint32_t)
    uint64_t be64toh(uint64_t)

cdef extern from "sys/mman.h" nogil:
    enum:
        PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
        MREMAP_MAYMOVE, MADV_HUGEPAGE
    void* mmap(void*, size_t, int, int, int, long)
    int munmap(void*, size_t)
    int madvise(void*, size_t, int)

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <sys/mman.h>
    extern void *mremap(void *, size_t, size_t, int, ...);
    #ifndef MREMAP_MAYMOVE
    #define MREMAP_MAYMOVE 1
    #endif
    #define xb_failed(p) ((p) == MAP_FAILED)
    #define xb_ctz(x) __builtin_ctzll(x)

    /* The first 64-byte block at or after `i` in which the pages differ, or the first position
       that is not a whole block. One body; the compiler makes a variant per instruction set and
       the loader picks one. */
    #if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
    __attribute__((target_clones("avx512f", "avx2", "default")))
    #endif
    static Py_ssize_t xb_skip_equal(const uint8_t *a, const uint8_t *b, Py_ssize_t i, Py_ssize_t n)
    {
        for (; i + 64 <= n; i += 64) {
            uint64_t x[8], y[8], d = 0;
            memcpy(x, a + i, 64);
            memcpy(y, b + i, 64);
            for (int k = 0; k < 8; k++)
                d |= x[k] ^ y[k];
            if (d)
                break;
        }
        return i;
    }

    /* The sum of a keyed universal hash (NH, 64-bit words, 128-bit sum): two pages that differ
       collide with probability 2^-64 over the choice of the key. */
    static void xb_nh(const uint8_t *data, const uint8_t *key, size_t words, uint8_t *out)
    {
        unsigned __int128 a = 0, b = 0;
        uint64_t d[4], k[4], r[2];
        for (size_t i = 0; i < words; i += 4) {
            memcpy(d, data + 8 * i, 32);
            memcpy(k, key + 8 * i, 32);
            a += (unsigned __int128)(d[0] + k[0]) * (d[1] + k[1]);
            b += (unsigned __int128)(d[2] + k[2]) * (d[3] + k[3]);
        }
        a += b;
        r[0] = (uint64_t)a;
        r[1] = (uint64_t)(a >> 64);
        memcpy(out, r, 16);
    }
    """
    void* mremap(void*, size_t, size_t, int) nogil
    bint xb_failed(void*) nogil
    Py_ssize_t xb_skip_equal(const uint8_t*, const uint8_t*, Py_ssize_t, Py_ssize_t) nogil
    int xb_ctz(uint64_t) nogil
    void xb_nh(const uint8_t*, const uint8_t*, size_t, uint8_t*) nogil

cdef enum:
    MAX_PAGE = 16384
    MIN_PAGE = 1024
    HEAD = 12                   # a PAGES body opens with its round (4 bytes) and first page (8)
    OP_ZERO = 0x00
    OP_RAW = 0x40
    OP_DELTA = 0x80
    OP_MASK = 0xC0
    GAP_MASK = 0x3F
    RUN_LIMIT = 0xFFFF          # a raw run counts its pages in 16 bits
    RECORD_ROOM = 32            # more than any record takes beside its page data
    LIFETIME = 2                # rounds an entry is safe after its last use (QEMU's figure)
    PROBES = 16                 # slots looked at to find one that may be evicted

cdef enum Fault:
    SHORT = -1
    BAD_LENGTH = -2
    ZERO_RUN = -3
    PAST_PAGE = -4
    EMPTY_RUN = -5
    PAST_DELTA = -6
    BAD_OP = -7
    PAST_GUEST = -8
    NO_BASE = -9
    EMPTY_DELTA = -10

FAULTS = {
    SHORT: "the data ends inside a record",
    BAD_LENGTH: "a length does not end where it must",
    ZERO_RUN: "an empty zero run inside a delta",
    PAST_PAGE: "a run goes past the end of the page",
    EMPTY_RUN: "an empty non-zero run",
    PAST_DELTA: "a non-zero run goes past the end of the delta",
    BAD_OP: "an unknown record type",
    PAST_GUEST: "a page number outside the guest",
    NO_BASE: "a delta for a page that was never sent",
    EMPTY_DELTA: "a delta with no bytes, or longer than a page",
}

cdef uint8_t[MAX_PAGE] ZERO_PAGE
memset(ZERO_PAGE, 0, MAX_PAGE)


# ---------------------------------------------------------------- runs

cdef inline uint64_t load(const uint8_t* at) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, at, 8)
    return le64toh(value)


cdef inline Py_ssize_t end_of_equal(
    const uint8_t* old, const uint8_t* new, Py_ssize_t i, Py_ssize_t size
) noexcept nogil:
    """The first position at or after `i` where the pages differ, or `size`."""
    cdef uint64_t diff
    cdef Py_ssize_t stop = i + 64 if i + 64 < size else size
    while i + 8 <= stop:                # most runs inside a change are short
        diff = load(old + i) ^ load(new + i)
        if diff:
            return i + (xb_ctz(diff) >> 3)
        i += 8
    i = xb_skip_equal(old, new, i, size)
    while i + 8 <= size:
        diff = load(old + i) ^ load(new + i)
        if diff:
            return i + (xb_ctz(diff) >> 3)
        i += 8
    while i < size and old[i] == new[i]:
        i += 1
    return i


cdef inline Py_ssize_t end_of_different(
    const uint8_t* old, const uint8_t* new, Py_ssize_t i, Py_ssize_t size
) noexcept nogil:
    """The first position at or after `i` where the pages agree, or `size`."""
    cdef uint64_t diff, zero_bytes
    while i + 8 <= size:
        diff = load(old + i) ^ load(new + i)
        zero_bytes = (diff - 0x0101010101010101u) & ~diff & 0x8080808080808080u
        if zero_bytes:
            return i + (xb_ctz(zero_bytes) >> 3)
        i += 8
    while i < size and old[i] != new[i]:
        i += 1
    return i


cdef inline bint is_zero(const uint8_t* page, Py_ssize_t size) noexcept nogil:
    return page[0] == 0 and memcmp(page, ZERO_PAGE, size) == 0


# ---------------------------------------------------------------- ULEB128

cdef inline Py_ssize_t put_uleb(uint8_t* at, uint64_t value) noexcept nogil:
    cdef Py_ssize_t n = 0
    while value >= 0x80:
        at[n] = <uint8_t>(value & 0x7F) | 0x80
        value >>= 7
        n += 1
    at[n] = <uint8_t>value
    return n + 1


cdef inline Py_ssize_t get_uleb(
    const uint8_t* at, Py_ssize_t left, Py_ssize_t most, uint64_t* value
) noexcept nogil:
    """Reads at most `most` bytes (9 at the most: no shift leaves 64 bits); a Fault if it cannot."""
    cdef Py_ssize_t n = 0
    cdef uint64_t result = 0
    while n < most:
        if n >= left:
            return SHORT
        result |= <uint64_t>(at[n] & 0x7F) << (7 * n)
        n += 1
        if at[n - 1] < 0x80:
            value[0] = result
            return n
    return BAD_LENGTH


# ---------------------------------------------------------------- one page

cdef Py_ssize_t encode_page(
    const uint8_t* old, const uint8_t* new, Py_ssize_t size, uint8_t* out, Py_ssize_t room
) noexcept nogil:
    """The canonical encoding: its length, 0 for equal pages, -1 where it would not fit `room`.

    The room tests stand where QEMU has them (two bytes before each length, then the run), since
    they decide which pages overflow.
    """
    cdef Py_ssize_t i = 0, n = 0, start
    while i < size:
        if n + 2 > room:
            return -1
        start = i
        i = end_of_equal(old, new, i, size)
        if i == size:
            return n
        n += put_uleb(out + n, i - start)
        if n + 2 > room:
            return -1
        start = i
        i = end_of_different(old, new, i, size)
        n += put_uleb(out + n, i - start)
        if n + i - start > room:
            return -1
        memcpy(out + n, new + start, i - start)
        n += i - start
    return n


cdef Py_ssize_t check_delta(
    const uint8_t* delta, Py_ssize_t length, Py_ssize_t size
) noexcept nogil:
    """0 if every run of the delta stays inside the delta and the page, else a Fault."""
    cdef Py_ssize_t i = 0, at = 0, step
    cdef uint64_t run = 0
    while i < length:
        if length - i < 2:
            return SHORT
        step = get_uleb(delta + i, length - i, 2, &run)
        if step < 0:
            return step
        if i and run == 0:
            return ZERO_RUN
        i += step
        at += run
        if at > size:
            return PAST_PAGE
        if length - i < 2:
            return SHORT
        step = get_uleb(delta + i, length - i, 2, &run)
        if step < 0:
            return step
        if run == 0:
            return EMPTY_RUN
        i += step
        if at + <Py_ssize_t>run > size:
            return PAST_PAGE
        if i + <Py_ssize_t>run > length:
            return PAST_DELTA
        i += run
        at += run
    return 0


cdef void apply_delta(const uint8_t* delta, Py_ssize_t length, uint8_t* page) noexcept nogil:
    """Only for deltas that `check_delta` passed, or that we encoded."""
    cdef Py_ssize_t i = 0, at = 0
    cdef uint64_t run = 0
    while i < length:
        i += get_uleb(delta + i, length - i, 2, &run)
        at += run
        i += get_uleb(delta + i, length - i, 2, &run)
        memcpy(page + at, delta + i, run)
        i += run
        at += run


def encode(const uint8_t[::1] old not None, const uint8_t[::1] new not None):
    """The delta that turns `old` into `new`: see proto.xbzrle.encode."""
    cdef Py_ssize_t size = old.shape[0], n
    cdef uint8_t[MAX_PAGE + RECORD_ROOM] out
    if new.shape[0] != size or not 1 <= size <= MAX_PAGE:
        raise ValueError(
            f"pages of {size} and {new.shape[0]} bytes: they must be equally long, 1 to {MAX_PAGE}"
        )
    with nogil:
        n = encode_page(&old[0], &new[0], size, out, size)
    return None if n < 0 else PyBytes_FromStringAndSize(<char*>out, n)


def decode(const uint8_t[::1] delta not None, uint8_t[::1] page not None):
    """Rewrites `page` in place: see proto.xbzrle.decode."""
    cdef Py_ssize_t size = page.shape[0], length = delta.shape[0], fault
    if not 1 <= size <= MAX_PAGE:
        raise ValueError(f"a page of {size} bytes: it must have 1 to {MAX_PAGE}")
    if length == 0:
        return
    with nogil:
        fault = check_delta(&delta[0], length, size)
        if fault == 0:
            apply_delta(&delta[0], length, &page[0])
    if fault:
        raise DecodeError(f"bad XBZRLE delta: {FAULTS[fault]}")


# ---------------------------------------------------------------- bitmaps

cdef inline bint get_bit(const uint8_t* bits, uint64_t i) noexcept nogil:
    return (bits[i >> 3] >> (i & 7)) & 1


cdef inline void set_bit(uint8_t* bits, uint64_t i) noexcept nogil:
    bits[i >> 3] |= <uint8_t>(1 << (i & 7))


cdef inline void clear_bit(uint8_t* bits, uint64_t i) noexcept nogil:
    bits[i >> 3] &= <uint8_t>~(1 << (i & 7))


# ---------------------------------------------------------------- page cache

cdef enum:
    NO_SLOT = 0xFFFFFFFF

cdef uint64_t NO_PAGE = 0xFFFFFFFFFFFFFFFFu

cdef int newest_first(const void* a, const void* b) noexcept nogil:
    cdef uint64_t x = (<const uint64_t*>a)[0], y = (<const uint64_t*>b)[0]
    return (x > y) - (x < y)


cdef class PageCache:
    """Old contents of pages, by page number; each equals what the peer holds.

    Fully associative: any `size / page_size` pages fit together, whichever they are. An open
    addressing index (load at most one half) finds a page; a moving hand finds whom to evict.
    """

    cdef readonly Py_ssize_t page_size
    cdef readonly Py_ssize_t capacity
    cdef readonly uint64_t evictions
    cdef uint64_t* tags         # slot -> page
    cdef uint32_t* ages         # slot -> round of its last use
    cdef uint8_t* proven        # slot -> was used again after it came in
    cdef uint32_t* spare        # stack of free slots
    cdef uint32_t* index        # hash -> slot + 1
    cdef uint8_t* data
    cdef size_t index_mask
    cdef Py_ssize_t spares
    cdef Py_ssize_t hand

    def __cinit__(self, size, Py_ssize_t page_size):
        self.page_size = page_size
        self.capacity = self.entries_for(size)
        cdef size_t n = self.capacity
        self.data = <uint8_t*>mmap(
            NULL, n * page_size, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0,
        )
        if xb_failed(self.data):
            self.data = NULL
            raise MemoryError(f"no memory for a page cache of {size} bytes")
        madvise(self.data, n * page_size, MADV_HUGEPAGE)
        self.allocate(n)
        cdef Py_ssize_t slot
        self.spares = n
        for slot in range(self.capacity):
            self.tags[slot] = NO_PAGE
            self.spare[slot] = <uint32_t>(self.capacity - 1 - slot)

    def __dealloc__(self):
        if self.data != NULL:
            munmap(self.data, <size_t>self.capacity * self.page_size)
        free(self.tags)
        free(self.ages)
        free(self.proven)
        free(self.spare)
        free(self.index)

    cdef Py_ssize_t entries_for(self, size) except -1:
        if not MIN_PAGE <= self.page_size <= MAX_PAGE or self.page_size & (self.page_size - 1):
            raise ValueError(
                f"a page of {self.page_size} bytes: it must be a power of two from {MIN_PAGE} "
                f"to {MAX_PAGE}"
            )
        if size < self.page_size or size & (size - 1):
            raise CacheSizeError(
                f"a cache of {size} bytes: the size must be a power of two and at least one page "
                f"({self.page_size} bytes)"
            )
        if size // self.page_size >= 1 << 31:
            raise CacheSizeError(
                f"a cache of {size} bytes: more than {1 << 31} pages cannot be indexed"
            )
        return size // self.page_size

    cdef int allocate(self, size_t n) except -1:
        """New tables for `n` slots; the old ones are the caller's."""
        cdef size_t width = 4
        while width < 2 * n:
            width *= 2
        self.tags = <uint64_t*>malloc(n * 8)
        self.ages = <uint32_t*>calloc(n, 4)
        self.proven = <uint8_t*>calloc(n, 1)
        self.spare = <uint32_t*>malloc(n * 4)
        self.index = <uint32_t*>calloc(width, 4)
        self.index_mask = width - 1
        if not (self.tags and self.ages and self.proven and self.spare and self.index):
            raise MemoryError(f"no memory for the tables of a page cache of {n} pages")
        return 0

    @property
    def size(self):
        return self.capacity * self.page_size

    def __len__(self):
        return self.capacity - self.spares

    cdef inline size_t home(self, uint64_t page) noexcept nogil:
        return <size_t>((page * 0x9E3779B97F4A7C15u) >> 20) & self.index_mask

    cdef inline uint32_t find(self, uint64_t page) noexcept nogil:
        cdef size_t i = self.home(page)
        cdef uint32_t entry
        while True:
            entry = self.index[i]
            if entry == 0:
                return NO_SLOT
            if self.tags[entry - 1] == page:
                return entry - 1
            i = (i + 1) & self.index_mask

    cdef inline uint8_t* at(self, uint32_t slot) noexcept nogil:
        return self.data + <size_t>slot * self.page_size

    cdef void link(self, uint64_t page, uint32_t slot) noexcept nogil:
        cdef size_t i = self.home(page)
        while self.index[i]:
            i = (i + 1) & self.index_mask
        self.index[i] = slot + 1
        self.tags[slot] = page

    cdef void unlink(self, uint32_t slot) noexcept nogil:
        """Takes the slot out of the index and closes the gap, so that no probe breaks off."""
        cdef size_t i = self.home(self.tags[slot]), j, k
        while self.index[i] != slot + 1:
            i = (i + 1) & self.index_mask
        j = i
        while True:
            j = (j + 1) & self.index_mask
            if self.index[j] == 0:
                break
            k = self.home(self.tags[self.index[j] - 1])
            if ((j - k) & self.index_mask) >= ((j - i) & self.index_mask):
                self.index[i] = self.index[j]
                i = j
        self.index[i] = 0
        self.tags[slot] = NO_PAGE

    cdef void remove(self, uint32_t slot) noexcept nogil:
        self.unlink(slot)
        self.spare[self.spares] = slot
        self.spares += 1

    cdef uint32_t victim(
        self, uint32_t now, const uint8_t* todo, uint64_t todo_pages
    ) noexcept nogil:
        """A slot that may be evicted, or NO_SLOT: then the newcomer is refused.

        Refusing is what resists cyclic scans: of a working set larger than the cache, as many
        pages as fit keep their places and hit every round, where plain LRU would hit never.
        A page that is still to be sent this round is a certain hit and is never evicted.
        """
        cdef Py_ssize_t tries = PROBES if self.capacity > PROBES else self.capacity
        cdef uint32_t slot
        while tries:
            tries -= 1
            slot = <uint32_t>self.hand
            self.hand += 1
            if self.hand == self.capacity:
                self.hand = 0
            if self.tags[slot] < todo_pages and get_bit(todo, self.tags[slot]):
                continue
            if self.ages[slot] + (LIFETIME if self.proven[slot] else 1) <= now:
                return slot
        return NO_SLOT

    cdef uint32_t insert(
        self, uint64_t page, const uint8_t* content, uint32_t now,
        const uint8_t* todo, uint64_t todo_pages,
    ) noexcept nogil:
        """Puts a page that is not there yet; its slot, or NO_SLOT where it was refused."""
        cdef uint32_t slot
        if self.spares:
            self.spares -= 1
            slot = self.spare[self.spares]
        else:
            slot = self.victim(now, todo, todo_pages)
            if slot == NO_SLOT:
                return slot
            self.unlink(slot)
            self.evictions += 1
        self.link(page, slot)
        self.ages[slot] = now
        self.proven[slot] = now > 1
        memcpy(self.at(slot), content, self.page_size)
        return slot

    def get(self, uint64_t page):
        """The cached content of a page, or None."""
        cdef uint32_t slot = self.find(page)
        if slot == NO_SLOT:
            return None
        return PyBytes_FromStringAndSize(<char*>self.at(slot), self.page_size)

    def put(self, uint64_t page, const uint8_t[::1] content not None, uint32_t now, todo=b""):
        """Caches `content` as of round `now`; False where the page was refused.

        `todo` is the dirty bitmap of the round: its pages are not evicted.
        """
        cdef const uint8_t[::1] bits = todo
        cdef const uint8_t* at = &bits[0] if bits.shape[0] else NULL
        if content.shape[0] != self.page_size:
            raise ValueError(f"a page has {self.page_size} bytes, not {content.shape[0]}")
        cdef uint32_t slot = self.find(page)
        if slot == NO_SLOT:
            return self.insert(page, &content[0], now, at, bits.shape[0] * 8) != NO_SLOT
        memcpy(self.at(slot), &content[0], self.page_size)
        self.ages[slot] = now
        self.proven[slot] = 1
        return True

    def drop(self, uint64_t page):
        """Forgets a page; nothing happens where it is not cached."""
        cdef uint32_t slot = self.find(page)
        if slot != NO_SLOT:
            self.remove(slot)

    def resize(self, size):
        """Changes the capacity in place. Every entry that still fits is kept, the newest first.

        Raises CacheSizeError, and changes nothing, for a size that breaks the rule.
        """
        cdef Py_ssize_t capacity = self.entries_for(size), old = self.capacity
        if capacity == old:
            return
        cdef uint64_t* tags = self.tags
        cdef uint32_t* ages = self.ages
        cdef uint8_t* proven = self.proven
        cdef uint32_t* spare = self.spare
        cdef uint32_t* index = self.index
        cdef size_t mask = self.index_mask
        cdef void* data
        cdef uint64_t* order = <uint64_t*>malloc(old * 8)
        try:
            if order == NULL:
                raise MemoryError("no memory to resize the page cache")
            self.allocate(capacity)
            if capacity > old:
                data = mremap(
                    self.data, <size_t>old * self.page_size, <size_t>capacity * self.page_size,
                    MREMAP_MAYMOVE,
                )
                if xb_failed(data):
                    raise MemoryError(f"no memory for a page cache of {size} bytes")
                self.data = <uint8_t*>data
                madvise(self.data, <size_t>capacity * self.page_size, MADV_HUGEPAGE)
        except MemoryError:
            self.undo_allocate(tags, ages, proven, spare, index, mask)
            free(order)
            raise
        with nogil:
            self.refill(capacity, old, tags, ages, proven, order)
        if capacity < old:
            data = mremap(
                self.data, <size_t>old * self.page_size, <size_t>capacity * self.page_size, 0
            )
        self.capacity = capacity
        self.hand = 0
        free(order)
        free(tags)
        free(ages)
        free(proven)
        free(spare)
        free(index)

    cdef void undo_allocate(
        self, uint64_t* tags, uint32_t* ages, uint8_t* proven, uint32_t* spare, uint32_t* index,
        size_t mask,
    ) noexcept:
        if self.tags != tags:
            free(self.tags)
            free(self.ages)
            free(self.proven)
            free(self.spare)
            free(self.index)
        self.tags, self.ages, self.proven = tags, ages, proven
        self.spare, self.index, self.index_mask = spare, index, mask

    cdef void refill(
        self, Py_ssize_t capacity, Py_ssize_t old, uint64_t* tags, uint32_t* ages,
        uint8_t* proven, uint64_t* order,
    ) noexcept nogil:
        """Moves the newest entries of the old tables into the first `capacity` slots."""
        cdef Py_ssize_t count = 0, kept, i, hole = 0
        cdef uint32_t slot, target
        for i in range(old):
            if tags[i] != NO_PAGE:
                # newest age first, then the lower slot
                order[count] = (<uint64_t>(0xFFFFFFFFu - ages[i]) << 32) | <uint64_t>i
                count += 1
        qsort(order, count, 8, newest_first)
        kept = count if count < capacity else capacity
        for i in range(capacity):
            self.tags[i] = NO_PAGE
        for i in range(kept):                   # those whose slot stays
            slot = <uint32_t>(order[i] & 0xFFFFFFFFu)
            if slot < capacity:
                self.link(tags[slot], slot)
                self.ages[slot] = ages[slot]
                self.proven[slot] = proven[slot]
        for i in range(kept):                   # those that must move down
            slot = <uint32_t>(order[i] & 0xFFFFFFFFu)
            if slot >= capacity:
                while self.tags[hole] != NO_PAGE:
                    hole += 1
                target = <uint32_t>hole
                self.link(tags[slot], target)
                self.ages[target] = ages[slot]
                self.proven[target] = proven[slot]
                memcpy(self.at(target), self.at(slot), self.page_size)
        self.spares = 0
        for i in range(capacity - 1, -1, -1):
            if self.tags[i] == NO_PAGE:
                self.spare[self.spares] = <uint32_t>i
                self.spares += 1


# ---------------------------------------------------------------- encoder

cdef class PageEncoder:
    """What the source knows about the peer's copy, and the batches that bring it up to date.

    See proto/README.md ("PAGES") for the record layout. A page is sent zero, unchanged (not at
    all), as a delta or raw. `sent` pages are known to the peer; of those, `zeros` are known to be
    zero there (which is a delta base that needs no cache), the cache holds some others in full,
    and with a `key` every page's keyed hash is kept, so that `scan` can tell what has changed.
    """

    cdef readonly uint64_t pages
    cdef readonly Py_ssize_t page_size
    cdef readonly object cache_object
    cdef PageCache cache
    cdef bytes key
    cdef const uint8_t* key_at
    cdef uint8_t* sent
    cdef uint8_t* zeros
    cdef uint8_t* hashes
    cdef uint8_t* out
    cdef Py_ssize_t room
    cdef Py_ssize_t used
    cdef uint64_t next_page     # one past the last page of the batch
    cdef uint64_t zero_first    # a zero run that is not written yet
    cdef uint64_t zero_count
    cdef Py_ssize_t raw_at      # where the open raw run has its count, 0 for none
    cdef uint32_t raw_count
    cdef uint32_t now
    cdef readonly uint64_t zero
    cdef readonly uint64_t unchanged
    cdef readonly uint64_t raw
    cdef readonly uint64_t delta
    cdef readonly uint64_t delta_bytes
    cdef readonly uint64_t hits
    cdef readonly uint64_t misses
    cdef readonly uint64_t overflows

    def __cinit__(
        self, uint64_t pages, Py_ssize_t page_size, PageCache cache=None, bytes key=None,
        Py_ssize_t room=1 << 20,
    ):
        if not MIN_PAGE <= page_size <= MAX_PAGE or page_size & (page_size - 1):
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
        self.cache = cache
        self.cache_object = cache
        self.key = key
        self.key_at = <const uint8_t*><const char*>key if key is not None else NULL
        self.room = room
        self.sent = <uint8_t*>calloc((pages + 63) // 64, 8)
        self.zeros = <uint8_t*>calloc((pages + 63) // 64, 8)
        self.out = <uint8_t*>malloc(room)
        if key is not None:
            self.hashes = <uint8_t*>calloc(pages, 16)
        if not self.sent or not self.zeros or not self.out or (key is not None and not self.hashes):
            raise MemoryError(f"no memory to track {pages} pages")

    def __dealloc__(self):
        free(self.sent)
        free(self.zeros)
        free(self.hashes)
        free(self.out)

    def begin_round(self, uint32_t number):
        """Rounds count from 1; a batch belongs to one round, so none may be open."""
        if self.pending:
            raise ValueError("a batch of the last round was not taken")
        if number == 0 or number < self.now:
            raise ValueError(f"round {number} after round {self.now}")
        self.now = number

    @property
    def pending(self):
        """Bytes of the open batch; 0 where there is none."""
        return self.used + (RECORD_ROOM if self.zero_count else 0)

    @property
    def full(self):
        """Whether one more page might not fit the open batch."""
        return self.room - self.used < self.page_size + 2 * RECORD_ROOM

    cdef inline void open_record(self, uint8_t op, uint64_t page) noexcept nogil:
        cdef uint32_t now = htobe32(self.now)
        cdef uint64_t first = htobe64(page), gap
        if self.used == 0:
            memcpy(self.out, &now, 4)
            memcpy(self.out + 4, &first, 8)
            self.used = HEAD
            self.next_page = page
        gap = page - self.next_page
        if gap < GAP_MASK:
            self.out[self.used] = op | <uint8_t>gap
            self.used += 1
        else:
            self.out[self.used] = op | GAP_MASK
            self.used += 1
            self.used += put_uleb(self.out + self.used, gap - GAP_MASK)
        self.raw_at = 0

    cdef inline void flush_zeros(self) noexcept nogil:
        if self.zero_count:
            self.open_record(OP_ZERO, self.zero_first)
            self.used += put_uleb(self.out + self.used, self.zero_count)
            self.next_page = self.zero_first + self.zero_count
            self.zero_count = 0

    cdef inline void put_zero(self, uint64_t page) noexcept nogil:
        if self.zero_count and page != self.zero_first + self.zero_count:
            self.flush_zeros()
        if self.zero_count == 0:
            self.zero_first = page
        self.zero_count += 1
        self.zero += 1
        set_bit(self.sent, page)
        set_bit(self.zeros, page)
        cdef uint32_t slot
        if self.cache is not None:
            slot = self.cache.find(page)
            if slot != NO_SLOT:
                self.cache.remove(slot)

    cdef inline void put_raw(self, uint64_t page, const uint8_t* content) noexcept nogil:
        if not (self.raw_at and page == self.next_page and self.raw_count < RUN_LIMIT):
            self.open_record(OP_RAW, page)
            self.raw_at = self.used
            self.raw_count = 0
            self.used += 2
        self.raw_count += 1
        self.out[self.raw_at] = <uint8_t>(self.raw_count >> 8)
        self.out[self.raw_at + 1] = <uint8_t>self.raw_count
        memcpy(self.out + self.used, content, self.page_size)
        self.used += self.page_size
        self.next_page = page + 1
        self.raw += 1

    cdef inline void put_delta(
        self, uint64_t page, const uint8_t* delta, Py_ssize_t length
    ) noexcept nogil:
        self.open_record(OP_DELTA, page)
        self.used += put_uleb(self.out + self.used, length)
        memcpy(self.out + self.used, delta, length)
        self.used += length
        self.next_page = page + 1
        self.delta += 1
        self.delta_bytes += length

    cdef void put_page(
        self, uint64_t page, const uint8_t* content, uint8_t* scratch,
        const uint8_t* todo, uint64_t todo_pages,
    ) noexcept nogil:
        cdef bint known = get_bit(self.sent, page)
        cdef bint zero = get_bit(self.zeros, page)
        cdef uint32_t slot = NO_SLOT
        cdef const uint8_t* base = NULL
        cdef Py_ssize_t length
        if is_zero(content, self.page_size):
            if known and zero:
                self.unchanged += 1
            else:
                self.put_zero(page)
            return
        if self.cache is not None and known:
            if zero:
                base = ZERO_PAGE
            else:
                slot = self.cache.find(page)
                if slot != NO_SLOT:
                    base = self.cache.at(slot)
                    self.cache.ages[slot] = self.now
                    self.cache.proven[slot] = 1
        length = -1
        if base != NULL:
            self.hits += 1
            length = encode_page(base, content, self.page_size, scratch, self.page_size)
            if length == 0:
                self.unchanged += 1
                return
            if length < 0:
                self.overflows += 1
        elif self.cache is not None and known:
            self.misses += 1
        self.flush_zeros()
        if length > 0:
            self.put_delta(page, scratch, length)
        else:
            self.put_raw(page, content)
        set_bit(self.sent, page)
        clear_bit(self.zeros, page)
        if self.cache is not None:
            if slot == NO_SLOT:
                self.cache.insert(page, content, self.now, todo, todo_pages)
            elif length > 0:
                apply_delta(scratch, length, self.cache.at(slot))
            else:
                memcpy(self.cache.at(slot), content, self.page_size)
        self.note_hash(page, content)

    cdef inline void note_hash(self, uint64_t page, const uint8_t* content) noexcept nogil:
        if self.hashes != NULL:
            xb_nh(content, self.key_at, self.page_size >> 3, self.hashes + 16 * page)

    def feed(
        self, const uint64_t[::1] numbers not None, Py_ssize_t count,
        const uint8_t[::1] snapshot not None, const uint8_t[::1] todo not None,
        Py_ssize_t start=0,
    ):
        """Encodes pages `start` to `count` of a snapshot; how many of them fitted the batch.

        numbers  -- page numbers, ascending, also across the feeds of one batch
        snapshot -- their contents, one page after the other: private memory
        todo     -- the dirty bitmap of the round, a bit per page (what the cache must not evict)
        """
        cdef Py_ssize_t i = start
        cdef uint64_t page, floor = self.next_page if self.used else 0
        cdef uint8_t[MAX_PAGE + RECORD_ROOM] scratch
        if self.zero_count:
            floor = self.zero_first + self.zero_count
        if self.now == 0:
            raise ValueError("no round was begun")
        if not 0 <= start <= count <= numbers.shape[0]:
            raise ValueError(f"{count} pages from {start}: {numbers.shape[0]} numbers were given")
        if snapshot.shape[0] < count * self.page_size or <uint64_t>todo.shape[0] * 8 < self.pages:
            raise ValueError("the snapshot or the dirty bitmap is too short")
        with nogil:
            while i < count:
                page = numbers[i]
                if page < floor or page >= self.pages:
                    break
                if self.room - self.used < self.page_size + 2 * RECORD_ROOM:
                    break
                self.put_page(
                    page, &snapshot[i * self.page_size], scratch, &todo[0], todo.shape[0] * 8
                )
                floor = page + 1
                i += 1
        if i < count and (numbers[i] < floor or numbers[i] >= self.pages):
            raise ValueError(f"page {numbers[i]} is out of order or outside the guest")
        return i - start

    def feed_zeros(self, uint64_t first, uint64_t count):
        """Pages that are known to be zero without reading them (holes of a sparse file)."""
        cdef uint64_t page, floor = self.next_page if self.used else 0
        if self.zero_count:
            floor = self.zero_first + self.zero_count
        if self.now == 0 or first < floor or first + count > self.pages or first + count < first:
            raise ValueError(f"pages {first} to {first + count} are out of order or outside")
        if self.full:
            raise ValueError("the batch is full")
        with nogil:
            for page in range(first, first + count):
                if get_bit(self.sent, page) and get_bit(self.zeros, page):
                    self.unchanged += 1
                    continue
                if self.room - self.used < self.page_size + 2 * RECORD_ROOM:
                    break
                self.put_zero(page)
            else:
                page = first + count
        return page - first

    def take(self, Py_ssize_t headroom=0):
        """The body of the batch, after `headroom` free bytes for a frame header; opens the next."""
        if headroom < 0:
            raise ValueError(f"a headroom of {headroom} bytes")
        self.flush_zeros()
        body = PyByteArray_FromStringAndSize(NULL, headroom + self.used)
        memcpy(PyByteArray_AS_STRING(body) + headroom, self.out, self.used)
        self.used = 0
        self.raw_at = 0
        return body

    def scan(
        self, uint64_t first, uint64_t count, const uint8_t[::1] data not None,
        uint8_t[::1] changed not None,
    ):
        """Sets a bit in `changed` for each of `count` pages in `data` that the peer lacks.

        Exact for pages in the cache and for zero pages; others by their keyed hash, which misses
        a change with probability 2^-64. Returns how many pages differ.
        """
        cdef uint64_t page, i, found = 0
        cdef const uint8_t* content
        cdef uint32_t slot
        cdef uint8_t[16] digest
        if self.hashes == NULL:
            raise ValueError("scan needs an encoder with a hash key")
        if first + count > self.pages or first + count < first:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        if <uint64_t>data.shape[0] < count * self.page_size or \
                <uint64_t>changed.shape[0] * 8 < self.pages:
            raise ValueError("the data or the bitmap is too short")
        with nogil:
            for i in range(count):
                page = first + i
                content = &data[i * self.page_size]
                if get_bit(self.sent, page):
                    if get_bit(self.zeros, page):
                        if is_zero(content, self.page_size):
                            continue
                    else:
                        slot = NO_SLOT
                        if self.cache is not None:
                            slot = self.cache.find(page)
                        if slot != NO_SLOT:
                            if memcmp(content, self.cache.at(slot), self.page_size) == 0:
                                continue
                        else:
                            xb_nh(content, self.key_at, self.page_size >> 3, digest)
                            if memcmp(digest, self.hashes + 16 * page, 16) == 0:
                                continue
                set_bit(&changed[0], page)
                found += 1
        return found

    def scan_zeros(self, uint64_t first, uint64_t count, uint8_t[::1] changed not None):
        """As `scan`, for pages that are known to be zero without reading them."""
        cdef uint64_t page, found = 0
        if first + count > self.pages or first + count < first:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        if <uint64_t>changed.shape[0] * 8 < self.pages:
            raise ValueError("the bitmap is too short")
        with nogil:
            for page in range(first, first + count):
                if not (get_bit(self.sent, page) and get_bit(self.zeros, page)):
                    set_bit(&changed[0], page)
                    found += 1
        return found

    def known_zero(self, uint64_t first, uint64_t count):
        """Whether the peer holds zeros in all of these pages."""
        cdef uint64_t page
        for page in range(first, min(first + count, self.pages)):
            if not (get_bit(self.sent, page) and get_bit(self.zeros, page)):
                return False
        return True


# ---------------------------------------------------------------- decoder

cdef struct Record:
    uint8_t op
    uint64_t first
    uint64_t count
    const uint8_t* data
    Py_ssize_t length


cdef Py_ssize_t read_record(
    const uint8_t* at, Py_ssize_t left, Py_ssize_t page_size, uint64_t pages, uint64_t next_page,
    Record* record,
) noexcept nogil:
    """One record: how many bytes it takes, or a Fault. All is compared before it is believed."""
    cdef Py_ssize_t i = 1, step
    cdef uint64_t value = 0
    if left < 1:
        return SHORT
    record.op = at[0] & OP_MASK
    record.first = at[0] & GAP_MASK
    if record.first == GAP_MASK:
        step = get_uleb(at + i, left - i, 9, &value)
        if step < 0:
            return step
        i += step
        if value >= pages:
            return PAST_GUEST
        record.first += value
    record.first += next_page
    if record.first >= pages:
        return PAST_GUEST
    if record.op == OP_ZERO:
        step = get_uleb(at + i, left - i, 9, &value)
        if step < 0:
            return step
        i += step
        record.count = value
        record.length = 0
    elif record.op == OP_RAW:
        if left - i < 2:
            return SHORT
        record.count = (<uint64_t>at[i] << 8) | at[i + 1]
        i += 2
        record.length = <Py_ssize_t>record.count * page_size
    elif record.op == OP_DELTA:
        step = get_uleb(at + i, left - i, 3, &value)
        if step < 0:
            return step
        i += step
        if value == 0 or value > <uint64_t>page_size:
            return EMPTY_DELTA
        record.count = 1
        record.length = <Py_ssize_t>value
    else:
        return BAD_OP
    if record.count == 0 or record.count > pages - record.first:
        return PAST_GUEST
    if record.length > left - i:
        return SHORT
    record.data = at + i
    return i + record.length


cdef class PageDecoder:
    """Applies batches to the destination's memory, and knows what has come.

    stale -- a byte per chunk of `chunk_pages` pages, set to 1 when the chunk is written
    """

    cdef readonly uint64_t pages
    cdef readonly Py_ssize_t page_size
    cdef readonly uint64_t chunk_pages
    cdef readonly bytearray stale
    cdef uint8_t* stale_at
    cdef uint8_t* received
    cdef uint8_t* written
    cdef readonly uint64_t received_pages
    cdef readonly uint64_t zero
    cdef readonly uint64_t raw
    cdef readonly uint64_t delta

    def __cinit__(self, uint64_t pages, Py_ssize_t page_size, uint64_t chunk_pages):
        if not MIN_PAGE <= page_size <= MAX_PAGE or page_size & (page_size - 1):
            raise ValueError(f"a page of {page_size} bytes: a power of two from 1024 to 16384")
        if pages == 0 or chunk_pages == 0:
            raise ValueError("no pages")
        self.pages = pages
        self.page_size = page_size
        self.chunk_pages = chunk_pages
        self.stale = bytearray(b"\1") * ((pages + chunk_pages - 1) // chunk_pages)
        self.stale_at = <uint8_t*>PyByteArray_AS_STRING(self.stale)
        self.received = <uint8_t*>calloc((pages + 63) // 64, 8)
        self.written = <uint8_t*>calloc((pages + 63) // 64, 8)
        if not self.received or not self.written:
            raise MemoryError(f"no memory to track {pages} pages")

    def __dealloc__(self):
        free(self.received)
        free(self.written)

    cdef Py_ssize_t check_body(
        self, const uint8_t* at, Py_ssize_t size, Py_ssize_t* where, uint64_t* page, list fresh,
    ):
        """Walks a batch without applying it; 0 or a Fault with its place."""
        cdef Record record
        cdef Py_ssize_t i = HEAD, step
        cdef uint64_t next_page, p, start
        cdef uint64_t covered_first = 0, covered_end = 0
        memcpy(&next_page, at + 4, 8)
        next_page = be64toh(next_page)
        page[0] = next_page
        if next_page >= self.pages:
            where[0] = 4
            return PAST_GUEST
        while i < size:
            where[0] = i
            step = read_record(at + i, size - i, self.page_size, self.pages, next_page, &record)
            if step < 0:
                return step
            page[0] = record.first
            if record.op == OP_DELTA:
                if not get_bit(self.received, record.first):
                    return NO_BASE
                step_fault = check_delta(record.data, record.length, self.page_size)
                if step_fault:
                    return step_fault
            if record.op != OP_ZERO and fresh is not None:
                p = record.first
                while p < record.first + record.count:
                    if get_bit(self.written, p):
                        p += 1
                        continue
                    start = p
                    while p < record.first + record.count and not get_bit(self.written, p):
                        p += 1
                    if covered_end == start and covered_end:
                        covered_end = p
                        continue
                    if covered_end:
                        fresh.append((covered_first, covered_end - covered_first))
                    covered_first, covered_end = start, p
            next_page = record.first + record.count
            i += step
        if covered_end and fresh is not None:
            fresh.append((covered_first, covered_end - covered_first))
        return 0

    def check(self, const uint8_t[::1] body not None, fresh=None):
        """Validates a whole batch and touches nothing. Returns the round it belongs to.

        Runs of pages that it will write for the first time are appended to the list `fresh` as
        (first, count), so that the caller can make room for them.

        Raises DecodeError, naming the page and the byte; `fresh` is as it was then.
        """
        cdef Py_ssize_t where = 0, fault
        cdef uint64_t page = 0
        cdef list runs = None if fresh is None else []
        if body.shape[0] <= HEAD:
            raise DecodeError(f"a batch of {body.shape[0]} bytes holds no record")
        fault = self.check_body(&body[0], body.shape[0], &where, &page, runs)
        if fault:
            raise DecodeError(f"page {page}, byte {where} of the batch: {FAULTS[fault]}")
        if runs:
            fresh += runs
        return (<uint32_t>body[0] << 24) | (body[1] << 16) | (body[2] << 8) | body[3]

    def apply(self, const uint8_t[::1] body not None, uint8_t[::1] memory not None):
        """Writes a batch into the guest's memory; how many pages it held.

        A DecodeError leaves the bad page and those after it as they were; run `check` first to
        have all of the batch or nothing.
        """
        cdef Record record
        cdef Py_ssize_t i = HEAD, step = 0, size = body.shape[0]
        cdef uint64_t next_page, done = 0, page
        if <uint64_t>memory.shape[0] < self.pages * self.page_size:
            raise ValueError("the memory is shorter than the guest")
        if size <= HEAD:
            raise DecodeError(f"a batch of {size} bytes holds no record")
        memcpy(&next_page, &body[4], 8)
        next_page = be64toh(next_page)
        if next_page >= self.pages:
            raise DecodeError(f"page {next_page}: {FAULTS[PAST_GUEST]}")
        with nogil:
            while i < size:
                step = read_record(
                    &body[i], size - i, self.page_size, self.pages, next_page, &record
                )
                if step < 0:
                    break
                if record.op == OP_DELTA:
                    if not get_bit(self.received, record.first):
                        step = NO_BASE
                        break
                    fault = check_delta(record.data, record.length, self.page_size)
                    if fault:
                        step = fault
                        break
                    apply_delta(
                        record.data, record.length, &memory[record.first * self.page_size]
                    )
                    self.delta += 1
                    self.note_written(record.first)
                elif record.op == OP_RAW:
                    memcpy(&memory[record.first * self.page_size], record.data, record.length)
                    self.raw += record.count
                    for page in range(record.first, record.first + record.count):
                        self.note_written(page)
                else:
                    for page in range(record.first, record.first + record.count):
                        if get_bit(self.written, page):
                            memset(&memory[page * self.page_size], 0, self.page_size)
                            self.stale_at[page // self.chunk_pages] = 1
                        self.note_received(page)
                    self.zero += record.count
                done += record.count
                next_page = record.first + record.count
                i += step
        if step < 0:
            raise DecodeError(f"byte {i} of the batch: {FAULTS[step]}")
        return done

    cdef inline void note_received(self, uint64_t page) noexcept nogil:
        if not get_bit(self.received, page):
            set_bit(self.received, page)
            self.received_pages += 1

    cdef inline void note_written(self, uint64_t page) noexcept nogil:
        self.note_received(page)
        set_bit(self.written, page)
        self.stale_at[page // self.chunk_pages] = 1

    def ever_written(self, uint64_t first, uint64_t count):
        """Whether any of these pages ever held something other than its first zeros."""
        cdef uint64_t page
        for page in range(first, min(first + count, self.pages)):
            if get_bit(self.written, page):
                return True
        return False
