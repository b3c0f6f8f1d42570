"""A demo guest counts, stops in a pause, and never runs twice, whatever is killed.

Programs are killed with SIGKILL here, so that they cannot clean up.
"""

import asyncio
import contextlib
import errno
import json
import mmap
import os
import random
import signal
import time

import pytest

from migrate.cli.stop import StopRequests
from migrate.errors import MigrationError, UsageError
from migrate.guests.demo import shared_memory
from migrate.guests.demo.guest import DemoGuest
from migrate.guests.demo.handle import DemoProcess
from migrate.guests.demo.layout import MAGIC, Command, Owner, State
from migrate.guests.demo.place import DemoPlace
from migrate.memory.dirty import MarkTracker
from migrate.runtime.processes import Process
from proto.codec.kernel import PageEncoder, PageHashes
from proto.codec.pageset import PageSet
from proto.wire.messages import GuestInfo
from tests.killable import KillableProgram
from tests.processes import ended, process_with_number
from tests.programs import end_guest
from tests.requirements import need
from tests.waiting import wait_until

pytestmark = pytest.mark.programs

PAGE = 4096


@pytest.fixture
def demo():
    """Open demo guests, and end every one of them."""
    pids = []

    def open_guest(spec: str = "1m,hot=256k,rate=20000", page_size: int = 4096) -> DemoGuest:
        guest = DemoGuest.open(spec, page_size)
        pids.append(guest.process.pid)
        return guest

    open_guest.pids = pids
    yield open_guest
    for pid in pids:
        end_guest(pid)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "spec", ["", "64k,rate=50000", "1m,hot=100k,stride=4096,fill=random", "70001,stride=7,hot=5001"]
)
async def test_demo_guest_counts_and_stops_in_a_pause(demo, spec):
    guest = demo(spec)
    await guest.make_ready()
    process = guest.process
    await asyncio.to_thread(wait_until, lambda: process.position[0] >= 1)
    for _ in range(3):
        await guest.pause()
        position, content = process.position, bytes(process.memory)
        assert process.first_wrong() == -1
        await asyncio.sleep(0.02)
        assert (process.position, bytes(process.memory)) == (position, content), "it wrote"
        await guest.resume()
        await guest.resume()  # a guest that runs is left alone
        await asyncio.to_thread(wait_until, lambda position=position: process.position > position)
    await guest.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("fill", ["zero", "random"])
async def test_first_wrong_finds_any_flipped_byte(demo, fill):
    guest = demo(f"70001,hot=20000,stride=1000,rate=50000,fill={fill}")
    await guest.make_ready()
    await guest.pause()
    process = guest.process
    chance = random.Random(4)
    for at in (0, 1, 999, 1000, 19999, 20000, 65536, 70000, *chance.sample(range(70001), 100)):
        right = process.memory[at]
        process.memory[at] = right ^ 1 << chance.randrange(8)
        assert process.first_wrong() == at
        process.memory[at] = right
    assert process.first_wrong() == -1
    await guest.close()


@pytest.mark.asyncio
async def test_demo_guest_marks_the_pages_it_writes(demo):
    guest = demo("1m,hot=40k,rate=50000")
    await guest.make_ready()
    process = guest.process
    assert isinstance(guest.track(PageEncoder(PageHashes(256, 4096, bytes(16)))), MarkTracker)
    await asyncio.to_thread(wait_until, lambda: process.position[0] >= 1)
    await guest.pause()
    tracker = MarkTracker(process.marks, 256)
    assert set(tracker.take()) == set(range(10))
    await guest.close()


@pytest.mark.asyncio
async def test_second_program_cannot_lock_a_demo_guest(demo):
    guest = demo()
    await guest.make_ready()
    other = DemoProcess.attach(guest.process.pid)
    with pytest.raises(UsageError, match="is being moved by another program"):
        other.lock()

    def attempt() -> str:
        with KillableProgram(
            """
from migrate.errors import UsageError
from migrate.guests.demo.guest import DemoGuest
try:
    DemoGuest.open(f"pid={sys.argv[1]}", 4096)
except UsageError as error:
    print(error)
""",
            guest.process.pid,
        ) as program:
            return program.said

    assert "is being moved by another program" in await asyncio.to_thread(attempt)
    await guest.close()
    other.lock()  # the first one has closed its handle
    other.close()


