from libc.stdint cimport uint8_t, uint64_t

cdef enum:
    MAX_PAGE = 16384
    MIN_PAGE = 1024

cdef enum Fault:
    SHORT = -1
    BAD_LENGTH = -2
    ZERO_RUN = -3
    PAST_PAGE = -4
    EMPTY_RUN = -5
    PAST_DELTA = -6
    BAD_OP = -7
    PAST_GUEST = -8
    NO_BASE = -9
    EMPTY_DELTA = -10
    BAD_DATA = -11
    BAD_CHECK = -12

cdef Py_ssize_t put_uleb(uint8_t* at, uint64_t value) noexcept nogil
cdef Py_ssize_t get_uleb(
    const uint8_t* at, Py_ssize_t left, Py_ssize_t most, uint64_t* value
) noexcept nogil
cdef Py_ssize_t encode_page(
    const uint8_t* old, const uint8_t* new, Py_ssize_t size, uint8_t* out, Py_ssize_t room,
    bint merge, uint8_t* keep,
) noexcept nogil
cdef Py_ssize_t decode_page(
    const uint8_t* delta, Py_ssize_t length, uint8_t* page, Py_ssize_t size
) noexcept nogil
cdef bint is_zero(const uint8_t* page, Py_ssize_t size) noexcept nogil
cdef const uint8_t* zero_page() noexcept nogil
