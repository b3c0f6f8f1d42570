"""What a captured stream of QEMU holds, in plain Python: see _ram_survey.pyx."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from proto.codec._batch_twin import RAM_DELTA, RAM_PAGE, RAM_RECORD, RAM_ZERO
from proto.codec._xbzrle_twin import MAX_PAGE_SIZE, delta_runs
from proto.codec.faults import FaultError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MOST_PAGES = 1 << 32
ROUNDS = 4096  # rounds that are told apart
BROKEN = 64  # broken deltas that are named
GAPS = 16  # runs of missing pages that are named
OFTEN = 255

Row = tuple[int, int, int, int]


def records_of(records: Buffer, count: int, size: int = 1 << 62) -> Iterator[Row]:
    """Return the records as (page, place of the body, its length, kind), all inside `size` bytes.

    Raises ValueError.
    """
    table = memoryview(records)
    if not 0 <= count <= len(table) // RAM_RECORD.size:
        raise ValueError("there are fewer records than that")
    rows = list(RAM_RECORD.iter_unpack(table[: count * RAM_RECORD.size]))
    if any(at + length > size for _, at, length, _ in rows):
        raise ValueError("a record outside the data")
    return iter(rows)


class RamSurvey:
    """Counts what records bring.

    firsts -- number of the first page of each block, and of all pages at the end

    QEMU does not mark its rounds. It sends pages in ascending order, so a page whose number is not
    above that of the last one begins a round.
    """

    def __init__(self, firsts: Sequence[int], page_size: int) -> None:
        if len(firsts) < 2 or not 1 <= page_size <= MAX_PAGE_SIZE:
            raise ValueError(f"{len(firsts) - 1} blocks of pages of {page_size} bytes")
        if firsts[-1] > MOST_PAGES:
            raise ValueError(f"{firsts[-1]} pages: at most {MOST_PAGES} can be counted")
        if any(b < a for a, b in itertools.pairwise(firsts)):
            raise ValueError("blocks that do not follow on each other")
        self._firsts = list(firsts)
        self._page_size = page_size
        self._times: dict[int, int] = {}
        self._totals = [[0] * 8 for _ in firsts[1:]]
        self._rounds: list[list[int]] = []
        self._next_page = 0
        self.rounds_seen = 0
        self.broken: list[tuple[int, int, str]] = []

    def note(self, data: Buffer, records: Buffer, count: int, base: int) -> None:
        """Count records of a RamReader.

        base -- byte of the stream that data[0] is

        Raises ValueError for a page outside the guest.
        """
        content = memoryview(data)
        rows = list(records_of(records, count, len(content)))
        if any(page >= self._firsts[-1] for page, *_ in rows):
            raise ValueError("a page outside the guest")
        for page, at, length, kind in rows:
            totals = self._totals[max(n for n, f in enumerate(self._firsts) if f <= page)]
            if page < self._next_page or not self.rounds_seen:
                self.rounds_seen += 1
                if len(self._rounds) < ROUNDS:
                    self._rounds.append([base + at, 0, 0, 0, 0])
            self._next_page = page + 1
            now = self._rounds[-1]
            place = {RAM_PAGE: 1, RAM_ZERO: 0}.get(kind, 2)
            totals[place] += 1
            now[1 + place] += 1
            if place == 2:
                totals[3] += length
                now[4] += length
                totals[5] += length == 0
                totals[7] += page not in self._times
                try:
                    runs = delta_runs(bytes(content[at : at + length]), self._page_size)
                    totals[4] += sum(len(run) for _, run in runs)
                except FaultError as fault:
                    totals[6] += 1
                    if len(self.broken) < BROKEN:
                        self.broken.append((page, base + at, str(fault)))
            self._times[page] = min(self._times.get(page, 0) + 1, OFTEN)

    @property
    def blocks(self) -> list[tuple[int, ...]]:
        """For each block: records of zeros, raw pages and deltas; bytes of the deltas, and bytes of
        pages that they bring; deltas that are empty, broken, or come first of their page."""
        return [tuple(totals) for totals in self._totals]

    @property
    def rounds(self) -> list[tuple[int, ...]]:
        """For each round: the byte of the stream at which the body of its first record is; records
        of zeros, raw pages and deltas; bytes of the deltas. The last of 4096 rounds also counts
        what came in later ones."""
        return [tuple(one) for one in self._rounds]

    def coverage(self, block: int) -> tuple[int, int, int, list[tuple[int, int]]]:
        """Return which pages of a block came.

        Returns (pages that came, pages that came more than once, most times that a page came, 255
        meaning that or more; the first runs of pages that never came, as (first, last) within the
        block).
        """
        if not 0 <= block < len(self._totals):
            raise ValueError("there is no such block")
        first, end = self._firsts[block], self._firsts[block + 1]
        times = [self._times.get(page, 0) for page in range(first, end)]
        runs: list[tuple[int, int]] = []
        for page, count in enumerate(times):
            if count == 0 and runs and runs[-1][1] == page - 1:
                runs[-1] = runs[-1][0], page
            elif count == 0:
                runs.append((page, page))
        came = sum(count > 0 for count in times)
        return came, sum(count > 1 for count in times), max(times, default=0), runs[:GAPS]


def select_records(records: Buffer, count: int, start: int, first: int, last: int) -> list[Row]:
    """Return the records of the pages `first` to `last`.

    start -- byte at which the first of the records begins

    Returns a list of (page, byte at which its record begins, kind, length of its body).
    """
    found = []
    for page, at, length, kind in records_of(records, count):
        if first <= page <= last:
            found.append((page, start, kind, length))
        start = at + length + (kind == RAM_ZERO)
    return found


class RamImage:
    """The memory of one block, in a file that is as long as the block and all zeros at first.

    first  -- number of the block's first page
    size   -- bytes of the block
    memory -- a mapping of the file, which only the compiled kernel uses
    """

    def __init__(
        self, first: int, size: int, page_size: int, fd: int, memory: Buffer | None = None
    ) -> None:
        del memory
        if not 1 <= page_size <= MAX_PAGE_SIZE or not 0 < size <= MOST_PAGES * page_size:
            raise ValueError(f"{size} bytes in pages of {page_size}")
        self._pages = range(first, first + -(-size // page_size))
        self._size, self._page_size, self._fd = size, page_size, fd
        self._written: set[int] = set()

    def apply(self, data: Buffer, records: Buffer, count: int) -> None:
        """Write what the records bring for this block. A broken delta leaves its page as it is.

        Raises OSError.
        """
        content, size = memoryview(data), self._page_size
        for page, at, length, kind in records_of(records, count, len(content)):
            if page not in self._pages:
                continue
            body = bytes(content[at : at + length])
            if kind == RAM_ZERO:
                if page in self._written:
                    self._put(page, bytes(size))
                continue
            if kind == RAM_PAGE and length != size:
                continue
            if kind == RAM_DELTA:
                old = bytearray(size)
                if page in self._written:
                    there = os.pread(self._fd, size, (page - self._pages[0]) * size)
                    old[: len(there)] = there
                try:
                    runs = delta_runs(body, size)
                except FaultError:
                    continue
                if not runs:
                    continue
                for place, run in runs:
                    old[place : place + len(run)] = run
                body = bytes(old)
            self._put(page, body)
            self._written.add(page)

    def _put(self, page: int, body: bytes) -> None:
        offset = (page - self._pages[0]) * self._page_size
        os.pwrite(self._fd, body[: self._size - offset], offset)
