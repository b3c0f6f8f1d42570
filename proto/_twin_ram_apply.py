"""Pages of QEMU's stream brought into files, and back, in plain Python: see proto/_ram_apply.pyx.

Same names, same bytes, same errors; but a page that becomes zero is written as zeros here.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from proto._twin import MAX_PAGE, FaultError, delta_runs
from proto.errors import DecodeError

if TYPE_CHECKING:
    from typing_extensions import Buffer

RECORD = struct.Struct("=QQII")
ZERO, PAGE, DELTA = range(3)
FLAG_ZERO, FLAG_PAGE, FLAG_CONTINUE = 0x02, 0x08, 0x20
MAX_NAME = 255


def _check_page(page_size: int) -> None:
    if not 1024 <= page_size <= MAX_PAGE or page_size & (page_size - 1):
        raise ValueError(f"a page of {page_size} bytes: a power of two from 1024 to 16384")


class RamApplier:
    """Writes pages to files."""

    def __init__(self, blocks: Sequence[int], files: Sequence[int], page_size: int) -> None:
        _check_page(page_size)
        if not blocks or len(files) != len(blocks):
            raise ValueError(f"{len(blocks)} blocks and {len(files)} files")
        self._page_size = page_size
        self._files = list(files)
        self._firsts = [0, *accumulate(blocks)]
        self._filled: set[int] = set()

    def apply(self, data: Buffer, records: Buffer, count: int) -> None:
        source, table, size = memoryview(data), memoryview(records), self._page_size
        if count < 0 or len(table) < count * RECORD.size:
            raise ValueError("there are fewer records than that")
        found = [RECORD.unpack_from(table, i * RECORD.size) for i in range(count)]
        for page, at, length, kind in found:
            whole = kind != PAGE or length == size
            if page >= self._firsts[-1] or kind > DELTA or at + length > len(source) or not whole:
                raise ValueError("records that are not those of this data")
        for page, at, length, kind in found:
            if kind == PAGE:
                self._write(page, bytes(source[at : at + size]))
            elif kind == ZERO and page in self._filled:
                self._write(page, bytes(size))
            elif kind == DELTA and length:
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
    """Writes pages as records of QEMU's RAM sections."""

    def __init__(self, blocks: Sequence[tuple[bytes, int]], page_size: int) -> None:
        _check_page(page_size)
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
