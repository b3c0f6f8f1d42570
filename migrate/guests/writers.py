"""Who can write the guest: every process, and the kernel itself, by inode and never by name.

    Census(fd).look()            everything: all of /proc
    Census(fd).look_at_new()     only what was started since the last look: a millisecond or two

A process is a writer if it has the inode open for writing, or mapped shared from a file that was
open for writing (with a read-only mapping too: mprotect(2) asks nobody). Threads are looked at one
by one where they do not share their table of open files. Other names of the file, bind mounts and
mount namespaces make no difference: /proc/PID/fd leads to the inode itself, and /proc/PID/maps
names it by device and inode. (Those numbers are not always those of stat(2), on btrfs and overlayfs
for example, so we map the file ourselves and read what the kernel calls it there.)

Reading all of /proc/PID/maps is what costs: 160 ms for 526 processes, of 190 for a whole look (AMD
EPYC, 2 cores). A further look reads the maps of those processes only whose size has changed since
they were looked at, since a new mapping changes it; that takes 35 ms. A look at what is new takes
two: it compares the inodes of /proc/PID, which differ when a number is given to another process.

What no look shows: files in flight in a socket, or registered with io_uring. The kernel counts
those too: a read lease is refused while anything at all has the file open for writing
(`open_for_writing`), but it does not say how many have.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import platform
import re
import signal
import stat
import struct
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from migrate.guests import process
from migrate.guests.hold import MARK

WRITABLE = 0o200  # of the links in /proc/PID/fd and map_files: how the file was opened
KCMP_FILES = 2
KCMP_NUMBERS = {"x86_64": 312, "aarch64": 272, "riscv64": 272, "ppc64le": 354, "s390x": 343}
LOOP_GET_STATUS64 = 0x4C05
LOOP_STATUS = struct.Struct("=5Q4I64s64s32s2Q")
LOOP_READ_ONLY = 1
INITIAL_PID_NAMESPACE = "pid:[4026531836]"
MAX_NAMED = 5
RECENT = 5
F_SETSIG = getattr(fcntl, "F_SETSIG", 10)
SHARED = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) .(.).s ")
HIDDEN = re.compile(r"hidepid=(2|4|invisible|ptraceable)")
ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Writer:
    """A process that can write the guest; `name` is printable."""

    pid: int
    born: str
    name: str

    def __str__(self) -> str:
        return f"{self.pid} ({self.name})"


@dataclass(frozen=True)
class _Seen:
    """What a look has found of a process: which it was, how large, and whether it can write; or
    that it may not be looked into (`hidden`)."""

    inode: int
    size: str = ""
    maps: bool = False
    writer: Writer | None = None
    hidden: bool = False


def named(writers: list[Writer]) -> str:
    """Some of them, for a sentence."""
    some = ", ".join(map(str, writers[:MAX_NAMED]))
    more = len(writers) - MAX_NAMED
    text = f"process {some}" if len(writers) == 1 else f"processes {some}"
    return f"{text} and {more} more" if more > 0 else text


def printable(name: bytes) -> str:
    """The bytes of a name as text that no terminal obeys."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def command_name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", "rb") as name:
            return printable(name.read().rstrip(b"\n"))
    except OSError:
        return "?"


