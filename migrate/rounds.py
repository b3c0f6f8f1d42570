"""When to go on, when to stop the guest and copy the rest, and when to give up.

                 predicted downtime <= downtime-limit, and no longer falling
    CONTINUE ------------------------------------------> STOP_AND_COPY
        |   max-rounds, timeout, no progress for a while, or what the guest's size costs in the
        |   pause is over the limit in each of several rounds
        +----------------------------------------------> ABORT, and why

A pause that would be short enough is not taken at once while another round, which is then as short
as the pause would be, can make it shorter still.

The prediction counts deltas. QEMU takes every pending page for 4096 bytes, and its measured
bandwidth falls as deltas get better, so it can predict a minute where the truth is 0.2 s. Here it
is the work that the pause will hold, in the units that recent rounds have measured: seconds of
encoding and of applying per page (CPU seconds: in the pause the guest leaves its core to us),
bytes on the wire per page, seconds per page that is hashed, and round trips. Two parts grow with
the guest and not with what it writes: the scan for changes, and a look at the whole guest for the
digest. Each round does and times both, as the pause will.

Nothing here knows clocks, sockets or guests: numbers in, a verdict out. The words are advice's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from migrate.advice import obstacle, why

STALL_MARGIN = 0.04
STALL_ROUNDS = 8
# A guest is too large for the limit where its size alone costs more in this many rounds in a row,
# for this many seconds (other programs may have had the processors); below LARGE_COST is noise.
LARGE_ROUNDS = 2
LARGE_SECONDS = 3.0
LARGE_COST = 0.05
# Of each new measurement, this much goes into the running mean.
WEIGHT = 0.5
# Rounds of fewer pages say little about the cost of a page.
TELLING_PAGES = 64
# The pause itself: stopping the guest, and the messages of the hand-over, beside round trips.
FIXED_SECONDS = 0.004
# When the source has looked at its whole guest, the destination looks at its own.
SIDES = 2
# The last round's end and READY, GO and RUNNING.
ROUND_TRIPS = 2
DIGEST_SECONDS = 1e-6
# A pause within the limit is put off for a round as long as that makes it so much shorter, and
# not once it is this short.
WORTH_A_ROUND = 0.75
SHORT_SECONDS = 0.01


class Verdict(Enum):
    CONTINUE = auto()
    STOP_AND_COPY = auto()
    ABORT = auto()


class Cause(Enum):
    """Of an ABORT."""

    ROUNDS = auto()
    TIMEOUT = auto()
    STALL = auto()
    SIZE = auto()


@dataclass(frozen=True)
class Measured:
    """What one round cost."""

    pages: int
    wire_bytes: int
    wall_seconds: float
    encode_seconds: float
    apply_seconds: float


@dataclass(frozen=True)
class Pending:
    """What is left to do, if the guest were stopped now; `dirty_rate` in pages per second.

    scan_seconds  -- finding what changed
    whole_seconds -- looking at the whole guest for the digest, on both sides
    check_seconds -- what is looked at beside all that, and must be done before the hand-over
    stopped       -- False: nobody is stopped, and what does not grow with what is written keeps
                     nobody waiting
    """

    pages: int
    stale_pages: int
    scan_seconds: float = 0.0
    dirty_rate: float = 0.0
    whole_seconds: float = 0.0
    check_seconds: float = 0.0
    stopped: bool = True

    @property
    def size_seconds(self) -> float:
        """What the size of the guest costs in the pause, whatever it writes."""
        return self.scan_seconds + self.whole_seconds if self.stopped else 0.0


@dataclass(frozen=True)
class Limits:
    """downtime_limit and timeout in seconds, bandwidths in bytes/s; 0 means none.

    avail_switchover_bandwidth -- what the link is taken to carry in the pause, in place of what was
                                  measured
    """

    downtime_limit: float = 0.3
    max_bandwidth: int = 0
    avail_switchover_bandwidth: int = 0
    max_rounds: int = 0
    timeout: float = 0.0
    stall_timeout: float = 30.0


class DowntimeModel:
    """Learns what a page costs, and predicts the pause."""

    def __init__(self) -> None:
        self.round_trip = 0.0
        self.encode_per_page = 0.0
        self.apply_per_page = 0.0
        self.bytes_per_page = 0.0
        self.bandwidth = 0.0
        self.source_digest = DIGEST_SECONDS
        self.peer_digest = DIGEST_SECONDS
        self._rounds = 0

    def learn(self, measured: Measured) -> None:
        """Takes in a round. The first one moves all pages raw: what follows replaces it."""
        if measured.pages == 0:
            return
        if measured.wire_bytes > 1 << 20 and measured.wall_seconds > 0:
            self.bandwidth = max(self.bandwidth * 0.9, measured.wire_bytes / measured.wall_seconds)
        if self._rounds >= 2 and measured.pages < TELLING_PAGES:
            return
        weight = WEIGHT if self._rounds >= 2 else 1.0
        pages = measured.pages
        self.encode_per_page += weight * (measured.encode_seconds / pages - self.encode_per_page)
        self.apply_per_page += weight * (measured.apply_seconds / pages - self.apply_per_page)
        self.bytes_per_page += weight * (measured.wire_bytes / pages - self.bytes_per_page)
        self._rounds += 1

    def learn_digest(self, pages: int, seconds: float, *, peer: bool) -> None:
        """What it took to hash so many stale pages."""
        if pages < 4 * TELLING_PAGES:
            return
        if peer:
            self.peer_digest = seconds / pages
        else:
            self.source_digest = seconds / pages

    def overhead(self, pending: Pending) -> float:
        """Seconds of the pause that do not depend on how much is dirty."""
        fixed = FIXED_SECONDS + self.trips if pending.stopped else 0.0
        return fixed + pending.size_seconds

    @property
    def trips(self) -> float:
        """Seconds of the pause that are spent on the way there and back."""
        return ROUND_TRIPS * self.round_trip

    def link_bandwidth(self, limits: Limits) -> float:
        """Bytes per second, 0.0 where nothing is known."""
        bandwidth = limits.avail_switchover_bandwidth or self.bandwidth
        if not limits.max_bandwidth:
            return bandwidth
        return min(bandwidth or limits.max_bandwidth, limits.max_bandwidth)

    def wire_seconds(self, pages: int, limits: Limits) -> float:
        bandwidth = self.link_bandwidth(limits)
        return pages * self.bytes_per_page / bandwidth if bandwidth else 0.0

    def work(self, pages: int, limits: Limits) -> float:
        """Seconds to move so many dirty pages: on the wire, or of either side's processor."""
        wire = self.wire_seconds(pages, limits)
        return max(wire, pages * self.encode_per_page, pages * self.apply_per_page)

    def predict(self, pending: Pending, limits: Limits) -> float:
        """Seconds of downtime if the guest were stopped now."""
        digests = pending.stale_pages * max(self.source_digest, self.peer_digest)
        rest = self.work(pending.pages, limits) + digests
        check = pending.check_seconds if pending.stopped else 0.0
        return self.overhead(pending) + max(rest, check)


