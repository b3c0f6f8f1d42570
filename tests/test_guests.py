"""Guests and places: nobody writes in a pause, whoever dies; and half a guest is never there.

Programs are killed with SIGKILL here: that is the case in which nobody gets to tidy up.
"""

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from migrate._memory import set_marks
from migrate.cli.program import Stop
from migrate.directory import Left, identity_of
from migrate.errors import MigrationError, PeerError, UsageError
from migrate.guests import buffer as buffer_module
from migrate.guests import demo as demo_module
from migrate.guests import moved
from migrate.guests.buffer import BufferGuest, BufferPlace, GuestMoved
from migrate.guests.demo import (
    END,
    GIVEN_UP,
    MAGIC,
    OURS,
    PAUSE,
    PAUSED,
    RUN,
    RUNNING,
    THROTTLE,
    DemoGuest,
    DemoPlace,
    DemoProcess,
)
from migrate.guests.file import FileGuest
from migrate.guests.output_file import FilePlace
from migrate.guests.process import Process
from migrate.guests.rights import Rights
from migrate.parameters import Parameters
from migrate.tracking import MarkTracker, ScanTracker
from proto.kernel import PageEncoder, PageHashes
from proto.messages import GuestInfo
from tests.programs import end_guest
from tests.requirements import need
from tests.test_directory import access_list

PATIENCE = 60.0
ROOT = Path(__file__).parent.parent


def wait_until(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.002)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def thread_states(pid: int) -> set[str]:
    states = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            states.add((task / "stat").read_text().rpartition(")")[2].split()[0])
    return states


@contextlib.contextmanager
def given_again(pid: int):
    """A process with the number of one that has ended."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    for _ in range(3000):
        try:
            last.write_text(str(pid - 1))
        except OSError as error:
            need(False, f"root, to say which number is next: {error.strerror}")
        child = subprocess.Popen(["sleep", "60"])
        try:
            if child.pid == pid:
                yield child
                return
        finally:
            child.kill()
            child.wait()
    need(False, "a number that is not taken by others at once")


class Mover:
    """A program that has got as far as `code` says and will be killed there.

    `said` is what it printed; it can be sure of that before it waits for its end.
    """

    def __init__(self, code: str, *arguments: object) -> None:
        lines = "\n".join("    " + line for line in code.strip().splitlines())
        program = (
            "import asyncio, sys\n"
            f"async def main():\n{lines}\n    print('ready', flush=True)\n"
            "    await asyncio.sleep(1000)\nasyncio.run(main())\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE,
            text=True, cwd=ROOT,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.said = ""
        for line in self.process.stdout:
            if line == "ready\n":
                return
            self.said += line
        raise AssertionError(f"the program ended with {self.process.wait()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


# ---------------------------------------------------------------- the demo guest


@pytest.fixture
def demo():
    """Opens demo guests, and ends every one of them."""
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
async def test_a_demo_guest_counts_and_every_byte_can_be_told(demo, spec):
    guest = demo(spec)
    await guest.started()
    process = guest.process
    await asyncio.to_thread(wait_until, lambda: process.place()[0] >= 1)
    for _ in range(3):
        await guest.pause()
        place, content = process.place(), bytes(process.memory)
        assert process.first_wrong() == -1
        await asyncio.sleep(0.02)
        assert (process.place(), bytes(process.memory)) == (place, content), "it wrote in a pause"
        await guest.resume()
        await guest.resume()  # a guest that runs is left alone
        await asyncio.to_thread(wait_until, lambda place=place: process.place() > place)
    await guest.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("fill", ["zero", "random"])
async def test_one_flipped_byte_anywhere_is_found(demo, fill):
    guest = demo(f"70001,hot=20000,stride=1000,rate=50000,fill={fill}")
    await guest.started()
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
async def test_the_marks_are_of_the_pages_it_writes(demo):
    guest = demo("1m,hot=40k,rate=50000")
    await guest.started()
    process = guest.process
    assert isinstance(guest.track(_Encoder(256, 4096)), MarkTracker)
    await asyncio.to_thread(wait_until, lambda: process.place()[0] >= 1)
    await guest.pause()
    tracker = MarkTracker(process.marks, 256)
    assert set(tracker.take()) == set(range(10))
    await guest.close()


class _Encoder:
    def __init__(self, pages: int, page_size: int) -> None:
        self.pages, self.page_size = pages, page_size


@pytest.mark.asyncio
async def test_two_programs_cannot_move_one_guest(demo):
    guest = demo()
    await guest.started()
    other = DemoProcess.attach(guest.process.pid)
    with pytest.raises(UsageError, match="is being moved by another program"):
        other.lock()

    def attempt() -> str:
        with Mover(
            """
from migrate.errors import UsageError
from migrate.guests.demo import DemoGuest
try:
    DemoGuest.open(f"pid={sys.argv[1]}", 4096)
except UsageError as error:
    print(error)
