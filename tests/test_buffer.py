"""A buffer guest: writers wait in a pause, and learn that the guest has moved."""

import asyncio
import threading
import time

import pytest

from migrate.errors import MigrationError, UsageError
from migrate.guests import buffer as buffer_module
from migrate.guests.buffer import BufferGuest, BufferPlace
from migrate.guests.write_lock import GuestMoved
from migrate.memory.dirty import Method
from migrate.policy.parameters import Parameters
from proto.codec.kernel import PageEncoder, PageHashes
from proto.wire.messages import GuestInfo
from tests.waiting import PATIENCE, wait_until


@pytest.mark.asyncio
async def test_writers_wait_in_a_pause_and_learn_that_the_guest_moved():
    memory = bytearray(1 << 16)
    guest = BufferGuest(memory)
    moved = threading.Event()

    def write() -> None:
        try:
            while True:
                with guest.writing():
                    memory[0] = (memory[0] + 1) % 256
                    memory[-1] = memory[0]
                    time.sleep(0)
        except GuestMoved:
            moved.set()

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            await guest.pause()
            before = bytes(memory)
            assert before[0] == before[-1], "a writer was inside"
            await asyncio.sleep(0.002)
            assert memory == before
            assert not moved.is_set()
            await guest.resume()
        await asyncio.to_thread(wait_until, lambda: memory != before)
        await guest.pause()
        before = bytes(memory)
        await guest.relinquish()
    finally:
        await guest.release()
        for thread in threads:
            await asyncio.to_thread(thread.join, PATIENCE)
    assert moved.is_set()
    assert not any(thread.is_alive() for thread in threads)
    assert memory == before
    with pytest.raises(GuestMoved):
        async with guest.writing():
            pass


@pytest.mark.asyncio
async def test_writer_that_stays_inside_fails_the_pause_and_continues(monkeypatch):
    monkeypatch.setattr(buffer_module, "PAUSE_PATIENCE", 0.05)
    guest = BufferGuest(bytearray(10))
    async with guest.writing():
        with pytest.raises(MigrationError, match="stayed inside"):
            await guest.pause()
    await guest.resume()
    async with guest.writing():
        pass


@pytest.mark.asyncio
async def test_program_stops_its_writers_itself():
    calls = []

    async def pause() -> None:
        calls.append("pause")

    async def resume() -> None:
        calls.append("resume")

    guest = BufferGuest(bytearray(10), pause=pause, resume=resume, state=lambda: b"where I was")
    await guest.pause()
    assert guest.state() == b"where I was"
    await guest.resume()
    assert calls == ["pause", "resume"]
    with pytest.raises(UsageError, match="go together"):
        BufferGuest(bytearray(10), pause=pause)


def test_mark_covers_every_page_of_a_write():
    guest = BufferGuest(bytearray(10 * 1024), marks=True, page_size=1024)
    tracker = guest.track(PageEncoder(PageHashes(10, 1024, bytes(16))))
    for offset, length, pages in (
        (0, 1, {0}), (1023, 2, {0, 1}), (2048, 3072, {2, 3, 4}), (9 * 1024, 1024, {9}),
        (5000, 0, set()),
    ):  # fmt: skip
        guest.mark(offset, length)
        assert set(tracker.take()) == pages
    with pytest.raises(ValueError, match="outside"):
        guest.mark(0, 1 << 20)
    with pytest.raises(UsageError, match="marks pages of 1024 bytes"):
        guest.check_parameters(Parameters(page_size=4096))


def test_buffer_guest_takes_any_writable_buffer_and_nothing_else():
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros((10, 10))
    guest = BufferGuest(array)
    assert guest.memory.size == 800
    array[0, 0] = 1.0
    assert guest.memory.view[:8] == array[0, :1].tobytes()
    for bad in (b"", numpy.zeros((4, 4))[:, 1], "text", 5):
        with pytest.raises(UsageError):
            BufferGuest(bad)


def test_buffer_without_marks_is_compared():
    memory = bytearray(8192)
    guest = BufferGuest(memory)
    encoder = PageEncoder(PageHashes(2, 4096, bytes(16)))
    encoder.adopt_zeros(0, 2)
    tracker = guest.track(encoder)
    memory[5000] = 1
    assert set(tracker.take()) == {1}
    assert tracker.method is Method.COMPARE


def test_unknown_tracking_is_refused():
    with pytest.raises(UsageError, match="auto, kernel or compare"):
        BufferGuest(bytearray(8192), tracking="marks")


@pytest.mark.asyncio
async def test_buffer_lands_in_new_memory_or_in_a_given_buffer():
    info = GuestInfo("buffer", 5000, 4096, bytes(16))
    place = BufferPlace(info)
    assert len(place.memory) == 8192
    place.memory[:5000] = b"g" * 5000
    await place.start(b"state")
    assert (bytes(place.received), place.state) == (b"g" * 5000, b"state")

    mine = bytearray(5000)
    place = BufferPlace(info, mine)
    place.memory[:5000] = b"g" * 5000
    assert mine == bytes(5000), "it is filled only when the guest is started"
    await place.start(b"")
    assert mine == b"g" * 5000
    with pytest.raises(UsageError, match="the guest has 5000 bytes, the buffer for it 10"):
        BufferPlace(info, bytearray(10))
