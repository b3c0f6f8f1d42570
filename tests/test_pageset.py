"""The dirty bitmap against Python's own set."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.codec.pageset import PageSet
from tests.kernels import kernel  # noqa: F401


@st.composite
def sized_sets(draw, count=1):
    pages = draw(st.integers(1, 300))
    members = st.sets(st.integers(0, pages - 1))
    return pages, *(draw(members) for _ in range(count))


@given(sized_sets())
def test_set_contains_added_pages(given_set):
    pages, members = given_set
    found = PageSet(pages, members)
    assert list(found) == sorted(members)
    assert len(found) == len(members)
    assert [page in found for page in range(pages)] == [page in members for page in range(pages)]


@given(sized_sets())
def test_bits_are_little_endian_in_whole_words(given_set):
    """What the kernels rely on."""
    pages, members = given_set
    bits = PageSet(pages, members).bits
    assert len(bits) % 8 == 0
    assert len(bits) * 8 >= pages > len(bits) * 8 - 64
    assert int.from_bytes(bits, "little") == sum(1 << page for page in members)


@given(sized_sets(2))
def test_union_in_place(given_sets):
    pages, one, other = given_sets
    left, right = PageSet(pages, one), PageSet(pages, other)
    bits = left.bits
    left |= right
    assert set(left) == one | other
    assert set(right) == other
    assert left.bits is bits  # a kernel may hold it


@pytest.mark.parametrize("pages", [1, 7, 8, 9, 63, 64, 65, 1000])
def test_full_set_has_every_page_and_no_bit_beyond(pages):
    full = PageSet.full(pages)
    assert list(full) == list(range(pages))
    assert len(full) == pages
    assert full == PageSet(pages, range(pages))


@pytest.mark.parametrize("page", [-1, 10, 63, 1 << 40])
def test_pages_outside_are_refused_and_not_members(page):
    pages = PageSet(10)
    with pytest.raises(IndexError, match=f"page {page} of 10"):
        pages.add(page)
    assert page not in pages
    assert len(pages) == 0


def test_sets_of_different_sizes_do_not_combine():
    left = PageSet(10)
    with pytest.raises(ValueError, match="sets of 10 and 11 pages"):
        left |= PageSet(11)
    assert left != PageSet(11)
    assert left != {1}


def test_set_is_not_hashable():
    with pytest.raises(TypeError):
        hash(PageSet(1))


@given(sized_sets(2))
def test_intersection_in_place(given_sets):
    pages, one, other = given_sets
    left, right = PageSet(pages, one), PageSet(pages, other)
    bits = left.bits
    left &= right
    assert set(left) == one & other
    assert set(right) == other
    assert left.bits is bits
    with pytest.raises(ValueError, match=f"sets of {pages} and {pages + 1} pages"):
        left &= PageSet(pages + 1)


@pytest.mark.parametrize("words", [0, 1, 9, 100])
def test_bitmap_operations_equal_set_operations(kernel, words):
    for seed in range(5):
        chance = random.Random(seed)
        one, other = (chance.randbytes(8 * words) if seed else bytes(8 * words) for _ in range(2))
        ours, theirs = (int.from_bytes(bits, "little") for bits in (one, other))
        assert kernel.count_bits(one) == ours.bit_count()
        assert kernel.count_bits(one, other) == (ours | theirs).bit_count()
        for change, wanted in (
            (kernel.unite_bits, ours | theirs),
            (kernel.keep_bits, ours & theirs),
        ):
            bits = bytearray(one)
            change(bits, other)
            assert int.from_bytes(bits, "little") == wanted


def test_bitmaps_of_different_sizes_are_refused(kernel):
    bits = bytearray(16)
    for call in (
        lambda: kernel.count_bits(bytes(7)),
        lambda: kernel.count_bits(bits, bytes(8)),
        lambda: kernel.unite_bits(bits, bytes(8)),
        lambda: kernel.keep_bits(bits, b""),
    ):
        with pytest.raises(ValueError, match="bitmaps of"):
            call()
    assert bytes(kernel.zeros(5)) == bytes(5)
