cimport cython
from libc.stdint cimport uint8_t, uint64_t

from proto.codec._bits cimport get_bit, set_bit


@cython.final
cdef class ZeroedMemory:
    cdef uint8_t* at
    cdef size_t size

    cdef void clear(self) noexcept nogil


cdef ZeroedMemory new_bitmap(uint64_t pages)


@cython.final
cdef class PrefixSet:
    cdef uint64_t pages
    cdef uint64_t prefix        # every page below this number is in the set
    cdef uint64_t beyond        # how many pages from `prefix` on are in it too
    cdef uint8_t* bits          # those pages
    cdef ZeroedMemory memory

    # Inline, because the encoder and the decoder ask for each page.
    cdef inline bint has(self, uint64_t page) noexcept nogil:
        return page < self.prefix or get_bit(self.bits, page)

    cdef inline void add(self, uint64_t page) noexcept nogil:
        if page == self.prefix:
            self.prefix += 1
            if self.beyond:
                self.close_up()
        elif page > self.prefix and not get_bit(self.bits, page):
            set_bit(self.bits, page)
            self.beyond += 1

    cdef void close_up(self) noexcept nogil
    cdef void add_range(self, uint64_t first, uint64_t end) noexcept nogil
    cdef void clear(self) noexcept nogil
