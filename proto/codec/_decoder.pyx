# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""The destination's kernel: batches in, guest memory out, without the GIL.

The bytes of a batch are hostile. Each length, count and page number is compared with what is left,
or with the guest, before it is used (read_record). `check` walks a whole batch first and touches
nothing: its caller makes room, in the file behind the memory, for pages that a delta is about to
write, since a write through a mapping of a full file system would be a signal and no error. `apply`
hashes the raw pages and compares them with the check of the batch before it writes any of them.

A batch is read twice. `check` needs no memory of the guest and may run before there is any; `apply`
trusts nothing that `check` found, so that neither is wrong if it is called alone. Records are small
beside pages, so the second walk is cheap.

`written` are the pages that may be other than zeros. `received` are those that the peer has sent: a
delta for any other page has no base, even if the memory happens to be zeros.

Raw pages go into the file with pwrite(2) if there is one: a copy to a fresh mapping takes a fault
per page, and twice the time. Pages of zeros are not written if the memory was zeros there anyway,
so a sparse guest stays sparse.

The readable twin is proto/codec/_decoder_twin.py; the two write the same bytes on every input.
"""

import os

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from proto.codec._batch cimport HEAD, OP_DELTA, OP_RAW, Record, add_to_check, read_record
from proto.codec._bitmaps cimport PrefixSet, ZeroedMemory, new_bitmap
from proto.codec._bits cimport clear_range, get_bit, next_set, set_bit, set_range
from proto.codec._xbzrle cimport decode_page
from proto.codec._faults cimport BAD_CHECK, BAD_DATA, NO_BASE, PAST_GUEST
from proto.codec._hashes cimport PageHashes

from proto.codec.faults import FAULTS
from proto.wire.errors import DecodeError

cdef extern from "endian.h" nogil:
    uint64_t be64toh(uint64_t)

cdef extern from "unistd.h" nogil:
    ssize_t pwrite(int, const void*, size_t, long)


cdef class PageDecoder:
    """Applies batches to the destination's memory, and knows which pages it has received.

    hashes -- keeps the hashes of raw and zero pages; a delta makes its page stale
    size   -- bytes of the guest: what its last page has beyond them is not written to a file
    zeroed -- the memory is all zeros at first, so that pages of zeros need not be written
    recent -- a bit per page that a delta has changed since `end_round`
    """

    cdef readonly uint64_t pages
    cdef readonly Py_ssize_t page_size
    cdef readonly uint64_t size
    cdef readonly object recent
    cdef PageHashes hashes
    cdef ZeroedMemory recent_memory
    cdef ZeroedMemory written_memory
    cdef uint8_t* recent_at
    cdef uint8_t* written
    cdef PrefixSet received
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
        self.recent_memory = new_bitmap(self.pages)
        self.written_memory = new_bitmap(self.pages)
        self.received = PrefixSet(self.pages)
        self.recent = memoryview(self.recent_memory)
        self.recent_at = self.recent_memory.at
        self.written = self.written_memory.at
        if not zeroed:
            memset(self.written, 0xFF, (self.pages + 63) // 64 * 8)

    @property
    def received_pages(self):
        """How many pages were received, now or before."""
        return self.received.prefix + self.received.beyond

    def mark_received(self, uint64_t first, uint64_t count, bint written):
        """Count pages as received that are here from before: a delta may change them.

        written -- their content may be other than zeros: then their hashes are stale
        """
        if first > self.pages or count > self.pages - first:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        with nogil:
            self.received.add_range(first, first + count)
            if written:
                set_range(self.written, first, first + count)
                set_range(self.hashes.stale_at, first, first + count)

    def end_round(self):
        """Forget which pages are `recent`."""
        with nogil:
            clear_range(self.recent_at, 0, self.pages)

    cdef Py_ssize_t check_records(
        self, const uint8_t* at, Py_ssize_t size, Py_ssize_t data_bytes, Py_ssize_t* where,
        uint64_t* page, list fresh,
    ):
        """Walk the records of a batch. Return 0, or a Fault with its byte and its page."""
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
                # pwrite(2) reports a full disk; a delta is written through the mapping.
                if not get_bit(self.written, record.first):
                    fresh.append(record.first)
            next_page = record.first + record.count
            i += step
        # `raw` cannot wrap: a raw record has three bytes or more, and counts 16 bits of pages.
        return 0 if raw * self.page_size == <uint64_t>data_bytes else BAD_DATA

    def check(self, const uint8_t[::1] head not None, Py_ssize_t data_bytes):
        """Check the records of a batch, but not the inside of its deltas. Change nothing.

        data_bytes -- length of its raw pages

        Returns (its round, pages that a delta writes for the first time); the caller makes room
        for these pages. Raises DecodeError, which names the page and the byte.
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
        """Write a batch into the guest's memory. Return how many pages it held.

        data      -- its raw pages
        memory    -- whole pages, at least those of the guest
        fd        -- of the file that `memory` maps: raw pages are written to it with pwrite(2); -1
                     if there is none
        fd_offset -- byte of that file at which the guest begins

        Raises DecodeError at the first record that is wrong; the records before it are applied. No
        raw page is written unless all of them match the check of the batch, and no byte of a delta
        that is wrong anywhere. Raises OSError if writing fails.
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
            # All hashes come before the first write, since one check covers all raw pages; they
            # are kept, so that no page is hashed twice.
            for k in range(raw_pages):
                values[k] = self.hashes.hash_of(content + k * self.page_size)
                seen = add_to_check(seen, values[k])
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
                    # Hashing the page now would read all of it for a delta of a few bytes, and the
                    # next round probably changes it again: its hash is stale until `settle`.
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
        """Write whole pages to the file, as far as the guest goes. Return 0 or an errno."""
        cdef uint64_t offset = first * self.page_size, length = count * self.page_size
        cdef ssize_t n
        # The guest may end within its last page; the file must not be longer than the guest.
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
        """Make pages zeros. Those that were never written are zeros already."""
        cdef uint64_t page = next_set(self.written, first, end)
        while page < end:
            memset(memory + page * self.page_size, 0, self.page_size)
            page = next_set(self.written, page + 1, end)
        self.received.add_range(first, end)
        self.hashes.note_zeros(first, end)
