"""Which programs wait for a lock that a migration has on a file.

The migration gives way to the guest's own program alone. A process may be that program if it acts
for root or for the owner of the file, or has the file open for writing. A process that may
only read the file can wait for a lock on it as well; it waits until the migration ends.

/proc/locks shows which processes wait, but not in all cases:

    requests of a description (F_OFD_SETLKW) name no process. Then the threads of all processes are
    looked at: /proc/PID/task/TID/syscall shows which lock a thread waits for, and by which
    descriptor. The kernel shows that to root, and to the same user unless Yama forbids it
    (kernel.yama.ptrace_scope): without it, each process that has the file open for writing is
    assumed to wait

    if the list is longer than we read (kernel_locks.MAX_TABLE_BYTES), threads are looked at too.
    Then it is not known whether a thread waits for our lock or for one of another program

Reading that file may hang, as long as the process likes: the kernel waits for an execve(2) of that
process to end, and that may wait for a FUSE file system. So processes of other users are looked at
in a thread that may be left behind (HangGuard).

Waiting processes of another PID namespace are not shown at all, and clients of a file server in the
kernel (NFS) are not told apart from it.
"""

from __future__ import annotations

import fcntl
import os
import platform
import time
from typing import NamedTuple

from migrate.files.kernel_locks import (
    descriptors_of,
    is_descriptor_of,
    numbers_in,
    read_lock_table,
)
from migrate.runtime.hang_guard import HangGuard
from migrate.runtime.processes import user_ids

# fcntl(2) and flock(2), by machine.
SYSTEM_CALLS = {
    "x86_64": (72, 73), "aarch64": (25, 32), "riscv64": (25, 32), "ppc64le": (55, 143),
    "s390x": (55, 143),
}  # fmt: skip
# Threads of processes that act for others than root and the file's owner: a look at one takes 10 to
# 20 microseconds, and any user may have tens of thousands.
MAX_FOREIGN_THREADS = 1000
# Of the processor, for the open files of one such process: some 5000.
OPEN_FILES_SECONDS = 0.01
# After that, a look at such a process hangs.
HANG_SECONDS = 1.0


class LockedFile(NamedTuple):
    """A file that is locked: how lists of locks name it, its status, and the first byte locked."""

    key: str
    status: os.stat_result
    start: int


class Waiting(NamedTuple):
    """Whether the guest's program waits for the byte, and for the flock.

    certain -- it waits for our lock, and not for one of another program
    """

    byte: bool
    flock: bool
    certain: bool


def waiting(file: LockedFile, guard: HangGuard[int, Waiting]) -> Waiting:
    """Look whether a program that may be the guest's waits for a lock of this process.

    guard -- looks at processes of other users, and remembers from call to call which of them hang
    """
    table = read_lock_table()
    if not table.complete:
        return _threads_waiting(file, guard)._replace(certain=False)
    byte: set[int] = set()
    flock: set[int] = set()
    unnamed = False
    below: set[int] | None = None  # the processes that wait for the last lock, if that is ours
    for lock in table.locks:
        if not lock.waits:
            below = None
            if lock.file == file.key and lock.kind == "OFDLCK" and lock.start == file.start:
                below = byte
            elif lock.file == file.key and lock.kind == "FLOCK" and lock.pid == os.getpid():
                below = flock
        elif below is not None and lock.file == file.key:
            if lock.kind == "OFDLCK":
                unnamed = True
            elif lock.pid > 0:
                below.add(lock.pid)
    by_byte = any(may_be_guests(pid, file) for pid in sorted(byte))
    if unnamed and not by_byte:
        by_byte = _threads_waiting(file, guard).byte
    return Waiting(by_byte, any(may_be_guests(pid, file) for pid in sorted(flock)), certain=True)


def may_be_guests(pid: int, file: LockedFile) -> bool:
    """Return whether a process may be the guest's program, as far as we may look into it."""
    return _acts_for_owner(pid, file) or _writes(pid, file)


def _acts_for_owner(pid: int, file: LockedFile) -> bool:
    acting = user_ids(pid)
    return bool(acting) and acting <= {0, file.status.st_uid}


def _writes(pid: int, file: LockedFile) -> bool:
    deadline = time.thread_time() + OPEN_FILES_SECONDS
    return bool(descriptors_of(pid, file.status, writable=True, deadline=deadline))


def _threads_waiting(file: LockedFile, guard: HangGuard[int, Waiting]) -> Waiting:
    """Look at the threads of all processes; the guest's owner's and root's come first."""
    found: list[Waiting] = []
    foreign: list[int] = []
    for pid in map(int, numbers_in("/proc")):
        try:
            owner = os.stat(f"/proc/{pid}").st_uid
        except OSError:
            continue
        if owner in (0, file.status.st_uid) and _acts_for_owner(pid, file):
            found.append(_locks_waited_for(pid, file))
        else:
            foreign.append(pid)
    looks, left = [], MAX_FOREIGN_THREADS
    for pid in foreign:
        left -= len(numbers_in(f"/proc/{pid}/task"))
        if left < 0:
            break
        looks.append(pid)
    seen = guard.each(looks, lambda pid: _locks_waited_for(pid, file), HANG_SECONDS)
    found += [
        waits for pid, waits in seen.items()
        if (waits.byte or waits.flock) and _writes(pid, file)
    ]  # fmt: skip
    return Waiting(any(one.byte for one in found), any(one.flock for one in found), certain=True)


def _locks_waited_for(pid: int, file: LockedFile) -> Waiting:
    """Return which kinds of lock on the file the threads of a process wait for."""
    byte = flock = False
    for task in numbers_in(f"/proc/{pid}/task"):
        base = f"/proc/{pid}/task/{task}"
        try:
            with open(f"{base}/syscall") as call:
                words = call.read().split()
        except PermissionError:
            writes = _writes(pid, file)
            return Waiting(writes, writes, certain=False)
        except OSError:
            continue
        if len(words) < 3:
            continue  # it runs, or waits outside of a system call
        number, descriptor, command = int(words[0]), int(words[1], 16), int(words[2], 16)
        fcntl_call, flock_call = SYSTEM_CALLS.get(platform.machine(), (-1, -1))
        wants_byte = number == fcntl_call and command in (fcntl.F_SETLKW, fcntl.F_OFD_SETLKW)
        if not wants_byte and number != flock_call:
            continue
        if is_descriptor_of(f"{pid}/task/{task}", descriptor, file.status):
            byte, flock = byte or wants_byte, flock or not wants_byte
    return Waiting(byte, flock, certain=True)
