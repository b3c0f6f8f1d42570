"""A handle on a process is never on a later one, and never says what it does not know."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from migrate.cli.program import Stop
from migrate.errors import MigrationError
from migrate.guests import process
from migrate.guests.file import FileGuest
from migrate.guests.process import Process
from tests import missing_calls
from tests.missing_calls import PIDFD_OPEN, PIDFD_SEND_SIGNAL
from tests.programs import Program, end_guest, guest_pid

needs_filter = pytest.mark.skipif(
    not missing_calls.SUPPORTED, reason="system calls are not filtered on this architecture"
)
ENDS_ITS_MAIN_THREAD = """
import ctypes, sys, threading, time
threading.Thread(target=lambda: time.sleep(60)).start()
print("ready", flush=True)
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[__import__("platform").machine()], 0)
"""


def refuse(error: int):
    def call(*_arguments):
        raise OSError(error, os.strerror(error))

    return call


@pytest.fixture(params=["pidfd", "no-pidfd", "no-signal", "forbidden"])
def kernel(request, monkeypatch):
    """What the kernel may lack."""
    if request.param == "no-pidfd":
        monkeypatch.setattr(os, "pidfd_open", refuse(errno.ENOSYS))
    elif request.param == "no-signal":
        monkeypatch.setattr(signal, "pidfd_send_signal", refuse(errno.ENOSYS))
    elif request.param == "forbidden":
        monkeypatch.setattr(os, "pidfd_open", refuse(errno.EPERM))
        monkeypatch.setattr(signal, "pidfd_send_signal", refuse(errno.EPERM))
    return request.param


@pytest.fixture
def sleeper():
    child = subprocess.Popen(["sleep", "60"])
    yield child
    child.kill()
    child.wait()


@pytest.mark.asyncio
async def test_it_signals_and_waits(kernel, sleeper):
    handle = Process(sleeper.pid)
    assert not handle.ended()
    handle.signal(signal.SIGSTOP)
    while process.state(sleeper.pid) != "T":
        await asyncio.sleep(0.001)
    assert process.stands_still(sleeper.pid)
    handle.signal(signal.SIGKILL)
    async with asyncio.timeout(20):
        await handle.wait()  # it is a zombie then
    assert handle.ended()
    await asyncio.to_thread(sleeper.wait)
    with pytest.raises(ProcessLookupError):
        handle.signal(signal.SIGTERM)
    handle.close()
    with pytest.raises(ProcessLookupError):
        Process(sleeper.pid, handle.born)


def test_another_process_with_its_number_is_not_signalled(kernel, sleeper, monkeypatch):
    handle = Process(sleeper.pid)
    with pytest.raises(ProcessLookupError):
        Process(sleeper.pid, str(int(handle.born) - 1))
    if kernel in ("no-pidfd", "forbidden"):
        # the number is another's now: it began later
        monkeypatch.setattr(process, "start_time", lambda _pid: str(int(handle.born) + 1))
        assert handle.ended()
        with pytest.raises(ProcessLookupError):
            handle.signal(signal.SIGTERM)
        assert sleeper.poll() is None
    handle.close()


@pytest.mark.parametrize("pid", [0, -1, 1 << 40])
def test_what_is_no_process_is_none(kernel, pid):
    """0 and -1 would be groups of processes, ours among them."""
    with pytest.raises(ProcessLookupError):
        Process(pid)


def test_what_cannot_be_told_from_a_later_one_is_refused(sleeper, monkeypatch):
    monkeypatch.setattr(os, "pidfd_open", refuse(errno.ENOSYS))
    monkeypatch.setattr(process, "_stat", lambda _path: [])
    with pytest.raises(MigrationError, match="cannot be told from a later one"):
        Process(sleeper.pid)


def test_a_process_that_proc_hides_is_not_said_to_have_stopped(sleeper, monkeypatch):
    monkeypatch.setattr(process, "task_states", lambda _pid: set())
    with pytest.raises(MigrationError, match="whether it has stopped cannot be seen"):
        process.stands_still(sleeper.pid)


def test_a_process_goes_on_without_its_main_thread(kernel):
    with subprocess.Popen(
        [sys.executable, "-c", ENDS_ITS_MAIN_THREAD], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"ready\n"
        while process.state(child.pid) != "Z":
            time.sleep(0.001)
        handle = Process(child.pid)
        assert not handle.ended()
        assert not process.stands_still(child.pid)
        handle.signal(signal.SIGKILL)
        child.wait()
        assert handle.ended()
        handle.close()


def test_a_frozen_process_stands_still(sleeper, tmp_path, monkeypatch):
    """By the freezer of either version of cgroups."""
    proc = tmp_path / "cgroup"
    monkeypatch.setattr(process, "FREEZER", str(tmp_path))
    real = open

    def opened(path, *arguments, **more):
        return real(proc if str(path).endswith("/cgroup") else path, *arguments, **more)

    monkeypatch.setattr("builtins.open", opened)
    for lines, file, word in (
        ("0::/a\n", "a/cgroup.events", "populated 1\nfrozen {}\n"),
        ("4:cpu:/b\n7:freezer:/b\n", "freezer/b/freezer.state", "{}\n"),
    ):
        proc.write_text(lines)
        assert not process.stands_still(sleeper.pid)
        (tmp_path / file).parent.mkdir(parents=True)
        for running, frozen in (("0", "1"), ("THAWED", "FROZEN")):
            (tmp_path / file).write_text(word.format(running))
            assert not process.stands_still(sleeper.pid)
            (tmp_path / file).write_text(word.format(frozen))
            if process.stands_still(sleeper.pid):
                break
        else:
            pytest.fail(f"{file} says nothing")


@pytest.mark.asyncio
async def test_a_program_stays_until_its_guest_ends(kernel, sleeper):
    """Without pidfd too: as process 1 of a container it would take its guest with it."""
    staying = asyncio.create_task(Stop().stay(sleeper.pid, process.start_time(sleeper.pid)))
    await asyncio.sleep(0.3)
    assert not staying.done()
    sleeper.terminate()
    async with asyncio.timeout(20):
        await staying


@pytest.mark.asyncio
async def test_a_program_that_is_told_to_end_ends_its_guest(kernel, sleeper):
    stop = Stop()
    staying = asyncio.create_task(stop.stay(sleeper.pid, process.start_time(sleeper.pid)))
    await asyncio.sleep(0.1)
    stop.request()
    async with asyncio.timeout(20):
        await staying
    assert await asyncio.to_thread(sleeper.wait) == -signal.SIGTERM


@needs_filter
@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_migrate_dst_stays_where_the_kernel_has_no_pidfd(tmp_path, error, monkeypatch):
    program = Program.__new__(Program)
    numbers = f"{PIDFD_SEND_SIGNAL},{PIDFD_OPEN}"
    bin_ = Path(sys.executable).parent
    program.process = subprocess.Popen(
        [
            sys.executable, missing_calls.__file__, str(error), numbers, bin_ / "migrate-dst",
            "--stay", "--retry", "0", "--listen", "127.0.0.1:0",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    program.out = program.err = ""
    address = program.read_line(r"listening on (\S+)")[1]
    assert Program("migrate-src", "--guest", "demo:1m", address).wait() == 0
    pid = guest_pid(program.process.stdout.readline())
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            program.process.wait(1)
        program.kill(signal.SIGTERM)
        program.wait()
        assert process.state(pid) in ("", "Z")  # it ends with it
    finally:
        end_guest(pid)


@needs_filter
@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_a_writer_is_slowed_where_the_kernel_has_no_pidfd(tmp_path, error):
    """What is said to be slowed is."""
    path = tmp_path / "guest"
    path.write_bytes(b"x")
    code = f"""