class Target:
    """The file or block device behind `fd`, as processes have it open or mapped."""

    def __init__(self, fd: int) -> None:
        here = os.fstat(fd)
        self.fd = fd
        self.block = stat.S_ISBLK(here.st_mode)
        self.key = (here.st_dev, here.st_ino)
        self.device = here.st_rdev
        self.held = False
        """Whether another program was seen to hold it for a migration."""
        # A block device has many nodes, so no one name in /proc/PID/maps.
        self._name = b"" if self.block else _name_in_maps(fd, self.key)

    def is_at(self, link: str) -> bool:
        """Whether a link in /proc leads here. Raises OSError."""
        return self.matches(os.stat(link))

    def matches(self, there: os.stat_result) -> bool:
        if self.block:
            return stat.S_ISBLK(there.st_mode) and there.st_rdev == self.device
        return there.st_ino == self.key[1] and there.st_dev == self.key[0]

    def open_in(self, folder: str) -> bool:
        """Whether it is open for writing in a folder of /proc like /proc/PID/fd."""
        table = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in os.listdir(table):
                try:
                    there = os.stat(name, dir_fd=table)
                    if self.matches(there):
                        link = os.stat(name, dir_fd=table, follow_symlinks=False)
                        if link.st_mode & WRITABLE and not self._is_hold(f"{folder}info/{name}"):
                            return True
                except (FileNotFoundError, ProcessLookupError):
                    continue  # it was closed meanwhile
            return False
        finally:
            os.close(table)

    def _is_hold(self, info: str) -> bool:
        """Whether a descriptor is a mover's lock, which writes nothing: see hold.py."""
        with contextlib.suppress(OSError, ValueError), open(info) as file:
            if int(file.readline().split()[1]) == MARK:
                self.held = True
                return True
        return False

    def mapped_in(self, base: str) -> bool:
        """Whether a process can write here through a mapping; `base` is its folder in /proc."""
        with open(f"{base}/maps", "rb") as file:
            maps = file.read()
        if self._name not in maps:
            return False
        return any(
            self._name in line and self._writes(base, *found.groups())
            for line in maps.splitlines()
            if (found := SHARED.match(line))
        )

    def _writes(self, base: str, first: bytes, end: bytes, write: bytes) -> bool:
        link = f"{base.partition('/task/')[0]}/map_files/{int(first, 16):x}-{int(end, 16):x}"
        here = not self.block
        # Only for the main thread, and for who may: else the name in the maps is all there is.
        with contextlib.suppress(OSError):
            here = self.is_at(link)
        if not here:
            return False
        if write == b"w":
            return True
        with contextlib.suppress(OSError):
            return bool(os.lstat(link).st_mode & WRITABLE)
        return False


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


