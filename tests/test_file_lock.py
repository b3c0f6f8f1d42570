"""Of all programs that could move a guest, one may: real processes, and the guest's own locks."""

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from migrate.api import receive, send
from migrate.errors import MigrationError, UsageError
from migrate.files import file_lock as lock_module
from migrate.files import kernel_locks, lock_waiters
from migrate.files.file_lock import FileLock, Kind
from migrate.files.filesystem import file_system_of
from migrate.files.lock_waiters import Waiting
from migrate.guests.buffer import BufferGuest
from migrate.guests.file import FileGuest
from migrate.ownership.journal import Journal
from migrate.runtime.processes import state
from proto.wire.ownership import Event, Role
from tests.killable import KillableProgram
from tests.programs import Program, children, destination
from tests.requirements import need, need_root

pytestmark = pytest.mark.programs

ROOT = Path(__file__).parent.parent
PATIENCE = 20.0

MIGRATION = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[2])
from migrate.errors import UsageError
from migrate.files.file_lock import FileLock
fd = os.open(sys.argv[1], os.O_RDONLY)
print("ready", flush=True)
while sys.stdin.readline():
    lock = FileLock(fd, "guest")
    try:
        asyncio.run(lock.acquire())
        print("locked", flush=True)
    except UsageError as error:
        print(error, flush=True)
    sys.stdin.readline()
    lock.close()
    print("free", flush=True)
"""


class Migration:
    """A process that locks a file, in a user, a mount or a PID namespace of its own if wanted."""

    def __init__(self, path: object, *words: str) -> None:
        self.process = subprocess.Popen(
            [*words, sys.executable, "-c", MIGRATION, str(path), str(ROOT)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.read() == "ready"

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def acquire(self) -> str:
        self.say()
        return self.read()

    def release(self) -> None:
        self.say()
        assert self.read() == "free"

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    path = tmp_path / "guest"
    path.write_bytes(bytes(100_000))
    return path


def wait_until(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def locked_file(path: object) -> FileLock:
    fd = os.open(path, os.O_RDONLY)
    try:
        lock = FileLock(fd, "guest")
    finally:
        os.close(fd)
    asyncio.run(lock.acquire())
    return lock


# ---------------------------------------------------------------- two migrations


def test_second_migration_is_refused_by_any_name(guest, tmp_path):
    (tmp_path / "hard").hardlink_to(guest)
    (tmp_path / "soft").symlink_to("guest")
    with Migration(guest) as first:
        assert first.acquire() == "locked"
        for name in ("guest", "hard", "soft"):
            with Migration(tmp_path / name) as second:
                said = second.acquire()
                assert f"another program (process {first.process.pid}) is moving it" in said
        first.release()
        with Migration(tmp_path / "hard") as second:
            assert second.acquire() == "locked"


def test_second_migration_is_refused_through_bind_mount(guest, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    script = 'mount --bind "$0" "$1" && shift && exec "$@"'
    words = ["unshare", "-m", "sh", "-c", script, str(tmp_path), str(other)]
    with Migration(guest) as first, Migration(other / "guest", *words) as second:
        assert not (other / "guest").exists(), "the mount is in the other namespace alone"
        assert first.acquire() == "locked"
        assert "is moving it" in second.acquire()


def test_second_migration_is_refused_in_another_pid_namespace(guest):
    with (
        Migration(guest, "unshare", "-p", "-f", "--mount-proc") as first,
        Migration(guest) as second,
    ):
        assert first.acquire() == "locked"
        assert "is moving it" in second.acquire()
        second.say()
        assert second.read() == "free"
        first.release()
        assert second.acquire() == "locked"
        assert "is moving it" in first.acquire()


@pytest.mark.parametrize("reader_first", [True, False])
def test_second_migration_is_refused_for_user_who_may_only_read(tmp_path, reader_first):
    guest = Path("/dev/shm") / f"lock-{os.getpid()}"
    guest.write_bytes(bytes(4096))
    guest.chmod(0o644)
    as_reader = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    try:
        with Migration(guest, *as_reader) as reader, Migration(guest) as root:
            first, second = (reader, root) if reader_first else (root, reader)
            assert first.acquire() == "locked"
            assert "is moving it" in second.acquire()
    finally:
        guest.unlink()


def test_sigkill_unlocks_the_guest(guest):
    with Migration(guest) as first, Migration(guest) as second:
        assert first.acquire() == "locked"
        first.process.kill()
        first.process.wait()
        assert second.acquire() == "locked"


FORKS = """
import os, time
from migrate.files.file_lock import FileLock
fd = os.open(sys.argv[1], os.O_RDONLY)
lock = FileLock(fd, "guest")
os.close(fd)
await lock.acquire()
reading, writing = os.pipe()
if not os.fork():
    os.write(writing, str(os.getpid()).encode())
    time.sleep(60)
    os._exit(0)
