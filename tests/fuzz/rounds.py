"""A guest that is written and sent, round after round: what arrives is what was there.

Control: kind of cache, deltas and memory; pages; entries of the cache and room of a batch; page
size and how pages are compared. A piece is something that happens to the guest or its source.
"""

from __future__ import annotations

import itertools
from types import ModuleType, SimpleNamespace

from proto.codec.pageset import PageSet
from proto.wire.errors import CacheSizeError
from tests.fuzz.guarded import Guarded, closed
from tests.fuzz.pieces import split
from tests.fuzz.sides import PATTERN, SIDES, SIMD, use_simd

SEED = bytes(range(16))
SIZES = (1024, 1024, 1024, 2048)
COUNTERS = (
    "zero", "unchanged", "raw", "delta", "delta_bytes", "hits", "misses", "overflows", "spared",
)  # fmt: skip
HEADROOM = 24
MOST_ROUNDS = 10
MOST_PIECES = 60

WRITE, FILL, CLEAR, COPY, SEND, RESIZE, HOLES, SCAN = range(8)
SWITCHES = 0xC0  # of a RESIZE, pages from here on: deltas are switched off (even) or on


class Pair:
    """A source and a destination of one implementation."""

    def __init__(self, side: ModuleType | SimpleNamespace, control: bytes, page_size: int) -> None:
        pages = 1 + control[1] % 24
        self.page_size = page_size
        self.from_memory = bool(control[0] & 4)
        entries = 1 << (control[2] & 3)
        self.cache = side.PageCache(entries * page_size, page_size) if control[0] & 1 else None
        self.hashes = side.PageHashes(pages, page_size, SEED)
        self.there = side.PageHashes(pages, page_size, SEED)
        self.encoder = side.PageEncoder(
            self.hashes, self.cache, merge=bool(control[0] & 2), headroom=HEADROOM,
            room=page_size + 96 + (control[2] >> 2) * 128,
        )  # fmt: skip
        self.decoder = side.PageDecoder(self.there, pages * page_size)
        self.memory = Guarded(bytes(pages * page_size))

    def send(self, now: int, guest: bytes, dirty: PageSet) -> list[tuple[bytes, bytes]]:
        """A round; the batches it took, which have arrived."""
        self.encoder.begin_round(now)
        batches: list[tuple[bytes, bytes]] = []
        source = Guarded(guest)
        rest, page = list(dirty), 0
        while True:
            if self.from_memory:
                with closed(source):
                    _, page = self.encoder.feed_memory(
                        source.view, dirty.bits, page, dirty.pages, dirty.pages
                    )
                done = page >= dirty.pages
            else:
                while rest and not self.encoder.full:
                    del rest[: self._feed(guest, rest, dirty)]
                done = not rest
            self.take(batches)
            if done:
                return batches

    def _feed(self, guest: bytes, rest: list[int], dirty: PageSet) -> int:
        memory, numbers = self.encoder.space()
        count = min(len(numbers), len(rest))
        for i, page in enumerate(itertools.islice(rest, count)):
            content = guest[page * self.page_size : (page + 1) * self.page_size]
            memory[i * self.page_size : (i + 1) * self.page_size] = content.ljust(
                self.page_size, b"\0"
            )
            numbers[i] = page
        self.encoder.feed(count, dirty.bits)
        return count

    def take(self, batches: list[tuple[bytes, bytes]]) -> None:
        """Takes the open batch, if there is one, and applies it over there."""
        if not self.encoder.pending:
            return
        head, data = (bytes(part) for part in self.encoder.finish_batch())
        batches.append((head[HEADROOM:], data))
        records, raw = Guarded(head[HEADROOM:]), Guarded(data)
        with closed(records, raw, self.memory):
            self.decoder.check(records.view, len(data))
            self.decoder.apply(records.view, raw.view, self.memory.view)

    def holes(self, now: int, first: int, count: int) -> list[tuple[bytes, bytes]]:
        """A round of pages that are known to be zero."""
        self.encoder.begin_round(now)
        batches: list[tuple[bytes, bytes]] = []
        while count:
            fitted = self.encoder.feed_zeros(first, count)
            first, count = first + fitted, count - fitted
            self.take(batches)
        return batches

    def scan(self, padded: bytes, pages: int) -> tuple[int, bytes]:
        changed = PageSet(pages)
        return self.encoder.scan(0, pages, padded, changed.bits), bytes(changed.bits)

    def state(self) -> tuple[object, ...]:
        cache = None if self.cache is None else (len(self.cache), self.cache.evictions)
        counters: list[object] = [getattr(self.encoder, name) for name in COUNTERS]
        counters += [*self.encoder.sample_heat()]
        tables = [bytes(h.table) + bytes(h.stale) + h.sum for h in (self.hashes, self.there)]
        return cache, counters, tables, bytes(self.memory)


