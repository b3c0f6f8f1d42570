# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""Batches of pages: walking them on either side, without the GIL.

Every class here has a readable twin of the same name in proto/_twin.py, which says what is meant;
this file says how to be fast. The two give the same bytes on every input.

Memory rules. What the peer ends up with, what the cache holds and what is hashed are the same
bytes, though the guest writes on. A page that is sent raw is copied first, to its place in the
batch, and all else is done with that copy. A delta is made from guest memory itself: the bytes of
its runs are read once, into the delta, and from there they go to the cache; what was missed is
dirty again. The decoder reads hostile bytes: every length is compared with what is left before it
is used.

Tables and bitmaps that grow with the guest lie in memory that the kernel gives page by page as it
is written (Zeros), and a page that was never anything but zeros has a 0 there. So a sparse guest
costs what it holds, not what it spans; no walk over hashes or heats visits what was never touched.
"""

import hashlib
import os

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset

from proto._bits cimport (
    all_clear,
    clear_bit,
    clear_bit_shared,
    get_bit,
    next_set,
    set_bit,
    set_bit_shared,
    set_range,
)
from proto._cache cimport NO_SLOT, PageCache
from proto._codec cimport (
    BAD_CHECK,
    BAD_DATA,
    BAD_OP,
    EMPTY_DELTA,
    MAX_PAGE,
    MIN_PAGE,
    NO_BASE,
    PAST_GUEST,
    SHORT,
    decode_page,
    encode_page,
    get_uleb,
    is_zero,
    put_uleb,
    zero_page,
)

from proto._codec import FAULTS
from proto.errors import DecodeError

cdef extern from "endian.h" nogil:
    uint64_t htobe64(uint64_t)
    uint32_t htobe32(uint32_t)
    uint64_t be64toh(uint64_t)
    uint64_t htole64(uint64_t)
    uint64_t le64toh(uint64_t)

cdef extern from "unistd.h" nogil:
    ssize_t pread(int, void*, size_t, long)
    ssize_t pwrite(int, const void*, size_t, long)

cdef extern from "sys/mman.h" nogil:
    enum:
        PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
        MADV_DONTNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE
    int madvise(void*, size_t, int)
    void* mmap(void*, size_t, int, int, int, long)
    int munmap(void*, size_t)

cdef extern from *:
    """
    #include <sys/mman.h>
    #define xb_map_failed(p) ((p) == MAP_FAILED)
    #define xb_popcount(x) __builtin_popcountll(x)

    static inline uint64_t xb_word(const uint8_t *at)
    {
        uint64_t value;
        memcpy(&value, at, 8);
        return le64toh(value);
    }

    /* NH over 64-bit words with a sum of 128 bits, then a multiply-shift hash of that sum to 64:
       two pages that differ collide with a probability below 2^-62 over the choice of the key. */
    static uint64_t xb_hash(const uint8_t *page, const uint64_t *key, size_t words)
    {
        unsigned __int128 a = 0, b = 0, fold, r0, r1;
        for (size_t i = 0; i < words; i += 4) {
            a += (unsigned __int128)(xb_word(page + 8 * i) + key[i])
                 * (xb_word(page + 8 * i + 8) + key[i + 1]);
            b += (unsigned __int128)(xb_word(page + 8 * i + 16) + key[i + 2])
                 * (xb_word(page + 8 * i + 24) + key[i + 3]);
        }
        a += b;
        r0 = (unsigned __int128)key[words + 1] << 64 | key[words];
        r1 = (unsigned __int128)key[words + 3] << 64 | key[words + 2];
        fold = r0 * (uint64_t)a + r1 * (uint64_t)(a >> 64);
        return (uint64_t)(fold >> 64);
    }

    static inline uint64_t xb_avalanche(uint64_t value)
    {
        value ^= value >> 37;
        value *= 0x165667919E3779F9u;
        return value ^ value >> 32;
    }

    /* XXH3-128 of two words, 16 bytes little-endian, seed 0: for one that is called page by page
       without the GIL there is no library. The two constants are words of XXH3's own secret. */
    static inline unsigned __int128 xb_pair(uint64_t page, uint64_t hash)
    {
        const uint64_t prime = 0xC2B2AE3D27D4EB4Fu;
        uint64_t word = hash ^ 0xC202797692D63D58u;
        unsigned __int128 m = (unsigned __int128)(page ^ hash ^ 0x59973F0033362349u)
                              * 0x9E3779B185EBCA87u;
        uint64_t low = (uint64_t)m + ((uint64_t)15 << 54), high = (uint64_t)(m >> 64);
        high += word + (uint64_t)(uint32_t)word * 0x85EBCA76u;
        low ^= __builtin_bswap64(high);
        m = (unsigned __int128)low * prime;
        high = (uint64_t)(m >> 64) + high * prime;
        return (unsigned __int128)xb_avalanche(high) << 64 | xb_avalanche((uint64_t)m);
    }

    #define xb_plus(sum, page, hash) ((sum)->value += xb_pair(page, hash))
    #define xb_minus(sum, page, hash) ((sum)->value -= xb_pair(page, hash))
    #define xb_join(sum, more) ((sum)->value += (more)->value)
    #define xb_half(sum, high) ((uint64_t)((sum)->value >> ((high) ? 64 : 0)))
    """
    void xb_plus(xb_sum*, uint64_t, uint64_t) nogil
    void xb_minus(xb_sum*, uint64_t, uint64_t) nogil
    void xb_join(xb_sum*, xb_sum*) nogil
    uint64_t xb_half(xb_sum*, bint) nogil
    bint xb_map_failed(void*) nogil
    int xb_popcount(uint64_t) nogil
    uint64_t xb_word(const uint8_t*) nogil
    uint64_t xb_hash(const uint8_t*, const uint64_t*, size_t) nogil

cdef packed struct StreamRecord:    # of a RamReader: see proto/_ram.pyx
    uint64_t page
    uint64_t at
    uint32_t length
    uint32_t kind

cdef enum:
    RAM_ZERO = 0
    RAM_PAGE = 1
    HEAD = 20                   # round (4 bytes), first page (8), check of the raw pages (8)
    OP_ZERO = 0x00
    OP_RAW = 0x40
    OP_DELTA = 0x80
    OP_MASK = 0xC0
    GAP_MASK = 0x3F
    RUN_LIMIT = 0xFFFF          # a raw run counts its pages in 16 bits
    RECORD_ROOM = 32            # more than any record takes beside its page data
    SNAPSHOT_BYTES = 256 << 10  # pages taken at a time: they stay in the core's own cache
    ENCODE_ROOM = 2 * MAX_PAGE + 64
    SENDING = 32                # what one sending adds to the heat of a page
    HOTTEST = 255
    COOL_SURVEYS = 4            # after so many surveys, heat is halved
    WAIT_MASK = 0x1F            # sendings that a page is still left out for; above it, how many
    OVERFLOW = 0x20             # of its deltas overflowed in a row, up to
    MOST_OVERFLOWS = 6          # (then it is left out for 16 sendings)
    BLOCK = 512                 # hashes of one page of memory, which are touched or not
    WARM_BLOCK = 4096           # heats of one page of memory
    HUGE_BYTES = 4 << 20        # a bitmap from this size on has huge pages

# The check of a batch's raw pages: check = check * STEP + hash, page after page.
STEP = 0x9E3779B97F4A7C15u


# ---------------------------------------------------------------- guests and their bitmaps

@cython.final
cdef class Zeros:
    """Zeros, which take memory where they are written.

    scattered -- single bytes will be written here and there: no huge pages are given for them. A
                 large bitmap has those: a walk over 32 MiB that were never written takes 1 ms
                 then, and 7 ms in pages of 4 KiB
    """

    def __cinit__(self, size_t size, bint scattered=False):
        self.size = size if size else 1
        self.at = <uint8_t*>mmap(
            NULL, self.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
            -1, 0,
        )
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
        """All zeros again; the memory goes back."""
        madvise(self.at, self.size, MADV_DONTNEED)


cdef Zeros bitmap(uint64_t pages):
    return Zeros((pages + 63) // 64 * 8)


def zeros(size_t size):
    """Writable memory of so many zeros, which takes room where it is written."""
    return memoryview(Zeros(size))


cdef Py_ssize_t words_of(const uint8_t[::1] bits, const uint8_t[::1] others) except -1:
    if bits.shape[0] % 8 or bits.shape[0] != others.shape[0]:
        raise ValueError(f"bitmaps of {bits.shape[0]} and {others.shape[0]} bytes")
    return bits.shape[0] // 8


def count_bits(const uint8_t[::1] bits not None, const uint8_t[::1] others not None=b""):
    """How many bits are set in a bitmap, or in either of two."""
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
    """Sets the bits of another bitmap too."""
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
    """Clears the bits that are not set in another bitmap."""
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


cdef void clear_range(uint8_t* bits, uint64_t page, uint64_t end) noexcept nogil:
    """Clears some bits of a bitmap; what is clear already is not written."""
    while True:
        page = next_set(bits, page, end)
        if page >= end:
            break
        clear_bit(bits, page)
        page += 1


@cython.final
cdef class Rising:
    """A set of pages that are mostly added from page 0 upwards: those below `below`, and some bits
    beyond it. So a set that is filled in order takes no memory, and a range no time."""

    def __cinit__(self, uint64_t pages):
        self.pages = pages
        self.keep = bitmap(pages)
        self.bits = self.keep.at

    cdef inline bint has(self, uint64_t page) noexcept nogil:
        return page < self.below or get_bit(self.bits, page)

    cdef inline void add(self, uint64_t page) noexcept nogil:
        if page == self.below:
            self.below += 1
            if self.strays:
                self.close_up()
        elif page > self.below and not get_bit(self.bits, page):
            set_bit(self.bits, page)
            self.strays += 1

    cdef void close_up(self) noexcept nogil:
        while self.strays and self.below < self.pages and get_bit(self.bits, self.below):
            self.below += 1
            self.strays -= 1

    cdef void add_range(self, uint64_t first, uint64_t end) noexcept nogil:
        cdef uint64_t page
        if end <= self.below:
            return
        if first > self.below:
            self.strays += set_range(self.bits, first, end)
            return
        if self.strays:
            page = next_set(self.bits, self.below, end)
            while page < end:
                self.strays -= 1
                page = next_set(self.bits, page + 1, end)
        self.below = end
        if self.strays:
            self.close_up()

    cdef void clear(self) noexcept nogil:
        self.below = self.strays = 0
        self.keep.clear()


cdef int check_guest(uint64_t pages, Py_ssize_t page_size) except -1:
    if not MIN_PAGE <= page_size <= MAX_PAGE or page_size & (page_size - 1):
        raise ValueError(f"a page of {page_size} bytes: a power of two from 1024 to 16384")
    if pages == 0:
        raise ValueError("no pages")
    return 0


# ---------------------------------------------------------------- hashes

cdef class PageHashes:
    """A keyed 64-bit hash of every page, as the destination holds it; at first those of zeros.

    stale -- a bit per page: it was changed by a delta, and its hash is of an older content
    """

    def __cinit__(self, uint64_t pages, Py_ssize_t page_size, bytes seed):
        check_guest(pages, page_size)
        self.pages = pages
        self.page_size = page_size
        # In the order of this machine, so that the hash is the same number everywhere.
        raw = hashlib.shake_256(seed).digest(page_size + 32)
        self.key = raw
        cdef uint64_t* words = <uint64_t*><char*>self.key
        cdef Py_ssize_t i
        for i in range((page_size + 32) // 8):
            words[i] = le64toh(words[i])
        self.key_at = words
        self.zero = xb_hash(zero_page(), words, page_size >> 3)
        self.entries_keep = Zeros(8 * pages, True)
        self.touched_keep = Zeros((pages + BLOCK - 1) // BLOCK)
        self.stale_keep = bitmap(pages)
        self.stale = memoryview(self.stale_keep)
        self.entries = <uint64_t*>self.entries_keep.at
        self.touched = self.touched_keep.at
        self.stale_at = self.stale_keep.at
        self.begin_sum()

    cdef void begin_sum(self) noexcept nogil:
        memset(&self.total, 0, sizeof(self.total))
        xb_plus(&self.total, self.pages, self.zero)

    cdef uint64_t hash_of(self, const uint8_t* page) noexcept nogil:
        return xb_hash(page, self.key_at, self.page_size >> 3)

    cdef void set_entry(self, uint64_t page, uint64_t value, xb_sum* total) noexcept nogil:
        """The hash of a page; an entry is that XOR the hash of zeros."""
        cdef uint64_t old = self.entries[page], new = value ^ self.zero
        if old == new:
            return
        if old:
            xb_minus(total, page, old ^ self.zero)
        if new:
            xb_plus(total, page, value)
        self.entries[page] = new
        self.touched[page // BLOCK] = 1

    cdef void note(self, uint64_t page, uint64_t value) noexcept nogil:
        self.set_entry(page, value, &self.total)
        if get_bit(self.stale_at, page):
            clear_bit(self.stale_at, page)

    cdef void note_shared(self, uint64_t page, uint64_t value, xb_sum* total) noexcept nogil:
        """As `note`, while other threads note other pages; `total` is to be joined later."""
        self.set_entry(page, value, total)
        clear_bit_shared(self.stale_at, page)

    cdef void note_zeros(self, uint64_t first, uint64_t end) noexcept nogil:
        """Pages of zeros, from `first` up to `end`."""
        cdef uint64_t page = first, stop
        while page < end:
            stop = (page // BLOCK + 1) * BLOCK
            if stop > end:
                stop = end
            if self.touched[page // BLOCK]:
                while page < stop:
                    self.set_entry(page, self.zero, &self.total)
                    page += 1
            page = stop
        clear_range(self.stale_at, first, end)

    cdef bint matches(self, uint64_t page, const uint8_t* content) noexcept nogil:
        return (self.entries[page] ^ self.zero) == self.hash_of(content)

    def clear(self):
        """All pages are zeros again."""
        with nogil:
            self.entries_keep.clear()
            self.touched_keep.clear()
            self.stale_keep.clear()
            self.begin_sum()

    @property
    def sum(self):
        """The digest that leaves out zeros, 16 bytes: see proto/README.md."""
        return (
            int(xb_half(&self.total, True)).to_bytes(8, "big")
            + int(xb_half(&self.total, False)).to_bytes(8, "big")
        )

    @property
    def table(self):
        """The hashes of all pages, 8 bytes each, little-endian."""
        return self.part(0, self.pages)

    def part(self, uint64_t first, uint64_t count):
        """The hashes of `count` pages, 8 bytes each, little-endian."""
        cdef uint64_t i, zero = htole64(self.zero), stop
        if first > self.pages or count > self.pages - first:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        result = bytearray(8 * count)
        cdef uint64_t* at = <uint64_t*>PyByteArray_AS_STRING(result)
        with nogil:
            i = 0
            while i < count:
                stop = ((first + i) // BLOCK + 1) * BLOCK - first
                if stop > count:
                    stop = count
                if self.touched[(first + i) // BLOCK]:
                    while i < stop:
                        at[i] = htole64(self.entries[first + i] ^ self.zero)
                        i += 1
                else:
                    while i < stop:
                        at[i] = zero
                        i += 1
        return result

    def filled_part(self, uint64_t first, uint64_t most):
        """(the first page from `first` on whose hash is not that of zeros, the hashes from there
        on to the last such one of `most` pages); at the end (pages, b"")."""
        cdef uint64_t page = first, end
        with nogil:
            while page < self.pages:
                if not self.touched[page // BLOCK]:
                    page = (page // BLOCK + 1) * BLOCK
                elif self.entries[page] == 0:
                    page += 1
                else:
                    break
        if page >= self.pages or most == 0:
            return self.pages, b""
        end = self.pages if most > self.pages - page else page + most
        with nogil:
            while self.entries[end - 1] == 0:
                end -= 1
        return page, bytes(self.part(page, end - page))

    def note_pages(
        self, const uint64_t[::1] numbers not None, Py_ssize_t count,
        const uint8_t[::1] content not None,
    ):
        """Hashes `count` pages whose numbers and content are given; they are stale no more."""
        cdef Py_ssize_t i
        if not 0 <= count <= numbers.shape[0] or content.shape[0] < count * self.page_size:
            raise ValueError("there are fewer pages than that")
        for i in range(count):
            if numbers[i] >= self.pages:
                raise ValueError(f"page {numbers[i]} is outside the guest")
        with nogil:
            for i in range(count):
                self.note(numbers[i], self.hash_of(&content[i * self.page_size]))


# ---------------------------------------------------------------- encoder

cdef class Slab:
    """Page-aligned memory for one batch; free again when the last view of it is gone.

    A transport keeps what it was given until it is sent, however often it slices it: exports count
    all of that, and need no word from the transport.
    """

    cdef uint8_t* at
    cdef Py_ssize_t size
    cdef Py_ssize_t exports

    def __cinit__(self, Py_ssize_t size):
        self.size = size
        self.at = <uint8_t*>mmap(
            NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0
        )
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


cdef class PageEncoder:
    """What the source knows about the peer's copy, and the batches that bring it up to date.

    See proto/README.md ("PAGES") for the layout. A page is sent zero, unchanged (not at all), as
    a delta or raw. `sent` pages are known to the peer; those that are not `filled` are known to be
    zero there (which is a delta base that needs no cache), and the cache holds some of the others.

    hashes   -- keeps the hash of every page that is sent
    merge    -- deltas are those of xbzrle.encode(merge=True)
    headroom -- bytes left free for a frame header at the start of a batch
    room     -- bytes that a batch may have

    A page whose deltas overflow is left out of the cache for 1, 2, 4 ... 16 of its sendings, from
    the second overflow in a row on: `spared` counts those sendings. See _twin.py for `survey`.
    """

    cdef readonly uint64_t pages
    cdef readonly Py_ssize_t page_size
    cdef PageCache cache
    cdef PageHashes hashes
    cdef bint merge
    cdef Rising sent
    cdef uint8_t* filled
    cdef uint8_t* heats         # how often and lately a page was sent again, a byte a page
    cdef uint8_t* heated        # a byte per WARM_BLOCK: whether any page of it has heat
    cdef uint8_t* overflowed    # OVERFLOW times those in a row, and the sendings to wait
    cdef Zeros filled_keep
    cdef Zeros heats_keep
    cdef Zeros heated_keep
    cdef Zeros overflowed_keep
    cdef uint64_t warm_pages    # pages with any heat
    cdef uint64_t resent        # sendings since heat was halved
    cdef uint32_t surveys       # since then
    cdef uint64_t[256] sendings  # since the last survey, by the heat before them
    cdef bint on                # deltas are made
    cdef uint64_t* numbers      # of the pages in the snapshot
    cdef Py_ssize_t most        # pages of a snapshot
    cdef Py_ssize_t offered     # pages of the last `space`
    cdef object number_view
    cdef list slabs
    cdef Slab slab              # of the open batch
    cdef uint8_t* out           # its records
    cdef uint8_t* data          # its raw pages
    cdef Py_ssize_t headroom
    cdef Py_ssize_t room
    cdef Py_ssize_t data_at     # offset of `data` in the slab
    cdef Py_ssize_t used        # bytes of records
    cdef Py_ssize_t raw_pages
    cdef uint64_t check
    cdef uint64_t next_page     # one past the last page of the batch
    cdef uint64_t zero_first    # a zero run that is not written yet
    cdef uint64_t zero_count
    cdef Py_ssize_t raw_at      # where the open raw run has its count, 0 for none
    cdef uint32_t raw_count
    cdef uint32_t now
    cdef uint64_t past          # one past the last page of `feed_records` in this round
    cdef readonly uint64_t zero
    cdef readonly uint64_t unchanged
    cdef readonly uint64_t raw
    cdef readonly uint64_t delta
    cdef readonly uint64_t delta_bytes
    cdef readonly uint64_t hits
    cdef readonly uint64_t misses
    cdef readonly uint64_t overflows
    cdef readonly uint64_t spared

    def __cinit__(
        self, PageHashes hashes not None, PageCache cache=None, *, bint merge=False,
        Py_ssize_t headroom=0, Py_ssize_t room=1 << 20,
    ):
        self.pages = hashes.pages
        self.page_size = hashes.page_size
        if cache is not None and cache.page_size != self.page_size:
            raise ValueError("the cache has pages of another size")
        if cache is not None and len(cache):
            raise ValueError("the cache holds pages of another migration")
        if headroom < 0 or room < self.page_size + 3 * RECORD_ROOM:
            raise ValueError("no room for a page")
        self.hashes = hashes
        self.cache = cache
        self.merge = merge
        self.headroom = headroom
        self.room = room
        self.data_at = (headroom + room + 4095) // 4096 * 4096
        self.most = SNAPSHOT_BYTES // self.page_size
        self.slabs = []
        self.sent = Rising(self.pages)
        self.filled_keep = bitmap(self.pages)
        self.heats_keep = Zeros((self.pages + WARM_BLOCK - 1) // WARM_BLOCK * WARM_BLOCK, True)
        self.heated_keep = Zeros((self.pages + WARM_BLOCK - 1) // WARM_BLOCK)
        self.overflowed_keep = Zeros(self.pages, True)
        self.filled = self.filled_keep.at
        self.heats = self.heats_keep.at
        self.heated = self.heated_keep.at
        self.overflowed = self.overflowed_keep.at
        self.on = cache is not None
        numbers = bytearray(8 * self.most)
        self.numbers = <uint64_t*>PyByteArray_AS_STRING(numbers)
        self.number_view = memoryview(numbers).cast("Q")

    @property
    def active(self):
        """Whether deltas are made. Set to False it empties the cache: no base in it grows old."""
        return self.on

    @active.setter
    def active(self, bint on):
        if on and self.cache is None:
            raise ValueError("there is no cache to make deltas from")
        if self.on and not on:
            self.cache.clear()
        self.on = on

    def survey(self):
        """What was sent again, and what is hot now, after each round: (sendings since the last
        survey by the heat of their pages before, pages by their heat), each from 0 to 255.
        """
        cdef uint64_t[256] counts
        cdef uint64_t page = 0, stop, cold = 0
        sendings = [self.sendings[heat] for heat in range(256)]
        self.surveys += 1
        memset(counts, 0, sizeof(counts))
        memset(self.sendings, 0, sizeof(self.sendings))
        with nogil:
            if self.surveys >= COOL_SURVEYS and 2 * self.resent >= self.warm_pages:
                self.cool()
            while page < self.pages:
                stop = page + WARM_BLOCK if self.pages - page > WARM_BLOCK else self.pages
                if not self.heated[page // WARM_BLOCK]:
                    cold += stop - page
                    page = stop
                while page < stop:
                    counts[self.heats[page]] += 1
                    page += 1
            counts[0] += cold
        return sendings, [counts[heat] for heat in range(256)]

    cdef void cool(self) noexcept nogil:
        """Halves the heat of all pages."""
        cdef uint64_t* words = <uint64_t*>self.heats
        cdef uint64_t block, i, word, before
        self.warm_pages = 0
        self.resent = self.surveys = 0
        for block in range((self.pages + WARM_BLOCK - 1) // WARM_BLOCK):
            if not self.heated[block]:
                continue
            before = self.warm_pages
            for i in range(block * (WARM_BLOCK // 8), (block + 1) * (WARM_BLOCK // 8)):
                word = words[i]
                if word == 0:
                    continue
                word = word >> 1 & 0x7F7F7F7F7F7F7F7Fu
                words[i] = word
                # Bytes have seven bits here: a carry into the eighth says that one is not 0.
                self.warm_pages += xb_popcount(word + 0x7F7F7F7F7F7F7F7Fu & 0x8080808080808080u)
            self.heated[block] = self.warm_pages > before

    cdef inline void warm(self, uint64_t page) noexcept nogil:
        cdef uint8_t heat = self.heats[page]
        self.sendings[heat] += 1
        self.warm_pages += heat == 0
        self.heats[page] = heat + SENDING if heat <= HOTTEST - SENDING else HOTTEST
        self.heated[page // WARM_BLOCK] = 1
        self.resent += 1

    cdef inline void note_overflow(self, uint64_t page) noexcept nogil:
        cdef uint8_t times = self.overflowed[page] // OVERFLOW
        if times < MOST_OVERFLOWS:
            times += 1
        self.overflowed[page] = times * OVERFLOW + (1 << (times - 2) if times > 1 else 0)

    def begin_round(self, uint32_t number):
        """Rounds count from 1; a batch belongs to one round, so none may be open."""
        if self.pending:
            raise ValueError("a batch of the last round was not taken")
        if number == 0 or number < self.now:
            raise ValueError(f"round {number} after round {self.now}")
        self.now = number
        self.past = 0

    cdef void drop_batch(self):
        self.slab = None
        self.out = self.data = NULL
        self.used = self.raw_at = self.raw_pages = self.offered = 0
        self.zero_count = self.check = 0

    def adopt(self, uint64_t first, const uint8_t[::1] table not None):
        """Takes in what the peer says it holds: the hashes of pages from `first` on, 8 bytes each.

        All of those pages count as sent. The cache keeps what has the hash that is said. An open
        batch is dropped: it will not be sent. Raises ValueError for pages outside the guest.
        """
        cdef uint64_t count = <uint64_t>table.shape[0] // 8, i, page, value
        cdef uint32_t slot
        if table.shape[0] % 8 or first > self.pages or count > self.pages - first:
            raise ValueError(f"{table.shape[0]} bytes of hashes from page {first} on")
        self.drop_batch()
        with nogil:
            for i in range(count):
                page = first + i
                memcpy(&value, &table[8 * i], 8)
                value = le64toh(value)
                if value == self.hashes.zero:
                    self.make_zeros(page, page + 1)
                    continue
                self.hashes.note(page, value)
                self.sent.add(page)
                set_bit(self.filled, page)
                if self.cache is None:
                    continue
                slot = self.cache.find(page)
                if slot != NO_SLOT and self.hashes.hash_of(self.cache.at(slot)) != value:
                    self.cache.remove(slot)

    def adopt_zeros(self, uint64_t first, uint64_t count):
        """As `adopt`, for pages that the peer holds as zeros."""
        if first > self.pages or count > self.pages - first:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        self.drop_batch()
        with nogil:
            self.make_zeros(first, first + count)

    cdef void make_zeros(self, uint64_t first, uint64_t end) noexcept nogil:
        """The peer holds these pages, and they are zeros there."""
        cdef uint64_t page = first
        cdef uint32_t slot
        while True:
            page = next_set(self.filled, page, end)
            if page >= end:
                break
            clear_bit(self.filled, page)
            if self.cache is not None:
                slot = self.cache.find(page)
                if slot != NO_SLOT:
                    self.cache.remove(slot)
            page += 1
        self.sent.add_range(first, end)
        self.hashes.note_zeros(first, end)

    def forget(self):
        """The peer holds nothing that is known of: every page is to be sent as in round 1."""
        self.drop_batch()
        with nogil:
            self.make_zeros(0, self.pages)
            self.sent.clear()
            self.filled_keep.clear()
            self.overflowed_keep.clear()
        self.hashes.clear()

    @property
    def pending(self):
        """Whether the open batch has anything to send."""
        return self.used > 0 or self.zero_count > 0

    cdef inline Py_ssize_t spare(self) noexcept nogil:
        """Bytes of room for pages; a page takes at most `page_size + RECORD_ROOM` of them."""
        return (
            self.room - self.used - self.raw_pages * self.page_size - HEAD - RECORD_ROOM
        )

    cdef inline bint is_full(self) noexcept nogil:
        return self.spare() < self.page_size + RECORD_ROOM

    @property
    def full(self):
        """Whether one more page might not fit the open batch."""
        return self.is_full()

    cdef int open_slab(self) except -1:
        cdef Slab slab
        if self.slab is not None:
            return 0
        for slab in self.slabs:
            if slab.exports == 0:
                break
        else:
            slab = Slab(self.data_at + self.room)
            self.slabs.append(slab)
        self.slab = slab
        self.out = slab.at + self.headroom
        self.data = slab.at + self.data_at
        return 0

    def space(self):
        """Where the next pages are to be copied: (memory, their numbers), for the same number of
        pages; none where the batch is full."""
        cdef Py_ssize_t start
        self.open_slab()
        self.offered = min(max(self.spare(), 0) // (self.page_size + RECORD_ROOM), self.most)
        start = self.data_at + self.raw_pages * self.page_size
        return (
            memoryview(self.slab)[start : start + self.offered * self.page_size],
            self.number_view[: self.offered],
        )

    cdef inline void open_record(self, uint8_t op, uint64_t page) noexcept nogil:
        cdef uint32_t now = htobe32(self.now)
        cdef uint64_t first = htobe64(page), gap
        if self.used == 0:
            memcpy(self.out, &now, 4)
            memcpy(self.out + 4, &first, 8)
            self.used = HEAD
            self.next_page = page
        gap = page - self.next_page
        if gap < GAP_MASK:
            self.out[self.used] = op | <uint8_t>gap
            self.used += 1
        else:
            self.out[self.used] = op | GAP_MASK
            self.used += 1
            self.used += put_uleb(self.out + self.used, gap - GAP_MASK)
        self.raw_at = 0

    cdef inline void flush_zeros(self) noexcept nogil:
        if self.zero_count:
            self.open_record(OP_ZERO, self.zero_first)
            self.used += put_uleb(self.out + self.used, self.zero_count)
            self.next_page = self.zero_first + self.zero_count
            self.zero_count = 0

    cdef inline void put_zero(self, uint64_t page) noexcept nogil:
        if self.zero_count and page != self.zero_first + self.zero_count:
            self.flush_zeros()
        if self.zero_count == 0:
            self.zero_first = page
        self.zero_count += 1
        self.zero += 1
        self.make_zeros(page, page + 1)

    cdef inline void put_raw(self, uint64_t page, const uint8_t* content) noexcept nogil:
        cdef uint8_t* place = self.data + self.raw_pages * self.page_size
        cdef uint64_t value = self.hashes.hash_of(content)
        if not (self.raw_at and page == self.next_page and self.raw_count < RUN_LIMIT):
            self.open_record(OP_RAW, page)
            self.raw_at = self.used
            self.raw_count = 0
            self.used += 2
        self.raw_count += 1
        self.out[self.raw_at] = <uint8_t>(self.raw_count >> 8)
        self.out[self.raw_at + 1] = <uint8_t>self.raw_count
        if place != content:
            memcpy(place, content, self.page_size)
        self.raw_pages += 1
        self.check = self.check * STEP + value
        self.hashes.note(page, value)
        self.next_page = page + 1
        self.raw += 1

    cdef inline void put_delta(
        self, uint64_t page, const uint8_t* delta, Py_ssize_t length
    ) noexcept nogil:
        self.open_record(OP_DELTA, page)
        self.used += put_uleb(self.out + self.used, length)
        memcpy(self.out + self.used, delta, length)
        self.used += length
        self.next_page = page + 1
        self.delta += 1
        self.delta_bytes += length
        set_bit(self.hashes.stale_at, page)

    cdef inline void find_zero(self, uint64_t page) noexcept nogil:
        if self.is_zero_there(page):
            self.unchanged += 1
        else:
            self.put_zero(page)

    cdef inline bint is_zero_there(self, uint64_t page) noexcept nogil:
        return self.sent.has(page) and not get_bit(self.filled, page)

    cdef const uint8_t* copied(self, const uint8_t* live, Py_ssize_t size) noexcept nogil:
        """A snapshot of a page in guest memory, where it would be sent raw from."""
        cdef uint8_t* copy = self.data + self.raw_pages * self.page_size
        memcpy(copy, live, size)
        memset(copy + size, 0, self.page_size - size)
        return copy

    cdef void put_page(
        self, uint64_t page, const uint8_t* content, Py_ssize_t size, bint live,
        uint8_t* scratch, const uint8_t* todo, uint64_t todo_pages,
    ) noexcept nogil:
        """Takes in one page of `size` bytes, the rest are zeros.

        live -- `content` is guest memory, and may be written meanwhile: nothing but a delta from
                the cache, whose runs are read once, is made of it; for all else it is copied
        """
        cdef bint known = self.sent.has(page)
        cdef bint zero = known and not get_bit(self.filled, page)
        cdef uint32_t slot = NO_SLOT
        cdef const uint8_t* base = NULL
        cdef uint8_t* keep = NULL
        cdef Py_ssize_t length = -1
        cdef bint spared = False
        if is_zero(content, size):
            self.find_zero(page)
            return
        if known and not zero:
            self.warm(page)
        if self.on and known:
            spared = self.overflowed[page] & WAIT_MASK
            if spared:
                self.overflowed[page] -= 1
                self.spared += 1
            elif zero:
                base = zero_page()
            else:
                slot = self.cache.find(page)
                if slot != NO_SLOT:
                    base = keep = self.cache.at(slot)
                    self.cache.ages[slot] = self.now
                    self.cache.proven[slot] = 1
        if live and (keep == NULL or size < self.page_size):
            content, live = self.copied(content, size), False
        if base != NULL:
            self.hits += 1
            length = encode_page(
                base, content, self.page_size, scratch, self.page_size, self.merge, keep
            )
            if length < 0:
                self.overflows += 1
                self.note_overflow(page)
            elif self.overflowed[page]:
                self.overflowed[page] = 0
            if length == 0:
                # It was written all the same: its hash may be of a moment in between.
                self.unchanged += 1
                set_bit(self.hashes.stale_at, page)
                return
        elif self.on and known and not spared:
            self.misses += 1
        self.flush_zeros()
        if length > 0:
            self.put_delta(page, scratch, length)
        else:
            if live:
                content = self.copied(content, size)
            self.put_raw(page, content)
        self.sent.add(page)
        set_bit(self.filled, page)
        if self.on:
            if self.overflowed[page] & WAIT_MASK:
                if slot != NO_SLOT:     # what it holds is no longer what the peer holds
                    self.cache.remove(slot)
            elif slot == NO_SLOT:
                self.cache.insert(page, content, self.now, todo, todo_pages)
            elif length < 0:
                memcpy(keep, content, self.page_size)

    def feed(self, Py_ssize_t count, const uint8_t[::1] todo not None):
        """Takes in the first `count` pages of the last `space`, in ascending order.

        todo -- the round's dirty bitmap: the cache evicts none of its pages

        Raises ValueError for a page out of order or outside the guest; those before it are in.
        """
        cdef Py_ssize_t i = 0
        cdef uint64_t page, floor = self.next_page if self.used else 0
        cdef const uint8_t* snapshot
        cdef uint8_t[ENCODE_ROOM] scratch
        if self.now == 0:
            raise ValueError("no round was begun")
        if not 0 <= count <= self.offered:
            raise ValueError(f"{count} pages: there was space for {self.offered}")
        if <uint64_t>todo.shape[0] * 8 < self.pages:
            raise ValueError("the dirty bitmap is too short")
        if count == 0:
            return
        self.offered = 0
        snapshot = self.data + self.raw_pages * self.page_size
        if self.zero_count:
            floor = self.zero_first + self.zero_count
        with nogil:
            while i < count:
                page = self.numbers[i]
                if page < floor or page >= self.pages:
                    break
                self.put_page(
                    page, snapshot + i * self.page_size, self.page_size, False, scratch,
                    &todo[0], todo.shape[0] * 8,
                )
                floor = page + 1
                i += 1
        if i < count:
            raise ValueError(f"page {self.numbers[i]} is out of order or outside the guest")

    def feed_memory(
        self, const uint8_t[::1] memory not None, const uint8_t[::1] todo not None,
        uint64_t first, uint64_t end, uint64_t most,
    ):
        """Takes in the dirty pages from `first` to `end`, from guest memory itself.

        memory -- the guest's, which may be written meanwhile; what its last page lacks are zeros
        todo   -- the round's dirty bitmap, in whole 8-byte words
        most   -- stops after so many pages, or where the batch is full

        Returns (pages taken in, the page to go on from).
        """
        cdef uint64_t page = first, floor = self.next_page if self.used else 0, count = 0, offset
        cdef Py_ssize_t length
        cdef uint64_t size = memory.shape[0]
        cdef uint8_t[ENCODE_ROOM] scratch
        if self.zero_count:
            floor = self.zero_first + self.zero_count
        if self.now == 0 or first < floor or end > self.pages:
            raise ValueError(f"pages {first} to {end} are out of order or outside the guest")
        if <uint64_t>todo.shape[0] * 8 < self.pages or todo.shape[0] % 8:
            raise ValueError("the dirty bitmap is too short")
        if size > self.pages * self.page_size or size <= (self.pages - 1) * self.page_size:
            raise ValueError(f"{size} bytes are not {self.pages} pages of {self.page_size}")
        self.open_slab()
        self.offered = 0
        with nogil:
            while count < most and not self.is_full():
                page = next_set(&todo[0], page, end)
                if page >= end:
                    break
                offset = page * self.page_size
                length = self.page_size
                if <uint64_t>length > size - offset:
                    length = <Py_ssize_t>(size - offset)
                self.put_page(
                    page, &memory[offset], length, True, scratch, &todo[0], todo.shape[0] * 8
                )
                count += 1
                page += 1
        return count, page

    def feed_records(
        self, const uint8_t[::1] data not None, const uint8_t[::1] records not None,
        Py_ssize_t first, Py_ssize_t count,
    ):
        """Takes in pages as somebody else sends them: records `first` to `count` of a RamReader.

        A delta changes what the peer holds as it is, and what the cache holds with it; a page that
        is not cached is not known any more, and the next time is sent whole. There are deltas
        though `active` is not set.

        Returns (the first record that was not taken, whether it begins a new round): the batch is
        full, or a page comes that does not follow on the last one. Raises DecodeError for a delta
        that is none, or that has no base.
        """
        cdef const StreamRecord* at
        cdef const uint8_t* content
        cdef Py_ssize_t i = first, size = data.shape[0], fault = 0
        cdef bint wrapped = False
        cdef uint8_t[ENCODE_ROOM] scratch
        if self.now == 0:
            raise ValueError("no round was begun")
        if not 0 <= first <= count or records.shape[0] < count * <Py_ssize_t>sizeof(StreamRecord):
            raise ValueError("there are fewer records than that")
        if first == count:
            return count, False
        self.open_slab()
        self.offered = 0
        at = <const StreamRecord*>&records[0]
        content = &data[0] if size else NULL
        with nogil:
            while i < count and not self.is_full():
                if at[i].page < self.past:
                    wrapped = True
                    break
                if at[i].page >= self.pages or at[i].at > <uint64_t>size or \
                        at[i].length > <uint64_t>size - at[i].at or (
                    at[i].kind == RAM_PAGE and at[i].length != <uint32_t>self.page_size
                ):
                    fault = PAST_GUEST
                    break
                if at[i].kind == RAM_ZERO:
                    self.find_zero(at[i].page)
                elif at[i].kind == RAM_PAGE:
                    self.put_page(
                        at[i].page, content + at[i].at, self.page_size, False, scratch, NULL, 0
                    )
                else:
                    fault = self.pass_delta(
                        at[i].page, content + at[i].at, at[i].length, scratch
                    )
                    if fault:
                        break
                self.past = at[i].page + 1
                i += 1
        if fault:
            raise DecodeError(f"page {at[i].page}: {FAULTS[fault]}")
        return i, wrapped

    cdef Py_ssize_t pass_delta(
        self, uint64_t page, const uint8_t* delta, Py_ssize_t length, uint8_t* scratch
    ) noexcept nogil:
        """A delta that somebody else has made; 0 or a Fault."""
        cdef Py_ssize_t fault
        cdef uint32_t slot = NO_SLOT
        cdef bint zero = not get_bit(self.filled, page)
        if not self.sent.has(page):
            return NO_BASE
        if length == 0:
            self.unchanged += 1
            return 0
        if length > self.page_size:
            return EMPTY_DELTA
        if self.on:
            slot = self.cache.find(page)
        if slot != NO_SLOT:
            fault = decode_page(delta, length, self.cache.at(slot), self.page_size)
        else:
            memset(scratch, 0, self.page_size)
            fault = decode_page(delta, length, scratch, self.page_size)
        if fault:
            return fault
        if not zero:
            self.warm(page)
        if slot != NO_SLOT:
            self.cache.ages[slot] = self.now
            self.cache.proven[slot] = 1
        elif zero and self.on and not self.overflowed[page] & WAIT_MASK:
            self.cache.insert(page, scratch, self.now, NULL, 0)
        self.flush_zeros()
        self.put_delta(page, delta, length)
        set_bit(self.filled, page)
        return 0

    def feed_zeros(self, uint64_t first, uint64_t count):
        """Pages that are known to be zero without reading them (holes of a sparse file).

        Returns how many fitted the batch.
        """
        cdef uint64_t page, stop, end = first + count, floor = self.next_page if self.used else 0
        if self.zero_count:
            floor = self.zero_first + self.zero_count
        if self.now == 0 or first < floor or end > self.pages or end < first:
            raise ValueError(f"pages {first} to {first + count} are out of order or outside")
        self.open_slab()
        self.offered = 0
        with nogil:
            page = first
            while page < end:
                stop = self.zeros_end(page, end)
                self.unchanged += stop - page
                page = stop
                if page == end or self.is_full():
                    break
                self.put_zero(page)
                page += 1
                stop = self.lacking_end(page, end)
                if stop > page and not self.is_full():  # the rest of the run takes no room
                    self.zero_count += stop - page
                    self.zero += stop - page
                    self.make_zeros(page, stop)
                    page = stop
        return page - first

    cdef uint64_t zeros_end(self, uint64_t page, uint64_t end) noexcept nogil:
        """The first page from `page` on that is not known to be zero there, or `end`."""
        cdef uint64_t stop
        if page < self.sent.below:
            stop = end if end < self.sent.below else self.sent.below
            page = next_set(self.filled, page, stop)
            if page < stop:
                return page
        while page < end and self.is_zero_there(page):
            page += 1
        return page

    cdef uint64_t lacking_end(self, uint64_t page, uint64_t end) noexcept nogil:
        """The first page from `page` on that is known to be zero there, or `end`."""
        if page >= self.sent.below and not self.sent.strays:
            return end
        while page < end and not self.is_zero_there(page):
            page += 1
        return page

    def take(self):
        """The batch as (head, pages), and opens the next one.

        head  -- `headroom` free bytes, then round, first page, check and records
        pages -- the raw pages, in the order of their records
        """
        cdef uint64_t check = htobe64(self.check)
        cdef Py_ssize_t end
        self.flush_zeros()
        if self.used == 0:
            raise ValueError("the batch is empty")
        memcpy(self.out + 12, &check, 8)
        end = self.data_at + self.raw_pages * self.page_size
        whole = memoryview(self.slab)
        batch = whole[: self.headroom + self.used], whole[self.data_at : end]
        self.slab = None
        self.out = self.data = NULL
        self.used = self.raw_at = self.raw_pages = self.offered = 0
        self.check = 0
        return batch

    def scan(
        self, uint64_t first, uint64_t count, const uint8_t[::1] data not None,
        uint8_t[::1] changed not None,
    ):
        """Sets a bit in `changed` for each of `count` pages in `data` that the peer lacks.

        Exact for pages in the cache and for zero pages; others by their hash, which misses a
        change with a probability below 2^-62. A page that equals the cached one gets its hash
        where that was stale. Returns how many pages differ.
        """
        cdef uint64_t found = 0
        cdef xb_sum total
        self.check_scan(first, count, changed)
        if <uint64_t>data.shape[0] < count * self.page_size:
            raise ValueError("the data is too short")
        if count == 0:
            return 0
        memset(&total, 0, sizeof(total))
        with nogil:
            found = self.scan_pages(first, count, &data[0], &changed[0], &total)
        xb_join(&self.hashes.total, &total)
        return found

    def scan_file(
        self, int fd, uint64_t size, uint64_t first, uint64_t count, uint8_t[::1] changed not None,
        uint8_t[::1] buffer not None,
    ):
        """As `scan`, for pages of a file of `size` bytes, read with pread(2) into `buffer`, some at
        a time. What the file lacks are zeros. Raises OSError where reading fails.

        Several threads may scan at once, each its own pages with a buffer of its own, while nobody
        else uses the encoder.
        """
        cdef uint64_t found = 0, page = first, end = first + count, some
        cdef uint64_t step = <uint64_t>buffer.shape[0] // <uint64_t>self.page_size
        cdef xb_sum total
        cdef int error = 0
        self.check_scan(first, count, changed)
        if step == 0:
            raise ValueError("the buffer is shorter than a page")
        memset(&total, 0, sizeof(total))
        with nogil:
            while page < end:
                some = end - page if end - page < step else step
                error = read_pages(
                    fd, &buffer[0], page * self.page_size, some * self.page_size, size
                )
                if error:
                    break
                found += self.scan_pages(page, some, &buffer[0], &changed[0], &total)
                page += some
        xb_join(&self.hashes.total, &total)
        if error:
            raise OSError(error, os.strerror(error))
        return found

    cdef int check_scan(self, uint64_t first, uint64_t count, uint8_t[::1] changed) except -1:
        if first > self.pages or count > self.pages - first:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        if <uint64_t>changed.shape[0] * 8 < self.pages:
            raise ValueError("the data or the bitmap is too short")
        return 0

    cdef uint64_t scan_pages(
        self, uint64_t first, uint64_t count, const uint8_t* data, uint8_t* changed, xb_sum* total
    ) noexcept nogil:
        """Other threads may scan other pages: bits are set in one step, and the sum is apart."""
        cdef uint64_t i, page, found = 0
        cdef const uint8_t* content
        cdef Py_ssize_t hint = 0
        for i in range(count):
            page = first + i
            content = data + i * self.page_size
            if not self.sent.has(page) or self.differs(page, content, &hint, total):
                set_bit_shared(changed, page)
                found += 1
        return found

    cdef bint differs(
        self, uint64_t page, const uint8_t* content, Py_ssize_t* hint, xb_sum* total
    ) noexcept nogil:
        cdef uint32_t slot = NO_SLOT
        if not get_bit(self.filled, page):
            return not is_zero(content, self.page_size)
        if self.cache is not None:
            slot = self.cache.find_near(page, hint)
        if slot == NO_SLOT:
            return get_bit(self.hashes.stale_at, page) or not self.hashes.matches(page, content)
        if memcmp(content, self.cache.at(slot), self.page_size) != 0:
            return True
        if get_bit(self.hashes.stale_at, page):
            self.hashes.note_shared(page, self.hashes.hash_of(content), total)
        return False

    def scan_zeros(self, uint64_t first, uint64_t count, uint8_t[::1] changed not None):
        """As `scan`, for pages that are known to be zero without reading them."""
        cdef uint64_t page = first, stop, end = first + count, found = 0
        self.check_scan(first, count, changed)
        with nogil:
            while True:
                page = self.zeros_end(page, end)
                if page == end:
                    break
                stop = self.lacking_end(page + 1, end)
                set_range(&changed[0], page, stop)
                found += stop - page
                page = stop
        return found


cdef int read_pages(
    int fd, uint8_t* into, uint64_t offset, uint64_t length, uint64_t size
) noexcept nogil:
    """pread(2) of all of it, with zeros behind the end of the file; 0 or an errno."""
    cdef uint64_t got = 0
    cdef ssize_t n
    while got < length and offset + got < size:
        n = pread(fd, into + got, length - got, <long>(offset + got))
        if n > 0:
            got += n
        elif n == 0:
            break
        elif errno != EINTR:
            return errno
    if offset + got > size:
        got = size - offset
    if got < length:
        memset(into + got, 0, length - got)
    return 0


# ---------------------------------------------------------------- decoder

cdef Py_ssize_t read_record(
    const uint8_t* at, Py_ssize_t left, Py_ssize_t page_size, uint64_t pages, uint64_t next_page,
    Record* record,
) noexcept nogil:
    """One record: how many bytes it takes, or a Fault. All is compared before it is believed."""
    cdef Py_ssize_t i = 1, step
    cdef uint64_t value = 0
    if left < 1:
        return SHORT
    record.op = at[0] & OP_MASK
    record.first = at[0] & GAP_MASK
    record.length = 0
    if record.first == GAP_MASK:
        step = get_uleb(at + i, left - i, 9, &value)
        if step < 0:
            return step
        i += step
        if value >= pages:
            return PAST_GUEST
        record.first += value
    record.first += next_page
    if record.first >= pages:
        return PAST_GUEST
    if record.op == OP_ZERO:
        step = get_uleb(at + i, left - i, 9, &value)
        if step < 0:
            return step
        i += step
        record.count = value
    elif record.op == OP_RAW:
        if left - i < 2:
            return SHORT
        record.count = (<uint64_t>at[i] << 8) | at[i + 1]
        i += 2
    elif record.op == OP_DELTA:
        step = get_uleb(at + i, left - i, 3, &value)
        if step < 0:
            return step
        i += step
        if value == 0 or value > <uint64_t>page_size:
            return EMPTY_DELTA
        record.count = 1
        record.length = <Py_ssize_t>value
    else:
        return BAD_OP
    if record.count == 0 or record.count > pages - record.first:
        return PAST_GUEST
    if record.length > left - i:
        return SHORT
    record.delta = at + i
    return i + record.length


cdef class PageDecoder:
    """Applies batches to the destination's memory, and knows what has come.

    hashes -- keeps the hashes of raw and zero pages; those of deltas are stale
    size   -- bytes of the guest: what its last page has beyond them is not written to a file
    zeroed -- whether the memory is all zeros at first, so that pages of zeros need no writing
    recent -- a bit per page that a delta has changed since `end_round`
    """

    cdef readonly uint64_t pages
    cdef readonly Py_ssize_t page_size
    cdef readonly uint64_t size
    cdef readonly object recent
    cdef PageHashes hashes
    cdef Zeros recent_keep
    cdef Zeros written_keep
    cdef uint8_t* recent_at
    cdef uint8_t* written
    cdef Rising received
    cdef readonly uint64_t zero
    cdef readonly uint64_t raw
    cdef readonly uint64_t delta

    def __cinit__(self, PageHashes hashes not None, uint64_t size, *, bint zeroed=True):
        self.pages = hashes.pages
        self.page_size = hashes.page_size
        if not (self.pages - 1) * self.page_size < size <= self.pages * self.page_size:
            raise ValueError(f"{size} bytes are not {self.pages} pages of {self.page_size}")
        self.size = size
        self.hashes = hashes
        self.recent_keep = bitmap(self.pages)
        self.written_keep = bitmap(self.pages)
        self.received = Rising(self.pages)
        self.recent = memoryview(self.recent_keep)
        self.recent_at = self.recent_keep.at
        self.written = self.written_keep.at
        if not zeroed:
            memset(self.written, 0xFF, (self.pages + 63) // 64 * 8)

    @property
    def received_pages(self):
        """How many pages have come, or were here before."""
        return self.received.below + self.received.strays

    def hold(self, uint64_t first, uint64_t count, bint written):
        """These pages are here from before: a delta may change them.

        written -- whether anything but zeros may be there: their hashes are stale then
        """
        if first > self.pages or count > self.pages - first:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        with nogil:
            self.received.add_range(first, first + count)
            if written:
                set_range(self.written, first, first + count)
                set_range(self.hashes.stale_at, first, first + count)

    def end_round(self):
        """Forgets which pages are `recent`."""
        with nogil:
            clear_range(self.recent_at, 0, self.pages)

    cdef Py_ssize_t check_records(
        self, const uint8_t* at, Py_ssize_t size, Py_ssize_t data_bytes, Py_ssize_t* where,
        uint64_t* page, list fresh,
    ):
        """Walks a batch without applying it; 0 or a Fault with its place."""
        cdef Record record
        cdef Py_ssize_t i = HEAD, step
        cdef uint64_t next_page, raw = 0
        memcpy(&next_page, at + 4, 8)
        next_page = be64toh(next_page)
        page[0] = next_page
        where[0] = 4
        if next_page >= self.pages:
            return PAST_GUEST
        while i < size:
            where[0] = i
            step = read_record(at + i, size - i, self.page_size, self.pages, next_page, &record)
            if step < 0:
                return step
            page[0] = record.first
            if record.op == OP_RAW:
                raw += record.count
            elif record.op == OP_DELTA:
                if not self.received.has(record.first):
                    return NO_BASE
                if not get_bit(self.written, record.first):
                    fresh.append(record.first)
            next_page = record.first + record.count
            i += step
        # The number of pages cannot wrap: each record takes bytes, and counts 16 bits at most.
        return 0 if raw * self.page_size == <uint64_t>data_bytes else BAD_DATA

    def check(self, const uint8_t[::1] head not None, Py_ssize_t data_bytes):
        """Validates the records of a batch, but not what its deltas hold; touches nothing.

        Returns (its round, pages that a delta writes for the first time): the caller makes room
        for those. Raises DecodeError, naming the page and the byte.
        """
        cdef Py_ssize_t where = 0, fault
        cdef uint64_t page = 0
        cdef list fresh = []
        if head.shape[0] <= HEAD:
            raise DecodeError(f"a batch of {head.shape[0]} bytes holds no record")
        fault = self.check_records(&head[0], head.shape[0], data_bytes, &where, &page, fresh)
        if fault:
            raise DecodeError(f"page {page}, byte {where} of the batch: {FAULTS[fault]}")
        return (<uint32_t>head[0] << 24) | (head[1] << 16) | (head[2] << 8) | head[3], fresh

    def apply(
        self, const uint8_t[::1] head not None, const uint8_t[::1] data not None,
        uint8_t[::1] memory not None, int fd=-1, uint64_t fd_offset=0,
    ):
        """Writes a batch into the guest's memory; how many pages it held.

        data   -- its raw pages
        memory -- whole pages, at least those of the guest
        fd     -- of the file that `memory` maps: raw pages are written to it with pwrite(2), which
                  costs half of what copying to a fresh mapping does; -1 where there is none
        fd_offset -- where the guest begins in that file

        No raw page is written unless all of them match the check of the batch, and no delta that
        is not wholly right. Raises DecodeError at the first record that is not; those before it
        are applied. Raises OSError where writing fails.
        """
        cdef Record record
        cdef Py_ssize_t i = HEAD, step = 0, size = head.shape[0], raw_pages, used = 0, k
        cdef uint64_t next_page, check, seen = 0, done = 0, page
        cdef uint64_t* values = NULL
        cdef const uint8_t* content = &data[0] if data.shape[0] else NULL
        cdef int error = 0
        if <uint64_t>memory.shape[0] < self.pages * self.page_size:
            raise ValueError("the memory is shorter than the guest")
        if size <= HEAD:
            raise DecodeError(f"a batch of {size} bytes holds no record")
        raw_pages = data.shape[0] // self.page_size
        memcpy(&next_page, &head[4], 8)
        memcpy(&check, &head[12], 8)
        next_page = be64toh(next_page)
        if next_page >= self.pages:
            raise DecodeError(f"page {next_page}: {FAULTS[PAST_GUEST]}")
        values = <uint64_t*>malloc((raw_pages + 1) * 8)
        if values == NULL:
            raise MemoryError("no memory for the hashes of a batch")
        with nogil:
            for k in range(raw_pages):
                values[k] = self.hashes.hash_of(content + k * self.page_size)
                seen = seen * STEP + values[k]
            if seen != be64toh(check):
                step = BAD_CHECK
            while step >= 0 and i < size:
                step = read_record(
                    &head[i], size - i, self.page_size, self.pages, next_page, &record
                )
                if step < 0:
                    break
                if record.op == OP_DELTA:
                    if not self.received.has(record.first):
                        step = NO_BASE
                        break
                    k = decode_page(
                        record.delta, record.length, &memory[record.first * self.page_size],
                        self.page_size,
                    )
                    if k < 0:
                        step = k
                        break
                    self.delta += 1
                    set_bit(self.written, record.first)
                    set_bit(self.recent_at, record.first)
                    set_bit(self.hashes.stale_at, record.first)
                elif record.op == OP_RAW:
                    if record.count > <uint64_t>(raw_pages - used):
                        step = BAD_DATA
                        break
                    if fd < 0:
                        memcpy(
                            &memory[record.first * self.page_size],
                            content + used * self.page_size, record.count * self.page_size,
                        )
                    else:
                        error = self.write_raw(
                            fd, fd_offset, content + used * self.page_size, record.first,
                            record.count,
                        )
                        if error:
                            break
                    for page in range(record.first, record.first + record.count):
                        self.received.add(page)
                        set_bit(self.written, page)
                        self.hashes.note(page, values[used])
                        used += 1
                    self.raw += record.count
                else:
                    self.write_zeros(&memory[0], record.first, record.first + record.count)
                    self.zero += record.count
                done += record.count
                next_page = record.first + record.count
                i += step
            free(values)
        if error:
            raise OSError(error, os.strerror(error))
        if step < 0:
            raise DecodeError(f"byte {i} of the batch: {FAULTS[step]}")
        return done

    cdef int write_raw(
        self, int fd, uint64_t fd_offset, const uint8_t* data, uint64_t first, uint64_t count
    ) noexcept nogil:
        """pwrite(2) of whole pages, as far as the guest goes; 0 or an errno."""
        cdef uint64_t offset = first * self.page_size, length = count * self.page_size
        cdef ssize_t n
        if length > self.size - offset:
            length = self.size - offset
        while length:
            n = pwrite(fd, data, length, <long>(fd_offset + offset))
            if n < 0:
                if errno == EINTR:
                    continue
                return errno
            data += n
            offset += <uint64_t>n
            length -= <uint64_t>n
        return 0

    cdef void write_zeros(self, uint8_t* memory, uint64_t first, uint64_t end) noexcept nogil:
        """Pages of zeros; what was never written is zeros already."""
        cdef uint64_t page = next_set(self.written, first, end)
        while page < end:
            memset(memory + page * self.page_size, 0, self.page_size)
            page = next_set(self.written, page + 1, end)
        self.received.add_range(first, end)
        self.hashes.note_zeros(first, end)
