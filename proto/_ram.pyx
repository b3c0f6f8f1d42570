# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""The pages in QEMU's migration stream: found on their way in, written on their way out.

    a RAM section:  (word [n name] body)*     word = offset in its block | flags, big-endian
    flags           ZERO 02: a byte   PAGE 08: a page   XBZRLE 40: 01, u16 length, a delta
                    EOS 10: the section's end           CONTINUE 20: no name, the block is the last

The format is that of QEMU's RAM section version 4. The readable twin is proto/_twin_ram.py.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from proto._batch cimport STEP, PageHashes, Record, read_record
from proto._bits cimport get_bit, set_bit
from proto._codec cimport (
    BAD_CHECK,
    BAD_DATA,
    MAX_PAGE,
    NO_BASE,
    PAST_GUEST,
    decode_page,
)

from proto._codec import FAULTS
from proto.errors import DecodeError, StreamError

cdef extern from "endian.h" nogil:
    uint64_t be64toh(uint64_t)
    uint64_t htobe64(uint64_t)

cdef packed struct StreamRecord:
    uint64_t page
    uint64_t at                 # of its body in the data
    uint32_t length
    uint32_t kind

cdef enum:
    MAX_BLOCKS = 1024
    MAX_NAME = 255
    RECORDS = 4096              # of one scan
    ZERO_KIND = 0
    PAGE_KIND = 1
    DELTA_KIND = 2
    FLAG_ZERO = 0x02
    FLAG_MEM_SIZE = 0x04
    FLAG_PAGE = 0x08
    FLAG_EOS = 0x10
    FLAG_CONTINUE = 0x20
    FLAG_XBZRLE = 0x40
    ENCODING = 1                # XBZRLE, the only one there is
    HEAD = 20
    OP_ZERO = 0x00
    OP_RAW = 0x40
    OP_DELTA = 0x80

SCAN_MORE, SCAN_FULL, SCAN_END = range(3)
SCAN_RECORDS = RECORDS

FLAG_NAMES = {
    0x01: "FULL, which no QEMU since 2009 writes",
    0x04: "MEM_SIZE, though the blocks are known",
    0x80: "HOOK: RDMA cannot be carried",
    0x100: "COMPRESS_PAGE: switch the capability compress off",
    0x200: "MULTIFD_FLUSH: switch the capability multifd off",
}


cdef class Blocks:
    """The RAM blocks of a guest; its pages are numbered through all of them."""

    cdef Py_ssize_t count
    cdef uint64_t* firsts       # and one more: the number of pages
    cdef list names
    cdef const uint8_t** texts
    cdef Py_ssize_t* lengths

    def __cinit__(self, blocks):
        cdef Py_ssize_t i
        cdef uint64_t pages = 0
        self.names = [bytes(name) for name, _ in blocks]
        self.count = len(self.names)
        if not 0 < self.count <= MAX_BLOCKS:
            raise ValueError(f"{self.count} blocks: a guest has 1 to {MAX_BLOCKS}")
        self.firsts = <uint64_t*>calloc(self.count + 1, 8)
        self.texts = <const uint8_t**>calloc(self.count, sizeof(void*))
        self.lengths = <Py_ssize_t*>calloc(self.count, sizeof(Py_ssize_t))
        if not (self.firsts and self.texts and self.lengths):
            raise MemoryError("no memory for the list of blocks")
        for i in range(self.count):
            name = self.names[i]
            if not 0 < len(name) <= MAX_NAME:
                raise ValueError(f"a block's name has {len(name)} bytes")
            self.texts[i] = <const uint8_t*><const char*>name
            self.lengths[i] = len(name)
            self.firsts[i] = pages
            pages += blocks[i][1]
        self.firsts[self.count] = pages

    def __dealloc__(self):
        free(self.firsts)
        free(self.texts)
        free(self.lengths)

    cdef Py_ssize_t find(self, const uint8_t* name, Py_ssize_t length) noexcept nogil:
        cdef Py_ssize_t i
        for i in range(self.count):
            if self.lengths[i] == length and memcmp(self.texts[i], name, length) == 0:
                return i
        return -1


