"""Finding the writers of a file guest, by inode, under any name and from any process."""

import asyncio
import contextlib
import json
import mmap
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from migrate.errors import MigrationError, UsageError
from migrate.guests import companions, guest_file, writer_search, writer_survey
from migrate.guests import file as file_module
from migrate.guests.file import FileGuest
from migrate.guests.writer_search import WriterSearch
from migrate.runtime import processes
from tests.killable import KillableProgram
from tests.programs import Program, destination
from tests.requirements import need, need_program, need_root
from tests.waiting import wait_until

pytestmark = pytest.mark.programs

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
def search(path):
    fd = os.open(path, os.O_RDONLY)
    yield WriterSearch(fd)
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
        pytest.param("os.lseek(os.open(path, os.O_RDWR), 0x58424D48, 0)", True, id="marked"),
        pytest.param("import fcntl\nf = open(path, 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX)\n"
                     "os.lseek(f.fileno(), 0x58424D48, 0)", True, id="marked-with-another-lock"),
        pytest.param(OWN_TABLE, True, id="thread-with-its-own-files"),
        pytest.param(NO_MAIN_THREAD, True, id="without-its-main-thread"),
    ],
)  # fmt: skip
def test_writers_are_found(path, search, child, code, writes):
    one = child(code, path)
    found = [writer for writer in search.search() if writer.pid == one.pid]
    assert bool(found) is writes
    assert not found or found[0].name.startswith("python")
    assert (one.pid in pids(search.search())) is writes  # also from what is known
    assert (one.pid in pids(search.search_new())) is writes


MOVERS_LOCK = """
import fcntl, struct
fd = os.open(path, os.O_RDWR)
if sys.argv[2] != '0': os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
os.lseek(fd, 0x58424D48, 0)
fcntl.fcntl(fd, 37, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 1 << 62, 0, 0))
"""


@need_root("become another user")
@pytest.mark.parametrize(("user", "writes"), [(0, False), (1234, True)])
def test_descriptor_with_a_migration_lock_is_no_writer_if_roots(path, search, child, user, writes):
    one = child(MOVERS_LOCK, path, user)
    assert (one.pid in pids(search.search())) is writes
    assert search.guest.migrates is not writes


def test_child_processes_are_found(path, search, child):
    one = child(FORKS, path)
    assert {one.pid, *one.said} <= pids(search.search())


@need_root("mount")
def test_writer_in_another_mount_namespace_is_found(path, search, child, tmp_path):
    there = tmp_path / "bound"
    there.touch()
    entering = f'mount --bind {path} {there} && exec "$@"'
    one = child(
        "os.open(path, os.O_RDWR)", there,
        wrapper=("unshare", "--mount", "sh", "-c", entering, "sh"),
    )  # fmt: skip
    assert not there.stat().st_size, "it is mounted here too"
    assert one.pid in pids(search.search())


def test_this_program_is_no_writer(path, search):
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert os.getpid() not in pids(search.search())
        assert guest_file.opened_here(search.guest)
        assert guest_file.open_for_writing(search.guest.fd) is True
    assert not guest_file.opened_here(search.guest)
    assert guest_file.open_for_writing(search.guest.fd) is False


def test_file_in_flight_in_a_socket_is_noticed_by_lease(path, search):
    """No /proc shows it."""
    one, other = socket.socketpair()
    with one, other:
        fd = os.open(path, os.O_RDWR)
        socket.send_fds(one, [b"x"], [fd])
        os.close(fd)
        assert not guest_file.opened_here(search.guest)
        assert guest_file.open_for_writing(search.guest.fd) is True
    assert guest_file.open_for_writing(search.guest.fd) is False


def test_lease_tells_nothing_about_devices():
    fd = os.open("/dev/null", os.O_RDONLY)
    assert guest_file.open_for_writing(fd) is None
    os.close(fd)


