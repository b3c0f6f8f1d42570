"""List the records of pages in a stream of QEMU, and write the memory of a block to a file."""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass

from migrate.errors import MigrationError, UsageError
from migrate.files.directory import Directory
from migrate.files.filesystem import kind_of
from migrate.files.identity import Identity, identity_of
from migrate.files.trust import is_trusted
from proto.qemu.kernel import RamImage, select_records
from proto.qemu.stream_parser import StreamParser

KINDS = ("zero", "page", "xbzrle")
_RANGE = re.compile(r"(.+):([0-9]{1,15})(?:-([0-9]{1,15}))?", re.DOTALL)


@dataclass(frozen=True)
class PageRecord:
    """One record.

    at     -- place in the stream, in bytes
    page   -- number of the page in its block
    length -- bytes of the page's content in the record
    """

    at: int
    page: int
    kind: str
    length: int


def block_places(parser: StreamParser) -> dict[str, tuple[int, int]]:
    """Return (number of its first page, size in bytes) of each block."""
    places: dict[str, tuple[int, int]] = {}
    first = 0
    for block in parser.blocks:
        places.setdefault(block.name.decode("ascii", "backslashreplace"), (first, block.size))
        first += block.pages(parser.page_size)
    return places


class PageList:
    """Finds the records of some pages. Raises UsageError.

    wanted -- BLOCK[:FIRST[-LAST]]
    tell   -- called with each record
    """

    def __init__(self, wanted: str, tell: Callable[[PageRecord], object]) -> None:
        found = _RANGE.fullmatch(wanted)
        self.block, self._first, self._last = wanted, 0, (1 << 63) - 1
        if found:
            self.block = found[1]
            self._first = int(found[2])
            self._last = int(found[3] or found[2])
        if self._first > self._last:
            raise UsageError(f"--pages {wanted}: the range ends before it begins")
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
            raise UsageError(f"--pages: {self.block} has pages 0 to {end}, no page {self._first}")
        for page, at, kind, length in select_records(
            parser.records, count, start, first + self._first, first + min(self._last, end)
        ):
            self._tell(PageRecord(base + at, page - first, KINDS[kind], length))


class BlockImage:
    """Writes the memory of a block, as the stream leaves it, to a file.

    wanted    -- BLOCK=FILE
    source    -- device and inode of the stream, which must not be overwritten
    overwrite -- write to a file that has content

    The constructor raises UsageError. `close` removes a file that was made here, unless `finish`
    was called before.
    """

    def __init__(
        self, wanted: str, source: Identity | None = None, *, overwrite: bool = False
    ) -> None:
        self.block, equals, self.path = wanted.partition("=")
        if not (self.block and equals and self.path):
            raise UsageError(f"--extract {wanted}: write BLOCK=FILE")
        self._source = source
        self._overwrite = overwrite
        self._file: _ImageFile | None = None

    def open(self, parser: StreamParser) -> bool:
        """Make the file, all zeros, once; return False if the stream has no such block.

        Raises UsageError, MigrationError.
        """
        return self._opened(parser) is not None

    def _opened(self, parser: StreamParser) -> _ImageFile | None:
        place = block_places(parser).get(self.block)
        if self._file is None and place is not None:
            file = _ImageFile(self.path, self.block, self._source, overwrite=self._overwrite)
            self._file = file  # from here on `close` undoes it
            file.map(*place, parser.page_size)
        return self._file if place is not None else None

    def __call__(
        self, parser: StreamParser, data: memoryview, start: int, count: int, base: int
    ) -> None:
        """Apply page records, as QemuSurvey gives them. Raises MigrationError, UsageError."""
        file = self._opened(parser)
        if file is None or file.image is None:
            return
        try:
            file.image.apply(data, parser.records, count)
        except OSError as error:
            raise MigrationError(f"{self.path}: {error.strerror}") from None

    def finish(self) -> None:
        """Keep the file: the stream was read to its end."""
        if self._file is not None:
            self._file.made = False

    def close(self) -> None:
        """Close the file, and remove one that is not finished."""
        if self._file is not None:
            self._file.close()
            self._file = None


class _ImageFile:
    """An open file that gets the memory of a block.

    made  -- whether `close` removes it
    image -- writes to it, once it is mapped

    The constructor raises UsageError, MigrationError.
    """

    def __init__(self, path: str, block: str, source: Identity | None, *, overwrite: bool) -> None:
        self.image: RamImage | None = None
        self.made = False
        self._path = path
        self._block = block
        self._memory: mmap.mmap | None = None
        where, self._name = os.path.split(os.path.abspath(path))
        try:
            self._directory = Directory(where)
            try:
                self._fd = self._open()
                try:
                    if not self.made:
                        self._check(source, overwrite=overwrite)
                except BaseException:
                    os.close(self._fd)
                    raise
            except BaseException:
                self._directory.close()
                raise
        except OSError as error:
            raise MigrationError(f"{path}: {error.strerror}") from None

    def _open(self) -> int:
        try:
            fd = self._directory.create_file(self._name)
        except FileExistsError:
            return self._directory.open_existing(self._name)
        self.made = True
        return fd

    def _check(self, source: Identity | None, *, overwrite: bool) -> None:
        """Raise UsageError for a file that must not be written to."""
        there = os.fstat(self._fd)
        wrong = ""
        if identity_of(there) == source:
            wrong = "is the stream itself"
        elif not stat.S_ISREG(there.st_mode):
            wrong = f"is not a regular file, but {kind_of(there.st_mode)}"
        elif not is_trusted(there.st_uid) and there.st_uid != self._directory.owner:
            wrong = f"belongs to user {there.st_uid}, who could read what is written: remove it"
        elif there.st_nlink != 1:
            wrong = "has other names too, under which it would be overwritten: name another file"
        elif there.st_size and not overwrite:
            wrong = "exists already: remove it, or give --overwrite"
        if wrong:
            raise UsageError(f"--extract {self._block}: {self._path} {wrong}")

    def map(self, first: int, size: int, page_size: int) -> None:
        """Make the file `size` bytes of zeros. Raises MigrationError.

        first -- number of the block's first page in the stream's count of pages
        """
        try:
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, size)
            self._memory = mmap.mmap(self._fd, size)
            self.image = RamImage(first, size, page_size, self._fd, self._memory)
        except (OSError, OverflowError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "too many for a file"
            raise MigrationError(f"{self._path}: {size} bytes of {self._block}: {why}") from None

    def close(self) -> None:
        if self.made:
            self.made = False
            self._directory.remove_file(self._name, identity_of(os.fstat(self._fd)))
        self.image = None
        if self._memory is not None:
            self._memory.close()
        os.close(self._fd)
        self._directory.close()
