"""Remove files and whole directories that we have made, in a thread if that may take long.

The owner of a directory may give any of its names to another entry at any moment, also to a
directory of root's that is full: he can rename that one, but not remove it. So

    an entry is removed only if it is the one whose device and inode we know. Take those from a
    descriptor that is still open: nothing else can get the inode until it is closed
    what we have made as a file is removed as one (`remove_file`), which no directory can be
    what is in a directory is removed through a descriptor of that very directory (`remove_tree`)

Between the check and the system call the name may change hands once more. Then a file or an empty
directory is removed, which the owner of the directory above could have removed himself.

Other users may write in a directory while it is removed. So no link in it is followed, at most two
directories of it are open at a time, and the removal ends after REMOVAL_SECONDS. The rest stays.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import secrets
import threading
import time
from typing import ClassVar

from migrate.files.identity import Identity, entry_is, identity_of
from migrate.files.walk import NO_LINK

REMOVAL_SECONDS = 60.0
# How long the end of the program waits for removals that run in a thread.
END_SECONDS = 3.0
_LISTED = os.O_RDONLY | os.O_DIRECTORY | NO_LINK


def remove_file(directory: int, name: str, identity: Identity) -> None:
    """Remove the name of a file, if the name leads to that file; never a directory.

    directory -- an open directory

    Raises OSError if the file cannot be removed.
    """
    if entry_is(directory, name, identity):
        os.unlink(name, dir_fd=directory)  # which refuses a directory that has the name by now


def remove_tree(directory: int, name: str, identity: Identity) -> None:
    """Remove a directory with all that is in it, as far as possible, if it is that directory.

    directory -- an open directory, the one above

    Raises nothing.
    """
    with contextlib.suppress(OSError):
        fd = os.open(name, _LISTED, dir_fd=directory)
        try:
            if identity_of(os.fstat(fd)) != identity:
                return
            _TreeRemoval(fd).run()
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=directory)


def remove_in_thread(directory: int, name: str, identity: Identity, path: str) -> None:
    """Remove a directory as `remove_tree` does, in a thread.

    directory -- an open directory; it is closed at the end
    path      -- of the entry, for messages

    `finish_removals` waits for it. Raises RuntimeError if no thread can be started.
    """
    _removals[:] = [one for one in _removals if one.is_alive() or one.remains]
    removal = _Removal(directory, name, identity, path)
    _removals.append(removal)
    try:
        removal.start()
    except BaseException:
        os.close(directory)
        raise


class _Removal(threading.Thread):
    """A removal in a thread; `remains` until the entry is gone."""

    def __init__(self, directory: int, name: str, identity: Identity, path: str) -> None:
        super().__init__(name="removal", daemon=True)
        self.path = path
        self.remains = True
        self._directory, self._entry, self._identity = directory, name, identity

    def run(self) -> None:
        try:
            remove_tree(self._directory, self._entry, self._identity)
            self.remains = entry_is(self._directory, self._entry, self._identity)
        finally:
            os.close(self._directory)


_removals: list[_Removal] = []


def finish_removals() -> list[str]:
    """Wait END_SECONDS for the removals in threads, as the program ends.

    Returns the paths of what remains. Call it once: the next call returns nothing.
    """
    _TreeRemoval.all_end = time.monotonic() + END_SECONDS
    try:
        for one in _removals:
            if one.ident is not None:
                # A removal ends by itself then, unless the file system does not answer.
                one.join(max(_TreeRemoval.all_end + 1 - time.monotonic(), 0))
        return [one.path for one in _removals if one.remains]
    finally:
        _removals.clear()
        _TreeRemoval.all_end = math.inf


atexit.register(finish_removals)


class _TreeRemoval:
    """Remove all that is in an open directory, at any depth, for REMOVAL_SECONDS at most.

    An inner directory that is not empty is moved to the top, under a number, and emptied in its
    turn. So at most two directories are open, and two numbers are all that is remembered, whatever
    the depth and width of the tree. A mount point cannot be moved, and stays.
    """

    # When every removal ends (time.monotonic()), since the program does.
    all_end: ClassVar[float] = math.inf

    def __init__(self, top: int) -> None:
        self._top = top
        self._mark = f".{secrets.token_hex(8)}."
        self._moved = 0
        self._end = time.monotonic() + REMOVAL_SECONDS

    def run(self) -> None:
        self._empty(self._top)
        emptied = 0
        while emptied < self._moved and not self._is_late():
            name = f"{self._mark}{emptied}"
            emptied += 1
            with contextlib.suppress(OSError):
                fd = os.open(name, _LISTED, dir_fd=self._top)
                try:
                    self._empty(fd)
                finally:
                    os.close(fd)
                os.rmdir(name, dir_fd=self._top)

    def _is_late(self) -> bool:
        return time.monotonic() > min(self._end, self.all_end)

    def _empty(self, fd: int) -> None:
        """Remove or move each entry of a directory.

        Some file systems skip entries while others are removed, so the directory is read again
        until a whole reading finds nothing to remove.
        """
        found = True
        while found and not self._is_late():
            found = False
            with contextlib.suppress(OSError), os.scandir(fd) as entries:
                for entry in entries:
                    if self._is_late():
                        return
                    found |= not entry.name.startswith(self._mark) and self._clear(fd, entry)

    def _clear(self, fd: int, entry: os.DirEntry[str]) -> bool:
        """Remove an entry or move it to the top; return whether it is gone from `fd`."""
        try:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=fd)
                return True
            with contextlib.suppress(OSError):
                os.rmdir(entry.name, dir_fd=fd)
                return True
            name = f"{self._mark}{self._moved}"
            os.rename(entry.name, name, src_dir_fd=fd, dst_dir_fd=self._top)
        except OSError:
            return False
        self._moved += 1
        return True
