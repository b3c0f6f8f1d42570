"""Advice at the end of a migration: what the numbers mean, and which option to change."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.policy.advice import LARGE_CACHE, advice, obstacle, option_size
from migrate.policy.delta_switch import DeltaSwitch
from migrate.policy.downtime import DowntimeModel, Limits, PendingWork, RoundCost
from migrate.policy.working_set import WorkingSet
from migrate.statistics import Statistics, Status
from migrate.units import parse_milliseconds, parse_size

PAGE = 4096
MIB = 1 << 20
GUEST = 262_144  # pages: 1 GiB
RAW = RoundCost(100_000, 100_000 * PAGE, 4.0, 0.1, 0.1)
NOTHING = PendingWork(0, 0)
MUCH = PendingWork(100_000, 0)
DONE = Statistics(
    status=Status.COMPLETED, capabilities={"xbzrle": True}, total=GUEST * PAGE, cache_size=64 * MIB,
    cache_hits=100_000, cache_miss=0, xbzrle_pages=100_000, xbzrle_bytes=2_000_000,
)  # fmt: skip
STUCK = DONE.with_(status=Status.FAILED, cache_hits=50_000, cache_miss=150_000, xbzrle_pages=50_000)
OFF = DONE.with_(status=Status.FAILED, capabilities={"xbzrle": False}, cache_hits=0, xbzrle_bytes=0)


def swept(pages: int) -> WorkingSet:
    """Return the statistics of a round that sent all of `pages` again."""
    working = WorkingSet(PAGE)
    now = [GUEST - pages, *[0] * 255]
    now[32] = pages
    working.learn([pages, *[0] * 255], now)
    return working


def one(found: tuple[str, ...]) -> str:
    assert len(found) == 1
    return found[0]


# ---------------------------------------------------------------- nothing to say


@pytest.mark.parametrize(
    ("statistics", "pages"),
    [
        pytest.param(DONE, 10_000, id="all is well"),
        pytest.param(DONE, 0, id="nothing was written"),
        pytest.param(DONE.with_(cache_miss=9_000), 100_000, id="few misses"),
        pytest.param(STUCK.with_(cache_hits=100, cache_miss=300), 100_000, id="few pages"),
        pytest.param(STUCK.with_(cache_size=512 * MIB), 100_000, id="it would fit: it was late"),
        pytest.param(DONE, 10, id="the default size, though it is too large"),
        pytest.param(OFF.with_(status=Status.COMPLETED), 100_000, id="without deltas it arrived"),
        pytest.param(OFF, 100, id="without deltas, few pages"),
    ],
)
def test_no_advice_if_nothing_would_improve(statistics, pages):
    assert advice(statistics, swept(pages), DeltaSwitch(PAGE), bandwidth=117e6) == ()


# ---------------------------------------------------------------- the cache


def test_small_cache_is_advised_a_size():
    text = one(advice(STUCK, swept(65_536)))
    assert text == (
        "the working set is about 256.0 MiB: a cache of 256m would have hit 100 % of what was "
        "sent again, the one of 64m hit 25 %: use --cache-size 256m"
    )


def test_auto_sized_cache_is_advised_cache_max():
    text = one(advice(STUCK, swept(65_536), cache_max=64 * MIB))
    assert text.endswith("use --cache-max 256m")


def test_large_cache_is_advised_a_smaller_size():
    large = DONE.with_(cache_size=LARGE_CACHE)
    assert one(advice(large, swept(2000))) == (
        "the working set is about 7.8 MiB: a cache of 8m would have done, it is 256m: use "
        "--cache-size 8m"
    )
    assert advice(large, swept(20_000)) == ()
    assert advice(large.with_(status=Status.FAILED), swept(2000)) == ()
    assert advice(large, swept(2000), cache_max=LARGE_CACHE) == (), "it was not asked for"


@pytest.mark.parametrize("size", [1, 512, 4096, 64 * MIB, 256 * MIB, 1 << 30, 3 << 20, 1 << 41])
def test_advised_sizes_parse_as_option_values(size):
    assert parse_size(option_size(size), "size") == size
    assert len(option_size(size)) < 6


# ---------------------------------------------------------------- deltas that do not pay


def switched_off() -> DeltaSwitch:
    deltas = DeltaSwitch(PAGE)
    for now in range(5):
        wall = 0.65536 if now < 3 else 0.2
        deltas.decide(RoundCost(65_536, 65_536 * 3000, wall, 0.4, 0.1), 1e9)
    return deltas


def test_switched_off_deltas_are_advised_off():
    deltas = switched_off()
    assert deltas.settled
    assert not deltas.active
    text = one(advice(DONE, swept(1000), deltas))
    assert text == (
        "xbzrle costs more than it saves here: a page took 10.0 us with deltas and 3.1 us without: "
        "use --capability xbzrle=off"
    )


def test_overflowing_deltas_are_advised_off():
    much = DONE.with_(overflow=20_000, overflow_skipped=80_000, cache_hits=21_000,
                      xbzrle_bytes=100_000)  # fmt: skip
    text = one(advice(much, swept(10_000), DeltaSwitch(PAGE)))
    assert "99 % of the deltas would be larger than their page" in text
    assert "1 % of the bytes are saved" in text
    assert "--capability xbzrle=off" in text
    half = DONE.with_(overflow=10_000, overflow_skipped=40_000)
    assert advice(half, swept(10_000), DeltaSwitch(PAGE)) == (), "the other half pays"


def test_slow_link_without_deltas_is_advised_deltas():
    text = one(advice(OFF, swept(65_536), bandwidth=117e6))
    assert "256.0 MiB" in text
    assert "--capability xbzrle=on" in text
    assert "--cache-size 256m" in text
    assert advice(OFF, swept(65_536), bandwidth=1e9) == (), "a fast one may be better off so"


counts = st.integers(0, 1 << 50)


@settings(deadline=None)
@given(
    st.builds(
        Statistics, status=st.sampled_from([Status.COMPLETED, Status.FAILED, Status.ACTIVE]),
        capabilities=st.booleans().map(lambda on: {"xbzrle": on}), total=counts,
        cache_size=st.integers(10, 50).map(lambda n: 1 << n), cache_hits=counts,
        cache_miss=counts, overflow=counts, overflow_skipped=counts, xbzrle_bytes=counts,
    ),
    st.integers(0, GUEST),
)  # fmt: skip
def test_every_advice_is_readable(statistics, pages):
    for sentence in advice(statistics, swept(pages), DeltaSwitch(PAGE)):
        assert "--" in sentence
        assert "nan" not in sentence
        assert "-0" not in sentence


# ---------------------------------------------------------------- what keeps it from converging


def model_of(*rounds: RoundCost) -> DowntimeModel:
    model = DowntimeModel()
    for measured in rounds:
        model.learn(measured)
    return model


def said(model: DowntimeModel, pending: PendingWork, **limits) -> str:
    bounds = Limits(**limits)
    return obstacle(model, bounds, pending, model.predict(pending, bounds))


def test_obstacle_compares_rewritten_bytes_with_link():
    assert said(model_of(RAW), MUCH) == (
        "the guest would be stopped for 4004 ms, the limit is 300 ms; the guest writes 100000 "
        "pages again in each round, 390.6 MiB at 4096 bytes each; within the limit the link "
        "carries 29.3 MiB, 13.3 times less: raise --downtime-limit, or use a faster link"
    )


def test_obstacle_gives_factor_of_write_rate():
    text = said(model_of(RAW), PendingWork(100_000, 0, dirty_rate=80_000.0))
    assert "writes 80000 pages a second" in text
    assert "312.5 MiB/s at 4096 bytes each" in text
    assert "the link carries 97.7 MiB/s, 3.2 times less" in text


def test_obstacle_names_max_bandwidth():
    model = model_of(RoundCost(100_000, 100_000 * 40, 40.0, 0.01, 0.01))
    assert "--max-bandwidth or --downtime-limit" in said(model, MUCH, max_bandwidth=100_000)


def test_obstacle_names_slow_machine():
    text = said(model_of(RoundCost(100_000, 100_000 * 40, 0.1, 9.0, 1.0)), MUCH)
    assert "this machine's speed" in text
    assert "--downtime-limit" in text
    assert "bandwidth" not in text


def test_obstacle_names_writer_check():
    text = said(model_of(RAW), PendingWork(10, 0, check_seconds=0.4))
    assert "looking whether any other process writes the guest takes 400 ms of that" in text


def test_obstacle_names_scan():
    text = said(model_of(RAW), PendingWork(10, 0, scan_seconds=0.4))
    assert "finding what changed takes 400 ms" in text
    assert "--downtime-limit" in text


def test_obstacle_names_round_trips():
    model = model_of(RAW)
    model.round_trip = 0.2
    text = said(model, NOTHING)
    assert "round trips to the destination take 400 ms" in text
    assert "--downtime-limit" in text
    assert "speed" not in text


times = st.floats(0, 1e6)
rounds = st.lists(
    st.builds(RoundCost, st.integers(0, 1 << 32), st.integers(0, 1 << 44), times, times, times)
)


@settings(deadline=None)
@given(rounds, st.builds(PendingWork, st.integers(0, 1 << 32), st.integers(0, 9), times, times))
def test_every_obstacle_is_readable(learnt, pending):
    model = model_of(*learnt)
    expected = model.predict(pending, Limits())
    assert math.isfinite(expected)
    text = obstacle(model, Limits(), pending, expected)
    assert "--" in text
    assert "nan" not in text
    assert "inf" not in text


def test_obstacle_names_digest_of_whole_guest():
    text = said(model_of(RAW), PendingWork(10, 0, whole_seconds=0.4))
    assert "checking the whole takes 400 ms" in text
    assert "finding what changed" not in text
    both = said(model_of(RAW), PendingWork(10, 0, scan_seconds=0.3, whole_seconds=0.2))
    assert "finding what changed takes 300 ms of that and checking the whole takes 200 ms" in both


@pytest.mark.parametrize("seconds", [0.0004, 0.2, 0.31, 0.525, 3.9, 47.0])
def test_proposed_limit_is_sufficient(seconds):
    text = said(model_of(RAW), PendingWork(0, 0, scan_seconds=seconds), downtime_limit=seconds / 2)
    limit = parse_milliseconds(text.rpartition("raise --downtime-limit to ")[2], "limit") / 1e3
    expected = model_of(RAW).predict(PendingWork(0, 0, scan_seconds=seconds), Limits())
    assert 1.4 * expected <= limit <= 2 * expected
