# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""The page cache: old contents of pages by page number, found, kept and evicted without the GIL.

A delta needs the old content of its page, exactly as the destination holds it. The cache keeps such
contents in `capacity` slots of one page each. Any page may have any slot (fully associative): with
QEMU's direct-mapped table two hot pages that share a slot evict each other for ever. An open
addressing index with linear probing finds the slot; it is at most half full, so a search looks at
one or two entries.

Which entry goes when a page comes and no slot is free:

    LRU would evict the page that was unused longest. Dirty pages are sent in ascending order, round
    after round, so with a working set of N + 1 pages in N slots that is always the very page which
    comes next: LRU never hits. Here the *newcomer* is refused while the entries are in use, so N of
    N + 1 pages keep their slots and hit each round. (QEMU has the same idea: an entry that was used
    in this round or the last one is not replaced.)

    A clock hand moves over the slots. An entry is safe for LIFETIME rounds after its last use.
    Round 1 sends every page, written or not, so its entries prove nothing: until they are used
    again (`reused`), they are safe for that round only. A page that is still dirty in this round is
    a certain hit and is not evicted. The hand looks at PROBES slots at most, so that refusing is
    cheap, and goes on from there for the next newcomer.

Resizing keeps the entries, the newest first. QEMU begins with an empty cache, and pays with a round
of whole pages.

The readable twin is proto/codec/_cache_twin.py; the two make the same decisions.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcpy, memset

from proto.codec._bits cimport get_bit
from proto.codec._xbzrle cimport check_page_size
from proto.codec._mmap cimport (
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MREMAP_MAYMOVE,
    madvise,
    mremap,
    munmap,
    xb_map,
    xb_map_failed,
)

from proto.wire.errors import CacheSizeError

cdef enum:
    LIFETIME = 2                # rounds; QEMU's CACHED_PAGE_LIFETIME
    PROBES = 16

# An index entry is a slot number + 1 in 32 bits, and there are twice as many of them as slots.
MOST_ENTRIES = 1 << 31
cdef uint64_t NO_PAGE = 0xFFFFFFFFFFFFFFFFu


cdef int newest_first(const void* a, const void* b) noexcept nogil:
    cdef uint64_t x = (<const uint64_t*>a)[0], y = (<const uint64_t*>b)[0]
    return (x > y) - (x < y)