def test_later_search_notices_open_close_and_mmap(path, search, child):
    one = child(
        "print(os.getpid(), flush=True)\nprint('ready', flush=True)\n"
        "for line in sys.stdin: exec(line); print('ready', flush=True)\n", path
    )  # fmt: skip

    def do(code: str) -> None:
        one.process.stdin.write(code + "\n")
        one.process.stdin.flush()
        assert one.process.stdout.readline() == "ready\n"

    assert one.pid not in pids(search.search())
    for begins, ends in (
        ("fd = os.open(path, os.O_RDWR)", "os.close(fd)"),
        ("fd = os.open(path, os.O_RDWR); m = mmap.mmap(fd, 0); os.close(fd)", "m.close()"),
    ):
        do(begins)
        assert one.pid not in pids(search.search_new())  # it was there before
        assert one.pid in pids(search.search())
        assert one.pid in pids(search.search_new())
        do(ends)
        assert one.pid not in pids(search.search_new())
        assert one.pid in pids(search.search_new({one.pid}))  # it is known to stand still
        assert one.pid not in pids(search.search())
    do("mapped(os.O_RDWR)")  # no descriptor tells of it
    assert one.pid in pids(search.search())


def test_search_new_finds_new_processes_with_reused_pids(path, search, child):
    search.search()
    one = child("os.open(path, os.O_RDWR)", path)
    assert one.pid in pids(search.search_new())
    search.search()
    # as if it were another that had the number when all were looked at
    search._known[one.pid] = writer_search._Seen(inode=1)
    assert one.pid in pids(search.search_new())


def test_cancelled_search_ends_and_changes_nothing(search):
    search.search()
    known = search._known
    assert search.search(lambda: True) == []
    assert search._known is known


@need_root("become another user")
def test_hidden_processes_are_counted(path, search, child):
    one = child("os.open(path, os.O_RDWR)", path)
    code = """
import os, sys
from migrate.guests.writer_search import WriterSearch
fd = os.open(sys.argv[1], os.O_RDONLY)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
search = WriterSearch(fd)
found = search.search()
print(len(found), search.hidden > 0, search._known[int(sys.argv[2])].hidden)
"""
    path.chmod(0o644)
    found = subprocess.run([sys.executable, "-c", code, path, str(one.pid)], text=True,
                           capture_output=True, cwd=ROOT, check=False)  # fmt: skip
    assert found.stdout == "0 True True\n", found.stderr


MANY_DESCRIPTORS = """
import fcntl, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (15000, 15000))
fd = os.open(path, os.O_RDONLY)
os.setgroups([]); os.setgid(1234); os.setuid(1234)
for _ in range(14000): fcntl.fcntl(fd, fcntl.F_DUPFD, 3)
for _ in range(11):
    child = os.fork()
    if not child: break
    print(child, flush=True)
if not child: time.sleep(90)
"""


@need_root("become another user")
def test_open_files_of_other_users_cost_bounded_time(path, search, child):
    """168000 of them took a look 0.5 s, and one in the pause as much if they were new."""
    before = child("os.open(path, os.O_RDWR)", path)
    for _ in range(2):
        search.search()
    seconds = search.seconds
    strangers = child(MANY_DESCRIPTORS, "/dev/null")
    assert before.pid in pids(search.search_new())
    assert search.new_seconds < seconds + 3 * writer_search.NEW_SECONDS
    search.search()
    search.search()
    assert search.seconds < seconds + 3 * writer_search.FURTHER_SECONDS
    assert not pids(search.search()) & {strangers.pid, *strangers.said}


@need_root("become another user")
def test_skipped_processes_of_other_users_are_counted(path, search, child, monkeypatch):
    monkeypatch.setattr(writer_search, "FURTHER_SECONDS", 0.004)
    search.search()
    strangers = child(MANY_DESCRIPTORS, "/dev/null")
    assert not search.search()
    assert not search.skipped, "the kernel says that nothing has it open for writing"
    one = child("os.open(path, os.O_RDWR)", path)
    assert one.pid in pids(search.search())
    assert search.skipped >= 10
    monkeypatch.setattr(writer_search, "FURTHER_SECONDS", 4.0)
    assert one.pid in pids(search.search())
    assert not search.skipped
    strangers.close()