def _name_in_maps(fd: int, key: tuple[int, int]) -> bytes:
    """What /proc/PID/maps calls the file behind `fd`: device, inode."""
    libc = _libc()
    address = libc.mmap(None, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    try:
        if address is not None and address != ctypes.c_void_p(-1).value:
            with contextlib.suppress(OSError), open("/proc/self/maps", "rb") as maps:
                for line in maps:
                    first, _, end = line.split()[0].partition(b"-")
                    if int(first, 16) <= address < int(end, 16):
                        return b" " + b" ".join(line.split()[3:5]) + b" "
    finally:
        if address is not None and address != ctypes.c_void_p(-1).value:
            libc.munmap(address, mmap.PAGESIZE)
    return f" {os.major(key[0]):02x}:{os.minor(key[0]):02x} {key[1]} ".encode()


class Census:
    """The writers of one guest among all processes but this one.

    blind  -- why no process can be seen at all, or ""
    unseen -- how many processes the last look was not allowed to look into, or saw the open files
              of alone; process 1 is not counted here but in `init_unseen`
    seconds, new_seconds -- of the processor, for a further look, and for one at what is new
    """

    def __init__(self, fd: int, but: int = 0) -> None:
        """`but` is another process that is none of the writers."""
        self.target = Target(fd)
        self._but = {os.getpid(), but}
        self.unseen, self.init_unseen = 0, False
        self.seconds = self.new_seconds = 0.0
        self._recent: collections.deque[float] = collections.deque(maxlen=RECENT)
        self.blind = _blindness()
        self._known: dict[int, _Seen] = {}

    def look(self, over: Callable[[], bool] = lambda: False) -> list[Writer]:
        """Looks at all processes; returns the writers.

        over -- asked between two processes whether the answer is of any use still; where it is
                not, nothing of this look is remembered
        """
        began = time.process_time()
        known: dict[int, _Seen] = {}
        before = self._known
        for pid in self._pids():
            if over():
                return []
            if seen := self._examine(pid, before.get(pid)):
                known[pid] = seen
        self._known = known
        if before:
            self._recent.append(time.process_time() - began)
            self.seconds = min(self._recent)
        self.init_unseen = 1 in known and known[1].hidden
        self.unseen = sum(seen.hidden for seen in known.values()) - self.init_unseen
        return [seen.writer for seen in known.values() if seen.writer]

    def look_at_new(self, stopped: Container[int] = ()) -> list[Writer]:
        """Looks at processes that were started since the last look; returns all writers, those of
        the last look among them unless they have closed the guest.

        stopped -- need not be looked at again: they can neither open nor close anything
        """
        began = time.process_time()
        known, found = self._known, []
        for pid in self._pids():
            seen = known.get(pid)
            with contextlib.suppress(OSError):
                if seen is None or os.stat(f"/proc/{pid}").st_ino != seen.inode:
                    seen = self._examine(pid, None)
                elif seen.writer and pid not in stopped:
                    seen = self._examine(pid, seen)
                if seen and seen.writer:
                    found.append(seen.writer)
        self.new_seconds = time.process_time() - began
        return found

    def _pids(self) -> Iterator[int]:
        if self.blind:
            return
        for name in os.listdir("/proc"):
            if name.isdecimal() and int(name) not in self._but:
                yield int(name)

    def _examine(self, pid: int, before: _Seen | None) -> _Seen | None:
        """None where it has ended."""
        inode = 0
        try:
            inode = os.stat(f"/proc/{pid}").st_ino
            if before is not None and before.inode != inode:
                before = None
            size = _first_word(f"/proc/{pid}/statm")
            opened = any(map(self.target.open_in, _file_tables(pid)))
            maps = False
            if before is None or before.maps or before.size != size:
                maps = any(self._mapped(base) for base in _memories(pid))
            writer = None
            if opened or maps:
                writer = Writer(pid, process.start_time(pid), command_name(pid))
            return _Seen(inode, size, maps, writer)
        except PermissionError:
            return _Seen(inode, hidden=not process.is_kernel_thread(pid))
        except OSError:
            return None

    def _mapped(self, base: str) -> bool:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return self.target.mapped_in(base)
        return False  # a thread that has ended


def _first_word(path: str) -> str:
    with open(path) as file:
        return file.read().partition(" ")[0]


def _tasks(pid: int) -> list[str]:
    return os.listdir(f"/proc/{pid}/task")


def _file_tables(pid: int) -> Iterator[str]:
    """The folders in /proc that show each table of open files of a process."""
    yield f"/proc/{pid}/fd"
    for task in _tasks(pid):
        folder = f"/proc/{pid}/task/{task}/fd"
        if int(task) != pid and not _same_files(pid, int(task)) and os.path.isdir(folder):
            yield folder


def _memories(pid: int) -> Iterator[str]:
    """Folders in /proc with the maps of a process: of any thread, its main one may have ended."""
    yield f"/proc/{pid}"
    if process.state(pid) in process.ENDED:
        for task in _tasks(pid):
            yield f"/proc/{pid}/task/{task}"


def _same_files(pid: int, task: int) -> bool:
    """Whether two threads share their table of open files; False where that is not to be known."""
    number = KCMP_NUMBERS.get(platform.machine())
    if number is None:
        return False
    return bool(_libc().syscall(number, pid, task, KCMP_FILES, 0, 0) == 0)


def _blindness() -> str:
    try:
        own = os.readlink("/proc/self")
    except OSError as error:
        return f"/proc cannot be read ({error.strerror})"
    if own != str(os.getpid()):
        return "/proc is that of another PID namespace"
    return ""


def narrow_view() -> str:
    """Why there may be processes that /proc does not show here, or ""."""
    with contextlib.suppress(OSError):
        if os.readlink("/proc/self/ns/pid") != INITIAL_PID_NAMESPACE:
            return "processes outside this container (PID namespace)"
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", errors="replace") as mounts:
        for line in mounts:
            words = line.split()
            if words[4] == "/proc" and HIDDEN.search(words[-1]) and os.geteuid():
                return "processes of other users (/proc is mounted with hidepid)"
    return ""


def open_for_writing(fd: int) -> bool | None:
    """Whether anything at all, this program and the kernel too, has the file open for writing.

    None where that is not to be known: a block device, another user's file, a file system without
    leases.
    """
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # Should somebody open the file in this instant, the kernel tells us so: by a signal that
        # is ignored, where SIGIO would end us.
        fcntl.fcntl(own, F_SETSIG, signal.SIGURG)
        fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(own)
    return False


def opened_here(target: Target) -> bool:
    """Whether this program has it open for writing itself."""
    with contextlib.suppress(OSError):
        return target.open_in("/proc/self/fd") or target.mapped_in("/proc/self")
    return False


def kernel_writers(target: Target) -> list[str]:
    """What in the kernel writes the guest, by itself, whatever process is stopped."""
    if target.block:
        return _on_device(target)
    found = [f"the loop device {path}" for path in _loop_devices(target)]
    with contextlib.suppress(OSError), open("/proc/swaps", errors="surrogateescape") as swaps:
        for line in swaps.readlines()[1:]:
            with contextlib.suppress(OSError):
                if target.is_at(_unescaped(line.split()[0])):
                    found.append("the kernel's swap")
    return found


def _loop_devices(target: Target) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for name in os.listdir("/sys/block"):
            if name.startswith("loop") and os.path.exists(f"/sys/block/{name}/loop/backing_file"):
                with contextlib.suppress(OSError):
                    if _backs(target, name):
                        yield f"/dev/{name}"


def _backs(target: Target, name: str) -> bool:
    """Whether a loop device writes to the target."""
    try:
        device = os.open(f"/dev/{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # by name then: better than not at all
        with open(f"/sys/block/{name}/ro") as read_only:
            if read_only.read().strip() == "1":
                return False
        with open(f"/sys/block/{name}/loop/backing_file", errors="surrogateescape") as file:
            return target.is_at(file.read().removesuffix("\n"))
    try:
        status = LOOP_STATUS.unpack(fcntl.ioctl(device, LOOP_GET_STATUS64, bytes(LOOP_STATUS.size)))
    finally:
        os.close(device)
    return status[:2] == target.key and not status[8] & LOOP_READ_ONLY


def _on_device(target: Target) -> list[str]:
    """A file system that is mounted to be written, or another device on this one."""
    number = f"{os.major(target.device)}:{os.minor(target.device)}"
    mounted = list(_mounts(target))
    if any(writes for _, writes in mounted):
        return [f"the file system at {printable(where)}" for where, writes in mounted if writes]
    held: list[str] = []
    with contextlib.suppress(OSError):
        held = os.listdir(f"/sys/dev/block/{number}/holders")
    if held:
        return [f"the block device {name}" for name in held]
    if mounted:
        return []  # to be read only
    try:
        os.close(os.open(f"/proc/self/fd/{target.fd}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return ["something in the kernel (a file system mounted elsewhere, swap, RAID)"]
    return []


def _mounts(target: Target) -> Iterator[tuple[bytes, bool]]:
    """Where the device is mounted, and whether for writing: here, and where process 1 looks."""
    number = f"{os.major(target.device)}:{os.minor(target.device)}".encode()
    for pid in ("self", "1"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/mountinfo", "rb") as mounts:
            for line in mounts:
                before, _, after = line.partition(b" - ")
                words, (_, source, options) = before.split(), after.split()
                same = words[2] == number
                with contextlib.suppress(OSError, ValueError):
                    path = _unescaped(os.fsdecode(source))
                    same |= path.startswith("/") and target.is_at(path)
                if same:
                    yield (
                        os.fsencode(_unescaped(os.fsdecode(words[4]))),
                        b"rw" in options.split(b","),
                    )


def _unescaped(text: str) -> str:
    """A path as /proc/mounts writes it, with octal escapes."""
    return ESCAPED.sub(lambda found: chr(int(found[1], 8)), text)
