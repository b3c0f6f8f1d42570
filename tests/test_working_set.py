"""The working set: the predicted hits of a cache size are those of a migration with it.

Loads go through the encoder with caches of several sizes. Everything is counted, nothing timed.
"""

import itertools
import mmap
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.policy.working_set import WorkingSet
from proto.codec.pageset import PageSet
from tests.kernels import COMPILED

PAGE = 1024
PAGES = 4096
ROUNDS = 40
SETTLED = 12  # rounds after which the cache has found what to keep

Load = Callable[[], Iterator[set[int]]]


def sweep(pages: int) -> Load:
    """Write all of `pages` in each round."""
    return lambda: iter([set(range(pages))] * ROUNDS)


def skewed(exponent: float, writes: int) -> Load:
    """Pages chosen at random, the first ones most often."""

    def load() -> Iterator[set[int]]:
        chance = random.Random(5)
        weights = [1 / (rank + 1) ** exponent for rank in range(PAGES)]
        places = list(range(PAGES))
        chance.shuffle(places)
        for _ in range(ROUNDS):
            yield set(chance.choices(places, weights, k=writes))

    return load


def two_speeds() -> Iterator[set[int]]:
    """256 pages in each round, and of 2048 others each one in eight rounds."""
    for now in range(ROUNDS):
        yield set(range(256)) | set(range(256 + now % 8 * 256, 512 + now % 8 * 256))


def moved(load: Load, entries: int) -> tuple[WorkingSet, float]:
    """Sends a guest under a load; its working set, and the share that the cache hit at last."""
    encoder = COMPILED.PageEncoder(
        COMPILED.PageHashes(PAGES, PAGE, b"seed"), COMPILED.PageCache(entries * PAGE, PAGE)
    )
    memory = mmap.mmap(-1, PAGES * PAGE)
    working = WorkingSet(PAGE)
    hits = misses = 0
    for now, written in enumerate([set(range(PAGES)), *load()], 1):
        if now == SETTLED:
            hits, misses = encoder.hits, encoder.misses
        for page in written:
            memory[page * PAGE] = now
        send(encoder, memory, PageSet(PAGES, written), now)
        working.learn(*encoder.sample_heat())
    hits, misses = encoder.hits - hits, encoder.misses - misses
    return working, hits / (hits + misses)


def send(encoder, memory: mmap.mmap, dirty: PageSet, now: int) -> None:
    encoder.begin_round(now)
    page = 0
    while page < PAGES:
        _, page = encoder.feed_memory(memory, dirty.bits, page, PAGES, PAGES)
        if encoder.pending:
            encoder.finish_batch()


LOADS = {
    "sweep": sweep(1500),
    "skewed": skewed(1.0, 2000),
    "more skewed": skewed(1.5, 2000),
    "even": skewed(0.0, 1500),
    "two speeds": two_speeds,
}


# A cache keeps what it has, not what would be best, where pages are chosen by chance: what is said
# is then the best there could be, and it comes near that where it holds most of what is hot.
SMALL_FOR = {"skewed": 0.15, "more skewed": 0.1, "two speeds": 0.2}


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("watched", [64, 4096])
def test_hit_share_matches_real_cache(name, watched):
    """Whatever the size of the cache with which it was found out."""
    said, _ = moved(LOADS[name], watched)
    for entries in (256, 512, 1024, 2048, 4096):
        promised, hit = said.hit_share(entries * PAGE), moved(LOADS[name], entries)[1]
        assert hit - 0.01 <= promised <= hit + SMALL_FOR.get(name, 0.01), entries
    best = said.fitting(PAGES * PAGE)
    assert moved(LOADS[name], best // PAGE)[1] == pytest.approx(said.hit_share(best), abs=0.01)


@pytest.mark.parametrize(("pages", "entries"), [(1, 1), (256, 256), (300, 512), (1500, 2048)])
def test_fitting_size_matches_working_set(pages, entries):
    said, _ = moved(sweep(pages), 64)
    assert said.pages == pages
    assert said.size == pages * PAGE
    assert said.fitting(1 << 30) == entries * PAGE
    assert said.fitting(128 * PAGE) == min(entries, 128) * PAGE


def test_skewed_load_is_hit_by_small_cache():
    said, _ = moved(skewed(1.5, 2000), 64)
    flat, _ = moved(skewed(0.0, 2000), 64)
    for entries in (128, 256, 512, 1024):
        assert said.hit_share(entries * PAGE) > 2 * flat.hit_share(entries * PAGE)


def test_first_estimate_after_one_round():
    working = WorkingSet(PAGE)
    working.learn([0] * 256, [1000] + [0] * 255)
    assert (working.pages, working.hit_share(PAGE)) == (0, 1.0)
    working.learn([512] + [0] * 255, heats({0: 488, 32: 512}))
    assert working.pages == 512
    assert working.hit_share(128 * PAGE) == 0.25
    assert working.fitting(1 << 30) == 512 * PAGE


def test_old_phase_is_forgotten():
    def phases() -> Iterator[set[int]]:
        for _ in range(8):
            yield set(range(2000))
        for _ in range(40):
            yield set(range(3000, 3400))

    said, _ = moved(phases, 64)
    assert said.pages == 400
    assert said.fitting(1 << 30) == 512 * PAGE
    assert said.hit_share(512 * PAGE) == pytest.approx(1.0, abs=0.001)


def heats(pages: dict[int, int]) -> list[int]:
    return [pages.get(heat, 0) for heat in range(256)]


surveys = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, 255), st.integers(0, 5000), max_size=5),
        st.dictionaries(st.integers(0, 255), st.integers(0, 5000), max_size=5),
    ),
    max_size=8,
)


@settings(deadline=None)
@given(surveys)
def test_hit_share_is_a_share_and_grows_with_cache(told):
    working = WorkingSet(PAGE)
    for sendings, pages in told:
        pages[0] = 30_000 - sum(pages.values()) + pages.get(0, 0)  # a guest does not grow
        working.learn(heats(sendings), heats(pages))
    shares = [working.hit_share(PAGE << n) for n in range(24)]
    assert all(0 <= share <= 1 + 1e-9 for share in shares)
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(shares))
    size = working.fitting(1 << 24)
    assert PAGE <= size <= 1 << 24
    assert size.bit_count() == 1
