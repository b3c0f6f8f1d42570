# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""A keyed 64-bit hash of every page, and the digest of all of them (proto/README.md).

One hash per page serves three ends: it proves at the end that both memories are equal, it checks
the raw pages of a batch as they arrive, and it tells which pages have changed when no old content
is left to compare with.

NH (Black et al., "UMAC", CRYPTO 1999) adds a secret key to the words of a page, multiplies them in
pairs and adds the products up. It is fast, because the multiplications do not depend on each other,
and it is proven: without the key, two pages of one hash cannot be found with a better chance than
2^-64. A multiply-shift hash folds its 128 bits into 64, which leaves 2^-62 in all. The
key is derived from a random seed of the migration.

A delta changes a page whose whole content the kernel does not see: the page becomes *stale*, and
its hash is computed later from memory, when there is time for it.

The digest can be a sum of one term per page (the capability `sparse`). A sum is kept up to date as
hashes change: the old term is subtracted and the new one added. So nothing is left to compute while
the guest is paused, and pages of zeros, which have no term, cost nothing at all.

The readable twin is proto/codec/_hashes_twin.py.
"""

import hashlib

from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset

from proto.codec._bitmaps cimport ZeroedMemory, new_bitmap
from proto.codec._bits cimport clear_bit, clear_bit_shared, clear_range, get_bit
from proto.codec._xbzrle cimport check_page_size, zero_page

cdef extern from "endian.h" nogil:
    uint64_t htole64(uint64_t)
    uint64_t le64toh(uint64_t)

cdef extern from *:
    """
    static inline uint64_t xb_word(const uint8_t *at)
    {
        uint64_t value;
        memcpy(&value, at, 8);
        return le64toh(value);
    }

    /* Two sums, so that one addition with carry need not wait for the other. */
    static uint64_t xb_hash(const uint8_t *page, const uint64_t *key, size_t words)
    {
        unsigned __int128 a = 0, b = 0, fold, r0, r1;
        for (size_t i = 0; i < words; i += 4) {
            a += (unsigned __int128)(xb_word(page + 8 * i) + key[i])
                 * (xb_word(page + 8 * i + 8) + key[i + 1]);
            b += (unsigned __int128)(xb_word(page + 8 * i + 16) + key[i + 2])
                 * (xb_word(page + 8 * i + 24) + key[i + 3]);
        }
        a += b;
        r0 = (unsigned __int128)key[words + 1] << 64 | key[words];
        r1 = (unsigned __int128)key[words + 3] << 64 | key[words + 2];
        fold = r0 * (uint64_t)a + r1 * (uint64_t)(a >> 64);
        return (uint64_t)(fold >> 64);
    }

    static inline uint64_t xb_avalanche(uint64_t value)
    {
        value ^= value >> 37;
        value *= 0x165667919E3779F9u;
        return value ^ value >> 32;
    }

    /* XXH3-128 of two words: 16 bytes little-endian, seed 0. It is called for single pages without
       the GIL, which no library offers. Two of the constants are words of XXH3's own secret. */
    static inline unsigned __int128 xb_pair(uint64_t page, uint64_t hash)
    {
        const uint64_t prime = 0xC2B2AE3D27D4EB4Fu;
        uint64_t word = hash ^ 0xC202797692D63D58u;
        unsigned __int128 m = (unsigned __int128)(page ^ hash ^ 0x59973F0033362349u)
                              * 0x9E3779B185EBCA87u;
        uint64_t low = (uint64_t)m + ((uint64_t)15 << 54), high = (uint64_t)(m >> 64);
        high += word + (uint64_t)(uint32_t)word * 0x85EBCA76u;
        low ^= __builtin_bswap64(high);
        m = (unsigned __int128)low * prime;
        high = (uint64_t)(m >> 64) + high * prime;
        return (unsigned __int128)xb_avalanche(high) << 64 | xb_avalanche((uint64_t)m);
    }

    #define xb_plus(sum, page, hash) ((sum)->value += xb_pair(page, hash))
    #define xb_minus(sum, page, hash) ((sum)->value -= xb_pair(page, hash))
    #define xb_half(sum, high) ((uint64_t)((sum)->value >> ((high) ? 64 : 0)))
    """
    void xb_plus(xb_sum*, uint64_t, uint64_t) nogil
    void xb_minus(xb_sum*, uint64_t, uint64_t) nogil
    uint64_t xb_half(xb_sum*, bint) nogil
    uint64_t xb_hash(const uint8_t*, const uint64_t*, size_t) nogil

cdef enum:
    # Entries of one page of memory (8 * 512 = 4096 bytes): the unit in which the operating system
    # gives memory, so a block that was never touched need not be read.
    BLOCK = 512


cdef class PageHashes:
    """The hash of every page as the destination holds it, at first that of zeros.

    stale -- a bit per page: a delta has changed it since its hash was computed

    An entry is a hash XOR the hash of zeros. So pages of zeros, which no one has written, have
    entries of 0 in memory that was never written either.
    """

    def __cinit__(self, uint64_t pages, Py_ssize_t page_size, bytes seed):
        check_page_size(page_size)
        if pages == 0:
            raise ValueError("no pages")
        self.pages = pages
        self.page_size = page_size
        # The key is little-endian: on another machine its words are swapped here, once, so that
        # the hash is the same number everywhere.
        raw = hashlib.shake_256(seed).digest(page_size + 32)
        self.key = raw
        cdef uint64_t* words = <uint64_t*><char*>self.key
        cdef Py_ssize_t i
        for i in range((page_size + 32) // 8):
            words[i] = le64toh(words[i])
        self.key_at = words
        self.zero = xb_hash(zero_page(), words, page_size >> 3)
        self.entries_memory = ZeroedMemory(8 * pages, True)
        self.touched_memory = ZeroedMemory((pages + BLOCK - 1) // BLOCK)
        self.stale_memory = new_bitmap(pages)
        self.stale = memoryview(self.stale_memory)
        self.entries = <uint64_t*>self.entries_memory.at
        self.touched = self.touched_memory.at
        self.stale_at = self.stale_memory.at
        self.begin_sum()

    cdef void begin_sum(self) noexcept nogil:
        """Start the sum with the term that stands for the size of the guest and the seed."""
        memset(&self.total, 0, sizeof(self.total))
        xb_plus(&self.total, self.pages, self.zero)

    cdef uint64_t hash_of(self, const uint8_t* page) noexcept nogil:
        return xb_hash(page, self.key_at, self.page_size >> 3)

    cdef void set_entry(self, uint64_t page, uint64_t value, xb_sum* total) noexcept nogil:
        """Store the hash of a page, and exchange its term in `total`."""
        cdef uint64_t old = self.entries[page], new = value ^ self.zero
        if old == new:
            return
        if old:
            xb_minus(total, page, old ^ self.zero)
        if new:
            xb_plus(total, page, value)
        self.entries[page] = new
        self.touched[page // BLOCK] = 1

    cdef void note(self, uint64_t page, uint64_t value) noexcept nogil:
        """Store the hash of a page's present content: the page is not stale."""
        self.set_entry(page, value, &self.total)
        if get_bit(self.stale_at, page):
            clear_bit(self.stale_at, page)

    cdef void note_shared(self, uint64_t page, uint64_t value, xb_sum* total) noexcept nogil:
        """As `note`, while other threads note other pages.

        total -- the thread's own sum, which is added to that of the guest later: two threads that
                 changed the same 128 bits would lose terms
        """
        self.set_entry(page, value, total)
        clear_bit_shared(self.stale_at, page)

    cdef void note_zeros(self, uint64_t first, uint64_t end) noexcept nogil:
        """Store the hash of zeros for the pages from `first` up to `end`."""
        cdef uint64_t page = first, stop
        while page < end:
            stop = (page // BLOCK + 1) * BLOCK
            if stop > end:
                stop = end
            if self.touched[page // BLOCK]:
                while page < stop:
                    self.set_entry(page, self.zero, &self.total)
                    page += 1
            page = stop
        clear_range(self.stale_at, first, end)

    cdef bint matches(self, uint64_t page, const uint8_t* content) noexcept nogil:
        return (self.entries[page] ^ self.zero) == self.hash_of(content)

    def clear(self):
        """Make every hash that of zeros again."""
        with nogil:
            self.entries_memory.clear()
            self.touched_memory.clear()
            self.stale_memory.clear()
            self.begin_sum()

    @property
    def sum(self):
        """The sum digest, 16 bytes big-endian (proto/README.md, "The digest")."""
        return (
            int(xb_half(&self.total, True)).to_bytes(8, "big")
            + int(xb_half(&self.total, False)).to_bytes(8, "big")
        )

    @property
    def table(self):
        """The hashes of all pages, 8 bytes each, little-endian."""
        return self.part(0, self.pages)

    def part(self, uint64_t first, uint64_t count):
        """Return the hashes of `count` pages from `first` on, 8 bytes each, little-endian."""
        cdef uint64_t i, zero = htole64(self.zero), stop
        if first > self.pages or count > self.pages - first:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        result = bytearray(8 * count)
        cdef uint64_t* at = <uint64_t*>PyByteArray_AS_STRING(result)
        with nogil:
            i = 0
            while i < count:
                stop = ((first + i) // BLOCK + 1) * BLOCK - first
                if stop > count:
                    stop = count
                if self.touched[(first + i) // BLOCK]:
                    while i < stop:
                        at[i] = htole64(self.entries[first + i] ^ self.zero)
                        i += 1
                else:
                    while i < stop:
                        at[i] = zero
                        i += 1
        return result

    def nonzero_part(self, uint64_t first, uint64_t most):
        """Return the next hashes that are not that of zeros, as (their first page, the hashes).

        first -- looks at this page and those behind it
        most  -- looks at this many pages from the first such page on

        The hashes go as far as the last page of those with another hash than that of zeros. At
        the end of the guest it returns (pages, b"").
        """
        cdef uint64_t page = first, end
        with nogil:
            while page < self.pages:
                if not self.touched[page // BLOCK]:
                    page = (page // BLOCK + 1) * BLOCK
                elif self.entries[page] == 0:
                    page += 1
                else:
                    break
        if page >= self.pages or most == 0:
            return self.pages, b""
        end = self.pages if most > self.pages - page else page + most
        with nogil:
            while self.entries[end - 1] == 0:
                end -= 1
        return page, bytes(self.part(page, end - page))

    def hash_pages(
        self, const uint64_t[::1] numbers not None, Py_ssize_t count,
        const uint8_t[::1] content not None,
    ):
        """Hash `count` pages, whose numbers and content are given; they are stale no more."""
        cdef Py_ssize_t i
        if not 0 <= count <= numbers.shape[0] or content.shape[0] < count * self.page_size:
            raise ValueError("there are fewer pages than that")
        for i in range(count):
            if numbers[i] >= self.pages:
                raise ValueError(f"page {numbers[i]} is outside the guest")
        with nogil:
            for i in range(count):
                self.note(numbers[i], self.hash_of(&content[i * self.page_size]))
