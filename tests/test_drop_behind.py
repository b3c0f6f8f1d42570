"""Bulk reads of a large file leave the page cache of the host as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.files.filesystem import file_system_of
from migrate.memory import drop_behind
from migrate.memory._memory import cached_pages
from migrate.memory.dirty import ScanTracker
from migrate.memory.memory import Memory
from migrate.source.batches import BatchMaker
from proto.codec.kernel import PageEncoder, PageHashes
from proto.codec.pageset import PageSet
from proto.wire.frames import HEADER_BYTES

PAGE = 4096
SIZE = 5 * drop_behind.PIECE_BYTES // 2
PAGES = SIZE // PAGE


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file on a disk, of which nothing is in the page cache."""
    fd = os.open(tmp_path / "guest", os.O_RDWR | os.O_CREAT)
    try:
        if file_system_of(fd) in (*drop_behind.IN_MEMORY, "overlay"):
            pytest.skip("the temporary directory is not on a disk")
        os.write(fd, os.urandom(SIZE))
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            assert cached_pages(fd, 0, 0) == 0
        except OSError as error:
            pytest.skip(f"the kernel does not tell what is cached: {error.strerror}")
        yield fd
    finally:
        os.close(fd)


def read_whole(fd: int, how: str) -> None:
    """Read all of a guest as the first round does, or as a scan."""
    memory = Memory(SIZE, fd=fd)
    encoder = PageEncoder(PageHashes(PAGES, PAGE, bytes(16)), headroom=HEADER_BYTES, room=1 << 20)
    if how == "scan":
        ScanTracker(memory, encoder).take()
        return
    maker = BatchMaker(memory, encoder)
    maker.begin_round(1)
    while not maker.turn(PageSet.full(PAGES), 0, holes=True).over:
        pass
    maker.begin_round(2)


@pytest.mark.parametrize("how", ["round", "scan"])
def test_what_does_not_fit_into_free_memory_is_dropped_again(
    file: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drop_behind, "free_memory", lambda: SIZE)
    read_whole(file, how)
    assert cached_pages(file, 0, 0) < PAGES // 10


@pytest.mark.parametrize("how", ["round", "scan"])
def test_what_fits_stays_for_the_next_read(file: int, how: str) -> None:
    read_whole(file, how)
    assert cached_pages(file, 0, 0) == PAGES


def test_pieces_that_were_cached_before_stay(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the kernel's read-ahead, of which half a piece more may be on its way.
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(file, drop_behind.PIECE_BYTES, 0)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_NORMAL)
    before = cached_pages(file, 0, drop_behind.PIECE_BYTES)
    assert before == cached_pages(file, 0, 0)
    monkeypatch.setattr(drop_behind, "free_memory", lambda: 0)
    read_whole(file, "round")
    assert cached_pages(file, 0, drop_behind.PIECE_BYTES) == before
    assert cached_pages(file, 0, 0) < before + PAGES // 10


def test_files_in_memory_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drop_behind, "free_memory", lambda: 0)
    fd = os.open("/dev/shm", os.O_RDWR | os.O_TMPFILE)
    try:
        os.ftruncate(fd, SIZE)
        assert not drop_behind.is_needed(fd)
    finally:
        os.close(fd)
