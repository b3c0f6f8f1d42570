"""Bitmaps of pages: bit `page % 8` of byte `page // 8`, as in proto.pageset."""

from libc.stdint cimport uint8_t, uint64_t

cdef extern from "endian.h" nogil:
    uint64_t le64toh(uint64_t)

cdef extern from *:
    """
    #define xb_ctz(x) __builtin_ctzll(x)
    """
    int xb_ctz(uint64_t) nogil


cdef inline bint get_bit(const uint8_t* bits, uint64_t i) noexcept nogil:
    return (bits[i >> 3] >> (i & 7)) & 1


cdef inline void set_bit(uint8_t* bits, uint64_t i) noexcept nogil:
    bits[i >> 3] |= <uint8_t>(1 << (i & 7))


cdef inline void clear_bit(uint8_t* bits, uint64_t i) noexcept nogil:
    bits[i >> 3] &= <uint8_t>~(1 << (i & 7))


cdef inline uint64_t next_set(const uint8_t* bits, uint64_t page, uint64_t end) noexcept nogil:
    """The first page at or after `page` whose bit is set, or `end`; in whole 8-byte words."""
    cdef const uint64_t* words = <const uint64_t*>bits
    cdef uint64_t word
    while page < end:
        word = le64toh(words[page >> 6]) >> (page & 63)
        if word:
            page += xb_ctz(word)
            return page if page < end else end
        page = (page | 63) + 1
    return end
