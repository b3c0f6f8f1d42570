"""Who can write a file guest is found, by inode, whatever it is called and whoever has it open."""

import asyncio
import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migrate.errors import MigrationError, UsageError
from migrate.guests import file as file_module
from migrate.guests import process, survey, writers
from migrate.guests.file import FileGuest
from migrate.guests.writers import Census
from tests.programs import Program, destination
from tests.test_guests import Mover, wait_until

ROOT = Path(__file__).parent.parent
PATIENCE = 20.0


# mmap.mmap keeps a descriptor of its own; `mapped` leaves nothing but the mapping.
PROLOGUE = """
import ctypes, mmap, os, sys, threading, time
path = sys.argv[1]
def mapped(flags, kind=mmap.MAP_SHARED, access=mmap.PROT_READ):
    libc, fd = ctypes.CDLL(None), os.open(path, flags)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    assert libc.mmap(None, 65536, access, kind, fd, 0) not in (None, (1 << 64) - 1)
    os.close(fd)
"""
BOTH = "access=mmap.PROT_READ | mmap.PROT_WRITE"


class Child:
    """A Python program that has run `code` and waits; `path` is its first argument."""

    def __init__(self, code: str, *arguments: object, wrapper: tuple[str, ...] = ()) -> None:
        program = f"{PROLOGUE}{code}\nprint('ready', flush=True)\ntime.sleep(90)"
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-c", program, *map(str, arguments)], text=True,
            stdout=subprocess.PIPE, stdin=subprocess.PIPE,
        )  # fmt: skip
        self.said: list[int] = []
        while (line := self.process.stdout.readline()) != "ready\n":
            assert line, "the child has failed"
            self.said.append(int(line))

    @property
    def pid(self) -> int:
        return self.process.pid

    def close(self) -> None:
        for pid in filter(None, (*self.said, self.pid)):  # 0 would be our own group
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        self.process.stdin.close()


@pytest.fixture
def child():
    children: list[Child] = []

    def start(*arguments, **more) -> Child:
        children.append(Child(*arguments, **more))
        return children[-1]

    yield start
    for one in children:
        one.close()


@pytest.fixture
def path():
    path = Path(f"/dev/shm/xbmigrate-writers-{os.getpid()}-{random.randrange(1 << 30)}")
    path.write_bytes(bytes(1 << 16))
    yield path
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


@pytest.fixture
def census(path):
    fd = os.open(path, os.O_RDONLY)
    yield Census(fd)
    os.close(fd)


def pids(found) -> set[int]:
    return {writer.pid for writer in found}


OWN_TABLE = """
def other():
    assert ctypes.CDLL(None).unshare(0x400) == 0
    os.open(path, os.O_RDWR)
    told.set()
    time.sleep(90)
told = threading.Event()
threading.Thread(target=other, daemon=True).start()
told.wait()
# the same number in the main thread's table is another file
while os.open('/dev/null', os.O_RDONLY) < 20: pass
"""
NO_MAIN_THREAD = """
mapped(os.O_RDWR, access=mmap.PROT_READ | mmap.PROT_WRITE)
def go_on():
    end = lambda: open(f'/proc/{os.getpid()}/stat').read().rpartition(')')[2].split()[0] == 'Z'
    while not end(): time.sleep(0.001)
    os.closerange(3, 50)
    print('ready', flush=True)
    time.sleep(90)
threading.Thread(target=go_on).start()
ctypes.CDLL(None).syscall({'x86_64': 60, 'aarch64': 93}[__import__('platform').machine()], 0)
"""
FORKS = """
os.open(path, os.O_RDWR)
child = os.fork()
if not child: time.sleep(90)
print(child, flush=True)
"""


