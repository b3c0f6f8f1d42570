"""A block device: what uses it, how it is read as it is, and how it is held.

A file system does not write through the page cache of the device that it is on. That cache has old
blocks, however often the file system is flushed. So a device is read with O_DIRECT, past every
cache: what is read is what the device has, which is the file system as it was when it was frozen
(fsfreeze).

Two paths may lead to one device (mknod, containers), and locks belong to the path's inode. These
belong to the device, and a mover takes all of them that it can get:

    O_EXCL       the kernel's own claim on a device and on the disk that it is a part of. A file
                 system, device mapper, RAID or swap has it, if it uses the device
    sysfs        a flock on the device's directory in /sys; a partition shares that of its disk. It
                 is seen by all programs of one network namespace
    mount point  a flock on the root directory of the file system that has the claim
    loop         the file behind a loop device, or its part, as a guest that is a file is held:
                 other loop devices may be on it
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

from migrate.directory import identity_of
from migrate.errors import MigrationError, UsageError
from migrate.guests.hold import FileHold, Hold, file_key, lock_owners, reopened, try_flock
from migrate.guests.writers import LOOP_GET_STATUS64, LOOP_STATUS, printable

BLKSSZGET = 0x1268  # linux/fs.h
SECTOR = 512  # of the numbers in sysfs, whatever the device has
SYSFS = "/sys/dev/block"
MAX_DEPTH = 8
UNSEEN_MOUNT = (
    "; or a file system on it is mounted where that is not to be seen from here: then run "
    "migrate-src in that mount namespace (nsenter -m)"
)

Number = tuple[int, int]


class Mount(NamedTuple):
    """A mounted file system. point -- where"""

    point: str
    read_only: bool


class Backing(NamedTuple):
    """The file behind a loop device, by path and by (device, inode), and the part of it that the
    device is. length -- 0: up to its end"""

    path: bytes
    key: tuple[int, int]
    start: int
    length: int


def number_of(fd: int) -> Number:
    """(major, minor) of an open block device."""
    device = os.fstat(fd).st_rdev
    return os.major(device), os.minor(device)


def open_direct(fd: int) -> tuple[int, int]:
    """Open the device behind `fd` to be read past all caches.

    Returns a descriptor and the alignment in bytes of its offsets, lengths and buffers. Raises
    OSError where the device cannot be read like that.
    """
    direct = reopened(fd, os.O_RDONLY | os.O_DIRECT)
    (size,) = struct.unpack("i", fcntl.ioctl(direct, BLKSSZGET, bytes(4)))
    return direct, size


def backing_of(fd: int) -> Backing | None:
    """The file behind a loop device or a partition of one; None for other devices."""
    major, minor = number_of(fd)
    base, start, length = f"{SYSFS}/{major}:{minor}", 0, 0
    with contextlib.suppress(OSError, ValueError):
        if os.path.exists(f"{base}/partition"):
            start, length = (int(_read(f"{base}/{name}")) * SECTOR for name in ("start", "size"))
            base += "/.."
        path = _read(f"{base}/loop/backing_file").removesuffix(b"\n")
        status = LOOP_STATUS.unpack(fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(LOOP_STATUS.size)))
        return Backing(path, status[:2], start + status[3], length or status[4])
    return None


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def users_of(number: Number) -> set[Number]:
    """The device, its partitions, and the devices that are made of them (device mapper, RAID)."""
    found: set[Number] = set()
    todo = {number}
    for _ in range(MAX_DEPTH):
        found |= todo
        todo = {more for one in todo for more in _above(one)} - found
    return found


def _above(number: Number) -> Iterator[Number]:
    base = f"{SYSFS}/{number[0]}:{number[1]}"
    names: list[str] = []
    with contextlib.suppress(OSError):
        names += [f"{base}/holders/{name}/dev" for name in os.listdir(f"{base}/holders")]
    with contextlib.suppress(OSError):
        names += [
            f"{base}/{name}/dev" for name in os.listdir(base)
            if os.path.exists(f"{base}/{name}/partition")
        ]  # fmt: skip
    for name in names:
        with contextlib.suppress(OSError, ValueError), open(name) as file:
            major, minor = file.read().split(":")
            yield int(major), int(minor)


def mounts_of(number: Number) -> list[Mount]:
    """The file systems on a device, as far as this mount namespace shows them."""
    wanted, found = users_of(number), []
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            head, _, tail = line.partition(b" - ")
            words, source = head.split(), tail.split()[1:2]
            if len(words) < 6:
                continue
            major, _, minor = words[2].partition(b":")
            device = int(major), int(minor)
            if device[0] == 0 and source:  # a file system with a number of its own (btrfs)
                device = _node(_unescaped(source[0]))
            if device in wanted:
                options = words[5].split(b",") + tail.split()[-1].split(b",")
                found.append(Mount(os.fsdecode(_unescaped(words[4])), b"ro" in options))
    return found


def _unescaped(name: bytes) -> bytes:
    """Blanks and the like are written as \\ooo there."""
    first, *others = name.split(b"\\")
    return first + b"".join(bytes([int(one[:3], 8)]) + one[3:] for one in others)


def _node(path: bytes) -> Number:
    with contextlib.suppress(OSError):
        here = os.stat(path)
        if path.startswith(b"/") and stat.S_ISBLK(here.st_mode):
            return os.major(here.st_rdev), os.minor(here.st_rdev)
    return 0, 0


def _openers(number: Number) -> set[int]:
    """The other processes we can see that have a device open."""
    found = set()
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    here = os.stat(f"/proc/{pid}/fd/{fd}")
                    if stat.S_ISBLK(here.st_mode) and here.st_rdev == os.makedev(*number):
                        found.add(int(pid))
    return found - {os.getpid()}


class DeviceHold(Hold):
    """A block device, and all that is on it.

    writers -- processes of the guest, which may have claimed the device themselves
    """

    def __init__(self, fd: int, what: str, writers: tuple[int, ...] = ()) -> None:
        super().__init__(what)
        self._device = fd
        self._number = number_of(fd)
        self._writers = writers
        self._claim = -1
        self._locked: dict[int, int] = {}  # descriptor -> LOCK_EX or LOCK_SH
        self._below: Hold | None = None
        self._below_fd = -1
        self.mounts: list[Mount] = []

    async def take(self) -> None:
        try:
            self._lock_sysfs()
            self._claim_device()
            if not self._locked and self._claim < 0:
                raise UsageError(
                    f"{self.what}: it is in use, and there is no /sys here by which it could be "
                    "locked: two programs could move it at once"
                )
            await self._hold_below()
        except OSError as error:
            self.close()
            raise UsageError(f"{self.what}: it cannot be locked: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    def _lock_sysfs(self) -> None:
        base = f"{SYSFS}/{self._number[0]}:{self._number[1]}"
        if not os.path.isdir(base):
            return
        if os.path.exists(f"{base}/partition"):
            self._lock(f"{base}/..", fcntl.LOCK_SH)
        self._lock(base, fcntl.LOCK_EX)

    def _claim_device(self) -> None:
        self.mounts = mounts_of(self._number)
        try:
            self._claim = reopened(self._device, os.O_RDONLY | os.O_EXCL)
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        locked = set()
        for mount in self.mounts:
            root = os.stat(mount.point)
            if (root.st_dev, root.st_ino) not in locked:
                locked.add((root.st_dev, root.st_ino))
                self._lock(mount.point, fcntl.LOCK_EX)
        if self.mounts or self._is_explained():
            return
        openers = _openers(self._number)
        if not openers or not openers <= set(self._writers):
            who = f" (open in process {', '.join(map(str, sorted(openers)))})" if openers else ""
            raise UsageError(
                f"{self.what}: a program has claimed it for itself{who}, and may be moving it: "
                "wait until it has ended; or name it with --pid, if it is the guest's writer"
                + ("" if openers else UNSEEN_MOUNT)
            )

    async def _hold_below(self) -> None:
        """Hold what a loop device is on."""
        backing = backing_of(self._device)
        if backing is None:
            return
        try:
            fd = os.open(backing.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            fd = -1
        here = os.fstat(fd) if fd >= 0 else None
        if here is None or identity_of(here) != backing.key:
            if fd >= 0:
                os.close(fd)
            self.cautions.append(
                f"{self.what}: the file behind it, {printable(backing.path)}, cannot be opened "
                "from here, so it is not held: let nobody move it by another loop device"
            )
            return
        below: Hold
        if stat.S_ISBLK(here.st_mode):
            below, self._below_fd = DeviceHold(fd, self.what), fd
        else:
            below = file = FileHold(fd, self.what, backing.start, backing.length)
            file.also_close(fd)
        self._below = below
        await below.take()
        self.cautions += below.cautions

    def _is_explained(self) -> bool:
        """Whether device mapper, RAID or swap uses the device."""
        if users_of(self._number) - {self._number} and any(
            os.listdir(f"{SYSFS}/{major}:{minor}/holders")
            for major, minor in users_of(self._number)
            if os.path.isdir(f"{SYSFS}/{major}:{minor}/holders")
        ):
            return True
        with contextlib.suppress(OSError), open("/proc/swaps", "rb") as file:
            areas = [line.split()[0] for line in file.readlines()[1:]]
            return any(_node(_unescaped(area)) in users_of(self._number) for area in areas)
        return False

    def _lock(self, path: str, kind: int) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._locked[fd] = kind
        if not try_flock(fd, kind):
            raise self.taken(pid for pid, _ in lock_owners(file_key(fd), "FLOCK"))

    def confirm(self) -> None:
        try:
            kept = all(try_flock(fd, kind) for fd, kind in self._locked.items())
        except OSError:
            kept = False
        if not kept or not (self._locked or self._claim >= 0):
            raise MigrationError(f"{self.what}: it is not locked any more")
        if self._below is not None:
            self._below.confirm()

    def close(self) -> None:
        if self._below is not None:
            self._below.close()
            self._below = None
        for fd in self._locked:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
        self.forget()

    def forget(self) -> None:
        while self._locked:
            os.close(self._locked.popitem()[0])
        for fd in (self._claim, self._below_fd):
            if fd >= 0:
                os.close(fd)
        self._claim = self._below_fd = -1