""",
            guest.process.pid,
        ) as mover:
            return mover.said

    assert "is being moved by another program" in await asyncio.to_thread(attempt)
    await guest.close()
    other.lock()  # the first one has let go
    other.close()


@pytest.mark.asyncio
async def test_only_a_demo_guest_is_taken_for_one(demo):
    with pytest.raises(UsageError, match="no demo guest in process"):
        DemoGuest.open(f"pid={os.getppid()}", 4096)
    guest = demo("1m,rate=100")
    await guest.started()
    with pytest.raises(UsageError, match="pages of 4096 bytes: give --page-size 4096"):
        DemoGuest.open(f"pid={guest.process.pid}", 1024)
    await guest.close()


MEMORY = b"".join(
    number.to_bytes(8, "little")
    for number in (RUN, RUNNING, 0, 0, OURS, MAGIC, 1 << 20, 4096, 1024, 0, 0, 4096)
)


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
def test_what_the_memory_of_another_process_says_of_itself_is_checked(
    tmp_path, words, size, owner, says
) -> None:
    """Any process may have a file of that name in memory."""
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


def test_the_memory_of_a_demo_guest_keeps_its_size(demo) -> None:
    with contextlib.closing(attached(demo)) as handle, pytest.raises(PermissionError):
        os.ftruncate(handle.fd, 4096)


PAUSER = """
from migrate.guests.demo import DemoGuest
guest = DemoGuest.open(f"pid={sys.argv[1]}", 4096)
await guest.pause()
"""


def attached(demo) -> DemoProcess:
    """A handle, without the lock, on a new guest that runs."""
    guest = demo()
    asyncio.run(guest.started())
    handle = DemoProcess.attach(guest.process.pid)
    asyncio.run(guest.close())
    return handle


def test_a_paused_guest_runs_on_when_its_pauser_is_killed(demo):
    handle = attached(demo)
    with Mover(PAUSER, handle.pid) as mover:
        assert handle.state() == PAUSED
        place = handle.place()
        time.sleep(0.1)
        assert (handle.state(), handle.place()) == (PAUSED, place)
        mover.kill()
        wait_until(lambda: handle.state() == RUNNING and handle.place() > place)
    handle.lock()
    asyncio.run(handle.command(PAUSE, PAUSED))
    assert handle.first_wrong() == -1
    handle.close()


def test_a_guest_that_was_given_up_stays_paused_when_its_pauser_is_killed(demo):
    handle = attached(demo)
    with Mover(PAUSER + "await guest.give_up()", handle.pid) as mover:
        mover.kill()
        place = handle.place()
        time.sleep(0.2)
        assert (handle.state(), handle.place()) == (PAUSED, place)
        assert handle.words[4] == GIVEN_UP
        assert handle.alive()
    handle.close()


def test_a_guest_that_was_taken_back_runs_on_again(demo):
    handle = attached(demo)
    with Mover(PAUSER + "await guest.give_up()\nawait guest.take_back()", handle.pid) as mover:
        place = handle.place()
        assert handle.state() == PAUSED
        mover.kill()
        wait_until(lambda: handle.state() == RUNNING and handle.place() > place)
    handle.close()


@pytest.mark.asyncio
async def test_a_released_guest_ends(demo):
    guest = demo()
    await guest.started()
    await guest.pause()
    await guest.give_up()
    await guest.release()
    await asyncio.to_thread(wait_until, lambda: not guest.process.alive())
    with pytest.raises(MigrationError, match="does not answer"):
        await guest.process.command(RUN, RUNNING)
    await guest.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("spec", ["1m,hot=256k,rate=20000", "70001,stride=7,hot=5001,fill=random"])
async def test_a_demo_guest_goes_on_at_its_place_where_it_stopped(demo, spec):
    guest = demo(spec)
    await guest.started()
    await asyncio.to_thread(wait_until, lambda: guest.process.place()[0] >= 1)
    await guest.pause()
    size = guest.memory.size
    place = DemoPlace(GuestInfo("demo", size, 4096, bytes(16)))
    demo.pids.append(place.process.pid)
    await place.ready()
    half = size // 2  # both ways in: by the mapping, and by the file behind it
    place.memory[:half] = guest.process.memory[:half]
    os.pwrite(place.fd, guest.process.memory[half:size], place.fd_offset + half)
    counted = guest.process.place()
    await place.prepare(guest.state())
    place.secure()
    assert place.process.state() == PAUSED
    assert place.process.words[4] != OURS
    assert "runs in process" in await place.start(guest.state())
    process = DemoProcess.attach(place.process.pid)
    assert process.shape == guest.process.shape
    await asyncio.to_thread(wait_until, lambda: process.place() > counted)
    await process.command(PAUSE, PAUSED)
    assert process.first_wrong() == -1
    process.close()
    place.close()
    await guest.close()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "state", [b"", b"demo", bytes(45), b"demo" + b"\xff" * 41, b"x" * 1000], ids=len
)
async def test_a_state_that_makes_no_sense_is_refused_before_the_guest_is_ours(demo, state):
    place = DemoPlace(GuestInfo("demo", 1 << 20, 4096, bytes(16)))
    demo.pids.append(place.process.pid)
    await place.ready()
    with pytest.raises(MigrationError, match="makes no sense"):
        await place.prepare(state)
    pid = place.process.pid
    await place.discard()
    await asyncio.to_thread(wait_until, lambda: gone(pid))


PLACE = """
from migrate.guests.demo import DemoPlace
from proto.messages import GuestInfo
place = DemoPlace(GuestInfo("demo", 1 << 20, 4096, bytes(16)))
await place.ready()
print(place.process.pid)
"""


def test_who_has_the_number_of_a_prepared_guest_by_now_is_left_alone(demo):
    """Its process ends while its source is waited for."""
    place = DemoPlace(GuestInfo("demo", 1 << 16, PAGE, bytes(16)))
    asyncio.run(place.ready())
    place.secure()
    again = DemoPlace.reopen(json.loads(json.dumps(place.facts())))
    place.close()
    os.kill(again.pid, signal.SIGKILL)
    os.waitpid(again.pid, 0)
    with given_again(again.pid) as other:
        with pytest.raises(MigrationError, match="has ended"):
            asyncio.run(again.start(b""))
        again.process.kill()
        asyncio.run(Stop().stay(again.pid, again.born))
        assert other.poll() is None
    again.close()


def test_a_place_that_never_became_ours_ends_with_its_receiver(demo):
    with Mover(PLACE) as mover:
        pid = int(mover.said)
        demo.pids.append(pid)
        time.sleep(0.1)
        assert not gone(pid)
        mover.kill()
        wait_until(lambda: gone(pid))


def test_a_guest_that_became_ours_outlives_its_receiver(demo):
    start = """