@dataclass(frozen=True)
class Decision:
    """slower_helps -- the pause would be short enough if the guest wrote nothing"""

    verdict: Verdict
    expected_downtime: float
    reason: str = ""
    obstacle: str = ""
    slower_helps: bool = False


class Policy:
    """Looks at the numbers after each round; the source obeys."""

    def __init__(self, limits: Limits, model: DowntimeModel) -> None:
        self.limits = limits
        self.model = model
        self._best = float("inf")
        self._best_at = 0.0
        self._best_round = 0
        self._last = float("inf")
        self._large_rounds = 0
        self._large_since = 0.0

    def begin_again(self, round_number: int, elapsed: float) -> None:
        """The guest is another one now (it was slowed): what was seen before is no measure."""
        self._best, self._best_at, self._best_round = float("inf"), elapsed, round_number

    def decide(self, round_number: int, elapsed: float, pending: Pending) -> Decision:
        """`round_number` rounds are done, `elapsed` seconds after the start."""
        expected = self.model.predict(pending, self.limits)
        limits = self.limits
        large = self._too_large(elapsed, pending)
        slower_helps = self.model.overhead(pending) <= limits.downtime_limit
        if expected <= limits.downtime_limit:
            if self._can_fall(round_number, elapsed, pending, expected):
                return Decision(Verdict.CONTINUE, expected)
            return Decision(Verdict.STOP_AND_COPY, expected)
        if expected < self._best * (1 - STALL_MARGIN):
            self._best, self._best_at, self._best_round = expected, elapsed, round_number
        cause = None
        if limits.max_rounds and round_number >= limits.max_rounds:
            cause = Cause.ROUNDS
        elif limits.timeout and elapsed >= limits.timeout:
            cause = Cause.TIMEOUT
        elif limits.stall_timeout and large:
            cause = Cause.SIZE
        elif (
            limits.stall_timeout
            and elapsed - self._best_at >= limits.stall_timeout
            and round_number - self._best_round >= STALL_ROUNDS
        ):
            cause = Cause.STALL
        if cause is None:
            return Decision(Verdict.CONTINUE, expected, slower_helps=slower_helps)
        found = obstacle(self.model, limits, pending, expected)
        reason = why(
            cause, round_number, elapsed, round_number - self._best_round,
            elapsed - self._best_at,
        )  # fmt: skip
        return Decision(Verdict.ABORT, expected, f"{reason}: {found}", found, slower_helps)

    def _too_large(self, elapsed: float, pending: Pending) -> bool:
        """Whether the guest's size alone has cost too much for so long that waiting is no use."""
        if pending.size_seconds <= max(self.limits.downtime_limit, LARGE_COST):
            self._large_rounds = 0
            return False
        if not self._large_rounds:
            self._large_since = elapsed
        self._large_rounds += 1
        return self._large_rounds >= LARGE_ROUNDS and elapsed - self._large_since >= LARGE_SECONDS

    def _can_fall(
        self, round_number: int, elapsed: float, pending: Pending, expected: float
    ) -> bool:
        """Whether another round should make a pause shorter that is short enough."""
        last, self._last = self._last, expected
        fixed = self.model.overhead(pending) + pending.check_seconds
        limits, changing = self.limits, expected - fixed
        return (
            expected > SHORT_SECONDS
            and changing > expected / 2
            and expected < last * WORTH_A_ROUND
            and not (limits.max_rounds and round_number >= limits.max_rounds)
            and not (limits.timeout and elapsed + 2 * expected >= limits.timeout)
        )
