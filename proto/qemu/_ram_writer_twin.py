"""Batches written as records of QEMU's RAM sections, in plain Python: see _ram_writer.pyx."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from proto.codec._batch_twin import (
    HEAD,
    OP_DELTA,
    OP_RAW,
    OP_ZERO,
    Record,
    add_to_check,
    read_record,
)
from proto.codec._hashes_twin import PageHashes
from proto.codec._xbzrle_twin import delta_runs
from proto.codec.faults import BAD_CHECK, BAD_DATA, NO_BASE, PAST_GUEST, FaultError
from proto.qemu._ram_reader_twin import (
    ENCODING,
    FLAG_CONTINUE,
    FLAG_PAGE,
    FLAG_XBZRLE,
    FLAG_ZERO,
    MAX_NAME,
    Blocks,
)
from proto.wire.errors import DecodeError

if TYPE_CHECKING:
    from typing_extensions import Buffer


class RamWriter:
    """Writes batches as records, one batch after the other: `begin`, then `fill` until it gives 0.

    hashes -- of the guest; only their key is used, for the check of raw pages
    blocks -- (name, pages) of each, as the RamReader has them that the pages come from
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
        """Check a batch whole, and have `fill` write it.

        Raises DecodeError for a batch that is wrong; nothing has changed then. Raises ValueError if
        the last batch was not written to its end.
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
            check = add_to_check(check, self._hashes.hash_of(one))
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
        """Return the pages of a record, each with its body; remove its raw pages from `raw`."""
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
        """Drop the batch, whether it was written to its end or not."""
        self._left = None

    def fill(self, out: Buffer) -> int:
        """Write records of the batch into `out`, as many as fit whole. Return how many bytes.

        0 means that the batch is over. Raises ValueError if `out` is too short for one record.
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