@need_root("become another user")
def test_writer_of_another_user_stays_known_without_time(path, search, child, monkeypatch):
    code = "os.open(path, os.O_RDWR); os.setgroups([]); os.setgid(1234); os.setuid(1234)"
    one = child(code, path)
    assert one.pid in pids(search.search())
    for name in ("FURTHER_SECONDS", "NEW_SECONDS"):
        monkeypatch.setattr(writer_search, name, 0.0)
    assert one.pid in pids(search.search())
    assert one.pid in pids(search.search_new())
    other = child(code, path)  # nothing tells of it yet, but that it was not looked into
    assert other.pid not in pids(search.search())
    assert search.skipped


@need_root("become another user")
def test_hanging_process_of_another_user_costs_bounded_time(path, search, child, monkeypatch):
    """It holds the lock of its memory, by FUSE; a search waited for it as long as it liked."""
    become = "os.setgroups([]); os.setgid(1234); os.setuid(1234)"
    writer = child("os.open(path, os.O_RDWR)", path)
    hanging, *others = [child(become, "/dev/null") for _ in range(4)]
    asked, go_on, mapped_in = [], threading.Event(), guest_file.GuestFile.mapped_in

    def skipped() -> set[int]:
        return {pid for pid, seen in search._known.items() if seen.skipped} & ours

    def hangs(guest, base, deadline):
        if base in {f"/proc/{one.pid}" for one in late}:
            asked.append(base)
            go_on.wait(PATIENCE)
        return mapped_in(guest, base, deadline)

    monkeypatch.setattr(guest_file.GuestFile, "mapped_in", hangs)
    try:
        began = time.monotonic()
        late, ours = [hanging], {hanging.pid, *(one.pid for one in others)}
        assert pids(search.search()) == {writer.pid}
        assert skipped() == {hanging.pid}, "the others were looked into"
        assert search.skipped
        assert pids(search.search()) == {writer.pid}
        assert skipped() == {hanging.pid}
        assert len(asked) == 1, "it is not looked into again"
        assert time.monotonic() - began < PATIENCE

        late.append(child(become, "/dev/null"))
        ours.add(late[1].pid)
        began = time.monotonic()
        assert pids(search.search_new()) == {writer.pid}
        assert time.monotonic() - began < 1, "in the pause it was 30 s"
        assert len(asked) == 2
        assert pids(search.search()) == {writer.pid}
        assert skipped() == {one.pid for one in late}
    finally:
        go_on.set()
    wait_until(lambda: not {pid for pid, _ in search._guard.hanging} & ours)
    assert pids(search.search()) == {writer.pid}
    assert not skipped(), "they hang no more"


def test_names_are_escaped_and_counted():
    many = [writer_search.Writer(pid, "1", "x") for pid in range(7)]
    assert writer_search.named(many[:1]) == "process 0 (x)"
    assert writer_search.named(many) == "processes 0 (x), 1 (x), 2 (x), 3 (x), 4 (x) and 2 more"


# ---------------------------------------------------------------- the kernel as a writer


@pytest.fixture
def loop_device():
    made = []

    def attach(path, *options: str) -> str:
        done = subprocess.run(["losetup", "-f", "--show", *options, str(path)], text=True,
                              capture_output=True, check=False)  # fmt: skip
        need(done.returncode == 0, f"a loop device: {done.stderr.strip()}")
        made.append(done.stdout.strip())
        return made[-1]

    yield attach
    for one in made:
        subprocess.run(["umount", one], check=False, capture_output=True)
        subprocess.run(["losetup", "-d", one], check=False)


def test_file_behind_loop_device_is_refused(path, loop_device):
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


