"""The layout of a batch, and how a record is read, in plain Python: see _batch.pxd."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from proto.codec._xbzrle_twin import get_uleb
from proto.codec.faults import BAD_OP, EMPTY_DELTA, PAST_GUEST, SHORT, FaultError

HEAD = 20  # round (4 bytes), first page (8), check of the raw pages (8)
OP_ZERO, OP_RAW, OP_DELTA = 0x00, 0x40, 0x80
OP_MASK = 0xC0
GAP_MASK = 0x3F
RUN_LIMIT = 0xFFFF  # a raw record counts its pages in 16 bits
RECORD_ROOM = 32  # more than a record takes besides page data
# Of a RamReader: page, where its body begins, how long that is, its kind.
RAM_RECORD = struct.Struct("=QQII")
RAM_ZERO, RAM_PAGE, RAM_DELTA = range(3)


def add_to_check(check: int, value: int) -> int:
    """Return the check of a batch after one more raw page, by the hash of that page."""
    return (check * 0x9E3779B97F4A7C15 + value) % 2**64


@dataclass(frozen=True)
class Record:
    op: int
    first: int
    count: int
    delta: bytes

    @property
    def pages(self) -> range:
        return range(self.first, self.first + self.count)


def read_record(
    head: bytes, at: int, next_page: int, pages: int, page_size: int
) -> tuple[Record, int]:
    """Read the record at `at`. Return it and the position after it.

    Each number is compared with its limit before it is used. Raises FaultError.
    """
    op, first = head[at] & OP_MASK, head[at] & GAP_MASK
    at += 1
    if first == GAP_MASK:
        more, at = get_uleb(head, at, 9)
        if more >= pages:
            raise FaultError(PAST_GUEST)
        first += more
    first += next_page
    if first >= pages:
        raise FaultError(PAST_GUEST)
    count, length = 1, 0
    if op == OP_ZERO:
        count, at = get_uleb(head, at, 9)
    elif op == OP_RAW:
        if len(head) - at < 2:
            raise FaultError(SHORT)
        count, at = int.from_bytes(head[at : at + 2], "big"), at + 2
    elif op == OP_DELTA:
        length, at = get_uleb(head, at, 3)
        if not 0 < length <= page_size:
            raise FaultError(EMPTY_DELTA)
    else:
        raise FaultError(BAD_OP)
    if not 0 < count <= pages - first:
        raise FaultError(PAST_GUEST)
    if length > len(head) - at:
        raise FaultError(SHORT)
    return Record(op, first, count, head[at : at + length]), at + length
