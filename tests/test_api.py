"""The library, on both event loops: buffers that move while threads write."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pytest

import migrate
from migrate.errors import UsageError
from migrate.guests.buffer import BufferPlace
from migrate.memory.dirty import DirtyTracker
from migrate.policy.convergence import ConvergencePolicy, Decision, Verdict
from migrate.policy.delta_switch import DeltaSwitch
from migrate.policy.downtime import PendingWork, RoundCost
from migrate.source.options import SourceOptions
from migrate.source.precopy import Source
from migrate.source.settings import MAX_CACHE_REQUESTS, MAX_REFUSALS_TOLD
from migrate.transport.address import parse_address
from migrate.transport.connect import connect
from migrate.transport.listen import listen
from proto.codec.kernel import PageEncoder
from proto.codec.pageset import PageSet
from proto.wire.messages import CacheSize
from tests.receiving import receive


async def move(
    guest: migrate.BufferGuest, parameters: migrate.Parameters | None = None, into: Any = None
) -> tuple[migrate.Statistics, migrate.Received]:
    address = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        receiver = group.create_task(
            migrate.receive("127.0.0.1:0", into=into, listening=address.set_result)
        )
        statistics = await migrate.send(guest, str(await address), parameters)
    return statistics, receiver.result()


@pytest.mark.asyncio
@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize(
    ("cache_size", "channels"),
    [(4096, 1), (1 << 20, 1), (64 << 20, 1), (1 << 20, 2), (64 << 20, 3)],
)
async def test_array_moves_while_threads_update_it(
    marks: bool, cache_size: int, channels: int
) -> None:
    array = numpy.zeros(500_001, dtype="u8")
    guest = migrate.BufferGuest(array, marks=marks, state=lambda: b"as it was")
    moved = threading.Event()

    def work() -> None:
        random = numpy.random.default_rng(1)
        try:
            while True:
                with guest.writing():
                    index = int(random.integers(100_000))
                    array[index] += 1
                    if marks:
                        guest.mark(index * 8, 8)
        except migrate.GuestMoved:
            moved.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        parameters = migrate.Parameters(cache_size=cache_size, channels=channels)
        statistics, received = await move(guest, parameters)
    finally:
        if not await asyncio.to_thread(moved.wait, 0.1):
            await guest.release()
        await asyncio.to_thread(thread.join)
    assert numpy.array_equal(numpy.frombuffer(received.memory, dtype="u8"), array)
    assert received.state == b"as it was"
    assert statistics.status == "completed"
    assert statistics.remaining == 0
    assert statistics.channels == channels
    assert (statistics.channel_bytes > 0) == (channels > 1)


@pytest.mark.asyncio
async def test_receive_into_a_given_buffer() -> None:
    here = bytearray(b"0123456789" * 1000)
    there = bytearray(len(here))
    _, received = await move(migrate.BufferGuest(here), into=there)
    assert there == here
    assert received.memory.obj is there


@pytest.mark.asyncio
async def test_cache_is_resized_fifty_times_during_a_migration() -> None:
    """The users of both sides resize it; the memories stay equal."""
    array = numpy.random.default_rng(2).integers(0, 256, 24 << 20, dtype="u1")
    guest = migrate.BufferGuest(array)
    listener = await listen(parse_address("127.0.0.1:0", listen=True))
    near = await connect(parse_address(str(listener.address)))
    far = await listener.accept()
    place: list[BufferPlace] = []

    def placer(info: Any) -> BufferPlace:
        place.append(BufferPlace(info))
        return place[0]

    sizes = [4096 << (turn * 5 % 14) for turn in range(50)]
    seen: set[int] = set()

    limits = migrate.Limits(downtime_limit=0.1, max_bandwidth=60 << 20)
    source = Source(guest, near, migrate.Parameters(limits=limits))
    async with asyncio.TaskGroup() as group:
        group.create_task(receive(far, placer))
        running = group.create_task(source.run())
        while sizes and not running.done():
            await asyncio.sleep(0.004)
            if source.statistics.status == "active":
                source.set_cache_size(sizes.pop())
                array[::5000] += 1
            seen.add(source.statistics.cache_size)
            if len(sizes) == 25:
                await far.send(CacheSize(8 << 20))
    await listener.close()
    assert bytes(place[0].received) == array.tobytes()
    assert not sizes
    assert len(seen) > 1


HOT_PAGES = 2048
GUEST_BYTES = 24 << 20


class Rewritten(migrate.BufferGuest):
    """A guest whose hot pages have changed at each of ten looks."""

    def __init__(self, array: Any) -> None:
        super().__init__(array, tracking="compare")
        self.array, self.times = array, 0

    def track(self, encoder: PageEncoder, *limit: Any) -> DirtyTracker:
        tracker = super().track(encoder, *limit)
        take = tracker.take

        def taken() -> PageSet:
            self.times += 1
            if self.times <= 10:
                self.array[: HOT_PAGES * 4096 : 4096] += 1
            return take()

        tracker.take = taken  # type: ignore[method-assign]
        return tracker


async def rewritten(
    parameters: migrate.Parameters, each_round: Callable[[Source, int], None] = lambda *_: None
) -> tuple[Source, list[str]]:
    """Migrate an array of which 8 MiB change in each round. Return the observed events."""
    array = numpy.random.default_rng(2).integers(1, 256, GUEST_BYTES, dtype="u1")
    listener = await listen(parse_address("127.0.0.1:0", listen=True))
    near = await connect(parse_address(str(listener.address)))
    far = await listener.accept()
    places: list[BufferPlace] = []
    notices: list[str] = []

    def placer(info: Any) -> BufferPlace:
        places.append(BufferPlace(info))
        return places[0]

    def observe(event: str, statistics: migrate.Statistics) -> None:
        if event.startswith("notice: "):
            notices.append(event)
        if event == "round":
            each_round(source, statistics.dirty_sync_count)

    guest = Rewritten(array)
    source = Source(guest, near, parameters, SourceOptions(observe))
    decide = ConvergencePolicy.decide

    def keep_going(
        policy: ConvergencePolicy, number: int, elapsed: float, pending: PendingWork
    ) -> Decision:
        decision = decide(policy, number, elapsed, pending)
        if number > 10:
            return decision
        return replace(decision, verdict=Verdict.CONTINUE, abort=None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConvergencePolicy, "decide", keep_going)
        async with asyncio.TaskGroup() as group:
            group.create_task(receive(far, placer))
            group.create_task(source.run())
    await listener.close()
    assert bytes(places[0].received) == array.tobytes()
    return source, notices


@pytest.mark.asyncio
async def test_cache_grows_to_the_working_set() -> None:
    source, notices = await rewritten(migrate.Parameters(cache_size=1 << 20, cache_max=64 << 20))
    s = source.statistics
    assert s.cache_size == HOT_PAGES * 4096
    assert s.cache_miss == 2 * (HOT_PAGES - 256), "the round that showed it, and one to fill it"
    assert s.advice == ()
    assert notices == ["notice: the working set is about 8.0 MiB: the cache is 8m now"]


@pytest.mark.asyncio
async def test_requested_cache_size_ends_the_automatic_sizing() -> None:
    def ask(source: Source, number: int) -> None:
        if number == 1:
            source.set_cache_size(2 << 20)

    source, notices = await rewritten(
        migrate.Parameters(cache_size=1 << 20, cache_max=64 << 20), ask
    )
    assert source.statistics.cache_size == 2 << 20
    assert notices == []


@pytest.mark.asyncio
async def test_peer_cannot_raise_our_cache_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrate.source.settings.default_cache_max", lambda: 2 << 20)

    def ask(source: Source, number: int) -> None:
        if number == 1:
            source.settings.request_cache(1 << 40)
            source.settings.request_cache(2 << 20)

    source, notices = await rewritten(migrate.Parameters(cache_size=1 << 20), ask)
    assert source.statistics.cache_size == 2 << 20
    assert notices == [
        "notice: the destination asks for a cache of 1t: no more than 2m is given for the asking: "
        "--cache-size here sets it"
    ]


@pytest.mark.asyncio
async def test_requests_of_the_peer_are_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("migrate.source.settings.default_cache_max", lambda: 2 << 20)

    def ask(source: Source, number: int) -> None:
        if number == 1:
            for _ in range(2 * MAX_CACHE_REQUESTS):
                source.settings.request_cache(1 << 40)

    _, notices = await rewritten(migrate.Parameters(cache_size=1 << 20), ask)
    assert len(notices) == MAX_REFUSALS_TOLD + 1
    assert "no more of that is heard" in notices[-1]


@pytest.mark.asyncio
async def test_advice_on_a_cache_that_is_too_small() -> None:
    source, _ = await rewritten(migrate.Parameters(cache_size=1 << 20))
    assert source.statistics.advice == (
        "the working set is about 8.0 MiB: a cache of 8m would have hit 100 % of what was sent "
        "again, the one of 1m hit 12 %: use --cache-size 8m",
    )


class Refusing:
    """A page cache that gets no more memory."""

    def __init__(self, cache: Any) -> None:
        self.evictions = cache.evictions

    def resize(self, size: int) -> None:
        raise MemoryError(f"no memory for {size} bytes")


@pytest.mark.asyncio
async def test_cache_that_cannot_grow_keeps_its_size_and_reports_it() -> None:
    def refuse(source: Source, number: int) -> None:
        if number == 1:
            cache = source.settings.cache
            cache.pages = Refusing(cache.pages)  # type: ignore[assignment]

    source, notices = await rewritten(
        migrate.Parameters(cache_size=1 << 20, cache_max=64 << 20), refuse
    )
    assert source.statistics.cache_size == 1 << 20
    assert notices == [
        "notice: the working set is about 8.0 MiB: the cache is 8m now",
        "notice: there is no memory for a cache of 8m: it stays 1m",
    ]


@pytest.mark.asyncio
async def test_no_advice_on_a_cache_without_deltas() -> None:
    source, notices = await rewritten(migrate.Parameters(capabilities={"xbzrle": False}))
    assert source.statistics.cache_size == 0
    assert notices == []


class Scripted(DeltaSwitch):
    """Switches deltas on in the rounds that its script names."""

    def __init__(self) -> None:
        super().__init__(4096)
        self.rounds = iter([True, True, False, False, True, False, True, True, True, True, True])
        self.now = True

    @property
    def active(self) -> bool:
        return self.now

    def decide(self, cost: RoundCost, bandwidth: float) -> bool:
        assert bandwidth >= 0
        self.now = next(self.rounds, True)
        return not self.now


@pytest.mark.asyncio
async def test_memory_stays_equal_while_deltas_are_switched_off_and_on() -> None:
    seen: list[bool] = []

    def script(source: Source, number: int) -> None:
        if number == 1:
            assert source.transfer.precopy is not None
            source.transfer.precopy.sender.tuning.switch = Scripted()
        seen.append(source.statistics.xbzrle_active)

    source, notices = await rewritten(migrate.Parameters(), script)
    assert seen[:7] == [True, True, True, False, False, True, False]
    assert len(notices) == 3
    assert all(notice.endswith("they are switched off") for notice in notices)
    assert source.statistics.xbzrle_active
    assert source.statistics.cache_miss == 2 * HOT_PAGES


@pytest.mark.asyncio
async def test_cancellation_of_either_side_admits_writers_again() -> None:
    array = numpy.random.default_rng(3).integers(0, 256, 8 << 20, dtype="u1")
    guest = migrate.BufferGuest(array)
    slow = migrate.Parameters(limits=migrate.Limits(max_bandwidth=4 << 20))
    address = asyncio.get_running_loop().create_future()
    receiver = asyncio.create_task(migrate.receive("127.0.0.1:0", listening=address.set_result))
    sender = asyncio.create_task(migrate.send(guest, str(await address), slow))
    await asyncio.sleep(0.3)
    receiver.cancel()
    with pytest.raises(migrate.MigrationError, match="cancelled at the destination"):
        await sender
    with pytest.raises(asyncio.CancelledError):
        await receiver
    async with guest.writing():
        array[0] += 1
    _, received = await move(guest)
    assert bytes(received.memory) == array.tobytes()


@pytest.mark.asyncio
async def test_buffer_of_another_size_is_refused_before_any_page() -> None:
    with pytest.raises(BaseExceptionGroup) as raised:
        await move(migrate.BufferGuest(bytearray(10000)), into=bytearray(9999))
    assert raised.group_contains(
        migrate.MigrationError, match="10000 bytes, the buffer for it 9999"
    )


@pytest.mark.asyncio
@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 4097, 1 << 20, (9 << 20) + 3])
async def test_buffer_of_any_size_moves_over_many_channels(channels: int, size: int) -> None:
    array = numpy.random.default_rng(size).integers(0, 256, size, dtype="u1")
    parameters = migrate.Parameters(channels=channels)
    _, received = await move(migrate.BufferGuest(array), parameters)
    assert bytes(received.memory) == array.tobytes()


@pytest.mark.parametrize("channels", [0, -1, 65])
def test_impossible_number_of_channels_is_refused(channels: int) -> None:
    with pytest.raises(UsageError, match=f"{channels} channels: there can be 1 to 64"):
        migrate.Parameters(channels=channels)


@pytest.mark.asyncio
async def test_full_disk_at_the_destination_is_reported_and_the_guest_stays() -> None:
    """write(2) fails on a full disk, and both sides report it."""
    guest = migrate.BufferGuest(bytearray(b"x") * 100_000)
    listener = await listen(parse_address("127.0.0.1:0", listen=True))
    near = await connect(parse_address(str(listener.address)))
    far = await listener.accept()
    full = os.open("/dev/full", os.O_WRONLY)

    def placer(info: Any) -> BufferPlace:
        place = BufferPlace(info)
        place.fd = full
        return place

    receiving = asyncio.create_task(receive(far, placer))
    with pytest.raises(migrate.MigrationError, match="written here: No space left on device"):
        await Source(guest, near).run()
    with pytest.raises(migrate.MigrationError, match="written here: No space left on device"):
        await receiving
    async with guest.writing():
        pass
    os.close(full)
    await listener.close()