def test_mounted_device_and_its_openers_are_refused(path, loop_device, child, tmp_path):
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
    need_program("mkfs.ext4", "e2fsprogs")
    subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    (tmp_path / "mounted").mkdir()
    subprocess.run(["mount", device, tmp_path / "mounted"], check=True)
    with pytest.raises(UsageError, match=f"the file system at {tmp_path}/mounted writes it"):
        FileGuest(device, auto=True).survey()
    subprocess.run(["mount", "-o", "remount,ro", device, tmp_path / "mounted"], check=True)
    FileGuest(device).survey()


# ---------------------------------------------------------------- before it begins


def test_unnamed_writers_are_refused_before_sending(path, child):
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


def test_stopped_writer_is_not_refused(path, child):
    one = child("os.open(path, os.O_RDWR)", path)
    os.kill(one.pid, signal.SIGSTOP)
    wait_until(lambda: processes.is_stopped(one.pid))
    FileGuest(str(path)).survey()


def test_unstoppable_process_is_refused_at_once(path, child, monkeypatch):
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
              and processes.is_kernel_thread(int(name))]  # fmt: skip
    for pid in kernel[:1]:  # a container shows none
        with pytest.raises(UsageError, match="a thread of the kernel, which no signal stops"):
            FileGuest(str(path), [pid])
    monkeypatch.setattr(writer_survey, "task_states", lambda _pid: set())
    with pytest.raises(UsageError, match="/proc does not show it"):
        FileGuest(str(path), [threaded.pid])
    monkeypatch.setattr(writer_search.os, "readlink", lambda _path: "1")
    with pytest.raises(UsageError, match="PID namespace: whether a process has stopped"):
        FileGuest(str(path), auto=True).survey()
    guest = FileGuest(str(path))
    guest.survey()


@need_root("drop a capability")
def test_missing_permission_to_stop_is_reported_before_connecting(path, child):
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


def test_auto_does_not_stop_our_own_ancestors(path):
    """A shell that has the guest open waits for us; stopped, it would wait forever."""
    bin_ = Path(sys.executable).parent
    move = f"{bin_}/migrate-src --guest file:{path} --pid auto unix:/nowhere"
    command = f"exec 3<>{path}; {move} 3>&-; exit $?"
    found = subprocess.run(["bash", "-c", command], text=True, capture_output=True, check=False)
    assert found.returncode == 2
    assert "which has started migrate-src, can write the guest itself" in found.stderr


@need_root("give files away")
@pytest.mark.asyncio
async def test_auto_does_not_stop_processes_of_other_users(path, child):
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
    assert processes.state(late.pid) not in processes.STOPPED
    await asyncio.to_thread(late.close)
    await guest.resume()
    await guest.pause()
    assert not await guest.check_writers()
    await guest.close()


def test_writer_that_ends_during_the_search_is_ignored(path, monkeypatch, child):
    one = child("os.open(path, os.O_RDWR)", path)
    real = WriterSearch.search_new

    def search_new(self, *arguments):
        one.close()
        return real(self, *arguments)

    monkeypatch.setattr(WriterSearch, "search_new", search_new)
    guest = FileGuest(str(path), auto=True)
    guest.survey()
    assert guest.pids == ()


def test_writers_known_only_to_the_kernel_are_reported(path):
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


def test_hidden_processes_are_reported_with_a_count(path, monkeypatch, child):
    one = child("os.open(path, os.O_RDWR)", path)
    real = WriterSearch.search

    def search(self, *arguments):
        found = real(self, *arguments)
        self.hidden = 12
        return found

    monkeypatch.setattr(WriterSearch, "search", search)
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
    await guest.make_ready()
    return guest


