# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""Walks over guest memory: gathering pages, taking dirty marks, and the demo guest's load.

All of it runs without the GIL. Guest memory is written by others while we read it; nothing here
compares or encodes it in place. `gather` copies pages to private memory, and all that follows
works on that copy.
"""

import os

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy, memset

from proto.codec._bits cimport get_bit, next_set_but

cdef extern from "unistd.h" nogil:
    ssize_t pread(int, void*, size_t, long)

cdef extern from "time.h" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC
    int clock_gettime(int, timespec*)
    int nanosleep(const timespec*, timespec*)

cdef extern from *:
    """
    #include <stdint.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* Declared here, since the headers of the machine that builds may be older than its kernel. */
    #ifndef __NR_cachestat
    #define __NR_cachestat 451
    #endif
    struct xm_cached { uint64_t cached, dirty, writeback, evicted, recently_evicted; };
    static long long xm_cached_pages(int fd, uint64_t offset, uint64_t length)
    {
        uint64_t range[2] = { offset, length };
        struct xm_cached found;
        return syscall(__NR_cachestat, fd, range, &found, 0) ? -1 : (long long)found.cached;
    }

    #define xm_load(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
    #define xm_store(p, v) __atomic_store_n((p), (v), __ATOMIC_SEQ_CST)
    #define xm_mark(p) __atomic_store_n((p), (uint8_t)1, __ATOMIC_RELEASE)
    #define xm_take(p) __atomic_exchange_n((p), (uint64_t)0, __ATOMIC_SEQ_CST)
    """
    uint64_t xm_load(uint64_t*) nogil
    void xm_store(uint64_t*, uint64_t) nogil
    void xm_mark(uint8_t*) nogil
    uint64_t xm_take(uint64_t*) nogil
    long long xm_cached_pages(int, uint64_t, uint64_t) nogil


def cached_pages(int fd, uint64_t offset, uint64_t length):
    """Return how many pages of a range of a file are in the page cache; length 0: to its end.

    Raises OSError; ENOSYS: the kernel is older than 6.5.
    """
    cdef long long found
    with nogil:
        found = xm_cached_pages(fd, offset, length)
    if found < 0:
        raise OSError(errno, os.strerror(errno))
    return found


# ---------------------------------------------------------------- gathering

cdef inline uint64_t run_end(
    const uint8_t* bits, const uint8_t* but, uint64_t page, uint64_t limit
) noexcept nogil:
    """The first page after `page` that is not to be copied, at most `limit`."""
    while page < limit and get_bit(bits, page) and not (but != NULL and get_bit(but, page)):
        page += 1
    return page


def address_of(const uint8_t[::1] memory not None):
    """Where a buffer is in this process's memory."""
    return <uint64_t>&memory[0]


cdef Py_ssize_t read_at(
    int fd, uint8_t* at, Py_ssize_t want, uint64_t offset, size_t align,
    uint8_t* bounce, Py_ssize_t bounce_size,
) noexcept nogil:
    """Reads `want` bytes; returns how many (fewer at the end of the file), or -1 with errno set.

    align -- 0, or what O_DIRECT wants offset, length and address to be multiples of; what is not is
             read into `bounce`, itself aligned and a multiple of `align` long
    """
    cdef Py_ssize_t got = 0, skip, length
    cdef ssize_t n
    cdef uint64_t from_
    while got < want:
        from_ = offset + <uint64_t>got
        length = want - got
        if not align or not (from_ | <uint64_t>length | <uint64_t>(at + got)) & (align - 1):
            n = pread(fd, at + got, length, <long>from_)
        else:
            skip = <Py_ssize_t>(from_ & (align - 1))
            length = (skip + length + <Py_ssize_t>align - 1) & ~(<Py_ssize_t>align - 1)
            if length > bounce_size:
                length = bounce_size
            n = pread(fd, bounce, length, <long>(from_ - <uint64_t>skip))
            if n >= 0:
                n = n - skip if n > skip else 0
                if n > want - got:
                    n = want - got
                memcpy(at + got, bounce + skip, n)
        if n > 0:
            got += n
        elif n == 0:
            break
        elif errno != EINTR:
            return -1
    return got


cdef int check_bounce(size_t align, const uint8_t[::1] bounce) except -1:
    if not align:
        return 0
    if align & (align - 1) or bounce is None or <size_t>bounce.shape[0] < 2 * align:
        raise ValueError("an alignment is a power of two, with a buffer of twice as much")
    if bounce.shape[0] % align or <uint64_t>&bounce[0] % align:
        raise ValueError("the buffer is not aligned")
    return 0


def read_direct(
    int fd, size_t align, uint8_t[::1] bounce not None, uint8_t[::1] into not None, uint64_t offset,
):
    """Fills `into` from `offset` on, from a file that was opened with O_DIRECT.

    Returns how many bytes there were. Raises OSError where reading fails.
    """
    cdef Py_ssize_t got = 0
    cdef int error = 0
    check_bounce(align, bounce)
    if into.shape[0]:
        with nogil:
            got = read_at(
                fd, &into[0], into.shape[0], offset, align, &bounce[0], bounce.shape[0]
            )
            if got < 0:
                error = errno
    if error:
        import os
        raise OSError(error, os.strerror(error))
    return got


