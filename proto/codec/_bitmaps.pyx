# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""Tables and bitmaps that grow with the guest but take memory only for what was written.

A guest can span 1 TiB and use little of it. So every table of one entry per page lies in memory
that the operating system gives page by page as it is written (ZeroedMemory), and 0 in it always
means a page that was never anything but zeros. A sparse guest then costs what it holds, not what it
spans, provided that no walk over a table writes to what it finds clear.

The readable twin is proto/codec/_bitmaps_twin.py.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport uint8_t, uint64_t

from proto.codec._bits cimport all_clear, get_bit, next_set, set_range, xb_popcount
from proto.codec._mmap cimport (
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    madvise,
    munmap,
    xb_map,
    xb_map_failed,
)

cdef enum:
    # From this size on memory is asked for in huge pages: 4 MiB is the bitmap of a guest of
    # 128 GiB. A walk over 32 MiB that were never written takes 1 ms with them, and 7 ms with pages
    # of 4 KiB.
    HUGE_BYTES = 4 << 20


@cython.final
cdef class ZeroedMemory:
    """Memory of zeros.

    scattered -- single bytes will be written here and there: no huge pages then, since each write
                 would take 2 MiB
    """

    def __cinit__(self, size_t size, bint scattered=False):
        self.size = size if size else 1
        self.at = <uint8_t*>xb_map(self.size)
        if xb_map_failed(self.at):
            self.at = NULL
            raise MemoryError(f"no memory to track the guest's pages ({size} bytes)")
        if scattered:
            madvise(self.at, self.size, MADV_NOHUGEPAGE)
        elif self.size >= HUGE_BYTES:
            madvise(self.at, self.size, MADV_HUGEPAGE)

    def __dealloc__(self):
        if self.at != NULL:
            munmap(self.at, self.size)

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.at, self.size, False, flags)

    cdef void clear(self) noexcept nogil:
        """Make everything zeros again, and give the memory back."""
        madvise(self.at, self.size, MADV_DONTNEED)


cdef ZeroedMemory new_bitmap(uint64_t pages):
    return ZeroedMemory((pages + 63) // 64 * 8)


def zeros(size_t size):
    """Return writable memory of `size` zeros, which takes room only where it is written."""
    return memoryview(ZeroedMemory(size))


cdef Py_ssize_t words_of(const uint8_t[::1] bits, const uint8_t[::1] others) except -1:
    if bits.shape[0] % 8 or bits.shape[0] != others.shape[0]:
        raise ValueError(f"bitmaps of {bits.shape[0]} and {others.shape[0]} bytes")
    return bits.shape[0] // 8


def count_bits(const uint8_t[::1] bits not None, const uint8_t[::1] others not None=b""):
    """Return how many bits are set in a bitmap, or in either of two."""
    cdef bint both = others.shape[0] > 0
    cdef Py_ssize_t i = 0, words = words_of(bits, others if both else bits)
    cdef uint64_t count = 0
    if words == 0:
        return 0
    cdef const uint64_t* at = <const uint64_t*>&bits[0]
    cdef const uint64_t* beside = <const uint64_t*>&others[0] if both else at
    with nogil:
        while i < words:
            if i + 8 <= words and all_clear(at + i) and all_clear(beside + i):
                i += 8
                continue
            count += xb_popcount(at[i] | beside[i])
            i += 1
    return count


def unite_bits(uint8_t[::1] bits not None, const uint8_t[::1] others not None):
    """Set the bits of another bitmap too."""
    cdef Py_ssize_t i = 0, words = words_of(bits, others)
    if words == 0:
        return
    cdef uint64_t* at = <uint64_t*>&bits[0]
    cdef const uint64_t* beside = <const uint64_t*>&others[0]
    with nogil:
        while i < words:
            if i + 8 <= words and all_clear(beside + i):
                i += 8
                continue
            at[i] |= beside[i]
            i += 1


def keep_bits(uint8_t[::1] bits not None, const uint8_t[::1] others not None):
    """Clear the bits that are not set in another bitmap."""
    cdef Py_ssize_t i = 0, words = words_of(bits, others)
    if words == 0:
        return
    cdef uint64_t* at = <uint64_t*>&bits[0]
    cdef const uint64_t* beside = <const uint64_t*>&others[0]
    with nogil:
        while i < words:
            if i + 8 <= words and all_clear(at + i):
                i += 8
                continue
            at[i] &= beside[i]
            i += 1


@cython.final
cdef class PrefixSet:
    """A set of pages that mostly fills up from page 0: a prefix, and single pages beyond it.

    The first round sends every page in ascending order. With the prefix as one number, a set that
    is filled in that order takes no memory, and adding a range takes no time. Bits below the
    prefix mean nothing.
    """

    def __cinit__(self, uint64_t pages):
        self.pages = pages
        self.memory = new_bitmap(pages)
        self.bits = self.memory.at

    cdef void close_up(self) noexcept nogil:
        """Move the prefix over the pages behind it that are in the set."""
        while self.beyond and self.prefix < self.pages and get_bit(self.bits, self.prefix):
            self.prefix += 1
            self.beyond -= 1

    cdef void add_range(self, uint64_t first, uint64_t end) noexcept nogil:
        """Add the pages from `first` up to `end`."""
        cdef uint64_t page
        if end <= self.prefix:
            return
        if first > self.prefix:
            self.beyond += set_range(self.bits, first, end)
            return
        if self.beyond:
            page = next_set(self.bits, self.prefix, end)
            while page < end:
                self.beyond -= 1
                page = next_set(self.bits, page + 1, end)
        self.prefix = end
        if self.beyond:
            self.close_up()

    cdef void clear(self) noexcept nogil:
        self.prefix = self.beyond = 0
        self.memory.clear()
