# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""Checks the batches of a captured stream, and counts what they hold, for migrate-stream.

The readable twin is proto/codec/_batch_survey_twin.py.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from proto.codec._batch cimport HEAD, OP_DELTA, OP_RAW, Record, add_to_check, read_record
from proto.codec._bitmaps cimport PrefixSet
from proto.codec._xbzrle cimport MAX_PAGE_SIZE, check_delta
from proto.codec._faults cimport BAD_CHECK, BAD_DATA, PAST_GUEST
from proto.codec._hashes cimport PageHashes

from proto.codec.faults import FAULTS

cdef extern from "endian.h" nogil:
    uint64_t be64toh(uint64_t)

# Pages of the largest guest (MAX_PAGES in proto/README.md).
cdef uint64_t MOST_PAGES = <uint64_t>1 << 32


cdef class BatchSurvey:
    """Reads bodies of PAGES without a guest.

    pages, page_size -- of the guest, 0 if not known
    seed             -- of its page hashes; empty if not known: raw pages are not checked then
    whole            -- the stream holds every page that is sent, so a delta without a base is wrong
    """

    cdef uint64_t pages
    cdef Py_ssize_t page_size
    cdef PageHashes hashes
    cdef PrefixSet received     # nothing unless `whole`
    cdef readonly bint whole

    def __cinit__(self, uint64_t pages, Py_ssize_t page_size, bytes seed, *, bint whole=True):
        if pages > MOST_PAGES or not 0 <= page_size <= MAX_PAGE_SIZE:
            raise ValueError(f"{pages} pages of {page_size} bytes")
        self.pages = pages or MOST_PAGES
        self.page_size = page_size
        self.whole = whole and pages > 0
        self.hashes = PageHashes(1, page_size, seed) if page_size and seed else None
        self.received = PrefixSet(self.pages if self.whole else 1)

    @property
    def received_pages(self):
        """How many pages came at least once; 0 unless `whole`."""
        return self.received.prefix + self.received.beyond

    def read(self, const uint8_t[::1] head not None, const uint8_t[::1] data not None):
        """Read one body.

        Returns (round, first page, zero, raw, delta pages, bytes of deltas, bytes that they change,
        deltas without a base, the byte at which it is wrong, what is wrong there). The counts go up
        to that byte; the text is "" if all is right.
        """
        cdef Record record
        cdef Py_ssize_t i = HEAD, step = 0, size = head.shape[0], k
        cdef Py_ssize_t page_size = self.page_size or MAX_PAGE_SIZE
        cdef uint64_t next_page, check, seen = 0, first
        cdef uint64_t zero = 0, raw = 0, delta = 0, delta_bytes = 0, changed = 0, baseless = 0
        cdef const uint8_t* content = &data[0] if data.shape[0] else NULL
        if size <= HEAD:
            return 0, 0, 0, 0, 0, 0, 0, 0, 0, f"a batch of {size} bytes holds no record"
        memcpy(&next_page, &head[4], 8)
        memcpy(&check, &head[12], 8)
        first = next_page = be64toh(next_page)
        with nogil:
            if next_page >= self.pages:
                i, step = 4, PAST_GUEST
            while step >= 0 and i < size:
                step = read_record(&head[i], size - i, page_size, self.pages, next_page, &record)
                if step < 0:
                    break
                if record.op == OP_DELTA:
                    k = check_delta(record.delta, record.length, page_size, &changed)
                    if k < 0:
                        step = k
                        break
                    delta += 1
                    delta_bytes += record.length
                    if self.whole and not self.received.has(record.first):
                        baseless += 1
                elif record.op == OP_RAW:
                    raw += record.count
                else:
                    zero += record.count
                if self.whole:
                    self.received.add_range(record.first, record.first + record.count)
                next_page = record.first + record.count
                i += step
            if step >= 0:
                if self.page_size == 0 and raw:
                    page_size = data.shape[0] // raw
                if raw * page_size != <uint64_t>data.shape[0]:
                    i, step = size, BAD_DATA
            if step >= 0 and self.hashes is not None:
                for k in range(<Py_ssize_t>raw):
                    seen = add_to_check(seen, self.hashes.hash_of(content + k * page_size))
                if seen != be64toh(check):
                    i, step = 12, BAD_CHECK
        return (
            (<uint32_t>head[0] << 24) | (head[1] << 16) | (head[2] << 8) | head[3], first, zero,
            raw, delta, delta_bytes, changed, baseless, i, FAULTS[step] if step < 0 else "",
        )
