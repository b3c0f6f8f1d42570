"""Which pages were written: from the guest's own marks, or by comparing with what was sent.

A dirty bit is never lost. Taking the dirty set clears it; whoever takes it sends it or puts it
back. Marks are exact and cost nothing. Scanning needs no help from the writer and sees every
write, through whatever mapping: it compares with the page cache byte for byte where the page is
cached, else by its keyed hash (a change is missed with a probability below 2^-62), at memory speed.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

from migrate._memory import put_back_marks, take_marks
from migrate.memory import Memory, private_buffer
from proto.kernel import PageEncoder
from proto.pageset import PageSet

SCAN_BYTES = 256 << 10  # it stays in the core's own cache


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
    """For all others: compares memory with what the encoder knows the peer to hold."""

    def __init__(self, memory: Memory, encoder: PageEncoder) -> None:
        self._memory = memory
        self._encoder = encoder
        self._buffer = private_buffer(SCAN_BYTES)

    def take(self) -> PageSet:
        began = time.perf_counter()
        dirty = PageSet(self._encoder.pages)
        page_size = self._encoder.page_size
        step = SCAN_BYTES // page_size
        for first, count, data in self._memory.extents(page_size):
            if not data:
                self._encoder.scan_zeros(first, count, dirty.bits)
                continue
            for page in range(first, first + count, step):
                self._scan(page, min(step, first + count - page), dirty)
        self.take_seconds = time.perf_counter() - began
        return dirty

    def _scan(self, first: int, count: int, dirty: PageSet) -> None:
        page_size = self._encoder.page_size
        buffer = self._buffer[: count * page_size]
        got = self._memory.read(first * page_size, buffer)
        if got < len(buffer):
            buffer[got:] = bytes(len(buffer) - got)
        self._encoder.scan(first, count, buffer, dirty.bits)

    def put_back(self, dirty: PageSet) -> None:
        """Nothing to do: what was not sent still differs, and the next scan finds it."""
