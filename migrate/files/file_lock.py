"""A lock on a guest's file that leaves the guest's own program to its work.

The lock is on the file itself, by device and inode. So it counts under every name, link and mount,
and for every user, container and journal. The guest's program may lock the file too, so there are
two kinds of lock:

    byte   an open file description lock (F_OFD_SETLK) from FAR on, far behind all data. SQLite,
           LMDB and QEMU lock bytes near the start of the file; BoltDB and gdbm use flock
    flock  if the byte cannot be locked: because a program has locked the whole file with
           fcntl(2) (InnoDB, H2, Java's FileChannel.lock), or because we may only read the file

A migration tries the byte first. Two migrations never have one kind each: the one that locks the
byte then looks whether another has the flock, and the one that takes the flock then looks at the
byte. A byte lock that begins at FAR or behind it belongs to a migration. A flock may also belong to
the guest's program; the flock of a migration is known by the file position of its descriptor, MARK,
which /proc/PID/fdinfo shows. A flock whose owner we cannot see (another user, another PID
namespace) may belong to a migration, and is a reason to refuse.

A program that locks the whole file with fcntl(2) for each transaction would wait for our byte. So a
thread looks every WATCH_SECONDS whether the guest's program waits for our lock (lock_waiters.py).
Then we take the other kind first, and drop this one after that. If the other kind cannot be had, we
give up our lock: the guest's program goes on, and the migration fails before its commit.

What remains: a program that tries to lock the whole file *without waiting* (LOCK_NB) is told that
it is locked, and leaves no trace that we could see. A file on an overlay and the same file in the
overlay's upper directory are two inodes to the kernel. Locks on network file systems are as good as
their servers; there the two kinds are one, so we do not change between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import struct
import sys
import threading
import time
import weakref
from enum import Enum, auto

from migrate.errors import MigrationError, UsageError
from migrate.files.filesystem import file_system_of
from migrate.files.kernel_locks import (
    FAR,
    MARK,
    descriptor_locks,
    descriptors_of,
    file_key,
    lock_owners,
    read_lock_table,
)
from migrate.files.lock import BUSY, Lock, reopen, try_flock
from migrate.files.lock_waiters import LockedFile, Waiting, waiting
from migrate.runtime.hang_guard import HangGuard

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.1
# The thread that watches uses 1/100 of a processor at most, whatever other programs have it read.
WATCH_FACTOR = 100
# A lock that a program takes for each transaction is free again within this time. After it, a
# program that waits for both of our kinds gets the file.
PATIENCE_SECONDS = 1.0
POLL_SECONDS = 0.02
# A program may take and drop a lock faster than we find out whose it is. So we look PROBES times
# whose it is, and try at least TRIES times to get it, before the guest is refused.
PROBES, TRIES = 20, 5

_FLOCK = struct.Struct("hhqqi")  # struct flock: type, whence, start, length, process
# File systems on which a flock is, at the server, a lock on the whole file: it excludes our byte.
ONE_KIND = ("nfs", "nfs4", "cifs", "smb3")
# File systems without this kind of lock, and kernels without F_OFD_SETLK.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Conflict(Enum):
    """What keeps us from a lock."""

    NONE = auto()
    MIGRATION = auto()
    PROGRAM = auto()
    UNSEEN = auto()
    """Something that we cannot see, or that had gone when we looked."""
    UNSUPPORTED = auto()


class Kind(Enum):
    """Which kind of lock we have."""

    NONE = auto()
    BYTE = auto()
    FLOCK = auto()


class FileLock(Lock):
    """A lock on the file behind `fd`, or on `length` bytes of it from `start` on (0: to its end).

    kind -- which kind of lock we have now
    lost -- why the lock was given up or lost; "" while we have it

    A flock has no ranges: if one must be used, locks on parts of one file exclude each other.
    """

    def __init__(self, fd: int, what: str, start: int = 0, length: int = 0) -> None:
        """Open the file once more. Raises UsageError if that is not possible."""
        super().__init__(what)
        self.lost = ""
        self._range = FAR + start, length
        self.kind = Kind.NONE
        self._writable = True
        self._waited_since = 0.0
        self._fd = -1
        self._others: list[int] = []
        try:
            try:
                self._fd = reopen(fd, os.O_RDWR)
            except OSError:
                self._writable = False
                self._fd = reopen(fd, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system may have no such position
                os.lseek(self._fd, MARK, os.SEEK_SET)
        except OSError as error:
            raise UsageError(f"{what}: it cannot be locked: {error.strerror}") from None
        self._one_kind = file_system_of(self._fd) in ONE_KIND
        # Of what is below, `confirm`, `close` and the thread that watches change parts.
        self._turn = threading.Lock()
        self._closed = threading.Event()

    async def acquire(self) -> None:
        try:
            end, tries = time.monotonic() + PATIENCE_SECONDS, 0
            while (conflict := await self._try_in_thread()) is not Conflict.NONE:
                tries += 1
                late = tries > TRIES and time.monotonic() > end
                if conflict is Conflict.MIGRATION:
                    raise await asyncio.to_thread(self._refusal_with_owners)
                if conflict is Conflict.UNSUPPORTED or late:
                    raise UsageError(self._why_unlockable(conflict))
                await asyncio.sleep(POLL_SECONDS)
        except BaseException:
            self.close()
            raise
        logger.debug("%s: locked (%s)", self.what, self.kind.name.lower())
        locked = LockedFile(file_key(self._fd), os.fstat(self._fd), self._range[0])
        # The thread has no reference of its own: a lock that is garbage is closed.
        watching = threading.Thread(
            target=_watch, args=(weakref.ref(self), self._closed, locked), name="file lock",
            daemon=True,
        )  # fmt: skip
        watching.start()

    async def _try_in_thread(self) -> Conflict:
        """Call `_try` in another thread: to find the owner of a lock may take seconds."""
        trying = asyncio.ensure_future(asyncio.to_thread(self._try))
        try:
            return await asyncio.shield(trying)
        except asyncio.CancelledError:
            await asyncio.wait([trying])
            raise

    def confirm(self) -> None:
        with self._turn:
            if not self.lost and self.kind is Kind.NONE:
                self.lost = f"{self.what}: it is not locked any more"
            try:
                if self.kind is Kind.BYTE and self._try_byte() is not Conflict.NONE:
                    self.lost = f"{self.what}: another program has locked it meanwhile"
                if self.kind is Kind.FLOCK and not try_flock(self._fd):
                    self.lost = f"{self.what}: another program has locked it meanwhile"
            except OSError as error:
                self.lost = f"{self.what}: the lock on it is lost: {error.strerror}"
            if self.lost:
                raise MigrationError(self.lost)

    def close(self) -> None:
        with self._turn:
            if self._fd < 0:
                return
            self._closed.set()
            self._unlock()
            # Closing any descriptor of a file drops the locks that this process has set on it with
            # fcntl(2). If the program that uses us has one, our descriptor stays open.
            if not _has_own_locks(self._fd):
                for fd in (self._fd, *self._others):
                    os.close(fd)
            self._fd, self._others = -1, []

    def also_close(self, fd: int) -> None:
        """Have `close` close this descriptor of the same file as well."""
        self._others.append(fd)

    def close_in_child(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        # At the end of the interpreter the kernel closes all, and builtins are gone.
        if getattr(self, "_fd", -1) >= 0 and not sys.is_finalizing():
            self.close()

    # -- the two kinds

    def _try(self) -> Conflict:
        """Take one kind of lock, unless another migration has the other kind."""
        conflict = self._try_byte()
        if conflict is Conflict.NONE:
            self.kind = Kind.BYTE
            owner = Conflict.NONE if self._one_kind else self._flock_owner()
            if owner in (Conflict.NONE, Conflict.PROGRAM):
                return Conflict.NONE
            self._unlock()
            return owner
        return conflict if conflict is Conflict.MIGRATION else self._try_flock_instead(conflict)

    def _try_flock_instead(self, conflict: Conflict) -> Conflict:
        """Take the flock; `conflict` has kept us from the byte."""
        try:
            if not try_flock(self._fd):
                owner = self._flock_owner()
                return Conflict.UNSEEN if owner is Conflict.NONE else owner  # it has just gone
        except OSError:
            return Conflict.UNSUPPORTED
        self.kind = Kind.FLOCK
        if self._byte_owner() is Conflict.MIGRATION:  # it has locked the byte since we looked
            self._unlock()
            return Conflict.MIGRATION
        if conflict is Conflict.UNSUPPORTED:
            self.cautions.append(
                f"{self.what}: its file system has no record locks, so it is locked by flock alone"
            )
        return Conflict.NONE

    def _try_byte(self) -> Conflict:
        if not self._writable:
            return self._byte_owner() or Conflict.PROGRAM
        try:
            self._ofd(fcntl.F_OFD_SETLK, fcntl.F_WRLCK)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return Conflict.UNSUPPORTED
            if error.errno not in BUSY:
                return Conflict.UNSEEN
            return self._byte_owner() or Conflict.UNSEEN  # it may just have gone
        return Conflict.NONE

    def _byte_owner(self) -> Conflict | None:
        """Return what has a lock on our byte; None if nothing has one, or only we."""
        try:
            kind, _, start, _, _ = self._ofd(fcntl.F_OFD_GETLK, fcntl.F_WRLCK)
        except OSError:
            return Conflict.UNSUPPORTED
        if kind == fcntl.F_UNLCK:
            return None
        return Conflict.MIGRATION if start >= FAR else Conflict.PROGRAM

    def _ofd(self, command: int, kind: int) -> tuple[int, ...]:
        wanted = _FLOCK.pack(kind, os.SEEK_SET, *self._range, 0)
        return _FLOCK.unpack(fcntl.fcntl(self._fd, command, wanted))

    def _flock_owner(self) -> Conflict:
        """Return what has the flock. To find out, take it for an instant, shared."""
        key = file_key(self._fd)
        owners: list[tuple[int, int]] = []
        for _ in range(PROBES):
            try:
                if try_flock(self._fd, fcntl.LOCK_SH):
                    fcntl.flock(self._fd, fcntl.LOCK_UN)
                    return Conflict.NONE
            except OSError:
                return Conflict.NONE  # the file system has no flocks
            table = read_lock_table()
            named = {one.pid for one in table.locks if one.file == key and one.kind == "FLOCK"}
            if (owners := lock_owners(self._fd, "FLOCK", named)) or not table.complete:
                break
        if not owners:  # the process that took it has ended, and a child of it has the descriptor
            owners = lock_owners(self._fd, "FLOCK")
        if any(position == MARK for _, position in owners):
            return Conflict.MIGRATION
        return Conflict.PROGRAM if owners else Conflict.UNSEEN

    def _unlock(self) -> None:
        """Drop the lock explicitly: a child forked just now may still have the descriptor."""
        with contextlib.suppress(OSError):
            if self.kind is Kind.BYTE:
                self._ofd(fcntl.F_OFD_SETLK, fcntl.F_UNLCK)
            if self.kind is Kind.FLOCK:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        self.kind = Kind.NONE

    # -- the guest's own program

    def give_way(self, waits: Waiting) -> None:
        """Change to the other kind of lock if the guest's program waits for this one.

        The other kind is taken before this one is dropped, so there is no instant without a lock.
        If the program waits for PATIENCE_SECONDS although we have tried, the lock is given up.
        """
        with self._turn:
            if self._fd < 0 or self.kind is Kind.NONE:
                return
            if not (waits.byte if self.kind is Kind.BYTE else waits.flock) or self._change_kind():
                self._waited_since = 0.0
                return
            if not waits.certain:
                self._waited_since = 0.0
                return
            now = time.monotonic()
            self._waited_since = self._waited_since or now
            if now - self._waited_since > PATIENCE_SECONDS:
                self._unlock()
                self.lost = (
                    f"{self.what}: a program waits for a lock on it, and has the other kind of "
                    "lock itself: the lock of the migration was given up, so that it can go on"
                )
                logger.info("%s", self.lost)

    def _change_kind(self) -> bool:
        """Take the other kind of lock and drop this one; return whether that was possible."""
        if self._one_kind:
            return False
        with contextlib.suppress(OSError):
            if self.kind is Kind.BYTE:
                if not try_flock(self._fd):
                    return False
                self._ofd(fcntl.F_OFD_SETLK, fcntl.F_UNLCK)
                self.kind = Kind.FLOCK
            else:
                if self._try_byte() is not Conflict.NONE:
                    return False
                fcntl.flock(self._fd, fcntl.LOCK_UN)
                self.kind = Kind.BYTE
            logger.debug("%s: changed to the %s, since a program waits for the other kind of lock",
                         self.what, self.kind.name.lower())  # fmt: skip
            return True
        return False

    # -- in words

    def _refusal_with_owners(self) -> UsageError:
        owners = lock_owners(self._fd, "OFDLCK") + lock_owners(self._fd, "FLOCK")
        return self.refusal(pid for pid, position in owners if position == MARK)

    def _why_unlockable(self, conflict: Conflict) -> str:
        if conflict is Conflict.UNSUPPORTED:
            return (
                f"{self.what}: its file system has no locks, so two programs could move it at "
                "once: move a copy on another file system"
            )
        if conflict is Conflict.PROGRAM:
            hint = "" if self._writable else ": let this user write to it, or run this as root"
            return (
                f"{self.what}: a program has locked all of it, so it cannot be locked for a "
                f"migration{hint}"
            )
        return (
            f"{self.what}: a process that cannot be seen from here has locked it (flock), which "
            "may be moving it: run this as root, and in the PID namespace of that process"
        )


def _has_own_locks(fd: int) -> bool:
    """Return whether this process has set locks on the file of `fd` with F_SETLK."""
    return any(
        lock.kind == "POSIX"
        for number in descriptors_of("self", os.fstat(fd))
        for lock in descriptor_locks("self", number)[0]
    )


def _watch(lock: weakref.ref[FileLock], closed: threading.Event, file: LockedFile) -> None:
    """Look for waiting programs until the lock is closed.

    How long a look takes is up to other programs, so `confirm` and `close` do not wait for one.
    """
    pause, guard = WATCH_SECONDS, HangGuard[int, Waiting]()
    while not closed.wait(pause):
        began = time.thread_time() + guard.seconds
        waits = waiting(file, guard)
        one = lock()
        if one is None:
            return
        one.give_way(waits)
        del one
        used = time.thread_time() + guard.seconds - began
        pause = max(WATCH_SECONDS, used * WATCH_FACTOR)