@pytest.mark.parametrize(
    ("code", "writes"),
    [
        pytest.param("os.open(path, os.O_RDWR)", True, id="open"),
        pytest.param("os.open(path, os.O_WRONLY | os.O_APPEND)", True, id="append"),
        pytest.param("os.open(path, os.O_RDONLY)", False, id="reader"),
        pytest.param("os.open(path, os.O_PATH)", False, id="path-only"),
        pytest.param(f"mapped(os.O_RDWR, {BOTH})", True, id="mapped"),
        pytest.param("mapped(os.O_RDWR)", True, id="mapped-and-may-be-made-writable"),
        pytest.param("mapped(os.O_RDONLY)", False, id="mapped-by-a-reader"),
        pytest.param(f"mapped(os.O_RDWR, mmap.MAP_PRIVATE, {BOTH})", False, id="private"),
        pytest.param("os.link(path, path + '.l'); os.open(path + '.l', os.O_RDWR); "
                     "os.unlink(path + '.l')", True, id="another-name-that-is-gone"),
        pytest.param("os.symlink(path, path + '.s'); os.open(path + '.s', os.O_RDWR); "
                     "os.unlink(path + '.s')", True, id="symlink"),
        pytest.param(OWN_TABLE, True, id="thread-with-its-own-files"),
        pytest.param(NO_MAIN_THREAD, True, id="without-its-main-thread"),
    ],
)  # fmt: skip
def test_who_can_write_is_found(path, census, child, code, writes):
    one = child(code, path)
    found = [writer for writer in census.look() if writer.pid == one.pid]
    assert bool(found) is writes
    assert not found or found[0].name.startswith("python")
    assert (one.pid in pids(census.look())) is writes  # also from what is known
    assert (one.pid in pids(census.look_at_new())) is writes


def test_children_are_found(path, census, child):
    one = child(FORKS, path)
    assert {one.pid, *one.said} <= pids(census.look())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_writer_in_a_mount_namespace_with_another_name_is_found(path, census, child, tmp_path):
    there = tmp_path / "bound"
    there.touch()
    entering = f'mount --bind {path} {there} && exec "$@"'
    one = child(
        "os.open(path, os.O_RDWR)", there,
        wrapper=("unshare", "--mount", "sh", "-c", entering, "sh"),
    )  # fmt: skip
    assert not there.stat().st_size, "it is mounted here too"
    assert one.pid in pids(census.look())


def test_this_program_is_no_writer(path, census):
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert os.getpid() not in pids(census.look())
        assert writers.opened_here(census.target)
        assert writers.open_for_writing(census.target.fd) is True
    assert not writers.opened_here(census.target)
    assert writers.open_for_writing(census.target.fd) is False


def test_a_file_on_its_way_in_a_socket_is_counted_by_the_kernel(path, census):
    """No /proc shows it."""
    one, other = socket.socketpair()
    with one, other:
        fd = os.open(path, os.O_RDWR)
        socket.send_fds(one, [b"x"], [fd])
        os.close(fd)
        assert not writers.opened_here(census.target)
        assert writers.open_for_writing(census.target.fd) is True
    assert writers.open_for_writing(census.target.fd) is False


def test_nothing_is_known_of_who_has_a_device_open():
    fd = os.open("/dev/null", os.O_RDONLY)
    assert writers.open_for_writing(fd) is None
    os.close(fd)


def test_a_later_look_notices_what_is_opened_closed_and_mapped(path, census, child):
    one = child(
        "print(os.getpid(), flush=True)\nprint('ready', flush=True)\n"
        "for line in sys.stdin: exec(line); print('ready', flush=True)\n", path
    )  # fmt: skip

    def do(code: str) -> None:
        one.process.stdin.write(code + "\n")
        one.process.stdin.flush()
        assert one.process.stdout.readline() == "ready\n"

    assert one.pid not in pids(census.look())
    for begins, ends in (
        ("fd = os.open(path, os.O_RDWR)", "os.close(fd)"),
        ("fd = os.open(path, os.O_RDWR); m = mmap.mmap(fd, 0); os.close(fd)", "m.close()"),
    ):
        do(begins)
        assert one.pid not in pids(census.look_at_new())  # it was there before
        assert one.pid in pids(census.look())
        assert one.pid in pids(census.look_at_new())
        do(ends)
        assert one.pid not in pids(census.look_at_new())
        assert one.pid in pids(census.look_at_new({one.pid}))  # it is known to stand still
        assert one.pid not in pids(census.look())
    do("mapped(os.O_RDWR)")  # no descriptor tells of it
    assert one.pid in pids(census.look())


def test_a_short_look_sees_new_processes_and_new_ones_with_old_numbers(path, census, child):
    census.look()
    one = child("os.open(path, os.O_RDWR)", path)
    assert one.pid in pids(census.look_at_new())
    census.look()
    # as if it were another that had the number when all were looked at
    census._known[one.pid] = writers._Seen(inode=1)
    assert one.pid in pids(census.look_at_new())


