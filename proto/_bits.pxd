"""Bitmaps of pages: bit `page % 8` of byte `page // 8`, as in proto.pageset."""

from libc.stdint cimport uint8_t, uint64_t

cdef extern from "endian.h" nogil:
    uint64_t le64toh(uint64_t)

cdef extern from *:
    """
    #define xb_ctz(x) __builtin_ctzll(x)
    #define xb_or(at, bits) __atomic_fetch_or((at), (bits), __ATOMIC_RELAXED)
    #define xb_and(at, bits) __atomic_fetch_and((at), (bits), __ATOMIC_RELAXED)
    """
    int xb_ctz(uint64_t) nogil
    void xb_or(uint8_t*, uint8_t) nogil
    void xb_and(uint8_t*, uint8_t) nogil


cdef inline bint get_bit(const uint8_t* bits, uint64_t i) noexcept nogil:
    return (bits[i >> 3] >> (i & 7)) & 1


cdef inline void set_bit(uint8_t* bits, uint64_t i) noexcept nogil:
    bits[i >> 3] |= <uint8_t>(1 << (i & 7))


cdef inline void clear_bit(uint8_t* bits, uint64_t i) noexcept nogil:
    bits[i >> 3] &= <uint8_t>~(1 << (i & 7))


cdef inline void set_bit_shared(uint8_t* bits, uint64_t i) noexcept nogil:
    """While other threads change other bits of the same byte."""
    xb_or(bits + (i >> 3), <uint8_t>(1 << (i & 7)))


cdef inline void clear_bit_shared(uint8_t* bits, uint64_t i) noexcept nogil:
    xb_and(bits + (i >> 3), <uint8_t>~(1 << (i & 7)))


cdef inline uint64_t set_range(uint8_t* bits, uint64_t page, uint64_t end) noexcept nogil:
    """Sets the bits from `page` up to `end`, of whole 8-byte words; how many were clear."""
    cdef uint64_t* words = <uint64_t*>bits
    cdef uint64_t added = 0
    while page < end:
        if page & 63 == 0 and end - page >= 64 and words[page >> 6] == 0:
            words[page >> 6] = ~<uint64_t>0
            added += 64
            page += 64
        else:
            if not get_bit(bits, page):
                set_bit(bits, page)
                added += 1
            page += 1
    return added


cdef inline bint all_clear(const uint64_t* words) noexcept nogil:
    """Whether the next eight words are 0: most of a large bitmap is."""
    return not (
        words[0] | words[1] | words[2] | words[3] | words[4] | words[5] | words[6] | words[7]
    )


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
        while page + 512 <= end and all_clear(words + (page >> 6)):
            page += 512
    return end


cdef inline uint64_t next_set_but(
    const uint8_t* bits, const uint8_t* but, uint64_t page, uint64_t end
) noexcept nogil:
    """As `next_set`, without the pages of another bitmap, if there is one."""
    cdef const uint64_t* words = <const uint64_t*>bits
    cdef const uint64_t* others = <const uint64_t*>but
    cdef uint64_t word
    if but == NULL:
        return next_set(bits, page, end)
    while page < end:
        word = le64toh(words[page >> 6] & ~others[page >> 6]) >> (page & 63)
        if word:
            page += xb_ctz(word)
            return page if page < end else end
        page = (page | 63) + 1
        while page + 512 <= end and all_clear(words + (page >> 6)):
            page += 512
    return end
