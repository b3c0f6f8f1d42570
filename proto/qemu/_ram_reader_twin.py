"""The pages in QEMU's migration stream, found in plain Python: see _ram_reader.pyx and _ram.pxd."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from proto.codec._batch_twin import RAM_DELTA, RAM_PAGE, RAM_RECORD, RAM_ZERO
from proto.codec._xbzrle_twin import check_page_size
from proto.codec.faults import FaultError
from proto.wire.errors import StreamError

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
    """The RAM blocks of a guest. Its pages are numbered through all of them, in their order.

    blocks -- (name, pages) of each
    """

    def __init__(self, blocks: Sequence[tuple[bytes, int]]) -> None:
        self.names = [bytes(name) for name, _ in blocks]
        if not 0 < len(self.names) <= MAX_BLOCKS:
            raise ValueError(f"{len(self.names)} blocks: a guest has 1 to {MAX_BLOCKS}")
        for name in self.names:
            if not 0 < len(name) <= MAX_NAME:
                raise ValueError(f"a block's name has {len(name)} bytes")
        self.firsts = [0]
        """Number of each block's first page, and of all pages at the end."""
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
        check_page_size(page_size)
        self.zero = self.raw = self.delta = self.delta_bytes = 0
        self.records = memoryview(bytearray(SCAN_RECORDS * RAM_RECORD.size))
        self._blocks = Blocks(blocks)
        self._page_size = page_size
        self._block: int | None = None  # of the last record

    def scan(self, data: Buffer, start: int, end: int) -> tuple[int, int, int]:
        """Read records of data[start:end] into `records`.

        Returns (where it stopped, how many records it read, why it stopped):

        SCAN_MORE -- the next record needs more bytes, or is wrong: a second call will tell
        SCAN_FULL -- the table is full
        SCAN_END  -- the section is over, and its end was read

        Raises StreamError if the first record is wrong; `at` of the error says where it begins.
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
        """Read the record at `at`. Return it as it stands in `records`, and the position after it.

        Raises FaultError, and _ShortError if it does not end in these bytes.
        """
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
        """Return where a delta begins, and how long it is."""
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
    """Return `count` bytes from `at` on. Raises _ShortError."""
    if count > len(data) - at:
        raise _ShortError
    return data[at : at + count]


def _reason(flags: int) -> str:
    for flag, name in FLAG_NAMES.items():
        if flags & flag:
            return f"a record with the flag {name}"
    return f"a record with the flags {flags:#x}, which mean nothing here"
