"""Dirty tracking: from the guest's own marks, or by comparing memory with what was sent.

    take ---> a set of pages ---acknowledged----> done
      ^       (clears it)    ---round failed----> put_back
      +----------------------------------------------+

A dirty bit is never lost. Taking the dirty set clears it, so whatever is not acknowledged is put
back: after a failed round, a cancellation, or a broken link. Losing one is the commonest silent
corruption in live migration, since the guest at the destination runs on with an old page.

Marks are exact, and taking them costs the same however much memory the guest has written. The guest
sets a mark after it has written the page, and we clear it before we read the page. A write between
the two is either in what we read, or marked again.

Scanning needs no help from the writer and sees every write, through whatever mapping. It compares a
page with the page cache byte for byte if it is cached, else by its keyed hash (a change is missed
with a probability below 2^-62), at memory speed. It costs the same whether much or little was
written, and the last scan is part of the pause.

A file is scanned by several threads if there are processors for them: in the pause the guest leaves
its own to us. One thread reads and compares 4.7 GB/s on an EPYC; reading alone, which is more than
half of that, goes at 7.5 GB/s in one thread and at 12 in two.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import NamedTuple

from migrate.memory._memory import put_back_marks, take_marks
from migrate.memory.drop_behind import PIECE_BYTES, DropBehind
from migrate.memory.memory import Memory, private_buffer
from proto.codec.kernel import PageEncoder
from proto.codec.pageset import PageSet

# A thread reads this much, then compares it: it stays in the core's own cache.
SCAN_BYTES = 256 << 10
# A second thread reads 1.6 times as much (above); more than a few gain little.
MOST_THREADS = 4


class Method(Enum):
    """How written pages are found."""

    MARKS = "marks"
    COMPARE = "compare"
    KERNEL = "kernel"


class Look(NamedTuple):
    """How written pages would be found, and the seconds that it would take each time.

    refusal -- why the kernel's record would not be used, if it should
    """

    method: Method
    seconds: float
    refusal: str = ""


class DirtyTracker(ABC):
    """The dirty set of one guest during one migration."""

    take_seconds = 0.0
    """The duration of the last `take`; the one in the pause will take as long."""

    def __init__(self) -> None:
        self.method = Method.COMPARE
        self.notices: list[str] = []

    def collect_notices(self) -> list[str]:
        """Return what the user should know since the last call."""
        notices, self.notices = self.notices, []
        return notices

    def close(self) -> None:
        """End the tracking: nothing of it stays with the guest."""

    def start(self) -> None:
        """Forget what was written until now: all pages are about to be sent anyway."""

    @abstractmethod
    def take(self) -> PageSet:
        """Return the pages written since they were last taken, and clear the set.

        A scan returns those that differ from the peer's. Raise OSError if reading fails.
        """

    @abstractmethod
    def put_back(self, dirty: PageSet) -> None:
        """Undo a `take`: these pages were not sent after all."""


class MarkTracker(DirtyTracker):
    """Tracks guests that mark: a byte per page, in whole words, set after the page is written."""

    def __init__(self, marks: memoryview, pages: int) -> None:
        super().__init__()
        self.method = Method.MARKS
        self._marks = marks
        self._pages = pages

    def start(self) -> None:
        self.take()  # clears the marks

    def take(self) -> PageSet:
        began = time.perf_counter()
        dirty = PageSet(self._pages)
        take_marks(self._marks, dirty.bits)
        self.take_seconds = time.perf_counter() - began
        return dirty

    def put_back(self, dirty: PageSet) -> None:
        put_back_marks(self._marks, dirty.bits)


class Scanner:
    """Compares parts of a guest's memory with what the encoder knows the peer to hold.

    threads -- at most this many scan at once; 0: one per processor, up to MOST_THREADS
    """

    def __init__(self, memory: Memory, encoder: PageEncoder, threads: int = 0) -> None:
        self._memory = memory
        self._encoder = encoder
        most = threads or min(len(os.sched_getaffinity(0)), MOST_THREADS)
        # Copies of a buffer are made under the interpreter's lock: a second thread would not help.
        most = most if memory.threaded else 1
        self._buffers = [private_buffer(SCAN_BYTES) for _ in range(most)]

    def scan(self, parts: Iterable[tuple[int, int]], dirty: PageSet) -> None:
        """Add the pages that differ to `dirty`. Raise OSError if reading fails.

        parts -- (first page, number of pages)
        """
        step, behind = PIECE_BYTES // self._encoder.page_size, self._memory.drop_behind
        # Threads take pieces from one queue, so one that gets less of its processor does less. A
        # piece is a whole number of bitmap words, but neighbours may share a byte of `dirty.bits`
        # if a part is not aligned: the kernel sets bits atomically.
        pieces = deque(
            (page, min(step, first + count - page))
            for first, count in parts
            for page in range(first, first + count, step)
        )
        threads = min(len(self._buffers), sum(count for _, count in pieces) // step)
        if threads < 2:
            self._scan_pieces(pieces, dirty, self._buffers[0], behind)
        else:
            with ThreadPoolExecutor(threads, "scan") as pool:
                for task in [
                    pool.submit(self._scan_pieces, pieces, dirty, buffer, behind)
                    for buffer in self._buffers[:threads]
                ]:
                    task.result()
        if behind is not None:
            behind.drop(0, self._memory.size)  # what one thread has read ahead of another

    def _scan_pieces(
        self, pieces: deque[tuple[int, int]], dirty: PageSet, buffer: memoryview,
        behind: DropBehind | None,
    ) -> None:  # fmt: skip
        """Scan pieces until none is left. Runs in several threads; deque.popleft is atomic."""
        while True:
            try:
                first, count = pieces.popleft()
            except IndexError:
                return
            if self._memory.threaded:
                self._encoder.scan_file(
                    self._memory.fd, self._memory.size, first, count, dirty.bits, buffer
                )
                if behind is not None:
                    page_size = self._encoder.page_size
                    behind.drop(first * page_size, (first + count) * page_size)
            else:
                self._scan_copies(first, count, dirty, buffer)

    def _scan_copies(self, first: int, count: int, dirty: PageSet, buffer: memoryview) -> None:
        """Scan memory that can only be read through its guest, a copy at a time."""
        page_size = self._encoder.page_size
        step = SCAN_BYTES // page_size
        for page in range(first, first + count, step):
            some = min(step, first + count - page)
            copy = buffer[: some * page_size]
            got = self._memory.read(page * page_size, copy)
            if got < len(copy):
                copy[got:] = bytes(len(copy) - got)
            self._encoder.scan(page, some, copy, dirty.bits)


class ScanTracker(DirtyTracker):
    """Tracks any guest: compares its memory with what the encoder knows the peer to hold."""

    def __init__(self, memory: Memory, encoder: PageEncoder) -> None:
        super().__init__()
        self._memory = memory
        self._encoder = encoder
        self._scanner = Scanner(memory, encoder)

    def take(self) -> PageSet:
        began = time.perf_counter()
        dirty, parts = PageSet(self._encoder.pages), []
        for first, count, data in self._memory.extents(self._encoder.page_size):
            if data:
                parts.append((first, count))
            else:
                self._encoder.scan_zeros(first, count, dirty.bits)
        self._scanner.scan(parts, dirty)
        self.take_seconds = time.perf_counter() - began
        return dirty

    def put_back(self, dirty: PageSet) -> None:
        """Do nothing: what was not sent still differs, and the next scan finds it."""
