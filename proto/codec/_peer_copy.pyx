# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""The source's knowledge of the peer's copy, and the search for pages that differ from it.

    page        sent   nonzero   hash                cache
    unknown     no     no        --                  --
    zeros       yes    no        that of zeros       never: zeros need no memory
    known       yes    yes       exact, or stale     maybe its content

A hash is stale after a delta: the peer has the page, but we have not hashed what it became. So a
stale page that is not cached counts as changed: we cannot prove that it is equal. A page that is
sent once too often costs its bytes; one that is left out corrupts the guest.

Most guests are mostly zeros, and most of their pages are sent in ascending order. `sent` is
therefore a prefix and a bitmap of what is beyond it, and runs of zeros are walked a word of
`nonzero` at a time.

The readable twin is proto/codec/_peer_copy_twin.py.
"""

import os

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from proto.codec._bitmaps cimport PrefixSet, new_bitmap
from proto.codec._bits cimport clear_bit, get_bit, next_set, set_bit, set_bit_shared, set_range
from proto.codec._cache cimport NO_SLOT, PageCache
from proto.codec._xbzrle cimport is_zero
from proto.codec._hashes cimport PageHashes, xb_join, xb_sum

cdef extern from "endian.h" nogil:
    uint64_t le64toh(uint64_t)

cdef extern from "unistd.h" nogil:
    ssize_t pread(int, void*, size_t, long)


cdef class PeerCopy:
    """The pages that the peer holds. PageEncoder keeps it up to date as it encodes pages.

    hashes -- keeps the hash of every page that is sent
    cache  -- of contents that the peer holds; None: there is none
    """

    def __cinit__(self, PageHashes hashes not None, PageCache cache=None, **_more):
        self.pages = hashes.pages
        self.page_size = hashes.page_size
        if cache is not None and cache.page_size != self.page_size:
            raise ValueError("the cache has pages of another size")
        if cache is not None and len(cache):
            raise ValueError("the cache holds pages of another migration")
        self.hashes = hashes
        self.cache = cache
        self.sent = PrefixSet(self.pages)
        self.nonzero_memory = new_bitmap(self.pages)
        self.nonzero = self.nonzero_memory.at

    def adopt(self, uint64_t first, const uint8_t[::1] table not None):
        """Take over what the peer says it holds: the hashes of the pages from `first` on.

        table -- 8 bytes for each page, little-endian

        These pages count as sent. The cache drops the content of a page that has another hash than
        the peer says. Raises ValueError for pages outside the guest.
        """
        cdef uint64_t count = <uint64_t>table.shape[0] // 8, i, page, value
        cdef uint32_t slot
        if table.shape[0] % 8 or first > self.pages or count > self.pages - first:
            raise ValueError(f"{table.shape[0]} bytes of hashes from page {first} on")
        with nogil:
            for i in range(count):
                page = first + i
                memcpy(&value, &table[8 * i], 8)
                value = le64toh(value)
                # HELD cannot tell zeros from a page that hashes like zeros; the key is secret, so
                # no guest can make such a page.
                if value == self.hashes.zero:
                    self.make_zeros(page, page + 1)
                    continue
                self.hashes.note(page, value)
                self.sent.add(page)
                set_bit(self.nonzero, page)
                if self.cache is None:
                    continue
                # A batch that was cut off may have changed the page here and not there.
                slot = self.cache.find(page)
                if slot != NO_SLOT and self.hashes.hash_of(self.cache.at(slot)) != value:
                    self.cache.remove(slot)

    def adopt_zeros(self, uint64_t first, uint64_t count):
        """As `adopt`, for `count` pages that the peer holds as zeros."""
        if first > self.pages or count > self.pages - first:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        with nogil:
            self.make_zeros(first, first + count)

    cdef void make_zeros(self, uint64_t first, uint64_t end) noexcept nogil:
        """Note that the peer holds the pages from `first` up to `end`, as zeros."""
        cdef uint64_t page = first
        cdef uint32_t slot
        while True:
            page = next_set(self.nonzero, page, end)
            if page >= end:
                break
            clear_bit(self.nonzero, page)
            if self.cache is not None:
                slot = self.cache.find(page)
                if slot != NO_SLOT:
                    self.cache.remove(slot)
            page += 1
        self.sent.add_range(first, end)
        self.hashes.note_zeros(first, end)

    def forget(self):
        """Forget what the peer holds: every page is to be sent as in round 1."""
        with nogil:
            self.make_zeros(0, self.pages)
            self.sent.clear()
            self.nonzero_memory.clear()
        self.hashes.clear()

    cdef uint64_t zeros_end(self, uint64_t page, uint64_t end) noexcept nogil:
        """Return the first page from `page` on that is not known to be zeros there, or `end`."""
        cdef uint64_t stop
        if page < self.sent.prefix:
            stop = end if end < self.sent.prefix else self.sent.prefix
            page = next_set(self.nonzero, page, stop)
            if page < stop:
                return page
        # Beyond the prefix `sent` has holes, so each page is asked for.
        while page < end and self.is_zero_there(page):
            page += 1
        return page

    cdef uint64_t lacking_end(self, uint64_t page, uint64_t end) noexcept nogil:
        """Return the first page from `page` on that is known to be zeros there, or `end`."""
        if page >= self.sent.prefix and not self.sent.beyond:
            return end
        while page < end and not self.is_zero_there(page):
            page += 1
        return page

    def scan(
        self, uint64_t first, uint64_t count, const uint8_t[::1] data not None,
        uint8_t[::1] changed not None,
    ):
        """Set a bit in `changed` for each page in `data` that differs from the peer's.

        first, count -- the pages in `data`

        The result is exact for pages in the cache and for pages of zeros. Others are compared by
        their hash, which misses a change with a probability below 2^-62. A page that equals its
        cached content gets a new hash if that was stale. Returns how many pages differ.
        """
        cdef uint64_t found = 0
        cdef xb_sum total
        self.check_scan(first, count, changed)
        if <uint64_t>data.shape[0] < count * self.page_size:
            raise ValueError("the data is too short")
        if count == 0:
            return 0
        memset(&total, 0, sizeof(total))
        with nogil:
            found = self.scan_pages(first, count, &data[0], &changed[0], &total)
        xb_join(&self.hashes.total, &total)
        return found

    def scan_file(
        self, int fd, uint64_t size, uint64_t first, uint64_t count, uint8_t[::1] changed not None,
        uint8_t[::1] buffer not None,
    ):
        """As `scan`, for pages of a file of `size` bytes, read with pread(2).

        buffer -- takes some pages at a time

        Behind the end of the file are zeros. Several threads may scan at once, each its own pages
        with a buffer of its own, as long as no other method of the encoder runs. Raises OSError if
        reading fails.
        """
        cdef uint64_t found = 0, page = first, end = first + count, some
        cdef uint64_t step = <uint64_t>buffer.shape[0] // <uint64_t>self.page_size
        cdef xb_sum total
        cdef int error = 0
        self.check_scan(first, count, changed)
        if step == 0:
            raise ValueError("the buffer is shorter than a page")
        memset(&total, 0, sizeof(total))
        with nogil:
            while page < end:
                some = end - page if end - page < step else step
                error = read_pages(
                    fd, &buffer[0], page * self.page_size, some * self.page_size, size
                )
                if error:
                    break
                found += self.scan_pages(page, some, &buffer[0], &changed[0], &total)
                page += some
        xb_join(&self.hashes.total, &total)
        if error:
            raise OSError(error, os.strerror(error))
        return found

    cdef int check_scan(self, uint64_t first, uint64_t count, uint8_t[::1] changed) except -1:
        if first > self.pages or count > self.pages - first:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        if <uint64_t>changed.shape[0] * 8 < self.pages:
            raise ValueError("the data or the bitmap is too short")
        return 0

    cdef uint64_t scan_pages(
        self, uint64_t first, uint64_t count, const uint8_t* data, uint8_t* changed, xb_sum* total
    ) noexcept nogil:
        """Scan pages while other threads scan others.

        Bits are therefore set atomically, and the sum digest changes in `total`, which is added to
        that of the guest at the end.
        """
        cdef uint64_t i, page, found = 0
        cdef const uint8_t* content
        cdef Py_ssize_t hint = 0
        for i in range(count):
            page = first + i
            content = data + i * self.page_size
            if not self.sent.has(page) or self.differs(page, content, &hint, total):
                set_bit_shared(changed, page)
                found += 1
        return found

    cdef bint differs(
        self, uint64_t page, const uint8_t* content, Py_ssize_t* hint, xb_sum* total
    ) noexcept nogil:
        """Return whether the peer holds another content of a page that it has.

        hint -- the thread's own place in the cache, see PageCache.find_near
        """
        cdef uint32_t slot = NO_SLOT
        if not get_bit(self.nonzero, page):
            return not is_zero(content, self.page_size)
        if self.cache is not None:
            slot = self.cache.find_near(page, hint)
        if slot == NO_SLOT:
            return get_bit(self.hashes.stale_at, page) or not self.hashes.matches(page, content)
        if memcmp(content, self.cache.at(slot), self.page_size) != 0:
            return True
        if get_bit(self.hashes.stale_at, page):
            self.hashes.note_shared(page, self.hashes.hash_of(content), total)
        return False

    def scan_zeros(self, uint64_t first, uint64_t count, uint8_t[::1] changed not None):
        """As `scan`, for pages that are known to be zeros without reading them."""
        cdef uint64_t page = first, stop, end = first + count, found = 0
        self.check_scan(first, count, changed)
        with nogil:
            while True:
                page = self.zeros_end(page, end)
                if page == end:
                    break
                stop = self.lacking_end(page + 1, end)
                set_range(&changed[0], page, stop)
                found += stop - page
                page = stop
        return found


cdef int read_pages(
    int fd, uint8_t* into, uint64_t offset, uint64_t length, uint64_t size
) noexcept nogil:
    """Read `length` bytes of a file of `size` bytes, with zeros behind its end.

    Returns 0 or an errno.
    """
    cdef uint64_t got = 0
    cdef ssize_t n
    while got < length and offset + got < size:
        n = pread(fd, into + got, length - got, <long>(offset + got))
        if n > 0:
            got += n
        elif n == 0:
            break
        elif errno != EINTR:
            return errno
    if offset + got > size:
        got = size - offset
    if got < length:
        memset(into + got, 0, length - got)
    return 0
