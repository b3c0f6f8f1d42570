# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""XBZRLE of one page and of many, without the GIL.

Encoding lists the runs in which two pages differ (proto/_diff.h, one kernel per instruction set)
and writes them out. Decoding reads all lengths of a delta first, comparing each with what is left,
and copies only when all are right: a bad delta leaves the page as it was.

The readable twin of this file is in proto/_twin.py; the two give the same bytes on every input.
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

from proto.errors import DecodeError

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

FAULTS = {
    SHORT: "the data ends inside a record",
    BAD_LENGTH: "a length does not end where it must",
    ZERO_RUN: "an empty zero run inside a delta",
    PAST_PAGE: "a run goes past the end of the page",
    EMPTY_RUN: "an empty non-zero run",
    PAST_DELTA: "a non-zero run goes past the end of the delta",
    BAD_OP: "an unknown record type",
    PAST_GUEST: "a page number outside the guest",
    NO_BASE: "a delta for a page that was never sent",
    EMPTY_DELTA: "a delta with no bytes, or longer than a page",
    BAD_DATA: "the raw records do not name as many pages as came",
    BAD_CHECK: "the content of its raw pages does not match their check",
}

cdef enum:
    WIDE = 32                   # runs of up to so many bytes are copied by one wide store

cdef uint8_t[MAX_PAGE] ZERO_PAGE
memset(ZERO_PAGE, 0, MAX_PAGE)

cdef xb_diff_fn diff_runs = NULL


def use_simd(name=None):
    """Chooses the kernel that compares pages: the best this processor has, or the one named.

    Raises ImportError for one that is unknown or that this processor cannot run. Returns its name.
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
    """The kernels of this build, and whether this processor can run them."""
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


# ---------------------------------------------------------------- ULEB128

cdef Py_ssize_t put_uleb(uint8_t* at, uint64_t value) noexcept nogil:
    cdef Py_ssize_t n = 0
    while value >= 0x80:
        at[n] = <uint8_t>(value & 0x7F) | 0x80
        value >>= 7
        n += 1
    at[n] = <uint8_t>value
    return n + 1


cdef Py_ssize_t get_uleb(
    const uint8_t* at, Py_ssize_t left, Py_ssize_t most, uint64_t* value
) noexcept nogil:
    """Reads at most `most` bytes (9 at the most: no shift leaves 64 bits); a Fault if it cannot."""
    cdef Py_ssize_t n = 0
    cdef uint64_t result = 0
    while n < most:
        if n >= left:
            return SHORT
        result |= <uint64_t>(at[n] & 0x7F) << (7 * n)
        n += 1
        if at[n - 1] < 0x80:
            value[0] = result
            return n
    return BAD_LENGTH


cdef inline Py_ssize_t put_length(uint8_t* at, unsigned int value) noexcept nogil:
    """ULEB128 of a length within a page: one or two bytes, 16384 alone takes three."""
    if value < 0x80:
        at[0] = <uint8_t>value
        return 1
    at[0] = <uint8_t>(value | 0x80)
    if value < 0x4000:
        at[1] = <uint8_t>(value >> 7)
        return 2
    return put_uleb(at, value)


cdef inline void copy_run(uint8_t* to, const uint8_t* data, Py_ssize_t n) noexcept nogil:
    """Copies exactly `n` bytes, n > 0: from either end, in the widest pieces that fit."""
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
    """The delta from `old` to `new`: its length, 0 for equal pages, -1 where it overflows.

    out   -- takes the delta; 2 * size + WIDE bytes, since it is measured once it is written
    room  -- the longest delta that is of use, at most `size`
    merge -- shorter than canonical: gaps of one, some of two equal bytes go with their neighbours
    keep  -- NULL, or a page equal to `old` (it may be `old`) that becomes what the delta makes of
             it; after -1 its content is undefined

    `new` may be written by others meanwhile: each byte that goes into the delta is read from it
    once and from there goes to `keep`, so `keep` is what the receiver of the delta will have.

    A delta overflows exactly where QEMU's encoder says so: it wants two bytes free before each
    length, also before that of the equal bytes at the end of the page, which is never sent.
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
        # What a wide store puts behind the run is overwritten by what follows.
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
    """The delta that turns `old` into `new`: see proto.xbzrle.encode."""
    cdef Py_ssize_t size = old.shape[0], n
    cdef uint8_t[2 * MAX_PAGE + WIDE] out
    if new.shape[0] != size or not 1 <= size <= MAX_PAGE:
        raise ValueError(
            f"pages of {size} and {new.shape[0]} bytes: they must be equally long, 1 to {MAX_PAGE}"
        )
    with nogil:
        n = encode_page(&old[0], &new[0], size, out, size, merge, NULL)
    return None if n < 0 else PyBytes_FromStringAndSize(<char*>out, n)


