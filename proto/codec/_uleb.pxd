"""ULEB128: seven bits of a number per byte, the lowest first; bit 7 says that another byte follows.

Inline, because a batch has one or two of these numbers per page and a delta two per run.
"""

from libc.stdint cimport uint8_t, uint64_t

from proto.codec._faults cimport BAD_LENGTH, SHORT


cdef inline Py_ssize_t put_uleb(uint8_t* at, uint64_t value) noexcept nogil:
    """Write `value` in as few bytes as possible, 10 at most. Return how many."""
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
    """Read a number of at most `most` bytes. Return how many it has, or a Fault.

    most -- 9 or less: with 9 bytes of 7 bits no shift leaves the 64 bits of `value`

    An over-long number (`80 00` is 0) is accepted, as QEMU accepts it.
    """
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
