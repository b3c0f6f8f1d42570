"""Of all programs that could move a guest, one may: real processes, and the guest's own locks."""

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migrate.errors import MigrationError, UsageError
from migrate.guests import hold as hold_module
from migrate.guests.buffer import BufferGuest
from migrate.guests.file import FileGuest
from migrate.guests.hold import FileHold
from migrate.guests.process import state
from migrate.journal import Journal
from migrate.library import receive, send
from proto.ownership import Event, Role
from tests.programs import Program, children, destination

ROOT = Path(__file__).parent.parent
PATIENCE = 20.0

MOVER = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[2])
from migrate.errors import UsageError
from migrate.guests.hold import FileHold
fd = os.open(sys.argv[1], os.O_RDONLY)
print("ready", flush=True)
while sys.stdin.readline():
    hold = FileHold(fd, "guest")
    try:
        asyncio.run(hold.take())
        print("held", flush=True)
    except UsageError as error:
        print(error, flush=True)
    sys.stdin.readline()
    hold.close()
    print("free", flush=True)
"""


class Mover:
    """A process that holds a file, in a user, a mount or a PID namespace of its own if wanted."""

    def __init__(self, path: object, *words: str) -> None:
        self.process = subprocess.Popen(
            [*words, sys.executable, "-c", MOVER, str(path), str(ROOT)], text=True,
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

    def take(self) -> str:
        self.say()
        return self.read()

    def free(self) -> None:
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


def held(path: object) -> FileHold:
    fd = os.open(path, os.O_RDONLY)
    try:
        hold = FileHold(fd, "guest")
    finally:
        os.close(fd)
    asyncio.run(hold.take())
    return hold


# ---------------------------------------------------------------- two movers


def test_second_mover_is_refused_by_any_name(guest, tmp_path):
    (tmp_path / "hard").hardlink_to(guest)
    (tmp_path / "soft").symlink_to("guest")
    with Mover(guest) as first:
        assert first.take() == "held"
        for name in ("guest", "hard", "soft"):
            with Mover(tmp_path / name) as second:
                said = second.take()
                assert f"another program (process {first.process.pid}) is moving it" in said
        first.free()
        with Mover(tmp_path / "hard") as second:
            assert second.take() == "held"


def test_second_mover_is_refused_through_a_bind_mount(guest, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    script = 'mount --bind "$0" "$1" && shift && exec "$@"'
    words = ["unshare", "-m", "sh", "-c", script, str(tmp_path), str(other)]
    with Mover(guest) as first, Mover(other / "guest", *words) as second:
        assert not (other / "guest").exists(), "the mount is in the other namespace alone"
        assert first.take() == "held"
        assert "is moving it" in second.take()


def test_second_mover_is_refused_in_another_pid_namespace(guest):
    with Mover(guest, "unshare", "-p", "-f", "--mount-proc") as first, Mover(guest) as second:
        assert first.take() == "held"
        assert "is moving it" in second.take()
        second.say()
        assert second.read() == "free"
        first.free()
        assert second.take() == "held"
        assert "is moving it" in first.take()


@pytest.mark.parametrize("reader_first", [True, False])
def test_second_mover_is_refused_for_another_user_who_may_only_read(tmp_path, reader_first):
    guest = Path("/dev/shm") / f"hold-{os.getpid()}"
    guest.write_bytes(bytes(4096))
    guest.chmod(0o644)
    as_reader = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    try:
        with Mover(guest, *as_reader) as reader, Mover(guest) as root:
            first, second = (reader, root) if reader_first else (root, reader)
            assert first.take() == "held"
            assert "is moving it" in second.take()
    finally:
        guest.unlink()


def test_sigkill_frees_the_guest(guest):
    with Mover(guest) as first, Mover(guest) as second:
        assert first.take() == "held"
        first.process.kill()
        first.process.wait()
        assert second.take() == "held"


def test_forked_child_does_not_hold_the_guest(guest):
    hold = held(guest)
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        fd = hold._fd
        wait_until(lambda: not os.path.exists(f"/proc/{child}/fd/{fd}"))
        with Mover(guest) as second:
            assert "is moving it" in second.take()
        os.close(fd)  # as when we die: nothing is unlocked by hand
        hold._fd = -1
        with Mover(guest) as second:
            assert second.take() == "held"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_guard_does_not_hold_the_guest(guest):
    """A mover that was killed is dead for the lock, though its guard lives."""
    writer = subprocess.Popen(["sleep", "100"])
    program = (
        "import asyncio, sys\nfrom migrate.guests.file import FileGuest\n"
        "async def main():\n"
        "    guest = FileGuest(sys.argv[1], [int(sys.argv[2])])\n"
        "    await guest.hold()\n    await guest.started()\n"
        "    print('held', flush=True)\n    await asyncio.sleep(100)\nasyncio.run(main())\n"
    )
    mover = subprocess.Popen(
        [sys.executable, "-c", program, str(guest), str(writer.pid)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert mover.stdout is not None
    assert mover.stdout.readline() == "held\n"
    [guard] = children(mover.pid)
    os.kill(guard, signal.SIGSTOP)
    mover.kill()
    mover.communicate()
    try:
        while state(guard) != "T":
            time.sleep(0.005)
        with Mover(guest) as second:
            assert second.take() == "held"
    finally:
        os.kill(guard, signal.SIGKILL)
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("locks", ["", "flock", "lockf", "both"])
def test_of_many_movers_at_once_at_most_one_holds(guest, locks):
    """Also while the guest's program takes and drops locks, which changes the movers' own kind."""
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(Writer(guest, locks))] if locks else []
        movers = [stack.enter_context(Mover(guest)) for _ in range(4)]
        won = 0
        for _ in range(6):
            for mover in movers:
                mover.say()
            said = [mover.read() for mover in movers]
            assert said.count("held") <= 1, said
            won += said.count("held")
            for mover in movers:
                mover.free()
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
def test_writer_with_locks_of_its_own_goes_on_and_a_second_mover_is_refused(guest, locks):
    with Writer(guest, locks) as writer:
        hold = held(guest)
        for _ in range(2):
            writer.goes_on()
            hold.confirm()
            with Mover(guest) as second:
                said = second.take()
                assert "is moving it" in said or "has locked all of it" in said
        hold.confirm()
        hold.close()
        writer.goes_on()


def test_mover_with_the_flock_is_found_when_the_writer_has_dropped_its_lock(guest):
    """The second mover gets the byte, and must not be content with that."""
    with Writer(guest, "keep-lockf"):
        hold = held(guest)
        assert hold._flock
    with Mover(guest) as second:
        assert f"(process {os.getpid()}) is moving it" in second.take()
    hold.close()


def test_flock_of_a_process_that_cannot_be_seen_is_refused(guest):
    with Writer(guest, "keep-flock"):
        with Mover(guest, "unshare", "-p", "-f", "--mount-proc") as mover:
            assert "a process that cannot be seen from here" in mover.take()
        with Mover(guest) as mover:
            assert mover.take() == "held"


def test_writer_with_both_kinds_of_lock_is_refused(guest):
    with Writer(guest, "keep-both"), pytest.raises(UsageError, match="has locked all of it"):
        held(guest)


def test_lock_is_given_up_for_a_writer_that_waits_and_the_commit_fails(guest):
    """It has the flock and now wants the byte: it must not wait for the whole migration."""
    with guest.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        hold = held(guest)
        program = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX)"
        subprocess.run([sys.executable, "-c", program, guest], check=True, timeout=PATIENCE)
        with pytest.raises(MigrationError, match="a program waits for a lock on it"):
            hold.confirm()
        hold.close()


def test_lock_of_this_very_process_survives_the_hold(guest):
    """Closing a descriptor drops a process's fcntl locks on that file."""
    with guest.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1)
        hold = FileHold(file.fileno(), "guest")
        asyncio.run(hold.take())
        hold.close()
        program = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, 6, 1)"
        done = subprocess.run(
            [sys.executable, "-c", program, guest], check=False, capture_output=True
        )
        assert done.returncode, "the lock is gone"


