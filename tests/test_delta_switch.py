"""The delta switch: when deltas are switched off and on. Numbers only, no clocks."""

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.policy.advice import switch_notice
from migrate.policy.delta_switch import (
    FIRST_WAIT,
    LONGEST_WAIT,
    MARGIN,
    MIN_PAGES_FOR_COMPARISON,
    DeltaSwitch,
)
from migrate.policy.downtime import RoundCost

PAGE = 4096
MIB = 1 << 20
FAST, SLOW = 1.2e9, 117e6


def cost(
    microseconds: float, *, pages: int = 65536, bytes_: float = 100, encode: float = 0.1
) -> RoundCost:
    """Return a round with this cost per page, of which encoding took `encode`."""
    seconds = pages * microseconds / 1e6
    return RoundCost(pages, int(pages * bytes_), seconds, encode * seconds, 0.0)


def run(switch: DeltaSwitch, rounds: int, with_: RoundCost, without: RoundCost, link: float):
    """Run rounds with these costs; return (whether each made deltas, the notices)."""
    made, said = [], []
    for _ in range(rounds):
        made.append(switch.active)
        if switch.decide(with_ if switch.active else without, link):
            said.append(switch_notice(switch))
    return made, said


def switches(made: list[bool]) -> int:
    return sum(a != b for a, b in itertools.pairwise(made))


def test_no_trial_while_deltas_pay():
    made, said = run(DeltaSwitch(PAGE), 1000, cost(1.5), cost(35.0), SLOW)
    assert all(made)
    assert said == []


def test_costly_deltas_are_switched_off_after_trial():
    switch = DeltaSwitch(PAGE)
    made, said = run(switch, 10, cost(8.0), cost(3.0), FAST)
    assert made == [True] * 3 + [False] * 7
    assert said == [
        "deltas cost more than they save here: 8.0 us a page with them, 3.0 us without: they are "
        "switched off"
    ]
    assert switch.settled


def test_single_slow_round_begins_no_trial():
    switch = DeltaSwitch(PAGE)
    for now in range(100):
        assert switch.active
        switch.decide(cost(8.0 if now % 2 else 2.0), FAST)


def test_waits_between_failed_trials_double():
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


def test_waits_between_failed_probes_double():
    made, said = run(DeltaSwitch(PAGE), 2000, cost(8.0), cost(3.0), FAST)
    assert len(said) == 1
    probes = [len(list(run)) for active, run in itertools.groupby(made) if active][1:]
    assert 3 <= len(probes) <= 8
    assert set(probes) == {2}, "a round to fill the cache, a round to measure"


def test_deltas_are_switched_on_after_probe():
    switch = DeltaSwitch(PAGE)
    run(switch, 6, cost(8.0), cost(3.0), FAST)
    made, said = run(switch, 40, cost(1.0), cost(3.0), FAST)
    assert made[0] is False
    assert said == [
        "deltas pay again: 1.0 us a page with them, 3.0 us without: they are switched on"
    ]
    assert all(made[FIRST_WAIT + 4 :])


def test_difference_below_margin_changes_nothing():
    off = DeltaSwitch(PAGE)
    run(off, 6, cost(8.0), cost(3.0), FAST)
    assert run(off, 500, cost(2.9), cost(3.0), FAST)[1] == []
    on = DeltaSwitch(PAGE)
    assert run(on, 500, cost(3.7), cost(3.0), FAST)[1] == []


def test_dense_deltas_are_tried_if_encoder_is_the_bottleneck():
    """How fast the link is cannot be known, where the encoder never fills it."""
    dense = {"bytes_": 3075, "encode": 0.6}
    made, said = run(DeltaSwitch(PAGE), 10, cost(8.0, **dense), cost(3.0), 0.0)
    assert made[-1] is False
    assert len(said) == 1
    made, _ = run(DeltaSwitch(PAGE), 100, cost(27.0, bytes_=3075), cost(35.0), SLOW)
    assert all(made), "it is the link"
    made, _ = run(DeltaSwitch(PAGE), 100, cost(8.0, encode=0.6), cost(3.0), 0.0)
    assert all(made), "without them it could be 40 times as much"


def test_first_and_short_rounds_are_ignored():
    switch = DeltaSwitch(PAGE)
    switch.decide(cost(100.0), FAST)
    for _ in range(100):
        switch.decide(cost(100.0, pages=MIN_PAGES_FOR_COMPARISON - 1), FAST)
    assert switch.active
    assert switch.with_deltas == 0.0


times = st.floats(0.1, 100)


@settings(deadline=None)
@given(st.integers(0, 2**32), times, times, st.floats(1.0, 3.0), st.sampled_from([0.0, SLOW, FAST]))
def test_switch_never_flaps(seed, with_, without, noise, link):
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
def test_cheaper_alternative_wins_if_bandwidth_is_known(with_, without, link):
    """The link can carry the rate that was measured without deltas."""
    without = max(without, PAGE / link * 1e6)
    switch = DeltaSwitch(PAGE)
    made, _ = run(switch, 300, cost(with_), cost(without), PAGE / without * 1e6)
    off = sum(not active for active in made[20:]) / len(made[20:])
    if with_ > 1.01 * MARGIN * without:
        assert off > 0.8
    elif with_ * 1.01 < without:
        assert off == 0
