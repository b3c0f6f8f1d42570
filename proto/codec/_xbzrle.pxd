from libc.stdint cimport uint8_t, uint64_t

cdef enum:
    MIN_PAGE_SIZE = 1024
    MAX_PAGE_SIZE = 16384

cdef int check_page_size(Py_ssize_t page_size) except -1
cdef Py_ssize_t encode_page(
    const uint8_t* old, const uint8_t* new, Py_ssize_t size, uint8_t* out, Py_ssize_t room,
    bint merge, uint8_t* keep,
) noexcept nogil
cdef Py_ssize_t decode_page(
    const uint8_t* delta, Py_ssize_t length, uint8_t* page, Py_ssize_t size
) noexcept nogil
cdef Py_ssize_t check_delta(
    const uint8_t* delta, Py_ssize_t length, Py_ssize_t size, uint64_t* changed
) noexcept nogil
cdef bint is_zero(const uint8_t* page, Py_ssize_t size) noexcept nogil
cdef const uint8_t* zero_page() noexcept nogil
