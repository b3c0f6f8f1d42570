from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    NO_SLOT = 0xFFFFFFFF

cdef class PageCache:
    cdef readonly Py_ssize_t page_size
    cdef readonly Py_ssize_t capacity
    cdef readonly uint64_t evictions
    cdef uint64_t* tags         # slot -> page
    cdef uint32_t* ages         # slot -> round of its last use
    cdef uint8_t* reused        # slot -> was used again since it came in
    cdef uint32_t* spare        # stack of free slots
    cdef uint32_t* index        # hash -> slot + 1
    cdef uint8_t* data
    cdef size_t index_mask
    cdef Py_ssize_t spares
    cdef Py_ssize_t hand        # of the clock: the next slot that may be evicted
    cdef Py_ssize_t next        # the slot behind the last one found

    cdef Py_ssize_t entries_for(self, size) except -1
    cdef int allocate(self, size_t n) except -1
    cdef size_t home(self, uint64_t page) noexcept nogil
    cdef uint32_t find(self, uint64_t page) noexcept nogil
    cdef uint32_t find_near(self, uint64_t page, Py_ssize_t* next) noexcept nogil
    cdef uint8_t* at(self, uint32_t slot) noexcept nogil
    cdef void link(self, uint64_t page, uint32_t slot) noexcept nogil
    cdef void unlink(self, uint32_t slot) noexcept nogil
    cdef void remove(self, uint32_t slot) noexcept nogil
    cdef uint32_t victim(
        self, uint32_t now, const uint8_t* dirty, uint64_t dirty_pages
    ) noexcept nogil
    cdef uint32_t insert(
        self, uint64_t page, const uint8_t* content, uint32_t now,
        const uint8_t* dirty, uint64_t dirty_pages,
    ) noexcept nogil
    cdef void undo_allocate(
        self, uint64_t* tags, uint32_t* ages, uint8_t* reused, uint32_t* spare, uint32_t* index,
        size_t mask,
    ) noexcept
    cdef void refill(
        self, Py_ssize_t capacity, Py_ssize_t old, uint64_t* tags, uint32_t* ages,
        uint8_t* reused, uint64_t* order,
    ) noexcept nogil