print(os.read(reading, 20).decode())
"""


def test_forked_child_does_not_keep_the_lock(guest):
    with KillableProgram(FORKS, guest) as first:
        child = int(first.said)
        try:
            with Migration(guest) as second:
                assert "is moving it" in second.acquire()
            first.kill()
            assert state(child) != "T"
            with Migration(guest) as second:
                assert second.acquire() == "locked"
        finally:
            os.kill(child, signal.SIGKILL)


def test_watchdog_does_not_lock_the_guest(guest):
    """A migration that was killed is dead for the lock, though its watchdog lives."""
    writer = subprocess.Popen(["sleep", "100"])
    program = (
        "import asyncio, sys\nfrom migrate.guests.file import FileGuest\n"
        "async def main():\n"
        "    guest = FileGuest(sys.argv[1], [int(sys.argv[2])])\n"
        "    await guest.lock()\n    await guest.make_ready()\n"
        "    print('locked', flush=True)\n    await asyncio.sleep(100)\nasyncio.run(main())\n"
    )
    migration = subprocess.Popen(
        [sys.executable, "-c", program, str(guest), str(writer.pid)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert migration.stdout is not None
    assert migration.stdout.readline() == "locked\n"
    [watchdog] = children(migration.pid)
    os.kill(watchdog, signal.SIGSTOP)
    migration.kill()
    migration.communicate()
    try:
        while state(watchdog) != "T":
            time.sleep(0.005)
        with Migration(guest) as second:
            assert second.acquire() == "locked"
    finally:
        os.kill(watchdog, signal.SIGKILL)
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("locks", ["", "flock", "lockf", "both"])
def test_at_most_one_of_many_migrations_gets_the_lock(guest, locks):
    """Also while the guest's program takes and drops locks, so that the migrations change kinds."""
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(Writer(guest, locks))] if locks else []
        migrations = [stack.enter_context(Migration(guest)) for _ in range(4)]
        won = 0
        for _ in range(6):
            for migration in migrations:
                migration.say()
            said = [migration.read() for migration in migrations]
            assert said.count("locked") <= 1, said
            won += said.count("locked")
            for migration in migrations:
                migration.release()
        assert won or locks
        for writer in writers:
            writer.goes_on()


# ---------------------------------------------------------------- the guest's own locks

WRITER = """
import fcntl, sys, time
file = open(sys.argv[1], "r+b")
kinds = {"flock": [fcntl.flock], "lockf": [fcntl.lockf], "both": [fcntl.flock, fcntl.lockf]}
keep = sys.argv[2].startswith("keep-")
kinds = kinds[sys.argv[2].removeprefix("keep-")]
for lock in kinds if keep else ():
    lock(file, fcntl.LOCK_EX)
count = 0
while True:
    for lock in () if keep else kinds:
        lock(file, fcntl.LOCK_EX)
    count += 1
    print(count, flush=True)
    time.sleep(0.002)
    for lock in () if keep else kinds:
        lock(file, fcntl.LOCK_UN)
    time.sleep(0.002)
"""


