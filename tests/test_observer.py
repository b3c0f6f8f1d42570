"""An observer that raises changes nothing for the guest, at whatever moment."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

import migrate
from migrate.address import parse_address
from migrate.destination import Destination
from migrate.dialing import connect
from migrate.guests.buffer import BufferPlace
from migrate.link import Link
from migrate.listening import listen
from migrate.observer import Watched
from migrate.source import Source

SIZE = 300_000
SOURCE = ["setup", "active", "pass", "progress", "round", "device", "paused", "completed", "all"]
DESTINATION = ["accepted", "round", "running", "all"]


class Broken:
    """An observer that raises at one event (of a status: its name), or at all of them."""

    def __init__(self, at: str, error: BaseException) -> None:
        self.at, self.error, self.raised = at, error, 0

    def __call__(self, event: str, news: Any) -> None:
        if self.at in ("all", news.status if event == "status" else event):
            self.raised += 1
            raise self.error


class Both:
    """A buffer that moves between two links here."""

    def __init__(self) -> None:
        self.guest = migrate.BufferGuest(bytearray(b"x" * SIZE))
        self.place: BufferPlace | None = None

    async def run(
        self, source: Broken | None = None, destination: Broken | None = None
    ) -> list[Any]:  # fmt: skip
        """What came of it at the source and at the destination."""
        listener = await listen(parse_address("127.0.0.1:0", listen=True))
        link = await connect(listener.address)
        far: Link = await listener.accept()
        await listener.close()

        def placer(info: Any) -> BufferPlace:
            self.place = BufferPlace(info)
            return self.place

        ends = (
            asyncio.create_task(Source(self.guest, link, observer=source).run()),
            asyncio.create_task(Destination(far, placer, observer=destination).run()),
        )
        await asyncio.wait(ends)
        return [task.exception() or task.result() for task in ends]

    @property
    def arrived(self) -> bool:
        return self.place is not None and bytes(self.place.received) == b"x" * SIZE


async def writes(guest: migrate.BufferGuest) -> bool:
    """Whether its writers go on here; else they are told that it has moved."""
    try:
        async with guest.writing():
            return True
    except migrate.GuestMoved:
        return False


@pytest.mark.asyncio
@pytest.mark.parametrize("at", SOURCE)
async def test_a_source_does_not_fail_with_its_observer(at: str, caplog: Any) -> None:
    both, observer = Both(), Broken(at, BrokenPipeError("the view is gone"))
    statistics, arrival = await both.run(source=observer)
    assert observer.raised
    assert statistics.status == arrival.status == "completed"
    assert both.arrived
    assert not await writes(both.guest)
    said = [one for one in caplog.records if one.name == "migrate.observer"]
    assert [one.levelno for one in said] == [logging.ERROR], "said once"
    assert said[0].exc_info is not None


@pytest.mark.asyncio
@pytest.mark.parametrize("at", DESTINATION)
async def test_a_destination_does_not_fail_with_its_observer(at: str) -> None:
    both, observer = Both(), Broken(at, ValueError("no such view"))
    statistics, arrival = await both.run(destination=observer)
    assert observer.raised
    assert statistics.status == arrival.status == "completed"
    assert both.arrived
    assert not await writes(both.guest)


class Leave(BaseException):
    """As SystemExit, which would end the loop of this test too."""


@pytest.mark.asyncio
@pytest.mark.parametrize("at", SOURCE)
async def test_an_observer_that_wants_to_leave_has_the_migration_cancelled_or_done(
    at: str,
) -> None:
    both, error = Both(), Leave()
    came, arrival = await both.run(source=Broken(at, error))
    assert came is error
    if at == "completed":
        assert both.arrived
        assert arrival.status == "completed"
        assert not await writes(both.guest)
    else:
        assert isinstance(arrival, migrate.MigrationError)
        assert await writes(both.guest), "it runs on here"


@pytest.mark.asyncio
@pytest.mark.parametrize("at", DESTINATION)
async def test_an_observer_at_the_destination_may_leave_too(at: str) -> None:
    both, error = Both(), Leave()
    statistics, came = await both.run(destination=Broken(at, error))
    assert came is error
    moved = at == "running"
    assert both.arrived or not moved
    assert await writes(both.guest) == isinstance(statistics, migrate.MigrationError) == (not moved)


def test_no_observer_is_an_observer() -> None:
    watched: Watched[int] = Watched(None, lambda: None)
    watched("event", 1)
    watched.raise_leaving()
