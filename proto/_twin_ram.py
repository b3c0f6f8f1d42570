"""The pages in QEMU's migration stream, in plain Python: what proto/_ram.pyx means.

Same names, same results, same errors. See proto/_twin.py on twins, and proto/_ram.pyx for the
format.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from proto._twin import (
    BAD_CHECK,
    BAD_DATA,
    HEAD,
    NO_BASE,
    OP_DELTA,
    OP_RAW,
    OP_ZERO,
    PAST_GUEST,
    RAM_DELTA,
    RAM_PAGE,
    RAM_RECORD,
    RAM_ZERO,
    STEP,
    FaultError,
    PageHashes,
    Record,
    delta_runs,
    is_page_size,
    read_record,
)
from proto.errors import DecodeError, StreamError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_BLOCKS = 1024
MAX_NAME = 255
FLAG_ZERO, FLAG_PAGE, FLAG_EOS, FLAG_CONTINUE, FLAG_XBZRLE = 0x02, 0x08, 0x10, 0x20, 0x40
ENCODING = 1  # XBZRLE, the only one there is

SCAN_MORE, SCAN_FULL, SCAN_END = range(3)
SCAN_RECORDS = 4096  # of one scan

FLAG_NAMES = {
    0x01: "FULL, which no QEMU since 2009 writes",
    0x04: "MEM_SIZE, though the blocks are known",
    0x80: "HOOK: RDMA cannot be carried",
    0x100: "COMPRESS_PAGE: switch the capability compress off",
    0x200: "MULTIFD_FLUSH: switch the capability multifd off",
}


class Blocks:
    """The RAM blocks of a guest; its pages are numbered through all of them."""

    def __init__(self, blocks: Sequence[tuple[bytes, int]]) -> None:
        self.names = [bytes(name) for name, _ in blocks]
        if not 0 < len(self.names) <= MAX_BLOCKS:
            raise ValueError(f"{len(self.names)} blocks: a guest has 1 to {MAX_BLOCKS}")
        for name in self.names:
            if not 0 < len(name) <= MAX_NAME:
                raise ValueError(f"a block's name has {len(name)} bytes")
        self.firsts = [0]
        """And one more: the number of pages."""
        for _, pages in blocks:
            self.firsts.append(self.firsts[-1] + pages)

    @property
    def pages(self) -> int:
        return self.firsts[-1]

    def find(self, name: bytes) -> int | None:
        return self.names.index(name) if name in self.names else None

    def block_of(self, page: int) -> int:
        return next(i for i, end in enumerate(self.firsts[1:]) if page < end)


class _ShortError(Exception):
    """The record does not end in these bytes."""


class RamReader:
    """Finds the pages in RAM sections.

    blocks -- (name, pages) of each, in the order of the stream's list

    `records` has 24 bytes for each record of the last scan, in the order of this machine: page
    (u64), where its body begins in the data (u64), its length (u32), its kind (u32): 0 zero,
    1 page, 2 delta.
    """

    def __init__(self, blocks: Sequence[tuple[bytes, int]], page_size: int) -> None:
        if not is_page_size(page_size):
            raise ValueError(f"a page of {page_size} bytes: a power of two from 1024 to 16384")
        self.zero = self.raw = self.delta = self.delta_bytes = 0
        self.records = memoryview(bytearray(SCAN_RECORDS * RAM_RECORD.size))
        self._blocks = Blocks(blocks)
        self._page_size = page_size
        self._block: int | None = None  # of the last record

    def scan(self, data: Buffer, start: int, end: int) -> tuple[int, int, int]:
        """Walks records of data[start:end].

        Returns (where the first record begins that was not read, how many were, why it stopped):
        SCAN_MORE: the next one needs more bytes, or another look. SCAN_FULL: the table is full.
        SCAN_END: the section is over, and the place is behind that. Raises StreamError where the
        first record is none; `at` says where that is.
        """
        if not 0 <= start <= end <= len(memoryview(data)):
            raise ValueError("there are fewer bytes than that")
        content, at, count = bytes(memoryview(data)[:end]), start, 0
        while True:
            try:
                if _part(content, at, 8) == FLAG_EOS.to_bytes(8, "big"):
                    return at + 8, count, SCAN_END
                if count == SCAN_RECORDS:
                    return at, count, SCAN_FULL
                record, after = self._read(content, at)
            except _ShortError:
                return at, count, SCAN_MORE
            except FaultError as fault:
                if count:
                    return at, count, SCAN_MORE
                raise StreamError(str(fault), at) from None
            RAM_RECORD.pack_into(self.records, count * RAM_RECORD.size, *record)
            at, count = after, count + 1

    def _read(self, data: bytes, at: int) -> tuple[tuple[int, int, int, int], int]:
        """The record at `at`, as it stands in `records`, and the position after it."""
        word = int.from_bytes(_part(data, at, 8), "big")
        at += 8
        flags = word % self._page_size
        kind = flags & ~FLAG_CONTINUE
        if kind not in (FLAG_PAGE, FLAG_ZERO, FLAG_XBZRLE):
            raise FaultError(_reason(flags))
        block = self._block
        if flags & FLAG_CONTINUE:
            if block is None:
                raise FaultError("a page of the same block as the last one, but it is the first")
        else:
            length = _part(data, at, 1)[0]
            name = _part(data, at + 1, length)
            block = self._blocks.find(name)
            if block is None:
                raise FaultError(f"a page of a block {name!r}, which is not in the list")
            at += 1 + length
        page = self._blocks.firsts[block] + word // self._page_size
        if page >= self._blocks.firsts[block + 1]:
            raise FaultError("a page outside its block")
        if kind == FLAG_PAGE:
            length, number = self._page_size, RAM_PAGE
            _part(data, at, length)
            self.raw += 1
        elif kind == FLAG_ZERO:
            length, number = 0, RAM_ZERO
            if _part(data, at, 1) != b"\0":
                raise FaultError("a page filled with something else than zeros")
            self.zero += 1
        else:
            at, length = self._delta(data, at)
            number = RAM_DELTA
        self._block = block
        return (page, at, length, number), at + length + (kind == FLAG_ZERO)

    def _delta(self, data: bytes, at: int) -> tuple[int, int]:
        """Where a delta begins, and how long it is."""
        encoding, length = struct.unpack(">BH", _part(data, at, 3))
        if encoding != ENCODING:
            raise FaultError("a delta of an unknown encoding")
        if length > self._page_size:
            raise FaultError("a delta that is longer than a page")
        _part(data, at + 3, length)
        self.delta += 1
        self.delta_bytes += length
        return at + 3, length


def _part(data: bytes, at: int, count: int) -> bytes:
    if count > len(data) - at:
        raise _ShortError
    return data[at : at + count]


def _reason(flags: int) -> str:
    for flag, name in FLAG_NAMES.items():
        if flags & flag:
            return f"a record with the flag {name}"
    return f"a record with the flags {flags:#x}, which mean nothing here"


class RamWriter:
    """Writes batches of pages as the records of RAM sections.

    hashes -- of the guest; only its key is used
    blocks -- as of the RamReader that the pages come from
    """

    def __init__(self, hashes: PageHashes, blocks: Sequence[tuple[bytes, int]]) -> None:
        self.zero = self.raw = self.delta = 0
        self._blocks = Blocks(blocks)
        self._hashes = hashes
        self._page_size = hashes.page_size
        if self._blocks.pages != hashes.pages:
            raise ValueError("the blocks have other pages than the guest")
        self._block: int | None = None  # of the last record
        self._received: set[int] = set()
        self._left: list[tuple[int, int, bytes]] | None = None  # page, op, body; of the batch

    @property
    def received_pages(self) -> int:
        return len(self._received)

    def begin(self, head: Buffer, data: Buffer) -> None:
        """Takes in a batch, which is wholly right: its layout, its raw pages, and its deltas.

        Raises DecodeError; nothing is taken in then. Raises ValueError where the last batch was not
        written to its end.
        """
        head, content, size = bytes(head), bytes(data), self._page_size
        if self._left is not None:
            raise ValueError("the last batch was not written to its end")
        if len(head) <= HEAD:
            raise DecodeError(f"a batch of {len(head)} bytes holds no record")
        next_page = page = int.from_bytes(head[4:12], "big")
        if page >= self._hashes.pages:
            raise DecodeError(f"page {page}: {PAST_GUEST}")
        raw = [content[i : i + size] for i in range(0, len(content) // size * size, size)]
        check, at, left = 0, HEAD, list[tuple[int, int, bytes]]()
        for one in raw:
            check = (check * STEP + self._hashes.hash_of(one)) % 2**64
        try:
            if check != int.from_bytes(head[12:HEAD], "big") or len(content) % size:
                raise FaultError(BAD_CHECK)
            while at < len(head):
                record, after = read_record(head, at, next_page, self._hashes.pages, size)
                page = record.first
                left += self._pages_of(record, raw)
                next_page, at = record.first + record.count, after
            if raw:
                raise FaultError(BAD_DATA)
        except FaultError as fault:
            raise DecodeError(f"page {page}, byte {at} of the batch: {fault}") from None
        self._left = left

    def _pages_of(self, record: Record, raw: list[bytes]) -> list[tuple[int, int, bytes]]:
        """The pages of a record, each with its body; takes off `raw` what is its own."""
        bodies = [b"\0"] * record.count if record.op == OP_ZERO else [record.delta]
        if record.op == OP_RAW:
            if record.count > len(raw):
                raise FaultError(BAD_DATA)
            bodies = raw[: record.count]
            del raw[: record.count]
        elif record.op == OP_DELTA:
            if record.first not in self._received:
                raise FaultError(NO_BASE)
            delta_runs(record.delta, self._page_size)
        return [(page, record.op, body) for page, body in zip(record.pages, bodies, strict=True)]

    def drop(self) -> None:
        """Lets go of the batch, written to its end or not."""
        self._left = None

    def fill(self, out: Buffer) -> int:
        """Writes as many of its records as fit whole; how many bytes. 0: the batch is over.

        Raises ValueError where not even one fits for sure.
        """
        room, most = memoryview(out), 16 + MAX_NAME + self._page_size
        if len(room) < most:
            raise ValueError("no room for a page")
        used = 0
        while self._left and len(room) - used >= most:
            record = self._record(*self._left.pop(0))
            room[used : used + len(record)] = record
            used += len(record)
        if used == 0:
            self.drop()
        return used

    def _record(self, page: int, op: int, body: bytes) -> bytes:
        block = self._blocks.block_of(page)
        word, name = (page - self._blocks.firsts[block]) * self._page_size, b""
        if block == self._block:
            word |= FLAG_CONTINUE
        else:
            name = self._blocks.names[block]
            name = bytes([len(name)]) + name
        self._block = block
        if op == OP_RAW:
            word |= FLAG_PAGE
            self.raw += 1
        elif op == OP_DELTA:
            word |= FLAG_XBZRLE
            body = struct.pack(">BH", ENCODING, len(body)) + body
            self.delta += 1
        else:
            word |= FLAG_ZERO
            self.zero += 1
        self._received.add(page)
        return word.to_bytes(8, "big") + name + body
