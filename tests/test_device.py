"""Block devices: read as they are, whatever is in a cache, and locked by one migration."""

import asyncio
import contextlib
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.errors import UsageError
from migrate.guests import moved_mark, opened_file
from migrate.guests.device import BLKSSZGET, mounts_of, number_of, open_direct
from migrate.guests.file import FileGuest
from migrate.memory.memory import Memory, private_buffer
from migrate.runtime.processes import start_time_of, state
from proto.codec.pageset import PageSet
from tests.programs import Program, destination
from tests.requirements import need

pytestmark = pytest.mark.programs

ROOT = Path(__file__).parent.parent
MIB = 1 << 20


def run(*words: object) -> str:
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True).stdout


class Loop:
    """A loop device over a new file."""

    def __init__(self, path: Path, size: int, *words: str) -> None:
        need(os.geteuid() == 0 and shutil.which("losetup"), "root and losetup, for a block device")
        self.image = path
        path.write_bytes(random.Random(size).randbytes(size))
        self.path = run("losetup", "-f", "--show", *words, path).strip()
        self.mounted = path.with_name("mounted")

    def mount(self) -> Path:
        need(shutil.which("mkfs.ext4"), "mkfs.ext4")
        run("mkfs.ext4", "-q", "-F", self.path)
        self.mounted.mkdir()
        run("mount", self.path, self.mounted)
        return self.mounted

    def close(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            run("umount", self.mounted)
        run("losetup", "-d", self.path)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    one = Loop(tmp_path / "image", 16 * MIB)
    yield one
    one.close()


def content(memory: Memory) -> bytes:
    buffer = private_buffer(memory.size)
    assert memory.read(0, buffer) == memory.size
    return bytes(buffer)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("block", [512, 4096])
@pytest.mark.parametrize("page_size", [1024, 4096, 16384])
@pytest.mark.parametrize("sparse", [False, True])
def test_device_is_read_past_the_cache_in_pages_of_any_size(tmp_path, block, page_size, sparse):
    """Its size is no multiple of the page, and runs of pages begin anywhere."""
    size = MIB + 3 * 4096
    loop = Loop(tmp_path / "image", size, "-b", str(block))
    try:
        guest = FileGuest(loop.path)
        assert guest.memory.align == block
        assert fcntl.fcntl(guest.memory.fd, fcntl.F_GETFL) & os.O_DIRECT
        whole = loop.image.read_bytes()
        assert content(guest.memory) == whole
        pages = -(-size // page_size)
        dirty = PageSet.full(pages)
        if sparse:
            chosen = random.Random(7).sample(range(pages), pages // 3)
            dirty = PageSet(pages)
            for page in {*chosen, pages - 1}:
                dirty.bits[page >> 3] |= 1 << (page & 7)
        for skip in (0, 1, 512):  # the snapshot need not be aligned
            space = private_buffer(64 * page_size + 512)[skip : skip + 64 * page_size]
            numbers = memoryview(array("Q", bytes(8 * 64)))
            page = found = 0
            while page < pages:
                count, page = guest.memory.gather(
                    dirty.bits, page, pages, page_size, space, numbers
                )
                for index in range(count):
                    at = numbers[index] * page_size
                    wanted = whole[at : at + page_size].ljust(page_size, b"\0")
                    assert space[index * page_size : (index + 1) * page_size] == wanted
                found += count
            assert found == len(dirty)
        for offset, length in ((0, 512), (1024, 1024), (size - 512, 512), (size - 512, 4096)):
            into = private_buffer(4096)[:length]
            assert guest.memory.read(offset, into) == min(length, size - offset)
            assert bytes(into[: size - offset]) == whole[offset : offset + length]
        asyncio.run(guest.close())
    finally:
        loop.close()


def test_frozen_file_system_is_read_as_it_is_on_the_device(loop):
    """It does not write through the device's page cache, which may hold older content."""
    mounted = loop.mount()
    guest = FileGuest(loop.path, (), "true", "true")
    file = mounted / "file"
    for number in range(3):
        file.write_bytes(bytes([number + 1]) * 3 * MIB)
        run("fsfreeze", "-f", mounted)
        try:
            assert content(guest.memory) == loop.image.read_bytes()
        finally:
            run("fsfreeze", "-u", mounted)
    asyncio.run(guest.close())


def test_mounted_device_arrives_as_it_was_frozen(loop, shm):
    mounted = loop.mount()
    writer = subprocess.Popen(
        [sys.executable, "-c",
         "import os, sys\nf = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\nn = 0\nwhile True:\n"
         "    n += 1\n    os.pwrite(f, b'%08d' % n * 512, 4096 * (n % 1500))\n"
         "    n % 20 or os.fsync(f)\n", str(mounted / "file")],
    )  # fmt: skip
    receiver, address = destination("--output", str(shm / "out"))
    try:
        source = Program(
            "migrate-src", "--guest", f"file:{loop.path}", "--pause-cmd", f"fsfreeze -f {mounted}",
            "--resume-cmd", f"fsfreeze -u {mounted}", "--max-bandwidth", "20m",
            "--downtime-limit", "5s", address,
        )  # fmt: skip
        code = source.wait()
        assert (code, receiver.wait()) == (0, 0), source.err
        assert "freeze it" not in source.err
        assert (shm / "out").read_bytes() == loop.image.read_bytes()
    finally:
        writer.kill()
        run("fsfreeze", "-u", mounted)
        writer.wait()


def test_unfrozen_mounted_device_causes_a_warning(loop):
    mounted = loop.mount()
    for words, warned in ((((), "", ""), 1), (((), "true", "true"), 0)):
        guest = FileGuest(loop.path, *words)
        asyncio.run(guest.lock())
        assert len(guest.cautions) == warned
        for caution in guest.cautions:
            assert f"mounted at {mounted} and writes to it: freeze it" in caution
        asyncio.run(guest.close())
    run("mount", "-o", "remount,ro", mounted)
    guest = FileGuest(loop.path)
    asyncio.run(guest.lock())
    assert not guest.cautions
    asyncio.run(guest.close())


def test_mounted_device_without_direct_reads_is_refused(loop, monkeypatch):
    def refuse(_fd: int) -> tuple[int, int]:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(opened_file, "open_direct", refuse)
    guest = FileGuest(loop.path)
    assert (guest.memory.align, content(guest.memory)) == (0, loop.image.read_bytes())
    asyncio.run(guest.close())
    loop.mount()
    with pytest.raises(UsageError, match="a file system is mounted on it, and it cannot be read"):
        FileGuest(loop.path)


def test_block_device_as_an_output_is_refused_in_words(loop):
    for more in ((), ("--overwrite",)):
        refused = Program("migrate-dst", "--listen", "0", "--output", loop.path,
                          *more)  # fmt: skip
        assert refused.wait() == 2
        assert "it is a block device, and a guest arrives in a file" in refused.err


# ---------------------------------------------------------------- locking

MIGRATION = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
from migrate.errors import UsageError
from migrate.guests.file import FileGuest
try:
    guest = FileGuest(sys.argv[1])
    asyncio.run(guest.lock())
    guest.confirm_lock()
    print("locked", flush=True)
    sys.stdin.readline()
except UsageError as error:
    print(error, flush=True)
"""


@contextlib.contextmanager
def migration(path: object, *words: str) -> Iterator[str]:
    """Run a migration that locks the device, and is killed at the end; yield its output."""
    process = subprocess.Popen(
        [*words, sys.executable, "-c", MIGRATION, str(path), str(ROOT)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


OTHER_SYSFS = ["unshare", "-n", "-m", "sh", "-c", 'mount -t sysfs none /sys; exec "$@"', "sh"]


@pytest.mark.parametrize("mounted", [False, True])
@pytest.mark.parametrize("apart", [(), OTHER_SYSFS], ids=["", "container"])
def test_second_migration_of_a_device_is_refused_by_any_node(loop, tmp_path, mounted, apart):
    if mounted:
        loop.mount()
    fd = os.open(loop.path, os.O_RDONLY)
    node = tmp_path / "node"
    os.mknod(node, 0o60600, os.fstat(fd).st_rdev)
    os.close(fd)
    for first, second in ((loop.path, node), (node, loop.path)):
        with migration(first) as said:
            assert said == "locked"
            with migration(second, *apart) as other:
                assert "is moving it" in other or "has claimed it" in other
        with migration(second, *apart) as said:
            assert said == "locked", "the first was killed"
            with migration(first) as other:
                assert "is moving it" in other or "has claimed it" in other


@pytest.mark.parametrize("mounted", [False, True])
def test_disk_and_its_partition_are_not_moved_at_once(tmp_path, mounted):
    need(shutil.which("addpart"), "addpart (util-linux)")
    loop = Loop(tmp_path / "image", 16 * MIB, "-P")
    try:
        for number in (1, 2):
            run("addpart", loop.path, number, 8192 * number, 8192)
        one, two = f"{loop.path}p1", f"{loop.path}p2"
        if mounted:
            run("mkfs.ext4", "-q", "-F", one)
            loop.mounted.mkdir()
            run("mount", one, loop.mounted)
            fd = os.open(loop.path, os.O_RDONLY)
            assert [mount.point for mount in mounts_of(number_of(fd))] == [str(loop.mounted)]
            os.close(fd)
        for first, second in ((loop.path, one), (one, loop.path), (loop.path, two)):
            with migration(first) as said:
                assert said == "locked"
                with migration(second) as other:
                    assert "is moving it" in other or "has claimed it" in other
        with migration(one) as said, migration(two) as other:
            assert (said, other) == ("locked", "locked")
    finally:
        loop.close()


def test_file_moves_once_by_loop_device_or_name(tmp_path):
    """Two loop devices on it are two devices to the kernel."""
    loop = Loop(tmp_path / "image", 16 * MIB)
    opened = []

    def also(*words: object) -> str:
        opened.append(run("losetup", "-f", "--show", *words).strip())
        return opened[-1]

    try:
        same = also(loop.image)
        first, second = also("--sizelimit", 4 * MIB, loop.image), also("-o", 4 * MIB, loop.image)
        above = also(same)
        for one, two in (
            (loop.path, same), (same, loop.path), (first, same), (same, second), (above, loop.path),
            (loop.path, above), (above, same), (same, above), (loop.path, loop.image),
            (loop.image, loop.path),
        ):  # fmt: skip
            with migration(one) as said:
                assert said == "locked", (one, two)
                with migration(two) as other:
                    assert "is moving it" in other or "has claimed it" in other, (one, two)
        with migration(first) as said, migration(second) as other:
            assert (said, other) == ("locked", "locked")
    finally:
        for device in reversed(opened):
            run("losetup", "-d", device)
        loop.close()


def test_loop_device_without_its_file_is_locked_alone_with_a_warning(loop):
    loop.image.unlink()
    guest = FileGuest(loop.path)
    asyncio.run(guest.lock())
    assert "cannot be opened from here, so it is not locked" in guest.cautions[0]
    guest.confirm_lock()
    asyncio.run(guest.close())


def test_claimed_device_is_refused_unless_by_named_writer(loop):
    program = (
        "import os, sys\nos.open(sys.argv[1], os.O_RDONLY | os.O_EXCL)\nprint(flush=True)\n"
        "sys.stdin.readline()\n"
    )
    claiming = subprocess.Popen(
        [sys.executable, "-c", program, loop.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert claiming.stdout is not None
    claiming.stdout.readline()
    with migration(loop.path) as said:
        assert f"has claimed it for itself (open in process {claiming.pid})" in said
    guest = FileGuest(loop.path, [claiming.pid])
    asyncio.run(guest.lock())
    asyncio.run(guest.close())
    claiming.communicate()


def test_moved_device_is_refused_while_its_writer_is_stopped(loop):
    writer = subprocess.Popen(["sleep", "100"])
    fd = os.open(loop.path, os.O_RDONLY)
    try:
        moved_mark.mark(fd, [(writer.pid, start_time_of(writer.pid))])
        moved_mark.refuse_if_moved(fd, "guest")
        writer.send_signal(signal.SIGSTOP)
        while state(writer.pid) != "T":
            time.sleep(0.01)
        with pytest.raises(UsageError, match="handed over to another machine"):
            moved_mark.refuse_if_moved(fd, "guest")
        moved_mark.unmark(fd)
        moved_mark.refuse_if_moved(fd, "guest")
    finally:
        os.close(fd)
        writer.kill()
        writer.wait()


def test_alignment_is_that_of_the_device(loop):
    fd = os.open(loop.path, os.O_RDONLY)
    direct, align = open_direct(fd)
    assert align == int.from_bytes(fcntl.ioctl(fd, BLKSSZGET, bytes(4)), "little") == 512
    os.close(fd)
    os.close(direct)
