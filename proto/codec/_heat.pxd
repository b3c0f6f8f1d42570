cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from proto.codec._bitmaps cimport ZeroedMemory

cdef enum:
    SENDING = 32                # what one sending adds
    HOTTEST = 255
    COOL_SURVEYS = 4            # surveys after which all heat is halved
    WARM_BLOCK = 4096           # pages whose heats share a flag: one page of memory


@cython.final
cdef class PageHeat:
    cdef uint64_t pages
    cdef uint8_t* heats         # a byte per page
    cdef uint8_t* heated        # a byte per WARM_BLOCK: whether any page of it has heat
    cdef ZeroedMemory heats_memory
    cdef ZeroedMemory heated_memory
    cdef uint64_t warm_pages    # pages with any heat
    cdef uint64_t resent        # sendings since heat was halved
    cdef uint32_t surveys       # since then
    cdef uint64_t[256] sendings  # since the last survey, by the heat before them

    # Inline, because the encoder calls it for each page that is sent again.
    cdef inline void warm(self, uint64_t page) noexcept nogil:
        cdef uint8_t heat = self.heats[page]
        self.sendings[heat] += 1
        self.warm_pages += heat == 0
        self.heats[page] = heat + SENDING if heat <= HOTTEST - SENDING else HOTTEST
        self.heated[page // WARM_BLOCK] = 1
        self.resent += 1

    cdef void cool(self) noexcept nogil