class Guest:
    """The memory that is written, and the pairs that carry it."""

    def __init__(self, control: bytes) -> None:
        self.page_size = SIZES[control[3] & 3]
        self.pages = 1 + control[1] % 24
        lacking = 4 * control[2] % self.page_size if control[0] & 4 else 0
        self.memory = bytearray(self.pages * self.page_size - lacking)
        self.dirty = PageSet.full(self.pages)
        self.pairs = [Pair(side, control, self.page_size) for side in SIDES]
        self.now = 0

    def padded(self) -> bytes:
        return bytes(self.memory).ljust(self.pages * self.page_size, b"\0")

    def write(self, page: int, offset: int, content: bytes) -> None:
        page %= self.pages
        at = page * self.page_size + offset % self.page_size
        end = min(at + len(content), (page + 1) * self.page_size, len(self.memory))
        if at < end:
            self.memory[at:end] = content[: end - at]
        self.dirty.add(page)

    def end_round(self, batches: list[list[tuple[bytes, bytes]]]) -> None:
        self.now += 1
        assert batches[0] == batches[1], "the two write other bytes"
        assert self.pairs[0].state() == self.pairs[1].state()

    def send(self) -> None:
        dirty, self.dirty = self.dirty, PageSet(self.pages)
        now = self.now + 1
        self.end_round([pair.send(now, bytes(self.memory), dirty) for pair in self.pairs])
        there = self.padded()
        assert self.pairs[0].memory.view == there, "something else arrived"
        for cache in (pair.cache for pair in self.pairs if pair.cache is not None):
            for page in range(self.pages):
                content = there[page * self.page_size : (page + 1) * self.page_size]
                assert cache.get(page) in (None, content), f"page {page} has grown old"

    def holes(self, first: int, count: int) -> None:
        """Zeros where nobody need look: for the destination as for the guest."""
        first %= self.pages
        count = min(count, self.pages - first)
        for page in range(first, first + count):
            self.write(page, 0, bytes(self.page_size))
        now = self.now + 1
        self.end_round([pair.holes(now, first, count) for pair in self.pairs])

    def scan(self) -> None:
        """What differs is found, and what does not is not, but for pages whose hash is stale."""
        padded, there = self.padded(), bytes(self.pairs[0].memory)
        found = [pair.scan(padded, self.pages) for pair in self.pairs]
        assert found[0] == found[1]
        for page in range(self.pages):
            part = slice(page * self.page_size, (page + 1) * self.page_size)
            if padded[part] != there[part]:
                assert found[0][1][page >> 3] >> (page & 7) & 1, f"page {page} was overlooked"

    def resize(self, entries: int) -> None:
        for pair in self.pairs:
            if pair.cache is not None:
                try:
                    pair.cache.resize(entries * self.page_size)
                except CacheSizeError:
                    assert entries & (entries - 1) or not entries

    def switch(self, on: bool) -> None:
        for pair in self.pairs:
            if pair.cache is not None:
                pair.encoder.active = on


def rounds(data: bytes) -> None:
    control, pieces = split(data)
    guest = Guest(control)
    use_simd(SIMD[(control[3] >> 2) % len(SIMD)])
    try:
        for kind, content in pieces[:MOST_PIECES]:
            page, low, high, *_ = content[:3].ljust(3, b"\0")
            _do(guest, kind & 7, page, low << 8 | high, content[3:])
            if guest.now >= MOST_ROUNDS:
                break
        guest.send()
    finally:
        use_simd()


def _do(guest: Guest, what: int, page: int, number: int, content: bytes) -> None:
    size = guest.page_size
    if what == WRITE:
        guest.write(page, number, content)
    elif what == FILL:
        step = content[0] if content else 1
        guest.write(page, number, (PATTERN[step:] if step & 1 else bytes([step]) * size)[:size])
    elif what == CLEAR:
        guest.write(page, number, bytes(size))
    elif what == COPY:
        at = number % guest.pages * size
        guest.write(page, 0, bytes(guest.memory[at : at + size]))
    elif what == SEND:
        guest.send()
    elif what == RESIZE and page >= SWITCHES:
        guest.switch(bool(page & 1))
    elif what == RESIZE:
        guest.resize(page & 31)
    elif what == HOLES:
        guest.holes(page, 1 + number % 8)
    else:
        guest.scan()