import asyncio, subprocess, sys
from tests.missing_calls import forbid
forbid({error}, [{PIDFD_SEND_SIGNAL}, {PIDFD_OPEN}])
from migrate.guests.file import FileGuest
from migrate.guests.process import state
async def main():
    child = subprocess.Popen(["sleep", "60"])
    guest = FileGuest(sys.argv[1], [child.pid])
    await guest.started()
    await guest.throttle(90)
    async with asyncio.timeout(20):
        for wanted in "TSTS":
            while state(child.pid) != wanted:
                await asyncio.sleep(0.001)
    await guest.pause()
    assert state(child.pid) == "T"
    await guest.resume()
    while state(child.pid) != "S":
        await asyncio.sleep(0.001)
    await guest.close()
    child.kill()
    print("slowed")
asyncio.run(main())
"""
    found = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=False,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert found.stdout == "slowed\n", found.stderr


@pytest.mark.asyncio
async def test_nothing_is_said_to_be_slowed_where_all_have_ended(tmp_path, sleeper):
    from migrate.brake import Brake
    from migrate.rounds import Limits
    from migrate.throttle import Look, Throttle

    path = tmp_path / "guest"
    path.write_bytes(b"x")
    guest = FileGuest(str(path), [sleeper.pid])
    await guest.started()
    sleeper.kill()
    await asyncio.to_thread(sleeper.wait)
    said: list[str] = []
    brake = Brake(guest, said.append)
    look = Look(expected=9.0, seconds=9.0, sent_bytes=1.0, dirtied_bytes=9.0, dirtied_seconds=9.0)
    for _ in range(6):
        await brake.apply(True, Throttle(), Limits(), look)
        assert brake.percentage == 0
    assert said == ["auto-converge: the guest's processes have ended: nothing is slowed"]
    await guest.close()


def test_a_thread_may_be_waited_for_while_it_runs():
    """The states of threads that come and go meanwhile."""
    threads = [threading.Thread(target=time.sleep, args=(0.05,)) for _ in range(20)]
    for thread in threads:
        thread.start()
    assert process.task_states(os.getpid()) - process.ENDED
    for thread in threads:
        thread.join()
