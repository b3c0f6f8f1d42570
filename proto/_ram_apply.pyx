# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""The pages of QEMU's migration stream brought into files, and files into such pages.

A file has one block's pages, one after the other; a page that is zero is a hole in it, where the
file system has holes. The records that RamReader has found are applied in their order: raw pages
that follow on each other in one call, deltas by reading the page first. A file is written, never
mapped: a full disk is an error then, and no signal.

All of it runs without the GIL. The readable twin is proto/_twin_ram_apply.py.
"""

from libc.errno cimport EINTR, ENOSYS, EOPNOTSUPP, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from proto._bits cimport clear_bit, get_bit, set_bit
from proto._codec cimport MAX_PAGE, decode_page, is_zero

import os

from proto._codec import FAULTS
from proto.errors import DecodeError

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

cdef packed struct StreamRecord:
    uint64_t page
    uint64_t at
    uint32_t length
    uint32_t kind

cdef enum:
    RUN = 256                   # pages that are written by one call
    MAX_NAME = 255
    ZERO_KIND = 0
    PAGE_KIND = 1
    DELTA_KIND = 2
    FLAG_ZERO = 0x02
    FLAG_PAGE = 0x08
    FLAG_CONTINUE = 0x20
    BAD_RECORD = 1
    BAD_FILE = 2
    BAD_DELTA = 3


cdef class RamApplier:
    """Writes pages to files.

    blocks -- pages of each block, in the order of the stream's list
    files  -- a descriptor for each, to read and write: as long as the block, and all zeros
    """

    cdef Py_ssize_t count
    cdef Py_ssize_t page_size
    cdef uint64_t* firsts
    cdef int* files
    cdef uint8_t* filled        # pages that are no holes
    cdef iovec[RUN] run
    cdef int error              # of the system

    def __cinit__(self, blocks, files, Py_ssize_t page_size):
        cdef Py_ssize_t i
        if not 1024 <= page_size <= MAX_PAGE or page_size & (page_size - 1):
            raise ValueError(f"a page of {page_size} bytes: a power of two from 1024 to 16384")
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
        """Applies the first `count` of RamReader.records, found in `data`.

        Raises DecodeError, and OSError where a file cannot be written; some are applied then.
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
            for i in range(count):
                record = table + i
                if (
                    record.page >= self.firsts[self.count]
                    or record.kind > DELTA_KIND
                    or record.length > <uint64_t>data.shape[0]
                    or record.at > <uint64_t>data.shape[0] - record.length
                    or (record.kind == PAGE_KIND and record.length != <uint64_t>size)
                ):
                    fault = BAD_RECORD
                    break
            i = 0
            while i < count and not fault:
                record = table + i
                while record.page >= self.firsts[block + 1]:
                    block += 1
                while record.page < self.firsts[block]:
                    block -= 1
                run = 1
                while (
                    run < RUN and i + run < count and record[run].kind == record.kind
                    and record[run].page == record.page + <uint64_t>run
                    and record[run].page < self.firsts[block + 1]
                    and record.kind != DELTA_KIND
                ):
                    run += 1
                if record.kind == PAGE_KIND:
                    fault = self.write(data, record, run, block)
                elif record.kind == ZERO_KIND:
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
        return <long>((page - self.firsts[block]) * self.page_size)

    cdef int write(
        self, const uint8_t[::1] data, const StreamRecord* record, Py_ssize_t run, Py_ssize_t block
    ) noexcept nogil:
        """Raw pages that follow on each other."""
        cdef Py_ssize_t i, size = self.page_size, done
        cdef ssize_t n
        cdef long offset = self.offset(record.page, block)
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
        # Less than all of it: page by page, for the error if there is one.
        i, done = n // size, n % size
        while i < run:
            if self.put(block, &data[record[i].at] + done, size - done, offset + i * size + done):
                return BAD_FILE
            i, done = i + 1, 0
        return 0

    cdef int put(
        self, Py_ssize_t block, const uint8_t* at, Py_ssize_t size, long offset
    ) noexcept nogil:
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
        """Zero pages: what was a hole stays one, what was not becomes one."""
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
        cdef uint8_t[MAX_PAGE] zeros
        cdef uint64_t i
        cdef long offset = self.offset(page, block)
        if xb_punch(self.files[block], offset, <long>((stop - page) * self.page_size)) == 0:
            for i in range(page, stop):
                clear_bit(self.filled, i)
            return 0
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
        """A delta, to what the page was."""
        cdef uint8_t[MAX_PAGE] page
        cdef Py_ssize_t got = 0
        cdef ssize_t n
        cdef long offset = self.offset(record.page, block)
        if record.length == 0:
            return 0                # QEMU takes it for no change
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
        if not 1024 <= page_size <= MAX_PAGE or page_size & (page_size - 1):
            raise ValueError(f"a page of {page_size} bytes: a power of two from 1024 to 16384")
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
        """Writes as many pages of a block as fit: (bytes, pages).

        page -- of the block, the first of `count`
        data -- those pages; None: they are zero
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
