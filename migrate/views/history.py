"""What each round did, from the snapshots that an observer of a migration gets.

Statistics count from the start of the migration; what a round did is the difference between two
snapshots. Memory is bounded. If there are too many rounds, those between the first and the last
ones are merged two by two, then four by four, so the sums over all records stay the totals of the
migration. If there are too many samples, every other one is dropped, and from then on half as many
are taken.

    head | body, `span` rounds each | recent | since the last round
    -----+--------------------------+--------+----------------------------------
                   closed                    | current; tail, after the migration

This module knows no clocks, terminals or files.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from migrate.events import Event, Notice, SourceEvent
from migrate.statistics import OVER, Statistics, Status

# Records of single rounds at the start and at the end, and the most records between them.
HEAD_ROUNDS = 8
RECENT_ROUNDS = 64
MAX_ROUNDS = 512
MAX_SAMPLES = 2048
# The first interval between samples, as long as a source's interval between PROGRESS events.
SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class RoundRecord:
    """Rounds `first` to `number`, usually a single one. Times in seconds, sizes in bytes.

    began      -- seconds after the start of the migration
    zero, normal, delta -- pages sent, by kind
    skipped    -- pages that were dirty, but equal to those at the destination
    remaining  -- bytes dirty at the end of the round
    dirty_rate -- bytes per second that the guest dirtied in the round
    expected_downtime -- the downtime that was predicted at the end of the round
    paused     -- the guest was paused: the last round
    unfinished -- the migration ended in the middle of the round
    """

    first: int
    number: int
    began: float
    seconds: float
    wire_bytes: int
    zero: int
    normal: int
    delta: int
    skipped: int
    delta_bytes: int
    hits: int
    misses: int
    overflow: int
    remaining: int
    dirty_rate: float
    expected_downtime: float | None
    cache_size: int
    paused: bool = False
    unfinished: bool = False

    @property
    def count(self) -> int:
        """Number of rounds in this record."""
        return self.number - self.first + 1

    @property
    def pages(self) -> int:
        """Pages sent, of all kinds."""
        return self.zero + self.normal + self.delta

    @property
    def ended(self) -> float:
        return self.began + self.seconds

    @property
    def hit_ratio(self) -> float | None:
        """Share of the pages looked up in the cache that were found; None if none was looked up."""
        looked_up = self.hits + self.misses
        return self.hits / looked_up if looked_up else None

    @property
    def mbps(self) -> float:
        """Throughput in 10^6 bits per second."""
        return self.wire_bytes * 8 / self.seconds / 1e6 if self.seconds > 0 else 0.0


SUMS = ("seconds", "wire_bytes", "zero", "normal", "delta", "skipped", "delta_bytes", "hits",
        "misses", "overflow")  # fmt: skip


def merge(one: RoundRecord, two: RoundRecord) -> RoundRecord:
    """Merge two consecutive records: add the counters, take the rest from the second."""
    sums = {name: getattr(one, name) + getattr(two, name) for name in SUMS}
    return replace(two, first=one.first, began=one.began, **sums)


@dataclass(frozen=True)
class Sample:
    """One moment: `time` in seconds after the start, `mbps` in 10^6 bits/s, others in bytes."""

    time: float
    remaining: int
    mbps: float
    dirty_rate: float


def difference(before: Statistics, after: Statistics) -> RoundRecord:
    """Return what was done between two snapshots of one migration."""
    number = max(after.dirty_sync_count, before.dirty_sync_count + 1)
    began = max(before.total_time, 0.0 if before.dirty_sync_count else after.setup_time)
    return RoundRecord(
        first=before.dirty_sync_count + 1,
        number=number,
        began=began,
        seconds=max(after.total_time - began, 0.0),
        wire_bytes=after.transferred - before.transferred,
        zero=after.duplicate - before.duplicate,
        normal=after.normal - before.normal,
        delta=after.xbzrle_pages - before.xbzrle_pages,
        skipped=after.skipped - before.skipped,
        delta_bytes=after.xbzrle_bytes - before.xbzrle_bytes,
        hits=after.cache_hits - before.cache_hits,
        misses=after.cache_miss - before.cache_miss,
        overflow=after.overflow - before.overflow,
        remaining=after.remaining,
        dirty_rate=after.dirty_pages_rate * after.page_size,
        expected_downtime=after.expected_downtime,
        cache_size=after.cache_size,
        unfinished=after.dirty_sync_count <= before.dirty_sync_count,
    )


class History:
    """Observes one migration after the other, and keeps the records of the current one.

    migrations -- number of migrations so far
    last       -- the latest statistics
    paused_at  -- seconds after the start at which the guest was paused; None while it runs
    recent     -- the last rounds that are over, one record each
    """

    def __init__(self) -> None:
        self.migrations = 0
        self._begin()

    def _begin(self) -> None:
        self.last = Statistics()
        self.paused_at: float | None = None
        self.samples: list[Sample] = []
        self.notices: list[str] = []
        self._mark = Statistics()
        self._head: list[RoundRecord] = []
        self._body: list[RoundRecord] = []
        self._span = 1
        self.recent: deque[RoundRecord] = deque()
        self._interval = SAMPLE_SECONDS

    def observe(self, event: Event, s: Statistics) -> None:
        """Take an event of the source, and the statistics `s` at that moment."""
        self._know(s)
        if isinstance(event, Notice):
            self.notices = [*self.notices[-99:], event.text]
        elif event is SourceEvent.PAUSED:
            self.paused_at = s.total_time
        elif event is SourceEvent.ROUND_DONE:
            self._close(s)
        if s.status in (Status.SETUP, Status.ACTIVE):  # the pause was abandoned
            self.paused_at = None
        if event in (SourceEvent.ROUND_DONE, SourceEvent.PROGRESS):
            self._sample(s)

    def end(self, s: Statistics) -> None:
        """Take the final statistics of a migration."""
        self._know(s)

    def _know(self, s: Statistics) -> None:
        if not self.migrations or self._another(s):
            self._begin()
            self.migrations += 1
        self.last = s

    def _another(self, s: Statistics) -> bool:
        """Return whether `s` belongs to another migration than `last`.

        A migration that resumes has the status "setup" too, but its counters continue.
        """
        last = self.last
        over = last.status in OVER and s.status not in OVER
        return over or s.transferred < last.transferred or (
            s.dirty_sync_count < last.dirty_sync_count
        )  # fmt: skip

    def _close(self, s: Statistics) -> None:
        self.recent.append(difference(self._mark, s))
        self._mark = s
        if len(self.recent) <= RECENT_ROUNDS:
            return
        record = self.recent.popleft()
        if len(self._head) < HEAD_ROUNDS:
            self._head.append(record)
        elif self._body and self._body[-1].count < self._span:
            self._body[-1] = merge(self._body[-1], record)
        else:
            self._body.append(record)
        if len(self._body) > MAX_ROUNDS:
            body, self._span = self._body, self._span * 2
            self._body = [merge(one, two) for one, two in zip(body[::2], body[1::2])]  # noqa: B905
            self._body += body[len(body) // 2 * 2 :]

    def _sample(self, s: Statistics) -> None:
        if self.samples and s.total_time - self.samples[-1].time < self._interval:
            return
        dirty = s.dirty_pages_rate * s.page_size
        self.samples.append(Sample(s.total_time, s.remaining, s.mbps, dirty))
        if len(self.samples) > MAX_SAMPLES:
            self.samples = self.samples[::2]
            self._interval *= 2

    @property
    def over(self) -> bool:
        return self.last.status in OVER

    @property
    def closed(self) -> list[RoundRecord]:
        """Rounds that are over, without the paused one."""
        return [*self._head, *self._body, *self.recent]

    @property
    def current(self) -> RoundRecord:
        """What has been done since the last round was over."""
        return replace(difference(self._mark, self.last), paused=self.paused_at is not None)

    @property
    def tail(self) -> RoundRecord | None:
        """The round in which the migration ended; None before it has ended."""
        return self.current if self.over and self.current.wire_bytes else None

    def rounds(self) -> list[RoundRecord]:
        """Return all rounds, with the tail."""
        return [*self.closed, *([self.tail] if self.tail else [])]