from migrate.guests.demo import STATE_FORMAT
state = STATE_FORMAT.pack(b"demo", 4096, 1024, 1000.0, 0, 0, 0)
await place.prepare(state)
place.secure()
await place.start(state)
"""
    with Mover(PLACE + start) as mover:
        pid = int(mover.said)
        demo.pids.append(pid)
        mover.kill()
        handle = DemoProcess.attach(pid)
        before = handle.place()
        wait_until(lambda: handle.place() > before)
        assert handle.state() == RUNNING
        handle.words[0] = END
        wait_until(lambda: gone(pid))
        handle.close()


# ---------------------------------------------------------------- file guests

WRITER = """
import mmap, sys, threading
file = open(sys.argv[1], "r+b")
memory = mmap.mmap(file.fileno(), 0)
def write(lane):
    while True:
        memory[lane] = (memory[lane] + 1) % 256
        stop.wait(0.0005)
stop = threading.Event()
for lane in range(4):
    threading.Thread(target=write, args=(lane,), daemon=True).start()
print("ready", flush=True)
stop.wait()
"""


@pytest.fixture
def writer(tmp_path):
    """A file and the process whose threads write it."""
    path = tmp_path / "guest.mem"
    path.write_bytes(bytes(8192))
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield path, process.pid
    process.kill()
    process.wait()
    process.stdout.close()


def writes(path: Path) -> bool:
    before = path.read_bytes()
    time.sleep(0.05)
    return path.read_bytes() != before


@pytest.mark.asyncio
async def test_a_pause_stops_all_threads_of_the_writer(writer):
    path, pid = writer
    guest = FileGuest(str(path), [pid])
    assert guest.stoppable
    await guest.started()
    assert await asyncio.to_thread(writes, path)
    await guest.pause()
    assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 5
    assert thread_states(pid) == {"T"}
    assert not await asyncio.to_thread(writes, path)
    await guest.resume()
    await asyncio.to_thread(wait_until, lambda: writes(path))
    await guest.pause()
    await guest.give_up()
    await guest.resume()  # too late
    assert thread_states(pid) == {"T"}
    await guest.take_back()
    await guest.resume()
    await asyncio.to_thread(wait_until, lambda: writes(path))
    await guest.close()


FILE_MOVER = """
from migrate.guests.file import FileGuest
guest = FileGuest(sys.argv[1], [int(pid) for pid in sys.argv[2:]])
await guest.started()
print(guest._guard.pid)
await guest.pause()
"""


def test_the_guard_resumes_the_writer_when_the_source_is_killed(writer):
    path, pid = writer
    with Mover(FILE_MOVER, path, pid) as mover:
        assert thread_states(pid) == {"T"}
        mover.kill()
        wait_until(lambda: writes(path))
        wait_until(lambda: gone(int(mover.said)))


def test_the_guard_leaves_a_writer_alone_whose_guest_was_given_up(writer):
    path, pid = writer
    with Mover(FILE_MOVER + "await guest.give_up()", path, pid) as mover:
        mover.kill()
        wait_until(lambda: gone(int(mover.said)))
        assert thread_states(pid) == {"T"}


def test_the_guard_outlives_what_a_terminal_sends_to_all(writer):
    """^C, a hang-up and SIGTERM reach the guard too; it stays until the source is gone."""
    path, pid = writer
    with Mover(FILE_MOVER, path, pid) as mover:
        guard = int(mover.said)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(guard, number)
        mover.kill()
        wait_until(lambda: writes(path))
        wait_until(lambda: gone(guard))


@pytest.mark.asyncio
async def test_a_guest_that_is_closed_while_paused_runs_on(writer):
    path, pid = writer
    guest = FileGuest(str(path), [pid])
    await guest.started()
    await guest.pause()
    await guest.close()
    await asyncio.to_thread(wait_until, lambda: writes(path))


@pytest.mark.asyncio
async def test_without_a_guard_nothing_is_stopped(writer):
    path, pid = writer
    guest = FileGuest(str(path), [pid])
    await guest.started()
    guest._guard.kill()
    await guest._guard.wait()
    with pytest.raises(MigrationError, match="guard process of the guest has died"):
        await guest.pause()
    assert "T" not in thread_states(pid)
    await guest.close()


@pytest.mark.asyncio
async def test_commands_stop_and_resume(tmp_path):
    path, log = tmp_path / "guest", tmp_path / "log"
    path.write_bytes(b"x")
    commands = (f"echo pause >> {log}", f"echo resume >> {log}")
    guest = await asyncio.to_thread(FileGuest, str(path), (), *commands)
    await guest.started()
    await guest.pause()
    await guest.resume()
    await guest.resume()
    assert log.read_text().split() == ["pause", "resume"]
    await guest.close()
    assert log.read_text().split() == ["pause", "resume"]


def test_the_guard_runs_the_resume_command_when_the_source_is_killed(tmp_path):
    path, log = tmp_path / "guest", tmp_path / "log"
    path.write_bytes(b"x")
    code = """
