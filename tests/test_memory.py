"""Reading a guest: holes stay holes, the tail is zeros, and a file reads as a buffer does."""

import os
import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.memory.memory import Memory
from migrate.source.batches import BatchMaker
from proto.codec.kernel import PageEncoder, PageHashes
from proto.codec.pageset import PageSet
from proto.wire.frames import HEADER_BYTES
from proto.wire.messages import SEED_BYTES, batch_bytes

PAGE = 4096


@pytest.fixture
def shm():
    """A file in memory (tmpfs), where a hole that is mapped and read becomes a block."""
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
    yield fd
    os.close(fd)


def blocks(fd: int) -> int:
    return os.fstat(fd).st_blocks


def content(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def gathered(memory: Memory, dirty: PageSet, per_turn: int = 8) -> dict[int, bytes]:
    """All dirty pages, in turns of a few."""
    snapshot = memoryview(bytearray(per_turn * PAGE))
    numbers = memoryview(array("Q", bytes(8 * per_turn)))
    pages: dict[int, bytes] = {}
    cursor = 0
    while cursor < dirty.pages:
        snapshot[:] = b"\xee" * len(snapshot)
        count, cursor = memory.gather(dirty.bits, cursor, dirty.pages, PAGE, snapshot, numbers)
        for i in range(count):
            assert numbers[i] not in pages
            pages[numbers[i]] = bytes(snapshot[i * PAGE : (i + 1) * PAGE])
    return pages


# ---------------------------------------------------------------- extents


def test_buffer_is_one_stretch_of_data():
    memory = Memory(5 * PAGE + 1, memoryview(bytearray(5 * PAGE + 1)))
    assert list(memory.extents(PAGE)) == [(0, 6, True)]
    assert memory.extent(4, PAGE) == (6, True)


def test_extents_of_a_sparse_file_tell_holes_from_data(shm):
    os.ftruncate(shm, 64 * PAGE)
    os.pwrite(shm, b"x", 3 * PAGE)
    os.pwrite(shm, b"y" * 2 * PAGE, 10 * PAGE)
    os.pwrite(shm, b"z", 64 * PAGE - 1)
    memory = Memory(64 * PAGE, fd=shm)
    assert list(memory.extents(PAGE)) == [
        (0, 3, False), (3, 1, True), (4, 6, False), (10, 2, True), (12, 51, False), (63, 1, True),
    ]  # fmt: skip
    for page, stretch in [
        (5, (10, False)), (4, (10, False)), (9, (10, False)), (10, (12, True)), (11, (12, True)),
        (2, (3, False)), (3, (4, True)), (62, (63, False)), (63, (64, True)),
    ]:  # fmt: skip
        assert memory.extent(page, PAGE) == stretch


def test_page_that_is_partly_data_is_data(shm):
    """Pages larger than the file system's blocks: data anywhere in them counts."""
    os.ftruncate(shm, 16 * PAGE)
    os.pwrite(shm, b"x", 6 * PAGE)
    memory = Memory(16 * PAGE, fd=shm)
    assert list(memory.extents(4 * PAGE)) == [(0, 1, False), (1, 1, True), (2, 2, False)]


def test_file_without_data_is_one_hole(shm):
    os.ftruncate(shm, 10 * PAGE)
    assert list(Memory(10 * PAGE, fd=shm).extents(PAGE)) == [(0, 10, False)]


def test_walk_finds_data_in_a_former_hole(shm):
    """The answers are kept for a walk, not beyond it: a write to the hole would be lost."""
    os.ftruncate(shm, 10 * PAGE)
    memory = Memory(10 * PAGE, fd=shm)
    assert list(memory.extents(PAGE)) == [(0, 10, False)]
    assert memory.extent(0, PAGE) == (10, False)
    os.pwrite(shm, b"x", 3 * PAGE)
    assert list(memory.extents(PAGE)) == [(0, 3, False), (3, 1, True), (4, 6, False)]
    assert memory.extent(0, PAGE) == (3, False)


def test_many_small_holes_are_read_and_not_asked_for(shm):
    """Else finding what changed would take many times as long as in a file without holes."""
    pages, hole = 4096, 4096
    for page in range(0, pages, 2):
        os.pwrite(shm, b"x", page * PAGE)
    os.ftruncate(shm, (pages + hole) * PAGE)
    os.pwrite(shm, b"y", (pages + hole) * PAGE)
    memory = Memory((pages + hole + 1) * PAGE, fd=shm)
    found = list(memory.extents(PAGE))
    assert len(found) < 200
    assert sum(count for _, count, _ in found) == pages + hole + 1
    assert found[:2] == [(0, 1, True), (1, 1, False)]
    assert sum(count for first, count, data in found if not data and first >= pages) > hole - 64
    assert found[-1] == (pages + hole, 1, True)


@settings(deadline=None)
@given(
    st.integers(1, 40), st.integers(1, PAGE), st.sets(st.integers(0, 39)),
    st.sampled_from([1024, 4096, 16384]),
)  # fmt: skip
def test_extents_cover_each_page_once_and_holes_hold_nothing(pages, tail, written, page_size):
    size = (pages - 1) * PAGE + tail
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        os.ftruncate(fd, size)
        for page in written:
            if page < pages:
                os.pwrite(fd, b"\1", page * PAGE)
        memory = Memory(size, fd=fd)
        at = 0
        for first, count, data in memory.extents(page_size):
            assert first == at
            assert count > 0
            at += count
            if not data:
                assert not any(os.pread(fd, count * page_size, first * page_size))
        assert at == -(-size // page_size)
    finally:
        os.close(fd)


# ---------------------------------------------------------------- reading


def test_reading_holes_gives_zeros_and_allocates_nothing(shm):
    size = 4 << 20
    os.ftruncate(shm, size)
    os.pwrite(shm, b"x", 0)
    memory = Memory(size, fd=shm)
    before = blocks(shm)
    into = memoryview(bytearray(b"\xff" * size))
    assert memory.read(0, into) == size
    assert into == b"x" + bytes(size - 1)
    assert len(gathered(memory, PageSet.full(size // PAGE))) == size // PAGE
    assert len(list(memory.extents(PAGE))) == 2
    assert blocks(shm) == before


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 20 * PAGE + 17])
def test_file_and_buffer_gather_the_same_pages(shm, size):
    data = content(size)
    os.pwrite(shm, data, 0)
    pages = -(-size // PAGE)
    whole = data.ljust(pages * PAGE, b"\0")
    expected = {n: whole[n * PAGE : (n + 1) * PAGE] for n in range(pages)}
    view = memoryview(bytearray(data))
    for dirty in (PageSet.full(pages), PageSet(pages, range(0, pages, 3)), PageSet(pages)):
        wanted = {page: expected[page] for page in dirty}
        assert gathered(Memory(size, view), dirty) == wanted
        assert gathered(Memory(size, fd=shm), dirty) == wanted


@settings(deadline=None)
@given(st.integers(1, 30 * PAGE), st.sets(st.integers(0, 29)), st.integers(1, 9))
def test_gather_takes_exactly_the_dirty_pages_however_few_fit(size, members, per_turn):
    pages = -(-size // PAGE)
    data = content(size)
    dirty = PageSet(pages, (page for page in members if page < pages))
    found = gathered(Memory(size, memoryview(data)), dirty, per_turn)
    assert sorted(found) == list(dirty)
    whole = data.ljust(pages * PAGE, b"\0")
    assert all(copy == whole[n * PAGE : (n + 1) * PAGE] for n, copy in found.items())


def test_bytes_after_the_guest_in_its_file_are_not_read(shm):
    """The size is taken once: a file that grows meanwhile does not change the last page."""
    os.pwrite(shm, b"x" * 3 * PAGE, 0)
    memory = Memory(PAGE + 10, fd=shm)
    assert gathered(memory, PageSet.full(2))[1] == b"x" * 10 + bytes(PAGE - 10)
    into = memoryview(bytearray(PAGE))
    assert memory.read(PAGE, into) == 10


def test_shrunken_file_reads_as_zeros(shm):
    os.pwrite(shm, b"x" * 4 * PAGE, 0)
    memory = Memory(4 * PAGE, fd=shm)
    os.ftruncate(shm, PAGE + 1)
    pages = gathered(memory, PageSet.full(4))
    assert pages[1] == b"x" + bytes(PAGE - 1)
    assert pages[3] == bytes(PAGE)
    into = memoryview(bytearray(b"\xff" * 4 * PAGE))
    assert memory.read(0, into) == 4 * PAGE
    assert into == b"x" * (PAGE + 1) + bytes(3 * PAGE - 1)
    assert sum(count for _, count, _ in memory.extents(PAGE)) == 4


def test_file_that_cannot_be_read_is_an_error():
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(OSError, match=r"."):
            gathered(Memory(PAGE, fd=read_end), PageSet.full(1))
        with pytest.raises(OSError, match=r"."):
            Memory(PAGE, fd=read_end).read(0, memoryview(bytearray(PAGE)))
    finally:
        os.close(read_end)
        os.close(write_end)


def test_guest_may_begin_within_its_file(shm):
    base, data = 3 * PAGE, content(2 * PAGE + 100)
    os.pwrite(shm, content(base, 2), 0)
    os.ftruncate(shm, base + 5 * PAGE)
    os.pwrite(shm, data, base + PAGE)
    memory, page = Memory(4 * PAGE, fd=shm, base=base), bytearray(PAGE)
    assert list(memory.extents(PAGE)) == [(0, 1, False), (1, 3, True)]
    found = gathered(memory, PageSet.full(4))
    assert b"".join(found[number] for number in range(4)) == (bytes(PAGE) + data).ljust(
        4 * PAGE, b"\0"
    )
    assert memory.read(PAGE, memoryview(page)) == PAGE
    assert page == data[:PAGE]
    assert not memory.threaded, "the scanner's threads know nothing of it"


def test_each_round_looks_for_holes_again(shm):
    """A guest that marks what it writes clears no mark of before: a hole may be none by then."""
    os.ftruncate(shm, 4 * PAGE)
    encoder = PageEncoder(
        PageHashes(4, PAGE, bytes(SEED_BYTES)), None, headroom=HEADER_BYTES, room=batch_bytes(1)
    )
    batches = BatchMaker(Memory(4 * PAGE, fd=shm), encoder)
    normal = []
    for number in (1, 2):
        batches.begin_round(number)
        normal.append(batches.turn(PageSet.full(4), 0, holes=True).counts.normal)
        os.pwrite(shm, content(PAGE), 2 * PAGE)
    assert normal == [0, 1]
