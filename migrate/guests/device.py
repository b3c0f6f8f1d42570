"""A block device as a guest: how it is read, what it is on, and what uses it.

A file system does not write through the page cache of its device. That cache has old blocks,
however often the file system is flushed. So a device is read with O_DIRECT, past all caches: that
shows what the device has, which is the file system as it was when it was frozen (fsfreeze).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

from migrate.files.identity import Identity
from migrate.files.lock import reopen
from migrate.files.mounts import Mount, mounts
from migrate.guests.kernel_writers import LOOP_GET_STATUS64, LOOP_STATUS, swap_paths

BLKSSZGET = 0x1268  # linux/fs.h
SECTOR = 512  # of the numbers in sysfs, whatever the device has
SYSFS = "/sys/dev/block"
MAX_DEPTH = 8

Number = tuple[int, int]


class Backing(NamedTuple):
    """The file behind a loop device, and the part of it that the device shows, in bytes.

    length -- 0: to the end of the file
    """

    path: bytes
    identity: Identity
    start: int
    length: int


def number_of(fd: int) -> Number:
    """Return (major, minor) of an open block device."""
    device = os.fstat(fd).st_rdev
    return os.major(device), os.minor(device)


def open_direct(fd: int) -> tuple[int, int]:
    """Open the device behind `fd` once more, to read it past all caches.

    Returns a descriptor, and the alignment in bytes that offsets, lengths and buffers need. Raises
    OSError if the device cannot be read so.
    """
    direct = reopen(fd, os.O_RDONLY | os.O_DIRECT)
    (size,) = struct.unpack("i", fcntl.ioctl(direct, BLKSSZGET, bytes(4)))
    return direct, size


def backing_of(fd: int) -> Backing | None:
    """Return the file behind a loop device or a partition of one; None for other devices."""
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
    """Return the device, its partitions, and the devices made of them (device mapper, RAID)."""
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
    """Return the file systems on a device, as far as this mount namespace shows them."""
    wanted, found = users_of(number), []
    with contextlib.suppress(OSError):
        for mount in mounts():
            if mount.block_device in wanted:
                found.append(mount)
    return found


def swap_areas() -> list[Number]:
    """Return the devices that the kernel swaps to."""
    return [_node(path) for path in swap_paths()]


def _node(path: str) -> Number:
    with contextlib.suppress(OSError):
        here = os.stat(path)
        if path.startswith("/") and stat.S_ISBLK(here.st_mode):
            return os.major(here.st_rdev), os.minor(here.st_rdev)
    return 0, 0
