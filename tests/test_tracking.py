"""The kernel's record of what other processes write: exact, unnoticed by them, or refused."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.guests.file import FileGuest
from migrate.guests.guest_file import GuestFile
from migrate.runtime.processes import start_time_of
from migrate.tracking import _kernel
from migrate.tracking._injection import INSTRUCTION, inject
from migrate.tracking.guest_record import GuestRecord
from migrate.tracking.injector import Injector
from migrate.tracking.mappings import Mapping, mappings_of
from migrate.tracking.record import Refused
from migrate.tracking.tracker import Tracking
from proto.codec.kernel import PageEncoder, PageHashes
from proto.codec.pageset import PageSet
from tests.programs import Program, destination
from tests.recording import PAGE, why_not, written
from tests.requirements import need_root

HERE = Path(__file__).parent / "tracked"
PAGES = 512


pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "the kernel records writes"),
    need_root("trace other processes, and see their mappings"),
]


class Writer:
    """A process that writes the file as it is told to: see tracked/writer.py."""

    def __init__(self, *command: str | Path) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def do(self, what: str = "") -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._read()

    def descriptors(self) -> list[str]:
        return sorted(os.listdir(f"/proc/{self.pid}/fd"))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()


class Guest:
    """The file, and the processes that write it."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(os.urandom(PAGES * PAGE))
        self.path = path
        self.fd = os.open(path, os.O_RDONLY)
        self.file = GuestFile(self.fd)
        self.processes: list[Writer] = []
        self.kernel = ""

    def start(self, *command: str | Path) -> Writer:
        self.processes.append(Writer(*(command or (sys.executable, HERE / "writer.py", self.path))))
        return self.processes[-1]

    def record(self) -> GuestRecord:
        size = PAGES * PAGE
        return GuestRecord(self, self.fd, self.file.name_in_maps, size, PAGE)

    def writers(self) -> list[tuple[int, str]]:
        return [(process.pid, start_time_of(process.pid)) for process in self.processes]

    def kernel_writes(self) -> str:
        return self.kernel

    def contents(self) -> list[bytes]:
        data = self.path.read_bytes()
        return [data[at : at + PAGE] for at in range(0, len(data), PAGE)]


@pytest.fixture
def guest() -> Iterator[Guest]:
    path = Path("/dev/shm") / f"xbmigrate-test-{os.getpid()}"
    guest = Guest(path)
    yield guest
    for process in guest.processes:
        process.end()
    os.close(guest.fd)
    path.unlink()


# -- what is recorded


def test_the_record_names_exactly_the_written_pages(guest: Guest) -> None:
    writer = guest.start()
    record = guest.record()
    assert written(record, PAGES) == (set(), "")
    for pages in ({0}, {7, 8, 9, PAGES - 1}, set(range(0, PAGES, 3)), set(range(PAGES)), set()):
        for page in pages:
            writer.do(f"write {page}")
        assert written(record, PAGES) == (pages, "")
    record.close()


def test_a_write_by_the_kernel_into_the_mapping_is_recorded(guest: Guest) -> None:
    writer = guest.start()
    record = guest.record()
    writer.do("read 40")
    assert written(record, PAGES) == ({40}, "")
    record.close()


def test_pages_given_back_and_read_again_are_not_lost(guest: Guest) -> None:
    writer = guest.start()
    record = guest.record()
    writer.do("write 3")
    writer.do("advise")
    writer.do("write 5")
    assert written(record, PAGES)[0] >= {3, 5}
    writer.do("advise")
    writer.do("write 6")
    assert written(record, PAGES)[0] >= {6}
    record.close()


def test_several_processes_are_recorded(guest: Guest) -> None:
    writers = [guest.start() for _ in range(3)]
    record = guest.record()
    for page, writer in enumerate(writers):
        writer.do(f"write {page}")
    assert written(record, PAGES) == ({0, 1, 2}, "")
    record.close()


