"""A file guest: its writers stop in a pause, and run on whatever is killed.

Programs are killed with SIGKILL here, so that they cannot clean up.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migrate.errors import MigrationError, UsageError
from migrate.guests.buffer import BufferGuest
from migrate.guests.file import FileGuest
from migrate.guests.rights import Rights
from migrate.runtime.processes import Process
from tests.killable import KillableProgram
from tests.processes import ended, thread_states
from tests.requirements import need
from tests.waiting import wait_until

pytestmark = pytest.mark.programs

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
    """A file, and the number of a process whose threads write it."""
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
async def test_pause_stops_all_threads_of_the_writer(writer):
    path, pid = writer
    guest = FileGuest(str(path), [pid])
    assert guest.stoppable
    await guest.make_ready()
    assert await asyncio.to_thread(writes, path)
    await guest.pause()
    assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 5
    assert thread_states(pid) == {"T"}
    assert not await asyncio.to_thread(writes, path)
    await guest.resume()
    await asyncio.to_thread(wait_until, lambda: writes(path))
    await guest.pause()
    await guest.relinquish()
    await guest.resume()  # too late
    assert thread_states(pid) == {"T"}
    await guest.reclaim()
    await guest.resume()
    await asyncio.to_thread(wait_until, lambda: writes(path))
    await guest.close()


FILE_MOVER = """
from migrate.guests.file import FileGuest
guest = FileGuest(sys.argv[1], [int(pid) for pid in sys.argv[2:]])
await guest.make_ready()
print(guest.watchdog_pid)
await guest.pause()
"""


def test_watchdog_resumes_the_writer_when_the_source_is_killed(writer):
    path, pid = writer
    with KillableProgram(FILE_MOVER, path, pid) as program:
        assert thread_states(pid) == {"T"}
        program.kill()
        wait_until(lambda: writes(path))
        wait_until(lambda: ended(int(program.said)))


def test_watchdog_leaves_the_writer_of_a_relinquished_guest_stopped(writer):
    path, pid = writer
    with KillableProgram(FILE_MOVER + "await guest.relinquish()", path, pid) as program:
        program.kill()
        wait_until(lambda: ended(int(program.said)))
        assert thread_states(pid) == {"T"}


def test_watchdog_ignores_the_signals_of_a_terminal(writer):
    """^C, a hang-up and SIGTERM may reach the watchdog; it stays until the source has ended."""
    path, pid = writer
    with KillableProgram(FILE_MOVER, path, pid) as program:
        watchdog = int(program.said)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(watchdog, number)
        program.kill()
        wait_until(lambda: writes(path))
        wait_until(lambda: ended(watchdog))


@pytest.mark.asyncio
async def test_guest_that_is_closed_in_a_pause_runs_on(writer):
    path, pid = writer
    guest = FileGuest(str(path), [pid])
    await guest.make_ready()
    await guest.pause()
    await guest.close()
    await asyncio.to_thread(wait_until, lambda: writes(path))


@pytest.mark.asyncio
async def test_pause_without_a_watchdog_stops_nothing(writer):
    path, pid = writer
    guest = FileGuest(str(path), [pid])
    await guest.make_ready()
    os.kill(guest.watchdog_pid, signal.SIGKILL)
    await asyncio.to_thread(wait_until, lambda: ended(guest.watchdog_pid))
    with pytest.raises(MigrationError, match="watchdog process of the guest has died"):
        await guest.pause()
    assert "T" not in thread_states(pid)
    await guest.close()


@pytest.mark.asyncio
async def test_commands_pause_and_resume_the_guest(tmp_path):
    path, log = tmp_path / "guest", tmp_path / "log"
    path.write_bytes(b"x")
    commands = (f"echo pause >> {log}", f"echo resume >> {log}")
    guest = await asyncio.to_thread(FileGuest, str(path), (), *commands)
    await guest.make_ready()
    await guest.pause()
    await guest.resume()
    await guest.resume()
    assert log.read_text().split() == ["pause", "resume"]
    await guest.close()
    assert log.read_text().split() == ["pause", "resume"]


def test_watchdog_runs_the_resume_command_when_the_source_is_killed(tmp_path):
    path, log = tmp_path / "guest", tmp_path / "log"
    path.write_bytes(b"x")
    code = """
