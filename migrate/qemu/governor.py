"""Lets QEMU stop its guest when we know that the rest is quick enough.

QEMU compares what is dirty, 4096 bytes for each page, with the bytes that its stream took in the
last 100 ms, times the downtime limit. Where it makes deltas itself a page is a few bytes of stream,
so it is wrong by as much as those are good; and 100 ms are a moment. We see each page go by:

    from 8.2    avail-switchover-bandwidth: it reckons with the pages of the last second
    before      downtime-limit: longer by as much as a page of its stream is shorter than a page
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from migrate.errors import QemuError
from migrate.qemu.machine import Machine, MachineStatus

LOOK_SECONDS = 0.1
RATE_SECONDS = 1.0
# QEMU is told no other limit for less than this change of it, and none beyond these bounds.
LEAST_CHANGE = 0.1
LEAST_FACTOR = 2.0
MOST_FACTOR = 1000.0
LONGEST_SECONDS = 2000.0


class PageRate:
    """What went by in the last second: pages a second, and bytes of QEMU's stream for each."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque()

    def see(self, now: float, pages: int, received: int) -> tuple[float, float]:
        """Both counts so far. (0, 0) as long as nothing can be said."""
        self._seen.append((now, pages, received))
        while len(self._seen) > 2 and now - self._seen[0][0] > RATE_SECONDS:
            self._seen.popleft()
        began, pages_before, received_before = self._seen[0]
        if now == began or pages == pages_before:
            return 0.0, 0.0
        count = pages - pages_before
        return count / (now - began), (received - received_before) / count


class Governor:
    """gone_by -- the pages that have gone by, and the bytes of QEMU's stream, so far
    told    -- given each answer, and the downtime we expect
    """

    def __init__(
        self, machine: Machine, limit: Callable[[], float], gone_by: Callable[[], tuple[int, int]],
        told: Callable[[MachineStatus, float | None], None],
    ) -> None:  # fmt: skip
        self._machine = machine
        self._limit = limit
        self._gone_by = gone_by
        self._told = told
        self._rate = PageRate()
        self._set = 0.0

    async def run(self) -> None:
        """Until QEMU does not answer any more."""
        try:
            while True:
                status = await self._machine.status()
                rate, page_bytes = self._rate.see(time.monotonic(), *self._gone_by())
                expected = None
                if rate and status.page_size and status.dirty_sync_count > 1:
                    expected = status.remaining / status.page_size / rate
                self._told(status, expected)
                if expected is not None and status.status == "active":
                    await self._steer(rate, page_bytes, status.page_size)
                await asyncio.sleep(LOOK_SECONDS)
        except QemuError:
            return

    async def _steer(self, rate: float, page_bytes: float, page_size: int) -> None:
        wanted = self._limit()
        if not await self._machine.set_switchover_bandwidth(int(rate * page_size)):
            factor = min(page_size / max(page_bytes, 1.0), MOST_FACTOR)
            if factor > LEAST_FACTOR:  # else it is headers and zeros that make the difference
                wanted = min(wanted * factor, LONGEST_SECONDS)
        if abs(wanted - self._set) > LEAST_CHANGE * self._set:
            self._set = wanted
            await self._machine.set_downtime_limit(wanted)
