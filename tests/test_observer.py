"""An observer that raises changes nothing for the guest, whenever it raises."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

import migrate
from migrate.guests.buffer import BufferPlace
from migrate.runtime.observer import SafeObserver
from migrate.source.options import SourceOptions
from migrate.source.precopy import Source
from migrate.transport.address import parse_address
from migrate.transport.connect import connect
from migrate.transport.link import Link
from migrate.transport.listen import listen
from tests.receiving import receive

SIZE = 300_000
SOURCE = ["setup", "active", "pass", "progress", "round", "device", "paused", "completed", "all"]
DESTINATION = ["accepted", "round", "running", "all"]


class Broken:
    """An observer that raises at one event (a status event is named by its status), or at all."""

    def __init__(self, at: str, error: BaseException) -> None:
        self.at, self.error, self.raised = at, error, 0

    def __call__(self, event: str, news: Any) -> None:
        if self.at in ("all", news.status if event == "status" else event):
            self.raised += 1
            raise self.error


class Migration:
    """A migration of a buffer within this process."""

    def __init__(self) -> None:
        self.guest = migrate.BufferGuest(bytearray(b"x" * SIZE))
        self.place: BufferPlace | None = None

    async def run(
        self, source: Broken | None = None, destination: Broken | None = None
    ) -> list[Any]:  # fmt: skip
        """Return the result or the exception of the source, and of the destination."""
        listener = await listen(parse_address("127.0.0.1:0", listen=True))
        link = await connect(listener.address)
        far: Link = await listener.accept()
        await listener.close()

        def placer(info: Any) -> BufferPlace:
            self.place = BufferPlace(info)
            return self.place

        ends = (
            asyncio.create_task(Source(self.guest, link, options=SourceOptions(source)).run()),
            asyncio.create_task(receive(far, placer, observer=destination)),
        )
        await asyncio.wait(ends)
        return [task.exception() or task.result() for task in ends]

    @property
    def arrived(self) -> bool:
        return self.place is not None and bytes(self.place.received) == b"x" * SIZE


async def writes(guest: migrate.BufferGuest) -> bool:
    """Return whether writers are admitted here; False if they learn that the guest moved."""
    try:
        async with guest.writing():
            return True
    except migrate.GuestMoved:
        return False


@pytest.mark.asyncio
@pytest.mark.parametrize("at", SOURCE)
async def test_source_survives_a_failing_observer(at: str, caplog: Any) -> None:
    migration, observer = Migration(), Broken(at, BrokenPipeError("the view is gone"))
    statistics, arrival = await migration.run(source=observer)
    assert observer.raised
    assert statistics.status == arrival.status == "completed"
    assert migration.arrived
    assert not await writes(migration.guest)
    said = [one for one in caplog.records if one.name == "migrate.runtime.observer"]
    assert [one.levelno for one in said] == [logging.ERROR], "logged once"
    assert said[0].exc_info is not None


@pytest.mark.asyncio
@pytest.mark.parametrize("at", DESTINATION)
async def test_destination_survives_a_failing_observer(at: str) -> None:
    migration, observer = Migration(), Broken(at, ValueError("no such view"))
    statistics, arrival = await migration.run(destination=observer)
    assert observer.raised
    assert statistics.status == arrival.status == "completed"
    assert migration.arrived
    assert not await writes(migration.guest)


class Exit(BaseException):
    """Stands for SystemExit, which would end the loop of this test too."""


@pytest.mark.asyncio
@pytest.mark.parametrize("at", SOURCE)
async def test_exit_of_a_source_observer_ends_the_migration(
    at: str,
) -> None:
    migration, error = Migration(), Exit()
    came, arrival = await migration.run(source=Broken(at, error))
    assert came is error
    if at == "completed":
        assert migration.arrived
        assert arrival.status == "completed"
        assert not await writes(migration.guest)
    else:
        assert isinstance(arrival, migrate.MigrationError)
        assert await writes(migration.guest), "it runs on here"


@pytest.mark.asyncio
@pytest.mark.parametrize("at", DESTINATION)
async def test_exit_of_a_destination_observer_ends_the_migration(at: str) -> None:
    migration, error = Migration(), Exit()
    statistics, came = await migration.run(destination=Broken(at, error))
    assert came is error
    moved = at == "running"
    assert migration.arrived or not moved
    assert (
        await writes(migration.guest)
        == isinstance(statistics, migrate.MigrationError)
        == (not moved)
    )


def test_safe_observer_without_an_observer() -> None:
    watched: SafeObserver[str, int] = SafeObserver(None, lambda: None)
    watched("event", 1)
    watched.raise_exit()