@pytest.mark.asyncio
async def test_auto_stops_new_writers(path, child):
    one = child(SPAWNS, path)
    guest = await surveyed(path, auto=True)
    assert guest.pids == (one.pid,)
    new = forked(one)
    opened = child("os.open(path, os.O_RDWR)", path)
    await guest.pause()
    assert {processes.state(pid) for pid in (one.pid, new, opened.pid)} == {"T"}
    assert not await guest.check_writers()
    assert {tuple(fact) for fact in guest.facts()["pids"]} == {
        (pid, processes.start_time_of(pid)) for pid in (one.pid, new, opened.pid)
    }
    await guest.resume()
    for pid in (one.pid, new, opened.pid):
        await asyncio.to_thread(wait_until, lambda: processes.state(pid) == "S")  # noqa: B023
    await guest.pause()
    await guest.relinquish()
    await guest.close()
    assert {processes.state(pid) for pid in (one.pid, new, opened.pid)} == {"T"}


@pytest.mark.asyncio
async def test_new_writers_are_refused_when_others_are_named(path, child):
    one = child(SPAWNS, path)
    guest = await surveyed(path, [one.pid])
    new = forked(one)
    with pytest.raises(MigrationError, match=rf"process {new} \(python.* can write it too"):
        await guest.pause()
    await guest.resume()
    await asyncio.to_thread(wait_until, lambda: processes.state(one.pid) == "S")
    await guest.close()


@pytest.mark.asyncio
async def test_new_writer_is_refused_when_nothing_is_stopped(path, child):
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
async def test_writer_that_opens_the_guest_in_the_pause_is_found(path, child, auto):
    """A process that existed before, and was no writer then, is found by the full search."""
    code = "print(os.getpid(), flush=True)\nprint('ready', flush=True)\nsys.stdin.readline()\n"
    idle = child(code + "os.open(path, os.O_RDWR)", path)
    one = child("os.open(path, os.O_RDWR)", path)
    guest = await surveyed(path, () if auto else [one.pid], auto=auto)
    await guest.stop_watching()
    real = guest.watch.search

    async def look():
        guest.watch.search = real
        idle.process.stdin.write("\n")
        idle.process.stdin.flush()
        assert await asyncio.to_thread(idle.process.stdout.readline) == "ready\n"
        return await real()

    guest.watch.search = look
    await guest.pause()
    if auto:
        assert await guest.check_writers()
        assert processes.state(idle.pid) == "T"
    else:
        with pytest.raises(MigrationError, match=f"process {idle.pid} "):
            await guest.check_writers()
    await guest.resume()
    await asyncio.to_thread(wait_until, lambda: processes.state(idle.pid) == "S")
    await guest.close()


@pytest.mark.asyncio
async def test_writer_running_after_pause_cmd_causes_a_warning(path, child):
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


# Opens a file for writing, and is in a vfork(2) for a while: meanwhile SIGSTOP is pending.
STOPS_LATE = """
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>
static void woken(int number) {}
int main(int count, char **words)
{
    if (open(words[1], O_RDWR) < 0)
        return 1;
    signal(SIGUSR1, woken);
    puts("ready");
    fflush(stdout);
    pause();
    if (!vfork()) {
        usleep(1000000);
        _exit(0);
    }
    pause();
    return 0;
}
"""


@pytest.mark.asyncio
async def test_writer_that_stops_late_causes_no_warning(path, tmp_path):
    """kill(1) returns before the process that it stops has stopped."""
    (tmp_path / "late.c").write_text(STOPS_LATE)
    build = ["gcc", "-w", tmp_path / "late.c", "-o", tmp_path / "late"]
    await asyncio.to_thread(subprocess.run, build, check=True)
    writer = await asyncio.create_subprocess_exec(tmp_path / "late", path, stdout=subprocess.PIPE)
    try:
        assert await writer.stdout.readline() == b"ready\n"
        stops = f"kill -USR1 {writer.pid}; sleep 0.1; kill -STOP {writer.pid}"
        guest = await surveyed(path, (), stops, "true")
        said: list[str] = []
        guest.warn = said.append
        await guest.pause()
        assert processes.state(writer.pid) == "T"
        assert not await guest.check_writers()
        assert not said
        await guest.close()
    finally:
        writer.kill()
        await writer.communicate()