@pytest.mark.asyncio
async def test_attach_refuses_other_processes_and_page_sizes(demo):
    with pytest.raises(UsageError, match="no demo guest in process"):
        DemoGuest.open(f"pid={os.getppid()}", 4096)
    guest = demo("1m,rate=100")
    await guest.make_ready()
    with pytest.raises(UsageError, match="pages of 4096 bytes: give --page-size 4096"):
        DemoGuest.open(f"pid={guest.process.pid}", 1024)
    await guest.close()


MEMORY = b"".join(
    number.to_bytes(8, "little")
    for number in (
        Command.RUN, State.RUNNING, 0, 0, Owner.OURS, MAGIC, 1 << 20, 4096, 1024, 0, 0, 4096,
    )
)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "size", "owner", "says"),
    [
        ({}, 3 << 20, 0, ""),
        ({}, 3 << 20, 65534, "user 65534 could take its memory away while it is read"),
        ({}, 4 << 20, 0, "cannot be"), ({}, 2 << 20, 0, "cannot be"), ({}, 100, 0, ""),
        ({11: 0}, 3 << 20, 0, "cannot be"), ({11: 4097}, 3 << 20, 0, "cannot be"),
        ({6: 0}, 3 << 20, 0, "cannot be"), ({6: (1 << 64) - 1}, 3 << 20, 0, "cannot be"),
        ({7: 2 << 20}, 3 << 20, 0, "cannot be"), ({8: 0}, 3 << 20, 0, "cannot be"),
        ({5: 1}, 3 << 20, 0, ""),
    ],
)  # fmt: skip
def test_attach_checks_the_control_block_of_another_process(
    tmp_path, words, size, owner, says
) -> None:
    """Any process may have a memfd of that name."""
    need(os.geteuid() == 0, "root, to give files away")
    memory = bytearray(MEMORY)
    for at, word in words.items():
        memory[8 * at : 8 * at + 8] = word.to_bytes(8, "little")
    (tmp_path / "memory").write_bytes(memory)
    os.truncate(tmp_path / "memory", size)
    os.chown(tmp_path / "memory", owner, owner)
    fd, us = os.open(tmp_path / "memory", os.O_RDWR), Process(os.getpid())
    if not words and size == 3 << 20 and not owner:
        DemoProcess(fd, us).close()
        return
    with pytest.raises(UsageError, match=f"is not a demo guest.*{says}"):
        DemoProcess(fd, us)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def attached(demo) -> DemoProcess:
    """Return a handle, without the lock, on a new guest that runs."""
    guest = demo()
    asyncio.run(guest.make_ready())
    handle = DemoProcess.attach(guest.process.pid)
    asyncio.run(guest.close())
    return handle


def test_memory_of_a_demo_guest_cannot_shrink(demo) -> None:
    with contextlib.closing(attached(demo)) as handle, pytest.raises(PermissionError):
        os.ftruncate(handle.fd, 4096)


def test_attach_does_not_open_a_descriptor_that_became_a_device(monkeypatch):
    """The process may change it between two looks, and a device acts on being opened."""
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append(flags) or real(path, flags))
    monkeypatch.setattr(os, "readlink", lambda _path: "/memfd:xbmigrate-demo (deleted)")
    with open("/dev/zero", "rb") as device:
        assert shared_memory._open_demo_memory(f"/proc/self/fd/{device.fileno()}") == -1
    assert all(flags & os.O_PATH for flags in opened[1:] or opened)


def of_another_user(guest: DemoGuest) -> DemoGuest:
    """Attach to the guest again once its memory belongs to another user."""
    need(os.geteuid() == 0, "root, to give files away")
    os.fchown(guest.process.fd, 65534, 65534)
    pid = guest.process.pid
    guest.process.close()
    return DemoGuest.open(f"pid={pid}", PAGE)


