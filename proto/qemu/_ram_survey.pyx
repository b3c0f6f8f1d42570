# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""What a captured stream of QEMU holds, page by page: counted, searched, and written to files.

    RamReader.records ---> RamSurvey       counts per block and round; how often each page came
                      ---> select_records  the records of some pages
                      ---> RamImage        the memory of a block, in a file

A survey reads streams that may be damaged anywhere: it counts what is wrong and goes on.

A stream does not say where QEMU's rounds end. A page that lies before the last one begins a new
round, as in PageEncoder.feed_records. How often a page came is kept in a byte that stops at OFTEN,
and allocated in pieces: a damaged stream may name any page of a guest of 2^32.

The readable twin is proto/qemu/_ram_survey_twin.py.
"""

import os

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.unistd cimport pread, pwrite

from proto.codec._batch cimport RAM_PAGE, RAM_ZERO, StreamRecord
from proto.codec._bits cimport get_bit, set_bit
from proto.codec._xbzrle cimport MAX_PAGE_SIZE, check_delta, decode_page, zero_page

from proto.codec.faults import FAULTS

cdef struct BlockCounts:
    uint64_t zero
    uint64_t raw
    uint64_t delta
    uint64_t delta_bytes
    uint64_t changed            # bytes that deltas bring
    uint64_t empty
    uint64_t broken
    uint64_t baseless           # deltas that come before any other record of their page

cdef struct RoundCounts:
    uint64_t at
    uint64_t zero
    uint64_t raw
    uint64_t delta
    uint64_t delta_bytes

cdef struct Broken:
    uint64_t page
    uint64_t at
    Py_ssize_t fault

cdef enum:
    PIECE = 4096                # pages whose counts are allocated together: a page of memory
    ROUNDS = 4096               # rounds that are told apart
    BROKEN = 64                 # broken deltas that are named
    GAPS = 16                   # runs of missing pages that are named
    OFTEN = 255

# Pages of the largest guest (MAX_PAGES in proto/README.md).
cdef uint64_t MOST_PAGES = <uint64_t>1 << 32


cdef const StreamRecord* records_of(
    const uint8_t[::1] data, const uint8_t[::1] records, Py_ssize_t count
) except? NULL:
    """Return the table of records, whose bodies are all inside the data. Raises ValueError."""
    cdef const StreamRecord* table
    cdef Py_ssize_t i
    if not 0 <= count <= records.shape[0] // <Py_ssize_t>sizeof(StreamRecord):
        raise ValueError("there are fewer records than that")
    if count == 0:
        return NULL
    table = <const StreamRecord*>&records[0]
    for i in range(count):
        if table[i].at > <uint64_t>data.shape[0] or (
            table[i].length > <uint64_t>data.shape[0] - table[i].at
        ):
            raise ValueError("a record outside the data")
    return table


cdef class RamSurvey:
    """Counts what records bring.

    firsts -- number of the first page of each block, and of all pages at the end

    QEMU does not mark its rounds. It sends pages in ascending order, so a page whose number is not
    above that of the last one begins a round.
    """

    cdef Py_ssize_t page_size
    cdef Py_ssize_t count       # of blocks
    cdef uint64_t* firsts
    cdef uint8_t** pieces       # how often a page came
    cdef BlockCounts* totals
    cdef RoundCounts* round_at
    cdef Py_ssize_t round_count
    cdef Broken[BROKEN] broken_at
    cdef Py_ssize_t broken_count
    cdef uint64_t next_page
    cdef readonly uint64_t rounds_seen

    def __cinit__(self, firsts, Py_ssize_t page_size):
        cdef Py_ssize_t i
        self.count = len(firsts) - 1
        if self.count < 1 or not 1 <= page_size <= MAX_PAGE_SIZE:
            raise ValueError(f"{self.count} blocks of pages of {page_size} bytes")
        if firsts[self.count] > MOST_PAGES:
            raise ValueError(f"{firsts[self.count]} pages: at most {MOST_PAGES} can be counted")
        self.page_size = page_size
        self.firsts = <uint64_t*>calloc(self.count + 1, 8)
        self.totals = <BlockCounts*>calloc(self.count, sizeof(BlockCounts))
        self.round_at = <RoundCounts*>calloc(ROUNDS, sizeof(RoundCounts))
        self.pieces = <uint8_t**>calloc(firsts[self.count] // PIECE + 1, sizeof(void*))
        if not (self.firsts and self.totals and self.round_at and self.pieces):
            raise MemoryError("no memory to count pages")
        for i in range(self.count + 1):
            self.firsts[i] = firsts[i]
            if i and self.firsts[i] < self.firsts[i - 1]:
                raise ValueError("blocks that do not follow on each other")

    def __dealloc__(self):
        cdef uint64_t i
        if self.pieces and self.firsts:
            for i in range(self.firsts[self.count] // PIECE + 1):
                free(self.pieces[i])
        free(self.pieces)
        free(self.firsts)
        free(self.totals)
        free(self.round_at)

    def note(
        self, const uint8_t[::1] data not None, const uint8_t[::1] records not None,
        Py_ssize_t count, uint64_t base,
    ):
        """Count records of a RamReader.

        base -- byte of the stream that data[0] is

        Raises ValueError for a page outside the guest, and MemoryError.
        """
        cdef const StreamRecord* table = records_of(data, records, count)
        cdef Py_ssize_t i, block = 0, fault
        cdef uint64_t page
        cdef uint8_t* piece
        cdef BlockCounts* totals
        cdef RoundCounts* now
        cdef bint failed = False
        for i in range(count):
            if table[i].page >= self.firsts[self.count]:
                raise ValueError("a page outside the guest")
        with nogil:
            for i in range(count):
                page = table[i].page
                # Blocks are few, and pages mostly ascend: the search begins at the last block.
                if page < self.firsts[block]:
                    block = 0
                while page >= self.firsts[block + 1]:
                    block += 1
                if page < self.next_page or self.rounds_seen == 0:
                    self.rounds_seen += 1
                    # Later rounds count as part of the last one, so that the sums stay right.
                    if self.round_count < ROUNDS:
                        self.round_at[self.round_count].at = base + table[i].at
                        self.round_count += 1
                self.next_page = page + 1
                piece = self.pieces[page // PIECE]
                if piece == NULL:
                    piece = self.pieces[page // PIECE] = <uint8_t*>calloc(PIECE, 1)
                    if piece == NULL:
                        failed = True
                        break
                totals = self.totals + block
                now = self.round_at + self.round_count - 1
                if table[i].kind == RAM_PAGE:
                    totals.raw += 1
                    now.raw += 1
                elif table[i].kind == RAM_ZERO:
                    totals.zero += 1
                    now.zero += 1
                else:
                    totals.delta += 1
                    totals.delta_bytes += table[i].length
                    now.delta += 1
                    now.delta_bytes += table[i].length
                    # No record of the page came before: the stream lacks its beginning.
                    totals.baseless += piece[page % PIECE] == 0
                    totals.empty += table[i].length == 0
                    fault = 0
                    if table[i].length:
                        fault = check_delta(
                            &data[table[i].at], table[i].length, self.page_size, &totals.changed
                        )
                    if fault:
                        totals.broken += 1
                        if self.broken_count < BROKEN:
                            self.broken_at[self.broken_count].page = page
                            self.broken_at[self.broken_count].at = base + table[i].at
                            self.broken_at[self.broken_count].fault = fault
                            self.broken_count += 1
                if piece[page % PIECE] < OFTEN:
                    piece[page % PIECE] += 1
        if failed:
            raise MemoryError("no memory to count pages")

    @property
    def blocks(self):
        """For each block: records of zeros, raw pages and deltas; bytes of the deltas, and bytes of
        pages that they bring; deltas that are empty, broken, or come first of their page."""
        return [
            (
                self.totals[i].zero, self.totals[i].raw, self.totals[i].delta,
                self.totals[i].delta_bytes, self.totals[i].changed, self.totals[i].empty,
                self.totals[i].broken, self.totals[i].baseless,
            )
            for i in range(self.count)
        ]

    @property
    def rounds(self):
        """For each round: the byte of the stream at which the body of its first record is; records
        of zeros, raw pages and deltas; bytes of the deltas. The last of 4096 rounds also counts
        what came in later ones."""
        return [
            (
                self.round_at[i].at, self.round_at[i].zero, self.round_at[i].raw,
                self.round_at[i].delta, self.round_at[i].delta_bytes,
            )
            for i in range(self.round_count)
        ]

    @property
    def broken(self):
        """The first broken deltas: (page, byte of the stream, what is wrong)."""
        return [
            (self.broken_at[i].page, self.broken_at[i].at, FAULTS[self.broken_at[i].fault])
            for i in range(self.broken_count)
        ]

    def coverage(self, Py_ssize_t block):
        """Return which pages of a block came.

        Returns (pages that came, pages that came more than once, most times that a page came, 255
        meaning that or more; the first runs of pages that never came, as (first, last) within the
        block).
        """
        cdef uint64_t page, end, came = 0, again = 0, gap, first
        cdef int most = 0, times
        cdef const uint8_t* piece
        cdef list runs = []
        if not 0 <= block < self.count:
            raise ValueError("there is no such block")
        first, end = self.firsts[block], self.firsts[block + 1]
        page = gap = first
        while page < end:
            piece = self.pieces[page // PIECE]
            if piece == NULL:
                page = min((page // PIECE + 1) * PIECE, end)
                continue
            times = piece[page % PIECE]
            if times:
                came += 1
                again += times > 1
                most = max(most, times)
                if page > gap and len(runs) < GAPS:
                    runs.append((gap - first, page - 1 - first))
                gap = page + 1
            page += 1
        if end > gap and len(runs) < GAPS:
            runs.append((gap - first, end - 1 - first))
        return came, again, most, runs


def select_records(
    const uint8_t[::1] records not None, Py_ssize_t count, uint64_t start, uint64_t first,
    uint64_t last,
):
    """Return the records of the pages `first` to `last`.

    start -- byte at which the first of the records begins

    Returns a list of (page, byte at which its record begins, kind, length of its body).
    """
    cdef const StreamRecord* table
    cdef Py_ssize_t i
    cdef uint64_t at = start
    cdef list found = []
    if not 0 <= count <= records.shape[0] // <Py_ssize_t>sizeof(StreamRecord):
        raise ValueError("there are fewer records than that")
    if count == 0:
        return found
    table = <const StreamRecord*>&records[0]
    for i in range(count):
        if first <= table[i].page <= last:
            found.append((table[i].page, at, table[i].kind, table[i].length))
        at = table[i].at + table[i].length + (table[i].kind == RAM_ZERO)
    return found


cdef class RamImage:
    """The memory of one block, in a file that is as long as the block and all zeros at first.

    first  -- number of the block's first page
    size   -- bytes of the block
    memory -- a mapping of the file, if there is one: deltas of pages that were written before
              change it, which costs a thirtieth of reading and writing the page
    """

    cdef uint8_t[::1] mapped
    cdef uint64_t whole         # pages of the mapping
    cdef uint64_t first
    cdef uint64_t pages
    cdef uint64_t size
    cdef Py_ssize_t page_size
    cdef int fd
    cdef uint8_t* written       # a bit per page that is not a hole

    def __cinit__(
        self, uint64_t first, uint64_t size, Py_ssize_t page_size, int fd,
        uint8_t[::1] memory=None,
    ):
        if not 1 <= page_size <= MAX_PAGE_SIZE or not 0 < size <= MOST_PAGES * page_size:
            raise ValueError(f"{size} bytes in pages of {page_size}")
        self.first, self.size, self.page_size, self.fd = first, size, page_size, fd
        self.pages = (size + page_size - 1) // page_size
        self.mapped = memory
        self.whole = 0 if memory is None else min(<uint64_t>memory.shape[0], size) // page_size
        self.written = <uint8_t*>calloc(self.pages // 64 + 1, 8)
        if self.written == NULL:
            raise MemoryError("no memory to track pages")

    def __dealloc__(self):
        free(self.written)

    def apply(
        self, const uint8_t[::1] data not None, const uint8_t[::1] records not None,
        Py_ssize_t count,
    ):
        """Write what the records bring for this block. A broken delta leaves its page as it is.

        Raises OSError.
        """
        cdef const StreamRecord* table = records_of(data, records, count)
        cdef Py_ssize_t i
        cdef uint64_t page
        cdef int error = 0
        cdef uint8_t[MAX_PAGE_SIZE] content
        with nogil:
            for i in range(count):
                page = table[i].page - self.first
                if table[i].page < self.first or page >= self.pages:
                    continue
                if table[i].kind == RAM_PAGE:
                    if table[i].length == <uint32_t>self.page_size:
                        error = self.put(page, &data[table[i].at])
                        set_bit(self.written, page)
                elif table[i].kind == RAM_ZERO:
                    if get_bit(self.written, page):
                        error = self.put(page, zero_page())
                elif table[i].length and page < self.whole and get_bit(self.written, page):
                    decode_page(
                        &data[table[i].at], table[i].length, &self.mapped[page * self.page_size],
                        self.page_size,
                    )
                elif table[i].length:
                    memset(content, 0, self.page_size)
                    if get_bit(self.written, page):
                        error = self.get(page, content)
                    if not error and decode_page(
                        &data[table[i].at], table[i].length, content, self.page_size
                    ) >= 0:
                        error = self.put(page, content)
                        set_bit(self.written, page)
                if error:
                    break
        if error:
            raise OSError(error, os.strerror(error))

    cdef Py_ssize_t length_of(self, uint64_t page) noexcept nogil:
        """Return the bytes of a page that are in the file: the last page may be cut off."""
        cdef uint64_t left = self.size - page * self.page_size
        return self.page_size if left > <uint64_t>self.page_size else <Py_ssize_t>left

    cdef int put(self, uint64_t page, const uint8_t* content) noexcept nogil:
        cdef Py_ssize_t length = self.length_of(page), done = 0, n
        while done < length:
            n = pwrite(
                self.fd, content + done, length - done, <long>(page * self.page_size + done)
            )
            if n < 0 and errno != EINTR:
                return errno
            done += n if n > 0 else 0
        return 0

    cdef int get(self, uint64_t page, uint8_t* content) noexcept nogil:
        cdef Py_ssize_t length = self.length_of(page), done = 0, n
        while done < length:
            n = pread(self.fd, content + done, length - done, <long>(page * self.page_size + done))
            if n < 0 and errno != EINTR:
                return errno
            if n == 0:
                break           # another program has made the file shorter
            done += n if n > 0 else 0
        return 0
