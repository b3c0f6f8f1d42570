"""Decide which batches are compressed, and at which level: as what moves a byte soonest.

A byte of a batch costs, in seconds:

    c          to compress it, measured for each level; several threads share that
    r / b      of the link: r is what compression leaves of a byte, b the link's bandwidth

Compressing and sending overlap, so the slower of the two counts, and a level pays if that is less
than 1 / b. In the pause nothing overlaps for sure, so the sum of the two counts.

The ratio of raw pages says nothing about that of deltas, so both are measured, each level now and
then by a batch that is sent anyway. The link's bandwidth is only seen while the link is what all
wait for. While it is unknown, nothing is compressed: the link may be faster than we compress.

This module knows no clocks, threads or sentences.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

# Zstandard's levels. On a real Linux guest (1 GiB, one core): -5 leaves 0.32 of a byte at 516 MB/s,
# 1 leaves 0.23 at 355 MB/s, 3 leaves 0.21 at 133 MB/s.
LEVELS = (1, -5, -1, 3)
# A level must be this much better than none: less is noise.
MARGIN = 1.05
# Weight of a new batch in the running means.
WEIGHT = 0.3
# A level is measured again after this many batches of its kind. The wait doubles up to the longest
# one while the choice stays the same: random pages then lose less than 1 % of the time.
FIRST_WAIT, LONGEST_WAIT = 8, 512
# Shorter batches are not worth a thread's turn.
MIN_BYTES = 4 << 10
# The link is what all wait for if senders wait for it this share of the time.
LINK_BOUND = 0.5
# The bandwidth is measured over at least this many seconds, and forgotten after so many in which
# the link was not what all waited for: it may have become faster.
WINDOW_SECONDS = 0.1
FORGET_SECONDS = 20.0


class Kind(Enum):
    """What most of a batch is."""

    PAGES = auto()
    RECORDS = auto()

    @classmethod
    def of(cls, head: memoryview, data: memoryview) -> Kind:
        """Return the kind of a batch with this head and these raw pages."""
        return cls.PAGES if len(data) >= len(head) else cls.RECORDS


@dataclass
class LevelCost:
    """The measured cost of one level. ratio: bytes left of a byte; seconds: for one byte."""

    ratio: float = 0.0
    seconds: float = 0.0
    measured: bool = False

    def learn(self, ratio: float, seconds: float) -> None:
        weight = WEIGHT if self.measured else 1.0
        self.ratio += weight * (ratio - self.ratio)
        self.seconds += weight * (seconds - self.seconds)
        self.measured = True


@dataclass
class _Choice:
    """What is known of one kind of batches.

    level -- what pays; None: to send them as they are
    asked -- the level that is being measured; None: none is
    left  -- batches until the next measurement, after which there are `wait` more
    turn  -- measurements so far
    bytes -- of batches in this round
    """

    costs: dict[int, LevelCost]
    level: int | None = None
    asked: int | None = None
    wait: int = FIRST_WAIT
    left: int = 0
    turn: int = 0
    bytes: int = 0


class LinkMeter:
    """Measures the bandwidth of the link while the link is what all wait for.

    bandwidth -- bytes per second; 0.0 when that is unknown
    """

    def __init__(self) -> None:
        self.bandwidth = 0.0
        self._began: float | None = None
        self._bytes = 0
        self._waited = 0.0
        self._bound_at = 0.0

    def add(self, now: float, size: int, waited: float, channels: int = 1) -> None:
        """Add a batch that was sent.

        now      -- seconds, of any clock
        waited   -- seconds of them in which its sender waited for the link
        channels -- how many senders there are
        """
        if self._began is None:
            self._began = now - waited
        self._bytes += size
        self._waited += waited
        seconds = now - self._began
        if seconds < WINDOW_SECONDS:
            return
        rate = self._bytes / seconds
        if self._waited >= LINK_BOUND * seconds * channels:
            known = self.bandwidth
            self.bandwidth = (known + rate) / 2 if known else rate
            self._bound_at = now
        elif now - self._bound_at > FORGET_SECONDS:
            self.bandwidth = 0.0
        else:
            self.bandwidth = max(self.bandwidth, rate) if self.bandwidth else 0.0
        self.pause()

    def pause(self) -> None:
        """Begin a new measurement with the next batch."""
        self._began, self._bytes, self._waited = None, 0, 0.0


class CompressionPolicy:
    """Chooses a level for each batch.

    threads -- that compress at the same time
    level   -- the only level to be used, if it pays; None for any
    """

    def __init__(self, threads: int, level: int | None = None) -> None:
        self._threads = threads
        levels = LEVELS if level is None else (level,)
        self._choices = {kind: _Choice({one: LevelCost() for one in levels}) for kind in Kind}

    def begin_round(self) -> None:
        """Measure all levels anew: the batches of another round may be of another nature."""
        for choice in self._choices.values():
            choice.wait, choice.left, choice.bytes, choice.asked = FIRST_WAIT, 0, 0, None

    def choose(
        self, kind: Kind, size: int, bandwidth: float, *, paused: bool = False
    ) -> int | None:
        """Return the level for a batch of `size` bytes; None: it is sent as it is.

        bandwidth -- bytes per second of the link; 0.0 when that is unknown
        paused    -- the guest is paused
        """
        choice = self._choices[kind]
        self.count(kind, size)
        if not bandwidth or size < MIN_BYTES:
            return None
        if paused:
            return self._best(choice, bandwidth, paused=True)[0]
        level, _ = self._best(choice, bandwidth, paused=False)
        before, choice.level = choice.level, level
        choice.left -= choice.left > 0
        if choice.left or choice.asked is not None:
            return level
        unknown = self._unknown(choice, bandwidth)
        if unknown:
            choice.asked = unknown[0]
        else:
            choice.wait = min(2 * choice.wait, LONGEST_WAIT) if level == before else FIRST_WAIT
            choice.left = choice.wait
            choice.asked = self._next_to_measure(choice)
        return choice.asked

    def _unknown(self, choice: _Choice, bandwidth: float) -> list[int]:
        """Return the levels that were not measured, and may pay.

        A level above one that is too slow for the link is slower still.
        """
        slow = [
            level
            for level, cost in choice.costs.items()
            if cost.measured and cost.seconds * bandwidth > self._threads
        ]
        return [
            level
            for level, cost in choice.costs.items()
            if not cost.measured and level < min(slow, default=level + 1)
        ]

    def _next_to_measure(self, choice: _Choice) -> int:
        """Return the known levels in turn, without the one in use: that is measured anyway."""
        measured = [level for level, cost in choice.costs.items() if cost.measured]
        levels = [level for level in measured if level != choice.level] or measured
        choice.turn += 1
        return levels[choice.turn % len(levels)]

    def learn(self, kind: Kind, level: int, before: int, after: int, seconds: float) -> None:
        """Take in what it took to compress a batch of `before` bytes to `after` bytes."""
        choice = self._choices[kind]
        if choice.asked == level:
            choice.asked = None
        choice.costs[level].learn(after / before, seconds / before)

    def _best(
        self, choice: _Choice, bandwidth: float, *, paused: bool
    ) -> tuple[int | None, float]:  # fmt: skip
        """Return the level that pays, or None, and its share of the time without compression."""
        best, least = None, 1 / MARGIN
        for level, cost in choice.costs.items():
            if not cost.measured:
                continue
            compressing, sending = cost.seconds * bandwidth, cost.ratio
            overlapped = max(compressing / self._threads, sending)
            share = compressing + sending if paused else overlapped
            if share < least:
                best, least = level, share
        return best, least if best is not None else 1.0

    def pause_share(self, bandwidth: float) -> float:
        """Return the share of the link's time that the pause takes with compression, 1.0 at most.

        It is that of batches like those of this round.
        """
        return self.share(bandwidth, paused=True)[0]

    def share(self, bandwidth: float, *, paused: bool = False) -> tuple[float, float]:
        """Return what compression leaves of the time and of the bytes of batches like these."""
        total = sum(choice.bytes for choice in self._choices.values())
        if not bandwidth or not total:
            return 1.0, 1.0
        time = ratio = 0.0
        for choice in self._choices.values():
            level, share = self._best(choice, bandwidth, paused=paused)
            weight = choice.bytes / total
            time += weight * share
            ratio += weight * (1.0 if level is None else choice.costs[level].ratio)
        return time, ratio

    def count(self, kind: Kind, size: int) -> None:
        """Count a batch of `size` bytes as one of this round."""
        self._choices[kind].bytes += size

    @property
    def levels(self) -> tuple[int, ...]:
        """Return the levels to choose from."""
        return tuple(self._choices[Kind.PAGES].costs)

    def level(self, kind: Kind) -> int | None:
        """Return the level in use; None if there is none."""
        return self._choices[kind].level

    def in_use(self) -> tuple[int | None, float]:
        """Return the level for most bytes of this round, and its ratio; (None, 1.0) without."""
        choice = max(self._choices.values(), key=lambda one: one.bytes)
        if choice.level is None:
            return None, 1.0
        return choice.level, choice.costs[choice.level].ratio
