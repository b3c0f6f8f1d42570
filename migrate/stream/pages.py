"""What is asked of single pages and blocks: records listed, the memory of a block written."""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass

from migrate.directory import Directory, Identity, identity_of, is_trusted
from migrate.errors import MigrationError, UsageError
from migrate.filesystem import kind_of
from proto.kernel import RamImage, select_records
from proto.qemu import StreamParser

KINDS = ("zero", "page", "xbzrle")
_RANGE = re.compile(r"(.+):([0-9]{1,15})(?:-([0-9]{1,15}))?", re.DOTALL)


@dataclass(frozen=True)
class PageRecord:
    """length: of what it brings for its page."""

    at: int
    page: int
    kind: str
    length: int


def block_places(parser: StreamParser) -> dict[str, tuple[int, int]]:
    """(number of its first page, bytes) of each block."""
    places: dict[str, tuple[int, int]] = {}
    first = 0
    for block in parser.blocks:
        places.setdefault(block.name.decode("ascii", "backslashreplace"), (first, block.size))
        first += block.pages(parser.page_size)
    return places


class PageList:
    """Sees the records of some pages. Raises UsageError.

    wanted -- BLOCK[:FIRST[-LAST]]
    tell   -- is given each record
    """

    def __init__(self, wanted: str, tell: Callable[[PageRecord], object]) -> None:
        found = _RANGE.fullmatch(wanted)
        self.block, self._first, self._last = wanted, 0, (1 << 63) - 1
        if found:
            self.block = found[1]
            self._first = int(found[2])
            self._last = int(found[3] or found[2])
        if self._first > self._last:
            raise UsageError(f"--pages {wanted}: it ends before it begins")
        self._tell = tell

    def __call__(
        self, parser: StreamParser, data: memoryview, start: int, count: int, base: int
    ) -> None:
        place = block_places(parser).get(self.block)
        if place is None:
            return
        first, size = place
        end = -(-size // parser.page_size) - 1
        if self._first > end:
            raise UsageError(f"--pages: {self.block} has pages 0 to {end}, and no {self._first}")
        assert parser.reader is not None
        for page, at, kind, length in select_records(
            parser.reader.records, count, start, first + self._first, first + min(self._last, end)
        ):
            self._tell(PageRecord(base + at, page - first, KINDS[kind], length))


class BlockImage:
    """Writes the memory of a block as it is in the end. Raises UsageError, OSError.

    wanted -- BLOCK=FILE; source -- (device, inode) of what is read, which must not be written

    A file that it has made is removed by `close` where `finish` was not called before.
    """

    def __init__(
        self, wanted: str, source: Identity | None = None, *, overwrite: bool = False
    ) -> None:
        self.block, equals, self.path = wanted.partition("=")
        if not (self.block and equals and self.path):
            raise UsageError(f"--extract {wanted}: write BLOCK=FILE")
        self._source = source
        self._overwrite = overwrite
        self._made = False
        self._image: RamImage | None = None
        self._memory: mmap.mmap | None = None
        self._directory: Directory | None = None
        self._name = ""
        self._fd = -1

    def open(self, parser: StreamParser) -> bool:
        """Makes the file, all zeros; False where there is no such block."""
        place = block_places(parser).get(self.block)
        if self._image is not None or place is None:
            return place is not None
        first, size = place
        try:
            self._open_file()
        except OSError as error:
            raise MigrationError(f"{self.path}: {error.strerror}") from None
        try:
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, size)
            self._memory = mmap.mmap(self._fd, size)
            self._image = RamImage(first, size, parser.page_size, self._fd, self._memory)
        except (OSError, OverflowError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "too many for a file"
            raise MigrationError(f"{self.path}: {size} bytes of {self.block}: {why}") from None
        return True

    def _open_file(self) -> None:
        where, self._name = os.path.split(os.path.abspath(self.path))
        self._directory = Directory(where)
        try:
            self._fd = self._directory.make(self._name)
            self._made = True
            return
        except FileExistsError:
            self._fd = self._directory.existing(self._name)
        there = os.fstat(self._fd)
        wrong = ""
        if identity_of(there) == self._source:
            wrong = "is the stream itself"
        elif not stat.S_ISREG(there.st_mode):
            wrong = f"is no regular file, but {kind_of(there.st_mode)}"
        elif not is_trusted(there.st_uid) and there.st_uid != self._directory.owner:
            wrong = f"belongs to user {there.st_uid}, who could read what is written: remove it"
        elif there.st_nlink != 1:
            wrong = "has other names too, and what has those would be overwritten: name another"
        elif there.st_size and not self._overwrite:
            wrong = "is there already: remove it, or give --overwrite"
        if wrong:
            raise UsageError(f"--extract {self.block}: {self.path} {wrong}")

    def __call__(
        self, parser: StreamParser, data: memoryview, start: int, count: int, base: int
    ) -> None:
        if not self.open(parser) or self._image is None or parser.reader is None:
            return
        try:
            self._image.apply(data, parser.reader.records, count)
        except OSError as error:
            raise MigrationError(f"{self.path}: {error.strerror}") from None

    def finish(self) -> None:
        """The file is what it is to be, as far as the stream goes."""
        self._made = False

    def close(self) -> None:
        if self._made:
            self._made = False
            assert self._directory is not None
            self._directory.drop(self._name, identity_of(os.fstat(self._fd)))
        self._image = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._directory is not None:
            self._directory.close()
