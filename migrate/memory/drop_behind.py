"""Reads of a whole file that do not push other files out of the page cache.

The kernel keeps what is read, and a file larger than the free memory would take the place of what
the other programs of the host use. So what a bulk read has brought into the cache is dropped again
behind it (POSIX_FADV_DONTNEED), if the file does not fit into free memory. Pages that the guest's
own programs have mapped, or have written and not yet flushed, stay: the kernel does not drop those.

Pieces of which at least half was cached in the beginning are left alone: they belong to a file that
is in use. That is asked before anything is read, since the kernel reads ahead.
"""

from __future__ import annotations

import os

from migrate.files.filesystem import file_system_of
from migrate.memory._memory import cached_pages
from migrate.runtime.machine_memory import free_memory

# What is looked at and dropped together, and what a thread scans at a time: a guest of less than
# two pieces is scanned by one thread.
PIECE_BYTES = 16 << 20
# More than this share of the free memory is not taken for a guest.
FREE_SHARE = 0.5
PAGE = os.sysconf("SC_PAGESIZE")
# File systems whose files are in the page cache and nowhere else.
IN_MEMORY = ("tmpfs", "ramfs", "hugetlbfs", "devtmpfs")


def is_needed(fd: int) -> bool:
    """Return whether bulk reads of a file would push other files out of the page cache."""
    try:
        if file_system_of(fd) in IN_MEMORY:
            return False
        status = os.fstat(fd)
        missing = status.st_blocks * 512 - cached_pages(fd, 0, status.st_size) * PAGE
    except OSError:  # Linux before 6.5 does not tell what is cached
        return False
    return missing > FREE_SHARE * free_memory()


class DropBehind:
    """Drops what bulk reads of one regular file have brought in. Threads may share it.

    fd -- the file, open to be read; nothing of it has been read yet
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        size = os.fstat(fd).st_size
        self._in_use = [
            cached_pages(fd, offset, PIECE_BYTES) * PAGE >= PIECE_BYTES // 2
            for offset in range(0, size, PIECE_BYTES)
        ]

    def drop(self, start: int, end: int) -> None:
        """Drop the bytes from `start` to `end`, which have been read."""
        while start < end:
            piece = start // PIECE_BYTES
            stop = min(end, (piece + 1) * PIECE_BYTES)
            if piece < len(self._in_use) and not self._in_use[piece]:
                os.posix_fadvise(self._fd, start, stop - start, os.POSIX_FADV_DONTNEED)
            start = stop
