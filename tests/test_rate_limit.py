"""The rate limit, with a clock that is passed in."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace

import pytest

from migrate.transport import rate_limit
from migrate.transport.rate_limit import RateLimit

MIB = 1 << 20


@pytest.mark.asyncio
async def test_bytes_are_admitted_evenly(monkeypatch):
    """Time is passed in: ten batches at 1 MiB/s go out evenly, whatever this machine does."""
    now, asked = 1000.0, []

    async def wait(_limit: RateLimit, seconds: float) -> None:
        nonlocal now
        assert seconds > 0
        now += seconds
        asked.append(seconds)

    monkeypatch.setattr(rate_limit, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(RateLimit, "_wait", wait)
    limit = RateLimit(MIB)
    went = []
    for _ in range(10):
        await limit.take(MIB // 4)
        went.append(now - 1000.0)
    assert went[-1] == pytest.approx(10 / 4, abs=2 * RateLimit.BURST_SECONDS)
    gaps = [b - a for a, b in itertools.pairwise(went)]
    assert gaps == pytest.approx([0.25] * 9)

    now += 3600  # an idle hour earns no more than a short burst
    began = now
    for _ in range(4):
        await limit.take(MIB // 4)
    assert now - began >= 1 - RateLimit.BURST_SECONDS - 1e-6

    limit.rate = 4 * MIB
    began = now
    for _ in range(4):
        await limit.take(MIB)
    assert now - began == pytest.approx(1, abs=2 * RateLimit.BURST_SECONDS)

    limit.rate = 0
    asked.clear()
    await limit.take(1 << 40)
    assert asked == []


@pytest.mark.asyncio
async def test_new_rate_holds_for_waiting_callers():
    """A batch that would have taken seventeen minutes goes at once; the next obey the new rate."""
    for rate in (0, 1024 * MIB):
        limit = RateLimit(1024)
        waiting = [asyncio.create_task(limit.take(MIB)) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        limit.rate = rate
        async with asyncio.timeout(60):
            await asyncio.gather(*waiting)
