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

cdef extern from *:
    """
    #ifndef XB_SUM
    #define XB_SUM
    typedef struct { unsigned __int128 value; } xb_sum;
    #endif
    """
    ctypedef struct xb_sum:
        pass

cdef class Zeros:
    cdef uint8_t* at
    cdef size_t size

    cdef void clear(self) noexcept nogil

cdef class Rising:
    cdef uint64_t pages
    cdef uint64_t below         # all pages below it are in the set
    cdef uint64_t strays        # pages from there on that are
    cdef uint8_t* bits
    cdef Zeros keep

    cdef bint has(self, uint64_t page) noexcept nogil
    cdef void add(self, uint64_t page) noexcept nogil
    cdef void close_up(self) noexcept nogil
    cdef void add_range(self, uint64_t first, uint64_t end) noexcept nogil
    cdef void clear(self) noexcept nogil

cdef class PageHashes:
    cdef readonly uint64_t pages
    cdef readonly Py_ssize_t page_size
    cdef readonly object stale
    cdef bytes key
    cdef const uint64_t* key_at
    cdef uint64_t* entries      # each hash XOR that of zeros
    cdef uint8_t* touched       # a byte per block of entries: whether any was ever set
    cdef uint8_t* stale_at
    cdef uint64_t zero
    cdef xb_sum total
    cdef Zeros entries_keep
    cdef Zeros touched_keep
    cdef Zeros stale_keep

    cdef uint64_t hash_of(self, const uint8_t* page) noexcept nogil
    cdef void begin_sum(self) noexcept nogil
    cdef void set_entry(self, uint64_t page, uint64_t value, xb_sum* total) noexcept nogil
    cdef void note(self, uint64_t page, uint64_t value) noexcept nogil
    cdef void note_shared(self, uint64_t page, uint64_t value, xb_sum* total) noexcept nogil
    cdef void note_zeros(self, uint64_t first, uint64_t end) noexcept nogil
    cdef bint matches(self, uint64_t page, const uint8_t* content) noexcept nogil
