"""Throttling: each throttle put on a guest is removed again, and reported in time."""

import asyncio

import pytest

from migrate.errors import MigrationError
from migrate.policy.downtime import Limits
from migrate.policy.throttle import RoundLoad, ThrottleParameters
from migrate.source.throttling import Throttling

LIMITS = Limits(downtime_limit=0.3)
STUCK = RoundLoad(2.0, 1.0, 100.0, 100.0, 1.0)


class Slow:
    """A guest as the throttling sees it."""

    def __init__(self, can_throttle=True, broken=False):
        self.can_throttle = can_throttle
        self.broken = broken
        self.percents = []

    async def throttle(self, percent):
        self.percents.append(percent)
        if self.broken:
            raise MigrationError("the watchdog has died")


async def apply(throttling, count=1, on=True, throttle=None):
    return [
        await throttling.apply(on, throttle or ThrottleParameters(), LIMITS, STUCK)
        for _ in range(count)
    ]


@pytest.mark.asyncio
async def test_each_step_reaches_guest_and_user():
    guest, said = Slow(), []
    throttling = Throttling(guest, said.append)
    assert await apply(throttling, 5) == [False, False, True, False, True]
    assert guest.percents == [20, 30]
    assert throttling.percentage == 30
    assert said[1] == (
        "auto-converge: the guest is slowed by 30 % (it would be stopped for 2000 ms, the limit "
        "is 300 ms)"
    )
    await throttling.release()
    await throttling.release()
    assert guest.percents == [20, 30, 0]
    assert throttling.percentage == 0


@pytest.mark.asyncio
async def test_percentage_is_kept_over_release():
    guest = Slow()
    throttling = Throttling(guest, lambda _text: None)
    await apply(throttling, 5)
    await throttling.release()
    assert await apply(throttling) == [True]
    assert guest.percents == [20, 30, 0, 30]


@pytest.mark.asyncio
async def test_switching_off_releases_guest():
    guest, said = Slow(), []
    throttling = Throttling(guest, said.append)
    await apply(throttling, 9, on=False)
    assert not guest.percents
    assert not said
    await apply(throttling, 3)
    assert await apply(throttling, on=False) == [False]
    assert guest.percents == [20, 0]


@pytest.mark.asyncio
async def test_changed_parameters_apply_from_next_round():
    guest = Slow()
    throttling = Throttling(guest, lambda _text: None)
    await apply(throttling, 3)
    await apply(throttling, 2, throttle=ThrottleParameters(cpu_throttle_increment=40))
    assert await apply(throttling, throttle=ThrottleParameters(max_cpu_throttle=25)) == [False]
    assert guest.percents == [20, 60, 25]


@pytest.mark.asyncio
async def test_guest_without_throttle_is_reported_once():
    guest, said = Slow(can_throttle=False), []
    throttling = Throttling(guest, said.append)
    await apply(throttling, 9)
    await throttling.release()
    assert not guest.percents
    assert len(said) == 1
    assert "cannot be slowed" in said[0]


@pytest.mark.asyncio
async def test_failing_throttle_fails_apply_but_not_release():
    guest = Slow(broken=True)
    throttling = Throttling(guest, lambda _text: None)
    with pytest.raises(MigrationError, match="watchdog"):
        await apply(throttling, 3)
    await throttling.release()
    assert throttling.percentage == 0
    assert guest.percents == [20, 0]


@pytest.mark.asyncio
async def test_cancelled_step_is_released_too():
    guest = Slow()
    throttling = Throttling(guest, lambda _text: None)
    await apply(throttling, 2)
    told = asyncio.Event()

    async def throttle(percent):
        guest.percents.append(percent)
        told.set()
        await asyncio.sleep(100)

    slow, guest.throttle = guest.throttle, throttle
    step = asyncio.create_task(apply(throttling))
    await told.wait()
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    guest.throttle = slow
    await throttling.release()
    assert guest.percents == [20, 0]
