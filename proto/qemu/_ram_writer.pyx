# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""Writes batches of pages as the records of QEMU's RAM sections, without the GIL.

A QEMU that has read half a batch cannot give it back. So a batch is checked whole before the first
byte of it is written: its layout, its raw pages against their check, and each delta. QEMU's own
decoder would write the part of a bad delta that comes before the fault.

    begin(head, data)   check all, write nothing
    fill(buffer)        write as many records as fit; 0: the batch is done
    drop                forget the batch, which may be half written only if the stream is given up

A batch of small deltas grows when it becomes records: QEMU has a head of eight bytes or more for
each page, and writes each page of a run of zeros by itself. So `fill` ends while there is still
room for the longest record, goes on in the next call, and needs no buffer of the batch's size.

The readable twin is proto/qemu/_ram_writer_twin.py.
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from proto.codec._batch cimport HEAD, OP_DELTA, OP_RAW, Record, add_to_check, read_record
from proto.codec._bits cimport get_bit, set_bit
from proto.codec._xbzrle cimport check_delta
from proto.codec._faults cimport BAD_CHECK, BAD_DATA, NO_BASE, PAST_GUEST
from proto.codec._hashes cimport PageHashes
from proto.qemu._ram cimport ENCODING, FLAG_CONTINUE, FLAG_PAGE, FLAG_XBZRLE, FLAG_ZERO, MAX_NAME
from proto.qemu._ram_reader cimport Blocks

from proto.codec.faults import FAULTS
from proto.wire.errors import DecodeError

cdef extern from "endian.h" nogil:
    uint64_t be64toh(uint64_t)
    uint64_t htobe64(uint64_t)


