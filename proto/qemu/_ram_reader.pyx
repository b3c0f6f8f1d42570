# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""Finds the pages in QEMU's migration stream, without the GIL.

Python sees a table of up to 4096 records per call and never a single page. The table says where
each page's content is in the data, so nothing is copied; the encoder, the files and the surveys
read it from there. _ram.pxd has the layout of a record.

A record names its block only if that is another one than the record before has (FLAG_CONTINUE). So
the reader keeps the last block from one call to the next, also beyond the end of a section. A page
is known by its number in the guest: blocks are numbered through in the order of the list at the
beginning of the stream.

A record that is not whole yet is left for the next call, and read again from its beginning. The
bytes are another program's: a length or an offset is compared with its block, and with what has
arrived, before anything is read by it. What is no record is a StreamError that says where.

The readable twin is proto/qemu/_ram_reader_twin.py.
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

from proto.codec._batch cimport RAM_DELTA, RAM_PAGE, RAM_ZERO, StreamRecord
from proto.codec._xbzrle cimport check_page_size
from proto.qemu._ram cimport (
    ENCODING,
    FLAG_CONTINUE,
    FLAG_EOS,
    FLAG_PAGE,
    FLAG_XBZRLE,
    FLAG_ZERO,
    MAX_BLOCKS,
    MAX_NAME,
)

from proto.wire.errors import StreamError

cdef extern from "endian.h" nogil:
    uint64_t be64toh(uint64_t)

cdef enum:
    RECORDS = 4096              # of one scan: at most 16 MiB of 4 KiB pages

cdef enum Scan:
    MORE = 0
    FULL = 1
    END = 2

cdef enum Flaw:
    NO_FLAW
    NO_LAST_BLOCK
    UNKNOWN_BLOCK
    PAST_BLOCK
    NOT_ZEROS
    BAD_ENCODING
    LONG_DELTA
    BAD_FLAGS

SCAN_MORE, SCAN_FULL, SCAN_END = MORE, FULL, END
SCAN_RECORDS = RECORDS

FLAG_NAMES = {
    0x01: "FULL, which no QEMU since 2009 writes",
    0x04: "MEM_SIZE, though the blocks are known",
    0x80: "HOOK: RDMA cannot be carried",
    0x100: "COMPRESS_PAGE: switch the capability compress off",
    0x200: "MULTIFD_FLUSH: switch the capability multifd off",
}


cdef class Blocks:
    """The RAM blocks of a guest. Its pages are numbered through all of them, in their order.

    blocks -- (name, pages) of each
    """

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
        """Return the number of a block, or -1. A guest has few, and most records are CONTINUE."""
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
        check_page_size(page_size)
        self.blocks = Blocks(blocks)
        self.page_size = page_size
        self.block = -1
        self.table = bytearray(RECORDS * sizeof(StreamRecord))
        self.table_at = <StreamRecord*><char*>self.table
        self.records = memoryview(self.table)

    def scan(self, const uint8_t[::1] data not None, Py_ssize_t start, Py_ssize_t end):
        """Read records of data[start:end] into `records`.

        Returns (where it stopped, how many records it read, why it stopped):

        SCAN_MORE -- the next record needs more bytes, or is wrong: a second call will tell
        SCAN_FULL -- the table is full
        SCAN_END  -- the section is over, and its end was read

        Raises StreamError if the first record is wrong; `at` of the error says where it begins.
        """
        cdef Py_ssize_t at = start, i, length, block, count = 0
        cdef int why = MORE, flaw = NO_FLAW
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
                    at, why = i, END
                    break
                if count == RECORDS:
                    why = FULL
                    break
                kind = flags & ~<uint64_t>FLAG_CONTINUE
                if kind != FLAG_PAGE and kind != FLAG_ZERO and kind != FLAG_XBZRLE:
                    flaw = BAD_FLAGS
                    break
                block = self.block
                if flags & FLAG_CONTINUE:
                    if block < 0:
                        flaw = NO_LAST_BLOCK
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
                        flaw = UNKNOWN_BLOCK
                        break
                    i += length
                page = self.blocks.firsts[block] + offset // self.page_size
                if page >= self.blocks.firsts[block + 1]:
                    flaw = PAST_BLOCK
                    break
                record = self.table_at + count
                record.page = page
                if kind == FLAG_PAGE:
                    if end - i < self.page_size:
                        break
                    record.kind, record.at, record.length = RAM_PAGE, i, self.page_size
                    i += self.page_size
                    self.raw += 1
                elif kind == FLAG_ZERO:
                    if i >= end:
                        break
                    if d[i] != 0:
                        flaw = NOT_ZEROS
                        break
                    record.kind, record.at, record.length = RAM_ZERO, i, 0
                    i += 1
                    self.zero += 1
                else:
                    if end - i < 3:
                        break
                    length = (<Py_ssize_t>d[i + 1] << 8) | d[i + 2]
                    if d[i] != ENCODING:
                        flaw = BAD_ENCODING
                        break
                    if length > self.page_size:
                        flaw = LONG_DELTA
                        break
                    i += 3
                    if length > end - i:
                        break
                    record.kind, record.at, record.length = RAM_DELTA, i, length
                    i += length
                    self.delta += 1
                    self.delta_bytes += length
                self.block = block
                count += 1
                at = i
        if flaw and not count:
            raise StreamError(self.reason(flaw, flags, data, at), at)
        return at, count, why

    cdef str reason(self, int flaw, uint64_t flags, data, Py_ssize_t at):
        """Return what is wrong with the record at `at`, for a user."""
        if flaw == NO_LAST_BLOCK:
            return "a page of the same block as the last one, but it is the first"
        if flaw == UNKNOWN_BLOCK:
            length = data[at + 8]
            name = bytes(data[at + 9 : at + 9 + length])
            return f"a page of a block {name!r}, which is not in the list"
        if flaw == PAST_BLOCK:
            return "a page outside its block"
        if flaw == NOT_ZEROS:
            return "a page filled with something else than zeros"
        if flaw == BAD_ENCODING:
            return "a delta of an unknown encoding"
        if flaw == LONG_DELTA:
            return "a delta that is longer than a page"
        for flag, name in FLAG_NAMES.items():
            if flags & flag:
                return f"a record with the flag {name}"
        return f"a record with the flags {flags:#x}, which mean nothing here"
