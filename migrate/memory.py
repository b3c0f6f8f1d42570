"""Guest memory as the source reads it: a buffer in this process, or a file read with pread(2).

Files are read, not mapped: a mapping would fill the holes of a sparse tmpfs file as we look at
them, and a file that shrinks would kill the reader with SIGBUS. Reading costs half the bandwidth
of a mapping (10 against 19 GB/s, measured on an EPYC with the file in /dev/shm).
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator

from migrate._memory import gather, read_direct

BOUNCE_BYTES = 256 << 10
# A stretch that is shorter takes longer to be asked for than to be read. After so many in a row the
# next ones are read as one, holes and all.
SHORT_BYTES = 256 << 10
MANY_SHORT = 64


def private_buffer(size: int) -> memoryview:
    """`size` bytes of zeros, page-aligned, which copies like best.

    Raises OSError, ValueError or OverflowError where there is no such memory.
    """
    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class Memory:
    """`size` bytes, in `view` or behind `fd`; reads past the end give zeros.

    align -- bytes that offsets, lengths and addresses must be multiples of, where `fd` was opened
             with O_DIRECT; 0: no rule
    """

    def __init__(
        self, size: int, view: memoryview | None = None, fd: int = -1, align: int = 0
    ) -> None:
        self.size = size
        self.view = view
        self.fd = fd
        self.align = align
        # What does not fit the rule is read into this, and copied.
        self._bounce = private_buffer(BOUNCE_BYTES) if align else None
        self._extent = (0, 0, False)
        self._short = 0

    @property
    def threaded(self) -> bool:
        """Whether threads may read `fd` at the same time, at any offset."""
        return self.view is None and not self.align

    def read(self, offset: int, into: memoryview) -> int:
        """Copies bytes from `offset` on; how many there were (fewer only at the end)."""
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
            count = os.preadv(self.fd, [into[done:want]], offset + done)
            if count == 0:
                break
            done += count
        into[done:want] = bytes(want - done)
        return want

    def gather(
        self, bits: bytes | bytearray | memoryview, first: int, end: int, page_size: int,
        snapshot: memoryview, numbers: memoryview, but: bytes | bytearray | memoryview = b"",
    ) -> tuple[int, int]:  # fmt: skip
        """Copies dirty pages: see migrate._memory.gather."""
        return gather(
            self.view, self.fd, self.size, bits, first, end, page_size, snapshot, numbers,
            self.align, self._bounce, but,
        )  # fmt: skip

    def extents(self, page_size: int) -> Iterator[tuple[int, int, bool]]:
        """(first page, pages, data) for all of the guest; `data` is False for holes. Where holes
        and data are many and small, they are data together.

        Every walk looks anew: what was a hole may have been written since.
        """
        pages, page = -(-self.size // page_size), 0
        self._extent, self._short = (0, 0, False), 0
        while page < pages:
            end, data = self.extent(page, page_size)
            yield page, end - page, data
            page = end

    def extent(self, page: int, page_size: int) -> tuple[int, bool]:
        """Where the stretch that `page` is in ends, and whether it has data; False for a hole.

        The last answer is kept: on tmpfs the kernel looks at each page up to the end of it.
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
        """The next stretch of data at or after `offset`; at the end, (size, size)."""
        if self.view is not None:
            return offset, self.size
        try:
            start = os.lseek(self.fd, offset, os.SEEK_DATA)
            return min(start, self.size), min(os.lseek(self.fd, start, os.SEEK_HOLE), self.size)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self.size, self.size
            return offset, self.size
