# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""The source's kernel: dirty pages in, batches out, without the GIL.

    headroom | head, records ...      | (page-aligned) raw pages ...      one Slab of memory
    ^ for the frame header            ^ data_at

Records grow from the left and raw pages lie behind `data_at`, so a batch is two ranges of memory,
and a transport can send both without copying them together. `room` bounds the two in sum.

What the peer ends up with, what the cache holds and what is hashed must be the same bytes, though
the guest writes on while we read. Therefore:

  * A raw page is copied first, to its place in the batch. The hash, the cache and the transport
    all see that copy. Guest memory itself is never given to a transport, which would read it a
    second time, later.
  * A delta is made from guest memory directly, because most of a page is only compared. The bytes
    of its runs are read once, into the delta, and copied from there to the cache.
  * A byte that changes after it was read is dirty again, and another round sends it.

For each page of a round the encoder finds the cheapest record:

    zero now            zero there too: nothing;  else a zero run
    known and cached    the delta from the cached content, or nothing if that is equal
    known and zero there  the delta from zeros, which needs no cache
    else, or overflow   the raw page

_peer_copy.pyx knows what the peer holds. That is brought up to date as each record is written, not
when the batch is acknowledged: TCP delivers in order, and after a broken connection the peer says
what it holds (`adopt`).

A page whose deltas overflow is written all over each time: caching it costs a copy and a futile
comparison, and a slot. From its second overflow in a row on it is left out of the cache for 1, 2,
4 ... 16 of its sendings (`spared` counts them). With the last of these it is cached again, and its
next delta is tried; one that fits ends the series. QEMU remembers nothing and encodes such a page
in vain each round.

How hot a page is, which tells how large a cache would pay off, is counted in _heat.pyx.

