"""The size of the page cache for `--cache-size auto`: tables of numbers."""

import pytest

from migrate.policy.cache_sizing import IDLE_ROUNDS, CacheSizing, CacheUse
from migrate.policy.working_set import WorkingSet

PAGE = 4096
MIB = 1 << 20


def swept(pages: int, guest: int = 262_144) -> WorkingSet:
    """Return the statistics of a round that sent all of `pages` again."""
    working = WorkingSet(PAGE)
    working.learn([0] * 256, [guest, *[0] * 255])
    now = [guest - pages, *[0] * 255]
    now[32] = pages
    working.learn([pages, *[0] * 255], now)
    return working


def missed(hits: int, misses: int, delta: float = 20, overflows: int = 0) -> CacheUse:
    return CacheUse(hits, misses, overflows, int(delta * (hits - overflows)))


@pytest.mark.parametrize(
    ("pages", "round_", "size"),
    [
        pytest.param(65_536, missed(16_384, 49_152), 256, id="what the working set needs"),
        pytest.param(50_000, missed(16_384, 33_616), 256, id="the next power of two"),
        pytest.param(16_000, missed(16_000, 0), 64, id="it fits"),
        pytest.param(17_000, missed(16_384, 616), 64, id="few misses"),
        pytest.param(262_144, missed(16_384, 245_760), 512, id="no more than allowed"),
        pytest.param(65_536, missed(0, 65_536), 256, id="no hits at all"),
        pytest.param(65_536, missed(16_384, 49_152, delta=4000), 64, id="long deltas"),
        pytest.param(65_536, missed(16_384, 49_152, 20, 16_000), 64, id="overflows"),
        pytest.param(65_536, missed(60, 190), 64, id="a short round"),
    ],
)
def test_cache_grows_if_hits_pay(pages, round_, size):
    sizing = CacheSizing(64 * MIB, 512 * MIB, PAGE)
    assert sizing.decide(swept(pages), round_) == size * MIB
    assert sizing.size == size * MIB


def test_initial_size_is_bounded():
    assert CacheSizing(64 * MIB, 16 * MIB, PAGE).size == 16 * MIB


def test_cache_shrinks_only_after_long_idle_time():
    sizing = CacheSizing(MIB, 512 * MIB, PAGE)
    assert sizing.decide(swept(65_536), missed(256, 65_280)) == 256 * MIB
    for working in (swept(10_000), swept(1000)):
        for _ in range(IDLE_ROUNDS - 1):
            assert sizing.decide(working, missed(1000, 0)) == 256 * MIB
        assert sizing.decide(swept(10_000), missed(1000, 0)) == 256 * MIB, "a quarter is in use"
    for _ in range(IDLE_ROUNDS):
        size = sizing.decide(swept(1000), missed(1000, 0))
    assert size == 8 * MIB, "twice what is needed"
    for _ in range(10 * IDLE_ROUNDS):
        assert sizing.decide(swept(1000), missed(1000, 0)) == 8 * MIB
    for _ in range(IDLE_ROUNDS):
        size = sizing.decide(swept(1), missed(1000, 0))
    assert size == MIB, "no less than at first"


def test_cache_use_of_one_round():
    assert CacheUse(10, 8, 6, 4000).since(CacheUse(5, 7, 3, 3000)) == CacheUse(5, 1, 3, 1000)
    assert CacheUse().saving(PAGE) == 1.0
    assert missed(100, 0, delta=PAGE / 4, overflows=50).saving(PAGE) == pytest.approx(0.375)