def test_a_look_that_nobody_waits_for_ends(census):
    census.look()
    known = census._known
    assert census.look(lambda: True) == []
    assert census._known is known


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_what_may_not_be_looked_into_is_counted(path, census, child):
    one = child("os.open(path, os.O_RDWR)", path)
    code = """
import os, sys
from migrate.guests.writers import Census
fd = os.open(sys.argv[1], os.O_RDONLY)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
census = Census(fd)
found = census.look()
print(len(found), census.unseen > 0, census._known[int(sys.argv[2])].hidden)
"""
    path.chmod(0o644)
    found = subprocess.run([sys.executable, "-c", code, path, str(one.pid)], text=True,
                           capture_output=True, cwd=ROOT, check=False)  # fmt: skip
    assert found.stdout == "0 True True\n", found.stderr


def test_names_are_escaped_and_counted():
    many = [writers.Writer(pid, "1", "x") for pid in range(7)]
    assert writers.named(many[:1]) == "process 0 (x)"
    assert writers.named(many) == "processes 0 (x), 1 (x), 2 (x), 3 (x), 4 (x) and 2 more"
    assert writers.printable(b"a\x1b[2J\xff\n\xc3\xa4") == r"a\x1b[2J\xff\n" + "\u00e4"


# ---------------------------------------------------------------- the kernel as a writer


@pytest.fixture
def loop_device():
    made = []

    def attach(path, *options: str) -> str:
        done = subprocess.run(["losetup", "-f", "--show", *options, str(path)], text=True,
                              capture_output=True, check=False)  # fmt: skip
        if done.returncode:
            pytest.skip(f"no loop device can be had: {done.stderr.strip()}")
        made.append(done.stdout.strip())
        return made[-1]

    yield attach
    for one in made:
        subprocess.run(["umount", one], check=False, capture_output=True)
        subprocess.run(["losetup", "-d", one], check=False)


def test_the_file_behind_a_loop_device_is_refused(path, loop_device):
    read_only = loop_device(path, "--read-only")
    FileGuest(str(path)).survey()
    subprocess.run(["losetup", "-d", read_only], check=True)
    device = loop_device(path)
    for more in ({}, {"auto": True}):
        with pytest.raises(UsageError, match=f"the loop device {device} writes it"):
            FileGuest(str(path), **more).survey()
    guest = FileGuest(str(path), (), "true", "true")
    guest.survey()
    assert any(device in notice for notice in guest.notices)


