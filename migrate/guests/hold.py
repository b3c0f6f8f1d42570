"""Holds a file: of all programs that could move it, one may.

The lock is on the file itself, by device and inode, so it counts under every name, link and mount,
whatever the user, the container or the journal. The kernel drops it when we die. No child inherits
it: the descriptor is opened for the lock alone, closed on exec, and closed in a forked child.

There are two kinds of lock, since the file belongs to a program that may lock it too:

    byte    an open file description lock (F_OFD_SETLK) from FAR on, far behind all data: SQLite,
            LMDB and QEMU lock bytes near the start, BoltDB and gdbm use flock
    flock   where the byte cannot be had: a program has locked the whole file with fcntl(2) (InnoDB,
            H2, Java's FileChannel.lock), or we may only read the file

A mover tries the byte first. Two movers can never each have one kind: who takes the byte looks
whether a mover has the flock, and who takes the flock looks at the byte after that. A lock that
begins at FAR or behind it is a mover's. A flock may be a mover's or the guest's own program's: the
file position of a mover's descriptor is MARK, which /proc/PID/fdinfo shows. A flock whose owner we
cannot see (another user, another PID namespace) could be a mover's, and is refused.

A program that locks the whole file with fcntl(2) for each transaction would wait for our byte. So a
thread looks every WATCH_SECONDS whether anything waits for our lock (/proc/locks); then we take the
other kind first and drop this one after that. If the other kind cannot be had, we give up our
lock, the guest's program goes on, and the migration fails before its commit.

What remains: a program that tries to lock the whole file *without waiting* (LOCK_NB) is told that
it is locked, and leaves no trace that we could see. A file on an overlay and the same file in the
overlay's upper directory are two inodes to the kernel. Locks on network file systems hold as far as
their servers keep them; there the two kinds are one, so we do not change between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import struct
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from enum import Enum, auto
from typing import NamedTuple

from migrate.errors import MigrationError, UsageError

FAR = 1 << 62
# The file position of a descriptor that holds a flock for a migration.
MARK = 0x58424D48
WATCH_SECONDS = 0.1
# A lock that a program takes for each transaction is free again within this time.
PATIENCE_SECONDS = 1.0
POLL_SECONDS = 0.02
PROBES, TRIES = 20, 5

# struct flock: type, whence, start, length, process
_FLOCK = struct.Struct("hhqqi")
_BUSY = (errno.EAGAIN, errno.EACCES)
ONE_KIND = ("nfs", "nfs4", "cifs", "smb3")
# File systems without this kind of lock, and kernels without F_OFD_SETLK.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Found(Enum):
    """What stands in the way of a lock."""

    NOTHING = auto()
    MOVER = auto()
    PROGRAM = auto()
    UNKNOWN = auto()
    UNSUPPORTED = auto()


class KernelLock(NamedTuple):
    """A line of /proc/locks. pid -- -1 for locks of a description, 0 where we cannot see it"""

    number: str
    waits: bool
    kind: str
    write: bool
    pid: int
    file: str
    start: int


def reopened(fd: int, flags: int) -> int:
    """Open the file behind `fd` once more, for a lock of its own. Raises OSError."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NONBLOCK)