class Writer:
    """A program that takes locks on the file: for each transaction, or (keep-) for good."""

    def __init__(self, path: object, locks: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), locks], stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self._out = self.process.stdout
        self._out.readline()
        os.set_blocking(self._out.fileno(), False)

    def goes_on(self) -> None:
        """Wait until it has made some transactions from now on."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._out.fileno(), 1 << 16):
                pass
        got = 0

        def more() -> bool:
            nonlocal got
            with contextlib.suppress(BlockingIOError):
                got += os.read(self._out.fileno(), 1 << 16).count(b"\n")
            return got > 20

        wait_until(more)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._out.close()


@pytest.mark.parametrize("locks", ["flock", "lockf", "keep-flock", "keep-lockf"])
def test_writer_with_own_locks_continues_and_second_migration_is_refused(guest, locks):
    with Writer(guest, locks) as writer:
        lock = locked_file(guest)
        for _ in range(2):
            writer.goes_on()
            lock.confirm()
            with Migration(guest) as second:
                said = second.acquire()
                assert "is moving it" in said or "has locked all of it" in said
        lock.confirm()
        lock.close()
        writer.goes_on()


def test_migration_with_flock_is_found_after_writer_unlocks(guest):
    """The second migration gets the byte, and must not be content with that."""
    with Writer(guest, "keep-lockf"):
        lock = locked_file(guest)
        assert lock.kind is Kind.FLOCK
    with Migration(guest) as second:
        assert f"(process {os.getpid()}) is moving it" in second.acquire()
    lock.close()


def test_flock_of_a_process_that_cannot_be_seen_is_refused(guest):
    with Writer(guest, "keep-flock"):
        with Migration(guest, "unshare", "-p", "-f", "--mount-proc") as migration:
            assert "a process that cannot be seen from here" in migration.acquire()
        with Migration(guest) as migration:
            assert migration.acquire() == "locked"


def test_writer_with_both_kinds_of_lock_is_refused(guest):
    with Writer(guest, "keep-both"), pytest.raises(UsageError, match="has locked all of it"):
        locked_file(guest)


def test_lock_is_given_up_for_waiting_writer_and_commit_fails(guest):
    """It has the flock and now wants the byte: it must not wait for the whole migration."""
    with guest.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lock = locked_file(guest)
        program = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX)"
        subprocess.run([sys.executable, "-c", program, guest], check=True, timeout=PATIENCE)
        with pytest.raises(MigrationError, match="a program waits for a lock on it"):
            lock.confirm()
        lock.close()


STRANGER_WAITS = """
import fcntl, os, struct, sys, threading, time
def wait(take, *arguments):
    threading.Thread(target=take, args=arguments, daemon=True).start()
os.setgroups([]); os.setgid(1234); os.setuid(1234)
one, other = (os.open(sys.argv[1], os.O_RDONLY) for _ in range(2))
kind = sys.argv[2]
if kind == "flock": wait(fcntl.flock, one, fcntl.LOCK_SH)
if kind == "posix": wait(fcntl.lockf, one, fcntl.LOCK_SH)
if kind == "ofd": wait(fcntl.fcntl, one, 38, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0))
if kind != "flock": wait(fcntl.flock, other, fcntl.LOCK_SH)
print("waits", flush=True)
time.sleep(60)
"""


@need_root("become another user")
@pytest.mark.parametrize("kind", ["posix", "ofd", "flock"])
def test_lock_is_kept_while_reader_waits_for_it(shm, kind, monkeypatch):
    monkeypatch.setattr(lock_module, "PATIENCE_SECONDS", 0.3)
    guest = shm / "guest"
    guest.write_bytes(bytes(4096))
    guest.chmod(0o644)
    shm.chmod(0o755)
    with contextlib.ExitStack() as stack:
        if kind == "flock":  # then the byte cannot be had
            stack.enter_context(Writer(guest, "keep-lockf"))
        lock = locked_file(guest)
        stack.callback(lock.close)
        words = [sys.executable, "-c", STRANGER_WAITS, str(guest), kind]
        stranger = stack.enter_context(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        stack.callback(stranger.kill)
        assert stranger.stdout.readline() == "waits\n"
        time.sleep(1)
        lock.confirm()
        assert lock.kind is (Kind.FLOCK if kind == "flock" else Kind.BYTE)


OFD_WAITER = """
import fcntl, struct, sys
f = open(sys.argv[1], "r+b")
fcntl.fcntl(f, 38, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
"""


def test_writer_waiting_for_ofd_lock_continues(guest):
    """/proc/locks names no process there."""
    lock = locked_file(guest)
    subprocess.run([sys.executable, "-c", OFD_WAITER, guest], check=True, timeout=PATIENCE)
    lock.confirm()
    assert lock.kind is Kind.FLOCK
    lock.close()


MANY_LOCKS = """
import fcntl, struct, sys, time
f = open(sys.argv[1], "w")
for at in range(int(sys.argv[2]), 0, -1):
    fcntl.fcntl(f, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 4 * at, 2, 0))
