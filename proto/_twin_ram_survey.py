"""The kernel of proto/_ram_survey.pyx in plain Python: what it means, without how it is fast."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from proto._twin import (
    BAD_CHECK,
    BAD_DATA,
    HEAD,
    MAX_PAGE,
    OP_DELTA,
    OP_RAW,
    PAST_GUEST,
    STEP,
    FaultError,
    PageHashes,
    delta_runs,
    read_record,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

RECORD = struct.Struct("=QQII")
ZERO_KIND, PAGE_KIND, DELTA_KIND = range(3)
MOST_PAGES = 1 << 32
ROUNDS = 4096  # that are told apart
BROKEN = 64  # deltas that are named
GAPS = 16  # runs of pages that never came, named
OFTEN = 255

Row = tuple[int, int, int, int]


def records_of(records: Buffer, count: int, size: int = 1 << 62) -> Iterator[Row]:
    """(page, where its body is, length, kind) of each, all of them inside `size` bytes."""
    table = memoryview(records)
    if not 0 <= count <= len(table) // RECORD.size:
        raise ValueError("there are fewer records than that")
    rows = list(RECORD.iter_unpack(table[: count * RECORD.size]))
    if any(at + length > size for _, at, length, _ in rows):
        raise ValueError("a record outside the data")
    return iter(rows)


class RamSurvey:
    """Counts what records bring.

    firsts -- number of the first page of each block, and of all pages at the end

    A round ends where the pages begin anew: at one whose number is not above that of the last.
    """

    def __init__(self, firsts: Sequence[int], page_size: int) -> None:
        if len(firsts) < 2 or not 1 <= page_size <= MAX_PAGE:
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
        """Takes in records of a RamReader. base: where the stream's data[0] is."""
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
            place = {PAGE_KIND: 1, ZERO_KIND: 0}.get(kind, 2)
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
        """Of each block: zero, raw and delta records, bytes of deltas, bytes that those change;
        deltas that are empty, broken, and the first that comes of their page."""
        return [tuple(totals) for totals in self._totals]

    @property
    def rounds(self) -> list[tuple[int, ...]]:
        """(where the body of its first record is, zero, raw, delta records, bytes of deltas); the
        last one has also what came in those beyond."""
        return [tuple(one) for one in self._rounds]

    def coverage(self, block: int) -> tuple[int, int, int, list[tuple[int, int]]]:
        """(pages that came, that came again, how often one came at most (255: or more), the first
        runs that never came), the runs as (first, last) in the block."""
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
    """[(page, where its record begins, kind, length of the body)] of pages `first` to `last`.

    start -- where the first of the records begins
    """
    found = []
    for page, at, length, kind in records_of(records, count):
        if first <= page <= last:
            found.append((page, start, kind, length))
        start = at + length + (kind == ZERO_KIND)
    return found


class RamImage:
    """The memory of one block, in a file that is as long as it and all zeros at first.

    first  -- number of its first page
    size   -- its bytes
    memory -- a mapping of the file, which the compiled kernel makes use of
    """

    def __init__(
        self, first: int, size: int, page_size: int, fd: int, memory: Buffer | None = None
    ) -> None:
        del memory
        if not 1 <= page_size <= MAX_PAGE or not 0 < size <= MOST_PAGES * page_size:
            raise ValueError(f"{size} bytes in pages of {page_size}")
        self._pages = range(first, first + -(-size // page_size))
        self._size, self._page_size, self._fd = size, page_size, fd
        self._written: set[int] = set()

    def apply(self, data: Buffer, records: Buffer, count: int) -> None:
        """Writes what the records bring for this block. A broken delta leaves its page as it is.

        Raises OSError.
        """
        content, size = memoryview(data), self._page_size
        for page, at, length, kind in records_of(records, count, len(content)):
            if page not in self._pages:
                continue
            body = bytes(content[at : at + length])
            if kind == ZERO_KIND:
                if page in self._written:
                    self._put(page, bytes(size))
                continue
            if kind == PAGE_KIND and length != size:
                continue
            if kind == DELTA_KIND:
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


class BatchSurvey:
    """Reads bodies of PAGES.

    pages, page_size -- of the guest; 0: not known
    seed             -- of its page hashes; empty: not known, and raw pages are not checked
    """

    def __init__(self, pages: int, page_size: int, seed: bytes, *, whole: bool = True) -> None:
        if pages > MOST_PAGES or not 0 <= page_size <= MAX_PAGE:
            raise ValueError(f"{pages} pages of {page_size} bytes")
        self.pages = pages or MOST_PAGES
        self.page_size = page_size or MAX_PAGE
        self.whole = whole and pages > 0
        self._known_size = page_size > 0
        self._keyed = PageHashes(1, page_size, seed) if page_size and seed else None
        self._received: set[int] = set()

    @property
    def received_pages(self) -> int:
        return len(self._received)

    def read(
        self, head: Buffer, data: Buffer
    ) -> tuple[int, int, int, int, int, int, int, int, int, str]:
        """One body.

        Returns (round, first page, zero, raw, delta pages, bytes of deltas, bytes that they change,
        deltas without a base, where it is wrong, what is wrong there): the counts go as far as it
        is right, "" where it all is.
        """
        head, content = bytes(head), bytes(data)
        if len(head) <= HEAD:
            what = f"a batch of {len(head)} bytes holds no record"
            return 0, 0, 0, 0, 0, 0, 0, 0, 0, what
        number, first = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:12], "big")
        zero = raw = delta = delta_bytes = changed = baseless = 0
        at, next_page, what = HEAD, first, ""
        try:
            if first >= self.pages:
                at = 4
                raise FaultError(PAST_GUEST)
            while at < len(head):
                record, after = read_record(head, at, next_page, self.pages, self.page_size)
                if record.op == OP_DELTA:
                    changed += sum(len(run) for _, run in delta_runs(record.delta, self.page_size))
                    delta += 1
                    delta_bytes += len(record.delta)
                    baseless += self.whole and record.first not in self._received
                elif record.op == OP_RAW:
                    raw += record.count
                else:
                    zero += record.count
                if self.whole:
                    self._received.update(record.pages)
                next_page, at = record.first + record.count, after
            size = self.page_size
            if not self._known_size and raw:
                size = len(content) // raw
            if raw * size != len(content):
                raise FaultError(BAD_DATA)
            if self._keyed is not None and _check(self._keyed, content, size) != head[12:HEAD]:
                at = 12
                raise FaultError(BAD_CHECK)
        except FaultError as fault:
            what = str(fault)
        return number, first, zero, raw, delta, delta_bytes, changed, baseless, at, what


def _check(hashes: PageHashes, content: bytes, size: int) -> bytes:
    """Of raw pages."""
    check = 0
    for i in range(0, len(content), size):
        check = (check * STEP + hashes.hash_of(content[i : i + size])) % 2**64
    return check.to_bytes(8, "big")