cdef class RamReader:
    """Finds the pages in RAM sections.

    blocks -- (name, pages) of each, in the order of the stream's list

    `records` has 24 bytes for each record of the last scan, in the order of this machine: page
    (u64), where its body begins in the data (u64), its length (u32), its kind (u32): 0 zero,
    1 page, 2 delta.
    """

    cdef Blocks blocks
    cdef Py_ssize_t page_size
    cdef Py_ssize_t block       # of the last record, -1 at first
    cdef bytearray table
    cdef StreamRecord* table_at
    cdef readonly object records
    cdef readonly uint64_t zero
    cdef readonly uint64_t raw
    cdef readonly uint64_t delta
    cdef readonly uint64_t delta_bytes

    def __cinit__(self, blocks, Py_ssize_t page_size):
        if not 1024 <= page_size <= MAX_PAGE or page_size & (page_size - 1):
            raise ValueError(f"a page of {page_size} bytes: a power of two from 1024 to 16384")
        self.blocks = Blocks(blocks)
        self.page_size = page_size
        self.block = -1
        self.table = bytearray(RECORDS * sizeof(StreamRecord))
        self.table_at = <StreamRecord*><char*>self.table
        self.records = memoryview(self.table)

    def scan(self, const uint8_t[::1] data not None, Py_ssize_t start, Py_ssize_t end):
        """Walks records of data[start:end].

        Returns (where the first record begins that was not read, how many were, why it stopped):
        SCAN_MORE: the next one needs more bytes, or another look. SCAN_FULL: the table is full.
        SCAN_END: the section is over, and the place is behind that. Raises StreamError where the
        first record is none; `at` says where that is.
        """
        cdef Py_ssize_t at = start, i, length, block, count = 0
        cdef int why = 0, fault = 0
        cdef uint64_t word, offset, flags = 0, kind, page
        cdef const uint8_t* d
        cdef StreamRecord* record
        if not 0 <= start <= end <= data.shape[0]:
            raise ValueError("there are fewer bytes than that")
        if start == end:
            return start, 0, SCAN_MORE
        d = &data[0]
        with nogil:
            while True:
                if end - at < 8:
                    break
                memcpy(&word, d + at, 8)
                word = be64toh(word)
                flags = word & <uint64_t>(self.page_size - 1)
                offset = word - flags
                i = at + 8
                if flags == FLAG_EOS and offset == 0:
                    at, why = i, 2
                    break
                if count == RECORDS:
                    why = 1
                    break
                kind = flags & ~<uint64_t>FLAG_CONTINUE
                if kind != FLAG_PAGE and kind != FLAG_ZERO and kind != FLAG_XBZRLE:
                    fault = 7
                    break
                block = self.block
                if flags & FLAG_CONTINUE:
                    if block < 0:
                        fault = 1
                        break
                else:
                    if i >= end:
                        break
                    length = d[i]
                    i += 1
                    if length > end - i:
                        break
                    block = self.blocks.find(d + i, length)
                    if block < 0:
                        fault = 2
                        break
                    i += length
                page = self.blocks.firsts[block] + offset // self.page_size
                if page >= self.blocks.firsts[block + 1]:
                    fault = 3
                    break
                record = self.table_at + count
                record.page = page
                if kind == FLAG_PAGE:
                    if end - i < self.page_size:
                        break
                    record.kind, record.at, record.length = PAGE_KIND, i, self.page_size
                    i += self.page_size
                    self.raw += 1
                elif kind == FLAG_ZERO:
                    if i >= end:
                        break
                    if d[i] != 0:
                        fault = 4
                        break
                    record.kind, record.at, record.length = ZERO_KIND, i, 0
                    i += 1
                    self.zero += 1
                else:
                    if end - i < 3:
                        break
                    length = (<Py_ssize_t>d[i + 1] << 8) | d[i + 2]
                    if d[i] != ENCODING:
                        fault = 5
                        break
                    if length > self.page_size:
                        fault = 6
                        break
                    i += 3
                    if length > end - i:
                        break
                    record.kind, record.at, record.length = DELTA_KIND, i, length
                    i += length
                    self.delta += 1
                    self.delta_bytes += length
                self.block = block
                count += 1
                at = i
        if fault and not count:
            raise StreamError(self.reason(fault, flags, data, at), at)
        return at, count, why

    cdef str reason(self, int fault, uint64_t flags, data, Py_ssize_t at):
        if fault == 1:
            return "a page of the same block as the last one, but it is the first"
        if fault == 2:
            length = data[at + 8]
            name = bytes(data[at + 9 : at + 9 + length])
            return f"a page of a block {name!r}, which is not in the list"
        if fault == 3:
            return "a page outside its block"
        if fault == 4:
            return "a page filled with something else than zeros"
        if fault == 5:
            return "a delta of an unknown encoding"
        if fault == 6:
            return "a delta that is longer than a page"
        for flag, name in FLAG_NAMES.items():
            if flags & flag:
                return f"a record with the flag {name}"
        return f"a record with the flags {flags:#x}, which mean nothing here"


cdef class RamWriter:
    """Writes batches of pages as the records of RAM sections.

    hashes -- of the guest; only its key is used
    blocks -- as of the RamReader that the pages come from
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
        """Takes in a batch, which is wholly right: its layout, its raw pages, and its deltas.

        Raises DecodeError; nothing is taken in then. Raises ValueError where the last batch was not
        written to its end.
        """
        cdef Py_ssize_t size = head.shape[0], i = HEAD, step = 0, raw_pages, k, used = 0
        cdef uint64_t page, next_page, check, seen = 0
        cdef Record record
        cdef uint8_t[MAX_PAGE] scratch
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
        memset(scratch, 0, self.page_size)
        with nogil:
            for k in range(raw_pages):
                seen = seen * STEP + self.hashes.hash_of(&data[k * self.page_size])
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
                    k = decode_page(record.delta, record.length, scratch, self.page_size)
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
        """Lets go of the batch, written to its end or not."""
        self.head = self.data = None

    def fill(self, uint8_t[::1] out not None):
        """Writes as many of its records as fit whole; how many bytes. 0: the batch is over.

        Raises ValueError where not even one fits for sure.
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
                    self.head_at += step    # it was read before, so it is right
                    self.next_page = self.record.first + self.record.count
                    self.done = 0
                used += self.put(&out[used], self.record.first + self.done)
                self.done += 1
        if used == 0:
            self.drop()
        return used

    cdef Py_ssize_t put(self, uint8_t* out, uint64_t page) noexcept nogil:
        """One page of the record."""
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
