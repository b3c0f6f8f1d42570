"""When batches are compressed, and at which level. Numbers only: no clocks, no threads."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.policy.compression import (
    FORGET_SECONDS,
    LEVELS,
    MIN_BYTES,
    CompressionPolicy,
    Kind,
    LinkMeter,
)

MIB = 1 << 20
SLOW, FAST = 30e6, 5e9
# What was measured on a real Linux guest: bytes left of a byte, and bytes per second.
LINUX = {-5: (0.32, 516e6), -1: (0.28, 430e6), 1: (0.23, 355e6), 3: (0.21, 133e6)}
RANDOM = dict.fromkeys(LEVELS, (1.0, 2e9))


def run(
    policy: CompressionPolicy, batches: int, bandwidth: float,
    costs: dict[int, tuple[float, float]], kind: Kind = Kind.PAGES,
) -> Counter[int | None]:  # fmt: skip
    """Send batches of 1 MiB; count which levels were chosen."""
    chosen: Counter[int | None] = Counter()
    for _ in range(batches):
        level = policy.choose(kind, MIB, bandwidth)
        chosen[level] += 1
        if level is not None:
            ratio, speed = costs[level]
            policy.learn(kind, level, MIB, round(ratio * MIB), MIB / speed)
    return chosen


@pytest.mark.parametrize(("bandwidth", "level"), [(SLOW, 3), (117e6, 1), (800e6, -5), (FAST, None)])
def test_the_level_fits_the_link(bandwidth, level):
    """The slower the link, the harder is compressed: two threads, a real guest."""
    policy = CompressionPolicy(2)
    chosen = run(policy, 2000, bandwidth, LINUX)
    assert policy.level(Kind.PAGES) == level
    assert chosen.most_common(1)[0][0] == level
    assert chosen[level] > 1950


def test_random_pages_are_hardly_tried():
    """A trial at 2 GB/s of one batch in 512 costs far below 1 % of the time."""
    chosen = run(CompressionPolicy(1), 4000, 1e9, RANDOM)
    assert sum(chosen.values()) - chosen[None] < 30


def test_nothing_is_compressed_while_the_link_is_unknown():
    policy = CompressionPolicy(4)
    assert run(policy, 100, 0.0, LINUX) == {None: 100}
    assert run(policy, 100, SLOW, LINUX)[None] == 0


def test_short_batches_are_sent_as_they_are():
    policy = CompressionPolicy(1)
    assert policy.choose(Kind.RECORDS, MIN_BYTES - 1, SLOW) is None
    assert policy.choose(Kind.RECORDS, MIN_BYTES, SLOW) is not None


def test_records_and_pages_are_measured_apart():
    policy = CompressionPolicy(1)
    run(policy, 100, SLOW, RANDOM, Kind.PAGES)
    run(policy, 100, SLOW, LINUX, Kind.RECORDS)
    assert policy.level(Kind.PAGES) is None
    assert policy.level(Kind.RECORDS) is not None


def test_processors_that_become_busy_end_it_at_once():
    """Compression takes twenty times as long all of a sudden: it is not used for long."""
    policy = CompressionPolicy(2)
    run(policy, 200, SLOW, LINUX)
    busy = {level: (ratio, speed / 20) for level, (ratio, speed) in LINUX.items()}
    chosen = run(policy, 200, SLOW, busy)
    assert chosen[3] + chosen[1] + chosen[-1] < 20
    assert run(policy, 600, SLOW, LINUX)[None] < 200


def test_slower_levels_are_not_tried_where_one_is_too_slow():
    policy = CompressionPolicy(1)
    slow = {level: (ratio, SLOW / 2) for level, (ratio, _) in LINUX.items()}
    chosen = run(policy, 100, SLOW, slow)
    assert chosen[3] == 0
    assert chosen[None] > 90


def test_another_round_is_measured_anew():
    policy = CompressionPolicy(1)
    run(policy, 4000, 117e6, RANDOM)
    policy.begin_round()
    chosen = run(policy, 200, 117e6, LINUX)
    assert chosen[None] < 60
    assert policy.level(Kind.PAGES) is not None


def test_a_given_level_is_the_only_one_and_has_to_pay():
    assert set(run(CompressionPolicy(1, 3), 100, SLOW, LINUX)) == {3}
    policy = CompressionPolicy(1, 3)
    run(policy, 100, FAST, LINUX)
    assert policy.level(Kind.PAGES) is None


COST = st.tuples(st.floats(0.001, 1.5), st.floats(1e6, 5e9))


@given(st.fixed_dictionaries(dict.fromkeys(LEVELS, COST)), st.floats(1e5, 1e10), st.integers(1, 4))
def test_the_pause_is_never_longer_with_compression(costs, bandwidth, threads):
    """Even if nothing overlaps: compressing and then sending is less than sending."""
    policy = CompressionPolicy(threads)
    run(policy, 40, bandwidth, costs)
    level = policy.choose(Kind.PAGES, MIB, bandwidth, paused=True)
    share = policy.pause_share(bandwidth)
    assert share <= 1.0
    if level is None:
        assert share == 1.0
    else:
        ratio, speed = costs[level]
        assert MIB / speed + ratio * MIB / bandwidth < MIB / bandwidth
        assert share == pytest.approx(bandwidth / speed + ratio, rel=1e-3, abs=1e-5)


# ---------------------------------------------------------------- the link


def sending(meter: LinkMeter, now: float, seconds: float, waited: float, rate: float) -> float:
    """Send batches for some seconds, of which the sender waits a share; return the time then."""
    end = now + seconds
    while now < end:
        now += 0.01
        meter.add(now, round(0.01 * rate), 0.01 * waited)
    return now


def test_the_bandwidth_shows_while_senders_wait():
    meter = LinkMeter()
    now = sending(meter, 0.0, 1.0, 0.1, 50e6)
    assert meter.bandwidth == 0.0
    now = sending(meter, now, 1.0, 0.9, 50e6)
    assert meter.bandwidth == pytest.approx(50e6, rel=0.1)
    now = sending(meter, now, 5.0, 0.1, 20e6)
    assert meter.bandwidth == pytest.approx(50e6, rel=0.1)
    sending(meter, now, FORGET_SECONDS, 0.1, 20e6)
    assert meter.bandwidth == 0.0


def test_several_senders_share_the_link():
    meter = LinkMeter()
    for step in range(1, 200):
        now = step * 0.01
        for _ in range(4):
            meter.add(now, 100_000, 0.009, channels=4)
    assert meter.bandwidth == pytest.approx(40e6, rel=0.1)