cdef class PageCache:
    """Old contents of pages, by page number; each equals what the peer holds.

    size -- bytes of content, a power of two; the tables take 25 more for each page
    """

    def __cinit__(self, size, Py_ssize_t page_size):
        self.page_size = page_size
        self.capacity = self.entries_for(size)
        cdef size_t n = self.capacity
        self.data = <uint8_t*>xb_map(n * page_size)
        if xb_map_failed(self.data):
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
        free(self.reused)
        free(self.spare)
        free(self.index)

    cdef Py_ssize_t entries_for(self, size) except -1:
        """Return how many pages `size` bytes hold. Raises ValueError, CacheSizeError."""
        check_page_size(self.page_size)
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

    cdef int allocate(self, size_t n) except -1:
        """Make new tables for `n` slots. The caller frees the old ones."""
        cdef size_t width = 4
        while width < 2 * n:
            width *= 2
        self.tags = <uint64_t*>malloc(n * 8)
        self.ages = <uint32_t*>calloc(n, 4)
        self.reused = <uint8_t*>calloc(n, 1)
        self.spare = <uint32_t*>malloc(n * 4)
        self.index = <uint32_t*>calloc(width, 4)
        self.index_mask = width - 1
        if not (self.tags and self.ages and self.reused and self.spare and self.index):
            raise MemoryError(f"no memory for the tables of a page cache of {n} pages")
        return 0

    @property
    def size(self):
        return self.capacity * self.page_size

    def __len__(self):
        return self.capacity - self.spares

    cdef size_t home(self, uint64_t page) noexcept nogil:
        """Return the index entry at which the search for a page begins (Fibonacci hashing)."""
        return <size_t>((page * 0x9E3779B97F4A7C15u) >> 20) & self.index_mask

    cdef uint32_t find(self, uint64_t page) noexcept nogil:
        return self.find_near(page, &self.next)

    cdef uint32_t find_near(self, uint64_t page, Py_ssize_t* next) noexcept nogil:
        """Return the slot of a page, or NO_SLOT.

        next -- the slot to look at first, the one behind the last that was found. Pages that came
                in one after the other lie in neighbouring slots, and are asked for in that order
                again: most searches then need no hashing. Threads may search at the same time, as
                long as nothing changes, each with a `next` of its own.
        """
        cdef size_t i
        cdef uint32_t entry
        if next[0] < self.capacity and self.tags[next[0]] == page:
            next[0] += 1
            return <uint32_t>(next[0] - 1)
        i = self.home(page)
        while True:
            entry = self.index[i]
            if entry == 0:
                return NO_SLOT
            if self.tags[entry - 1] == page:
                next[0] = entry
                return entry - 1
            i = (i + 1) & self.index_mask

    cdef uint8_t* at(self, uint32_t slot) noexcept nogil:
        """Return the content of a slot."""
        return self.data + <size_t>slot * self.page_size

    cdef void link(self, uint64_t page, uint32_t slot) noexcept nogil:
        """Enter a page, which is not in the index, with its slot."""
        cdef size_t i = self.home(page)
        while self.index[i]:
            i = (i + 1) & self.index_mask
        self.index[i] = slot + 1
        self.tags[slot] = page

    cdef void unlink(self, uint32_t slot) noexcept nogil:
        """Take the slot out of the index, and close the gap.

        An empty entry ends a search. So entries behind the gap that were put off by it move up,
        one after the other, and no marks of deleted entries are needed.
        """
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
        """Free a slot."""
        self.unlink(slot)
        self.spare[self.spares] = slot
        self.spares += 1

    cdef uint32_t victim(
        self, uint32_t now, const uint8_t* dirty, uint64_t dirty_pages
    ) noexcept nogil:
        """Return a slot that may be evicted, or NO_SLOT: the newcomer is refused.

        now   -- the round
        dirty -- the bitmap of the round, of `dirty_pages` bits: its pages are not evicted
        """
        cdef Py_ssize_t tries = PROBES if self.capacity > PROBES else self.capacity
        cdef uint32_t slot
        cdef uint64_t page
        while tries:
            tries -= 1
            slot = <uint32_t>self.hand
            self.hand += 1
            if self.hand == self.capacity:
                self.hand = 0
            page = self.tags[slot]
            if page < dirty_pages and get_bit(dirty, page):
                continue
            if self.ages[slot] + (LIFETIME if self.reused[slot] else 1) <= now:
                return slot
        return NO_SLOT

    cdef uint32_t insert(
        self, uint64_t page, const uint8_t* content, uint32_t now,
        const uint8_t* dirty, uint64_t dirty_pages,
    ) noexcept nogil:
        """Enter a page that is not in the cache. Return its slot, or NO_SLOT if it was refused.

        From round 2 on a page counts as reused at once: it is sent because it was written.
        """
        cdef uint32_t slot
        if self.spares:
            self.spares -= 1
            slot = self.spare[self.spares]
        else:
            slot = self.victim(now, dirty, dirty_pages)
            if slot == NO_SLOT:
                return slot
            self.unlink(slot)
            self.evictions += 1
        self.link(page, slot)
        self.ages[slot] = now
        self.reused[slot] = now > 1
        memcpy(self.at(slot), content, self.page_size)
        return slot

    def get(self, uint64_t page):
        """Return the cached content of a page, or None."""
        cdef uint32_t slot = self.find(page)
        if slot == NO_SLOT:
            return None
        return PyBytes_FromStringAndSize(<char*>self.at(slot), self.page_size)

    def put(self, uint64_t page, const uint8_t[::1] content not None, uint32_t now, dirty=b""):
        """Cache `content` as of round `now`. Return False if the page was refused.

        dirty -- the dirty bitmap of the round: its pages are not evicted
        """
        cdef const uint8_t[::1] bits = dirty
        cdef const uint8_t* at = &bits[0] if bits.shape[0] else NULL
        if content.shape[0] != self.page_size:
            raise ValueError(f"a page has {self.page_size} bytes, not {content.shape[0]}")
        cdef uint32_t slot = self.find(page)
        if slot == NO_SLOT:
            return self.insert(page, &content[0], now, at, bits.shape[0] * 8) != NO_SLOT
        memcpy(self.at(slot), &content[0], self.page_size)
        self.ages[slot] = now
        self.reused[slot] = 1
        return True

    def drop(self, uint64_t page):
        """Forget a page. Nothing happens if it is not cached."""
        cdef uint32_t slot = self.find(page)
        if slot != NO_SLOT:
            self.remove(slot)

    def clear(self):
        """Forget all pages, and give their memory back to the operating system."""
        cdef Py_ssize_t slot
        for slot in range(self.capacity):
            self.tags[slot] = NO_PAGE
            self.spare[slot] = <uint32_t>(self.capacity - 1 - slot)
        memset(self.index, 0, (self.index_mask + 1) * 4)
        self.spares = self.capacity
        self.hand = 0
        madvise(self.data, <size_t>self.capacity * self.page_size, MADV_DONTNEED)

    def resize(self, size):
        """Change the capacity. Every entry that still fits is kept, the newest first.

        The contents are not copied: the mapping grows or shrinks, and only entries above the new
        end move down. Raises CacheSizeError for a size that breaks the rule, and MemoryError;
        either way nothing has changed.
        """
        cdef Py_ssize_t capacity = self.entries_for(size), old = self.capacity
        if capacity == old:
            return
        cdef uint64_t* tags = self.tags
        cdef uint32_t* ages = self.ages
        cdef uint8_t* reused = self.reused
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
                if xb_map_failed(data):
                    raise MemoryError(f"no memory for a page cache of {size} bytes")
                self.data = <uint8_t*>data
                madvise(self.data, <size_t>capacity * self.page_size, MADV_HUGEPAGE)
        except MemoryError:
            self.undo_allocate(tags, ages, reused, spare, index, mask)
            free(order)
            raise
        with nogil:
            self.refill(capacity, old, tags, ages, reused, order)
        if capacity < old:
            data = mremap(
                self.data, <size_t>old * self.page_size, <size_t>capacity * self.page_size, 0
            )
        self.capacity = capacity
        self.hand = 0
        free(order)
        free(tags)
        free(ages)
        free(reused)
        free(spare)
        free(index)

    cdef void undo_allocate(
        self, uint64_t* tags, uint32_t* ages, uint8_t* reused, uint32_t* spare, uint32_t* index,
        size_t mask,
    ) noexcept:
        """Free the new tables, as far as they were made, and go back to these old ones."""
        if self.tags != tags:
            free(self.tags)
            free(self.ages)
            free(self.reused)
            free(self.spare)
            free(self.index)
        self.tags, self.ages, self.reused = tags, ages, reused
        self.spare, self.index, self.index_mask = spare, index, mask

    cdef void refill(
        self, Py_ssize_t capacity, Py_ssize_t old, uint64_t* tags, uint32_t* ages,
        uint8_t* reused, uint64_t* order,
    ) noexcept nogil:
        """Enter the newest entries of the old tables in the first `capacity` slots."""
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
        for i in range(kept):                   # entries whose slot stays
            slot = <uint32_t>(order[i] & 0xFFFFFFFFu)
            if slot < capacity:
                self.link(tags[slot], slot)
                self.ages[slot] = ages[slot]
                self.reused[slot] = reused[slot]
        for i in range(kept):                   # entries that must move down
            slot = <uint32_t>(order[i] & 0xFFFFFFFFu)
            if slot >= capacity:
                while self.tags[hole] != NO_PAGE:
                    hole += 1
                target = <uint32_t>hole
                self.link(tags[slot], target)
                self.ages[target] = ages[slot]
                self.reused[target] = reused[slot]
                memcpy(self.at(target), self.at(slot), self.page_size)
        self.spares = 0
        for i in range(capacity - 1, -1, -1):
            if self.tags[i] == NO_PAGE:
                self.spare[self.spares] = <uint32_t>i
                self.spares += 1