def try_flock(fd: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Take a flock; False where another description has it. Raises OSError."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _BUSY:
            raise
        return False
    return True


def kernel_locks() -> Iterator[KernelLock]:
    """Read /proc/locks; nothing where the kernel does not show it."""
    text = ""
    with contextlib.suppress(OSError), open("/proc/locks") as file:
        text = file.read()
    for line in text.splitlines():
        lock = _parsed(line.split())
        if lock is not None:
            yield lock


def _parsed(words: list[str]) -> KernelLock | None:
    """`1: [->] FLOCK ADVISORY WRITE 1425 fe:00:753923 0 EOF`."""
    waits = words[1:2] == ["->"]
    if waits:
        del words[1]
    try:
        number, kind, _, mode, pid, file, start = words[:7]
        return KernelLock(number, waits, kind, mode == "WRITE", int(pid), file, int(start))
    except ValueError:
        return None  # a lease, or a line of a later kernel


def file_key(fd: int) -> str:
    """How /proc/locks names the file of `fd`, `major:minor:inode`.

    A lock that we hold tells, and it may not be what stat(2) says (btrfs, overlays).
    """
    for lock, _ in _locks_of("self", str(fd)):
        return lock.file
    named = os.fstat(fd)
    return f"{os.major(named.st_dev):02x}:{os.minor(named.st_dev):02x}:{named.st_ino}"


def _locks_of(pid: str, fd: str) -> list[tuple[KernelLock, int]]:
    """The locks of one descriptor, each with the descriptor's file position."""
    found, position = [], 0
    with contextlib.suppress(OSError), open(f"/proc/{pid}/fdinfo/{fd}") as file:
        for line in file:
            words = line.split()
            if words[:1] == ["pos:"]:
                position = int(words[1])
            elif words[:1] == ["lock:"] and (lock := _parsed(words[1:])) is not None:
                found.append((lock, position))
    return found


def lock_owners(
    key: str, kind: str, processes: Iterable[object] | None = None
) -> list[tuple[int, int]]:
    """(PID, file position) of each descriptor we can see that has such a lock on the file.

    processes -- to look at; None: all, which takes a while
    """
    found = []
    if processes is None:
        processes = [name for name in os.listdir("/proc") if name.isdecimal()]
    for pid in map(str, processes):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fdinfo"):
                found += [
                    (int(pid), position) for lock, position in _locks_of(pid, fd)
                    if lock.file == key and lock.kind == kind
                ]  # fmt: skip
    return found


def file_system(fd: int) -> str:
    """The type of the file system that a file was opened on; "" where it is not known."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        with open(f"/proc/self/fdinfo/{fd}") as file:
            [mount] = [line.split()[1] for line in file if line.startswith("mnt_id:")]
        with open("/proc/self/mountinfo") as file:
            for line in file:
                if line.split()[0] == mount:
                    return line.partition(" - ")[2].split()[0]
    return ""


class Hold(ABC):
    """A guest that is held by this program, from `take` to `close`.

    cautions -- sentences for the user, once it is taken
    """

    def __init__(self, what: str) -> None:
        """what -- the guest, in messages: "guest file PATH\""""
        self.cautions: list[str] = []
        self.what = what
        _HOLDS.add(self)

    @abstractmethod
    async def take(self) -> None:
        """Hold the guest. Raises UsageError where another program moves it, or may."""

    @abstractmethod
    def confirm(self) -> None:
        """Make sure that the guest is still held. Raises MigrationError where it is not."""

    @abstractmethod
    def close(self) -> None:
        """Let other programs move the guest. May be called again."""

    @abstractmethod
    def forget(self) -> None:
        """Close our copies of descriptors in a forked child: the parent holds the guest as before,
        and no longer than it lives."""

    def taken(self, owners: Iterable[int] = ()) -> UsageError:
        """What to raise where another program moves the guest; `owners`: its PID, if known."""
        named = ", ".join(map(str, sorted(set(owners))))
        return UsageError(
            f"{self.what}: another program{f' (process {named})' if named else ''} is moving it: a "
            "guest moves once, and to one place: wait until that has ended, or end it"
        )


_HOLDS: weakref.WeakSet[Hold] = weakref.WeakSet()


def _forget_in_child() -> None:
    for hold in list(_HOLDS):
        hold.forget()


os.register_at_fork(after_in_child=_forget_in_child)


class FileHold(Hold):
    """A lock on the file behind `fd`, or on `length` bytes of it from `start` on (0: all).

    lost -- why the lock was given up; "" while it is held

    The flock knows no ranges: where it has to be taken, parts of one file exclude each other.
    """

    def __init__(self, fd: int, what: str, start: int = 0, length: int = 0) -> None:
        """Raises UsageError where the file cannot be opened once more."""
        super().__init__(what)
        self.lost = ""
        self._range = FAR + start, length
        self._byte = self._flock = False
        self._writable = True
        self._waited_since = 0.0
        self._fd = -1
        self._others: list[int] = []
        try:
            try:
                self._fd = reopened(fd, os.O_RDWR)
            except OSError:
                self._writable = False
                self._fd = reopened(fd, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system may have no such position
                os.lseek(self._fd, MARK, os.SEEK_SET)
        except OSError as error:
            raise UsageError(f"{what}: it cannot be locked: {error.strerror}") from None
        # There a flock is a lock on the whole file to the server, and excludes the byte by itself.
        self._one_kind = file_system(self._fd) in ONE_KIND
        self._turn = threading.Lock()
        self._over = threading.Event()

    async def take(self) -> None:
        try:
            end, tries = time.monotonic() + PATIENCE_SECONDS, 0
            while (found := self._try()) is not Found.NOTHING:
                tries += 1
                late = tries > TRIES and time.monotonic() > end
                if found is Found.MOVER:
                    raise self._taken()
                if found is Found.UNSUPPORTED or late:
                    raise UsageError(self._unlockable(found))
                await asyncio.sleep(POLL_SECONDS)
        except BaseException:
            self.close()
            raise
        # The thread has no reference of its own: a hold that is forgotten is closed.
        watching = threading.Thread(
            target=_watch, args=(weakref.ref(self), self._over), name="hold", daemon=True
        )
        watching.start()

    def confirm(self) -> None:
        with self._turn:
            if not self.lost and not (self._byte or self._flock):
                self.lost = f"{self.what}: it is not locked any more"
            try:
                if self._byte and self._try_byte() is not Found.NOTHING:
                    self.lost = f"{self.what}: another program has locked it meanwhile"
                if self._flock and not try_flock(self._fd):
                    self.lost = f"{self.what}: another program has locked it meanwhile"
            except OSError as error:
                self.lost = f"{self.what}: the lock on it is lost: {error.strerror}"
            if self.lost:
                raise MigrationError(self.lost)

    def close(self) -> None:
        with self._turn:
            if self._fd < 0:
                return
            self._over.set()
            key = file_key(self._fd)
            self._unlock()
            # Closing any descriptor of a file drops this process's own fcntl locks on it: where the
            # program that uses us has one, the descriptor stays open.
            ours = os.getpid()
            if not any(one.kind == "POSIX" and one.pid == ours and one.file == key
                       for one in kernel_locks()):  # fmt: skip
                for fd in (self._fd, *self._others):
                    os.close(fd)
            self._fd, self._others = -1, []

    def also_close(self, fd: int) -> None:
        """Close this descriptor of the same file with ours."""
        self._others.append(fd)

    def forget(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    # -- both kinds

    def _try(self) -> Found:
        """Take one kind of lock, if no mover has the other; what stands in the way."""
        found = self._try_byte()
        if found is Found.NOTHING:
            self._byte = True
            owner = Found.NOTHING if self._one_kind else self._flock_owner()
            if owner in (Found.NOTHING, Found.PROGRAM):
                return Found.NOTHING
            self._unlock()
            return owner
        return found if found is Found.MOVER else self._try_flock_instead(found)

    def _try_flock_instead(self, found: Found) -> Found:
        """`found`: what stands in the way of the byte."""
        try:
            if not try_flock(self._fd):
                owner = self._flock_owner()
                return Found.UNKNOWN if owner is Found.NOTHING else owner  # it has just gone
        except OSError:
            return Found.UNSUPPORTED
        self._flock = True
        if self._who_has_byte() is Found.MOVER:  # it was taken since we looked
            self._unlock()
            return Found.MOVER
        if found is Found.UNSUPPORTED:
            self.cautions.append(
                f"{self.what}: its file system has no record locks, so it is locked by flock alone"
            )
        return Found.NOTHING

    def _try_byte(self) -> Found:
        if not self._writable:
            return self._who_has_byte() or Found.PROGRAM
        try:
            self._ofd(fcntl.F_OFD_SETLK, fcntl.F_WRLCK)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return Found.UNSUPPORTED
            if error.errno not in _BUSY:
                return Found.UNKNOWN
            return self._who_has_byte() or Found.UNKNOWN  # it may just have gone
        return Found.NOTHING

    def _who_has_byte(self) -> Found | None:
        """None: there is no lock on it but perhaps our own."""
        try:
            kind, _, start, _, _ = self._ofd(fcntl.F_OFD_GETLK, fcntl.F_WRLCK)
        except OSError:
            return Found.UNSUPPORTED
        if kind == fcntl.F_UNLCK:
            return None
        return Found.MOVER if start >= FAR else Found.PROGRAM

    def _ofd(self, command: int, kind: int) -> tuple[int, ...]:
        wanted = _FLOCK.pack(kind, os.SEEK_SET, *self._range, 0)
        return _FLOCK.unpack(fcntl.fcntl(self._fd, command, wanted))

    def _flock_owner(self) -> Found:
        """Whether a mover has the flock. Asking takes it for an instant, shared."""
        key = file_key(self._fd)
        owners: list[tuple[int, int]] = []
        for _ in range(PROBES):  # a program may take and drop it faster than we find it
            try:
                if try_flock(self._fd, fcntl.LOCK_SH):
                    fcntl.flock(self._fd, fcntl.LOCK_UN)
                    return Found.NOTHING
            except OSError:
                return Found.NOTHING  # there is no flock here, so nobody has one
            named = {one.pid for one in kernel_locks() if one.file == key and one.kind == "FLOCK"}
            if owners := lock_owners(key, "FLOCK", named):
                break
        else:
            owners = lock_owners(key, "FLOCK")  # who took it has ended, and a child has it
        if any(position == MARK for _, position in owners):
            return Found.MOVER
        return Found.PROGRAM if owners else Found.UNKNOWN

    def _unlock(self) -> None:
        """Explicitly: a child that was forked just now may still have the descriptor."""
        with contextlib.suppress(OSError):
            if self._byte:
                self._ofd(fcntl.F_OFD_SETLK, fcntl.F_UNLCK)
        with contextlib.suppress(OSError):
            if self._flock:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._byte = self._flock = False

    # -- the guest's own program

    def make_way(self) -> None:
        """Change to the other kind of lock where a program waits for this one."""
        with self._turn:
            if self._fd < 0 or not (self._byte or self._flock):
                return
            byte, flock = self._waited_for()
            with contextlib.suppress(OSError):
                if byte and not self._one_kind and try_flock(self._fd):
                    self._ofd(fcntl.F_OFD_SETLK, fcntl.F_UNLCK)
                    self._byte, self._flock, byte = False, True, False
                if flock and not self._one_kind and self._try_byte() is Found.NOTHING:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)
                    self._byte, self._flock, flock = True, False, False
            if not (byte or flock):
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

    def _waited_for(self) -> tuple[bool, bool]:
        """Whether anything waits for our byte, and for our flock."""
        key, ours = file_key(self._fd), os.getpid()
        byte = flock = False
        below = ""  # the kind of our lock that the lines belong to
        for lock in kernel_locks():
            if not lock.waits:
                below = ""
                if lock.file == key and lock.kind == "OFDLCK" and lock.start == self._range[0]:
                    below = "byte"
                elif lock.file == key and lock.kind == "FLOCK" and lock.pid == ours:
                    below = "flock"
            elif below and lock.file == key:
                byte |= below == "byte"
                flock |= below == "flock"
        return byte and self._byte, flock and self._flock

    # -- in words

    def _taken(self) -> UsageError:
        key = file_key(self._fd)
        owners = lock_owners(key, "OFDLCK") + lock_owners(key, "FLOCK")
        return self.taken(pid for pid, position in owners if position == MARK)

    def _unlockable(self, found: Found) -> str:
        if found is Found.UNSUPPORTED:
            return (
                f"{self.what}: its file system has no locks, so two programs could move it at "
                "once: move a copy on another file system"
            )
        if found is Found.PROGRAM:
            hint = "" if self._writable else ": let this user write to it, or run this as root"
            return (
                f"{self.what}: a program has locked all of it, so it cannot be locked for a "
                f"migration{hint}"
            )
        return (
            f"{self.what}: a process that cannot be seen from here has locked it (flock), which "
            "may be moving it: run this as root, and in the PID namespace of that process"
        )


class DirectoryHold(Hold):
    """A directory with a machine in it, which is lifted or replaced."""

    def __init__(self, path: str, what: str) -> None:
        """Raises OSError."""
        super().__init__(what)
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    async def take(self) -> None:
        try:
            if not try_flock(self._fd):
                owners = lock_owners(file_key(self._fd), "FLOCK")
                raise self.taken(pid for pid, _ in owners)
        except OSError:
            self.cautions.append(f"{self.what}: its file system has no locks: it is not held")
        except BaseException:
            self.close()
            raise

    def confirm(self) -> None:
        """It stays as it is, whatever becomes of the hold."""

    def close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            self.forget()

    def forget(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ProcessHold(Hold):
    """A process that runs a guest (QEMU), whatever socket leads to it.

    Nothing is held if the process cannot be seen from here.
    """

    def __init__(self, pid: int, what: str) -> None:
        super().__init__(what)
        self._fds: list[int] = []
        with contextlib.suppress(OSError):  # seen from all PID namespaces, from Linux 6.9 on
            ours, theirs = os.pidfd_open(os.getpid()), os.pidfd_open(pid)
            self._fds.append(theirs)
            if os.fstat(ours).st_ino == os.fstat(theirs).st_ino:
                os.close(self._fds.pop())  # an earlier kernel has one inode for all of them
            os.close(ours)
        with contextlib.suppress(OSError):
            self._fds.append(os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    async def take(self) -> None:
        for fd in self._fds:
            try:
                free = try_flock(fd)
            except OSError:
                continue
            if not free:
                owners = [pid for pid, _ in lock_owners(file_key(fd), "FLOCK")]
                self.close()
                raise self.taken(owners)

    def confirm(self) -> None:
        """It cannot be lost."""

    def close(self) -> None:
        for fd in self._fds:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
        self.forget()

    def forget(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


def _watch(hold: weakref.ref[FileHold], over: threading.Event) -> None:
    while not over.wait(WATCH_SECONDS):
        one = hold()
        if one is None:
            return
        one.make_way()
        del one
