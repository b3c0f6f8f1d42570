"""What each round did, from the snapshots that an observer of a Source is given.

Statistics are counters from the beginning on; what a round did is the difference between two of
them. All memory is bounded: of too many rounds those between the first and the last ones are added
up, two by two, then four by four, so that the sums over all records stay those of the whole
migration; of too many samples every other one is forgotten, and from then on half as many are
taken.

    head | body, `span` rounds each | recent | what was done since
    -----+--------------------------+--------+---------------------
                   closed                    | current; tail, once it is over

Nothing here knows clocks, terminals or files.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from migrate.statistics import Statistics

# Records of single rounds at the beginning and at the end, and records between them.
HEAD_ROUNDS = 8
RECENT_ROUNDS = 64
MAX_ROUNDS = 512
MAX_SAMPLES = 2048
SAMPLE_SECONDS = 0.05
OVER = ("completed", "failed", "cancelled")


@dataclass(frozen=True)
class RoundRecord:
    """Rounds `first` to `number`, mostly one and the same. Times in seconds, sizes in bytes.

    began      -- seconds after the start of the migration
    zero, normal, delta -- pages that were sent, by kind; skipped: dirty, but equal to what is there
    remaining  -- dirty when the round was over
    dirty_rate -- bytes per second that the guest dirtied in it
    expected_downtime -- what the pause was predicted to take after it
    paused     -- it was the last one, with the guest stopped
    unfinished -- the migration ended in the middle of it
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
        """How many rounds they are."""
        return self.number - self.first + 1

    @property
    def pages(self) -> int:
        """Sent, of all kinds."""
        return self.zero + self.normal + self.delta

    @property
    def ended(self) -> float:
        return self.began + self.seconds

    @property
    def hit_ratio(self) -> float | None:
        """Of the pages that were looked up in the cache; None where none was."""
        looked_up = self.hits + self.misses
        return self.hits / looked_up if looked_up else None

    @property
    def mbps(self) -> float:
        """10^6 bits per second."""
        return self.wire_bytes * 8 / self.seconds / 1e6 if self.seconds > 0 else 0.0


SUMS = ("seconds", "wire_bytes", "zero", "normal", "delta", "skipped", "delta_bytes", "hits",
        "misses", "overflow")  # fmt: skip


def together(one: RoundRecord, two: RoundRecord) -> RoundRecord:
    """Two records that follow each other as one: counters added, the rest as at the end."""
    sums = {name: getattr(one, name) + getattr(two, name) for name in SUMS}
    return replace(two, first=one.first, began=one.began, **sums)


@dataclass(frozen=True)
class Sample:
    """An instant. `time` in seconds after the start, `mbps` in 10^6 bits/s, the rest in bytes."""

    time: float
    remaining: int
    mbps: float
    dirty_rate: float


def difference(before: Statistics, after: Statistics) -> RoundRecord:
    """What was done between two snapshots of one migration."""
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
    """An observer for Source, of one migration after the other."""

    def __init__(self) -> None:
        self.migrations = 0
        self._begin()

    def _begin(self) -> None:
        self.last = Statistics()
        self.paused_at: float | None = None
        """Seconds after the start, where the guest has been stopped."""
        self.samples: list[Sample] = []
        self.notices: list[str] = []
        self._mark = Statistics()
        self._head: list[RoundRecord] = []
        self._body: list[RoundRecord] = []
        self._span = 1
        self.recent: deque[RoundRecord] = deque()
        """The last rounds that are over, one by one."""
        self._interval = SAMPLE_SECONDS

    def observe(self, event: str, s: Statistics) -> None:
        if not self.migrations or self._another(s):
            self._begin()
            self.migrations += 1
        self.last = s
        if event.startswith("notice: "):
            self.notices = [*self.notices[-99:], event.removeprefix("notice: ")]
        elif event == "paused":
            self.paused_at = s.total_time
        elif event == "round":
            self._close(s)
        if s.status in ("setup", "active"):  # a pause that was given up
            self.paused_at = None
        if event in ("round", "progress"):
            self._sample(s)

    def _another(self, s: Statistics) -> bool:
        """A migration that resumes has the status "setup" too, but its counters go on."""
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
            self._body[-1] = together(self._body[-1], record)
        else:
            self._body.append(record)
        if len(self._body) > MAX_ROUNDS:
            body, self._span = self._body, self._span * 2
            self._body = [together(one, two) for one, two in zip(body[::2], body[1::2])]  # noqa: B905
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
        """Rounds that are over, without the one in the pause."""
        return [*self._head, *self._body, *self.recent]

    @property
    def current(self) -> RoundRecord:
        """What was done since the last round was over."""
        return replace(difference(self._mark, self.last), paused=self.paused_at is not None)

    @property
    def tail(self) -> RoundRecord | None:
        """The round in which the migration ended; None as long as it has not."""
        return self.current if self.over and self.current.wire_bytes else None

    def rounds(self) -> list[RoundRecord]:
        """All of them, with the tail."""
        return [*self.closed, *([self.tail] if self.tail else [])]