from migrate.guests.file import FileGuest
guest = FileGuest(sys.argv[1], (), "true", f"echo resumed > {sys.argv[2]}")
await guest.started()
await guest.pause()
"""
    with Mover(code, path, log) as mover:
        assert not log.exists()
        mover.kill()
        wait_until(lambda: log.exists() and log.read_text() == "resumed\n")


@pytest.mark.asyncio
async def test_a_command_that_fails_is_named(tmp_path):
    path = tmp_path / "guest"
    path.write_bytes(b"x")
    guest = await asyncio.to_thread(FileGuest, str(path), (), "exit 7", "true")
    await guest.started()
    with pytest.raises(MigrationError, match="--pause-cmd 'exit 7' failed with status 7"):
        await guest.pause()
    await guest.close()


def test_a_guest_file_behind_a_link_of_a_stranger_is_refused(tmp_path):
    """He could have it lead to a file that is not his."""
    need(os.geteuid() == 0, "root, to give files away")
    (tmp_path / "guest").write_bytes(b"root's")
    (tmp_path / "link").symlink_to("guest")
    FileGuest(str(tmp_path / "link"))
    os.chown(tmp_path / "link", 65534, 65534, follow_symlinks=False)
    facts = {"path": str(tmp_path / "link"), "pids": [], "resume_cmd": ""}
    for opens in (lambda: FileGuest(str(tmp_path / "link")), lambda: FileGuest.reopen(facts)):
        with pytest.raises(UsageError, match="link is a symbolic link of user 65534"):
            opens()
    os.chown(tmp_path / "guest", 65534, 65534)
    FileGuest(str(tmp_path / "link"))


def test_a_guest_is_reopened_with_the_very_processes_that_wrote_it(tmp_path):
    (tmp_path / "guest").write_bytes(b"x")
    with subprocess.Popen(["sleep", "60"]) as child:
        born = Process(child.pid).born
        for said, pids in ((born, (child.pid,)), (str(int(born) - 1), ()), ("", ())):
            facts = {"path": f"{tmp_path}/guest", "pids": [[child.pid, said]], "resume_cmd": ""}
            assert FileGuest.reopen(facts).pids == pids
        child.kill()


def test_what_is_no_guest_file_is_refused(tmp_path):
    """A FIFO too: opening it must not wait for a writer that never comes."""
    empty, fifo = tmp_path / "empty", tmp_path / "fifo"
    empty.touch()
    os.mkfifo(fifo)
    with pytest.raises(UsageError, match="it is empty"):
        FileGuest(str(empty))
    for path in (fifo, tmp_path, Path("/dev/zero")):
        with pytest.raises(UsageError, match=r"guest file .*: "):
            FileGuest(str(path))
    for path, kind in ((fifo, "a FIFO"), (tmp_path, "a directory")):
        with pytest.raises(UsageError, match=f"neither a file nor a block device, but {kind}"):
            FileGuest(str(path))
    with pytest.raises(UsageError, match="that is migrate-src itself"):
        FileGuest(sys.executable, [os.getpid()])
    with pytest.raises(UsageError, match="it is on proc: such a file is made as it is read"):
        FileGuest("/proc/self/status")


@pytest.mark.parametrize("size", [0, 4095, 4097, 8192])
def test_a_guest_that_changes_its_size_is_noticed_at_the_end_of_a_round(tmp_path, size):
    path = tmp_path / "guest"
    path.write_bytes(bytes(4096))
    guest = FileGuest(str(path))
    guest.check()
    os.truncate(path, size)
    with pytest.raises(MigrationError, match=f"it had 4096 bytes at the start and has {size} now"):
        guest.check()
    asyncio.run(guest.close())


# ---------------------------------------------------------------- where a file lands

PAGE = 4096


@pytest.fixture(params=["named-later", "hidden-name"])
def place_of(request, monkeypatch):
    """Makes file places, on file systems with and without files that have no name."""
    real = os.open

    def without_tmpfile(path, flags, *mode, **more):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real(path, flags, *mode, **more)

    if request.param == "hidden-name":
        monkeypatch.setattr(os, "open", without_tmpfile)

    def make(size: int, path: Path, *, overwrite: bool = False, left: str = "") -> FilePlace:
        info = GuestInfo("file", size, PAGE, bytes(16))
        found = None
        if left:
            inode = list(identity_of(os.stat(left)))
            found = Left.read({"path": str(path), "temporary": left, "inode": inode})
        return FilePlace(info, str(path), overwrite, found)

    return make


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


@pytest.mark.asyncio
async def test_an_output_appears_whole_or_not_at_all(place_of, tmp_path):
    size = 10 * PAGE + 33
    path = tmp_path / "out"
    place = place_of(size, path)
    content = random.Random(1).randbytes(size)
    for page in range(11):
        place.make_room(page)
    place.memory[:size] = content
    place.sync()
    assert visible(tmp_path) == []
    place.persist()
    await place.prepare(b"")
    place.secure()
    assert visible(tmp_path) == []
    assert "out is complete" in await place.start(b"")
    place.close()
    assert [item.name for item in tmp_path.iterdir()] == ["out"]
    assert path.read_bytes() == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.asyncio
@pytest.mark.parametrize("prepared", [False, True])
async def test_a_discarded_output_leaves_nothing(place_of, tmp_path, prepared):
    place = place_of(PAGE, tmp_path / "out")
    place.make_room(0)
    place.memory[:5] = b"half "
    if prepared:
        place.persist()
        await place.prepare(b"")
        place.secure()
    await place.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asyncio
async def test_pages_never_written_stay_holes(place_of, tmp_path):
    size = 16 << 20
    path = tmp_path / "out"
    place = place_of(size, path)
    place.make_room(100)
    place.memory[100 * PAGE : 101 * PAGE] = b"d" * PAGE
    os.pwrite(place.fd, b"d" * PAGE, place.fd_offset + 101 * PAGE)
    into = memoryview(bytearray(size))
    assert place.reads.read(0, into) == size
    place.persist()
    await place.prepare(b"")
    place.secure()
    await place.start(b"")
    place.close()
    assert path.stat().st_size == size
    assert path.stat().st_blocks * 512 < 1 << 20
    assert path.read_bytes() == bytes(100 * PAGE) + b"d" * 2 * PAGE + bytes(size - 102 * PAGE)


@pytest.mark.asyncio
async def test_an_existing_output_is_refused(place_of, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match="it exists: remove it or give --overwrite"):
        place_of(PAGE, path)
    assert [item.name for item in tmp_path.iterdir()] == ["out"]
    path.unlink()
    place = place_of(PAGE, path)
    place.persist()
    await place.prepare(b"")
    place.secure()
    path.write_bytes(b"came meanwhile")
    with pytest.raises(MigrationError, match="File exists"):
        await place.start(b"")
    await place.discard()
    assert path.read_bytes() == b"came meanwhile"
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


@pytest.mark.asyncio
async def test_an_output_is_replaced_at_once_when_it_may(place_of, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    place = place_of(3, path, overwrite=True)
    place.make_room(0)
    place.memory[:3] = b"new"
    place.persist()
    await place.prepare(b"")
    place.secure()
    assert path.read_bytes() == b"old"
    await place.start(b"")
    place.close()
    assert path.read_bytes() == b"new"
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


@pytest.mark.asyncio
async def test_a_discarded_replacement_leaves_the_old_one(place_of, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    place = place_of(3, path, overwrite=True)
    place.persist()
    await place.prepare(b"")
    place.secure()
    await place.discard()
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


@pytest.mark.asyncio
async def test_a_full_disk_is_an_error_not_a_crash(place_of, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    place = place_of(PAGE, tmp_path / "out")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device"):
        place.make_room(0)
    await place.discard()


async def arrive(place: FilePlace, state: bytes = b"") -> str:
    place.persist()
    await place.prepare(state)
    place.secure()
    said = await place.start(state)
    place.close()
    return said


def rights(path: Path) -> Rights:
    here = path.stat()
    return Rights(stat.S_IMODE(here.st_mode), here.st_uid, here.st_gid)


def test_a_file_guest_says_mode_and_owner_of_its_file(tmp_path):
    path = tmp_path / "guest"
    path.write_bytes(b"x")
    path.chmod(0o4751)
    guest = FileGuest(str(path))
    assert Rights.unpack(guest.state()) == Rights(0o751, os.getuid(), os.getgid())
    asyncio.run(guest.close())


@pytest.mark.asyncio
async def test_what_arrives_has_the_rights_of_the_guests_file(place_of, tmp_path):
    need(os.geteuid() == 0, "root, to give files away")
    path = tmp_path / "out"
    said = await arrive(place_of(3, path), Rights(0o664, 65534, 65533).pack())
    assert said == f"{path} is complete, 3 B"
    assert rights(path) == Rights(0o664, 65534, 65533)


@pytest.mark.asyncio
async def test_what_arrives_has_the_rights_of_the_file_it_replaces(place_of, tmp_path):
    need(os.geteuid() == 0, "root, to give files away")
    path = tmp_path / "out"
    path.write_bytes(b"old")
    os.chown(path, 65533, 65532)
    path.chmod(0o2604)
    await arrive(place_of(3, path, overwrite=True), Rights(0o664, 65534, 65534).pack())
    assert rights(path) == Rights(0o604, 65533, 65532), "and no setgid for what a source sent"


@pytest.mark.asyncio
async def test_nothing_is_taken_over_from_a_file_that_a_stranger_may_have_put_there(
    place_of, tmp_path
):
    """In a directory like /tmp, to become the owner of what lands over it, or to read it."""
    need(os.geteuid() == 0, "root, to give files away")
    tmp_path.chmod(0o1777)
    path = tmp_path / "out"
    path.write_bytes(b"")
    os.chown(path, 65534, 65534)
    path.chmod(0o666)
    os.setxattr(path, "system.posix_acl_access", access_list(65533))
    os.setxattr(path, "user.note", b"his")
    await arrive(place_of(3, path, overwrite=True), Rights(0o600, 0, 0).pack())
    assert rights(path) == Rights(0o600, 0, 0)
    assert os.listxattr(path) == []


@pytest.mark.asyncio
@pytest.mark.parametrize("asked", [Rights(), Rights(mode=0o640), Rights(uid=0), Rights(gid=0)])
@pytest.mark.parametrize("later", [False, True])
async def test_an_access_list_is_kept_unless_mode_or_owner_was_said(tmp_path, asked, later):
    need(os.geteuid() == 0, "root, to give files away")
    path = tmp_path / "out"
    path.write_bytes(b"old")
    os.setxattr(path, "system.posix_acl_access", access_list(65533))
    place = FilePlace(GuestInfo("file", 3, PAGE, bytes(16)), str(path), True, rights=asked)
    if later:
        place.persist()
        await place.prepare(b"")
        facts = json.loads(json.dumps(place.facts()))
        place.close()
        place = FilePlace.reopen(facts)
        await place.start(b"")
        place.close()
    else:
        await arrive(place, b"")
    assert bool(os.listxattr(path)) == (asked == Rights())


@pytest.mark.asyncio
async def test_the_user_has_the_last_word_on_rights(tmp_path):
    need(os.geteuid() == 0, "root, to give files away")
    path = tmp_path / "out"
    path.write_bytes(b"old")
    asked = Rights(mode=0o400, gid=65531)
    place = FilePlace(
        GuestInfo("file", 3, PAGE, bytes(16)), str(path), True, rights=asked,
    )  # fmt: skip
    await arrive(place, Rights(0o664, 65534, 65534).pack())
    assert rights(path) == Rights(0o400, 0, 65531)


@pytest.mark.asyncio
async def test_a_later_program_gives_the_rights_that_were_prepared(place_of, tmp_path):
    need(os.geteuid() == 0, "root, to give files away")
    path = tmp_path / "out"
    place = place_of(3, path)
    place.persist()
    await place.prepare(Rights(0o640, 65534, 65533).pack())
    assert stat.S_IMODE(os.fstat(place.fd).st_mode) == 0o600, "nobody reads it before it is ours"
    facts = json.loads(json.dumps(place.facts()))
    place.close()
    again = FilePlace.reopen(facts)
    await again.start(b"")
    again.close()
    assert rights(path) == Rights(0o640, 65534, 65533)


@pytest.mark.asyncio
async def test_a_later_program_finds_what_has_its_name_though_it_may_not_open_it(
    place_of, tmp_path, monkeypatch
):
    """As where a user's file has come with mode 0400, or with none at all."""
    path = tmp_path / "out"
    place = place_of(3, path)
    await arrive(place, Rights(0).pack())
    facts = json.loads(
        json.dumps({**place_facts(path), "temporary": str(tmp_path / ".gone.xbmigrate")})
    )
    real = os.open

    def denied(name, flags, *mode, **more):
        if name in (str(path), path.name) and not flags & os.O_PATH:
            raise PermissionError(13, "Permission denied")
        return real(name, flags, *mode, **more)

    monkeypatch.setattr(os, "open", denied)
    again = FilePlace.reopen(facts)
    assert "is complete" in await again.start(b"")
    again.close()
    assert rights(path).mode == 0