@pytest.mark.asyncio
async def test_holes_of_another_users_guest_stay_holes(demo) -> None:
    """A sparse file costs its owner nothing; root, who reads it, would pay for what fills it."""
    ours = demo("256m,hot=16k,rate=50000")
    await ours.make_ready()
    guest = of_another_user(ours)
    process, pages = guest.process, (256 << 20) // PAGE
    before = os.fstat(process.fd).st_blocks
    await guest.pause()
    assert process.first_wrong() == -1
    assert sum(count for _, count, data in guest.memory.extents(PAGE) if data) < pages // 2
    numbers, page = memoryview(bytearray(8 * 256)).cast("Q"), 0
    while page < pages:
        dirty, buffer = PageSet.full(pages).bits, memoryview(bytearray(256 * PAGE))
        _, page = guest.memory.gather(dirty, page, pages, PAGE, buffer, numbers)
    assert (os.fstat(process.fd).st_blocks - before) * 512 < 2 << 20
    await guest.close()


@pytest.mark.asyncio
async def test_another_users_guest_is_read_from_its_file(demo) -> None:
    ours = demo("5000001,hot=16k,stride=100,rate=50000,fill=random")
    await ours.make_ready()
    guest = of_another_user(ours)
    await guest.pause()
    process, page = guest.process, bytearray(PAGE)
    for at in (0, 8191, 1 << 20, 5_000_000):
        process.memory[at] ^= 1
        assert process.first_wrong() == at
        process.memory[at] ^= 1
    assert process.first_wrong() == -1
    assert guest.memory.read(5 * PAGE, memoryview(page)) == PAGE
    assert page == process.memory[5 * PAGE : 6 * PAGE]
    numbers, two = memoryview(bytearray(16)).cast("Q"), memoryview(bytearray(2 * PAGE))
    dirty = PageSet(-(-5000001 // PAGE))
    dirty.bits[0] = 0b10100
    assert guest.memory.gather(dirty.bits, 0, dirty.pages, PAGE, two, numbers)[0] == 2
    assert two[:PAGE] == process.memory[2 * PAGE : 3 * PAGE]
    assert two[PAGE:] == process.memory[4 * PAGE : 5 * PAGE]
    await guest.close()


@pytest.mark.asyncio
async def test_sparse_guest_of_another_user_must_fit_the_machine(demo, monkeypatch) -> None:
    ours = demo("64m,hot=16k,rate=100")
    await ours.make_ready()
    pid = ours.process.pid
    monkeypatch.setattr(shared_memory, "machine_memory", lambda: 1 << 20)
    DemoProcess.attach(pid).close()  # the limit is for other users' guests
    with pytest.raises(UsageError, match=r"is not a demo guest that can be moved.*1.0 MiB of free"):
        of_another_user(ours)


def test_memory_that_cannot_be_mapped_is_a_usage_error_and_leaves_no_process(
    demo, monkeypatch
) -> None:
    pid, killed, whole = demo().process.pid, [], mmap.mmap
    monkeypatch.setattr(DemoProcess, "kill", lambda self: killed.append(self.pid))

    def full(fd: int, size: int) -> mmap.mmap:
        if size > 4096:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return whole(fd, size)

    monkeypatch.setattr(shared_memory.mmap, "mmap", full)
    says = "the memory of a demo guest of 1.0 MiB cannot be had: Cannot allocate memory"
    with pytest.raises(UsageError, match=says):
        DemoProcess.attach(pid)
    assert killed == []
    with pytest.raises(UsageError, match=says):
        demo()
    assert len(killed) == 1
    end_guest(*killed)
    os.waitpid(*killed, 0)


PAUSER = """
from migrate.guests.demo.guest import DemoGuest
guest = DemoGuest.open(f"pid={sys.argv[1]}", 4096)
await guest.pause()
"""


def test_paused_demo_guest_resumes_when_its_program_is_killed(demo):
    handle = attached(demo)
    with KillableProgram(PAUSER, handle.pid) as program:
        assert handle.state == State.PAUSED
        position = handle.position
        time.sleep(0.1)
        assert (handle.state, handle.position) == (State.PAUSED, position)
        program.kill()
        wait_until(lambda: handle.state == State.RUNNING and handle.position > position)
    handle.lock()
    asyncio.run(handle.pause())
    assert handle.first_wrong() == -1
    handle.close()


def test_relinquished_demo_guest_stays_paused_when_its_program_is_killed(demo):
    handle = attached(demo)
    with KillableProgram(PAUSER + "await guest.relinquish()", handle.pid) as program:
        program.kill()
        position = handle.position
        time.sleep(0.2)
        assert (handle.state, handle.position) == (State.PAUSED, position)
        assert handle.owner == Owner.RELINQUISHED
        assert handle.alive()
    handle.close()


def test_reclaimed_demo_guest_resumes_when_its_program_is_killed(demo):
    handle = attached(demo)
    with KillableProgram(
        PAUSER + "await guest.relinquish()\nawait guest.reclaim()", handle.pid
    ) as program:
        position = handle.position
        assert handle.state == State.PAUSED
        program.kill()
        wait_until(lambda: handle.state == State.RUNNING and handle.position > position)
    handle.close()


@pytest.mark.asyncio
async def test_released_demo_guest_ends(demo):
    guest = demo()
    await guest.make_ready()
    await guest.pause()
    await guest.relinquish()
    await guest.release()
    await asyncio.to_thread(wait_until, lambda: not guest.process.alive())
    with pytest.raises(MigrationError, match="does not answer"):
        await guest.process.run()
    await guest.close()


def increments(guest: DemoGuest, seconds: float) -> int:
    """Return how far a demo guest counts in that time."""
    points = -(-guest.process.shape.hot // guest.process.shape.stride)
    before = guest.process.position
    time.sleep(seconds)
    after = guest.process.position
    return (after[0] - before[0]) * points + after[1] - before[1]


@pytest.mark.asyncio
@pytest.mark.parametrize("rate", [0, 20000, 500000])
async def test_throttled_demo_guest_is_slower_and_right(demo, rate):
    guest = demo(f"1m,hot=256k,stride=64,rate={rate}")
    await guest.make_ready()
    await guest.throttle(90)
    began = time.monotonic()
    slow = await asyncio.to_thread(increments, guest, 1.0)
    seconds = time.monotonic() - began
    if rate:
        # A tenth of what it counts else, and what one run more makes.
        assert 0 < slow < rate * (seconds * 0.1 + 0.04)
    else:
        await asyncio.to_thread(wait_until, lambda: increments(guest, 0.1) > 0)
    for _ in range(5):
        await guest.pause()
        assert guest.process.state == State.PAUSED
        assert guest.process.first_wrong() == -1
        await guest.resume()
    await guest.throttle(0)
    if rate:
        await asyncio.to_thread(wait_until, lambda: increments(guest, 0.2) > rate * 0.2 * 0.5)
    await guest.pause()
    assert guest.process.first_wrong() == -1
    await guest.resume()
    await guest.close()


SLOW_DEMO = """
from migrate.guests.demo.guest import DemoGuest
guest = DemoGuest.open("1m,hot=256k,rate=20000", 4096)
await guest.make_ready()
await guest.throttle(99)
print(guest.process.pid)
"""


def test_throttle_of_a_demo_guest_ends_when_its_program_is_killed(demo):
    with KillableProgram(SLOW_DEMO) as program:
        pid = int(program.said)
        demo.pids.append(pid)
        handle = DemoProcess.attach(pid)
        assert handle.throttle == 99
        time.sleep(0.1)
        assert handle.throttle == 99
        program.kill()
        wait_until(lambda: handle.throttle == 0)
        before = handle.position
        wait_until(lambda: handle.position > before)
        handle.close()


@pytest.mark.asyncio
async def test_relinquished_demo_guest_is_not_throttled(demo):
    guest = demo()
    await guest.make_ready()
    await guest.throttle(99)
    await guest.pause()
    await guest.relinquish()
    assert guest.process.throttle == 0
    await guest.reclaim()
    await guest.resume()
    await guest.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("spec", ["1m,hot=256k,rate=20000", "70001,stride=7,hot=5001,fill=random"])
async def test_demo_guest_continues_at_the_destination(demo, spec):
    guest = demo(spec)
    await guest.make_ready()
    await asyncio.to_thread(wait_until, lambda: guest.process.position[0] >= 1)
    await guest.pause()
    size = guest.memory.size
    place = DemoPlace.create(GuestInfo("demo", size, 4096, bytes(16)))
    demo.pids.append(place.process.pid)
    await place.make_ready()
    half = size // 2  # pages come through the mapping, and through the file
    place.memory[:half] = guest.process.memory[:half]
    os.pwrite(place.fd, guest.process.memory[half:size], place.fd_offset + half)
    counted = guest.process.position
    await place.prepare(guest.state())
    place.mark_complete()
    assert place.process.state == State.PAUSED
    assert place.process.owner == Owner.COMPLETE
    assert "runs in process" in await place.start(guest.state())
    process = DemoProcess.attach(place.process.pid)
    assert process.shape == guest.process.shape
    await asyncio.to_thread(wait_until, lambda: process.position > counted)
    await process.pause()
    assert process.first_wrong() == -1
    process.close()
    place.close()
    await guest.close()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "state", [b"", b"demo", bytes(45), b"demo" + b"\xff" * 41, b"x" * 1000], ids=len
)
async def test_state_that_makes_no_sense_is_refused_before_the_guest_is_ours(demo, state):
    place = DemoPlace.create(GuestInfo("demo", 1 << 20, 4096, bytes(16)))
    demo.pids.append(place.process.pid)
    await place.make_ready()
    with pytest.raises(MigrationError, match="makes no sense"):
        await place.prepare(state)
    pid = place.process.pid
    await place.discard()
    await asyncio.to_thread(wait_until, lambda: ended(pid))


PLACE = """
from migrate.guests.demo.place import DemoPlace
from proto.wire.messages import GuestInfo
place = DemoPlace.create(GuestInfo("demo", 1 << 20, 4096, bytes(16)))
await place.make_ready()
print(place.process.pid)
"""


def test_later_process_with_the_number_of_a_prepared_guest_is_left_alone(demo):
    """The guest's process may end while the destination waits for its source."""
    place = DemoPlace.create(GuestInfo("demo", 1 << 16, PAGE, bytes(16)))
    asyncio.run(place.make_ready())
    place.mark_complete()
    again = DemoPlace.reopen(json.loads(json.dumps(place.facts())))
    place.close()
    os.kill(again.pid, signal.SIGKILL)
    os.waitpid(again.pid, 0)
    with process_with_number(again.pid) as other:
        with pytest.raises(MigrationError, match="has ended"):
            asyncio.run(again.start(b""))
        again.process.kill()
        asyncio.run(StopRequests().stay(again.pid, again.start_time))
        assert other.poll() is None
    again.close()


def test_incomplete_demo_guest_ends_with_its_receiver(demo):
    with KillableProgram(PLACE) as program:
        pid = int(program.said)
        demo.pids.append(pid)
        time.sleep(0.1)
        assert not ended(pid)
        program.kill()
        wait_until(lambda: ended(pid))


def test_started_demo_guest_outlives_its_receiver(demo):
    start = """
from migrate.guests.demo.guest import STATE_FORMAT
state = STATE_FORMAT.pack(b"demo", 4096, 1024, 1000.0, 0, 0, 0)
await place.prepare(state)
place.mark_complete()
await place.start(state)
"""
    with KillableProgram(PLACE + start) as program:
        pid = int(program.said)
        demo.pids.append(pid)
        program.kill()
        handle = DemoProcess.attach(pid)
        before = handle.position
        wait_until(lambda: handle.position > before)
        assert handle.state == State.RUNNING
        handle.command(Command.END)
        wait_until(lambda: ended(pid))
        handle.close()
