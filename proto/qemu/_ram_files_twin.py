"""Pages of QEMU's stream written into files, and back, in plain Python: see _ram_files.pyx.

Here a page that becomes zero is written as zeros, and no hole is made for it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from proto.codec._batch_twin import RAM_DELTA, RAM_PAGE, RAM_RECORD, RAM_ZERO
from proto.codec._xbzrle_twin import check_page_size, delta_runs
from proto.codec.faults import FaultError
from proto.qemu._ram_reader_twin import FLAG_CONTINUE, FLAG_PAGE, FLAG_ZERO, MAX_NAME
from proto.wire.errors import DecodeError

if TYPE_CHECKING:
    from typing_extensions import Buffer


class RamApplier:
    """Writes pages to files.

    blocks -- pages of each block, in the order of the stream's list
    files  -- a descriptor for each, readable and writable: as long as the block, and all zeros
    """

    def __init__(self, blocks: Sequence[int], files: Sequence[int], page_size: int) -> None:
        check_page_size(page_size)
        if not blocks or len(files) != len(blocks):
            raise ValueError(f"{len(blocks)} blocks and {len(files)} files")
        self._page_size = page_size
        self._files = list(files)
        self._firsts = [0, *accumulate(blocks)]
        self._filled: set[int] = set()

    def apply(self, data: Buffer, records: Buffer, count: int) -> None:
        source, table, size = memoryview(data), memoryview(records), self._page_size
        if count < 0 or len(table) < count * RAM_RECORD.size:
            raise ValueError("there are fewer records than that")
        found = [RAM_RECORD.unpack_from(table, i * RAM_RECORD.size) for i in range(count)]
        for page, at, length, kind in found:
            outside = page >= self._firsts[-1] or at + length > len(source)
            if outside or kind > RAM_DELTA or (kind == RAM_PAGE and length != size):
                raise ValueError("records that are not those of this data")
        for page, at, length, kind in found:
            if kind == RAM_PAGE:
                self._write(page, bytes(source[at : at + size]))
            elif kind == RAM_ZERO and page in self._filled:
                self._write(page, bytes(size))
            elif kind == RAM_DELTA and length:
                self._write(page, self._patched(page, bytes(source[at : at + length])))

    def _place(self, page: int) -> tuple[int, int]:
        block = max(i for i, first in enumerate(self._firsts[:-1]) if first <= page)
        return self._files[block], (page - self._firsts[block]) * self._page_size

    def _write(self, page: int, content: bytes) -> None:
        fd, offset = self._place(page)
        while content:
            done = os.pwrite(fd, content, offset)
            content, offset = content[done:], offset + done
        self._filled.add(page)

    def _patched(self, page: int, delta: bytes) -> bytes:
        fd, offset = self._place(page)
        content = bytearray(os.pread(fd, self._page_size, offset))
        try:
            for at, run in delta_runs(delta, self._page_size):
                content[at : at + len(run)] = run
        except FaultError as fault:
            raise DecodeError(f"page {page}: {fault}") from None
        return bytes(content)


class RamRecorder:
    """Writes pages as records of QEMU's RAM sections.

    blocks -- (name, pages) of each, in the order of the stream's list
    """

    def __init__(self, blocks: Sequence[tuple[bytes, int]], page_size: int) -> None:
        check_page_size(page_size)
        if not blocks or not all(0 < len(name) <= MAX_NAME for name, _ in blocks):
            raise ValueError(
                "a block without a name, with a longer one than 255 bytes, or no block"
            )
        self._blocks = list(blocks)
        self._page_size = page_size
        self._block = -1

    def put(
        self, out: Buffer, block: int, page: int, count: int, data: Buffer | None
    ) -> tuple[int, int]:
        target, size = memoryview(out), self._page_size
        source = None if data is None else memoryview(data)
        if not 0 <= block < len(self._blocks):
            raise ValueError(f"there is no block {block}")
        name, pages = self._blocks[block]
        if page + count > pages:
            raise ValueError("pages outside the block")
        if source is not None and len(source) < count * size:
            raise ValueError("fewer bytes than pages")
        used = done = 0
        while done < count and len(target) - used >= 9 + len(name) + size:
            content = b"" if source is None else bytes(source[done * size : (done + 1) * size])
            known = block == self._block
            word = (page + done) * size | (FLAG_CONTINUE if known else 0)
            word |= FLAG_PAGE if any(content) else FLAG_ZERO
            record = struct.pack(">Q", word)
            record += b"" if known else bytes([len(name)]) + name
            record += content if any(content) else b"\0"
            target[used : used + len(record)] = record
            used, done, self._block = used + len(record), done + 1, block
        return used, done