def place_facts(path: Path) -> dict:
    here = path.stat()
    return {
        "path": str(path), "overwrite": False, "size": 3, "inode": [here.st_dev, here.st_ino],
    }  # fmt: skip


@pytest.mark.asyncio
async def test_rights_that_make_no_sense_are_refused_before_the_guest_is_ours(place_of, tmp_path):
    place = place_of(3, tmp_path / "out")
    place.persist()
    with pytest.raises(PeerError, match="mode and owner"):
        await place.prepare(b"nonsense")
    await place.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asyncio
@pytest.mark.parametrize("moment", ["round", "end"])
async def test_what_came_and_was_removed_is_missed_before_the_guest_is_ours(
    place_of, tmp_path, moment
):
    directory = tmp_path / "there"
    directory.mkdir()
    place = place_of(3, directory / "out")
    place.persist()
    place.sync()
    shutil.rmtree(directory)
    directory.mkdir()
    with pytest.raises(MigrationError, match=r"what had come .* was removed or replaced meanwhile"):
        place.sync() if moment == "round" else await place.prepare(b"")
    await place.discard()


@pytest.mark.asyncio
async def test_an_output_that_appears_meanwhile_is_noticed_before_the_guest_is_ours(
    place_of, tmp_path
):
    path = tmp_path / "out"
    place = place_of(3, path)
    place.persist()
    path.write_bytes(b"came meanwhile")
    with pytest.raises(MigrationError, match="it exists"):
        await place.prepare(b"")
    await place.discard()
    assert path.read_bytes() == b"came meanwhile"


