"""Guest memory as the source reads it: a buffer in this process, or a file read with pread(2).

Files are read, not mapped: reading a mapping would fill the holes of a sparse tmpfs file, and a
file that shrinks would kill the reader with SIGBUS. That costs half the bandwidth of a mapping (10
against 19 GB/s, measured on an EPYC with the file in /dev/shm).
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
from collections.abc import Iterator

from migrate.memory._memory import gather, read_direct
from migrate.memory.drop_behind import DropBehind, is_needed

BOUNCE_BYTES = 256 << 10
# To ask for the end of a shorter stretch takes longer than to read it. After MANY_SHORT in a row,
# the next ones are read together, holes and all.
SHORT_BYTES = 256 << 10
MANY_SHORT = 64


def private_buffer(size: int) -> memoryview:
    """Return `size` bytes of zeros, page-aligned, which makes copies fastest.

    Raises OSError, ValueError or OverflowError if there is not that much memory.
    """
    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class Memory:
    """`size` bytes, in `view` or in the file `fd`. A read past the end of the file gives zeros.

    align -- bytes that offsets, lengths and addresses must be multiples of, if `fd` was opened with
             O_DIRECT; 0: any
    base  -- offset of the guest in the file; not with O_DIRECT
    """

    def __init__(
        self, size: int, view: memoryview | None = None, fd: int = -1, align: int = 0,
        base: int = 0,
    ) -> None:  # fmt: skip
        self.size = size
        self.view = view
        self.fd = fd
        self.align = align
        self.base = base
        # Reads that are not aligned go through this buffer.
        self._bounce = private_buffer(BOUNCE_BYTES) if align else None
        self._extent = (0, 0, False)
        self._short = 0

    @property
    def threaded(self) -> bool:
        """Whether threads may read `fd` at the same time, at the guest's own offsets."""
        return self.view is None and not self.align and not self.base

    @functools.cached_property
    def drop_behind(self) -> DropBehind | None:
        """What keeps bulk reads from filling the page cache; None if nothing need do so.

        Ask before the first of them.
        """
        return DropBehind(self.fd) if self.threaded and is_needed(self.fd) else None

    def read(self, offset: int, into: memoryview) -> int:
        """Copy bytes from `offset` on; return how many (fewer than asked for only at the end)."""
        want = min(len(into), self.size - offset)
        if self.view is not None:
            into[:want] = self.view[offset : offset + want]
            return want
        if self._bounce is not None:
            done = read_direct(self.fd, self.align, self._bounce, into[:want], offset)
            into[done:want] = bytes(want - done)
            return want
        done = 0
        while done < want:
            count = os.preadv(self.fd, [into[done:want]], self.base + offset + done)
            if count == 0:
                break
            done += count
        into[done:want] = bytes(want - done)
        return want

    def gather(
        self, bits: bytes | bytearray | memoryview, first: int, end: int, page_size: int,
        snapshot: memoryview, numbers: memoryview, but: bytes | bytearray | memoryview = b"",
    ) -> tuple[int, int]:  # fmt: skip
        """Copy dirty pages: see migrate.memory._memory.gather."""
        return gather(
            self.view, self.fd, self.size, bits, first, end, page_size, snapshot, numbers,
            self.align, self._bounce, but, self.base,
        )  # fmt: skip

    def extents(self, page_size: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (first page, pages, data) for all of the guest; `data` is False for holes.

        Many small holes and stretches of data in a row count as data. Each walk asks the file
        again, since holes may have been written.
        """
        pages, page = -(-self.size // page_size), 0
        self.forget_extents()
        while page < pages:
            end, data = self.extent(page, page_size)
            yield page, end - page, data
            page = end

    def forget_extents(self) -> None:
        """Have `extent` ask the file again, since holes may have been written."""
        self._extent, self._short = (0, 0, False), 0

    def extent(self, page: int, page_size: int) -> tuple[int, bool]:
        """Return the end of the stretch that contains `page`, and whether it has data or is a hole.

        The last answer is kept: on tmpfs the kernel looks at each page of the stretch.
        """
        first, end, data = self._extent
        if not first <= page < end:
            start, stop = self._data_after(page * page_size)
            data = start < min((page + 1) * page_size, self.size)
            end = -(-stop // page_size) if data or start >= self.size else start // page_size
            together = page + SHORT_BYTES // page_size
            self._short = self._short + 1 if end < together else 0
            if self._short > MANY_SHORT:
                end, data = min(together, -(-self.size // page_size)), True
            self._extent = page, end, data
        return end, data

    def _data_after(self, offset: int) -> tuple[int, int]:
        """Return start and end of the next data at or after `offset`; (size, size) if none."""
        if self.view is not None:
            return offset, self.size
        try:
            start = os.lseek(self.fd, self.base + offset, os.SEEK_DATA)
            end = os.lseek(self.fd, start, os.SEEK_HOLE)
            return min(start - self.base, self.size), min(end - self.base, self.size)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self.size, self.size
            return offset, self.size
