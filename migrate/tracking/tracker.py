"""The dirty pages of a guest: by the kernel's record where that can be trusted, else by scans.

    COMPARE --a scan would not fit the downtime limit--> KERNEL --not to be trusted--> COMPARE

A scan reads all of the guest, so the pause would grow with it. The record names the written pages
in milliseconds, but it belongs to mappings: it sees neither a mapping that is new, nor a write by a
descriptor. So each look asks what else has happened (changes.py, and the mappings of each process).
After anything unusual the guest is compared as a whole once more, with what is new already
recorded. What a writer does again and again ends the record.

Comparisons while the guest runs prove the record. If one finds a page that differs and was not
named, the record has missed it, and is not used any more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from enum import Enum

from migrate.memory.dirty import DirtyTracker, Method, Scanner, ScanTracker
from migrate.memory.memory import Memory
from migrate.tracking.record import Record, Refused
from migrate.units import format_seconds
from proto.codec.kernel import PageEncoder
from proto.codec.pageset import PageSet

# In `auto`, the record is used where a scan would take more of the downtime limit than this.
SCAN_SHARE = 0.25
# Bytes that are compared to learn how fast that goes.
PROBE_BYTES = 64 << 20
# The share of the time that comparisons may take which prove the record.
PROOF_SHARE = 0.1


class Tracking(Enum):
    """How the user wants written pages to be found (--tracking)."""

    AUTO = "auto"
    KERNEL = "kernel"
    COMPARE = "compare"


def is_wanted(tracking: Tracking, downtime_limit: Callable[[], float]) -> Callable[[float], bool]:
    """Return what says, from the seconds of a scan, whether the record is to be used."""
    if tracking is Tracking.AUTO:
        return lambda seconds: seconds > SCAN_SHARE * downtime_limit()
    return lambda _seconds: tracking is Tracking.KERNEL


class RecordTracker(DirtyTracker):
    """Finds what was written to a guest.

    begin   -- makes the record; raises Refused
    wanted  -- seconds of a scan -> whether the record is to be used instead
    running -- whether the guest runs now: only then there is time to prove the record
    """

    def __init__(
        self, memory: Memory, encoder: PageEncoder, begin: Callable[[], Record],
        wanted: Callable[[float], bool], running: Callable[[], bool],
    ) -> None:  # fmt: skip
        super().__init__()
        self._memory = memory
        self._encoder = encoder
        self._begin = begin
        self._wanted = wanted
        self._running = running
        self._scan = ScanTracker(memory, encoder)
        self._record: Record | None = None
        self._refused = False
        self._late = PageSet(encoder.pages)
        # When the record was proved last, and how long that took.
        self._proved, self._proof_seconds = -math.inf, 0.0

    def start(self) -> None:
        if self._record is not None:
            try:
                self._record.look(PageSet(self._encoder.pages))
            except Refused as refused:
                self._refuse(refused)
        self._late = PageSet(self._encoder.pages)

    def take(self) -> PageSet:
        if self._record is None and not self._refused and self._running():
            self._try_record()
        dirty = self._scanned() if self._record is None else self._recorded(self._record)
        dirty |= self._late
        self._late = PageSet(self._encoder.pages)
        return dirty

    def put_back(self, dirty: PageSet) -> None:
        self._late |= dirty

    def close(self) -> None:
        if self._record is not None:
            self._record.close()
            self._record = None

    # -- by comparing

    def _scanned(self) -> PageSet:
        dirty = self._scan.take()
        self.take_seconds = self._scan.take_seconds
        return dirty

    def _probe(self) -> float:
        """Compare a small part of the guest; return what all of it would take."""
        page_size, parts, pages = self._encoder.page_size, [], 0
        for first, count, data in self._memory.extents(page_size):
            if data:
                parts.append((first, min(count, max(0, PROBE_BYTES // page_size - pages))))
                pages += count
        began = time.perf_counter()
        parts = [(first, count) for first, count in parts if count]
        Scanner(self._memory, self._encoder).scan(parts, PageSet(self._encoder.pages))
        compared = sum(count for _, count in parts)
        return (time.perf_counter() - began) * pages / compared if compared else 0.0

    # -- by the kernel's record

    def _try_record(self) -> None:
        self._scan.take_seconds = self._scan.take_seconds or self._probe()
        if not self._wanted(self._scan.take_seconds):
            return
        try:
            self._record = self._begin()
        except Refused as refused:
            self._refuse(refused)
            return
        text = f"comparing all of the guest takes {format_seconds(self._scan.take_seconds)}: "
        text += "the kernel records what "
        if pids := self._record.pids:
            who = f"process {pids[0]} writes" if len(pids) == 1 else f"{len(pids)} processes write"
            text += f"{who} instead (stopped for {format_seconds(self._record.seconds)} to begin)"
        else:
            text += "is written instead"
        self.notices.append(text)

    def _refuse(self, refused: Refused) -> None:
        self._refused = True
        self.close()
        self.take_seconds, self.method = self._scan.take_seconds, Method.COMPARE
        self.notices.append(
            f"comparing all of the guest takes {format_seconds(self._scan.take_seconds)}, and is "
            f"needed each time: the kernel's record of writes cannot be used: {refused}"
        )

    def _recorded(self, record: Record) -> PageSet:
        began = time.perf_counter()
        dirty = PageSet(self._encoder.pages)
        try:
            happened = record.look(dirty)
        except Refused as refused:
            self._refuse(refused)
            dirty |= self._scanned()
            return dirty
        self.take_seconds = time.perf_counter() - began
        self.method = Method.KERNEL
        due = time.monotonic() - self._proved > self._proof_seconds / PROOF_SHARE
        if happened or (due and self._running()):
            self._compare(record, dirty, happened)
        return dirty

    def _compare(self, record: Record, dirty: PageSet, happened: str) -> None:
        """Add what differs to the written pages, and prove that the record has named all of it."""
        began = time.monotonic()
        differs = self._scan.take()
        dirty |= self._late
        try:
            more = record.look(dirty)
        except Refused as refused:
            self._refuse(refused)
            more = "refused"
        first = self._proved == -math.inf
        self._proved = time.monotonic()
        self._proof_seconds = self._proved - began
        named = len(dirty)
        dirty |= differs
        if (missed := len(dirty) - named) and not (happened or more or first):
            self._refuse(Refused(f"it has missed {missed} written pages"))