cdef class RamWriter:
    """Writes batches as records, one batch after the other: `begin`, then `fill` until it gives 0.

    hashes -- of the guest; only their key is used, for the check of raw pages
    blocks -- (name, pages) of each, as the RamReader has them that the pages come from
    """

    cdef Blocks blocks
    cdef PageHashes hashes
    cdef Py_ssize_t page_size
    cdef uint8_t* received
    cdef Py_ssize_t block       # of the last record, -1 at first
    cdef const uint8_t[::1] head
    cdef const uint8_t[::1] data
    cdef Py_ssize_t head_at     # of the next record
    cdef Py_ssize_t data_at     # of the next raw page
    cdef uint64_t next_page
    cdef Record record
    cdef uint64_t done          # pages of it
    cdef readonly uint64_t received_pages
    cdef readonly uint64_t zero
    cdef readonly uint64_t raw
    cdef readonly uint64_t delta

    def __cinit__(self, PageHashes hashes not None, blocks):
        self.blocks = Blocks(blocks)
        self.hashes = hashes
        self.page_size = hashes.page_size
        if self.blocks.firsts[self.blocks.count] != hashes.pages:
            raise ValueError("the blocks have other pages than the guest")
        self.block = -1
        self.head = self.data = None
        self.received = <uint8_t*>calloc((hashes.pages + 63) // 64, 8)
        if self.received == NULL:
            raise MemoryError(f"no memory to track {hashes.pages} pages")

    def __dealloc__(self):
        free(self.received)

    def begin(self, const uint8_t[::1] head not None, const uint8_t[::1] data not None):
        """Check a batch whole, and have `fill` write it.

        Raises DecodeError for a batch that is wrong; nothing has changed then. Raises ValueError if
        the last batch was not written to its end.
        """
        cdef Py_ssize_t size = head.shape[0], i = HEAD, step = 0, raw_pages, k, used = 0
        cdef uint64_t page, next_page, check, seen = 0, changed = 0
        cdef Record record
        if self.head is not None:
            raise ValueError("the last batch was not written to its end")
        if size <= HEAD:
            raise DecodeError(f"a batch of {size} bytes holds no record")
        memcpy(&page, &head[4], 8)
        memcpy(&check, &head[12], 8)
        page = be64toh(page)
        if page >= self.hashes.pages:
            raise DecodeError(f"page {page}: {FAULTS[PAST_GUEST]}")
        raw_pages = data.shape[0] // self.page_size
        next_page = page
        with nogil:
            for k in range(raw_pages):
                seen = add_to_check(seen, self.hashes.hash_of(&data[k * self.page_size]))
            if seen != be64toh(check) or raw_pages * self.page_size != data.shape[0]:
                step = BAD_CHECK
            while step >= 0 and i < size:
                step = read_record(
                    &head[i], size - i, self.page_size, self.hashes.pages, next_page, &record
                )
                if step < 0:
                    break
                page = record.first
                if record.op == OP_RAW:
                    used += record.count
                    if used > raw_pages:
                        step = BAD_DATA
                        break
                elif record.op == OP_DELTA:
                    if not get_bit(self.received, record.first):
                        step = NO_BASE
                        break
                    k = check_delta(record.delta, record.length, self.page_size, &changed)
                    if k < 0:
                        step = k
                        break
                next_page = record.first + record.count
                i += step
            if step >= 0 and used != raw_pages:
                step = BAD_DATA
        if step < 0:
            raise DecodeError(f"page {page}, byte {i} of the batch: {FAULTS[step]}")
        memcpy(&next_page, &head[4], 8)
        self.head, self.data = head, data
        self.head_at, self.data_at, self.next_page = HEAD, 0, be64toh(next_page)
        self.record.count = self.done = 0

    def drop(self):
        """Drop the batch, whether it was written to its end or not."""
        self.head = self.data = None

    def fill(self, uint8_t[::1] out not None):
        """Write records of the batch into `out`, as many as fit whole. Return how many bytes.

        0 means that the batch is over. Raises ValueError if `out` is too short for one record.
        """
        cdef Py_ssize_t used = 0, room = out.shape[0], step
        if room < 16 + MAX_NAME + self.page_size:
            raise ValueError("no room for a page")
        if self.head is None:
            return 0
        with nogil:
            while room - used >= 16 + MAX_NAME + self.page_size:
                if self.done == self.record.count:
                    if self.head_at == self.head.shape[0]:
                        break
                    step = read_record(
                        &self.head[self.head_at], self.head.shape[0] - self.head_at,
                        self.page_size, self.hashes.pages, self.next_page, &self.record,
                    )
                    self.head_at += step    # `begin` has read it, so it is no fault
                    self.next_page = self.record.first + self.record.count
                    self.done = 0
                used += self.put(&out[used], self.record.first + self.done)
                self.done += 1
        if used == 0:
            self.drop()
        return used

    cdef Py_ssize_t put(self, uint8_t* out, uint64_t page) noexcept nogil:
        """Write one page of the present record. Return how many bytes that took."""
        cdef uint64_t word
        cdef Py_ssize_t i = 8, length
        cdef Py_ssize_t block = self.block if self.block >= 0 else 0
        while page >= self.blocks.firsts[block + 1]:
            block += 1
        while page < self.blocks.firsts[block]:
            block -= 1
        word = (page - self.blocks.firsts[block]) * self.page_size
        if block == self.block:
            word |= FLAG_CONTINUE
        else:
            length = self.blocks.lengths[block]
            out[i] = <uint8_t>length
            memcpy(out + i + 1, self.blocks.texts[block], length)
            i += 1 + length
            self.block = block
        if self.record.op == OP_RAW:
            word |= FLAG_PAGE
            memcpy(out + i, &self.data[self.data_at], self.page_size)
            self.data_at += self.page_size
            i += self.page_size
            self.raw += 1
        elif self.record.op == OP_DELTA:
            word |= FLAG_XBZRLE
            length = self.record.length
            out[i] = ENCODING
            out[i + 1] = <uint8_t>(length >> 8)
            out[i + 2] = <uint8_t>length
            memcpy(out + i + 3, self.record.delta, length)
            i += 3 + length
            self.delta += 1
        else:
            word |= FLAG_ZERO
            out[i] = 0
            i += 1
            self.zero += 1
        if not get_bit(self.received, page):
            set_bit(self.received, page)
            self.received_pages += 1
        word = htobe64(word)
        memcpy(out, &word, 8)
        return i
