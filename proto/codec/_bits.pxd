"""Bitmaps of pages: bit `page % 8` of byte `page // 8`, in whole 8-byte words.

Inline, because the walks ask for a bit per page. A bitmap is read a word at a time, and eight
words at a time while nothing is set: at 1 TiB a bitmap has 32 MiB, nearly all of it zeros.

The functions named `_shared` change a bit in one atomic step. They are for threads that share a
bitmap and work on different pages of it: without them, two threads that change bits of the same
byte would lose one of the changes. No order is needed between bits, so the order is relaxed.
"""

from libc.stdint cimport uint8_t, uint64_t

cdef extern from "endian.h" nogil:
    uint64_t le64toh(uint64_t)

cdef extern from *:
    """
    #define xb_ctz(x) __builtin_ctzll(x)
    #define xb_popcount(x) __builtin_popcountll(x)
    #define xb_or(at, bits) __atomic_fetch_or((at), (bits), __ATOMIC_RELAXED)
    #define xb_and(at, bits) __atomic_fetch_and((at), (bits), __ATOMIC_RELAXED)
    """
    int xb_ctz(uint64_t) nogil
    int xb_popcount(uint64_t) nogil
    void xb_or(uint8_t*, uint8_t) nogil
    void xb_and(uint8_t*, uint8_t) nogil


cdef inline bint get_bit(const uint8_t* bits, uint64_t i) noexcept nogil:
    return (bits[i >> 3] >> (i & 7)) & 1


cdef inline void set_bit(uint8_t* bits, uint64_t i) noexcept nogil:
    bits[i >> 3] |= <uint8_t>(1 << (i & 7))


cdef inline void clear_bit(uint8_t* bits, uint64_t i) noexcept nogil:
    bits[i >> 3] &= <uint8_t>~(1 << (i & 7))


cdef inline void set_bit_shared(uint8_t* bits, uint64_t i) noexcept nogil:
    xb_or(bits + (i >> 3), <uint8_t>(1 << (i & 7)))


cdef inline void clear_bit_shared(uint8_t* bits, uint64_t i) noexcept nogil:
    xb_and(bits + (i >> 3), <uint8_t>~(1 << (i & 7)))


cdef inline uint64_t set_range(uint8_t* bits, uint64_t page, uint64_t end) noexcept nogil:
    """Set the bits from `page` up to `end`. Return how many of them were clear."""
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
    """Return whether the next eight words are 0."""
    return not (
        words[0] | words[1] | words[2] | words[3] | words[4] | words[5] | words[6] | words[7]
    )


cdef inline uint64_t next_set(const uint8_t* bits, uint64_t page, uint64_t end) noexcept nogil:
    """Return the first page at or after `page` whose bit is set, or `end`."""
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
    """As `next_set`, without the pages of the bitmap `but` unless that is NULL."""
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


cdef inline void clear_range(uint8_t* bits, uint64_t page, uint64_t end) noexcept nogil:
    """Clear the bits from `page` up to `end`.

    Only bits that are set are written: a write to a word of zeros would make the operating system
    give memory for it.
    """
    page = next_set(bits, page, end)
    while page < end:
        clear_bit(bits, page)
        page = next_set(bits, page + 1, end)
