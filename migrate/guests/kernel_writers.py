"""What in the kernel writes a guest's file or device: loop devices, swap, mounted file systems.

No signal stops these.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator

from migrate.files.mounts import Mount, mounts, unescaped
from migrate.guests.guest_file import GuestFile
from migrate.output import printable
from migrate.runtime.proc_lines import proc_lines

LOOP_GET_STATUS64 = 0x4C05  # linux/loop.h
LOOP_STATUS = struct.Struct("=5Q4I64s64s32s2Q")
LOOP_READ_ONLY = 1


def kernel_writers(guest: GuestFile) -> list[str]:
    """Name what in the kernel writes the guest by itself, whichever processes are stopped."""
    if guest.block:
        return _on_device(guest)
    found = [f"the loop device {path}" for path in _loop_devices(guest)]
    for path in swap_paths():
        with contextlib.suppress(OSError):
            if guest.is_at(path):
                found.append("the kernel's swap")
    return found


def swap_paths() -> list[str]:
    """Return the files and devices that the kernel swaps to."""
    with contextlib.suppress(OSError):
        return [unescaped(line.partition(b" ")[0]) for line in proc_lines("/proc/swaps")[1:]]
    return []


def _loop_devices(guest: GuestFile) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for name in os.listdir("/sys/block"):
            if name.startswith("loop") and os.path.exists(f"/sys/block/{name}/loop/backing_file"):
                with contextlib.suppress(OSError):
                    if _backs(guest, name):
                        yield f"/dev/{name}"


def _backs(guest: GuestFile, name: str) -> bool:
    """Return whether a loop device writes to the guest."""
    try:
        device = os.open(f"/dev/{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # by the name of its file then, which is better than not at all
        if proc_lines(f"/sys/block/{name}/ro") == [b"1"]:
            return False
        path = b"\n".join(proc_lines(f"/sys/block/{name}/loop/backing_file"))
        return guest.is_at(os.fsdecode(path))
    try:
        status = LOOP_STATUS.unpack(fcntl.ioctl(device, LOOP_GET_STATUS64, bytes(LOOP_STATUS.size)))
    finally:
        os.close(device)
    return status[:2] == guest.identity and not status[8] & LOOP_READ_ONLY


def _on_device(guest: GuestFile) -> list[str]:
    """Name a file system on the device that is mounted to be written, or another device on it."""
    number = f"{os.major(guest.device)}:{os.minor(guest.device)}"
    mounted = list(_mounts(guest))
    if written := [mount.point for mount in mounted if "rw" in mount.super_options]:
        return [f"the file system at {printable(point)}" for point in written]
    held: list[str] = []
    with contextlib.suppress(OSError):
        held = os.listdir(f"/sys/dev/block/{number}/holders")
    if held:
        return [f"the block device {name}" for name in held]
    if mounted:
        return []  # mounted read-only
    try:
        os.close(os.open(f"/proc/self/fd/{guest.fd}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return ["something in the kernel (a file system mounted elsewhere, swap, RAID)"]
    return []


def _mounts(guest: GuestFile) -> Iterator[Mount]:
    """Yield the mounts of the device in our mount namespace, and in that of process 1."""
    number = os.major(guest.device), os.minor(guest.device)
    for pid in ("self", "1"):
        with contextlib.suppress(OSError):
            yield from (mount for mount in mounts(pid) if mount.block_device == number)
