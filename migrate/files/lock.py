"""Locks on guests: of all programs that could move a guest, only one may.

Every lock belongs to an open descriptor, so the kernel drops it when the program dies. No child
process inherits it: descriptors are opened for the lock alone, closed on exec, and closed in a
forked child.

    FileLock       a file, or a part of it: see file_lock.py
    DirectoryLock  a directory with a machine in it (flock)
    ProcessLock    a process that runs a guest (flock on what stands for it)

Guests of other kinds have theirs in migrate.guests: DeviceLock, BufferLock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable

from migrate.errors import UsageError
from migrate.files.kernel_locks import lock_owners

BUSY = (errno.EAGAIN, errno.EACCES)


def reopen(fd: int, flags: int) -> int:
    """Open the file behind `fd` once more, for a lock of its own. Raises OSError."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NONBLOCK)


def try_flock(fd: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Take a flock; return False if another open file has it. Raises OSError."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in BUSY:
            raise
        return False
    return True


class Lock(ABC):
    """A lock on a guest, from `acquire` to `close`.

    what     -- the guest, in messages: 'guest file PATH'
    cautions -- sentences for the user, complete once the lock is acquired
    """

    def __init__(self, what: str) -> None:
        self.cautions: list[str] = []
        self.what = what
        _LOCKS.add(self)

    @abstractmethod
    async def acquire(self) -> None:
        """Lock the guest. Raises UsageError if another program moves it, or may be moving it."""

    @abstractmethod
    def confirm(self) -> None:
        """Check that the guest is still locked. Raises MigrationError if it is not."""

    @abstractmethod
    def close(self) -> None:
        """Unlock the guest. May be called again."""

    @abstractmethod
    def close_in_child(self) -> None:
        """Close a forked child's copies of the descriptors, and unlock nothing.

        The parent keeps the lock, and the lock ends with the parent.
        """

    def refusal(self, owners: Iterable[int] = ()) -> UsageError:
        """Return the error that another program moves the guest.

        owners -- the processes that have the lock, as far as they are known
        """
        named = ", ".join(map(str, sorted(set(owners))))
        return UsageError(
            f"{self.what}: another program{f' (process {named})' if named else ''} is moving it: a "
            "guest moves once, and to one place: wait until that has ended, or end it"
        )


_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()


def _close_all_in_child() -> None:
    for lock in list(_LOCKS):
        lock.close_in_child()


os.register_at_fork(after_in_child=_close_all_in_child)


class DirectoryLock(Lock):
    """A lock on a directory with a machine in it, which is moved from there or replaced."""

    def __init__(self, path: str, what: str, *, start: int | None = None) -> None:
        """Open the directory; `path` begins at the open directory `start`. Raises OSError."""
        super().__init__(what)
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=start)

    async def acquire(self) -> None:
        try:
            if not try_flock(self._fd):
                owners = lock_owners(self._fd, "FLOCK")
                raise self.refusal(pid for pid, _ in owners)
        except OSError:
            self.cautions.append(f"{self.what}: its file system has no locks: it is not locked")
        except BaseException:
            self.close()
            raise

    def confirm(self) -> None:
        """Do nothing: nothing takes a flock away from an open directory."""

    def close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            self.close_in_child()

    def close_in_child(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ProcessLock(Lock):
    """A lock on a process that runs a guest (QEMU), whatever socket leads to it.

    Two things stand for a process: the inode of its pidfd, which is the same in all PID namespaces
    (from Linux 6.9 on; before that, all pidfds share one inode), and its directory in /proc, which
    all programs of one PID namespace share. Both are locked where they can be. A process that
    cannot be seen from here is not locked.
    """

    def __init__(self, pid: int, what: str) -> None:
        super().__init__(what)
        self._fds: list[int] = []
        with contextlib.suppress(OSError):
            ours, theirs = os.pidfd_open(os.getpid()), os.pidfd_open(pid)
            self._fds.append(theirs)
            if os.fstat(ours).st_ino == os.fstat(theirs).st_ino:
                os.close(self._fds.pop())
            os.close(ours)
        with contextlib.suppress(OSError):
            self._fds.append(os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    async def acquire(self) -> None:
        for fd in self._fds:
            try:
                free = try_flock(fd)
            except OSError:
                continue
            if not free:
                owners = [pid for pid, _ in lock_owners(fd, "FLOCK")]
                self.close()
                raise self.refusal(owners)

    def confirm(self) -> None:
        """Do nothing: nothing takes a flock away from an open directory."""

    def close(self) -> None:
        for fd in self._fds:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
        self.close_in_child()

    def close_in_child(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
