# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""What is in captured streams, page by page: counted, looked for, and written to files.

    RamReader.records ---> RamSurvey       counts, per block and round; how often each page came
                      ---> select_records  the records of some pages
                      ---> RamImage        the memory of a block, in a file
    PAGES bodies      ---> BatchSurvey     counts, and every check that a receiver makes

The readable twin is proto/_twin_ram_survey.py.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.unistd cimport pread, pwrite

from proto._batch cimport STEP, PageHashes, Record, Rising, read_record
from proto._bits cimport get_bit, set_bit
from proto._codec cimport (
    BAD_CHECK,
    BAD_DATA,
    EMPTY_RUN,
    MAX_PAGE,
    PAST_DELTA,
    PAST_GUEST,
    PAST_PAGE,
    SHORT,
    ZERO_RUN,
    decode_page,
    get_uleb,
    zero_page,
)

import os

from proto._codec import FAULTS

cdef extern from "endian.h" nogil:
    uint64_t be64toh(uint64_t)

cdef packed struct StreamRecord:
    uint64_t page
    uint64_t at
    uint32_t length
    uint32_t kind

cdef struct BlockCounts:
    uint64_t zero
    uint64_t raw
    uint64_t delta
    uint64_t delta_bytes
    uint64_t changed
    uint64_t empty
    uint64_t broken
    uint64_t baseless

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
    ZERO_KIND = 0
    PAGE_KIND = 1
    DELTA_KIND = 2
    PIECE = 4096                # pages whose counts are made at once
    ROUNDS = 4096               # that are told apart
    BROKEN = 64                 # deltas that are named
    GAPS = 16                   # runs of pages that never came, named
    OFTEN = 255
    HEAD = 20
    OP_ZERO = 0x00
    OP_RAW = 0x40
    OP_DELTA = 0x80

cdef uint64_t MOST_PAGES = <uint64_t>1 << 32


cdef Py_ssize_t check_delta(
    const uint8_t* delta, Py_ssize_t length, Py_ssize_t size, uint64_t* changed
) noexcept nogil:
    """Walks a delta without a page; 0, and `changed` grows by the bytes it brings, or a Fault."""
    cdef Py_ssize_t i = 0, at = 0, step
    cdef uint64_t run = 0, brought = 0
    while i < length:
        if length - i < 2:
            return SHORT
        step = get_uleb(delta + i, length - i, 2, &run)
        if step < 0:
            return step
        if i and run == 0:
            return ZERO_RUN
        i += step
        at += run
        if at > size:
            return PAST_PAGE
        if length - i < 2:
            return SHORT
        step = get_uleb(delta + i, length - i, 2, &run)
        if step < 0:
            return step
        if run == 0:
            return EMPTY_RUN
        i += step
        at += run
        if at > size:
            return PAST_PAGE
        if i + <Py_ssize_t>run > length:
            return PAST_DELTA
        i += run
        brought += run
    changed[0] += brought
    return 0


cdef const StreamRecord* records_of(
    const uint8_t[::1] data, const uint8_t[::1] records, Py_ssize_t count
) except? NULL:
    """The table, all of whose bodies are inside the data."""
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

    A round ends where the pages begin anew: at one whose number is not above that of the last.
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
        if self.count < 1 or not 1 <= page_size <= MAX_PAGE:
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
        """Takes in records of a RamReader. base: where the stream's data[0] is.

        Raises MemoryError.
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
                if page < self.firsts[block]:
                    block = 0
                while page >= self.firsts[block + 1]:
                    block += 1
                if page < self.next_page or self.rounds_seen == 0:
                    self.rounds_seen += 1
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
                if table[i].kind == PAGE_KIND:
                    totals.raw += 1
                    now.raw += 1
                elif table[i].kind == ZERO_KIND:
                    totals.zero += 1
                    now.zero += 1
                else:
                    totals.delta += 1
                    totals.delta_bytes += table[i].length
                    now.delta += 1
                    now.delta_bytes += table[i].length
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
        """Of each block: zero, raw and delta records, bytes of deltas, bytes that those change;
        deltas that are empty, broken, and the first that comes of their page."""
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
        """(where the body of its first record is, zero, raw, delta records, bytes of deltas); the
        last one has also what came in those beyond."""
        return [
            (
                self.round_at[i].at, self.round_at[i].zero, self.round_at[i].raw,
                self.round_at[i].delta, self.round_at[i].delta_bytes,
            )
            for i in range(self.round_count)
        ]

    @property
    def broken(self):
        """(page, where the delta is, what is wrong) of the first ones."""
        return [
            (self.broken_at[i].page, self.broken_at[i].at, FAULTS[self.broken_at[i].fault])
            for i in range(self.broken_count)
        ]

    def coverage(self, Py_ssize_t block):
        """(pages that came, that came again, how often one came at most (255: or more), the first
        runs that never came), the runs as (first, last) in the block."""
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
    """[(page, where its record begins, kind, length of the body)] of pages `first` to `last`.

    start -- where the first of the records begins
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
        at = table[i].at + table[i].length + (table[i].kind == ZERO_KIND)
    return found