The readable twin is proto/codec/_encoder_twin.py; the two give the same bytes on every input.
"""

cimport cython
from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from proto.codec._batch cimport (
    GAP_MASK,
    HEAD,
    OP_DELTA,
    OP_RAW,
    OP_ZERO,
    RAM_PAGE,
    RAM_ZERO,
    RECORD_ROOM,
    RUN_LIMIT,
    StreamRecord,
    add_to_check,
)
from proto.codec._bitmaps cimport ZeroedMemory
from proto.codec._bits cimport get_bit, next_set, set_bit
from proto.codec._cache cimport NO_SLOT, PageCache
from proto.codec._xbzrle cimport MAX_PAGE_SIZE, decode_page, encode_page, is_zero, zero_page
from proto.codec._faults cimport EMPTY_DELTA, NO_BASE, PAST_GUEST
from proto.codec._hashes cimport PageHashes
from proto.codec._heat cimport PageHeat
from proto.codec._peer_copy cimport PeerCopy
from proto.codec._slab cimport Slab
from proto.codec._uleb cimport put_uleb

from proto.codec.faults import FAULTS
from proto.wire.errors import DecodeError

cdef extern from "endian.h" nogil:
    uint64_t htobe64(uint64_t)
    uint32_t htobe32(uint32_t)

cdef enum:
    # Pages that `space` offers at once: they are copied, compared and encoded while they are in the
    # core's own cache.
    SNAPSHOT_BYTES = 256 << 10
    # A delta is written before it is measured: encode_page wants 2 * size + 32 bytes.
    ENCODE_ROOM = 2 * MAX_PAGE_SIZE + 64
    # A byte per page: the number of sendings that it is still left out for, and above these five
    # bits the number of its overflows in a row.
    WAIT_MASK = 0x1F
    OVERFLOW = 0x20
    MOST_OVERFLOWS = 6          # then a page is left out for 2 ** 4 sendings


@cython.final
cdef class PageEncoder(PeerCopy):
    """The batches that bring the peer's copy up to date.

    hashes   -- keeps the hash of every page that is sent
    cache    -- of old contents; without one there are no deltas
    merge    -- deltas are those of xbzrle.encode(merge=True)
    headroom -- bytes left free for a frame header at the start of a batch
    room     -- most bytes of a batch, without the headroom
    """

    cdef bint merge
    cdef PageHeat heat
    cdef uint8_t* overflowed    # OVERFLOW times those in a row, and the sendings to wait
    cdef ZeroedMemory overflowed_memory
    cdef bint on                # deltas are made
    cdef uint64_t* numbers      # of the pages in the snapshot
    cdef Py_ssize_t most        # pages of a snapshot
    cdef Py_ssize_t offered     # pages of the last `space`
    cdef object number_view
    cdef list slabs
    cdef Slab slab              # of the open batch
    cdef uint8_t* out           # its records
    cdef uint8_t* data          # its raw pages
    cdef Py_ssize_t headroom
    cdef Py_ssize_t room
    cdef Py_ssize_t data_at     # offset of `data` in the slab
    cdef Py_ssize_t used        # bytes of records
    cdef Py_ssize_t raw_pages
    cdef uint64_t check
    cdef uint64_t next_page     # one past the last page of the batch
    cdef uint64_t zero_first    # a zero run that is not written yet
    cdef uint64_t zero_count
    cdef Py_ssize_t raw_at      # where the open raw run has its count, 0 for none
    cdef uint32_t raw_count
    cdef uint32_t now
    cdef uint64_t past          # one past the last page of `feed_records` in this round
    cdef readonly uint64_t zero
    cdef readonly uint64_t unchanged
    cdef readonly uint64_t raw
    cdef readonly uint64_t delta
    cdef readonly uint64_t delta_bytes
    cdef readonly uint64_t hits
    cdef readonly uint64_t misses
    cdef readonly uint64_t overflows
    cdef readonly uint64_t spared

    def __cinit__(
        self, PageHashes hashes not None, PageCache cache=None, *, bint merge=False,
        Py_ssize_t headroom=0, Py_ssize_t room=1 << 20,
    ):
        if headroom < 0 or room < self.page_size + 3 * RECORD_ROOM:
            raise ValueError("no room for a page")
        self.merge = merge
        self.headroom = headroom
        self.room = room
        self.data_at = (headroom + room + 4095) // 4096 * 4096
        self.most = SNAPSHOT_BYTES // self.page_size
        self.slabs = []
        self.heat = PageHeat(self.pages)
        self.overflowed_memory = ZeroedMemory(self.pages, True)
        self.overflowed = self.overflowed_memory.at
        self.on = cache is not None
        numbers = bytearray(8 * self.most)
        self.numbers = <uint64_t*>PyByteArray_AS_STRING(numbers)
        self.number_view = memoryview(numbers).cast("Q")

    @property
    def active(self):
        """Whether deltas are made. Setting it to False empties the cache: no base in it ages."""
        return self.on

    @active.setter
    def active(self, bint on):
        if on and self.cache is None:
            raise ValueError("there is no cache to make deltas from")
        if self.on and not on:
            self.cache.clear()
        self.on = on

    cdef inline void note_overflow(self, uint64_t page) noexcept nogil:
        """Count one overflow of a page, and set for how many sendings it is left out."""
        # Both counts share a byte, because there is one for each page of the guest.
        cdef uint8_t times = self.overflowed[page] // OVERFLOW
        if times < MOST_OVERFLOWS:
            times += 1
        self.overflowed[page] = times * OVERFLOW + (1 << (times - 2) if times > 1 else 0)

    def begin_round(self, uint32_t number):
        """Begin a round. Rounds count from 1.

        Raises ValueError for a number below that of the last round, and if a batch is open: a
        batch belongs to one round.
        """
        if self.pending:
            raise ValueError("a batch of the last round was not taken")
        if number == 0 or number < self.now:
            raise ValueError(f"round {number} after round {self.now}")
        self.now = number
        self.past = 0

    def sample_heat(self):
        """Return what was sent again and what is hot now: see PageHeat.sample."""
        return self.heat.sample()

    cdef void drop_batch(self):
        """Drop the open batch. Its slab is free once the views that `space` gave out are gone."""
        self.slab = None
        self.out = self.data = NULL
        self.used = self.raw_at = self.raw_pages = self.offered = 0
        self.zero_count = self.check = 0

    def adopt(self, first, table):
        """As PeerCopy.adopt. An open batch is dropped: it will not be sent."""
        PeerCopy.adopt(self, first, table)
        self.drop_batch()

    def adopt_zeros(self, first, count):
        """As PeerCopy.adopt_zeros. An open batch is dropped: it will not be sent."""
        PeerCopy.adopt_zeros(self, first, count)
        self.drop_batch()

    def forget(self):
        """As PeerCopy.forget. An open batch is dropped: it will not be sent."""
        PeerCopy.forget(self)
        self.overflowed_memory.clear()
        self.drop_batch()

    @property
    def pending(self):
        """Whether the open batch has anything to send."""
        return self.used > 0 or self.zero_count > 0

    cdef inline Py_ssize_t spare(self) noexcept nogil:
        """Return the bytes left for pages, with room for a zero run that is not written yet."""
        return (
            self.room - self.used - self.raw_pages * self.page_size - HEAD - RECORD_ROOM
        )

    cdef inline bint is_full(self) noexcept nogil:
        """Return whether one more page might not fit the open batch."""
        # A page takes at most `page_size` + RECORD_ROOM bytes, whatever becomes of it: encode_page
        # gives up on a delta that is longer than the page.
        return self.spare() < self.page_size + RECORD_ROOM

    @property
    def full(self):
        """Whether one more page might not fit the open batch."""
        return self.is_full()

    cdef int open_slab(self) except -1:
        """Have memory for the open batch: a slab that no transport uses any more, or a new one."""
        # The link's write buffer bounds how many batches a transport holds, so there are few slabs.
        cdef Slab slab
        if self.slab is not None:
            return 0
        for slab in self.slabs:
            if slab.exports == 0:
                break
        else:
            slab = Slab(self.data_at + self.room)
            self.slabs.append(slab)
        self.slab = slab
        self.out = slab.at + self.headroom
        self.data = slab.at + self.data_at
        return 0

    def space(self):
        """Return where to copy the next pages: (memory, their numbers), both writable.

        Both have room for the same number of pages, 0 if the batch is full. The memory is where the
        next raw pages of the batch belong: those up to the first that is not sent raw are in place.
        """
        cdef Py_ssize_t start
        self.open_slab()
        self.offered = min(max(self.spare(), 0) // (self.page_size + RECORD_ROOM), self.most)
        start = self.data_at + self.raw_pages * self.page_size
        return (
            memoryview(self.slab)[start : start + self.offered * self.page_size],
            self.number_view[: self.offered],
        )

    cdef inline void open_record(self, uint8_t op, uint64_t page) noexcept nogil:
        """Write the head of the batch, if this is its first record, and the record's first byte."""
        cdef uint32_t now = htobe32(self.now)
        cdef uint64_t first = htobe64(page), gap
        if self.used == 0:
            memcpy(self.out, &now, 4)
            memcpy(self.out + 4, &first, 8)
            self.used = HEAD
            self.next_page = page
        # Pages ascend, so a record says how far its page is behind the one before. In a batch of
        # neighbouring pages each gap is 0, and fits the byte of the operation.
        gap = page - self.next_page
        if gap < GAP_MASK:
            self.out[self.used] = op | <uint8_t>gap
            self.used += 1
        else:
            self.out[self.used] = op | GAP_MASK
            self.used += 1
            self.used += put_uleb(self.out + self.used, gap - GAP_MASK)
        self.raw_at = 0

    cdef inline void flush_zeros(self) noexcept nogil:
        """Write the zero run that is open, if there is one: its length is known only at its end."""
        if self.zero_count:
            self.open_record(OP_ZERO, self.zero_first)
            self.used += put_uleb(self.out + self.used, self.zero_count)
            self.next_page = self.zero_first + self.zero_count
            self.zero_count = 0

    cdef inline void put_zero(self, uint64_t page) noexcept nogil:
        """Add a page of zeros to the open run, or begin a run with it."""
        if self.zero_count and page != self.zero_first + self.zero_count:
            self.flush_zeros()
        if self.zero_count == 0:
            self.zero_first = page
        self.zero_count += 1
        self.zero += 1
        self.make_zeros(page, page + 1)

    cdef inline void put_raw(self, uint64_t page, const uint8_t* content) noexcept nogil:
        """Write a page whole. Hash it here: its content is in the core's cache just now."""
        cdef uint8_t* place = self.data + self.raw_pages * self.page_size
        cdef uint64_t value = self.hashes.hash_of(content)
        # One record counts a run of pages; its count is written again as the run grows, since a
        # batch may end after any page.
        if not (self.raw_at and page == self.next_page and self.raw_count < RUN_LIMIT):
            self.open_record(OP_RAW, page)
            self.raw_at = self.used
            self.raw_count = 0
            self.used += 2
        self.raw_count += 1
        self.out[self.raw_at] = <uint8_t>(self.raw_count >> 8)
        self.out[self.raw_at + 1] = <uint8_t>self.raw_count
        if place != content:    # else `space` or `copied` has put it there already
            memcpy(place, content, self.page_size)
        self.raw_pages += 1
        self.check = add_to_check(self.check, value)
        self.hashes.note(page, value)
        self.next_page = page + 1
        self.raw += 1

    cdef inline void put_delta(
        self, uint64_t page, const uint8_t* delta, Py_ssize_t length
    ) noexcept nogil:
        """Write the record of a delta. It leaves the page's hash stale: see PeerCopy."""
        self.open_record(OP_DELTA, page)
        self.used += put_uleb(self.out + self.used, length)
        memcpy(self.out + self.used, delta, length)
        self.used += length
        self.next_page = page + 1
        self.delta += 1
        self.delta_bytes += length
        set_bit(self.hashes.stale_at, page)

    cdef inline void find_zero(self, uint64_t page) noexcept nogil:
        """Write a page that is zeros now, unless the peer holds it so already."""
        if self.is_zero_there(page):
            self.unchanged += 1
        else:
            self.put_zero(page)

    cdef const uint8_t* copied(self, const uint8_t* live, Py_ssize_t size) noexcept nogil:
        """Copy a page from guest memory to the place from which it would be sent raw."""
        cdef uint8_t* copy = self.data + self.raw_pages * self.page_size
        memcpy(copy, live, size)
        memset(copy + size, 0, self.page_size - size)
        return copy

    cdef void put_page(
        self, uint64_t page, const uint8_t* content, Py_ssize_t size, bint live,
        uint8_t* scratch, const uint8_t* dirty, uint64_t dirty_pages,
    ) noexcept nogil:
        """Write the record of one page, and bring the cache to what the peer will hold.

        size -- bytes of `content`; the rest of the page is zeros
        live -- `content` is guest memory, which may be written meanwhile. Only a delta from the
                cache, which reads the bytes of its runs once, is made of it directly; for all else
                it is copied first
        """
        cdef bint known = self.sent.has(page)
        cdef bint zero = known and not get_bit(self.nonzero, page)
        cdef uint32_t slot = NO_SLOT
        cdef const uint8_t* base = NULL
        cdef uint8_t* keep = NULL
        cdef Py_ssize_t length = -1
        cdef bint spared = False
        # If the guest writes between this test and the next read, the page is dirty again: the
        # record is right for the moment of its read, and another round follows.
        if is_zero(content, size):
            self.find_zero(page)
            return
        if known and not zero:
            self.heat.warm(page)
        if self.on and known:
            spared = self.overflowed[page] & WAIT_MASK
            if spared:
                self.overflowed[page] -= 1
                self.spared += 1
            elif zero:
                base = zero_page()
            else:
                slot = self.cache.find(page)
                if slot != NO_SLOT:
                    base = keep = self.cache.at(slot)
                    self.cache.ages[slot] = self.now
                    self.cache.reused[slot] = 1
        # Without a cached base the page is probably sent whole, so it is copied to its place now.
        # So is the guest's last page if it is not whole: encode_page reads whole pages.
        if live and (keep == NULL or size < self.page_size):
            content, live = self.copied(content, size), False
        if base != NULL:
            self.hits += 1
            length = encode_page(
                base, content, self.page_size, scratch, self.page_size, self.merge, keep
            )
            # encode_page has brought `keep` up to date run by run, as far as it got.
            if length < 0:
                self.overflows += 1
                self.note_overflow(page)
            elif self.overflowed[page]:
                self.overflowed[page] = 0
            if length == 0:
                # Equal now, but it was written: its hash may be of a moment in between.
                self.unchanged += 1
                set_bit(self.hashes.stale_at, page)
                return
        elif self.on and known and not spared:
            self.misses += 1
        self.flush_zeros()
        if length > 0:
            self.put_delta(page, scratch, length)
        else:
            if live:
                content = self.copied(content, size)
            self.put_raw(page, content)
        self.sent.add(page)
        set_bit(self.nonzero, page)
        if self.on:
            if self.overflowed[page] & WAIT_MASK:
                if slot != NO_SLOT:     # its content is not what the peer holds any more
                    self.cache.remove(slot)
            elif slot == NO_SLOT:
                self.cache.insert(page, content, self.now, dirty, dirty_pages)
            elif length < 0:        # sent raw after an overflow: the base is half old, half new
                memcpy(keep, content, self.page_size)

    def feed(self, Py_ssize_t count, const uint8_t[::1] dirty not None):
        """Encode the first `count` pages of the last `space`, in ascending order.

        dirty -- the round's dirty bitmap: the cache evicts none of its pages

        Raises ValueError for a page out of order or outside the guest; those before it are in the
        batch.
        """
        cdef Py_ssize_t i = 0
        cdef uint64_t page, floor = self.next_page if self.used else 0
        cdef const uint8_t* snapshot
        cdef uint8_t[ENCODE_ROOM] scratch
        if self.now == 0:
            raise ValueError("no round was begun")
        if not 0 <= count <= self.offered:
            raise ValueError(f"{count} pages: there was space for {self.offered}")
        if <uint64_t>dirty.shape[0] * 8 < self.pages:
            raise ValueError("the dirty bitmap is too short")
        if count == 0:
            return
        self.offered = 0
        snapshot = self.data + self.raw_pages * self.page_size
        if self.zero_count:
            floor = self.zero_first + self.zero_count
        with nogil:
            while i < count:
                page = self.numbers[i]
                if page < floor or page >= self.pages:
                    break
                self.put_page(
                    page, snapshot + i * self.page_size, self.page_size, False, scratch,
                    &dirty[0], dirty.shape[0] * 8,
                )
                floor = page + 1
                i += 1
        if i < count:
            raise ValueError(f"page {self.numbers[i]} is out of order or outside the guest")

    def feed_memory(
        self, const uint8_t[::1] memory not None, const uint8_t[::1] dirty not None,
        uint64_t first, uint64_t end, uint64_t most,
    ):
        """Encode the dirty pages from `first` up to `end`, from guest memory itself.

        memory -- the guest's, which may be written meanwhile; zeros fill up its last page
        dirty  -- the round's dirty bitmap, in whole 8-byte words
        most   -- stop after this many pages; it also stops when the batch is full

        Returns (pages encoded, the page to go on from).
        """
        cdef uint64_t page = first, floor = self.next_page if self.used else 0, count = 0, offset
        cdef Py_ssize_t length
        cdef uint64_t size = memory.shape[0]
        cdef uint8_t[ENCODE_ROOM] scratch
        if self.zero_count:
            floor = self.zero_first + self.zero_count
        if self.now == 0 or first < floor or end > self.pages:
            raise ValueError(f"pages {first} to {end} are out of order or outside the guest")
        if <uint64_t>dirty.shape[0] * 8 < self.pages or dirty.shape[0] % 8:
            raise ValueError("the dirty bitmap is too short")
        if size > self.pages * self.page_size or size <= (self.pages - 1) * self.page_size:
            raise ValueError(f"{size} bytes are not {self.pages} pages of {self.page_size}")
        self.open_slab()
        self.offered = 0
        with nogil:
            while count < most and not self.is_full():
                page = next_set(&dirty[0], page, end)
                if page >= end:
                    break
                offset = page * self.page_size
                length = self.page_size
                if <uint64_t>length > size - offset:
                    length = <Py_ssize_t>(size - offset)
                self.put_page(
                    page, &memory[offset], length, True, scratch, &dirty[0], dirty.shape[0] * 8
                )
                count += 1
                page += 1
        return count, page

    def feed_records(
        self, const uint8_t[::1] data not None, const uint8_t[::1] records not None,
        Py_ssize_t first, Py_ssize_t count,
    ):
        """Encode pages as QEMU sends them: the records `first` to `count` of a RamReader.

        QEMU's deltas are passed on as they are, even if `active` is not set. Such a delta is also
        applied to the cached content. A page that is not cached is unknown after it, and is sent
        raw the next time.

        Returns (the first record that was not encoded, whether it begins a new round). It stops
        when the batch is full, and before a page that does not follow the last one. Raises
        DecodeError for a bad delta, and for one without a base.
        """
        cdef const StreamRecord* at
        cdef const uint8_t* content
        cdef Py_ssize_t i = first, size = data.shape[0], fault = 0
        cdef bint wrapped = False
        cdef uint8_t[ENCODE_ROOM] scratch
        if self.now == 0:
            raise ValueError("no round was begun")
        if not 0 <= first <= count or records.shape[0] < count * <Py_ssize_t>sizeof(StreamRecord):
            raise ValueError("there are fewer records than that")
        if first == count:
            return count, False
        self.open_slab()
        self.offered = 0
        at = <const StreamRecord*>&records[0]
        content = &data[0] if size else NULL
        with nogil:
            while i < count and not self.is_full():
                # QEMU sends pages in ascending order within a round, so a page that lies before
                # the last one belongs to its next round. A batch belongs to one round.
                if at[i].page < self.past:
                    wrapped = True
                    break
                if at[i].page >= self.pages or at[i].at > <uint64_t>size or \
                        at[i].length > <uint64_t>size - at[i].at or (
                    at[i].kind == RAM_PAGE and at[i].length != <uint32_t>self.page_size
                ):
                    fault = PAST_GUEST
                    break
                if at[i].kind == RAM_ZERO:
                    self.find_zero(at[i].page)
                elif at[i].kind == RAM_PAGE:
                    self.put_page(
                        at[i].page, content + at[i].at, self.page_size, False, scratch, NULL, 0
                    )
                else:
                    fault = self.pass_delta(
                        at[i].page, content + at[i].at, at[i].length, scratch
                    )
                    if fault:
                        break
                self.past = at[i].page + 1
                i += 1
        if fault:
            raise DecodeError(f"page {at[i].page}: {FAULTS[fault]}")
        return i, wrapped

    cdef Py_ssize_t pass_delta(
        self, uint64_t page, const uint8_t* delta, Py_ssize_t length, uint8_t* scratch
    ) noexcept nogil:
        """Pass on a delta that QEMU has made. Return 0 or a Fault."""
        cdef Py_ssize_t fault
        cdef uint32_t slot = NO_SLOT
        cdef bint zero = not get_bit(self.nonzero, page)
        if not self.sent.has(page):
            return NO_BASE
        if length == 0:
            self.unchanged += 1
            return 0
        if length > self.page_size:
            return EMPTY_DELTA
        if self.on:
            slot = self.cache.find(page)
        if slot != NO_SLOT:
            fault = decode_page(delta, length, self.cache.at(slot), self.page_size)
        else:
            # The delta is applied even if its base is not here: that checks it before the
            # destination sees it, and gives the content of a page that was zeros.
            memset(scratch, 0, self.page_size)
            fault = decode_page(delta, length, scratch, self.page_size)
        if fault:
            return fault
        if not zero:
            self.heat.warm(page)
        if slot != NO_SLOT:
            self.cache.ages[slot] = self.now
            self.cache.reused[slot] = 1
        elif zero and self.on and not self.overflowed[page] & WAIT_MASK:
            self.cache.insert(page, scratch, self.now, NULL, 0)
        self.flush_zeros()
        self.put_delta(page, delta, length)
        set_bit(self.nonzero, page)
        return 0

    def feed_zeros(self, uint64_t first, uint64_t count):
        """Encode pages that are known to be zeros without reading them: holes of a sparse file.

        Returns how many fitted the batch.
        """
        cdef uint64_t page, stop, end = first + count, floor = self.next_page if self.used else 0
        if self.zero_count:
            floor = self.zero_first + self.zero_count
        if self.now == 0 or first < floor or end > self.pages or end < first:
            raise ValueError(f"pages {first} to {first + count} are out of order or outside")
        self.open_slab()
        self.offered = 0
        with nogil:
            page = first
            while page < end:
                stop = self.zeros_end(page, end)
                self.unchanged += stop - page
                page = stop
                if page == end or self.is_full():
                    break
                self.put_zero(page)
                page += 1
                stop = self.lacking_end(page, end)
                if stop > page and not self.is_full():  # the rest of the run takes no more room
                    self.zero_count += stop - page
                    self.zero += stop - page
                    self.make_zeros(page, stop)
                    page = stop
        return page - first

    def finish_batch(self):
        """End the batch. Return it as (head, pages), two writable views.

        head  -- `headroom` free bytes, then round, first page, check and records
        pages -- the raw pages, in the order of their records

        Raises ValueError if nothing is pending.
        """
        cdef uint64_t check = htobe64(self.check)
        cdef Py_ssize_t end
        self.flush_zeros()
        if self.used == 0:
            raise ValueError("the batch is empty")
        # The check covers all raw pages, so it is known, and written into the head, only now.
        memcpy(self.out + 12, &check, 8)
        end = self.data_at + self.raw_pages * self.page_size
        whole = memoryview(self.slab)
        batch = whole[: self.headroom + self.used], whole[self.data_at : end]
        self.slab = None
        self.out = self.data = NULL
        self.used = self.raw_at = self.raw_pages = self.offered = 0
        self.check = 0
        return batch
