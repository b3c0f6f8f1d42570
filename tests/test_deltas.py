"""When deltas are made, and how large their cache grows: tables and loads of numbers, no clocks."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.deltas import (
    FIRST_WAIT,
    IDLE_ROUNDS,
    LONGEST_WAIT,
    MARGIN,
    TELLING_PAGES,
    CacheSizing,
    DeltaSwitch,
    Lookups,
)
from migrate.rounds import Measured
from migrate.workingset import WorkingSet

PAGE = 4096
MIB = 1 << 20
FAST, SLOW = 1.2e9, 117e6


def cost(
    microseconds: float, *, pages: int = 65536, bytes_: float = 100, encode: float = 0.1
) -> Measured:
    """A round in which a page took so long, encoding `encode` of that."""
    seconds = pages * microseconds / 1e6
    return Measured(pages, int(pages * bytes_), seconds, encode * seconds, 0.0)


def run(switch: DeltaSwitch, rounds: int, with_: Measured, without: Measured, link: float):
    """Rounds that cost this and that; (whether each made deltas, what was said)."""
    made, said = [], []
    for _ in range(rounds):
        made.append(switch.active)
        said.append(switch.decide(with_ if switch.active else without, link))
    return made, [text for text in said if text]


def switches(made: list[bool]) -> int:
    return sum(a != b for a, b in itertools.pairwise(made))


# ---------------------------------------------------------------- deltas off and on


def test_deltas_that_pay_are_never_put_to_the_test():
    made, said = run(DeltaSwitch(PAGE), 1000, cost(1.5), cost(35.0), SLOW)
    assert all(made)
    assert said == []


def test_deltas_that_cost_more_are_tried_without_and_switched_off():
    switch = DeltaSwitch(PAGE)
    made, said = run(switch, 10, cost(8.0), cost(3.0), FAST)
    assert made == [True] * 3 + [False] * 7
    assert said == [
        "deltas cost more than they save here: 8.0 us a page with them, 3.0 us without: they are "
        "switched off"
    ]
    assert switch.settled


def test_one_slow_round_is_no_reason():
    switch = DeltaSwitch(PAGE)
    for now in range(100):
        assert switch.active
        switch.decide(cost(8.0 if now % 2 else 2.0), FAST)


def test_a_trial_that_shows_nothing_better_is_repeated_less_and_less_often():
    """The link looks faster than it is."""
    switch = DeltaSwitch(PAGE)
    made, said = run(switch, 2000, cost(8.0), cost(7.9), FAST)
    assert said == []
    assert switch.active
    trials = [now for now, active in enumerate(made) if not active]
    assert len(trials) <= 9
    waits = [b - a for a, b in itertools.pairwise(trials)]
    assert waits[0] >= FIRST_WAIT
    assert all(b >= 1.5 * a for a, b in itertools.pairwise(waits) if b < LONGEST_WAIT)


def test_switched_off_it_looks_less_and_less_often_whether_deltas_pay_again():
    made, said = run(DeltaSwitch(PAGE), 2000, cost(8.0), cost(3.0), FAST)
    assert len(said) == 1
    probes = [len(list(run)) for active, run in itertools.groupby(made) if active][1:]
    assert 3 <= len(probes) <= 8
    assert set(probes) == {2}, "a round to fill the cache, a round to measure"


def test_deltas_that_pay_again_are_switched_on():
    switch = DeltaSwitch(PAGE)
    run(switch, 6, cost(8.0), cost(3.0), FAST)
    made, said = run(switch, 40, cost(1.0), cost(3.0), FAST)
    assert made[0] is False
    assert said == [
        "deltas pay again: 1.0 us a page with them, 3.0 us without: they are switched on"
    ]
    assert all(made[FIRST_WAIT + 4 :])


def test_what_is_hardly_better_changes_nothing():
    off = DeltaSwitch(PAGE)
    run(off, 6, cost(8.0), cost(3.0), FAST)
    assert run(off, 500, cost(2.9), cost(3.0), FAST)[1] == []
    on = DeltaSwitch(PAGE)
    assert run(on, 500, cost(3.7), cost(3.0), FAST)[1] == []


def test_deltas_near_a_whole_page_are_put_to_the_test_where_the_link_is_not_what_limits():
    """How fast the link is cannot be known, where the encoder never fills it."""
    dense = {"bytes_": 3075, "encode": 0.6}
    made, said = run(DeltaSwitch(PAGE), 10, cost(8.0, **dense), cost(3.0), 0.0)
    assert made[-1] is False
    assert len(said) == 1
    made, _ = run(DeltaSwitch(PAGE), 100, cost(27.0, bytes_=3075), cost(35.0), SLOW)
    assert all(made), "it is the link"
    made, _ = run(DeltaSwitch(PAGE), 100, cost(8.0, encode=0.6), cost(3.0), 0.0)
    assert all(made), "without them it could be 40 times as much"


def test_short_rounds_and_the_first_one_say_nothing():
    switch = DeltaSwitch(PAGE)
    switch.decide(cost(100.0), FAST)
    for _ in range(100):
        switch.decide(cost(100.0, pages=TELLING_PAGES - 1), FAST)
    assert switch.active
    assert switch.with_deltas == 0.0


times = st.floats(0.1, 100)


@settings(deadline=None)
@given(st.integers(0, 2**32), times, times, st.floats(1.0, 3.0), st.sampled_from([0.0, SLOW, FAST]))
def test_it_never_flaps_whatever_is_measured(seed, with_, without, noise, link):
    chance, switch, made = random.Random(seed), DeltaSwitch(PAGE), []
    for _ in range(3000):
        made.append(switch.active)
        taken = (with_ if switch.active else without) * chance.uniform(1, noise)
        bytes_ = 3000 if switch.active else PAGE
        switch.decide(cost(taken, bytes_=bytes_, encode=chance.random()), link)
    # each trial or probe is two switches; they are 8, 16, 32 ... 512 rounds apart
    assert switches(made) <= 2 * (6 + 3000 // LONGEST_WAIT + 1)


@settings(deadline=None)
@given(times, times, st.floats(1e8, 1e10))
def test_what_is_clearly_cheaper_wins_where_the_link_is_known(with_, without, link):
    """The link can carry what was measured without."""
    without = max(without, PAGE / link * 1e6)
    switch = DeltaSwitch(PAGE)
    made, _ = run(switch, 300, cost(with_), cost(without), PAGE / without * 1e6)
    off = sum(not active for active in made[20:]) / len(made[20:])
    if with_ > 1.01 * MARGIN * without:
        assert off > 0.8
    elif with_ * 1.01 < without:
        assert off == 0


# ---------------------------------------------------------------- the size of the cache


def swept(pages: int, guest: int = 262_144) -> WorkingSet:
    """All of so many pages were sent again in one round."""
    working = WorkingSet(PAGE)
    working.learn([0] * 256, [guest, *[0] * 255])
    now = [guest - pages, *[0] * 255]
    now[32] = pages
    working.learn([pages, *[0] * 255], now)
    return working


def missed(hits: int, misses: int, delta: float = 20, overflows: int = 0) -> Lookups:
    return Lookups(hits, misses, overflows, int(delta * (hits - overflows)))


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
def test_the_cache_grows_to_what_pays(pages, round_, size):
    sizing = CacheSizing(64 * MIB, 512 * MIB, PAGE)
    assert sizing.decide(swept(pages), round_) == size * MIB
    assert sizing.size == size * MIB


def test_it_begins_with_no_more_than_is_allowed():
    assert CacheSizing(64 * MIB, 16 * MIB, PAGE).size == 16 * MIB


def test_it_shrinks_only_if_far_too_large_for_long():
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


def test_what_one_round_did():
    assert Lookups(10, 8, 6, 4000).since(Lookups(5, 7, 3, 3000)) == Lookups(5, 1, 3, 1000)
    assert Lookups().saving(PAGE) == 1.0
    assert missed(100, 0, delta=PAGE / 4, overflows=50).saving(PAGE) == pytest.approx(0.375)