cdef class RamImage:
    """The memory of one block, in a file that is as long as it and all zeros at first.

    first  -- number of its first page
    size   -- its bytes
    memory -- a mapping of the file, where there is one: pages that have room there already are
              changed in it, which costs a thirtieth of reading and writing them
    """

    cdef uint8_t[::1] mapped
    cdef uint64_t whole         # pages of the mapping
    cdef uint64_t first
    cdef uint64_t pages
    cdef uint64_t size
    cdef Py_ssize_t page_size
    cdef int fd
    cdef uint8_t* written       # pages that are something else than a hole

    def __cinit__(
        self, uint64_t first, uint64_t size, Py_ssize_t page_size, int fd,
        uint8_t[::1] memory=None,
    ):
        if not 1 <= page_size <= MAX_PAGE or not 0 < size <= MOST_PAGES * page_size:
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
        """Writes what the records bring for this block. A broken delta leaves its page as it is.

        Raises OSError.
        """
        cdef const StreamRecord* table = records_of(data, records, count)
        cdef Py_ssize_t i
        cdef uint64_t page
        cdef int error = 0
        cdef uint8_t[MAX_PAGE] content
        with nogil:
            for i in range(count):
                page = table[i].page - self.first
                if table[i].page < self.first or page >= self.pages:
                    continue
                if table[i].kind == PAGE_KIND:
                    if table[i].length == <uint32_t>self.page_size:
                        error = self.put(page, &data[table[i].at])
                        set_bit(self.written, page)
                elif table[i].kind == ZERO_KIND:
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
                break           # somebody has made the file shorter
            done += n if n > 0 else 0
        return 0


cdef class BatchSurvey:
    """Reads bodies of PAGES.

    pages, page_size -- of the guest; 0: not known
    seed             -- of its page hashes; empty: not known, and raw pages are not checked
    """

    cdef uint64_t pages
    cdef Py_ssize_t page_size
    cdef PageHashes hashes
    cdef Rising received        # nothing where `whole` is not so
    cdef readonly bint whole    # every page that came is known: not of a guest that was resumed

    def __cinit__(self, uint64_t pages, Py_ssize_t page_size, bytes seed, *, bint whole=True):
        if pages > MOST_PAGES or not 0 <= page_size <= MAX_PAGE:
            raise ValueError(f"{pages} pages of {page_size} bytes")
        self.pages = pages or MOST_PAGES
        self.page_size = page_size
        self.whole = whole and pages > 0
        self.hashes = PageHashes(1, page_size, seed) if page_size and seed else None
        self.received = Rising(self.pages if self.whole else 1)

    @property
    def received_pages(self):
        """Pages that came at least once; 0 where that is not known."""
        return self.received.below + self.received.strays

    def read(self, const uint8_t[::1] head not None, const uint8_t[::1] data not None):
        """One body.

        Returns (round, first page, zero, raw, delta pages, bytes of deltas, bytes that they change,
        deltas without a base, where it is wrong, what is wrong there): the counts go as far as it
        is right, "" where it all is.
        """
        cdef Record record
        cdef Py_ssize_t i = HEAD, step = 0, size = head.shape[0], k
        cdef Py_ssize_t page_size = self.page_size or MAX_PAGE
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
                    seen = seen * STEP + self.hashes.hash_of(content + k * page_size)
                if seen != be64toh(check):
                    i, step = 12, BAD_CHECK
        return (
            (<uint32_t>head[0] << 24) | (head[1] << 16) | (head[2] << 8) | head[3], first, zero,
            raw, delta, delta_bytes, changed, baseless, i, FAULTS[step] if step < 0 else "",
        )