@need_root("become another user")
@pytest.mark.asyncio
async def test_another_users_writer_is_not_waited_for(path, child, monkeypatch):
    """It may be half stopped for as long as that user likes, and the guest is paused meanwhile."""
    path.chmod(0o666)
    own = child("os.open(path, os.O_RDWR)", path)
    other = child("os.setuid(65534); os.open(path, os.O_RDWR)", path)
    waited: list[int] = []

    async def wait_stopping(pid: int) -> None:
        waited.append(pid)

    monkeypatch.setattr(file_module, "wait_stopping", wait_stopping)
    guest = await surveyed(path, (), "true", "true")
    said: list[str] = []
    guest.warn = said.append
    await guest.pause()
    assert set(waited) == {own.pid}
    assert str(other.pid) in said[0]
    await guest.resume()
    await guest.close()


@pytest.mark.asyncio
async def test_writer_stopped_by_others_stays_stopped(path, child):
    one, other = child("os.open(path, os.O_RDWR)", path), child("os.open(path, os.O_RDWR)", path)
    os.kill(other.pid, signal.SIGSTOP)
    await asyncio.to_thread(wait_until, lambda: processes.is_stopped(other.pid))
    guest = await surveyed(path, auto=True)
    assert set(guest.pids) == {one.pid, other.pid}
    await guest.pause()
    assert not await guest.check_writers()
    assert [pid for pid, _ in guest.facts()["pids"]] == [one.pid]  # for `resolve` to wake
    await guest.resume()
    await asyncio.to_thread(wait_until, lambda: processes.state(one.pid) == "S")
    assert processes.state(other.pid) == "T"
    await guest.close()
    assert processes.state(other.pid) == "T"


@pytest.mark.asyncio
@pytest.mark.parametrize("auto", [True, False])
async def test_writer_resumed_in_the_pause_is_stopped_again(path, child, auto):
    """Its writes are scanned for: a supervisor may send SIGCONT at any time."""
    one = child("os.open(path, os.O_RDWR)", path)
    guest = await surveyed(path, () if auto else [one.pid], auto=auto)
    await guest.pause()
    assert not await guest.check_writers()
    guest.last_look = asyncio.ensure_future(guest.watch.search())
    os.kill(one.pid, signal.SIGCONT)
    await asyncio.to_thread(wait_until, lambda: processes.state(one.pid) != "T")
    assert await guest.check_writers()
    assert processes.state(one.pid) == "T"
    await guest.resume()
    await asyncio.to_thread(wait_until, lambda: processes.state(one.pid) == "S")
    await guest.close()


@pytest.mark.asyncio
async def test_writer_resumed_by_its_owner_runs_after_the_pause(path, child):
    one = child("os.open(path, os.O_RDWR)", path)
    os.kill(one.pid, signal.SIGSTOP)
    await asyncio.to_thread(wait_until, lambda: processes.state(one.pid) == "T")
    guest = await surveyed(path, [one.pid])
    await guest.pause()
    os.kill(one.pid, signal.SIGCONT)
    await asyncio.to_thread(wait_until, lambda: processes.state(one.pid) != "T")
    assert await guest.check_writers()
    await guest.resume()
    await asyncio.to_thread(wait_until, lambda: processes.state(one.pid) == "S")
    await guest.close()


AUTO_MOVER = """
from migrate.guests.file import FileGuest
guest = FileGuest(sys.argv[1], auto=True)
guest.survey()
await guest.make_ready()
print(guest.watchdog_pid)
import os
await guest.stop_watching()
os.write(os.open(sys.argv[2], os.O_WRONLY), b"\\n")
while len(await guest.watch.search()) < 2:
    await asyncio.sleep(0.01)
await guest.pause()
assert len(guest.pids) == 2
"""


