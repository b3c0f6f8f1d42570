from libc.stdint cimport uint8_t, uint64_t

from proto.codec._bitmaps cimport ZeroedMemory

cdef extern from *:
    """
    #ifndef XB_SUM
    #define XB_SUM
    typedef struct { unsigned __int128 value; } xb_sum;
    #define xb_join(sum, more) ((sum)->value += (more)->value)
    #endif
    """
    ctypedef struct xb_sum:
        pass
    void xb_join(xb_sum*, xb_sum*) nogil

cdef class PageHashes:
    cdef readonly uint64_t pages
    cdef readonly Py_ssize_t page_size
    cdef readonly object stale
    cdef bytes key
    cdef const uint64_t* key_at
    cdef uint64_t* entries      # a hash per page, XOR that of zeros
    cdef uint8_t* touched       # a byte per block of entries: whether one of them was ever set
    cdef uint8_t* stale_at
    cdef uint64_t zero          # the hash of a page of zeros
    cdef xb_sum total           # the sum digest
    cdef ZeroedMemory entries_memory
    cdef ZeroedMemory touched_memory
    cdef ZeroedMemory stale_memory

    cdef uint64_t hash_of(self, const uint8_t* page) noexcept nogil
    cdef void begin_sum(self) noexcept nogil
    cdef void set_entry(self, uint64_t page, uint64_t value, xb_sum* total) noexcept nogil
    cdef void note(self, uint64_t page, uint64_t value) noexcept nogil
    cdef void note_shared(self, uint64_t page, uint64_t value, xb_sum* total) noexcept nogil
    cdef void note_zeros(self, uint64_t first, uint64_t end) noexcept nogil
    cdef bint matches(self, uint64_t page, const uint8_t* content) noexcept nogil
