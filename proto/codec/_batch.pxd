"""The layout of a batch, and how one record of it is read (proto/README.md, "PAGES").

    batch   head, then the raw pages
    head    round (4 bytes)  first page (8)  check of the raw pages (8)  record*
    record  operation and gap (1, with 63: and more in ULEB128)  body
    body    ZERO: count (ULEB128)   RAW: count (2 bytes)   DELTA: length (ULEB128) and the delta

`proto/codec/_batch_twin.py` is the readable twin.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from proto.codec._faults cimport BAD_OP, EMPTY_DELTA, PAST_GUEST, SHORT
from proto.codec._uleb cimport get_uleb

cdef enum:
    HEAD = 20                   # bytes before the first record
    OP_ZERO = 0x00
    OP_RAW = 0x40
    OP_DELTA = 0x80
    OP_MASK = 0xC0
    GAP_MASK = 0x3F
    RUN_LIMIT = 0xFFFF          # a raw record counts its pages in 16 bits
    # More than a record takes besides page data: 1 byte, a gap of up to 9, a count of up to 10.
    RECORD_ROOM = 32

# A page that a RamReader (proto/qemu) has found in QEMU's stream, as its table holds it.
cdef packed struct StreamRecord:
    uint64_t page
    uint64_t at                 # of its body in the data
    uint32_t length
    uint32_t kind

cdef enum:
    RAM_ZERO = 0
    RAM_PAGE = 1
    RAM_DELTA = 2

cdef struct Record:
    uint8_t op
    uint64_t first              # page
    uint64_t count              # pages
    const uint8_t* delta
    Py_ssize_t length           # of the delta


cdef inline uint64_t add_to_check(uint64_t check, uint64_t hash) noexcept nogil:
    """Return the check of a batch after one more raw page, by the hash of that page.

    Each page's hash is computed anyway, for the digest of the guest: so the check costs one
    multiplication per page and no second pass over the data.
    """
    return check * 0x9E3779B97F4A7C15u + hash


cdef inline Py_ssize_t read_record(
    const uint8_t* at, Py_ssize_t left, Py_ssize_t page_size, uint64_t pages, uint64_t next_page,
    Record* record,
) noexcept nogil:
    """Read the record at `at`. Return how many bytes it takes, or a Fault.

    left      -- bytes of the batch from `at` on
    next_page -- one past the last page of the record before

    These are hostile bytes: each number is compared with its limit before it is added or used. A
    gap is compared with `pages` before it is added to `next_page`, which is at most `pages` itself,
    so the sum cannot wrap.
    """
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
