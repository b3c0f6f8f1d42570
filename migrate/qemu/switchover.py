"""Lets QEMU pause its guest when the last round is as short as the guest allows.

QEMU pauses the guest when the dirty pages, 4096 bytes each, fit into the downtime limit at the
bandwidth of the last 100 ms. It takes the first chance, though the next round might leave a tenth.
So it is told an aim that begins low and rises to the downtime limit (policy.aim).

Its prediction is wrong both ways. If it sends deltas (xbzrle), a page may cost a few bytes of
stream, which it does not count; and the better the deltas are, the less bandwidth it measures.
Measured (QEMU 7.2, 767 MiB of a guest written all the time, 1 byte in each page): with a limit of
300 ms it never paused the guest; with the limit raised to 120 s the downtime was 195 ms. And 100 ms
in which a full buffer empties look like a fast link: the pause is then longer than the limit.

We see each page pass, so the slowest second of the last few predicts the last round. QEMU is told:

    8.2 and later   avail-switchover-bandwidth: the pages of that second as bytes
    before 8.2      downtime-limit: multiplied by those bytes over the bandwidth that QEMU measures
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from migrate.errors import QemuError
from migrate.policy.aim import DowntimeAim
from migrate.qemu.qmp.machine import Machine
from migrate.qemu.qmp.status import MachineStatus

logger = logging.getLogger(__name__)

# QEMU measures its bandwidth every 100 ms.
STATUS_SECONDS = 0.1
# The pages that pass are counted over this time, at first over less. The slowest of such times in
# the last MEMORY_SECONDS counts.
PAGE_RATE_SECONDS, MIN_RATE_SECONDS = 1.0, 0.25
MEMORY_SECONDS = 5.0
# QEMU is told another limit if it differs by this share of the one before.
MIN_CHANGE = 0.1
# The smallest and the largest downtime limit that QEMU accepts, in seconds.
MIN_LIMIT, MAX_LIMIT = 0.001, 2000.0


class Recent:
    """Values of the last `seconds`, by the times they are given."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._values: deque[tuple[float, float]] = deque()

    def add(self, now: float, value: float) -> None:
        self._values.append((now, value))
        while now - self._values[0][0] > self._seconds:
            self._values.popleft()

    @property
    def values(self) -> list[float]:
        return [value for _, value in self._values]


class PageRate:
    """Pages a second: of the slowest second lately, in rounds that send pages again."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int]] = deque()
        self._rates = Recent(MEMORY_SECONDS)

    def add(self, now: float, pages: int) -> float:
        """Add how many pages have passed so far; return the pages a second, 0.0 if none passed."""
        self._counts.append((now, pages))
        while len(self._counts) > 2 and now - self._counts[0][0] > PAGE_RATE_SECONDS:
            self._counts.popleft()
        began, before = self._counts[0]
        if now - began >= MIN_RATE_SECONDS and pages > before:
            self._rates.add(now, (pages - before) / (now - began))
        return min(self._rates.values, default=0.0)


class SwitchoverControl:
    """Adjusts one QEMU while its migration goes on.

    limit    -- returns the downtime limit, in seconds
    pages    -- returns how many pages have passed so far
    report   -- called with each status, the downtime in seconds that we expect, if known, and the
                one that is aimed at
    """

    def __init__(
        self, machine: Machine, limit: Callable[[], float], pages: Callable[[], int],
        report: Callable[[MachineStatus, float | None, float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._machine = machine
        self._limit = limit
        self._pages = pages
        self._report = report
        self._clock = clock
        self._rate = PageRate()
        # Bytes a second, as QEMU measures them: the most of the last second counts, since that is
        # what would make it pause the guest too early.
        self._bandwidth = Recent(PAGE_RATE_SECONDS)
        self._aim = DowntimeAim()
        self._round = 0
        self._limit_set = 0.0

    async def run(self) -> None:
        """Adjust until QEMU does not answer any more."""
        try:
            while True:
                status = await self._machine.status()
                await self._take(status, self._clock())
                await asyncio.sleep(STATUS_SECONDS)
        except QemuError as error:
            logger.debug("QEMU is not adjusted any more: %s", error)

    async def _take(self, status: MachineStatus, now: float) -> None:
        """Report a status, and adjust QEMU by it."""
        limit = self._limit()
        self._bandwidth.add(now, status.mbps * 1e6 / 8)
        # In the first round all pages are dirty, and most of them pass without a delta.
        rate = self._rate.add(now, self._pages()) if status.dirty_sync_count > 1 else 0.0
        expected, aim = None, min(self._aim.seconds, limit)
        if rate and status.page_size:
            expected = status.remaining / status.page_size / rate
            if status.dirty_sync_count > self._round:
                self._round = status.dirty_sync_count
                aim = self._aim.learn(expected, limit)
        self._report(status, expected, aim)
        if expected is not None and status.status == "active":
            await self._adjust(aim, rate * status.page_size)

    async def _adjust(self, aim: float, bandwidth: float) -> None:
        """Have QEMU pause the guest when `aim` seconds would do, at `bandwidth` bytes a second."""
        limit = aim
        if not await self._machine.set_switchover_bandwidth(int(bandwidth)):
            measured = max(self._bandwidth.values)
            limit = aim * bandwidth / measured if measured else aim
        limit = min(max(limit, MIN_LIMIT), MAX_LIMIT)
        if abs(limit - self._limit_set) > MIN_CHANGE * self._limit_set:
            logger.debug("downtime limit of QEMU: %.3f s (%.0f bytes/s)", limit, bandwidth)
            self._limit_set = limit
            await self._machine.set_downtime_limit(limit)
