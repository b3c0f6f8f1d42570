"""The kernel's record of what this process writes to its own buffers."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import migrate
from migrate.tracking.own_record import OwnRecord
from migrate.tracking.record import Refused
from tests.recording import PAGE, anonymous, why_not, written

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "the kernel records writes")


@given(
    start=st.integers(0, 2 * PAGE), size=st.integers(1, 8 * PAGE),
    page_size=st.sampled_from([PAGE, 4 * PAGE]), data=st.data(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_own_writes_are_named(start: int, size: int, page_size: int, data: st.DataObject) -> None:
    """Wherever the buffer begins; a page of the processor that is shared may name one too many."""
    view = anonymous(16 * PAGE)[start : start + size]
    view[:] = bytes(size)
    record = OwnRecord(view, page_size)
    pages = -(-size // page_size)
    try:
        assert written(record, pages) == (set(), "")
        offsets = data.draw(st.lists(st.integers(0, size - 1), max_size=10))
        for at in offsets:
            view[at] = 1
        named, _ = written(record, pages)
        assert {at // page_size for at in offsets} <= named
        around = {
            other // page_size
            for at in offsets
            for other in range(max(0, at - PAGE), min(size, at + PAGE), 1)
            if (other + start) // PAGE == (at + start) // PAGE
        }
        assert named <= around
        assert written(record, pages) == (set(), "")
    finally:
        record.close()


@pytest.mark.parametrize(
    "make", [bytearray, anonymous, lambda size: mmap.mmap(-1, size)],
    ids=["bytearray", "private", "shared"],
)  # fmt: skip
def test_own_buffers_of_any_kind(make: Callable[[int], bytearray | memoryview]) -> None:
    view = memoryview(make(1 << 20))
    record = OwnRecord(view, PAGE)
    view[123456] = 1
    ctypes.memset(ctypes.addressof(ctypes.c_ubyte.from_buffer(view, 300000)), 7, 10000)
    named, happened = written(record, 256)
    assert not happened
    assert named >= {123456 // PAGE, 300000 // PAGE, 309999 // PAGE}
    assert len(named) < 10
    record.close()


def test_a_buffer_that_others_may_map_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    with path.open("r+b") as file, pytest.raises(Refused, match="a mapping of a file"):
        OwnRecord(memoryview(mmap.mmap(file.fileno(), 0)), PAGE)


# A program that records a shared buffer, forks, and prints what the looks have said. The child
# writes a page, and ends or stays.
FORKS = """
import mmap, os, signal, sys
from migrate.tracking.own_record import OwnRecord
from migrate.tracking.record import Refused
from tests.recording import PAGE, written
memory = mmap.mmap(-1, 64 * PAGE)
record = OwnRecord(memoryview(memory), PAGE)
memory[5 * PAGE] = 1
print(written(record, 64))
inlet, outlet = os.pipe()
child = os.fork()
if not child:
    memory[9 * PAGE] = 1
    os.write(outlet, b"written")
    if sys.argv[1] == "stays":
        signal.pause()
    os._exit(0)
os.read(inlet, 7)
if sys.argv[1] == "ends":
    os.waitpid(child, 0)
try:
    print(written(record, 64)[1] or "nothing")
    memory[6 * PAGE] = 1
    print(written(record, 64))
except Refused as refused:
    print("refused:", str(refused).replace(str(child), "CHILD"))
record.close()
if sys.argv[1] == "stays":
    os.kill(child, signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("child", "said"),
    [
        ("ends", ["({5}, '')", "this process has forked", "({6}, '')"]),
        ("stays", ["({5}, '')",
                   "refused: process CHILD, which this one has forked, may write the buffer too"]),
    ],
)  # fmt: skip
def test_a_shared_buffer_is_recorded_while_no_child_has_it(child: str, said: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS, child], stdout=subprocess.PIPE, text=True, check=True,
        timeout=60, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.stdout.splitlines() == said


def test_a_buffer_that_a_child_has_already_is_refused() -> None:
    program = FORKS.replace("child = os.fork()", "").replace(
        "memory = mmap.mmap(-1, 64 * PAGE)\n",
        "memory = mmap.mmap(-1, 64 * PAGE)\nif not os.fork(): sys.stdin.read(); os._exit(0)\n",
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, "stays"], stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=Path(__file__).parent.parent,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stderr is not None
        line = ""
        for line in process.stderr:
            if "Refused" in line:
                break
        assert "which this one has forked, may write the buffer too" in line
        process.stdin.close()
        assert process.wait(60) == 1


def descriptors() -> list[str]:
    """Return what the descriptors of this process lead to."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


@pytest.mark.asyncio
async def test_a_buffer_moves_with_a_record_and_nothing_of_it_stays() -> None:
    memory = bytearray(os.urandom(4 << 20))
    guest = migrate.BufferGuest(memory, tracking="kernel")
    address: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    receiver = asyncio.create_task(migrate.receive("127.0.0.1:0", listening=address.set_result))
    parameters = migrate.Parameters(limits=migrate.Limits(max_bandwidth=8 << 20))
    sending = asyncio.create_task(migrate.send(guest, str(await address), parameters))
    with contextlib.suppress(migrate.GuestMoved):
        while not sending.done():
            async with guest.writing():
                memory[random.randrange(len(memory))] = random.randrange(256)
            await asyncio.sleep(0.001)
    statistics, received = await sending, await receiver
    assert bytes(received.memory) == bytes(memory)
    assert statistics.tracking == "kernel"
    assert not [link for link in descriptors() if "userfaultfd" in link]