print("locked", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("locks", ["lockf", "flock"])
def test_writer_continues_when_lock_table_is_too_long_to_read(guest, tmp_path, locks):
    with contextlib.ExitStack() as stack:
        lock = locked_file(guest)
        stack.callback(lock.close)
        words = [sys.executable, "-c", MANY_LOCKS, str(tmp_path / "other"), "8000"]
        stranger = stack.enter_context(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        stack.callback(stranger.kill)
        assert stranger.stdout.readline() == "locked\n"
        table = kernel_locks.read_lock_table()
        assert not table.complete
        assert len(table.locks) < 8000
        stack.enter_context(Writer(guest, locks)).goes_on()
        lock.confirm()


@need_root("become another user")
def test_writer_continues_while_another_process_cannot_be_looked_at(guest, monkeypatch):
    """An execve that waits for a FUSE file system keeps /proc/PID/syscall from being read."""
    looked, ends = threading.Event(), threading.Event()
    look = lock_waiters._locks_waited_for
    with contextlib.ExitStack() as stack:
        stack.callback(ends.set)
        stranger = stack.enter_context(subprocess.Popen(["sleep", "60"], user=65534))
        stack.callback(stranger.kill)

        def locks_waited_for(pid, file):
            if pid == stranger.pid:
                looked.set()
                ends.wait(PATIENCE)
            return look(pid, file)

        monkeypatch.setattr(lock_waiters, "_locks_waited_for", locks_waited_for)
        lock = locked_file(guest)
        stack.callback(lock.close)
        subprocess.run([sys.executable, "-c", OFD_WAITER, guest], check=True, timeout=PATIENCE / 2)
        lock.confirm()
        assert lock.kind is Kind.FLOCK
        assert looked.is_set()


def test_confirm_and_close_do_not_wait_for_the_watching_thread(guest, monkeypatch):
    looks, ends = threading.Event(), threading.Event()

    def waiting(_file, _guard):
        looks.set()
        ends.wait(PATIENCE)
        return Waiting(byte=False, flock=False, certain=True)

    monkeypatch.setattr(lock_module, "waiting", waiting)
    lock = locked_file(guest)
    assert looks.wait(PATIENCE)
    began = time.monotonic()
    lock.confirm()
    lock.close()
    assert time.monotonic() - began < PATIENCE / 2
    ends.set()


def test_locks_of_another_process_are_read_up_to_a_bound(tmp_path):
    path = tmp_path / "file"
    path.touch()
    code = """
import fcntl
file = open(sys.argv[1], "rb+")
for start in range(2000):
    fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * start)
print(file.fileno(), flush=True)
"""
    with KillableProgram(code, path) as program:
        [fd] = kernel_locks.descriptors_of(program.process.pid, path.stat())
        found, _ = kernel_locks.descriptor_locks(program.process.pid, fd)
    assert [lock.start for lock in found] == [2 * number for number in range(len(found))]
    assert 100 < len(found) < 400
    with path.open("rb+") as file:
        for start in range(500):
            fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * start)
        assert len(kernel_locks.descriptor_locks("self", file.fileno())[0]) == 500


def test_fcntl_lock_of_this_process_survives_close(guest):
    """Closing a descriptor drops a process's fcntl locks on that file."""
    with guest.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1)
        lock = FileLock(file.fileno(), "guest")
        asyncio.run(lock.acquire())
        lock.close()
        program = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, 6, 1)"
        done = subprocess.run(
            [sys.executable, "-c", program, guest], check=False, capture_output=True
        )
        assert done.returncode, "the lock is gone"


