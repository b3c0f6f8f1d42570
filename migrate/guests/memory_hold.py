"""Holds memory of this program: of all that could be sent of it, each byte goes to one place.

A range is held from the beginning of a migration to its end. It stays held when the guest has
moved, since what is left is an old copy. That ends when the memory is freed, when the guest is
closed, or when another guest has been received into it.

Memory that other processes map too (a file in /dev/shm, multiprocessing.shared_memory) is held by
the file behind it as well, for the part that is mapped. For shared memory without a name only root
has a way to that file.
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

from migrate._memory import address_of
from migrate.errors import UsageError
from migrate.guests.hold import FileHold, Hold
from proto import ErrorCode

MAX_DEPTH = 64
# What sys.getrefcount says of an object that our list alone refers to.
UNUSED = 2


class MemoryInUse(UsageError):  # noqa: N818 - news of another migration, not a fault
    """The memory, or some of it, is being moved or was moved."""

    code = ErrorCode.NO_PLACE


class Mapping(NamedTuple):
    """Shared pages of a file: bytes of it from `at` on."""

    start: int
    end: int
    at: int
    device: int
    inode: int
    path: str


class MemoryHold(Hold):
    """The bytes of `view`.

    receives -- a guest is received into it: one that has moved from there may be replaced
    """

    def __init__(self, view: memoryview, what: str, *, receives: bool = False) -> None:
        super().__init__(what)
        self.start = address_of(view)
        self.end = self.start + len(view)
        self.moved = False
        self._receives = receives
        self._owner = _owner(view)
        self._files: list[FileHold] = []

    def overlaps(self, other: MemoryHold) -> bool:
        return self.start < other.end and other.start < self.end

    async def take(self) -> None:
        _sweep("stop", None)
        with _TURN:
            before = [other for other in _HELD if other.overlaps(self)]
            for other in before:
                if not (other.moved and self._receives):
                    raise MemoryInUse(f"{self.what}: {_REASONS[other.moved]}")
            _HELD.append(self)
        try:
            # The file of memory that is replaced is held by the guest that was there.
            for mapping in () if before else _shared_mappings(self.start, self.end):
                await self._hold_file(mapping)
        except BaseException:
            self.close()
            raise

    async def _hold_file(self, mapping: Mapping) -> None:
        fd = _opened(mapping)
        if fd < 0:
            return
        start = max(mapping.start, self.start)
        at = mapping.at + start - mapping.start
        hold = FileHold(fd, self.what, at, min(mapping.end, self.end) - start)
        # The descriptor stays open as long as the hold: closing one drops fcntl locks.
        hold.also_close(fd)
        await hold.take()
        self._files.append(hold)
        self.cautions += hold.cautions

    def confirm(self) -> None:
        for hold in self._files:
            hold.confirm()

    def keep(self) -> None:
        """The guest has moved: hold its memory until that is freed."""
        self.moved = True
        owner, self._owner = self._owner, None
        try:
            weakref.finalize(owner, self.close).atexit = False
        except TypeError:  # bytearray has no weak references
            _KEPT.append((owner, self))
            if _sweep not in gc.callbacks:
                gc.callbacks.append(_sweep)

    def replace(self) -> None:
        """Another guest is in this memory: none that was there before counts."""
        for other in [one for one in _HELD if one.moved and one.overlaps(self)]:
            other.close()

    def close(self) -> None:
        self._owner = None
        if self in _HELD:
            _HELD.remove(self)
        _KEPT[:] = [(owner, hold) for owner, hold in _KEPT if hold is not self]
        while self._files:
            self._files.pop().close()

    def forget(self) -> None:
        """The child of a fork has a copy of the memory."""


_TURN = threading.Lock()
_HELD: list[MemoryHold] = []
_KEPT: list[tuple[Any, MemoryHold]] = []
_REASONS = {
    False: "it, or some of its memory, is being moved already: a guest moves to one place",
    True: "it, or some of its memory, has moved: what is here is an old copy. To put another guest "
    "into this memory, close the one that has moved first (await guest.close())",
}


def _sweep(phase: str, _info: object) -> None:
    """Called by the garbage collector: lets go of memory that nothing but our list refers to."""
    if phase == "stop":
        for index in reversed(range(len(_KEPT))):
            if sys.getrefcount(_KEPT[index][0]) <= UNUSED:
                _KEPT[index][1].close()


def _owner(view: memoryview) -> Any:
    """The object that the memory belongs to, and that lives as long as it."""
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
    with contextlib.suppress(OSError), open("/proc/self/maps", "rb") as file:
        lines = file.readlines()
    for line in lines:
        addresses, flags, at, device, inode, *path = line.split(maxsplit=5)
        first, last = (int(one, 16) for one in addresses.split(b"-"))
        if flags[3:4] == b"s" and first < end and start < last:
            major, minor = (int(one, 16) for one in device.split(b":"))
            name = os.fsdecode(path[0].rstrip(b"\n")) if path else ""
            yield Mapping(first, last, int(at, 16), os.makedev(major, minor), int(inode), name)


def _opened(mapping: Mapping) -> int:
    """A descriptor of the file behind a mapping, or -1."""
    candidates = [mapping.path, f"/proc/self/map_files/{mapping.start:x}-{mapping.end:x}"]
    with contextlib.suppress(OSError):
        candidates = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")] + candidates
    for path in candidates:
        with contextlib.suppress(OSError):
            named = os.stat(path)
            if (named.st_dev, named.st_ino) == (mapping.device, mapping.inode):
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    return -1
