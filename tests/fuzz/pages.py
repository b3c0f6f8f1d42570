"""Batches of any bytes, applied to a small guest by the kernel and by its twin.

Control: pages, page size, bytes that the last page lacks, what the memory is like. A piece is a
batch: its kind says how many raw pages come behind, and what is done; a check of zeros is made
right, since a hostile peer can do that too.
"""

from __future__ import annotations

import mmap
import os
from types import ModuleType, SimpleNamespace
from typing import Any

from proto.codec import faults
from proto.codec._hashes_twin import PageHashes
from proto.wire.errors import DecodeError
from tests.fuzz.guarded import Guarded, closed
from tests.fuzz.pieces import Piece, split
from tests.fuzz.sides import PATTERN, SIDES, outcome

SEED = bytes(range(16))
HEAD = 20
STEP = 0x9E3779B97F4A7C15
SIZES = (1024, 1024, 1024, 2048)
MOST_BATCHES = 24
# What `check` leaves to `apply`: the content of raw pages, and what is inside of deltas.
UNSEEN = (
    faults.BAD_CHECK, faults.SHORT, faults.BAD_LENGTH, faults.ZERO_RUN, faults.PAST_PAGE,
    faults.EMPTY_RUN, faults.PAST_DELTA,
)  # fmt: skip

# of a piece's kind
RAW = 0x07
TORN = 0x08  # the raw pages lack their last byte
AS_IT_IS = 0x10  # the check is what the bytes say, though it be zero
END_ROUND = 0x20
UNCHECKED = 0x40  # applied though `check` refused it


class Guest:
    """A destination of one implementation."""

    def __init__(self, side: ModuleType | SimpleNamespace, control: bytes) -> None:
        self.page_size = SIZES[control[1] & 3]
        self.pages = 1 + control[0] % 100
        self.size = self.pages * self.page_size - control[2] * 4 % self.page_size
        zeroed = not control[3] & 1
        content = PATTERN[: self.page_size] * self.pages
        self.memory = Guarded(bytes(len(content)) if zeroed else content)
        self.hashes = side.PageHashes(self.pages, self.page_size, SEED)
        self.decoder = side.PageDecoder(self.hashes, self.size, zeroed=zeroed)
        self.fd = -1

    def check(self, head: bytes, data_bytes: int) -> object:
        bounded = Guarded(head)
        with closed(bounded):
            return outcome(self.decoder.check, bounded.view, data_bytes)

    def apply(self, head: bytes, data: bytes) -> object:
        bounded, raw = Guarded(head), Guarded(data)
        with closed(bounded, raw, self.memory):
            return outcome(self.decoder.apply, bounded.view, raw.view, self.memory.view)

    def content(self) -> bytes:
        return bytes(self.memory)

    def state(self) -> dict[str, Any]:
        told = ("received_pages", "zero", "raw", "delta", "recent")
        return {
            "table": bytes(self.hashes.table),
            "stale": bytes(self.hashes.stale),
            "sum": self.hashes.sum,
            **{name: getattr(self.decoder, name) for name in told},
        }


class FileGuest(Guest):
    """As the above, but its memory is a mapped file that raw pages are written to."""

    OFFSET = 4096

    def __init__(self, side: ModuleType | SimpleNamespace, control: bytes) -> None:
        super().__init__(side, control)
        before = self.memory.view
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, self.OFFSET + len(before))
        self.map = mmap.mmap(self.fd, len(before), offset=self.OFFSET)
        self.map[:] = before

    def apply(self, head: bytes, data: bytes) -> object:
        bounded, raw = Guarded(head), Guarded(data)
        with closed(bounded, raw):
            return outcome(
                self.decoder.apply, bounded.view, raw.view, self.map, self.fd, self.OFFSET
            )

    def content(self) -> bytes:
        return self.map[:]

    def close(self) -> None:
        assert os.pread(self.fd, self.OFFSET, 0) == bytes(self.OFFSET), "written before the guest"
        assert os.fstat(self.fd).st_size == self.OFFSET + len(self.map), "written behind it"
        self.map.close()
        os.close(self.fd)


def pages(data: bytes) -> None:
    control, batches = split(data)
    with_file = bool(control[3] & 2)
    guests = [(FileGuest if with_file else Guest)(side, control) for side in SIDES]
    for batch in batches[:MOST_BATCHES]:
        made = batch_of(guests[1].page_size, guests[1].hashes, batch)
        _take(guests, *made, batch.kind)
    for guest in guests:
        if isinstance(guest, FileGuest):
            guest.close()


def batch_of(page_size: int, hashes: PageHashes, piece: Piece) -> tuple[bytes, bytes]:
    """The head and the raw pages of a batch."""
    kind, head = piece
    fills = [(head[-1 - i] if i < len(head) else 0) for i in range(kind & RAW)]
    raw = [PATTERN[fill : fill + page_size] if fill & 1 else bytes([fill]) * page_size
           for fill in fills]  # fmt: skip
    data = b"".join(raw)
    if head[12:HEAD] == bytes(8) and not kind & AS_IT_IS:
        check = 0
        for content in raw:
            check = (check * STEP + hashes.hash_of(content)) % 2**64
        head = head[:12] + check.to_bytes(8, "big") + head[HEAD:]
    return head, data[:-1] if kind & TORN else data


def _take(guests: list[Guest], head: bytes, data: bytes, kind: int) -> None:
    first, second = (guest.check(head, len(data)) for guest in guests)
    assert first == second
    refused = isinstance(first, str)
    if refused:
        assert first.startswith(DecodeError.__name__), first
        if not kind & UNCHECKED:
            return
    before = guests[0].content()
    first, second = (guest.apply(head, data) for guest in guests)
    assert first == second
    if isinstance(first, str):
        assert first.startswith(DecodeError.__name__), first
        assert refused or first.endswith(UNSEEN), f"not refused before: {first}"
    if isinstance(first, str) and first.endswith(faults.BAD_CHECK):
        assert guests[0].content() == before
    assert guests[0].content() == guests[1].content()
    assert guests[0].state() == guests[1].state()
    if kind & END_ROUND:
        for guest in guests:
            guest.decoder.end_round()