def gather(
    const uint8_t[::1] memory, int fd, uint64_t size, const uint8_t[::1] bitmap not None,
    uint64_t first, uint64_t end, Py_ssize_t page_size,
    uint8_t[::1] snapshot not None, uint64_t[::1] numbers not None,
    size_t align=0, uint8_t[::1] bounce=None, const uint8_t[::1] but not None=b"",
    uint64_t base=0,
):
    """Copies the dirty pages from `first` to `end` into `snapshot`, as many as fit.

    memory   -- the guest's memory, or None where it is read from `fd` with pread(2)
    size     -- bytes of the guest: what its last page has too much reads as zeros
    bitmap   -- a bit per page, in whole 8-byte words
    snapshot -- private memory for len(numbers) pages
    numbers  -- takes the page numbers
    align, bounce -- see read_at; 0, None: `fd` was not opened with O_DIRECT
    but      -- a bitmap of pages that are left out; empty: none
    base     -- where the guest begins in the file `fd`

    Returns (pages copied, the page to go on from). Raises OSError where reading fails.
    """
    cdef uint64_t page = first, stop, offset
    cdef Py_ssize_t count = 0, most = numbers.shape[0], want, got, bounce_size = 0
    cdef uint8_t* at
    cdef uint8_t* spare = NULL
    cdef int error = 0
    if <uint64_t>bitmap.shape[0] * 8 < end or bitmap.shape[0] % 8:
        raise ValueError("the bitmap is too short")
    if but.shape[0] and but.shape[0] != bitmap.shape[0]:
        raise ValueError("the bitmaps are not of equal length")
    if snapshot.shape[0] < most * page_size:
        raise ValueError("the snapshot is too short")
    if memory is not None and <uint64_t>memory.shape[0] < size:
        raise ValueError("the memory is too short")
    check_bounce(align, bounce)
    if align:
        spare, bounce_size = &bounce[0], bounce.shape[0]
    cdef const uint8_t* source = NULL
    if memory is not None and size:
        source = &memory[0]
    cdef const uint8_t* bits = &bitmap[0]
    cdef const uint8_t* left_out = &but[0] if but.shape[0] else NULL
    with nogil:
        while count < most:
            page = next_set_but(bits, left_out, page, end)
            if page >= end:
                break
            stop = page + <uint64_t>(most - count)
            stop = run_end(bits, left_out, page, stop if stop < end else end)
            offset = page * page_size
            want = <Py_ssize_t>(stop - page) * page_size
            at = &snapshot[count * page_size]
            got = 0
            if source != NULL:
                if offset < size:
                    got = want if size - offset >= <uint64_t>want else <Py_ssize_t>(size - offset)
                    memcpy(at, source + offset, got)
            elif offset < size:
                got = want if size - offset >= <uint64_t>want else <Py_ssize_t>(size - offset)
                got = read_at(fd, at, got, base + offset, align, spare, bounce_size)
                if got < 0:
                    error = errno
                    break
            if got < want:
                memset(at + got, 0, want - got)
            while page < stop:
                numbers[count] = page
                count += 1
                page += 1
    if error:
        import os
        raise OSError(error, os.strerror(error))
    return count, page


# ---------------------------------------------------------------- dirty marks

def take_marks(uint8_t[::1] marks not None, uint8_t[::1] bitmap not None):
    """Moves the guest's dirty marks (a byte per page) into a bitmap and clears them.

    The guest sets a mark after it has written; we clear marks with an atomic exchange before
    anyone copies the page. So a write that this copy misses leaves its mark for the next one.
    """
    cdef Py_ssize_t i, k, count = marks.shape[0]
    cdef uint64_t word
    cdef uint8_t* at = &marks[0]
    if count % 8 or bitmap.shape[0] * 8 < count:
        raise ValueError("the marks are not whole words, or the bitmap is too short")
    with nogil:
        for i in range(0, count, 8):
            if (<uint64_t*>(at + i))[0] == 0:
                continue
            word = xm_take(<uint64_t*>(at + i))
            for k in range(8):
                if (<uint8_t*>&word)[k]:
                    bitmap[i >> 3] |= <uint8_t>(1 << k)


def put_back_marks(uint8_t[::1] marks not None, const uint8_t[::1] bitmap not None):
    """Sets the marks of all pages in the bitmap again: nothing taken is forgotten."""
    cdef Py_ssize_t i, count = marks.shape[0]
    if bitmap.shape[0] * 8 < count:
        raise ValueError("the bitmap is too short")
    with nogil:
        for i in range(count):
            if (bitmap[i >> 3] >> (i & 7)) & 1:
                xm_mark(&marks[i])


def set_marks(uint8_t[::1] marks not None, uint64_t first, uint64_t count):
    """Marks pages dirty, after they were written."""
    cdef uint64_t i
    if first + count > <uint64_t>marks.shape[0]:
        raise ValueError("pages outside the guest")
    for i in range(first, first + count):
        xm_mark(&marks[i])


