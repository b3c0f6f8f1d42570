"""The brake: what it puts on a guest it takes off, and says so in time."""

import asyncio

import pytest

from migrate.brake import Brake
from migrate.errors import MigrationError
from migrate.rounds import Limits
from migrate.throttle import Look, Throttle

LIMITS = Limits(downtime_limit=0.3)
STUCK = Look(2.0, 1.0, 100.0, 100.0, 1.0)


class Slow:
    """A guest as the brake sees it."""

    def __init__(self, can_throttle=True, broken=False):
        self.can_throttle = can_throttle
        self.broken = broken
        self.percents = []

    async def throttle(self, percent):
        self.percents.append(percent)
        if self.broken:
            raise MigrationError("the guard has died")


async def apply(brake, count=1, on=True, throttle=None):
    return [await brake.apply(on, throttle or Throttle(), LIMITS, STUCK) for _ in range(count)]


@pytest.mark.asyncio
async def test_each_step_reaches_the_guest_and_is_said():
    guest, said = Slow(), []
    brake = Brake(guest, said.append)
    assert await apply(brake, 5) == [False, False, True, False, True]
    assert guest.percents == [20, 30]
    assert brake.percentage == 30
    assert said[1] == (
        "auto-converge: the guest is slowed by 30 % (it would be stopped for 2000 ms, the limit "
        "is 300 ms)"
    )
    await brake.release()
    await brake.release()
    assert guest.percents == [20, 30, 0]
    assert brake.percentage == 0


@pytest.mark.asyncio
async def test_after_a_break_it_goes_on_from_where_it_was():
    guest = Slow()
    brake = Brake(guest, lambda _text: None)
    await apply(brake, 5)
    await brake.release()
    assert await apply(brake) == [True]
    assert guest.percents == [20, 30, 0, 30]


@pytest.mark.asyncio
async def test_off_it_does_nothing_and_switched_off_it_lets_go():
    guest, said = Slow(), []
    brake = Brake(guest, said.append)
    await apply(brake, 9, on=False)
    assert not guest.percents
    assert not said
    await apply(brake, 3)
    assert await apply(brake, on=False) == [False]
    assert guest.percents == [20, 0]


@pytest.mark.asyncio
async def test_parameters_that_change_count_from_the_next_round_on():
    guest = Slow()
    brake = Brake(guest, lambda _text: None)
    await apply(brake, 3)
    await apply(brake, 2, throttle=Throttle(cpu_throttle_increment=40))
    assert await apply(brake, throttle=Throttle(max_cpu_throttle=25)) == [False]
    assert guest.percents == [20, 60, 25]


@pytest.mark.asyncio
async def test_a_guest_that_cannot_be_slowed_is_told_of_once():
    guest, said = Slow(can_throttle=False), []
    brake = Brake(guest, said.append)
    await apply(brake, 9)
    await brake.release()
    assert not guest.percents
    assert len(said) == 1
    assert "cannot be slowed" in said[0]


@pytest.mark.asyncio
async def test_a_guest_that_cannot_be_slowed_any_more_fails_the_migration_not_its_end():
    guest = Slow(broken=True)
    brake = Brake(guest, lambda _text: None)
    with pytest.raises(MigrationError, match="guard"):
        await apply(brake, 3)
    await brake.release()
    assert brake.percentage == 0
    assert guest.percents == [20, 0]


@pytest.mark.asyncio
async def test_a_step_that_is_cancelled_is_taken_back_too():
    guest = Slow()
    brake = Brake(guest, lambda _text: None)
    await apply(brake, 2)
    told = asyncio.Event()

    async def throttle(percent):
        guest.percents.append(percent)
        told.set()
        await asyncio.sleep(100)

    slow, guest.throttle = guest.throttle, throttle
    step = asyncio.create_task(apply(brake))
    await told.wait()
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    guest.throttle = slow
    await brake.release()
    assert guest.percents == [20, 0]