def test_file_system_without_record_locks_is_held_by_flock(guest, monkeypatch):
    monkeypatch.setattr(hold_module.fcntl, "F_OFD_SETLK", 4711)
    hold = held(guest)
    assert "no record locks" in hold.cautions[0]
    with Mover(guest) as second:
        assert "is moving it" in second.take()
    hold.close()


def test_where_the_two_kinds_of_lock_are_one_only_the_byte_is_touched(guest, monkeypatch):
    """A flock there would drop the byte at the server, or meet it."""
    fd = os.open(guest, os.O_RDONLY)
    assert hold_module.file_system(fd) == subprocess.run(
        ["findmnt", "-n", "-o", "FSTYPE", "-T", guest], capture_output=True, text=True, check=True
    ).stdout.strip()  # fmt: skip
    os.close(fd)
    monkeypatch.setattr(hold_module, "file_system", lambda _fd: "nfs4")
    monkeypatch.setattr(hold_module.fcntl, "flock", lambda *_: pytest.fail("a flock was tried"))
    hold = held(guest)
    hold.confirm()
    with Mover(guest) as second:
        assert "is moving it" in second.take()
    hold.close()


# ---------------------------------------------------------------- who holds when


def journals(path: Path) -> list[str]:
    return sorted(os.listdir(path)) if path.exists() else []