from migrate.guests.file import FileGuest
guest = FileGuest(sys.argv[1], (), "true", f"echo resumed > {sys.argv[2]}")
await guest.make_ready()
await guest.pause()
"""
    with KillableProgram(code, path, log) as program:
        assert not log.exists()
        program.kill()
        wait_until(lambda: log.exists() and log.read_text() == "resumed\n")


@pytest.mark.asyncio
async def test_failed_pause_command_is_reported(tmp_path):
    path = tmp_path / "guest"
    path.write_bytes(b"x")
    guest = await asyncio.to_thread(FileGuest, str(path), (), "exit 7", "true")
    await guest.make_ready()
    with pytest.raises(MigrationError, match="--pause-cmd 'exit 7' failed with status 7"):
        await guest.pause()
    await guest.close()


def test_guest_file_behind_another_users_link_is_refused(tmp_path):
    """Its owner could have it lead to a file that belongs to root."""
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


def test_reopened_guest_has_only_the_very_processes_that_wrote_it(tmp_path):
    (tmp_path / "guest").write_bytes(b"x")
    with subprocess.Popen(["sleep", "60"]) as child:
        start_time = Process(child.pid).start_time
        for said, pids in ((start_time, (child.pid,)), (str(int(start_time) - 1), ()), ("", ())):
            facts = {"path": f"{tmp_path}/guest", "pids": [[child.pid, said]], "resume_cmd": ""}
            assert FileGuest.reopen(facts).pids == pids
        child.kill()


def test_paths_that_are_no_guest_file_are_refused(tmp_path):
    """To open a FIFO must not wait for a writer that never comes."""
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
def test_check_after_a_round_notices_a_changed_size(tmp_path, size):
    path = tmp_path / "guest"
    path.write_bytes(bytes(4096))
    guest = FileGuest(str(path))
    guest.check()
    os.truncate(path, size)
    with pytest.raises(MigrationError, match=f"it had 4096 bytes at the start and has {size} now"):
        guest.check()
    asyncio.run(guest.close())


def test_state_of_a_file_guest_is_its_mode_and_owner(tmp_path):
    path = tmp_path / "guest"
    path.write_bytes(b"x")
    path.chmod(0o4751)
    guest = FileGuest(str(path))
    assert Rights.unpack(guest.state()) == Rights(0o751, os.getuid(), os.getgid())
    asyncio.run(guest.close())


def runs(pid: int) -> bool:
    """Return whether a process runs for longer than a throttle stops it at a time."""
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        if thread_states(pid) & set("Tt"):
            return False
        time.sleep(0.002)
    return True


@pytest.mark.asyncio
async def test_throttle_stops_the_writer_again_and_again(writer):
    path, pid = writer
    guest = FileGuest(str(path), [pid])
    assert guest.can_throttle
    await guest.make_ready()
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
async def test_pause_ends_the_duty_cycle(writer, percent):
    path, pid = writer
    guest = FileGuest(str(path), [pid])
    await guest.make_ready()
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
async def test_cancelled_pause_leaves_the_writer_running(writer):
    path, pid = writer
    guest = FileGuest(str(path), [pid])
    await guest.make_ready()
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
await guest.make_ready()
await guest.throttle(99)
print(guest.watchdog_pid)
"""


def test_throttled_writer_runs_on_when_the_source_is_killed(writer):
    path, pid = writer
    with KillableProgram(SLOW_FILE, path, pid) as program:
        wait_until(lambda: thread_states(pid) == {"T"})
        program.kill()
        wait_until(lambda: runs(pid))
        wait_until(lambda: ended(int(program.said)))
        assert writes(path)


@pytest.mark.asyncio
async def test_throttled_writer_runs_on_when_the_watchdog_is_killed(writer):
    path, pid = writer
    guest = FileGuest(str(path), [pid])
    await guest.make_ready()
    await guest.throttle(99)
    await asyncio.to_thread(wait_until, lambda: thread_states(pid) == {"T"})
    os.kill(guest.watchdog_pid, signal.SIGKILL)
    await asyncio.to_thread(wait_until, lambda: ended(guest.watchdog_pid))
    with pytest.raises(MigrationError, match="watchdog"):
        await guest.throttle(99)
    assert await asyncio.to_thread(runs, pid)
    await guest.close()


@pytest.mark.asyncio
async def test_end_of_the_throttle_does_not_resume_a_relinquished_guest(writer):
    path, pid = writer
    guest = FileGuest(str(path), [pid])
    await guest.make_ready()
    await guest.throttle(50)
    await guest.pause()
    await guest.relinquish()
    os.kill(guest.watchdog_pid, signal.SIGKILL)
    await asyncio.to_thread(wait_until, lambda: ended(guest.watchdog_pid))
    await guest.throttle(0)
    for _ in range(30):
        assert thread_states(pid) == {"T"}
        await asyncio.sleep(0.002)
    await guest.close()


@pytest.mark.asyncio
async def test_writer_that_another_program_stopped_is_not_resumed(writer):
    path, pid = writer
    os.kill(pid, signal.SIGSTOP)
    await asyncio.to_thread(wait_until, lambda: thread_states(pid) == {"T"})
    guest = FileGuest(str(path), [pid])

    async def stays_stopped() -> None:
        for _ in range(30):
            assert thread_states(pid) == {"T"}
            await asyncio.sleep(0.002)

    await guest.make_ready()
    await guest.throttle(40)
    await stays_stopped()
    await guest.throttle(0)
    await guest.pause()
    await guest.relinquish()
    await guest.reclaim()
    await guest.resume()
    await stays_stopped()
    await guest.pause()
    await guest.close()  # as if the source had died
    await stays_stopped()
    os.kill(pid, signal.SIGCONT)


def test_guests_without_known_writers_cannot_throttle(tmp_path):
    path = tmp_path / "guest"
    path.write_bytes(b"x")
    assert not FileGuest(str(path)).can_throttle
    assert not FileGuest(str(path), (), "true", "true").can_throttle
    assert not BufferGuest(bytearray(10)).can_throttle
