# cython: language_level=3
"""Memory that knows whether it is still in use.

A transport keeps slices of a batch until they are sent, and does not say when. But each slice is an
exported buffer of the slab, so Python's buffer protocol counts them for us. Without that a batch of
1 MiB would be new memory each time, which the kernel must clear and map page by page.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport uint8_t

from proto.codec._mmap cimport munmap, xb_map, xb_map_failed


@cython.final
cdef class Slab:
    """Page-aligned memory for one batch, in use as long as there is any view of it.

    `exports` counts the views, and those that transports have made of them. At 0 the slab can hold
    the next batch.
    """

    def __cinit__(self, Py_ssize_t size):
        self.size = size
        self.at = <uint8_t*>xb_map(size)
        if xb_map_failed(self.at):
            self.at = NULL
            raise MemoryError("no memory for a batch")

    def __dealloc__(self):
        if self.at != NULL:
            munmap(self.at, self.size)

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.at, self.size, False, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self.exports -= 1
