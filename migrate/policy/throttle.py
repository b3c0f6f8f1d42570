"""auto-converge: decide how much to slow a guest that writes faster than its pages can be moved.

    in each period (a second, or a round when that is longer):
        the predicted pause is within downtime-limit, or has fallen       -> no change
        it would be over downtime-limit even if the guest wrote nothing   -> no change
        the pages dirtied cost less than throttle-trigger-threshold
        percent of what the period could carry                            -> no change
        else, twice in a row            -> cpu-throttle-initial, then cpu-throttle-increment more,
                                           up to max-cpu-throttle

The parameters have QEMU's names, defaults and ranges. QEMU counts 4096 bytes for each dirty page;
here a dirty page counts for what it costs: the bytes of its delta against the bytes that were sent,
and the seconds that it will take against the seconds that went by, whichever is the worse ratio. So
a guest whose deltas keep up is never slowed, however many pages it writes.

This module knows no guests and no clocks: numbers in, a percentage out.
"""

from __future__ import annotations

from dataclasses import dataclass

from migrate.errors import UsageError
from migrate.policy.convergence import STALL_MARGIN
from migrate.policy.downtime import Limits

CAPABILITY = "auto-converge"
PERIOD_SECONDS = 1.0
# A step takes two bad periods (STRIKES), and a period ends only when a round ends. With periods of
# a quarter of stall-timeout, the step comes before the migration is given up for a stall.
PERIODS_IN_STALL = 4
# Bad periods in a row before a step, as in QEMU (dirty_rate_high_cnt).
STRIKES = 2


@dataclass(frozen=True)
class ThrottleParameters:
    """QEMU's parameters, in percent. Raises UsageError, in QEMU's words, for an invalid value."""

    cpu_throttle_initial: int = 20
    cpu_throttle_increment: int = 10
    max_cpu_throttle: int = 99
    cpu_throttle_tailslow: bool = False
    throttle_trigger_threshold: int = 50

    def __post_init__(self) -> None:
        for name, least, most, range_ in (
            ("cpu_throttle_initial", 1, 99, "1 to 99"),
            ("cpu_throttle_increment", 1, 99, "1 to 99"),
            ("max_cpu_throttle", self.cpu_throttle_initial, 99, "cpu_throttle_initial to 99"),
            ("throttle_trigger_threshold", 1, 100, "1 to 100"),
        ):
            if not least <= getattr(self, name) <= most:
                raise UsageError(f"Parameter '{name}' expects an integer in the range of {range_}")


@dataclass(frozen=True)
class RoundLoad:
    """What a round sent, and what the guest wrote in it. Times in seconds, sizes in wire bytes.

    expected -- downtime if the guest is stopped now
    seconds  -- from the beginning of the round until its dirty pages were taken
    dirtied_bytes, dirtied_seconds -- what it costs to move the pages written meanwhile
    idle_downtime -- downtime if the guest wrote nothing
    """

    expected: float
    seconds: float
    sent_bytes: float
    dirtied_bytes: float
    dirtied_seconds: float
    idle_downtime: float = 0.0


class ThrottlePolicy:
    """Decides after each round; `percentage` is what the guest is to be slowed by."""

    def __init__(self) -> None:
        self.percentage = 0
        self._lowest = float("inf")
        self._strikes = 0
        self._begin_period()

    def _begin_period(self) -> None:
        self._seconds = self._sent = self._bytes = self._work = 0.0
        self._falling = self._pointless = False

    def decide(self, throttle: ThrottleParameters, limits: Limits, load: RoundLoad) -> int:
        """Take in a round; return the percentage from now on."""
        self.percentage = min(self.percentage, throttle.max_cpu_throttle)
        if load.expected < self._lowest * (1 - STALL_MARGIN):
            self._lowest, self._falling = load.expected, True
        self._seconds += load.seconds
        self._sent += load.sent_bytes
        self._bytes += load.dirtied_bytes
        self._work += load.dirtied_seconds
        if load.expected <= limits.downtime_limit:
            self._falling = True
        if load.idle_downtime > limits.downtime_limit:
            self._pointless = True
        period = PERIOD_SECONDS
        if limits.stall_timeout:
            period = min(period, limits.stall_timeout / PERIODS_IN_STALL)
        if self._seconds >= period:
            self._end_period(throttle)
            self._begin_period()
        return self.percentage

    def _end_period(self, throttle: ThrottleParameters) -> None:
        """Count a bad period, and slow the guest by a step after STRIKES of them in a row."""
        share = 100 * max(
            self._work / self._seconds, self._bytes / self._sent if self._sent else 0.0
        )
        if self._falling or self._pointless or share <= throttle.throttle_trigger_threshold:
            self._strikes = 0
            return
        self._strikes += 1
        if self._strikes == STRIKES:
            self._strikes = 0
            step = self._step(throttle, share)
            self.percentage = min(self.percentage + step, throttle.max_cpu_throttle)

    def _step(self, throttle: ThrottleParameters, share: float) -> int:
        """Return the percentage points of the next step.

        With tailslow, a step goes no further than to the speed that would just keep the threshold:
        the dirty rate is taken to be proportional to the share of time that the guest runs.
        """
        if not self.percentage:
            return throttle.cpu_throttle_initial
        if not throttle.cpu_throttle_tailslow:
            return throttle.cpu_throttle_increment
        runs = 100 - self.percentage
        enough = runs - runs * throttle.throttle_trigger_threshold / share
        return max(1, min(throttle.cpu_throttle_increment, int(enough)))
