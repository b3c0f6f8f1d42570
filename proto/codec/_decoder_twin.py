"""The destination's kernel in plain Python: see _decoder.pyx for what it does and why."""

from __future__ import annotations

import os
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
from proto.codec._bitmaps_twin import bitmap
from proto.codec._hashes_twin import PageHashes
from proto.codec._xbzrle_twin import delta_runs
from proto.codec.faults import BAD_CHECK, BAD_DATA, NO_BASE, PAST_GUEST, FaultError
from proto.wire.errors import DecodeError

if TYPE_CHECKING:
    from typing_extensions import Buffer


class PageDecoder:
    """Applies batches to the destination's memory, and knows which pages it has received.

    hashes -- keeps the hashes of raw and zero pages; a delta makes its page stale
    size   -- bytes of the guest: what its last page has beyond them is not written to a file
    zeroed -- the memory is all zeros at first, so that pages of zeros need not be written
    recent -- a bit per page that a delta has changed since `end_round`
    """

    def __init__(self, hashes: PageHashes, size: int, *, zeroed: bool = True) -> None:
        self.pages = hashes.pages
        self.page_size = hashes.page_size
        if not (self.pages - 1) * self.page_size < size <= self.pages * self.page_size:
            raise ValueError(f"{size} bytes are not {self.pages} pages of {self.page_size}")
        self.size = size
        self.recent = bitmap(self.pages)
        self.zero = self.raw = self.delta = 0
        self._hashes = hashes
        self._received: set[int] = set()
        self._written: set[int] = set() if zeroed else set(range(self.pages))

    @property
    def received_pages(self) -> int:
        return len(self._received)

    def mark_received(self, first: int, count: int, written: bool) -> None:
        """Count pages as received that are here from before: a delta may change them.

        written -- their content may be other than zeros: then their hashes are stale
        """
        if first + count > self.pages:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        pages = range(first, first + count)
        self._received.update(pages)
        if written:
            self._written.update(pages)
            for page in pages:
                self._hashes.mark_stale(page)

    def end_round(self) -> None:
        """Forget which pages are `recent`."""
        self.recent[:] = bytes(len(self.recent))

    def check(self, head: Buffer, data_bytes: int) -> tuple[int, list[int]]:
        """Check the records of a batch, but not the inside of its deltas. Change nothing.

        data_bytes -- length of its raw pages

        Returns (its round, pages that a delta writes for the first time); the caller makes room
        for these pages. Raises DecodeError, which names the page and the byte.
        """
        head = bytes(head)
        if len(head) <= HEAD:
            raise DecodeError(f"a batch of {len(head)} bytes holds no record")
        next_page = page = int.from_bytes(head[4:12], "big")
        at, raw, fresh = HEAD, 0, []
        try:
            if next_page >= self.pages:
                at = 4
                raise FaultError(PAST_GUEST)
            while at < len(head):
                where = at
                record, after = read_record(head, at, next_page, self.pages, self.page_size)
                page = record.first
                if record.op == OP_RAW:
                    raw += record.count
                elif record.op == OP_DELTA:
                    if page not in self._received:
                        raise FaultError(NO_BASE)
                    if page not in self._written:
                        fresh.append(page)
                next_page, at = record.first + record.count, after
            if raw * self.page_size != data_bytes:
                at = where
                raise FaultError(BAD_DATA)
        except FaultError as fault:
            raise DecodeError(f"page {page}, byte {at} of the batch: {fault}") from None
        return int.from_bytes(head[:4], "big"), fresh

    def apply(
        self, head: Buffer, data: Buffer, memory: Buffer, fd: int = -1, fd_offset: int = 0
    ) -> int:
        """Write a batch into the guest's memory. Return how many pages it held.

        data      -- its raw pages
        memory    -- whole pages, at least those of the guest
        fd        -- of the file that `memory` maps: raw pages are written to it with pwrite(2); -1
                     if there is none
        fd_offset -- byte of that file at which the guest begins

        Raises DecodeError at the first record that is wrong; the records before it are applied. No
        raw page is written unless all of them match the check of the batch, and no byte of a delta
        that is wrong anywhere. Raises OSError if writing fails.
        """
        head, content, target = bytes(head), bytes(data), memoryview(memory)
        if len(target) < self.pages * self.page_size:
            raise ValueError("the memory is shorter than the guest")
        if len(head) <= HEAD:
            raise DecodeError(f"a batch of {len(head)} bytes holds no record")
        next_page, at, done = int.from_bytes(head[4:12], "big"), HEAD, 0
        if next_page >= self.pages:
            raise DecodeError(f"page {next_page}: {PAST_GUEST}")
        size = self.page_size
        raw = [content[i : i + size] for i in range(0, len(content) // size * size, size)]
        values = [self._hashes.hash_of(page) for page in raw]
        check = 0
        for value in values:
            check = add_to_check(check, value)
        try:
            if check != int.from_bytes(head[12:HEAD], "big"):
                raise FaultError(BAD_CHECK)
            while at < len(head):
                record, after = read_record(head, at, next_page, self.pages, self.page_size)
                self._apply_record(record, raw, values, target, fd, fd_offset)
                done += record.count
                next_page, at = record.first + record.count, after
        except FaultError as fault:
            raise DecodeError(f"byte {at} of the batch: {fault}") from None
        return done

    def _apply_record(
        self, record: Record, raw: list[bytes], values: list[int], target: memoryview, fd: int,
        fd_offset: int,
    ) -> None:  # fmt: skip
        size = self.page_size
        base = record.first * size
        if record.op == OP_DELTA:
            if record.first not in self._received:
                raise FaultError(NO_BASE)
            for at, run in delta_runs(record.delta, size):
                target[base + at : base + at + len(run)] = run
            self.delta += 1
            self._hashes.mark_stale(record.first)
            self.recent[record.first >> 3] |= 1 << (record.first & 7)
        elif record.op == OP_RAW:
            if record.count > len(raw):
                raise FaultError(BAD_DATA)
            content = b"".join(raw[: record.count])
            if fd < 0:
                target[base : base + len(content)] = content
            else:
                os.pwrite(fd, content[: self.size - base], fd_offset + base)
            for page in record.pages:
                self._hashes.note(page, values.pop(0))
                raw.pop(0)
            self.raw += record.count
        else:
            for page in record.pages:
                if page in self._written:
                    target[page * size : (page + 1) * size] = bytes(size)
                self._hashes.note(page, self._hashes.zero)
            self.zero += record.count
        self._received.update(record.pages)
        if record.op != OP_ZERO:
            self._written.update(record.pages)