def test_a_bigger_page_is_dirty_if_any_part_of_it_was_written(guest: Guest) -> None:
    writer = guest.start()
    size = PAGES * PAGE
    record = GuestRecord(guest, guest.fd, guest.file.name_in_maps, size, 4 * PAGE)
    for page in (3, 4, PAGES - 1):
        writer.do(f"write {page}")
    assert written(record, PAGES // 4)[0] == {0, 1, PAGES // 4 - 1}
    record.close()


# -- what the record cannot see


@pytest.mark.parametrize(
    "steps",
    [["brief 9"], ["fork 9"], ["map", "write2 9"], ["map", "write2 9", "unmap"],
     ["move", "write 9"], ["pwrite 9"]],
    ids=" ".join,
)  # fmt: skip
def test_what_is_written_in_another_way_is_named_or_asks_for_a_comparison(
    guest: Guest, steps: list[str]
) -> None:
    writer = guest.start()
    record = guest.record()
    for step in steps:
        writer.do(step)
    pages, happened = written(record, PAGES)
    assert 9 in pages or happened
    assert happened, "and the guest is compared, since more may have been written"
    record.close()


@pytest.mark.parametrize("steps", [["map"], ["move"]], ids=" ".join)
def test_a_new_mapping_is_recorded_from_the_next_look_on(guest: Guest, steps: list[str]) -> None:
    writer = guest.start()
    record = guest.record()
    for step in steps:
        writer.do(step)
    assert written(record, PAGES)[1]
    writer.do("write2 9" if steps == ["map"] else "write 9")
    assert written(record, PAGES) == ({9}, "")
    record.close()


def test_a_process_that_comes_later_is_recorded_after_one_comparison(guest: Guest) -> None:
    guest.start()
    record = guest.record()
    late = guest.start()
    late.do("write 3")
    assert written(record, PAGES)[1]
    late.do("write 4")
    assert written(record, PAGES) == ({4}, "")
    record.close()


def test_a_child_that_writes_after_its_fork_was_noticed_is_not_forgotten(guest: Guest) -> None:
    """It has ended by the next look, and nothing but its fork ever told of it."""
    writer = guest.start()
    record = guest.record()
    writer.do("spawn")
    assert "forked" in written(record, PAGES)[1]
    writer.do("child 9")
    assert "forked" in written(record, PAGES)[1]
    assert written(record, PAGES) == (set(), "")
    record.close()


def test_a_process_that_nobody_knows_is_noticed(guest: Guest) -> None:
    """It writes and ends between two looks, and no look at /proc ever shows it."""
    guest.start()
    record = guest.record()
    stranger = Writer(sys.executable, HERE / "writer.py", guest.path)
    stranger.do("write 3")
    stranger.end()
    assert written(record, PAGES)[1]
    record.close()


def test_a_process_that_ends_asks_for_a_comparison(guest: Guest) -> None:
    guest.start()
    ends = guest.start()
    record = guest.record()
    ends.do("write 3")
    ends.end()
    assert written(record, PAGES)[1]
    assert written(record, PAGES) == (set(), "")
    record.close()


def test_a_writer_by_descriptor_ends_the_record(guest: Guest) -> None:
    writer = guest.start()
    record = guest.record()
    writer.do("pwrite 3")
    assert "descriptor" in written(record, PAGES)[1]
    writer.do("pwrite 4")
    with pytest.raises(Refused, match="descriptor"):
        record.look(PageSet(PAGES))
    record.close()


def test_a_mapping_made_again_and_again_ends_the_record(guest: Guest) -> None:
    writer = guest.start()
    record = guest.record()

    def look_on() -> None:
        for _ in range(10):
            writer.do("brief 1")
            record.look(PageSet(PAGES))

    with pytest.raises(Refused, match="again and again"):
        look_on()
    record.close()


# -- what is refused


def test_a_guest_without_a_mapping_is_refused(guest: Guest) -> None:
    with pytest.raises(Refused, match="no process has the guest mapped"):
        guest.record()


def test_a_guest_that_the_kernel_writes_is_refused(guest: Guest) -> None:
    guest.start()
    guest.kernel = "the loop device /dev/loop7"
    with pytest.raises(Refused, match="/dev/loop7 writes it without a mapping"):
        guest.record()


def test_a_traced_process_is_refused_by_name(guest: Guest) -> None:
    writer = guest.start()
    tracer = subprocess.Popen(
        [sys.executable, "-c",
         "import ctypes, sys, time; c = ctypes.CDLL(None);"
         f"assert c.ptrace(0x4206, {writer.pid}, None, None) == 0; print('on', flush=True);"
         "sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with tracer:
        assert tracer.stdout is not None
        tracer.stdout.readline()
        with pytest.raises(Refused, match=rf"python3? \({tracer.pid}\) traces it"):
            guest.record()
        assert tracer.stdin is not None
        tracer.stdin.close()
    guest.record().close()


def test_a_process_with_a_filter_for_system_calls_is_refused(guest: Guest) -> None:
    """Its filter may end a process that makes a call which it never makes by itself."""
    program = f"""
import ctypes, runpy, struct, sys
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
allow = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))
header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 1, ctypes.addressof(allow)))
assert libc.prctl(22, 2, header, 0, 0) == 0
sys.argv[1:] = [{str(guest.path)!r}]
runpy.run_path({str(HERE / "writer.py")!r}, run_name="__main__")
"""
    guest.start(sys.executable, "-c", program)
    with pytest.raises(Refused, match="seccomp"):
        guest.record()


# A writer of which one thread has filtered its own system calls; it is busy, the first one waits.
FILTERED_THREAD = """
import ctypes, mmap, os, struct, sys, threading
fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, 0)
libc = ctypes.CDLL(None)
ready = threading.Event()
def filtered():
    libc.prctl(38, 1, 0, 0, 0)
    # userfaultfd(2) kills the process, all else is allowed
    code = struct.pack("HBBI", 0x20, 0, 0, 0) + struct.pack("HBBI", 0x15, 0, 1, NUMBER)
    code += struct.pack("HBBI", 6, 0, 0, 0x80000000) + struct.pack("HBBI", 6, 0, 0, 0x7FFF0000)
    words = ctypes.create_string_buffer(code)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(words)))
    assert libc.prctl(22, 2, header, 0, 0) == 0
    ready.set()
    while True:
        pass
threading.Thread(target=filtered, daemon=True).start()
ready.wait()
print("ready", flush=True)
for line in sys.stdin:
    print("done", flush=True)
"""
USERFAULTFD = {"x86_64": 323, "aarch64": 282}


def test_a_thread_with_a_filter_is_not_used(guest: Guest) -> None:
    """The filter of a thread shows in that thread's status alone."""
    number = USERFAULTFD[os.uname().machine]
    program = FILTERED_THREAD.replace("NUMBER", str(number))
    writer = guest.start(sys.executable, "-c", program, guest.path)
    with contextlib.suppress(Refused):
        guest.record().close()
    assert writer.do() == "done"


def _inject(pid: int, thread: int, users: bytes, at: int) -> None:
    handle = os.pidfd_open(pid)
    try:
        fd, _ = inject(pid, thread, handle, users, at, 0, 1.0)
        os.close(fd)
    finally:
        os.close(handle)


def test_a_thread_that_is_not_what_was_seen_is_let_go(guest: Guest) -> None:
    """Its number may be another process's by now, and its memory another program's."""
    one, other = guest.start(), guest.start()
    users = b"\t".join([str(os.getuid()).encode()] * 4)
    maps = Path(f"/proc/{one.pid}/maps").read_bytes().splitlines()
    (vdso,) = [int(line.split(b"-")[0], 16) for line in maps if line.endswith(b"[vdso]")]
    with open(f"/proc/{one.pid}/mem", "rb", buffering=0) as code:
        code.seek(vdso)
        at = vdso + code.read(PAGE).index(INSTRUCTION)
    for pid, thread, who, where, reason in (
        (one.pid, other.pid, users, at, errno.ESRCH),
        (one.pid, one.pid, b"1\t1\t1\t1", at, errno.ESTALE),
        (one.pid, one.pid, users, at + 1, errno.ESTALE),
    ):
        with pytest.raises(OSError, match=os.strerror(reason)):
            _inject(pid, thread, who, where)
        assert one.do("write 1") == other.do("write 1") == "done"
    _inject(one.pid, one.pid, users, at)


STORM = """
#include <sys/mman.h>
int main(void)
{
    for (int i = 0; i < 400000; i++)
        munmap(mmap(0, 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 4096);
    return 0;
}
"""


def test_mappings_of_others_in_great_number_hide_nothing(guest: Guest, tmp_path: Path) -> None:
    """Any user can make them."""
    (tmp_path / "storm.c").write_text(STORM)
    subprocess.run(["gcc", "-O2", "-w", tmp_path / "storm.c", "-o", tmp_path / "storm"], check=True)
    writer = guest.start()
    record = guest.record()
    subprocess.run([tmp_path / "storm"], check=True)
    assert written(record, PAGES) == (set(), "")
    writer.do("brief 9")
    assert "mapped the guest" in written(record, PAGES)[1]
    record.close()


def test_readers_of_the_guest_cause_no_comparison(guest: Guest) -> None:
    guest.start()
    record = guest.record()
    for _ in range(10):
        with guest.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
            assert written(record, PAGES) == (set(), "")
    record.close()


@pytest.mark.parametrize(("tracking", "said"), [(Tracking.KERNEL, True), (Tracking.AUTO, False)])
@pytest.mark.asyncio
async def test_a_guest_that_nothing_stops_is_compared_and_that_is_said(
    guest: Guest, tracking: Tracking, said: bool
) -> None:
    """In auto nothing is said: without a pause it does not matter how long a comparison takes."""
    file = FileGuest(str(guest.path), tracking=tracking)
    try:
        encoder = PageEncoder(PageHashes(PAGES, PAGE, bytes(16)))
        tracker = file.track(encoder, lambda: 1e-9)
        tracker.start()
        tracker.take()
        text = " ".join(tracker.collect_notices())
        assert ("nothing stops them: name them by --pid" in text) is said
        assert bool(text) is said
        tracker.close()
    finally:
        await file.close()


def test_a_process_that_has_ended_is_no_writer(guest: Guest) -> None:
    guest.start()
    guest.start().end()
    record = guest.record()
    assert record.pids == (guest.processes[0].pid,)
    record.close()


# -- what the writer notices


@pytest.fixture(scope="session")
def threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("tracked") / "threads"
    subprocess.run(["gcc", "-O2", "-w", "-pthread", HERE / "threads.c", "-o", program], check=True)
    return program


@pytest.mark.parametrize(
    "cycles",
    [pytest.param(50, id="50"), pytest.param(1000, marks=pytest.mark.exhaustive, id="1000")],
)
def test_sixteen_threads_notice_nothing(guest: Guest, threads: Path, cycles: int) -> None:
    """They sleep, read, compute, wait for futexes and signals, and check what they get back."""
    writer = guest.start(threads, guest.path, "2")
    before, injector = writer.descriptors(), Injector()
    for _ in range(cycles):
        fd, _ = injector.userfaultfd(writer.pid, start_time_of(writer.pid))
        _kernel.negotiate(fd)
        for mapping in mappings_of(writer.pid, guest.file.name_in_maps, PAGES * PAGE):
            _kernel.protect(fd, mapping.start, mapping.end - mapping.start)
        os.close(fd)
    time.sleep(1.2)  # the longest sleep of a thread
    assert writer.do().startswith("ok")
    assert writer.descriptors() == before
    injector.close()


def _is_protected(pid: int, mapping: Mapping) -> bool:
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    try:
        _kernel.collect(pagemap, mapping.start, mapping.end, 0, PAGE, bytearray(8), 0)
    except PermissionError:
        return False
    finally:
        os.close(pagemap)
    return True


def test_nothing_stays_behind_when_the_source_is_killed(guest: Guest) -> None:
    writer = guest.start()
    before = writer.descriptors()
    program = f"""
import os, sys
sys.path.insert(0, {str(HERE.parent.parent)!r})
from tests.test_tracking import Guest
class Known(Guest):
    def __init__(self): pass
    def writers(self): return {guest.writers()!r}
from migrate.guests.guest_file import GuestFile
from migrate.memory.dirty import Method
from migrate.memory.memory import Memory
from migrate.tracking.guest_record import GuestRecord
fd = os.open({str(guest.path)!r}, os.O_RDONLY)
known = Known(); known.kernel = ""
record = GuestRecord(known, fd, GuestFile(fd).name_in_maps, {PAGES * PAGE}, {PAGE})
print("recording", flush=True)
sys.stdin.read()
"""
    source = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with source:
        assert source.stdout is not None
        assert source.stdout.readline() == b"recording\n"
        (mapping,) = mappings_of(writer.pid, guest.file.name_in_maps, PAGES * PAGE)
        assert _is_protected(writer.pid, mapping)
        source.kill()
    assert not _is_protected(writer.pid, mapping)
    assert writer.descriptors() == before
    assert writer.do("write 3") == "done"


# -- whole migrations

BUSY = """
import mmap, os, random, sys, time
path, kinds = sys.argv[1:]
fd = os.open(path, os.O_RDWR)
size = os.fstat(fd).st_size
memory = mmap.mmap(fd, size)
print("ready", flush=True)
while True:
    for _ in range(200):
        at = random.randrange(size)
        memory[at] = random.randrange(256)
    if "fork" in kinds and not (child := os.fork()):
        for _ in range(20):
            memory[random.randrange(size)] = random.randrange(256)
        os._exit(0)
    elif "fork" in kinds:
        os.waitpid(child, 0)
    if "pwrite" in kinds:
        os.pwrite(fd, os.urandom(100), random.randrange(size - 100))
    if "map" in kinds:
        second = mmap.mmap(fd, size)
        second[random.randrange(size)] = random.randrange(256)
        second.close()
    time.sleep(0.001)
"""


@pytest.mark.programs
@pytest.mark.parametrize("kinds", ["", "fork", "pwrite", "map", "fork,pwrite,map"])
def test_a_busy_guest_arrives_whole(shm: Path, kinds: str) -> None:
    (shm / "guest").write_bytes(os.urandom(48 << 20))
    writer = Writer(sys.executable, "-c", BUSY, shm / "guest", kinds)
    try:
        receiver, address = destination("--output", str(shm / "out"), "--journal", str(shm / "j"))
        source = Program(
            "migrate-src", "--guest", f"file:{shm}/guest", "--pid", "auto", "--tracking", "kernel",
            "--max-bandwidth", "100m", "--journal", str(shm / "k"), "--downtime-limit", "3s",
            address,
        )  # fmt: skip
        assert source.wait() == 0, source.err
        assert receiver.wait() == 0
        assert (shm / "guest").read_bytes() == (shm / "out").read_bytes()
        if not kinds:
            assert "the kernel records what" in source.err
            assert "dirty tracking: kernel" in source.out
    finally:
        writer.end()


def dry_run(guest: Guest, *words: str) -> Program:
    """Return the source of a dry run that has ended well."""
    receiver, address = destination("--output", f"{guest.path}.out")
    source = Program(
        "migrate-src", "--dry-run", "--guest", f"file:{guest.path}", "--tracking", "kernel",
        *words, address,
    )  # fmt: skip
    try:
        assert source.wait() == 0, source.err
    finally:
        receiver.end()
    return source


PAUSES = ("--pause-cmd", "true", "--resume-cmd", "true")


@pytest.mark.programs
@pytest.mark.parametrize("words", [("--pid", "auto"), PAUSES], ids=lambda words: words[0])
def test_dry_run_predicts_with_the_record_and_touches_no_writer(
    guest: Guest, words: tuple[str, ...]
) -> None:
    writer = guest.start()
    before = writer.descriptors()
    source = dry_run(guest, *words)
    (mapping,) = mappings_of(writer.pid, guest.file.name_in_maps, PAGES * PAGE)
    assert not _is_protected(writer.pid, mapping)
    assert writer.descriptors() == before
    assert "predicted dirty tracking: kernel" in source.out, source.err


@pytest.mark.programs
def test_dry_run_says_why_there_would_be_no_record(guest: Guest) -> None:
    source = dry_run(guest, *PAUSES)
    assert "record of writes could not be used: no process has the guest mapped" in source.err
    assert "predicted dirty tracking: compare" in source.out
