# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""Pages of QEMU's migration stream written into files, and files into such pages, without the GIL.

A file has the pages of one block, one after the other; a page of zeros is a hole in it, if the file
system has holes. The records that a RamReader has found are applied in their order. Raw pages that
follow each other go out in one pwritev(2); a delta reads its page first. A file is written and
never mapped: a full disk is an error then, and not a signal.

The order of records matters: a page may come again, and a delta builds on what came before it. So a
run ends at a record of another kind, and at a page that does not follow the one before.

The readable twin is proto/qemu/_ram_files_twin.py.
"""

import os

from libc.errno cimport EINTR, ENOSYS, EOPNOTSUPP, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from proto.codec._batch cimport RAM_DELTA, RAM_PAGE, RAM_ZERO, StreamRecord
from proto.codec._bits cimport clear_bit, get_bit, set_bit
from proto.codec._xbzrle cimport MAX_PAGE_SIZE, check_page_size, decode_page, is_zero
from proto.qemu._ram cimport FLAG_CONTINUE, FLAG_PAGE, FLAG_ZERO, MAX_NAME

from proto.codec.faults import FAULTS
from proto.wire.errors import DecodeError

cdef extern from "endian.h" nogil:
    uint64_t htobe64(uint64_t)

cdef extern from "unistd.h" nogil:
    ssize_t pread(int, void*, size_t, long)
    ssize_t pwrite(int, const void*, size_t, long)

cdef extern from "sys/uio.h" nogil:
    cdef struct iovec:
        void* iov_base
        size_t iov_len
    ssize_t pwritev(int, const iovec*, int, long)

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <linux/falloc.h>
    static int xb_punch(int fd, long at, long size) {
        return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, size);
    }
    """
    int xb_punch(int, long, long) nogil

cdef enum:
    RUN = 256                   # pages that one call writes; the kernel takes up to 1024 (IOV_MAX)
    BAD_RECORD = 1
    BAD_FILE = 2
    BAD_DELTA = 3


