# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""XBZRLE of one page and of many, without the GIL (proto/README.md, "XBZRLE").

Encoding has two steps. First _diff.h lists the runs in which the two pages differ, 64 bytes at a
time, with the widest comparison that the processor has. Then the runs are written: two lengths and
the new bytes for each. The lengths of all runs are known before a byte is written, so a page that
overflows costs little more than its comparison.

Decoding makes one pass. Each run is checked, its old bytes are saved, and its new bytes are copied.
A delta that turns out to be bad is undone from what was saved: the page is as it was. QEMU's
decoder (migration/xbzrle.c) writes as it reads and leaves a page half changed.

The readable twin is proto/codec/_xbzrle_twin.py; the two give the same bytes on every input.
"""

import os

from cpython.buffer cimport (
    PyBUF_ND,
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from proto.codec._faults cimport EMPTY_RUN, PAST_DELTA, PAST_PAGE, SHORT, ZERO_RUN
from proto.codec._uleb cimport get_uleb, put_uleb

from proto.codec.faults import FAULTS
from proto.wire.errors import DecodeError

cdef extern from "_diff.h" nogil:
    cdef struct xb_runs:
        uint16_t* start
        uint16_t* end
    ctypedef Py_ssize_t (*xb_diff_fn)(
        const uint8_t*, const uint8_t*, size_t, size_t, int, xb_runs*
    ) noexcept nogil
    cdef struct xb_kernel:
        const char* name
        xb_diff_fn diff
    const xb_kernel* xb_kernels
    int XB_KERNELS
    bint xb_can_run(const char*)

cdef enum:
    # Runs of up to this many bytes are copied by one wide store: 32 is the width of an AVX2
    # register, and a store of a known width needs no loop and no branch.
    WIDE = 32

cdef uint8_t[MAX_PAGE_SIZE] ZERO_PAGE
memset(ZERO_PAGE, 0, MAX_PAGE_SIZE)

cdef xb_diff_fn diff_runs = NULL


def use_simd(name=None):
    """Choose the kernel that compares pages: the one named, or the best this processor has.

    Returns its name. Raises ImportError for a kernel that is unknown or that this processor cannot
    run.
    """
    global diff_runs
    cdef int i
    known = []
    for i in range(XB_KERNELS):
        each = xb_kernels[i].name.decode()
        known.append(each)
        if xb_can_run(xb_kernels[i].name) and (name is None or name == each):
            diff_runs = xb_kernels[i].diff
            return each
    if name in known:
        raise ImportError(f"this processor cannot run XBMIGRATE_SIMD={name!r}")
    raise ImportError(f"XBMIGRATE_SIMD={name!r} is not a kernel: known are {', '.join(known)}")


def simd_kernels():
    """Return the kernels of this build by name, each with whether this processor can run it."""
    cdef int i
    return {
        xb_kernels[i].name.decode(): bool(xb_can_run(xb_kernels[i].name))
        for i in range(XB_KERNELS)
    }


SIMD = use_simd(os.environ.get("XBMIGRATE_SIMD"))


cdef bint is_zero(const uint8_t* page, Py_ssize_t size) noexcept nogil:
    return page[0] == 0 and memcmp(page, ZERO_PAGE, size) == 0


cdef const uint8_t* zero_page() noexcept nogil:
    return ZERO_PAGE


cdef int check_page_size(Py_ssize_t page_size) except -1:
    """Raise ValueError for a page size that no guest can have."""
    if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise ValueError(
            f"a page of {page_size} bytes: it must be a power of two from {MIN_PAGE_SIZE} to "
            f"{MAX_PAGE_SIZE}"
        )
    return 0


# ---------------------------------------------------------------- pieces of a delta

cdef inline Py_ssize_t put_length(uint8_t* at, unsigned int value) noexcept nogil:
    """Write a length within a page as ULEB128: in one or two bytes; 16384 alone takes three."""
    if value < 0x80:
        at[0] = <uint8_t>value
        return 1
    at[0] = <uint8_t>(value | 0x80)
    if value < 0x4000:
        at[1] = <uint8_t>(value >> 7)
        return 2
    return put_uleb(at, value)


cdef inline void copy_run(uint8_t* to, const uint8_t* data, Py_ssize_t n) noexcept nogil:
    """Copy exactly `n` bytes, n > 0.

    memcpy with a length that only the data tells costs a call and an unpredictable branch; most
    runs are short. So they are copied in pieces of a fixed width, one from either end, which may
    overlap in the middle.
    """
    if n == 1:
        to[0] = data[0]
    elif n >= 16:
        if n > 64:
            memcpy(to, data, n)
            return
        memcpy(to + n - 16, data + n - 16, 16)
        memcpy(to, data, 16)
        if n > 32:
            memcpy(to + 16, data + 16, 16)
            memcpy(to + n - 32, data + n - 32, 16)
    elif n >= 8:
        memcpy(to, data, 8)
        memcpy(to + n - 8, data + n - 8, 8)
    elif n >= 4:
        memcpy(to, data, 4)
        memcpy(to + n - 4, data + n - 4, 4)
    else:
        memcpy(to, data, 2)
        to[n - 1] = data[n - 1]


# ---------------------------------------------------------------- encoding

cdef Py_ssize_t encode_page(
    const uint8_t* old, const uint8_t* new, Py_ssize_t size, uint8_t* out, Py_ssize_t room,
    bint merge, uint8_t* keep,
) noexcept nogil:
    """Write the delta from `old` to `new`. Return its length, 0 for equal pages, -1 on overflow.

    out   -- takes the delta: 2 * size + WIDE bytes, because it is written before it is measured
    room  -- the longest delta that is of use, at most `size`
    merge -- close the gaps of one equal byte, and some of two: shorter than canonical
    keep  -- NULL, or a page equal to `old` (it may be `old` itself) that is turned into what the
             delta makes of it; after -1 its content is undefined

    The guest may write to `new` meanwhile. Each byte of the delta is read from `new` once, into
    the delta, and copied from there to `keep`: so `keep` is exactly what the receiver will hold. A
    byte that changes after it was compared is dirty again, and the next round sends it.

    A delta overflows exactly if QEMU's encoder says so: that wants two bytes free before each
    length, even before the length of the equal bytes at the end of the page, which is never sent.
    """
    cdef xb_runs runs
    cdef Py_ssize_t count = diff_runs(old, new, size, room, merge, &runs), k = 0, n = 0
    cdef unsigned int at = 0, start, end, gap, length
    if count <= 0:
        return count
    while k < count:
        start, end = runs.start[k], runs.end[k]
        k += 1
        gap, length = start - at, end - start
        if gap < 0x80 and length < 0x80:
            out[n] = <uint8_t>gap
            out[n + 1] = <uint8_t>length
            n += 2
        else:
            n += put_length(out + n, gap)
            n += put_length(out + n, length)
        # A wide store may put more behind the run than belongs there. What follows overwrites it.
        if length <= 8 and start + 8 <= size:
            memcpy(out + n, new + start, 8)
        elif length <= WIDE and start + WIDE <= size:
            memcpy(out + n, new + start, WIDE)
        else:
            memcpy(out + n, new + start, length)
        if keep != NULL:
            copy_run(keep + start, out + n, length)
        n += length
        at = end
    if n > room or (not merge and at < size and n + 2 > room):
        return -1
    return n


def encode(const uint8_t[::1] old not None, const uint8_t[::1] new not None, bint merge=False):
    """Return the delta that turns `old` into `new`: see proto.xbzrle.encode."""
    cdef Py_ssize_t size = old.shape[0], n
    cdef uint8_t[2 * MAX_PAGE_SIZE + WIDE] out
    if new.shape[0] != size or not 1 <= size <= MAX_PAGE_SIZE:
        raise ValueError(
            f"pages of {size} and {new.shape[0]} bytes: they must be equally long, "
            f"1 to {MAX_PAGE_SIZE}"
        )
    with nogil:
        n = encode_page(&old[0], &new[0], size, out, size, merge, NULL)
    return None if n < 0 else PyBytes_FromStringAndSize(<char*>out, n)


cdef class Buffers:
    """Up to four buffers of a call, released with this object.

    Setting them up costs a tenth of what typed memoryviews cost.
    """

    cdef Py_buffer[4] view
    cdef int count

    def __dealloc__(self):
        while self.count:
            self.count -= 1
            PyBuffer_Release(&self.view[self.count])

    cdef uint8_t* bytes_of(self, object owner, bint writable) except? NULL:
        PyObject_GetBuffer(
            owner, &self.view[self.count], PyBUF_WRITABLE if writable else PyBUF_SIMPLE
        )
        self.count += 1
        return <uint8_t*>self.view[self.count - 1].buf

    cdef int* lengths_of(self, object owner, bint writable) except? NULL:
        PyObject_GetBuffer(
            owner, &self.view[self.count], PyBUF_ND | (PyBUF_WRITABLE if writable else 0)
        )
        self.count += 1
        if self.view[self.count - 1].itemsize != 4:
            raise ValueError("the lengths are not integers of 32 bits")
        return <int*>self.view[self.count - 1].buf

    cdef inline Py_ssize_t size(self, int which) noexcept nogil:
        return self.view[which].len


def encode_pages(old, new, Py_ssize_t page_size, out, lengths, bint merge=False):
    """Encode many pages in one call: see proto.xbzrle.encode_pages."""
    cdef Buffers buffers = Buffers.__new__(Buffers)
    cdef const uint8_t* before = buffers.bytes_of(old, False)
    cdef const uint8_t* after = buffers.bytes_of(new, False)
    cdef uint8_t* to = buffers.bytes_of(out, True)
    cdef int* lengths_at = buffers.lengths_of(lengths, True)
    cdef Py_ssize_t pages = buffers.size(3) // 4, i, n = 0, length
    if not 1 <= page_size <= MAX_PAGE_SIZE:
        raise ValueError(f"a page of {page_size} bytes: it must have 1 to {MAX_PAGE_SIZE}")
    if buffers.size(0) != pages * page_size or buffers.size(1) != pages * page_size:
        raise ValueError(
            f"{buffers.size(0)} and {buffers.size(1)} bytes are not {pages} pages of {page_size}"
        )
    if buffers.size(2) < (pages + 1) * page_size + WIDE:
        raise ValueError(
            f"{buffers.size(2)} bytes of room: {pages} deltas can need up to "
            f"{(pages + 1) * page_size + WIDE}"
        )
    with nogil:
        for i in range(pages):
            length = encode_page(
                before + i * page_size, after + i * page_size, page_size, to + n, page_size,
                merge, NULL,
            )
            lengths_at[i] = <int>length
            if length > 0:
                n += length
    return n


# ---------------------------------------------------------------- decoding

cdef void undo(
    const uint8_t* delta, Py_ssize_t stop, uint8_t* page, const uint8_t* saved
) noexcept nogil:
    """Undo the runs of the first `stop` bytes of a delta, which are valid, from `saved`."""
    cdef Py_ssize_t i = 0, at = 0
    cdef uint64_t run = 0
    while i < stop:
        i += get_uleb(delta + i, stop - i, 2, &run)
        at += run
        i += get_uleb(delta + i, stop - i, 2, &run)
        memcpy(page + at, saved, run)
        saved += run
        i += run
        at += run


cdef Py_ssize_t decode_page(
    const uint8_t* delta, Py_ssize_t length, uint8_t* page, Py_ssize_t size
) noexcept nogil:
    """Apply a delta to a page of at most MAX_PAGE_SIZE bytes.

    Returns 0, or a Fault: then the page is as it was.
    """
    cdef uint8_t[MAX_PAGE_SIZE] saved
    cdef uint8_t* old = saved
    cdef Py_ssize_t i = 0, at = 0, start = 0, step, fault = 0
    cdef uint64_t run = 0
    while i < length:
        start = i
        if length - i >= 3 and delta[i] - 1u < 0x7F and delta[i + 1] - 1u < 0x7F:
            at += delta[i]
            run = delta[i + 1]
            i += 2
        else:
            step = read_lengths(delta, length, &i, &at, &run, size)
            if step < 0:
                fault = step
                break
        # A run of one byte is the most common. Its end is known without the length that was just
        # loaded, so the processor can start on the next run early.
        if run == 1 and at < size and i < length:
            old[0] = page[at]
            page[at] = delta[i]
            old += 1
            i += 1
            at += 1
            continue
        if at + <Py_ssize_t>run > size:
            fault = PAST_PAGE
            break
        if i + <Py_ssize_t>run > length:
            fault = PAST_DELTA
            break
        copy_run(old, page + at, run)
        copy_run(page + at, delta + i, run)
        old += run
        i += run
        at += run
    if fault:
        undo(delta, start, page, saved)
    return fault


# Inline: called, it takes the addresses of decode_page's counters, which then live in memory, and
# decoding takes up to 1.6 times as long.
cdef inline Py_ssize_t read_lengths(
    const uint8_t* delta, Py_ssize_t length, Py_ssize_t* i, Py_ssize_t* at, uint64_t* run,
    Py_ssize_t size,
) noexcept nogil:
    """Read the two lengths of a run with every check. Move `i` and `at`, or return a Fault."""
    cdef Py_ssize_t step
    if length - i[0] < 2:
        return SHORT
    step = get_uleb(delta + i[0], length - i[0], 2, run)
    if step < 0:
        return step
    if i[0] and run[0] == 0:
        return ZERO_RUN
    i[0] += step
    at[0] += run[0]
    if at[0] > size:
        return PAST_PAGE
    if length - i[0] < 2:
        return SHORT
    step = get_uleb(delta + i[0], length - i[0], 2, run)
    if step < 0:
        return step
    if run[0] == 0:
        return EMPTY_RUN
    i[0] += step
    return 0


cdef Py_ssize_t check_delta(
    const uint8_t* delta, Py_ssize_t length, Py_ssize_t size, uint64_t* changed
) noexcept nogil:
    """Check a delta without a page. Return 0 and add the bytes it brings to `changed`, or a Fault.
    """
    cdef Py_ssize_t i = 0, at = 0, step
    cdef uint64_t run = 0, brought = 0
    while i < length:
        step = read_lengths(delta, length, &i, &at, &run, size)
        if step < 0:
            return step
        at += run
        if at > size:
            return PAST_PAGE
        if i + <Py_ssize_t>run > length:
            return PAST_DELTA
        i += run
        brought += run
    changed[0] += brought
    return 0


def decode(const uint8_t[::1] delta not None, uint8_t[::1] page not None):
    """Rewrite `page` in place: see proto.xbzrle.decode."""
    cdef Py_ssize_t size = page.shape[0], length = delta.shape[0], fault
    if not 1 <= size <= MAX_PAGE_SIZE:
        raise ValueError(f"a page of {size} bytes: it must have 1 to {MAX_PAGE_SIZE}")
    if length == 0:
        return
    with nogil:
        fault = decode_page(&delta[0], length, &page[0], size)
    if fault:
        raise DecodeError(f"bad XBZRLE delta: {FAULTS[fault]}")


def decode_pages(deltas, lengths, pages, Py_ssize_t page_size):
    """Apply many deltas in one call: see proto.xbzrle.decode_pages."""
    cdef Buffers buffers = Buffers.__new__(Buffers)
    cdef const uint8_t* data = buffers.bytes_of(deltas, False)
    cdef const int* lengths_at = buffers.lengths_of(lengths, False)
    cdef uint8_t* target = buffers.bytes_of(pages, True)
    cdef Py_ssize_t count = buffers.size(1) // 4, i = 0, at = 0, fault = 0
    if not 1 <= page_size <= MAX_PAGE_SIZE or buffers.size(2) != count * page_size:
        raise ValueError(f"{buffers.size(2)} bytes are not {count} pages of {page_size}")
    with nogil:
        while i < count:
            if lengths_at[i] > 0:
                if at + lengths_at[i] > buffers.size(0):
                    fault = SHORT
                else:
                    fault = decode_page(data + at, lengths_at[i], target + i * page_size, page_size)
                if fault:
                    break
                at += lengths_at[i]
            i += 1
    if fault:
        raise DecodeError(f"page {i}: bad XBZRLE delta: {FAULTS[fault]}")