def test_watchdog_resumes_all_stopped_writers(path, child):
    """Also those that were found in the pause, where the source is killed by SIGKILL."""
    one = child(SPAWNS, path)
    with KillableProgram(AUTO_MOVER, path, f"/proc/{one.pid}/fd/0") as program:
        one.said.append(int(one.process.stdout.readline()))
        assert {processes.state(pid) for pid in (one.pid, one.said[0])} == {"T"}
        program.kill()
        for pid in (one.pid, one.said[0]):
            wait_until(lambda: processes.state(pid) == "S")  # noqa: B023


@pytest.mark.asyncio
async def test_auto_converge_throttles_new_writers(path, child, monkeypatch):
    monkeypatch.setattr(file_module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(file_module, "LOOK_FACTOR", 0)
    child("os.open(path, os.O_RDWR)", path)
    guest = await surveyed(path, auto=True)
    assert guest.can_throttle
    await guest.throttle(80)
    other = child("os.open(path, os.O_RDWR)", path)
    await asyncio.to_thread(wait_until, lambda: processes.state(other.pid) == "T")
    await asyncio.to_thread(wait_until, lambda: processes.state(other.pid) == "S")
    await guest.throttle(0)
    await guest.close()


@pytest.mark.asyncio
async def test_no_hand_over_without_the_writer_watch(path, child):
    one = child("os.open(path, os.O_RDWR)", path)
    guest = await surveyed(path, [one.pid])
    guest.watch._process.kill()
    with pytest.raises(MigrationError, match="that looks for writers of the guest has died"):
        await guest.pause()
    await guest.resume()
    await asyncio.to_thread(wait_until, lambda: processes.state(one.pid) == "S")
    await guest.close()


# ---------------------------------------------------------------- companions


def test_sqlite_log_and_journal_cause_a_warning(tmp_path):
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
def test_log_is_searched_beside_the_link_target(tmp_path, log):
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


def test_written_sqlite_database_causes_a_warning_without_a_log(tmp_path, child):
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
async def test_log_left_by_checkpoint_causes_a_warning_in_the_pause(tmp_path):
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


def test_files_beside_the_guest_cause_a_warning(path, child):
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


def test_open_file_that_does_not_answer_hides_no_companion(path, child, monkeypatch):
    """The server of a FUSE file that one writer has open may never answer."""
    code = "os.open(path, os.O_RDWR); os.open(path + '-extra', os.O_RDWR)"
    extra = Path(f"{path}-extra")
    extra.touch()
    silent, open_one = child(code, path), child(code, path)
    stat, answer = os.stat, threading.Event()

    def slow(where, **more):
        if str(where).startswith(f"/proc/{silent.pid}/fd/"):
            answer.wait(PATIENCE)
        return stat(where, **more)

    found = [writer_search.Writer(one.pid, "", "") for one in (silent, open_one)]
    began = time.monotonic()
    with open(path, "rb") as guest:
        monkeypatch.setattr(os, "stat", slow)
        try:
            (said,) = companions.warnings(guest.fileno(), str(path), found)
        finally:
            answer.set()
            extra.unlink()
    assert said.startswith(extra.name)
    assert time.monotonic() - began < PATIENCE


def test_lmdb_lock_file_is_reported_as_useless(tmp_path):
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


def test_server_with_many_processes_moves_completely(path, tmp_path):
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


def test_resolve_resumes_all_stopped_writers(path, tmp_path):
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
        stopped = {pid for pid in range_of(server.pid) if processes.state(pid) == "T"}
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


def test_unnamed_child_process_is_refused_before_sending(path, child):
    one = child(FORKS, path)
    source = Program(
        "migrate-src", "-q", "--guest", f"file:{path}", "--pid", str(one.pid), "unix:/nowhere"
    )
    assert source.wait() == 2
    assert f"process {one.said[0]} (python" in source.err
    assert processes.state(one.pid) not in processes.STOPPED