cdef class RamApplier:
    """Writes pages to files.

    blocks -- pages of each block, in the order of the stream's list
    files  -- a descriptor for each, readable and writable: as long as the block, and all zeros
    """

    cdef Py_ssize_t count
    cdef Py_ssize_t page_size
    cdef uint64_t* firsts
    cdef int* files
    cdef uint8_t* filled        # a bit per page that is not a hole
    cdef iovec[RUN] run
    cdef int error              # errno of what failed

    def __cinit__(self, blocks, files, Py_ssize_t page_size):
        cdef Py_ssize_t i
        check_page_size(page_size)
        self.count = len(blocks)
        self.page_size = page_size
        if self.count == 0 or len(files) != self.count:
            raise ValueError(f"{self.count} blocks and {len(files)} files")
        self.firsts = <uint64_t*>calloc(self.count + 1, 8)
        self.files = <int*>calloc(self.count, sizeof(int))
        if self.firsts == NULL or self.files == NULL:
            raise MemoryError("no memory for the list of blocks")
        for i in range(self.count):
            self.files[i] = files[i]
            self.firsts[i + 1] = self.firsts[i] + <uint64_t>blocks[i]
        self.filled = <uint8_t*>calloc((self.firsts[self.count] + 63) // 64, 8)
        if self.filled == NULL:
            raise MemoryError(f"no memory to track {self.firsts[self.count]} pages")

    def __dealloc__(self):
        free(self.firsts)
        free(self.files)
        free(self.filled)

    def apply(
        self, const uint8_t[::1] data not None, const uint8_t[::1] records not None,
        Py_ssize_t count,
    ):
        """Apply the first `count` of RamReader.records, whose bodies are in `data`.

        Raises ValueError for records that are not those of this data; nothing is applied then.
        Raises DecodeError for a bad delta, and OSError if a file cannot be read or written; the
        records before that one are applied.
        """
        cdef Py_ssize_t i = 0, run, block = 0, size = self.page_size
        cdef int fault = 0
        cdef Py_ssize_t why = 0
        cdef const StreamRecord* table
        cdef const StreamRecord* record
        if count < 0 or records.shape[0] < count * <Py_ssize_t>sizeof(StreamRecord):
            raise ValueError("there are fewer records than that")
        if count == 0:
            return
        table = <const StreamRecord*>&records[0]
        with nogil:
            # All records are checked before the first is applied: they index memory and files.
            for i in range(count):
                record = table + i
                if (
                    record.page >= self.firsts[self.count]
                    or record.kind > RAM_DELTA
                    or record.length > <uint64_t>data.shape[0]
                    or record.at > <uint64_t>data.shape[0] - record.length
                    or (record.kind == RAM_PAGE and record.length != <uint64_t>size)
                ):
                    fault = BAD_RECORD
                    break
            i = 0
            while i < count and not fault:
                record = table + i
                # Pages come in ascending order, mostly: the block is the last one or a near one.
                while record.page >= self.firsts[block + 1]:
                    block += 1
                while record.page < self.firsts[block]:
                    block -= 1
                run = 1
                while (
                    run < RUN and i + run < count and record[run].kind == record.kind
                    and record[run].page == record.page + <uint64_t>run
                    and record[run].page < self.firsts[block + 1]
                    and record.kind != RAM_DELTA
                ):
                    run += 1
                if record.kind == RAM_PAGE:
                    fault = self.write(data, record, run, block)
                elif record.kind == RAM_ZERO:
                    fault = self.empty(record.page, run, block)
                else:
                    fault = self.patch(data, record, block, &why)
                i += run
        if fault == BAD_RECORD:
            raise ValueError("records that are not those of this data")
        if fault == BAD_DELTA:
            raise DecodeError(f"page {record.page}: {FAULTS[why]}")
        if fault:
            raise OSError(self.error, os.strerror(self.error))

    cdef long offset(self, uint64_t page, Py_ssize_t block) noexcept nogil:
        """Return the byte of the block's file at which a page begins."""
        return <long>((page - self.firsts[block]) * self.page_size)

    cdef int write(
        self, const uint8_t[::1] data, const StreamRecord* record, Py_ssize_t run, Py_ssize_t block
    ) noexcept nogil:
        """Write `run` raw pages that follow each other."""
        cdef Py_ssize_t i, size = self.page_size, done
        cdef ssize_t n
        cdef long offset = self.offset(record.page, block)
        # The bodies lie apart in the data, with records between them, and together in the file.
        for i in range(run):
            self.run[i].iov_base = <void*>&data[record[i].at]
            self.run[i].iov_len = size
            set_bit(self.filled, record[i].page)
        n = pwritev(self.files[block], self.run, <int>run, offset)
        if n == run * size:
            return 0
        if n < 0:
            if errno != EINTR:
                self.error = errno
                return BAD_FILE
            n = 0
        # A short write says nothing about its reason: write on page by page, for the error.
        i, done = n // size, n % size
        while i < run:
            if self.put(block, &data[record[i].at] + done, size - done, offset + i * size + done):
                return BAD_FILE
            i, done = i + 1, 0
        return 0

    cdef int put(
        self, Py_ssize_t block, const uint8_t* at, Py_ssize_t size, long offset
    ) noexcept nogil:
        """Write `size` bytes. Return 0, or BAD_FILE with `error` set."""
        cdef ssize_t n
        while size:
            n = pwrite(self.files[block], at, size, offset)
            if n > 0:
                at, size, offset = at + n, size - n, offset + n
            elif n == 0 or errno != EINTR:
                self.error = errno
                return BAD_FILE
        return 0

    cdef int empty(self, uint64_t first, Py_ssize_t run, Py_ssize_t block) noexcept nogil:
        """Make `run` pages holes. Those that are holes stay as they are."""
        # QEMU's first round sends each page of zeros of a new file: no system call for those.
        cdef uint64_t page = first, end = first + <uint64_t>run, stop
        while page < end:
            if not get_bit(self.filled, page):
                page += 1
                continue
            stop = page
            while stop < end and get_bit(self.filled, stop):
                stop += 1
            if self.punch(page, stop, block):
                return BAD_FILE
            page = stop
        return 0

    cdef int punch(self, uint64_t page, uint64_t stop, Py_ssize_t block) noexcept nogil:
        """Make the pages from `page` up to `stop` a hole, or write zeros if there are no holes."""
        cdef uint8_t[MAX_PAGE_SIZE] zeros
        cdef uint64_t i
        cdef long offset = self.offset(page, block)
        if xb_punch(self.files[block], offset, <long>((stop - page) * self.page_size)) == 0:
            for i in range(page, stop):
                clear_bit(self.filled, i)
            return 0
        # Without holes, or after a signal, zeros are written; `filled` stays set then.
        if errno != EOPNOTSUPP and errno != ENOSYS and errno != EINTR:
            self.error = errno
            return BAD_FILE
        memset(zeros, 0, self.page_size)
        for i in range(page, stop):
            if self.put(block, zeros, self.page_size, self.offset(i, block)):
                return BAD_FILE
        return 0

    cdef int patch(
        self, const uint8_t[::1] data, const StreamRecord* record, Py_ssize_t block,
        Py_ssize_t* why,
    ) noexcept nogil:
        """Apply a delta to its page in the file."""
        cdef uint8_t[MAX_PAGE_SIZE] page
        cdef Py_ssize_t got = 0
        cdef ssize_t n
        cdef long offset = self.offset(record.page, block)
        if record.length == 0:
            return 0                # QEMU's decoder takes an empty delta for no change
        # A hole is zeros, and needs no read.
        memset(page, 0, self.page_size)
        while got < self.page_size and get_bit(self.filled, record.page):
            n = pread(self.files[block], page + got, self.page_size - got, offset + got)
            if n > 0:
                got += n
            elif n == 0:
                break
            elif errno != EINTR:
                self.error = errno
                return BAD_FILE
        why[0] = decode_page(&data[record.at], record.length, page, self.page_size)
        if why[0] < 0:
            return BAD_DELTA
        set_bit(self.filled, record.page)
        return self.put(block, page, self.page_size, offset)


cdef class RamRecorder:
    """Writes pages as records of QEMU's RAM sections.

    blocks -- (name, pages) of each, in the order of the stream's list
    """

    cdef list names
    cdef Py_ssize_t page_size
    cdef uint64_t* firsts
    cdef Py_ssize_t block       # of the last record, -1 at first

    def __cinit__(self, blocks, Py_ssize_t page_size):
        check_page_size(page_size)
        self.names = [bytes(name) for name, _ in blocks]
        if not self.names or not all(0 < len(name) <= MAX_NAME for name in self.names):
            raise ValueError(
                "a block without a name, with a longer one than 255 bytes, or no block"
            )
        self.page_size = page_size
        self.block = -1
        self.firsts = <uint64_t*>calloc(len(self.names) + 1, 8)
        if self.firsts == NULL:
            raise MemoryError("no memory for the list of blocks")
        for i in range(len(self.names)):
            self.firsts[i + 1] = self.firsts[i] + <uint64_t>blocks[i][1]

    def __dealloc__(self):
        free(self.firsts)

    def put(
        self, uint8_t[::1] out not None, Py_ssize_t block, uint64_t page, uint64_t count,
        const uint8_t[::1] data,
    ):
        """Write pages of a block into `out`, as many as fit. Return (bytes, pages).

        page, count -- the pages, numbered within the block
        data        -- their content; None if they are zeros
        """
        cdef Py_ssize_t used = 0, room = out.shape[0], size = self.page_size, length, start
        cdef uint64_t done = 0, word
        cdef const uint8_t* at = NULL
        cdef const uint8_t* text
        cdef bytes name
        if not 0 <= block < len(self.names):
            raise ValueError(f"there is no block {block}")
        if page > self.firsts[block + 1] - self.firsts[block] or (
            count > self.firsts[block + 1] - self.firsts[block] - page
        ):
            raise ValueError("pages outside the block")
        if data is not None:
            if <uint64_t>data.shape[0] < count * size:
                raise ValueError("fewer bytes than pages")
            if count:
                at = &data[0]
        name = self.names[block]
        text, length = <const uint8_t*><const char*>name, len(name)
        with nogil:
            while done < count and room - used >= 9 + length + size:
                # The flags are known only after the page was looked at: the word is written last.
                word = (page + done) * size
                start, used = used, used + 8
                if block == self.block:
                    word |= FLAG_CONTINUE
                else:
                    out[used] = <uint8_t>length
                    memcpy(&out[used + 1], text, length)
                    used += 1 + length
                    self.block = block
                if at == NULL or is_zero(at + done * size, size):
                    word |= FLAG_ZERO
                    out[used] = 0
                    used += 1
                else:
                    word |= FLAG_PAGE
                    memcpy(&out[used], at + done * size, size)
                    used += size
                word = htobe64(word)
                memcpy(&out[start], &word, 8)
                done += 1
        return used, done
