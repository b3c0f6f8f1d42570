"""The lock on a guest that is a block device.

Two paths may lead to one device (mknod, containers), and a lock belongs to the inode of a path.
These locks belong to the device itself. A migration takes as many of them as it can:

    O_EXCL       the kernel's own claim on a device and on the disk that contains it. Whatever uses
                 the device (a file system, device mapper, RAID, swap) holds it
    sysfs        a flock on the device's directory in /sys, shared on that of its disk for a
                 partition. All programs of one network namespace see it
    mount point  a flock on the root directory of the file system that has the claim
    loop         a lock on the file behind a loop device, or on its part, as on a guest that is a
                 file: other loop devices may be on the same file
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat

from migrate.errors import MigrationError, UsageError
from migrate.files.file_lock import FileLock
from migrate.files.identity import identity_of
from migrate.files.kernel_locks import lock_owners
from migrate.files.lock import Lock, reopen, try_flock
from migrate.files.mounts import Mount
from migrate.files.openers import openers
from migrate.guests.device import (
    SYSFS,
    backing_of,
    mounts_of,
    number_of,
    swap_areas,
    users_of,
)
from migrate.output import printable

UNSEEN_MOUNT = (
    "; or a file system on it is mounted in another mount namespace: then run migrate-src there "
    "(nsenter -m)"
)


class DeviceLock(Lock):
    """A lock on a block device and on all that is on it.

    writers -- processes of the guest's program, which may have claimed the device themselves
    mounts  -- the file systems on the device, once it is locked
    """

    def __init__(self, fd: int, what: str, writers: tuple[int, ...] = ()) -> None:
        super().__init__(what)
        self._device = fd
        self._number = number_of(fd)
        self._writers = writers
        self._claim = -1
        self._locked: dict[int, int] = {}  # descriptor -> LOCK_EX or LOCK_SH
        self._below: Lock | None = None
        self._below_fd = -1
        self.mounts: list[Mount] = []

    async def acquire(self) -> None:
        try:
            self._lock_sysfs()
            self._claim_device()
            if not self._locked and self._claim < 0:
                raise UsageError(
                    f"{self.what}: it is in use, and there is no /sys here by which it could be "
                    "locked: two programs could move it at once"
                )
            await self._lock_below()
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
            self._claim = reopen(self._device, os.O_RDONLY | os.O_EXCL)
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        locked = set()
        for mount in self.mounts:
            root = os.stat(mount.point)
            if identity_of(root) not in locked:
                locked.add(identity_of(root))
                self._lock(mount.point, fcntl.LOCK_EX)
        if self.mounts or self._is_explained():
            return
        claimants = set(openers(os.fstat(self._device)))
        if not claimants or not claimants <= set(self._writers):
            named = ", ".join(map(str, sorted(claimants)))
            who = f" (open in process {named})" if claimants else ""
            raise UsageError(
                f"{self.what}: a program has claimed it for itself{who}, and may be moving it: "
                "wait until it has ended; or name it with --pid, if it is the guest's writer"
                + ("" if claimants else UNSEEN_MOUNT)
            )

    async def _lock_below(self) -> None:
        """Lock the file or device behind a loop device."""
        backing = backing_of(self._device)
        if backing is None:
            return
        try:
            fd = os.open(backing.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            fd = -1
        here = os.fstat(fd) if fd >= 0 else None
        if here is None or identity_of(here) != backing.identity:
            if fd >= 0:
                os.close(fd)
            self.cautions.append(
                f"{self.what}: the file behind it, {printable(os.fsdecode(backing.path))}, cannot "
                "be opened from here, so it is not locked: let nobody move it by another loop "
                "device"
            )
            return
        below: Lock
        if stat.S_ISBLK(here.st_mode):
            below, self._below_fd = DeviceLock(fd, self.what), fd
        else:
            below = file = FileLock(fd, self.what, backing.start, backing.length)
            file.also_close(fd)
        self._below = below
        await below.acquire()
        self.cautions += below.cautions

    def _is_explained(self) -> bool:
        """Return whether device mapper, RAID or swap uses the device."""
        if users_of(self._number) - {self._number} and any(
            os.listdir(f"{SYSFS}/{major}:{minor}/holders")
            for major, minor in users_of(self._number)
            if os.path.isdir(f"{SYSFS}/{major}:{minor}/holders")
        ):
            return True
        return any(area in users_of(self._number) for area in swap_areas())

    def _lock(self, path: str, kind: int) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._locked[fd] = kind
        if not try_flock(fd, kind):
            raise self.refusal(pid for pid, _ in lock_owners(fd, "FLOCK"))

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
        self.close_in_child()

    def close_in_child(self) -> None:
        while self._locked:
            os.close(self._locked.popitem()[0])
        for fd in (self._claim, self._below_fd):
            if fd >= 0:
                os.close(fd)
        self._claim = self._below_fd = -1
