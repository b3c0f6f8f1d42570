"""The digest equals its definition, whatever was hashed before, and pays only for stale pages."""

import os
import random
import struct
from array import array

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.memory.digest import SETTLE_BYTES, Digest
from migrate.memory.memory import Memory
from proto.codec.pageset import PageSet
from tests.definition import by_definition, page_hash
from tests.kernels import BOTH, COMPILED, kernel  # noqa: F401

PAGE = 4096
SEED = b"a seed of one migration"


class Guest:
    """A buffer and its digest; every page is stale at first."""

    def __init__(self, kernel, content: bytearray, page: int = PAGE, memory: Memory | None = None):
        self.content = content
        self.page = page
        self.pages = -(-len(content) // page)
        self.hashes = kernel.PageHashes(self.pages, page, SEED)
        self.digest = Digest(memory or Memory(len(content), memoryview(content)), self.hashes)
        self.touch(*range(self.pages))

    def touch(self, *pages: int) -> None:
        for page in pages:
            self.hashes.stale[page >> 3] |= 1 << (page & 7)

    def stale(self) -> set[int]:
        result = PageSet(self.pages)
        result.bits[:] = self.hashes.stale
        return set(result)

    def expected(self) -> bytes:
        return by_definition(self.content, self.page, SEED)


@pytest.mark.parametrize("size", [1, 100, PAGE, (1 << 16) - 1, 1 << 16, 3 * (1 << 16) + 777])
@pytest.mark.parametrize("page", [1024, 4096, 16384])
def test_digest_equals_its_definition(kernel, tmp_path, size, page):
    content = bytearray(os.urandom(size))
    guest = Guest(kernel, content, page)
    assert guest.digest.digest() == guest.expected()
    path = tmp_path / "guest"
    path.write_bytes(content)
    with path.open("rb") as file:
        guest = Guest(kernel, content, page, Memory(size, fd=file.fileno()))
        assert guest.digest.digest() == guest.expected()


def test_untouched_page_is_zero(kernel):
    """So a guest of zeros needs no hashing."""
    for pages in (1, 7, 1000):
        hashes = kernel.PageHashes(pages, PAGE, SEED)
        digest = Digest(Memory(pages * PAGE), hashes)
        assert digest.digest() == by_definition(bytes(pages * PAGE), PAGE, SEED)
        assert digest.hashed == 0


def test_destination_padded_to_whole_pages_has_the_same_digest(kernel):
    """There the last page is whole; what the guest does not have of it reads as zeros."""
    content = bytearray(os.urandom(16 * PAGE + 5))
    padded = bytearray(bytes(content).ljust(17 * PAGE, b"\0"))
    guest = Guest(kernel, content, PAGE, Memory(len(content), memoryview(padded)))
    assert guest.digest.digest() == guest.expected()
    padded[16 * PAGE + 5 :] = b"x" * (PAGE - 5)
    guest.touch(16)
    assert guest.digest.digest() == guest.expected()


def test_another_seed_gives_another_digest(kernel):
    content = bytearray(os.urandom(PAGE))
    digests = set()
    for seed in (SEED, b"", b"another"):
        hashes = kernel.PageHashes(1, PAGE, seed)
        hashes.stale[0] = 1
        digests.add(Digest(Memory(PAGE, memoryview(content)), hashes).digest())
        assert by_definition(content, PAGE, seed) in digests
    assert len(digests) == 3


@settings(deadline=None)
@given(st.integers(1, 90 * PAGE), st.data())
def test_digest_follows_any_reported_writes(size, data):
    guest = Guest(COMPILED, bytearray(size))
    for _ in range(3):
        dirty = PageSet(guest.pages)
        for at in data.draw(st.lists(st.integers(0, size - 1), max_size=5)):
            guest.content[at] = (guest.content[at] + 1) % 256
            dirty.add(at // PAGE)
        before = bytes(guest.hashes.stale)
        would_be = guest.digest.stale(dirty.bits)
        assert guest.hashes.stale == before, "asking changes nothing"
        guest.touch(*dirty)
        assert guest.digest.stale() == len(guest.stale()) == would_be
        assert guest.digest.digest() == guest.expected()
        assert guest.digest.stale() == 0


def test_only_stale_pages_are_hashed_again(kernel):
    guest = Guest(kernel, bytearray(os.urandom(80 * PAGE)))
    assert guest.digest.settle() == 80
    assert guest.digest.settle() == 0
    guest.touch(0, 63, 64)
    assert guest.digest.settle() == 3
    assert guest.digest.hashed == 83
    assert guest.digest.seconds > 0
    guest.content[5 * PAGE] ^= 1  # not told: the promise is the encoder's, and so one sees it
    guest.touch(1)
    assert guest.digest.digest() != guest.expected()


def test_pages_that_will_be_sent_again_are_left_for_later(kernel):
    guest = Guest(kernel, bytearray(os.urandom(70 * PAGE)))
    dirty = PageSet(70, [16, 63, 69])
    assert guest.digest.settle(dirty.bits) == 67
    assert guest.stale() == set(dirty)
    assert guest.digest.settle(dirty.bits) == 0
    guest.content[16 * PAGE] ^= 1
    assert guest.digest.settle() == 3
    assert guest.digest.digest() == guest.expected()


@pytest.mark.parametrize("page", [1024, 16384])
def test_more_stale_pages_than_are_read_at_a_time(page):
    per_turn = SETTLE_BYTES // page
    pages = 3 * per_turn + 1
    guest = Guest(COMPILED, bytearray(random.Random(1).randbytes(pages * page)), page)
    assert guest.digest.settle() == pages
    guest.touch(*range(0, pages, 2))
    assert guest.digest.settle() == (pages + 1) // 2
    truth = COMPILED.PageHashes(pages, page, SEED)
    truth.hash_pages(array("Q", range(pages)), pages, guest.content)
    assert guest.hashes.table == truth.table


# ---------------------------------------------------------------- the sum


def sum_by_definition(content: bytes, page: int, seed: bytes) -> bytes:
    """X(pages, zero) and X(page, hash) of each page that is not zeros, mod 2^128."""
    zero = page_hash(bytes(page), seed)
    count = -(-len(content) // page)
    total = xxhash.xxh3_128_intdigest(struct.pack("<Q", count) + zero)
    for number in range(count):
        whole = bytes(content[number * page : (number + 1) * page]).ljust(page, b"\0")
        if any(whole):
            own = page_hash(whole, seed)
            total += xxhash.xxh3_128_intdigest(struct.pack("<Q", number) + own)
    return (total % 2**128).to_bytes(16, "big")


@pytest.mark.parametrize("size", [1, PAGE, 3 * (1 << 16) + 777])
@pytest.mark.parametrize("page", [1024, 4096, 16384])
def test_sum_equals_its_definition(kernel, size, page):
    content = bytearray(os.urandom(size))
    content[: size // 2] = bytes(size // 2)
    guest = Guest(kernel, content, page)
    guest.digest.by_sum = True
    assert guest.digest.digest() == sum_by_definition(content, page, SEED)
    content[:] = bytes(size)
    guest.touch(*range(guest.pages))
    assert guest.digest.digest() == sum_by_definition(bytes(size), page, SEED)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 90 * PAGE), st.data())
def test_after_any_writes_the_sum_is_of_the_content(size, data):
    guests = [Guest(kernel, bytearray(size)) for kernel in BOTH]
    for _ in range(3):
        for at in data.draw(st.lists(st.integers(0, size - 1), max_size=5)):
            value = data.draw(st.integers(0, 255))
            for guest in guests:
                guest.content[at] = value
                guest.touch(at // PAGE)
        wanted = sum_by_definition(guests[0].content, PAGE, SEED)
        for guest in guests:
            guest.digest.by_sum = True
            assert guest.digest.digest() == wanted
            guest.digest.by_sum = False
            assert guest.digest.digest() == guest.expected()


def test_sum_detects_swapped_pages(kernel):
    """A sum does not know order by itself: the number of the page is in each term."""
    one, other = os.urandom(PAGE), os.urandom(PAGE)
    sums = set()
    for content in (one + other, other + one, one + one, one + other + bytes(PAGE)):
        guest = Guest(kernel, bytearray(content))
        guest.digest.settle()
        sums.add(guest.hashes.sum)
    assert len(sums) == 4


@pytest.mark.parametrize("by_sum", [False, True])
def test_rehearsal_is_timed_and_changes_nothing(kernel, by_sum):
    guest = Guest(kernel, bytearray(os.urandom(70 * PAGE)))
    guest.digest.by_sum = by_sum
    guest.digest.settle()
    guest.touch(3, 69)
    dirty = PageSet(70, [3, 5])
    assert guest.digest.rehearse(dirty.bits) == 3
    assert guest.digest.whole_seconds > 0
    assert (guest.stale(), guest.digest.hashed) == ({3, 69}, 70)


def test_digest_without_sum_is_made_of_parts(monkeypatch):
    monkeypatch.setattr("migrate.memory.digest.PART", 16)
    guest = Guest(COMPILED, bytearray(os.urandom(70 * PAGE)))
    assert guest.digest.digest() == guest.expected()