def test_file_system_without_record_locks_uses_flock(guest, monkeypatch):
    monkeypatch.setattr(lock_module.fcntl, "F_OFD_SETLK", 4711)
    lock = locked_file(guest)
    assert "no record locks" in lock.cautions[0]
    with Migration(guest) as second:
        assert "is moving it" in second.acquire()
    lock.close()


def test_network_file_system_uses_byte_lock_only(guest, monkeypatch):
    """A flock there would drop the byte at the server, or meet it."""
    fd = os.open(guest, os.O_RDONLY)
    assert file_system_of(fd) == subprocess.run(
        ["findmnt", "-n", "-o", "FSTYPE", "-T", guest], capture_output=True, text=True, check=True
    ).stdout.strip()  # fmt: skip
    os.close(fd)
    monkeypatch.setattr(lock_module, "file_system_of", lambda _fd: "nfs4")
    monkeypatch.setattr(lock_module.fcntl, "flock", lambda *_: pytest.fail("a flock was tried"))
    lock = locked_file(guest)
    lock.confirm()
    with Migration(guest) as second:
        assert "is moving it" in second.acquire()
    lock.close()


# ---------------------------------------------------------------- when the guest is locked


def journals(path: Path) -> list[str]:
    return sorted(os.listdir(path)) if path.exists() else []


@pytest.mark.parametrize("same_journal", [True, False])
def test_only_one_of_two_sources_moves_the_guest(shm, same_journal):
    guest = shm / "guest"
    for turn in range(2):
        guest.write_bytes(os.urandom(1_000_000))
        ends = [
            Program("migrate-dst", "-q", "--output", str(shm / f"out{n}"), "--journal",
                    str(shm / f"d{n}"), "--listen", f"unix:{shm}/s{n}")
            for n in (1, 2)
        ]  # fmt: skip
        wait_until(lambda: (shm / "s1").exists() and (shm / "s2").exists())
        sources = [
            Program("migrate-src", "-q", "--guest", f"file:{guest}", "--max-bandwidth", "1m",
                    "--journal", str(shm / ("j" if same_journal else f"j{turn}{n}")),
                    f"unix:{shm}/s{n}")
            for n in (1, 2)
        ]  # fmt: skip
        codes = [source.wait() for source in sources]
        assert sorted(codes) == [0, 2], [source.err for source in sources]
        refused = sources[codes.index(2)]
        assert "another program" in refused.err
        assert "is moving it" in refused.err
        assert len(list(shm.glob("out?"))) == 1
        if not same_journal:
            assert journals(shm / f"j{turn}{codes.index(2) + 1}") == [], "nothing was written down"
        for end in ends:
            end.kill(signal.SIGTERM)
            end.wait()
        for name in shm.glob("out?"):
            name.unlink()


def guest_with_attributes(shm: Path) -> Path:
    """A file that a mark can stand on."""
    guest = shm / "guest"
    guest.write_bytes(os.urandom(100_000))
    try:
        os.setxattr(guest, "user.test", b"")
    except OSError as error:
        need(False, f"user attributes in {shm}: {error.strerror}")
    return guest


def test_moved_guest_is_refused_with_another_journal(shm):
    """The lock ends with its program; the mark on the file does not."""
    guest = guest_with_attributes(shm)
    writer = subprocess.Popen(["sleep", "100"], stdin=subprocess.DEVNULL)
    try:
        ended = []
        for turn in ("first", "second", "woken"):
            if turn == "woken":
                writer.send_signal(signal.SIGCONT)
                wait_until(lambda: state(writer.pid) == "S")
            receiver, address = destination("--output", str(shm / turn))
            source = Program(
                "migrate-src", "-q", "--guest", f"file:{guest}", "--pid", str(writer.pid),
                "--journal", str(shm / f"j-{turn}"), address,
            )  # fmt: skip
            ended.append(source.wait())
            if turn == "second":
                assert "was handed over to another machine" in source.err
                receiver.kill(signal.SIGTERM)
            receiver.wait()
        assert ended == [0, 2, 0]
        assert not (shm / "second").exists()
        assert "user.xbmigrate.moved" not in os.listxattr(shm / "first")
    finally:
        writer.kill()
        writer.wait()


