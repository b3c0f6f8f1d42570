"""Locks memory of this program, so that each byte of it moves to one place only.

A range is locked from the beginning of a migration to its end. It stays locked after the guest has
moved, since what remains is an old copy. The lock ends when the memory is freed, when the guest is
closed, or when another guest has been received into the memory.

Memory that other processes map too (a file in /dev/shm, multiprocessing.shared_memory) is locked by
the file behind it as well, for the part that is mapped. For shared memory without a name, only root
can open that file.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

from migrate.errors import UsageError
from migrate.files.file_lock import FileLock
from migrate.files.lock import Lock
from migrate.memory._memory import address_of
from migrate.runtime.proc_lines import proc_lines
from proto import ErrorCode

MAX_DEPTH = 64
# What sys.getrefcount returns for an object that only our list refers to.
UNUSED = 2


class MemoryInUse(UsageError):  # noqa: N818 - news of another migration, not a fault
    """The memory, or a part of it, is being moved or has moved."""

    code = ErrorCode.NO_PLACE


class Mapping(NamedTuple):
    """Shared pages of a file at the addresses `start` to `end`; `at` is the offset in the file."""

    start: int
    end: int
    at: int
    device: int
    inode: int
    path: str


class BufferLock(Lock):
    """A lock on the memory of `view`.

    receives -- a guest is received into the memory, and may replace one that has moved from there
    """

    def __init__(self, view: memoryview, what: str, *, receives: bool = False) -> None:
        super().__init__(what)
        self.start = address_of(view)
        self.end = self.start + len(view)
        self.moved = False
        self._receives = receives
        self._owner = _owner(view)
        self._files: list[FileLock] = []

    def overlaps(self, other: BufferLock) -> bool:
        return self.start < other.end and other.start < self.end

    async def acquire(self) -> None:
        _sweep("stop", None)
        with _TURN:
            before = [other for other in _LOCKED if other.overlaps(self)]
            for other in before:
                if not (other.moved and self._receives):
                    raise MemoryInUse(f"{self.what}: {_REASONS[other.moved]}")
            _LOCKED.append(self)
        try:
            # The file of replaced memory is locked already, by the guest that was there.
            for mapping in () if before else _shared_mappings(self.start, self.end):
                await self._lock_file(mapping)
        except BaseException:
            self.close()
            raise

    async def _lock_file(self, mapping: Mapping) -> None:
        fd = _opened(mapping)
        if fd < 0:
            return
        start = max(mapping.start, self.start)
        at = mapping.at + start - mapping.start
        lock = FileLock(fd, self.what, at, min(mapping.end, self.end) - start)
        # The descriptor stays open as long as the lock: closing one drops fcntl locks.
        lock.also_close(fd)
        await lock.acquire()
        self._files.append(lock)
        self.cautions += lock.cautions

    def confirm(self) -> None:
        for lock in self._files:
            lock.confirm()

    def keep(self) -> None:
        """Keep the memory of a guest that has moved locked, until it is freed."""
        self.moved = True
        owner, self._owner = self._owner, None
        try:
            weakref.finalize(owner, self.close).atexit = False
        except TypeError:  # bytearray has no weak references
            _KEPT.append((owner, self))
            if _sweep not in gc.callbacks:
                gc.callbacks.append(_sweep)

    def replace(self) -> None:
        """Unlock the guests that have moved from this memory: another guest is in it now."""
        for other in [one for one in _LOCKED if one.moved and one.overlaps(self)]:
            other.close()

    def close(self) -> None:
        self._owner = None
        if self in _LOCKED:
            _LOCKED.remove(self)
        _KEPT[:] = [(owner, lock) for owner, lock in _KEPT if lock is not self]
        while self._files:
            self._files.pop().close()

    def close_in_child(self) -> None:
        """Do nothing: a forked child has a copy of the memory."""


_TURN = threading.Lock()
_LOCKED: list[BufferLock] = []
_KEPT: list[tuple[Any, BufferLock]] = []
_REASONS = {
    False: "it, or some of its memory, is being moved already: a guest moves to one place",
    True: "it, or some of its memory, has moved: what is here is an old copy. To put another guest "
    "into this memory, close the one that has moved first (await guest.close())",
}


def _sweep(phase: str, _info: object) -> None:
    """Unlock memory that only our list refers to. The garbage collector calls this."""
    if phase == "stop":
        for index in reversed(range(len(_KEPT))):
            if sys.getrefcount(_KEPT[index][0]) <= UNUSED:
                _KEPT[index][1].close()


def _owner(view: memoryview) -> Any:
    """Return the object that the memory belongs to, and that lives as long as the memory."""
    owner = view.obj
    for _ in range(MAX_DEPTH):
        base = getattr(owner, "base", None) if type(owner).__module__ == "numpy" else None
        base = owner.obj if isinstance(owner, memoryview) else base
        if base is None:
            break
        owner = base
    return owner


def _shared_mappings(start: int, end: int) -> Iterator[Mapping]:
    lines: list[bytes] = []
    with contextlib.suppress(OSError):
        lines = proc_lines("/proc/self/maps")
    for line in lines:
        addresses, flags, at, device, inode, *path = line.split(maxsplit=5)
        first, last = (int(one, 16) for one in addresses.split(b"-"))
        if flags[3:4] == b"s" and first < end and start < last:
            major, minor = (int(one, 16) for one in device.split(b":"))
            name = os.fsdecode(path[0]) if path else ""
            yield Mapping(first, last, int(at, 16), os.makedev(major, minor), int(inode), name)


def _opened(mapping: Mapping) -> int:
    """Open the file behind a mapping; return -1 if it cannot be opened."""
    candidates = [mapping.path, f"/proc/self/map_files/{mapping.start:x}-{mapping.end:x}"]
    with contextlib.suppress(OSError):
        candidates = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")] + candidates
    for path in candidates:
        with contextlib.suppress(OSError):
            named = os.stat(path)
            if (named.st_dev, named.st_ino) == (mapping.device, mapping.inode):
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    return -1