cdef class Buffers:
    """Up to four buffers of a call: a tenth of what typed memoryviews cost to set up."""

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
    """Encodes many pages in one call: see proto.xbzrle.encode_pages."""
    cdef Buffers held = Buffers.__new__(Buffers)
    cdef const uint8_t* before = held.bytes_of(old, False)
    cdef const uint8_t* after = held.bytes_of(new, False)
    cdef uint8_t* to = held.bytes_of(out, True)
    cdef int* told = held.lengths_of(lengths, True)
    cdef Py_ssize_t pages = held.size(3) // 4, i, n = 0, length
    if not 1 <= page_size <= MAX_PAGE:
        raise ValueError(f"a page of {page_size} bytes: it must have 1 to {MAX_PAGE}")
    if held.size(0) != pages * page_size or held.size(1) != pages * page_size:
        raise ValueError(
            f"{held.size(0)} and {held.size(1)} bytes are not {pages} pages of {page_size}"
        )
    if held.size(2) < (pages + 1) * page_size + WIDE:
        raise ValueError(
            f"{held.size(2)} bytes of room: {pages} deltas can need up to "
            f"{(pages + 1) * page_size + WIDE}"
        )
    with nogil:
        for i in range(pages):
            length = encode_page(
                before + i * page_size, after + i * page_size, page_size, to + n, page_size,
                merge, NULL,
            )
            told[i] = <int>length
            if length > 0:
                n += length
    return n


# ---------------------------------------------------------------- decoding

cdef void undo(
    const uint8_t* delta, Py_ssize_t stop, uint8_t* page, const uint8_t* saved
) noexcept nogil:
    """Gives the runs of the valid first `stop` bytes of a delta their old content again."""
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
    """Applies a delta to a page of at most MAX_PAGE bytes; 0, or a Fault and nothing is changed.

    One pass: each run is checked, its old bytes are saved, and it is copied.
    """
    cdef uint8_t[MAX_PAGE] saved
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
        if run == 1 and at < size and i < length:   # the commonest: the next needs no load
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


cdef Py_ssize_t read_lengths(
    const uint8_t* delta, Py_ssize_t length, Py_ssize_t* i, Py_ssize_t* at, uint64_t* run,
    Py_ssize_t size,
) noexcept nogil:
    """The two lengths of a record, the slow and complete way: moves `i` and `at`, or a Fault."""
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


def decode(const uint8_t[::1] delta not None, uint8_t[::1] page not None):
    """Rewrites `page` in place: see proto.xbzrle.decode."""
    cdef Py_ssize_t size = page.shape[0], length = delta.shape[0], fault
    if not 1 <= size <= MAX_PAGE:
        raise ValueError(f"a page of {size} bytes: it must have 1 to {MAX_PAGE}")
    if length == 0:
        return
    with nogil:
        fault = decode_page(&delta[0], length, &page[0], size)
    if fault:
        raise DecodeError(f"bad XBZRLE delta: {FAULTS[fault]}")


def decode_pages(deltas, lengths, pages, Py_ssize_t page_size):
    """Applies many deltas in one call: see proto.xbzrle.decode_pages."""
    cdef Buffers held = Buffers.__new__(Buffers)
    cdef const uint8_t* data = held.bytes_of(deltas, False)
    cdef const int* told = held.lengths_of(lengths, False)
    cdef uint8_t* target = held.bytes_of(pages, True)
    cdef Py_ssize_t count = held.size(1) // 4, i = 0, at = 0, fault = 0
    if not 1 <= page_size <= MAX_PAGE or held.size(2) != count * page_size:
        raise ValueError(f"{held.size(2)} bytes are not {count} pages of {page_size}")
    with nogil:
        while i < count:
            if told[i] > 0:
                if at + told[i] > held.size(0):
                    fault = SHORT
                else:
                    fault = decode_page(data + at, told[i], target + i * page_size, page_size)
                if fault:
                    break
                at += told[i]
            i += 1
    if fault:
        raise DecodeError(f"page {i}: bad XBZRLE delta: {FAULTS[fault]}")
