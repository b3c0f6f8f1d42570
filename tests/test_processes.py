"""A handle names one process, never a later one with its number."""

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

from migrate.cli.stop import StopRequests
from migrate.errors import MigrationError
from migrate.guests.file import FileGuest
from migrate.runtime import processes
from migrate.runtime.processes import Process
from tests import missing_calls
from tests.missing_calls import PIDFD_OPEN, PIDFD_SEND_SIGNAL
from tests.programs import Program, end_guest, guest_pid

pytestmark = pytest.mark.programs

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
    """Simulate what the kernel may lack."""
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
async def test_signal_and_wait(kernel, sleeper):
    handle = Process(sleeper.pid)
    assert not handle.ended()
    handle.signal(signal.SIGSTOP)
    while processes.state(sleeper.pid) != "T":
        await asyncio.sleep(0.001)
    assert processes.is_stopped(sleeper.pid)
    handle.signal(signal.SIGKILL)
    async with asyncio.timeout(20):
        await handle.wait()  # it is a zombie then
    assert handle.ended()
    await asyncio.to_thread(sleeper.wait)
    with pytest.raises(ProcessLookupError):
        handle.signal(signal.SIGTERM)
    handle.close()
    with pytest.raises(ProcessLookupError):
        Process(sleeper.pid, handle.start_time)


def test_later_process_with_the_same_number_is_not_signalled(kernel, sleeper, monkeypatch):
    handle = Process(sleeper.pid)
    with pytest.raises(ProcessLookupError):
        Process(sleeper.pid, str(int(handle.start_time) - 1))
    if kernel in ("no-pidfd", "forbidden"):
        # another process has the number now: it started later
        monkeypatch.setattr(
            processes, "start_time_of", lambda _pid: str(int(handle.start_time) + 1)
        )
        assert handle.ended()
        with pytest.raises(ProcessLookupError):
            handle.signal(signal.SIGTERM)
        assert sleeper.poll() is None
    handle.close()


@pytest.mark.parametrize("pid", [0, -1, 1 << 40])
def test_number_that_names_no_process_is_refused(kernel, pid):
    """0 and -1 would name groups of processes, our own among them."""
    with pytest.raises(ProcessLookupError):
        Process(pid)


def test_process_without_pidfd_and_start_time_is_refused(sleeper, monkeypatch):
    monkeypatch.setattr(os, "pidfd_open", refuse(errno.ENOSYS))
    monkeypatch.setattr(processes, "start_time_of", lambda _pid: "")
    with pytest.raises(MigrationError, match="cannot be told from a later one"):
        Process(sleeper.pid)


def test_hidden_process_is_not_reported_as_stopped(sleeper, monkeypatch):
    monkeypatch.setattr(processes, "task_states", lambda _pid: set())
    with pytest.raises(MigrationError, match="whether it has stopped cannot be seen"):
        processes.is_stopped(sleeper.pid)


def test_process_without_its_main_thread_has_not_ended(kernel):
    with subprocess.Popen(
        [sys.executable, "-c", ENDS_ITS_MAIN_THREAD], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"ready\n"
        while processes.state(child.pid) != "Z":
            time.sleep(0.001)
        handle = Process(child.pid)
        assert not handle.ended()
        assert not processes.is_stopped(child.pid)
        handle.signal(signal.SIGKILL)
        child.wait()
        assert handle.ended()
        handle.close()


def test_frozen_process_is_stopped(sleeper, tmp_path, monkeypatch):
    """The freezer may belong to either version of cgroups."""
    proc = tmp_path / "cgroup"
    monkeypatch.setattr(processes, "FREEZER", str(tmp_path))
    real = processes.proc_lines

    def lines_of(path):
        return real(str(proc) if path.endswith("/cgroup") else path)

    monkeypatch.setattr(processes, "proc_lines", lines_of)
    for lines, file, word in (
        ("0::/a\n", "a/cgroup.events", "populated 1\nfrozen {}\n"),
        ("4:cpu:/b\n7:freezer:/b\n", "freezer/b/freezer.state", "{}\n"),
    ):
        proc.write_text(lines)
        assert not processes.is_stopped(sleeper.pid)
        (tmp_path / file).parent.mkdir(parents=True)
        for running, frozen in (("0", "1"), ("THAWED", "FROZEN")):
            (tmp_path / file).write_text(word.format(running))
            assert not processes.is_stopped(sleeper.pid)
            (tmp_path / file).write_text(word.format(frozen))
            if processes.is_stopped(sleeper.pid):
                break
        else:
            pytest.fail(f"{file} says nothing")


@pytest.mark.asyncio
async def test_program_stays_until_its_guest_ends(kernel, sleeper):
    """As process 1 of a container, a program that ends takes its guest with it."""
    staying = asyncio.create_task(
        StopRequests().stay(sleeper.pid, processes.start_time_of(sleeper.pid))
    )
    await asyncio.sleep(0.3)
    assert not staying.done()
    sleeper.terminate()
    async with asyncio.timeout(20):
        await staying


@pytest.mark.asyncio
async def test_terminated_program_ends_its_guest(kernel, sleeper):
    stop = StopRequests()
    staying = asyncio.create_task(stop.stay(sleeper.pid, processes.start_time_of(sleeper.pid)))
    await asyncio.sleep(0.1)
    stop.request()
    async with asyncio.timeout(20):
        await staying
    assert await asyncio.to_thread(sleeper.wait) == -signal.SIGTERM


@needs_filter
@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_migrate_dst_stays_without_pidfd(tmp_path, error, monkeypatch):
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
        assert processes.state(pid) in ("", "Z")  # it ended with the program
    finally:
        end_guest(pid)


@needs_filter
@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_writer_is_throttled_without_pidfd(tmp_path, error):
    path = tmp_path / "guest"
    path.write_bytes(b"x")
    code = f"""
import asyncio, subprocess, sys
from tests.missing_calls import forbid
forbid({error}, [{PIDFD_SEND_SIGNAL}, {PIDFD_OPEN}])
from migrate.guests.file import FileGuest
from migrate.runtime.processes import state
async def main():
    child = subprocess.Popen(["sleep", "60"])
    guest = FileGuest(sys.argv[1], [child.pid])
    await guest.make_ready()
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
async def test_throttling_is_zero_once_all_writers_have_ended(tmp_path, sleeper):
    from migrate.policy.downtime import Limits
    from migrate.policy.throttle import RoundLoad, ThrottleParameters
    from migrate.source.throttling import Throttling

    path = tmp_path / "guest"
    path.write_bytes(b"x")
    guest = FileGuest(str(path), [sleeper.pid])
    await guest.make_ready()
    sleeper.kill()
    await asyncio.to_thread(sleeper.wait)
    said: list[str] = []
    throttling = Throttling(guest, said.append)
    look = RoundLoad(
        expected=9.0, seconds=9.0, sent_bytes=1.0, dirtied_bytes=9.0, dirtied_seconds=9.0
    )
    for _ in range(6):
        await throttling.apply(True, ThrottleParameters(), Limits(), look)
        assert throttling.percentage == 0
    assert said == ["auto-converge: the guest's processes have ended: nothing is slowed"]
    await guest.close()


def test_task_states_while_threads_end():
    threads = [threading.Thread(target=time.sleep, args=(0.05,)) for _ in range(20)]
    for thread in threads:
        thread.start()
    assert processes.task_states(os.getpid()) - processes.ENDED
    for thread in threads:
        thread.join()
