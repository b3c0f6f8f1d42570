cimport cython
from libc.stdint cimport uint8_t


@cython.final
cdef class Slab:
    cdef uint8_t* at
    cdef Py_ssize_t size
    cdef Py_ssize_t exports