def test_a_mounted_device_and_its_openers_are_refused(path, loop_device, child, tmp_path):
    with path.open("r+b") as file:
        file.truncate(8 << 20)
    device = loop_device(path)
    FileGuest(device).survey()
    node = tmp_path / "node"
    os.mknod(node, 0o600 | 0o060000, os.stat(device).st_rdev)
    one = child("os.open(path, os.O_RDWR)", node)
    with pytest.raises(UsageError, match=rf"process {one.pid} \(python"):
        FileGuest(device).survey()
    one.close()
    if not shutil.which("mkfs.ext4"):
        pytest.skip("there is no mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    (tmp_path / "mounted").mkdir()
    subprocess.run(["mount", device, tmp_path / "mounted"], check=True)
    with pytest.raises(UsageError, match=f"the file system at {tmp_path}/mounted writes it"):
        FileGuest(device, auto=True).survey()
    subprocess.run(["mount", "-o", "remount,ro", device, tmp_path / "mounted"], check=True)
    FileGuest(device).survey()


# ---------------------------------------------------------------- before it begins


def test_unnamed_writers_are_refused_before_anything_is_sent(path, child):
    one = child(FORKS, path)
    with pytest.raises(UsageError, match="would go on writing a copy") as error:
        FileGuest(str(path)).survey()
    for pid in (one.pid, *one.said):
        assert f"{pid} (python" in str(error.value)
    with pytest.raises(UsageError, match="name each with --pid, or all of them with") as error:
        FileGuest(str(path), [one.pid]).survey()
    assert str(one.said[0]) in str(error.value)
    FileGuest(str(path), [one.pid, *one.said]).survey()
    guest = FileGuest(str(path), [one.pid], auto=True)
    guest.survey()
    assert set(guest.pids) == {one.pid, *one.said}
    guest = FileGuest(str(path), (), "true", "true")
    guest.survey()
    assert f"{one.pid} (python" in guest.notices[0]
    assert not guest.warnings


def test_a_writer_that_stands_still_is_not_refused(path, child):
    one = child("os.open(path, os.O_RDWR)", path)
    os.kill(one.pid, signal.SIGSTOP)
    wait_until(lambda: process.stands_still(one.pid))
    FileGuest(str(path)).survey()


def test_what_cannot_be_stopped_is_said_at_once(path, child, monkeypatch):
    threaded = child("threading.Thread(target=time.sleep, args=(90,), daemon=True).start()", path)
    thread = max(int(task) for task in os.listdir(f"/proc/{threaded.pid}/task"))
    for pid, words in (
        (1, "the kernel lets nobody here stop process 1"),
        (thread, f"that is a thread of process {threaded.pid}"),
        (os.getpid(), "that is migrate-src itself"),
        (0, "there is no such process"),
    ):
        with pytest.raises(UsageError, match=words):
            FileGuest(str(path), [pid])
    kernel = [int(name) for name in os.listdir("/proc") if name.isdecimal()
              and process.is_kernel_thread(int(name))]  # fmt: skip
    for pid in kernel[:1]:  # a container shows none
        with pytest.raises(UsageError, match="a thread of the kernel, which no signal stops"):
            FileGuest(str(path), [pid])
    monkeypatch.setattr(survey, "task_states", lambda _pid: set())
    with pytest.raises(UsageError, match="/proc does not show it"):
        FileGuest(str(path), [threaded.pid])
    monkeypatch.setattr(writers.os, "readlink", lambda _path: "1")
    with pytest.raises(UsageError, match="PID namespace: whether a process has stopped"):
        FileGuest(str(path), auto=True).survey()
    guest = FileGuest(str(path))
    guest.survey()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may drop a capability")
def test_that_a_process_may_not_be_stopped_is_said_before_it_is_connected(path, child):
    one = child("os.open(path, os.O_RDWR)\nos.setuid(65534)", path)
    bin_ = Path(sys.executable).parent
    for pid in (str(one.pid), "auto"):
        found = subprocess.run(
            ["setpriv", "--bounding-set=-kill", "--inh-caps=-kill", str(bin_ / "migrate-src"),
             "--guest", f"file:{path}", "--pid", pid, "unix:/nowhere"],
            text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert found.returncode == 2
        assert "it cannot be stopped: Operation not permitted: it belongs to user 65534" in (
            found.stderr
        )
        assert str(one.pid) in found.stderr
        assert "connecting" not in found.stderr


def test_who_has_started_migrate_src_is_not_stopped_by_auto(path):
    """A shell that has it open waits for us: stopped, it would wait for ever."""
    bin_ = Path(sys.executable).parent
    move = f"{bin_}/migrate-src --guest file:{path} --pid auto unix:/nowhere"
    command = f"exec 3<>{path}; {move} 3>&-; exit $?"
    found = subprocess.run(["bash", "-c", command], text=True, capture_output=True, check=False)
    assert found.returncode == 2
    assert "which has started migrate-src, can write the guest itself" in found.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.asyncio
async def test_auto_stops_nobody_who_may_have_been_handed_the_guest(path, child):
    """The owner of a file can send an open descriptor of it to any service."""
    os.chown(path, 65534, 65534)
    owners = child("os.open(path, os.O_RDWR)\nos.setuid(65534)", path)
    service = child("os.open(path, os.O_RDWR)\nos.setuid(65533)", path)
    says = rf"process {service.pid} .* belongs to user 65533.* say --pid {service.pid} too"
    with pytest.raises(UsageError, match=says):
        FileGuest(str(path), auto=True).survey()
    guest = await surveyed(path, [service.pid], auto=True)
    assert set(guest.pids) == {owners.pid, service.pid}
    late = child("os.open(path, os.O_RDWR)", path)
    with pytest.raises(MigrationError, match=f"process {late.pid} .* belongs to user 0"):
        await guest.pause()
    assert process.state(late.pid) == "S"
    await asyncio.to_thread(late.close)
    await guest.resume()
    await guest.pause()
    assert not await guest.check_writers()
    await guest.close()


def test_a_writer_that_ends_while_it_is_looked_at_is_none(path, monkeypatch, child):
    one = child("os.open(path, os.O_RDWR)", path)
    real = Census.look_at_new

    def look_at_new(self, *arguments):
        one.close()
        return real(self, *arguments)

    monkeypatch.setattr(Census, "look_at_new", look_at_new)
    guest = FileGuest(str(path), auto=True)
    guest.survey()
    assert guest.pids == ()


def test_what_only_the_kernel_knows_of_is_refused_or_said(path):
    one, other = socket.socketpair()
    with one, other:
        fd = os.open(path, os.O_RDWR)
        socket.send_fds(one, [b"x"], [fd])
        os.close(fd)
        with pytest.raises(UsageError, match="something has it open for writing that is not to be"):
            FileGuest(str(path)).survey()
        for options in ({"auto": True}, {"pause_cmd": "true", "resume_cmd": "true"}):
            guest = FileGuest(str(path), **options)
            guest.survey()
            assert "open for writing that no process shows" in guest.warnings[0]
    guest = FileGuest(str(path), auto=True)
    guest.survey()
    assert not guest.warnings


def test_what_is_not_seen_is_said_with_a_count(path, monkeypatch, child):
    one = child("os.open(path, os.O_RDWR)", path)
    real = Census.look

    def look(self, *arguments):
        found = real(self, *arguments)
        self.unseen = 12
        return found

    monkeypatch.setattr(Census, "look", look)
    guest = FileGuest(str(path), [one.pid])
    guest.survey()
    assert guest.warnings[0].startswith("12 processes of other users may not be looked into")
    one.close()
    # where nothing writes it the kernel says so
    guest = FileGuest(str(path))
    guest.survey()
    assert not guest.warnings


# ---------------------------------------------------------------- in the pause

SPAWNS = """
os.open(path, os.O_RDWR)
def fork():
    sys.stdin.readline()
    child = os.fork()
    if not child: time.sleep(90)
    print(child, flush=True)
threading.Thread(target=fork, daemon=True).start()
"""


def forked(one: Child) -> int:
    one.process.stdin.write("\n")
    one.process.stdin.flush()
    one.said.append(int(one.process.stdout.readline()))
    return one.said[-1]


async def surveyed(path: Path, *arguments, **more) -> FileGuest:
    guest = FileGuest(str(path), *arguments, **more)
    guest.survey()
    await guest.started()
    return guest


@pytest.mark.asyncio
async def test_auto_stops_those_that_have_appeared(path, child):
    one = child(SPAWNS, path)
    guest = await surveyed(path, auto=True)
    assert guest.pids == (one.pid,)
    new = forked(one)
    opened = child("os.open(path, os.O_RDWR)", path)
    await guest.pause()
    assert {process.state(pid) for pid in (one.pid, new, opened.pid)} == {"T"}
    assert not await guest.check_writers()
    assert {tuple(fact) for fact in guest.facts()["pids"]} == {
        (pid, process.start_time(pid)) for pid in (one.pid, new, opened.pid)
    }
    await guest.resume()
    for pid in (one.pid, new, opened.pid):
        await asyncio.to_thread(wait_until, lambda: process.state(pid) == "S")  # noqa: B023
    await guest.pause()
    await guest.give_up()
    await guest.close()
    assert {process.state(pid) for pid in (one.pid, new, opened.pid)} == {"T"}


@pytest.mark.asyncio
async def test_those_that_have_appeared_are_refused_where_others_are_named(path, child):
    one = child(SPAWNS, path)
    guest = await surveyed(path, [one.pid])
    new = forked(one)
    with pytest.raises(MigrationError, match=rf"process {new} \(python.* can write it too"):
        await guest.pause()
    await guest.resume()
    await asyncio.to_thread(wait_until, lambda: process.state(one.pid) == "S")
    await guest.close()


@pytest.mark.asyncio
async def test_one_that_opens_it_where_nothing_is_stopped_is_refused(path, child):
    guest = await surveyed(path)
    one = child("os.open(path, os.O_RDWR)", path)
    with pytest.raises(MigrationError, match=rf"process {one.pid} .*would go on writing"):
        await guest.pause()
    await asyncio.to_thread(one.close)
    await guest.resume()
    await guest.pause()
    assert not await guest.check_writers()
    await guest.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("auto", [True, False])
async def test_one_that_opens_it_in_the_pause_is_found_before_the_hand_over(path, child, auto):
    """Whoever is there already, and was no writer: the long look finds it."""
    code = "print(os.getpid(), flush=True)\nprint('ready', flush=True)\nsys.stdin.readline()\n"
    idle = child(code + "os.open(path, os.O_RDWR)", path)
    one = child("os.open(path, os.O_RDWR)", path)
    guest = await surveyed(path, () if auto else [one.pid], auto=auto)
    await guest._watch_no_more()
    real = guest._lookout.look

    async def look():
        guest._lookout.look = real
        idle.process.stdin.write("\n")
        idle.process.stdin.flush()
        assert await asyncio.to_thread(idle.process.stdout.readline) == "ready\n"
        return await real()

    guest._lookout.look = look
    await guest.pause()
    if auto:
        assert await guest.check_writers()
        assert process.state(idle.pid) == "T"
    else:
        with pytest.raises(MigrationError, match=f"process {idle.pid} "):
            await guest.check_writers()
    await guest.resume()
    await asyncio.to_thread(wait_until, lambda: process.state(idle.pid) == "S")
    await guest.close()


@pytest.mark.asyncio
async def test_who_runs_on_after_the_command_is_warned_of(path, child):
    """It cannot be told from one that keeps still by itself."""
    one = child("os.open(path, os.O_RDWR)", path)
    guest = await surveyed(path, (), "true", "true")
    said: list[str] = []
    guest.warn = said.append
    await guest.pause()
    assert not await guest.check_writers()
    assert len(said) == 1
    assert f"process {one.pid} (python" in said[0]
    assert "still running after --pause-cmd" in said[0]
    await guest.resume()
    await guest.close()
    stopping = f"kill -STOP {one.pid}"
    guest = await surveyed(path, (), stopping, f"kill -CONT {one.pid}")
    guest.warn = said.append
    await guest.pause()
    assert not await guest.check_writers()
    assert len(said) == 1
    await guest.close()


@pytest.mark.asyncio
async def test_one_that_somebody_else_has_stopped_stays_so(path, child):
    one, other = child("os.open(path, os.O_RDWR)", path), child("os.open(path, os.O_RDWR)", path)
    os.kill(other.pid, signal.SIGSTOP)
    await asyncio.to_thread(wait_until, lambda: process.stands_still(other.pid))
    guest = await surveyed(path, auto=True)
    assert set(guest.pids) == {one.pid, other.pid}
    await guest.pause()
    assert not await guest.check_writers()
    assert [pid for pid, _ in guest.facts()["pids"]] == [one.pid]  # for `resolve` to wake
    await guest.resume()
    await asyncio.to_thread(wait_until, lambda: process.state(one.pid) == "S")
    assert process.state(other.pid) == "T"
    await guest.close()
    assert process.state(other.pid) == "T"


@pytest.mark.asyncio
@pytest.mark.parametrize("auto", [True, False])
async def test_one_that_is_woken_in_the_pause_is_stopped_again(path, child, auto):
    """And what it wrote is looked for: a supervisor may send SIGCONT at any time."""
    one = child("os.open(path, os.O_RDWR)", path)
    guest = await surveyed(path, () if auto else [one.pid], auto=auto)
    await guest.pause()
    assert not await guest.check_writers()
    guest._check = asyncio.ensure_future(guest._lookout.look())
    os.kill(one.pid, signal.SIGCONT)
    await asyncio.to_thread(wait_until, lambda: process.state(one.pid) != "T")
    assert await guest.check_writers()
    assert process.state(one.pid) == "T"
    await guest.resume()
    await asyncio.to_thread(wait_until, lambda: process.state(one.pid) == "S")
    await guest.close()


@pytest.mark.asyncio
async def test_one_that_its_owner_has_woken_in_the_pause_runs_on_afterwards(path, child):
    one = child("os.open(path, os.O_RDWR)", path)
    os.kill(one.pid, signal.SIGSTOP)
    await asyncio.to_thread(wait_until, lambda: process.state(one.pid) == "T")
    guest = await surveyed(path, [one.pid])
    await guest.pause()
    os.kill(one.pid, signal.SIGCONT)
    await asyncio.to_thread(wait_until, lambda: process.state(one.pid) != "T")
    assert await guest.check_writers()
    await guest.resume()
    await asyncio.to_thread(wait_until, lambda: process.state(one.pid) == "S")
    await guest.close()


AUTO_MOVER = """
from migrate.guests.file import FileGuest
guest = FileGuest(sys.argv[1], auto=True)
guest.survey()
await guest.started()
print(guest._guard.pid)
import os
await guest._watch_no_more()
os.write(os.open(sys.argv[2], os.O_WRONLY), b"\\n")
while len(await guest._lookout.look()) < 2:
    await asyncio.sleep(0.01)
await guest.pause()
assert len(guest.pids) == 2
"""


def test_the_guard_wakes_all_that_were_stopped(path, child):
    """Also those that were found in the pause, where the source is killed by SIGKILL."""
    one = child(SPAWNS, path)
    with Mover(AUTO_MOVER, path, f"/proc/{one.pid}/fd/0") as mover:
        one.said.append(int(one.process.stdout.readline()))
        assert {process.state(pid) for pid in (one.pid, one.said[0])} == {"T"}
        mover.kill()
        for pid in (one.pid, one.said[0]):
            wait_until(lambda: process.state(pid) == "S")  # noqa: B023


@pytest.mark.asyncio
async def test_auto_converge_slows_those_too_that_have_appeared(path, child, monkeypatch):
    monkeypatch.setattr(file_module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(file_module, "LOOK_FACTOR", 0)
    child("os.open(path, os.O_RDWR)", path)
    guest = await surveyed(path, auto=True)
    assert guest.can_throttle
    await guest.throttle(80)
    other = child("os.open(path, os.O_RDWR)", path)
    await asyncio.to_thread(wait_until, lambda: process.state(other.pid) == "T")
    await asyncio.to_thread(wait_until, lambda: process.state(other.pid) == "S")
    await guest.throttle(0)
    await guest.close()


@pytest.mark.asyncio
async def test_without_a_lookout_it_is_not_handed_over(path, child):
    one = child("os.open(path, os.O_RDWR)", path)
    guest = await surveyed(path, [one.pid])
    guest._lookout._process.kill()
    with pytest.raises(MigrationError, match="that looks for writers of the guest has died"):
        await guest.pause()
    await guest.resume()
    await asyncio.to_thread(wait_until, lambda: process.state(one.pid) == "S")
    await guest.close()


# ---------------------------------------------------------------- companions


def test_the_log_and_the_journal_of_sqlite_are_warned_of(tmp_path):
    path = tmp_path / "db"
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("create table t(n)")
    guest = FileGuest(str(path))
    guest.survey()
    assert not guest.warnings  # at rest, and nobody but this process has it open
    database.execute("begin")
    database.execute("insert into t values(1)")
    guest = FileGuest(str(path))
    guest.survey()
    assert len(guest.warnings) == 1
    assert "db-journal does not come along" in guest.warnings[0]
    database.execute("commit")
    database.execute("pragma journal_mode=wal")
    database.execute("insert into t values(2)")
    guest = FileGuest(str(path))
    guest.survey()
    assert "db-wal does not come along" in guest.warnings[0]
    assert "wal_checkpoint" in guest.warnings[0]
    database.close()  # the log is empty, and gone
    guest = FileGuest(str(path))
    guest.survey()
    assert not guest.warnings


@pytest.mark.parametrize("log", ["db-wal", "db-journal"])
def test_the_log_is_looked_for_beside_the_file_that_a_link_leads_to(tmp_path, log):
    """Its writer may have died: then nothing but the file tells of it."""
    (tmp_path / "releases").mkdir()
    path = tmp_path / "releases" / "db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("create table t(n)")
    (tmp_path / "releases" / log).write_bytes(b"transactions")
    (tmp_path / "current").symlink_to(path)
    guest = FileGuest(str(tmp_path / "current"))
    guest.survey()
    assert len(guest.warnings) == 1
    assert f"{log} does not come along" in guest.warnings[0]


def test_a_sqlite_database_that_is_written_is_warned_of_before_there_is_a_log(tmp_path, child):
    path = tmp_path / "db"
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("create table t(n)")
    database.execute("pragma journal_mode=wal")
    database.execute("pragma wal_checkpoint(truncate)")
    one = child("os.open(path, os.O_RDWR)", path)
    guest = FileGuest(str(path), [one.pid])
    guest.survey()
    assert "db-wal" in guest.warnings[0]
    database.execute("pragma journal_mode=delete")
    guest = FileGuest(str(path), [one.pid])
    guest.survey()
    assert "within a transaction" in guest.warnings[0]
    database.close()


@pytest.mark.asyncio
async def test_what_a_checkpoint_has_left_is_warned_of_in_the_pause(tmp_path):
    path = tmp_path / "db"
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("pragma journal_mode=wal")
    database.execute("create table t(n)")
    database.execute("pragma wal_checkpoint(truncate)")
    database.execute("insert into t values(1)")
    checkpoint = (
        f"{sys.executable} -c \"import sqlite3; sqlite3.connect('{path}')"
        ".execute('pragma wal_checkpoint(truncate)')\""
    )
    for command, warned in (("true", True), (checkpoint, False)):
        guest = await surveyed(path, (), command, "true")
        assert not guest.warnings  # the command may do what is needed
        said: list[str] = []
        guest.warn = said.append
        await guest.pause()
        assert any("db-wal" in text for text in said) is warned
        await guest.resume()
        await guest.close()
    database.close()


def test_other_files_beside_it_are_warned_of(path, child):
    """Such as a log of a database that we do not know; not those elsewhere, or of readers."""
    beside = f"{path}\x1b.log"
    Path(f"{path}.idx").touch()
    try:
        one = child(
            "os.open(path, os.O_RDWR); os.open(sys.argv[2], os.O_RDWR | os.O_CREAT); "
            "os.open(path + '.idx', os.O_RDONLY); os.open('/dev/null', os.O_RDWR)", path, beside
        )  # fmt: skip
        guest = FileGuest(str(path), [one.pid])
        guest.survey()
        assert len(guest.warnings) == 1
        assert (
            f"{path.name}\\x1b.log, which a writer of the guest has open beside it"
            in (guest.warnings[0])
        )
    finally:
        os.unlink(beside)
        os.unlink(f"{path}.idx")


def test_the_lock_file_of_lmdb_is_said_to_be_of_no_use(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    for name, options in (("data.mdb", {}), ("one", {"subdir": False})):
        where = tmp_path / ("dir" if name == "data.mdb" else name)
        environment = lmdb.open(str(where), **options)
        guest = FileGuest(str(where / name if name == "data.mdb" else where))
        guest.survey()
        assert len(guest.warnings) == 1
        assert "do not copy it" in guest.warnings[0]
        environment.close()


# ---------------------------------------------------------------- from end to end

PREFORK = """
import mmap, os, sys, time
m = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)
def count(at):
    n = 0
    while True:
        n += 1
        m[at:at + 8] = n.to_bytes(8, "little")
        time.sleep(0.01)
children = [pid for at in range(0, 24, 8) if (pid := os.fork() or count(at))]
print(*children, flush=True)
generation = 3
while True:
    time.sleep(0.2)
    if generation < 12:
        if not os.fork(): count(8 * generation)
        generation += 1
"""


def test_a_server_with_many_processes_moves_whole(path, tmp_path):
    """It starts more of them while it moves; --pid auto stops every one."""
    server = subprocess.Popen(
        [sys.executable, "-c", PREFORK, path], stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        server.stdout.readline()
        receiver, address = destination("--output", str(tmp_path / "out"))
        source = Program("migrate-src", "--guest", f"file:{path}", "--pid", "auto", address)
        assert source.wait() == 0, source.err
        assert receiver.wait() == 0
        assert (tmp_path / "out").read_bytes() == path.read_bytes()
        time.sleep(0.1)  # whatever runs would write meanwhile
        assert (tmp_path / "out").read_bytes() == path.read_bytes()
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        server.stdout.close()


def test_resolve_wakes_all_that_were_stopped(path, tmp_path):
    """Those too that had appeared while it moved: the journal names them when it is handed over."""
    server = subprocess.Popen(
        [sys.executable, "-c", PREFORK, path], stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        server.stdout.readline()
        journal = tmp_path / "journal"
        receiver, address = destination("--output", str(tmp_path / "out"))
        source = Program(
            "migrate-src", "--guest", f"file:{path}", "--pid", "auto", "--journal", str(journal),
            address,
        )  # fmt: skip
        assert source.wait() == 0, source.err
        assert receiver.wait() == 0
        stopped = {pid for pid in range_of(server.pid) if process.state(pid) == "T"}
        assert len(stopped) > 3
        (written,) = journal.glob("*.source")
        facts = {}
        for line in written.read_text().splitlines():
            facts |= json.loads(line.partition(" ")[2]).get("facts", {}).get("guest", {})
        assert {pid for pid, _ in facts["pids"]} == stopped
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        server.stdout.close()


def range_of(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(entry.read_text().rpartition(")")[2].split()[3]) == session:
                found.append(int(entry.parent.name))
    return found


def test_a_child_that_nobody_has_named_is_refused_and_nothing_is_sent(path, child):
    one = child(FORKS, path)
    source = Program(
        "migrate-src", "-q", "--guest", f"file:{path}", "--pid", str(one.pid), "unix:/nowhere"
    )
    assert source.wait() == 2
    assert f"process {one.said[0]} (python" in source.err
    assert process.state(one.pid) == "S"
