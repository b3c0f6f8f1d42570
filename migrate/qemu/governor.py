"""Lets QEMU stop its guest when we know that the rest is quick enough.

QEMU compares what is dirty, 4096 bytes for each page, with what its stream took in the last 100 ms
times the downtime limit. What it sends of a page may be a few bytes (its own deltas), and 100 ms
are a moment. We see each page go by: so we reckon with the pages of the last second, and set what
QEMU decides by so that it decides as we would:

    from 8.2    avail-switchover-bandwidth: it reckons with our rate
    before      downtime-limit: as much longer as our rate is higher than the one it measures
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
MOST_FACTOR = 1000.0
LONGEST_SECONDS = 2000.0


class PageRate:
    """Pages per second that went by, over the last second."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, now: float, pages: int) -> float:
        """`pages` so far; the rate."""
        self._seen.append((now, pages))
        while len(self._seen) > 2 and now - self._seen[0][0] > RATE_SECONDS:
            self._seen.popleft()
        began, before = self._seen[0]
        return (pages - before) / (now - began) if now > began else 0.0


class Governor:
    """pages -- how many have gone by; told -- given each answer, and the downtime we expect."""

    def __init__(
        self, machine: Machine, limit: Callable[[], float], pages: Callable[[], int],
        told: Callable[[MachineStatus, float | None], None],
    ) -> None:  # fmt: skip
        self._machine = machine
        self._limit = limit
        self._pages = pages
        self._told = told
        self._rate = PageRate()
        self._set = 0.0

    async def run(self) -> None:
        """Until QEMU does not answer any more."""
        try:
            while True:
                status = await self._machine.status()
                rate = self._rate.see(time.monotonic(), self._pages())
                expected = None
                if rate and status.page_size and status.dirty_sync_count > 1:
                    expected = status.remaining / status.page_size / rate
                self._told(status, expected)
                if expected is not None and status.status == "active" and status.mbps:
                    await self._steer(rate * status.page_size, status.mbps * 1e6 / 8)
                await asyncio.sleep(LOOK_SECONDS)
        except QemuError:
            return

    async def _steer(self, ours: float, theirs: float) -> None:
        """Both rates in bytes per second of whole pages."""
        limit = self._limit()
        if await self._machine.set_switchover_bandwidth(int(ours)):
            wanted = limit
        else:
            wanted = min(limit * min(max(ours / theirs, 1.0), MOST_FACTOR), LONGEST_SECONDS)
        if abs(wanted - self._set) > LEAST_CHANGE * self._set:
            self._set = wanted
            await self._machine.set_downtime_limit(wanted)