@pytest.mark.parametrize("same_journal", [True, False])
def test_of_two_sources_one_moves_the_guest(shm, same_journal):
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
    except OSError:
        pytest.skip("this file system has no user attributes")
    return guest


def test_a_guest_that_has_moved_does_not_move_again_with_another_journal(shm):
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


def test_a_guest_that_a_command_has_paused_moves_again_when_its_mark_is_removed(shm):
    """Nobody can see from outside whether its writer goes on here."""
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


def test_dry_run_and_idle_program_do_not_hold(shm):
    guest = shm / "guest"
    guest.write_bytes(os.urandom(100_000))
    idle = Program("migrate-src", "--guest", f"file:{guest}", "--qmp", f"unix:{shm}/q",
                   "--monitor", f"unix:{shm}/m")  # fmt: skip
    try:
        idle.read_line("idle: ")
        hold = held(guest)
        receiver, address = destination("--output", str(shm / "out"))
        dry = Program("migrate-src", "--dry-run", "--guest", f"file:{guest}", address)
        assert dry.wait() == 0, dry.err
        hold.close()
        assert Program("migrate-src", "--guest", f"file:{guest}", address).wait() == 0
        assert receiver.wait() == 0
    finally:
        idle.kill(signal.SIGTERM)
        idle.wait()


def test_resolve_wakes_nothing_that_another_program_moves(shm):
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
        hold = held(guest)
        refused = Program("migrate-src", *words)
        assert refused.wait() == 2
        assert "is moving it" in refused.err
        assert state(writer.pid) == "T"
        hold.close()
        assert Program("migrate-src", *words).wait() == 0
        wait_until(lambda: state(writer.pid) == "S")
    finally:
        writer.kill()
        writer.wait()


class LostGuest(BufferGuest):
    """Its hold is lost while it moves."""

    given_up = False

    def confirm_hold(self) -> None:
        raise MigrationError("the hold is lost")

    async def give_up(self) -> None:
        self.given_up = True


@pytest.mark.asyncio
async def test_guest_whose_hold_is_lost_is_not_committed():
    found = asyncio.get_running_loop().create_future()
    receiving = asyncio.create_task(receive("127.0.0.1:0", listening=found.set_result))
    port = (await found).port
    guest = LostGuest(bytearray(b"x" * 50_000))
    with pytest.raises(MigrationError, match="the hold is lost"):
        await send(guest, f"tcp:127.0.0.1:{port}")
    assert not guest.given_up
    async with guest.writing():
        pass
    with pytest.raises(MigrationError):
        await receiving