def test_a_guest_that_is_larger_than_files_may_be_is_refused(tmp_path):
    code = """
import resource
from migrate.errors import UsageError
from migrate.guests.output_file import FilePlace
from proto.messages import GuestInfo
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
FilePlace(GuestInfo("file", 1 << 20, 4096, bytes(16)), sys.argv[1], False)
try:
    FilePlace(GuestInfo("file", (1 << 20) + 1, 4096, bytes(16)), sys.argv[1], False)
except UsageError as error:
    assert "ulimit -f" in str(error), error
"""
    with Mover(code, tmp_path / "out"):
        assert list(tmp_path.iterdir()) == []


def test_a_guest_for_which_there_may_be_no_room_is_said(place_of, tmp_path):
    """A sparse one may fit all the same."""
    room = os.statvfs(tmp_path)
    place = place_of(2 * room.f_bavail * room.f_frsize, tmp_path / "out")
    [said] = place.notices()
    assert "it fits only if all else is zeros" in said
    asyncio.run(place.discard())
    place = place_of(3, tmp_path / "out")
    assert place.notices() == []
    asyncio.run(place.discard())


def test_who_has_the_old_file_open_is_said(place_of, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with Mover("file = open(sys.argv[1])", path) as mover:
        place = place_of(3, path, overwrite=True)
        [said] = place.notices()
        assert f"process {mover.process.pid} " in said
        assert "will go on with the old file" in said
        asyncio.run(place.discard())
    place = place_of(3, path, overwrite=True)
    assert place.notices() == []
    asyncio.run(place.discard())


@pytest.mark.parametrize("whose", [0, 65534])
def test_only_a_mover_of_ours_keeps_a_guest_from_replacing_its_file(place_of, tmp_path, whose):
    """Any process can be called migrate-src."""
    need(os.geteuid() == 0, "root, to be another user")
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with path.open() as file, subprocess.Popen(
        ["bash", "-c", "echo; exec -a migrate-src sleep 60"], stdin=file, stdout=subprocess.PIPE,
        user=whose,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        wait_until(lambda: b"migrate-src" in Path(f"/proc/{child.pid}/cmdline").read_bytes()[:12])
        if whose:
            asyncio.run(place_of(3, path, overwrite=True).discard())
        else:
            with pytest.raises(UsageError, match="a guest cannot replace itself"):
                place_of(3, path, overwrite=True)
        child.kill()


def test_what_a_killed_receiver_leaves_can_be_gone_on_with(place_of, tmp_path):
    code = """
from migrate.guests.output_file import FilePlace
from proto.messages import GuestInfo
place = FilePlace(GuestInfo("file", 1 << 20, 4096, bytes(16)), sys.argv[1], False)
for page in range(256):
    place.make_room(page)
place.memory[:] = b"x" * (1 << 20)
"""
    with Mover(code, tmp_path / "out") as mover:
        mover.kill()
    assert list(tmp_path.iterdir()) == [], "nothing is written down of it"
    code += "place.persist()"
    with Mover(code, tmp_path / "out") as mover:
        mover.kill()
        [left] = tmp_path.iterdir()
        assert visible(tmp_path) == []
    place = place_of(1 << 20, tmp_path / "out", left=str(left))
    assert place.held
    assert bytes(place.memory) == b"x" * (1 << 20)
    assert list(place.reads.extents(PAGE)) == [(0, 256, True)]
    asyncio.run(place.discard())
    assert list(tmp_path.iterdir()) == []


def test_what_a_descriptor_has_become_is_not_opened(monkeypatch):
    """A process may change it between two looks: a device would act on being opened."""
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append(flags) or real(path, flags))
    monkeypatch.setattr(os, "readlink", lambda _path: "/memfd:xbmigrate-demo (deleted)")
    with open("/dev/zero", "rb") as device:
        assert demo_module._demo_memory(f"/proc/self/fd/{device.fileno()}") == -1
    assert all(flags & os.O_PATH for flags in opened[1:] or opened)


# ---------------------------------------------------------------- buffers


@pytest.mark.asyncio
async def test_writers_wait_while_a_buffer_is_paused_and_learn_that_it_moved():
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
            assert before[0] == before[-1], "somebody was inside"
            await asyncio.sleep(0.002)
            assert memory == before
            assert not moved.is_set()
            await guest.resume()
        await asyncio.to_thread(wait_until, lambda: memory != before)
        await guest.pause()
        before = bytes(memory)
        await guest.give_up()
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
async def test_a_writer_that_stays_inside_fails_the_pause_and_is_let_go_on(monkeypatch):
    monkeypatch.setattr(buffer_module, "PAUSE_PATIENCE", 0.05)
    guest = BufferGuest(bytearray(10))
    async with guest.writing():
        with pytest.raises(MigrationError, match="stayed inside"):
            await guest.pause()
    await guest.resume()
    async with guest.writing():
        pass


@pytest.mark.asyncio
async def test_a_program_may_stop_its_writers_in_a_way_of_its_own():
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


def test_marks_are_of_every_page_a_write_touches():
    guest = BufferGuest(bytearray(10 * 1024), marks=True, page_size=1024)
    tracker = guest.track(_Encoder(10, 1024))
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
    set_marks(guest._marks, 3, 1)
    assert set(tracker.take()) == {3}


def test_any_writable_buffer_will_do_and_nothing_else():
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros((10, 10))
    guest = BufferGuest(array)
    assert guest.memory.size == 800
    array[0, 0] = 1.0
    assert guest.memory.view[:8] == array[0, :1].tobytes()
    for bad in (b"", numpy.zeros((4, 4))[:, 1], "text", 5):
        with pytest.raises(UsageError):
            BufferGuest(bad)


def test_without_marks_a_buffer_is_scanned():
    guest = BufferGuest(bytearray(8192))
    encoder = PageEncoder(PageHashes(2, 4096, bytes(16)))
    assert isinstance(guest.track(encoder), ScanTracker)


@pytest.mark.asyncio
async def test_a_buffer_lands_in_new_memory_or_where_the_program_wants_it():
    info = GuestInfo("buffer", 5000, 4096, bytes(16))
    place = BufferPlace(info)
    assert len(place.memory) == 8192
    place.memory[:5000] = b"g" * 5000
    await place.start(b"state")
    assert (bytes(place.received), place.state) == (b"g" * 5000, b"state")

    mine = bytearray(5000)
    place = BufferPlace(info, mine)
    place.memory[:5000] = b"g" * 5000
    assert mine == bytes(5000), "half a guest was there"
    await place.start(b"")
    assert mine == b"g" * 5000
    with pytest.raises(UsageError, match="the guest has 5000 bytes, the buffer for it 10"):
        BufferPlace(info, bytearray(10))


# ---------------------------------------------------------------- slowed (auto-converge)


def increments(guest: DemoGuest, seconds: float) -> int:
    """How far a demo guest counts meanwhile."""
    points = -(-guest.process.shape.hot // guest.process.shape.stride)
    before = guest.process.place()
    time.sleep(seconds)
    after = guest.process.place()
    return (after[0] - before[0]) * points + after[1] - before[1]


@pytest.mark.asyncio
@pytest.mark.parametrize("rate", [0, 20000, 500000])
async def test_a_demo_guest_is_slowed_and_stays_right(demo, rate):
    guest = demo(f"1m,hot=256k,stride=64,rate={rate}")
    await guest.started()
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
        assert guest.process.state() == PAUSED
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
from migrate.guests.demo import DemoGuest
guest = DemoGuest.open("1m,hot=256k,rate=20000", 4096)
await guest.started()
await guest.throttle(99)
print(guest.process.pid)
"""


def test_a_slowed_demo_guest_is_let_go_when_its_mover_is_killed(demo):
    with Mover(SLOW_DEMO) as mover:
        pid = int(mover.said)
        demo.pids.append(pid)
        handle = DemoProcess.attach(pid)
        assert handle.words[THROTTLE] == 99
        time.sleep(0.1)
        assert handle.words[THROTTLE] == 99
        mover.kill()
        wait_until(lambda: handle.words[THROTTLE] == 0)
        before = handle.place()
        wait_until(lambda: handle.place() > before)
        handle.close()


@pytest.mark.asyncio
async def test_a_demo_guest_that_is_given_up_is_slowed_no_more(demo):
    guest = demo()
    await guest.started()
    await guest.throttle(99)
    await guest.pause()
    await guest.give_up()
    assert guest.process.words[THROTTLE] == 0
    await guest.take_back()
    await guest.resume()
    await guest.close()


def runs(pid: int) -> bool:
    """For longer than anybody slows a writer in one go."""
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        if thread_states(pid) & set("Tt"):
            return False
        time.sleep(0.002)
    return True


@pytest.mark.asyncio
async def test_a_writer_is_slowed_by_stopping_it_again_and_again(writer):
    path, pid = writer
    guest = FileGuest(str(path), [pid])
    assert guest.can_throttle
    await guest.started()
    await guest.throttle(50)
    for _ in range(3):
        await asyncio.to_thread(wait_until, lambda: thread_states(pid) == {"T"})
        await asyncio.to_thread(wait_until, lambda: "T" not in thread_states(pid))
    await guest.throttle(99)
    await asyncio.to_thread(wait_until, lambda: writes(path))
    await guest.throttle(0)
    assert await asyncio.to_thread(runs, pid)
    await guest.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("percent", [30, 95])
async def test_a_pause_wins_over_the_duty_cycle(writer, percent):
    path, pid = writer
    guest = FileGuest(str(path), [pid])
    await guest.started()
    for number in range(20):
        await guest.throttle(percent)
        await asyncio.sleep(0.003 * number)
        await guest.pause()
        before = path.read_bytes()
        for _ in range(20):
            assert thread_states(pid) == {"T"}
            await asyncio.sleep(0.001)
        assert path.read_bytes() == before
        if number % 2:
            await guest.throttle(0)  # while it is paused
            assert thread_states(pid) == {"T"}
        await guest.resume()
        assert await asyncio.to_thread(runs, pid) or number % 5
    await guest.close()


@pytest.mark.asyncio
async def test_a_pause_that_is_cancelled_leaves_the_writer_running(writer):
    path, pid = writer
    guest = FileGuest(str(path), [pid])
    await guest.started()
    for number in range(10):
        await guest.throttle(90)
        await asyncio.sleep(0.005 * number)
        pausing = asyncio.create_task(guest.pause())
        await asyncio.sleep(0)
        pausing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pausing
        await guest.throttle(0)
        await guest.resume()
        await asyncio.to_thread(wait_until, lambda: runs(pid))
    await guest.close()


SLOW_FILE = """
from migrate.guests.file import FileGuest
guest = FileGuest(sys.argv[1], [int(pid) for pid in sys.argv[2:]])
await guest.started()
await guest.throttle(99)
print(guest._guard.pid)
"""


def test_a_slowed_writer_runs_on_when_its_mover_is_killed(writer):
    path, pid = writer
    with Mover(SLOW_FILE, path, pid) as mover:
        wait_until(lambda: thread_states(pid) == {"T"})
        mover.kill()
        wait_until(lambda: runs(pid))
        wait_until(lambda: gone(int(mover.said)))
        assert writes(path)


@pytest.mark.asyncio
async def test_a_writer_whose_guard_is_killed_is_let_go(writer):
    path, pid = writer
    guest = FileGuest(str(path), [pid])
    await guest.started()
    await guest.throttle(99)
    await asyncio.to_thread(wait_until, lambda: thread_states(pid) == {"T"})
    guest._guard.kill()
    await guest._guard.wait()
    with pytest.raises(MigrationError, match="guard"):
        await guest.throttle(99)
    assert await asyncio.to_thread(runs, pid)
    await guest.close()


@pytest.mark.asyncio
async def test_a_writer_that_was_given_up_is_not_let_go_by_a_throttle_that_ends(writer):
    path, pid = writer
    guest = FileGuest(str(path), [pid])
    await guest.started()
    await guest.throttle(50)
    await guest.pause()
    await guest.give_up()
    guest._guard.kill()
    await guest._guard.wait()
    await guest.throttle(0)
    for _ in range(30):
        assert thread_states(pid) == {"T"}
        await asyncio.sleep(0.002)
    await guest.close()


@pytest.mark.asyncio
async def test_who_was_stopped_by_somebody_else_is_not_woken(writer):
    path, pid = writer
    os.kill(pid, signal.SIGSTOP)
    await asyncio.to_thread(wait_until, lambda: thread_states(pid) == {"T"})
    guest = FileGuest(str(path), [pid])

    async def sleeps() -> None:
        for _ in range(30):
            assert thread_states(pid) == {"T"}
            await asyncio.sleep(0.002)

    await guest.started()
    await guest.throttle(40)
    await sleeps()
    await guest.throttle(0)
    await guest.pause()
    await guest.give_up()
    await guest.take_back()
    await guest.resume()
    await sleeps()
    await guest.pause()
    await guest.close()  # as if we had died
    await sleeps()
    os.kill(pid, signal.SIGCONT)


def test_who_cannot_be_slowed_says_so(tmp_path):
    path = tmp_path / "guest"
    path.write_bytes(b"x")
    assert not FileGuest(str(path)).can_throttle
    assert not FileGuest(str(path), (), "true", "true").can_throttle
    assert not BufferGuest(bytearray(10)).can_throttle


@pytest.mark.parametrize("said", [b"[" * 2500, b'{"writers":[[1e999,""]],"commanded":false}'])
def test_a_mark_that_somebody_made_up_is_none(monkeypatch, said) -> None:
    monkeypatch.setattr(moved, "_mark_of", lambda _fd: said)
    moved.refuse_if_moved(0, "guest")
