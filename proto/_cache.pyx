# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""The page cache: old contents of pages by page number, found, kept and evicted without the GIL.

The readable twin of this file is in proto/_twin.py; the two make the same decisions.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcpy, memset

from proto._bits cimport get_bit
from proto._codec cimport MAX_PAGE, MIN_PAGE

from proto.errors import CacheSizeError

cdef extern from "sys/mman.h" nogil:
    enum:
        PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MREMAP_MAYMOVE
        MADV_HUGEPAGE, MADV_DONTNEED
    int madvise(void*, size_t, int)
    void* mmap(void*, size_t, int, int, int, long)
    int munmap(void*, size_t)

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
    """
    void* mremap(void*, size_t, size_t, int) nogil
    bint xb_failed(void*) nogil

cdef enum:
    LIFETIME = 2                # rounds an entry is safe after its last use (QEMU's figure)
    PROBES = 16                 # slots looked at to find one that may be evicted

cdef uint64_t NO_PAGE = 0xFFFFFFFFFFFFFFFFu


cdef int newest_first(const void* a, const void* b) noexcept nogil:
    cdef uint64_t x = (<const uint64_t*>a)[0], y = (<const uint64_t*>b)[0]
    return (x > y) - (x < y)


cdef class PageCache:
    """Old contents of pages, by page number; each equals what the peer holds.

    Fully associative: any `size / page_size` pages fit together, whichever they are. An open
    addressing index (load at most one half) finds a page; a moving hand finds whom to evict.
    """

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

    cdef size_t home(self, uint64_t page) noexcept nogil:
        return <size_t>((page * 0x9E3779B97F4A7C15u) >> 20) & self.index_mask

    cdef uint32_t find(self, uint64_t page) noexcept nogil:
        return self.find_near(page, &self.next)

    cdef uint32_t find_near(self, uint64_t page, Py_ssize_t* next) noexcept nogil:
        """As `find`, from any thread while nothing changes: `next` is the caller's own."""
        cdef size_t i
        cdef uint32_t entry
        # What came in one after the other is asked for in that order, and lies in it.
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
        cdef uint64_t page
        while tries:
            tries -= 1
            slot = <uint32_t>self.hand
            self.hand += 1
            if self.hand == self.capacity:
                self.hand = 0
            page = self.tags[slot]
            if page < todo_pages and get_bit(todo, page):
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

    def clear(self):
        """Forgets all pages, and gives their memory back to the system."""
        cdef Py_ssize_t slot
        for slot in range(self.capacity):
            self.tags[slot] = NO_PAGE
            self.spare[slot] = <uint32_t>(self.capacity - 1 - slot)
        memset(self.index, 0, (self.index_mask + 1) * 4)
        self.spares = self.capacity
        self.hand = 0
        madvise(self.data, <size_t>self.capacity * self.page_size, MADV_DONTNEED)

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