def test_guest_paused_by_command_moves_again_after_mark_is_removed(shm):
    """Whether its writer runs here cannot be seen from outside."""
    guest = guest_with_attributes(shm)
    ended = []
    for turn in ("first", "second", "third"):
        if turn == "third":
            os.removexattr(guest, "user.xbmigrate.moved")
        receiver, address = destination("--output", str(shm / turn))
        source = Program(
            "migrate-src", "-q", "--guest", f"file:{guest}", "--pause-cmd", f"touch {shm}/{turn}-p",
            "--resume-cmd", "true", "--journal", str(shm / f"j-{turn}"), address,
        )  # fmt: skip
        ended.append(source.wait())
        if turn == "second":
            assert "was handed over to another machine" in source.err
            assert "setfattr -x user.xbmigrate.moved" in source.err
            receiver.kill(signal.SIGTERM)
        receiver.wait()
    assert ended == [0, 2, 0]
    assert not (shm / "second").exists()
    assert not (shm / "second-p").exists()


def test_dry_run_and_idle_program_take_no_lock(shm):
    guest = shm / "guest"
    guest.write_bytes(os.urandom(100_000))
    idle = Program("migrate-src", "--guest", f"file:{guest}", "--qmp", f"unix:{shm}/q",
                   "--monitor", f"unix:{shm}/m")  # fmt: skip
    try:
        idle.read_line("idle: ")
        lock = locked_file(guest)
        receiver, address = destination("--output", str(shm / "out"))
        dry = Program("migrate-src", "--dry-run", "--guest", f"file:{guest}", address)
        assert dry.wait() == 0, dry.err
        lock.close()
        assert Program("migrate-src", "--guest", f"file:{guest}", address).wait() == 0
        assert receiver.wait() == 0
    finally:
        idle.kill(signal.SIGTERM)
        idle.wait()


def test_resolve_resumes_nothing_while_another_program_moves_the_guest(shm):
    guest = shm / "guest"
    guest.write_bytes(bytes(4096))
    writer = subprocess.Popen(["sleep", "100"])
    try:
        os.kill(writer.pid, signal.SIGSTOP)
        wait_until(lambda: state(writer.pid) == "T")
        opened = FileGuest(str(guest), [writer.pid])
        journal = Journal(Role.SOURCE, bytes(range(16)), str(shm / "j"))
        journal.begin(guest=opened.facts(), address="tcp:127.0.0.1:1")
        journal.move(Event.READY)
        journal.move(Event.KEEP_SOURCE)
        journal.close()
        asyncio.run(opened.close())
        words = ("resolve", journal.name, "--journal", str(shm / "j"))
        lock = locked_file(guest)
        refused = Program("migrate-src", *words)
        assert refused.wait() == 2
        assert "is moving it" in refused.err
        assert state(writer.pid) == "T"
        lock.close()
        assert Program("migrate-src", *words).wait() == 0
        wait_until(lambda: state(writer.pid) == "S")
    finally:
        writer.kill()
        writer.wait()


class LostGuest(BufferGuest):
    """Its lock is lost while it moves."""

    relinquished = False

    def confirm_lock(self) -> None:
        raise MigrationError("the lock is lost")

    async def relinquish(self) -> None:
        self.relinquished = True


@pytest.mark.asyncio
async def test_guest_with_lost_lock_is_not_committed():
    found = asyncio.get_running_loop().create_future()
    receiving = asyncio.create_task(receive("127.0.0.1:0", listening=found.set_result))
    port = (await found).port
    guest = LostGuest(bytearray(b"x" * 50_000))
    with pytest.raises(MigrationError, match="the lock is lost"):
        await send(guest, f"tcp:127.0.0.1:{port}")
    assert not guest.relinquished
    async with guest.writing():
        pass
    with pytest.raises(MigrationError):
        await receiving
