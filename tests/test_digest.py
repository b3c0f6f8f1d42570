"""The digest equals its definition, whatever was hashed before, and pays only for stale chunks."""

import os

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.digest import ChunkDigests
from migrate.memory import Memory
from proto.messages import DIGEST_CHUNK
from proto.pageset import PageSet

PAGE = 4096
CHUNK = DIGEST_CHUNK


def by_definition(content: bytes) -> bytes:
    """XXH3-128 of the XXH3-128 of each 64 KiB; the last may be shorter."""
    digests = b""
    for at in range(0, len(content), 65536):
        digests += xxhash.xxh3_128(content[at : at + 65536]).digest()
    return xxhash.xxh3_128(digests).digest()


def unknown(_first: int, _count: int) -> bool:
    return False


def of_buffer(content: bytearray, page: int = PAGE, known_zero=unknown) -> ChunkDigests:
    return ChunkDigests(Memory(len(content), memoryview(content)), page, known_zero)


@pytest.mark.parametrize("size", [1, 100, PAGE, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 777])
@pytest.mark.parametrize("page", [1024, 4096, 16384])
def test_it_is_what_the_definition_says(tmp_path, size, page):
    content = bytearray(os.urandom(size))
    path = tmp_path / "guest"
    path.write_bytes(content)
    assert of_buffer(content, page).digest() == by_definition(content)
    with path.open("rb") as file:
        digests = ChunkDigests(Memory(size, fd=file.fileno()), page, unknown)
        assert digests.digest() == by_definition(content)


def test_a_destination_padded_to_whole_pages_has_the_same_digest():
    """There the last page is whole; what the guest does not have of it is not hashed."""
    content = os.urandom(CHUNK + 5)
    padded = bytearray(content.ljust(CHUNK + PAGE, b"\0"))
    digests = ChunkDigests(Memory(len(content), memoryview(padded)), PAGE, unknown)
    assert digests.digest() == by_definition(content)


@settings(deadline=None)
@given(st.integers(1, 6 * CHUNK), st.data())
def test_after_any_writes_it_is_of_the_content_if_they_were_told(size, data):
    content = bytearray(size)
    digests = of_buffer(content)
    pages = -(-size // PAGE)
    for _ in range(3):
        dirty = PageSet(pages)
        for at in data.draw(st.lists(st.integers(0, size - 1), max_size=5)):
            content[at] = (content[at] + 1) % 256
            dirty.add(at // PAGE)
        before = bytes(digests.stale)
        would_be = digests.stale_with(dirty)
        assert bytes(digests.stale) == before, "asking changes nothing"
        digests.touch(dirty)
        assert sum(digests.stale) == would_be
        assert digests.digest() == by_definition(content)
        assert not any(digests.stale)


def test_only_stale_chunks_are_hashed_again():
    content = bytearray(os.urandom(8 * CHUNK))
    digests = of_buffer(content)
    assert digests.settle() == 8
    assert digests.settle() == 0
    pages = 8 * CHUNK // PAGE
    digests.touch(PageSet(pages, [0, 15, 16 * 3]))
    assert digests.settle() == 2
    assert digests.hashed == 10
    content[5 * CHUNK] ^= 1  # not told: the promise is the tracker's, and this is how we can see it
    digests.touch(PageSet(pages, [1]))
    assert digests.digest() != by_definition(content)


def test_chunks_that_will_be_sent_again_are_left_for_later():
    content = bytearray(os.urandom(4 * CHUNK))
    digests = of_buffer(content)
    pages = 4 * CHUNK // PAGE
    dirty = PageSet(pages, [16, 63])
    assert digests.settle(dirty) == 2
    assert list(digests.stale) == [0, 1, 0, 1]
    content[16 * PAGE] ^= 1
    assert digests.settle() == 2
    assert digests.digest() == by_definition(content)


def test_known_zeros_are_not_read():
    size = 4 * CHUNK + 10

    class Unreadable(Memory):
        def read(self, offset, into):
            assert offset >= 2 * CHUNK, "a chunk of known zeros was read"
            into[:] = b"d" * len(into)
            return len(into)

    asked = []

    def known_zero(first: int, count: int) -> bool:
        asked.append((first, count))
        return first * PAGE < 2 * CHUNK

    digests = ChunkDigests(Unreadable(size), PAGE, known_zero)
    assert digests.digest() == by_definition(bytes(2 * CHUNK) + b"d" * (2 * CHUNK + 10))
    assert asked == [(n * 16, 16) for n in range(4)]


def test_content_given_by_the_scanner_is_taken_as_it_is():
    content = bytearray(2 * CHUNK)
    digests = of_buffer(content)
    seen = os.urandom(CHUNK)
    digests.settle_chunk(0, memoryview(seen))
    assert digests.digest() == by_definition(seen + bytes(CHUNK))


# ---------------------------------------------------------------- where nobody has a dirty set


def test_a_chunk_is_quiet_when_nothing_wrote_it_between_two_calls():
    content = bytearray(os.urandom(4 * CHUNK))
    stale = bytearray(4)
    digests = ChunkDigests(Memory(len(content), memoryview(content)), PAGE, unknown, stale)
    stale[0] = stale[1] = 1
    assert digests.settle_quiet() == 0, "written just now: it may be written again"
    stale[1] = 1  # and so it was
    assert digests.settle_quiet() == 1
    assert list(stale) == [0, 2, 0, 0]
    assert digests.settle_quiet() == 1
    assert digests.settle_quiet() == 0
    assert not any(stale)


def test_the_last_settle_takes_the_quiet_and_the_loud():
    content = bytearray(os.urandom(4 * CHUNK))
    stale = bytearray(b"\1\1\1\1")
    digests = ChunkDigests(Memory(len(content), memoryview(content)), PAGE, unknown, stale)
    digests.settle_quiet()
    stale[2] = 1
    assert sorted(stale) == [1, 2, 2, 2]
    assert digests.settle() == 4
    assert digests.digest() == by_definition(content)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=20))
def test_whatever_came_to_rest_when_the_digest_is_of_the_content(steps):
    content = bytearray(4 * CHUNK)
    stale = bytearray(b"\1" * 4)
    digests = ChunkDigests(Memory(len(content), memoryview(content)), PAGE, unknown, stale)
    for chunk, quiet in steps:
        content[chunk * CHUNK] = (content[chunk * CHUNK] + 1) % 256
        stale[chunk] = 1
        if quiet:
            digests.settle_quiet()
    assert digests.digest() == by_definition(content)
