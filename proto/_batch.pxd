from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef uint64_t STEP

cdef struct Record:
    uint8_t op
    uint64_t first
    uint64_t count
    const uint8_t* delta
    Py_ssize_t length

cdef Py_ssize_t read_record(
    const uint8_t* at, Py_ssize_t left, Py_ssize_t page_size, uint64_t pages, uint64_t next_page,
    Record* record,
) noexcept nogil

cdef class PageHashes:
    cdef readonly uint64_t pages
    cdef readonly Py_ssize_t page_size
    cdef readonly bytearray table
    cdef readonly bytearray stale
    cdef bytes key
    cdef const uint64_t* key_at
    cdef uint64_t* table_at
    cdef uint8_t* stale_at
    cdef uint64_t zero

    cdef uint64_t hash_of(self, const uint8_t* page) noexcept nogil
    cdef void note(self, uint64_t page, uint64_t value) noexcept nogil
    cdef bint matches(self, uint64_t page, const uint8_t* content) noexcept nogil
