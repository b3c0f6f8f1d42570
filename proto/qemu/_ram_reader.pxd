from libc.stdint cimport uint8_t, uint64_t

cdef class Blocks:
    cdef Py_ssize_t count
    cdef uint64_t* firsts       # number of each block's first page, and of all pages at the end
    cdef list names
    cdef const uint8_t** texts  # the names, for use without the GIL
    cdef Py_ssize_t* lengths

    cdef Py_ssize_t find(self, const uint8_t* name, Py_ssize_t length) noexcept nogil
