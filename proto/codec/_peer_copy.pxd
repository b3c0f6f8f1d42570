cimport cython
from libc.stdint cimport uint8_t, uint64_t

from proto.codec._bitmaps cimport PrefixSet, ZeroedMemory
from proto.codec._bits cimport get_bit
from proto.codec._cache cimport PageCache
from proto.codec._hashes cimport PageHashes, xb_sum


cdef class PeerCopy:
    cdef readonly uint64_t pages
    cdef readonly Py_ssize_t page_size
    cdef PageCache cache
    cdef PageHashes hashes
    cdef PrefixSet sent         # the pages that the peer has
    cdef uint8_t* nonzero       # a bit for those of them that are not known to be zeros there
    cdef ZeroedMemory nonzero_memory

    # Inline, because the encoder asks for each page of zeros.
    @cython.final
    cdef inline bint is_zero_there(self, uint64_t page) noexcept nogil:
        return self.sent.has(page) and not get_bit(self.nonzero, page)

    cdef void make_zeros(self, uint64_t first, uint64_t end) noexcept nogil
    cdef uint64_t zeros_end(self, uint64_t page, uint64_t end) noexcept nogil
    cdef uint64_t lacking_end(self, uint64_t page, uint64_t end) noexcept nogil
    cdef int check_scan(self, uint64_t first, uint64_t count, uint8_t[::1] changed) except -1
    cdef uint64_t scan_pages(
        self, uint64_t first, uint64_t count, const uint8_t* data, uint8_t* changed, xb_sum* total
    ) noexcept nogil
    cdef bint differs(
        self, uint64_t page, const uint8_t* content, Py_ssize_t* hint, xb_sum* total
    ) noexcept nogil