# ---------------------------------------------------------------- the demo guest

cdef enum:
    BURST = 1024                # increments between two looks at the command word

# The words of the demo guest's control block (migrate/guests/demo/layout.py says what they mean).
cdef enum:
    COMMAND = 0
    STATE = 1
    SWEEP = 2
    INDEX = 3
    THROTTLE = 12

cdef uint64_t RUN = 1


cdef inline double clock() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec + t.tv_nsec * 1e-9


def run_load(
    uint64_t[::1] control not None, uint8_t[::1] marks not None, uint8_t[::1] memory not None,
    uint64_t hot, uint64_t stride, uint64_t page_size, double rate, double run=0.01,
):
    """The seed's load generator: for ever, in order, adds one to each byte at a multiple of
    `stride` below `hot`, marking its page after the write. Returns when the command word is no
    longer RUN, with the place it stopped at in SWEEP and INDEX; and, while the throttle word is
    not 0, every `run` seconds.

    rate -- increments per second, 0 for full speed
    """
    cdef uint64_t* words = &control[0]
    cdef uint64_t sweep = words[SWEEP], index = words[INDEX], points = (hot + stride - 1) // stride
    cdef uint64_t burst = BURST, offset, done = 0
    cdef double began = clock(), until = began + run, wait
    cdef timespec pause
    if hot == 0 or stride == 0 or hot > <uint64_t>memory.shape[0] or index >= points:
        raise ValueError("the load does not fit the memory")
    if (hot - 1) // page_size >= <uint64_t>marks.shape[0]:
        raise ValueError("there are fewer marks than pages")
    if rate and rate < BURST * 100:
        burst = <uint64_t>(rate / 100) + 1
    with nogil:
        while xm_load(&words[COMMAND]) == RUN:
            for _ in range(burst):
                offset = index * stride
                memory[offset] += 1
                xm_mark(&marks[offset // page_size])
                index += 1
                if index == points:
                    index = 0
                    sweep += 1
            xm_store(&words[SWEEP], sweep)
            xm_store(&words[INDEX], index)
            if rate:
                done += burst
                wait = began + done / rate - clock()
                while wait > 0 and xm_load(&words[COMMAND]) == RUN:
                    pause.tv_sec = 0    # in short naps: a command must not wait for the rate
                    pause.tv_nsec = <long>((wait if wait < 0.002 else 0.002) * 1e9)
                    nanosleep(&pause, NULL)
                    wait = began + done / rate - clock()
                if wait < -1:         # we were stopped: do not try to make up for it
                    began, done = clock(), 0
            if xm_load(&words[THROTTLE]) and clock() >= until:
                break


cdef inline uint64_t pattern(uint64_t i) noexcept nogil:
    """A fixed pseudo-random word for each position (the finaliser of splitmix64)."""
    i = (i + 1) * 0x9E3779B97F4A7C15u
    i = (i ^ (i >> 30)) * 0xBF58476D1CE4E5B9u
    i = (i ^ (i >> 27)) * 0x94D049BB133111EBu
    return i ^ (i >> 31)


def fill(uint8_t[::1] memory not None, uint64_t hot, uint64_t stride, bint random):
    """The demo guest's first content: zeros or a fixed pattern, with zeros where it will count."""
    cdef uint64_t i, word, size = memory.shape[0]
    with nogil:
        if random:
            for i in range(size // 8):
                word = pattern(i)
                memcpy(&memory[i * 8], &word, 8)
            i = 0
            while i < hot:
                memory[i] = 0
                i += stride


def first_wrong(
    const uint8_t[::1] memory not None, uint64_t hot, uint64_t stride, bint random,
    uint64_t sweep, uint64_t index, uint64_t base=0, uint64_t total=0,
):
    """Checks every byte of a paused demo guest; the offset of the first wrong one, or -1.

    base  -- what `memory` begins with: it may be a part, from a multiple of 8 on
    total -- bytes of the whole guest; 0: `memory` is its end

    A byte that the load touches must equal the number of times it was incremented (modulo 256):
    `sweep`, or one more below `index`. All other bytes are as `fill` made them. So a page that is
    stale, torn or misplaced shows.
    """
    cdef uint64_t i, k, word, size = memory.shape[0], offset
    cdef uint8_t want
    cdef uint8_t[8] bytes_
    cdef Py_ssize_t wrong = -1
    if base % 8:
        raise ValueError("a part begins at a multiple of 8")
    if not total:
        total = base + size
    with nogil:
        i = 0
        while i < size and wrong < 0:
            word = pattern((base + i) // 8) if random and (base + i) // 8 < total // 8 else 0
            memcpy(bytes_, &word, 8)
            for k in range(8 if size - i >= 8 else size - i):
                offset = base + i + k
                want = bytes_[k]
                if offset < hot and offset % stride == 0:
                    want = <uint8_t>(sweep + (1 if offset // stride < index else 0))
                if memory[i + k] != want:
                    wrong = offset
                    break
            i += 8
    return wrong
