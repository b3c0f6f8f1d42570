"""The page cache: its size rule, eviction, and resizing."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.wire.errors import CacheSizeError, LocalError
from tests.kernels import COMPILED, TWIN, kernel  # noqa: F401

PAGE = 1024


def content(page: int, version: int = 0) -> bytes:
    return (page * 256 + version).to_bytes(8, "big") * (PAGE // 8)


def cached(cache, pages) -> set[int]:
    return {page for page in pages if cache.get(page) is not None}


def test_cleared_cache_behaves_like_a_new_one(kernel):
    old, new = kernel.PageCache(8 * PAGE, PAGE), kernel.PageCache(8 * PAGE, PAGE)
    for page in range(20):
        old.put(page, content(page), page)
    old.clear()
    assert len(old) == 0
    assert cached(old, range(20)) == set()
    for cache in (old, new):
        for page in range(30, 50):
            cache.put(page, content(page, 1), page % 3 + 1)
    assert cached(old, range(50)) == cached(new, range(50))
    assert all(old.get(page) in (None, content(page, 1)) for page in range(50))


# ---------------------------------------------------------------- the size rule


@pytest.mark.parametrize("size", [0, -1024, 1, 512, 1023, 1025, 3072, 3 << 20])
def test_size_must_be_a_power_of_two_and_hold_a_page(kernel, size):
    message = (
        rf"^a cache of {size} bytes: the size must be a power of two and at least one page "
        r"\(1024 bytes\)$"
    )
    with pytest.raises(CacheSizeError, match=message):
        kernel.PageCache(size, PAGE)
    cache = kernel.PageCache(4096, PAGE)
    cache.put(1, content(1), 1)
    with pytest.raises(CacheSizeError, match=message):
        cache.resize(size)
    assert (cache.size, cache.capacity, cache.get(1)) == (4096, 4, content(1))


def test_cache_size_error_is_a_local_and_a_value_error(kernel):
    for kind in (LocalError, ValueError):
        with pytest.raises(kind):
            kernel.PageCache(5000, PAGE)


def test_too_many_pages(kernel):
    with pytest.raises(CacheSizeError, match="more than 2147483648 pages cannot be indexed"):
        kernel.PageCache(1 << 62, PAGE)


@pytest.mark.parametrize("page_size", [0, 512, 1000, 5000, 32768])
def test_page_size_rule(kernel, page_size):
    with pytest.raises(ValueError, match="it must be a power of two from 1024 to 16384"):
        kernel.PageCache(1 << 20, page_size)


@pytest.mark.parametrize("page_size", [1024, 2048, 4096, 8192, 16384])
def test_cache_of_one_page(kernel, page_size):
    cache = kernel.PageCache(page_size, page_size)
    assert (cache.size, cache.capacity, cache.page_size) == (page_size, 1, page_size)
    assert cache.put(7, b"a" * page_size, 1)
    assert cache.get(7) == b"a" * page_size
    assert len(cache) == 1


# ---------------------------------------------------------------- contents


def test_put_get_drop(kernel):
    cache = kernel.PageCache(4 * PAGE, PAGE)
    assert cache.get(5) is None
    assert cache.put(5, content(5), 1)
    assert cache.put(5, content(5, 1), 1)
    assert cache.get(5) == content(5, 1)
    assert len(cache) == 1
    cache.drop(5)
    cache.drop(5)
    assert cache.get(5) is None
    assert (len(cache), cache.evictions) == (0, 0)


def test_put_refuses_another_length(kernel):
    cache = kernel.PageCache(4 * PAGE, PAGE)
    with pytest.raises(ValueError, match="a page has 1024 bytes, not 1023"):
        cache.put(5, bytes(1023), 1)
    assert len(cache) == 0


@pytest.mark.parametrize("stride", [1, 64, 1 << 20, (1 << 40) + 1])
def test_cache_fills_up_to_its_capacity(kernel, stride):
    """Fully associative: page numbers that would share a slot of a direct-mapped cache do not."""
    cache = kernel.PageCache(64 * PAGE, PAGE)
    pages = [i * stride for i in range(64)]
    for now in (1, 2, 3, 4):
        for page in pages:
            assert now == 1 or cache.get(page) == content(page, now - 1)
            assert cache.put(page, content(page, now), now)
    assert len(cache) == 64
    assert cache.evictions == 0


def test_stored_pages_are_copies(kernel):
    cache = kernel.PageCache(4 * PAGE, PAGE)
    page = bytearray(content(1))
    cache.put(1, page, 1)
    page[:] = bytes(PAGE)
    assert cache.get(1) == content(1)


# ---------------------------------------------------------------- eviction


def test_entry_is_safe_for_its_lifetime(kernel):
    cache = kernel.PageCache(PAGE, PAGE)
    assert cache.put(1, content(1), 2)
    assert not cache.put(2, content(2), 2)
    assert not cache.put(2, content(2), 3)
    assert cache.put(2, content(2), 4)
    assert cached(cache, (1, 2)) == {2}
    assert cache.evictions == 1


def test_entries_of_round_1_are_evictable_in_round_2(kernel):
    """All memory passes through in round 1; its entries may be evicted one round later."""
    cache = kernel.PageCache(PAGE, PAGE)
    assert cache.put(1, content(1), 1)
    assert cache.put(2, content(2), 2)
    cache = kernel.PageCache(PAGE, PAGE)
    cache.put(1, content(1), 1)
    cache.put(1, content(1), 1)  # a second use proves it
    assert not cache.put(2, content(2), 2)
    assert cache.put(2, content(2), 3)


def test_dirty_page_is_never_evicted(kernel):
    cache = kernel.PageCache(2 * PAGE, PAGE)
    cache.put(1, content(1), 1)
    cache.put(2, content(2), 1)
    assert cache.put(3, content(3), 9, b"\x02")  # page 1 is still to come: 2 goes
    assert cached(cache, (1, 2, 3)) == {1, 3}
    assert not cache.put(4, content(4), 99, b"\xff")
    assert cached(cache, (1, 3, 4)) == {1, 3}


def test_clock_hand_probes_sixteen_slots(kernel):
    for old, stored in [(15, [True]), (16, [False, True])]:
        cache = kernel.PageCache(32 * PAGE, PAGE)
        for page in range(32):
            cache.put(page, content(page), 1 if page == old else 5)
        assert [cache.put(99, content(99), 5) for _ in stored] == stored
        assert cached(cache, range(32)) == set(range(32)) - {old}


def test_resize_resets_the_clock_hand(kernel):
    cache = kernel.PageCache(2 * PAGE, PAGE)
    for page in (0, 1):
        cache.put(page, content(page), 1)
    cache.put(2, content(2), 2)  # takes slot 0; the hand is at slot 1
    cache.resize(4 * PAGE)
    for page in (3, 4):
        cache.put(page, content(page), 2)
    cache.put(5, content(5), 9)
    assert cached(cache, range(6)) == {1, 3, 4, 5}


def test_cyclic_scan_of_twice_the_capacity_hits_half(kernel):
    """Plain LRU hits never here: each page is evicted just before it comes round again."""
    capacity, rounds = 64, 10
    cache = kernel.PageCache(capacity * PAGE, PAGE)
    hits = 0
    for now in range(1, rounds + 1):
        for page in range(2 * capacity):
            hits += now > 2 and cache.get(page) is not None
            cache.put(page, content(page, now), now)
    rate = hits / ((rounds - 2) * 2 * capacity)
    assert 0.45 < rate <= 0.5
    assert len(cache) == capacity


def test_new_working_set_replaces_the_old(kernel):
    cache = kernel.PageCache(64 * PAGE, PAGE)
    for page in range(64):
        cache.put(page, content(page), 2)
    for now in (3, 4, 5):
        for page in range(100, 164):
            cache.put(page, content(page), now)
    assert cached(cache, range(200)) == set(range(100, 164))


# ---------------------------------------------------------------- resize


def test_grow_keeps_everything(kernel):
    cache = kernel.PageCache(8 * PAGE, PAGE)
    for page in range(8):
        cache.put(page, content(page), 3)
    cache.resize(64 * PAGE)
    assert (cache.size, cache.capacity, len(cache)) == (64 * PAGE, 64, 8)
    for page in range(8, 64):
        assert cache.put(page, content(page), 3)
    assert all(cache.get(page) == content(page) for page in range(64))
    assert cache.evictions == 0


def test_shrink_keeps_the_newest(kernel):
    cache = kernel.PageCache(64 * PAGE, PAGE)
    order = list(range(64))
    random.Random(1).shuffle(order)
    for age, page in enumerate(order):
        cache.put(page, content(page), age + 1)
    cache.resize(16 * PAGE)
    assert len(cache) == 16
    assert cached(cache, range(64)) == set(order[-16:])
    assert all(cache.get(page) == content(page) for page in order[-16:])
    cache.resize(PAGE)
    assert cached(cache, range(64)) == {order[-1]}


def test_resize_to_the_same_size_changes_nothing(kernel):
    cache = kernel.PageCache(4 * PAGE, PAGE)
    cache.put(3, content(3), 1)
    cache.resize(4 * PAGE)
    assert cache.get(3) == content(3)


# ---------------------------------------------------------------- twins

PAGES = st.integers(0, 40).map(lambda page: page * 0x10001)
OPERATIONS = st.one_of(
    st.tuples(st.just("put"), PAGES, st.integers(0, 1)),
    st.tuples(st.just("put"), PAGES, st.integers(0, 1)),
    st.tuples(st.just("fill"), PAGES, st.integers(1, 30)),
    st.tuples(st.just("drop"), PAGES),
    st.tuples(st.just("round"), st.integers(1, 2)),
    st.tuples(st.just("resize"), st.integers(0, 5)),
)


@given(st.lists(OPERATIONS, max_size=60), st.integers(0, 4), st.sampled_from([b"", b"\x0f"]))
@settings(max_examples=200, deadline=None)
def test_twins_agree_on_any_history(operations, exponent, todo):
    """Same answers, contents and evictions; each entry is the content that was last put."""
    a = COMPILED.PageCache(PAGE << exponent, PAGE)
    b = TWIN.PageCache(PAGE << exponent, PAGE)
    now, last, used = 1, {}, set()

    def put(page, version):
        data = content(page % 251, version)
        stored = a.put(page, data, now, todo)
        assert b.put(page, data, now, todo) == stored
        used.add(page)
        if stored:
            last[page] = data

    for name, *given_values in operations:
        if name == "put":
            put(*given_values)
        elif name == "fill":
            first, count = given_values
            for page in range(first, first + count):
                put(page, 2)
        elif name == "drop":
            a.drop(*given_values)
            b.drop(*given_values)
        elif name == "round":
            now += given_values[0]
        else:
            a.resize(PAGE << given_values[0])
            b.resize(PAGE << given_values[0])
        assert (len(a), a.capacity, a.size, a.evictions) == (
            *(len(b), b.capacity, b.size, b.evictions),
        )
        for page in used:
            kept = a.get(page)
            assert b.get(page) == kept
            assert kept is None or kept == last[page]
    assert len(cached(a, used)) == len(a) <= a.capacity
