"""auto-converge: how much to slow a guest that writes faster than its pages can be moved.

    of each period (a second, or a round where that is longer):
        the pause would be within downtime-limit, or gets shorter        -> as it is
        it would be over downtime-limit if the guest wrote nothing       -> as it is
        what was dirtied costs less than throttle-trigger-threshold
        percent of what the period could carry                           -> as it is
        else, twice in a row            -> cpu-throttle-initial, then cpu-throttle-increment more,
                                           up to max-cpu-throttle

The parameters have QEMU's names, defaults and ranges. Where QEMU takes each dirty page for 4096
bytes, here it counts what it costs: the bytes of its delta against those that were sent, and the
seconds it will take against those that went by, whichever of the two is worse. So a guest whose
deltas keep up is never slowed, however many pages it writes.

Nothing here knows guests or clocks: numbers in, a percentage out.
"""

from __future__ import annotations

from dataclasses import dataclass

from migrate.errors import UsageError
from migrate.rounds import STALL_MARGIN, Limits

CAPABILITY = "auto-converge"
PERIOD_SECONDS = 1.0
# Before --stall-timeout is over there is time for two periods, and the rounds they end in.
PERIODS_IN_STALL = 4
STRIKES = 2


@dataclass(frozen=True)
class Throttle:
    """QEMU's parameters, in percent. Raises UsageError, in QEMU's words, for what cannot be."""

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
class Look:
    """What one round has shown. Times in seconds, sizes in bytes on the wire, deltas counted.

    expected -- downtime if the guest were stopped now
    seconds  -- that the round took, up to where its dirty pages were taken
    dirtied_bytes, dirtied_seconds -- what the pages written meanwhile will cost
    still    -- downtime if the guest wrote nothing
    """

    expected: float
    seconds: float
    sent_bytes: float
    dirtied_bytes: float
    dirtied_seconds: float
    still: float = 0.0


class ThrottlePolicy:
    """Looks at each round; `percentage` is what the guest is to be slowed by."""

    def __init__(self) -> None:
        self.percentage = 0
        self._lowest = float("inf")
        self._strikes = 0
        self._begin_period()

    def _begin_period(self) -> None:
        self._seconds = self._sent = self._bytes = self._work = 0.0
        self._falling = self._pointless = False

    def decide(self, throttle: Throttle, limits: Limits, look: Look) -> int:
        """Takes in a round; the percentage from here on."""
        self.percentage = min(self.percentage, throttle.max_cpu_throttle)
        if look.expected < self._lowest * (1 - STALL_MARGIN):
            self._lowest, self._falling = look.expected, True
        self._seconds += look.seconds
        self._sent += look.sent_bytes
        self._bytes += look.dirtied_bytes
        self._work += look.dirtied_seconds
        if look.expected <= limits.downtime_limit:
            self._falling = True
        if look.still > limits.downtime_limit:
            self._pointless = True
        period = PERIOD_SECONDS
        if limits.stall_timeout:
            period = min(period, limits.stall_timeout / PERIODS_IN_STALL)
        if self._seconds >= period:
            self._judge(throttle)
            self._begin_period()
        return self.percentage

    def _judge(self, throttle: Throttle) -> None:
        """At the end of a period."""
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

    def _step(self, throttle: Throttle, share: float) -> int:
        """tailslow: no further than to where the threshold should be kept."""
        if not self.percentage:
            return throttle.cpu_throttle_initial
        if not throttle.cpu_throttle_tailslow:
            return throttle.cpu_throttle_increment
        now = 100 - self.percentage
        enough = now - now * throttle.throttle_trigger_threshold / share
        return max(1, min(throttle.cpu_throttle_increment, int(enough)))
