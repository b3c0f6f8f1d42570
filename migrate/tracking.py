"""Which pages were written: from the guest's own marks, or by comparing with what was sent.

A dirty bit is never lost. Taking the dirty set clears it; whoever takes it sends it or puts it
back. Marks are exact and cost nothing. Scanning needs no help from the writer and sees every
write, through whatever mapping: it compares with the page cache byte for byte where the page is
cached, else by a keyed 128-bit hash (a change is missed with probability 2^-64), at memory speed.
"""

from __future__ import annotations

import mmap
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

from migrate._memory import put_back_marks, take_marks
from migrate.digest import ChunkDigests
from migrate.memory import Memory
from proto.kernel import PageEncoder
from proto.messages import DIGEST_CHUNK
from proto.pageset import PageSet

SCAN_BYTES = 1 << 20


class DirtyTracker(ABC):
    """The dirty set of one guest during one migration."""

    take_seconds = 0.0
    """What the last `take` cost; the one in the pause will cost as much."""

    def start(self) -> None:
        """Begins before all pages are sent: what was written until now needs no sending twice."""

    @abstractmethod
    def take(self) -> PageSet:
        """The pages written since they were last taken (scanning: that differ from the peer's)."""

    @abstractmethod
    def put_back(self, dirty: PageSet) -> None:
        """Undoes a `take`: these pages were not sent after all."""


class MarkTracker(DirtyTracker):
    """For guests that mark: a byte per page, in whole words, set after the page is written."""

    def __init__(self, marks: memoryview, pages: int) -> None:
        self._marks = marks
        self._pages = pages

    def start(self) -> None:
        self.take()

    def take(self) -> PageSet:
        began = time.perf_counter()
        dirty = PageSet(self._pages)
        take_marks(self._marks, dirty.bits)
        self.take_seconds = time.perf_counter() - began
        return dirty

    def put_back(self, dirty: PageSet) -> None:
        put_back_marks(self._marks, dirty.bits)


class ScanTracker(DirtyTracker):
    """For all others: compares memory with what the encoder knows the peer to hold.

    It also keeps the chunk digests: a chunk in which no page differs is hashed from the very copy
    that was compared. A digest taken from live memory at another moment could be of a content
    that was there for a moment only and never sent.
    """

    def __init__(self, memory: Memory, encoder: PageEncoder, digests: ChunkDigests) -> None:
        self._memory = memory
        self._encoder = encoder
        self._digests = digests
        self._buffer = memoryview(mmap.mmap(-1, SCAN_BYTES))

    def take(self) -> PageSet:
        began = time.perf_counter()
        dirty = PageSet(self._encoder.pages)
        step = SCAN_BYTES // self._encoder.page_size
        for first, end, data in self._stretches():
            if not data:
                self._encoder.scan_zeros(first, end - first, dirty.bits)
                self._digests.settle_zeros(first, end)
                continue
            page = first
            while page < end:
                stop = min(page - page % step + step, end)
                self._scan(page, stop - page, dirty)
                page = stop
        self._digests.touch(dirty)
        self.take_seconds = time.perf_counter() - began
        return dirty

    def _stretches(self) -> Iterator[tuple[int, int, bool]]:
        """(page, end, data) for all of the guest, in whole digest chunks: one copy serves both."""
        chunk = self._digests.chunk_pages
        done = 0
        for first, count, data in self._memory.extents(self._encoder.page_size):
            if data:
                start = max(first - first % chunk, done)
                end = min(-(-(first + count) // chunk) * chunk, self._encoder.pages)
                if start > done:
                    yield done, start, False
                if end > start:
                    yield start, end, True
                    done = end
        if done < self._encoder.pages:
            yield done, self._encoder.pages, False

    def _scan(self, first: int, count: int, dirty: PageSet) -> None:
        page_size = self._encoder.page_size
        buffer = self._buffer[: count * page_size]
        got = self._memory.read(first * page_size, buffer)
        if got < len(buffer):
            buffer[got:] = bytes(len(buffer) - got)
        if self._encoder.scan(first, count, buffer, dirty.bits) == count:
            return
        pages = self._digests.chunk_pages
        base = first & ~7
        differs = int.from_bytes(dirty.bits[base >> 3 : (first + count + 7) >> 3], "little")
        for chunk in range(first // pages, -(-(first + count) // pages)):
            at = chunk * pages
            if self._digests.stale[chunk] and not differs >> (at - base) & ((1 << pages) - 1):
                offset = (at - first) * page_size
                self._digests.settle_chunk(chunk, buffer[offset : offset + DIGEST_CHUNK])

    def put_back(self, dirty: PageSet) -> None:
        """Nothing to do: what was not sent still differs, and the next scan finds it."""
