"""Memory of a program moves once and to one place, however many guests are made of it."""

from __future__ import annotations

import array
import asyncio
import gc
import mmap
import os
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy
import pytest

import migrate
from migrate.errors import MigrationError, UsageError
from migrate.guests import buffer_lock
from migrate.guests.file import FileGuest

ROOT = Path(__file__).parent.parent
SIZE = 1 << 20


async def move(guest: migrate.BufferGuest, into: Any = None) -> str:
    """Sends a guest to a receiver of its own; "completed", or why not."""
    found = asyncio.get_running_loop().create_future()
    received = asyncio.create_task(
        migrate.receive("127.0.0.1:0", into=into, listening=found.set_result, retry=0)
    )
    try:
        status = (await migrate.send(guest, str(await found), retry=0)).status
        await received
        return status
    except MigrationError as error:
        received.cancel()
        await asyncio.gather(received, return_exceptions=True)
        return str(error)


@pytest.mark.asyncio
async def test_buffer_moves_to_one_place_only():
    guest = migrate.BufferGuest(bytearray(SIZE))
    said = await asyncio.gather(*(move(guest) for _ in range(3)))
    assert said.count("completed") == 1
    assert sum("is being moved already" in one for one in said) == 2
    assert "has moved" in await move(guest)
    with pytest.raises(migrate.GuestMoved):
        async with guest.writing():
            pass


@pytest.mark.asyncio
async def test_overlapping_guests_are_refused_and_others_move():
    memory = numpy.zeros(SIZE, dtype="u1")
    half = SIZE // 2
    parts = [memory[:half], memory[half - 1 :], memoryview(memory)[half // 2 : half]]
    said = await asyncio.gather(*(move(migrate.BufferGuest(part)) for part in parts))
    assert said[0] == "completed"
    assert "is being moved already" in said[2]
    memory = numpy.zeros(SIZE, dtype="u1")
    guests = [migrate.BufferGuest(memory[:half]), migrate.BufferGuest(memory[half:])]
    assert await asyncio.gather(*map(move, guests)) == ["completed"] * 2


def made(kind: str) -> Any:
    if kind == "numpy":
        return numpy.zeros(SIZE, dtype="u1")
    if kind == "mmap":
        return mmap.mmap(-1, SIZE)
    return array.array("B", bytes(SIZE)) if kind == "array" else bytearray(SIZE)


@pytest.mark.programs
@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["numpy", "mmap", "array", "bytearray"])
async def test_old_copy_is_refused_until_it_is_freed_closed_or_replaced(kind):
    memory = made(kind)
    assert await move(migrate.BufferGuest(memory)) == "completed"
    gc.collect()  # the guest is gone, and the memory is not
    assert "what is here is an old copy" in await move(migrate.BufferGuest(memory))

    # another guest comes into it
    fresh = migrate.BufferGuest(bytearray(b"n" * SIZE))
    assert await move(fresh, into=memory) == "completed"
    again = migrate.BufferGuest(memory)
    assert await move(again) == "completed"

    # closed by the program, which puts something else there
    await again.close()
    again = migrate.BufferGuest(memory)
    assert await move(again) == "completed"

    # freed
    before = len(buffer_lock._LOCKED)
    del memory, again
    gc.collect()
    assert len(buffer_lock._LOCKED) == before - 1


@pytest.mark.asyncio
async def test_guest_that_did_not_move_can_be_sent_again():
    guest = migrate.BufferGuest(bytearray(SIZE))
    assert "the buffer for it" in await move(guest, into=bytearray(10))
    assert await move(guest) == "completed"


@pytest.mark.asyncio
async def test_memory_being_moved_receives_nothing():
    memory = bytearray(SIZE)
    guest = migrate.BufferGuest(memory)
    await guest.lock()
    said = await move(migrate.BufferGuest(bytearray(b"o" * SIZE)), into=memory)
    assert "the buffer for the guest: it, or some of its memory, is being moved" in said
    assert memory == bytes(SIZE)
    guest.unlock()
    assert await move(migrate.BufferGuest(bytearray(b"o" * SIZE)), into=memory) == "completed"


SHARING = """
import asyncio, sys
from multiprocessing import resource_tracker, shared_memory
import migrate
memory = shared_memory.SharedMemory(sys.argv[1])
resource_tracker.unregister(memory._name, "shared_memory")
first, last = int(sys.argv[2]), int(sys.argv[3])
guest = migrate.BufferGuest(memory.buf[first:last])
asyncio.run(guest.lock())
print("held", flush=True)
sys.stdin.readline()
import os; os._exit(0)
"""


@pytest.mark.asyncio
async def test_shared_memory_is_locked_in_all_processes_that_map_it():
    memory = shared_memory.SharedMemory(create=True, size=SIZE)
    other = subprocess.Popen(  # noqa: ASYNC220 - it starts at once
        [sys.executable, "-c", SHARING, memory.name, "0", str(SIZE // 2)], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert other.stdout is not None
        assert await asyncio.to_thread(other.stdout.readline) == b"held\n"
        whole = migrate.BufferGuest(memory.buf)
        assert f"(process {other.pid}) is moving it" in await move(whole)
        file = FileGuest(f"/dev/shm/{memory.name}")
        with pytest.raises(UsageError, match="is moving it"):
            await file.lock()
        await file.close()
        assert await move(migrate.BufferGuest(memory.buf[SIZE // 2 :])) == "completed"
        other.kill()
        await asyncio.to_thread(other.communicate)
        mapped = migrate.BufferGuest(memory.buf[: SIZE // 2])
        assert await move(mapped) == "completed"
        await mapped.close()
        del mapped, whole
    finally:
        other.kill()
        await asyncio.to_thread(other.communicate)
        gc.collect()
        memory.close()
        memory.unlink()
    assert not os.path.exists(f"/dev/shm/{memory.name}")
