"""Rounds are differences of snapshots: whatever was counted, the sums are the totals."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.statistics import Statistics
from migrate.views import history
from migrate.views.history import SUMS, History, difference, together

START = Statistics(status="setup", total=1 << 20)
TOTALS = {
    "wire_bytes": "transferred", "zero": "duplicate", "normal": "normal", "delta": "xbzrle_pages",
    "skipped": "skipped", "delta_bytes": "xbzrle_bytes", "hits": "cache_hits",
    "misses": "cache_miss", "overflow": "overflow",
}  # fmt: skip
count = st.integers(1, 10**9)


def grown(s: Statistics, by: int, **changes: object) -> Statistics:
    """A later snapshot: all counters are larger."""
    counters = {name: getattr(s, name) + by for name in TOTALS.values()}
    return replace(s, **{**counters, "total_time": s.total_time + 0.25, **changes})


def after_round(s: Statistics, by: int, rounds: int = 1) -> Statistics:
    return grown(s, by, status="active", dirty_sync_count=s.dirty_sync_count + rounds)


steps = st.lists(
    st.tuples(st.sampled_from(["round", "progress", "notice: x", "broken"]), count), max_size=60
)


@given(steps, st.sampled_from(["completed", "failed", "cancelled"]), st.integers(2, 8))
def test_the_sums_over_all_rounds_are_the_totals(steps, status, most):
    """However many rounds there are, and wherever a connection broke in one."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MAX_ROUNDS", "HEAD_ROUNDS", "RECENT_ROUNDS"):
            patch.setattr(history, name, most)
        seen, s = History(), START
        seen.observe("status", s)
        for event, by in steps:
            s = after_round(s, by) if event == "round" else grown(s, by, status="active")
            if event == "broken":  # its number is not used again
                s = s.with_(status="setup")
            seen.observe("status" if event == "broken" else event, s)
        s = grown(s, 1, status=status)
        seen.observe("status", s)
    rounds = list(seen.rounds())
    for name, total in TOTALS.items():
        assert sum(getattr(r, name) for r in rounds) == getattr(s, total), name
    assert abs(sum(r.seconds for r in rounds) - s.total_time) < 1e-6
    assert [r.first for r in rounds[1:]] == [r.number + 1 for r in rounds[:-1]]
    assert len(seen.closed) <= 3 * most + 1
    assert rounds[-1].unfinished


def test_a_million_rounds_would_fit():
    seen, s = History(), START
    for _ in range(20_000):
        s = after_round(s, 1)
        seen.observe("round", s)
    records = seen.closed
    assert len(records) <= history.HEAD_ROUNDS + history.MAX_ROUNDS + history.RECENT_ROUNDS
    assert sum(r.normal for r in records) == 20_000
    assert records[0].count == records[-1].count == 1
    spans = [r.count for r in records[history.HEAD_ROUNDS : -history.RECENT_ROUNDS]]
    assert max(spans) == 64
    assert min(spans[:-1]) == 64


def test_a_round_is_what_it_moved():
    seen = History()
    s = START.with_(page_size=4096, setup_time=0.1)
    seen.observe("status", s)
    one = s.with_(
        status="active", total_time=1.1, transferred=5000, duplicate=1, normal=2, skipped=3,
        remaining=8192, dirty_pages_rate=10.0, expected_downtime=0.25, cache_size=65536,
        dirty_sync_count=1,
    )  # fmt: skip
    seen.observe("round", one)
    seen.observe("round", one.with_(
        total_time=1.6, transferred=6000, xbzrle_pages=5, xbzrle_bytes=400, cache_hits=3,
        cache_miss=1, overflow=1, dirty_sync_count=2, expected_downtime=0.125,
    ))  # fmt: skip
    first, second = seen.rounds()
    assert (first.began, first.seconds, first.wire_bytes) == (0.1, 1.0, 5000)
    assert (first.pages, first.skipped, first.hit_ratio) == (3, 3, None)
    assert (first.remaining, first.dirty_rate, first.mbps) == (8192, 40960.0, 0.04)
    assert (second.number, second.began, second.wire_bytes) == (2, 1.1, 1000)
    assert (second.pages, second.delta, second.delta_bytes) == (5, 5, 400)
    assert (second.hit_ratio, second.overflow, second.expected_downtime) == (0.75, 1, 0.125)


def test_the_last_round_is_the_one_in_the_pause():
    seen = History()
    s = after_round(START, 10)
    seen.observe("round", s)
    seen.observe("status", s.with_(status="device"))
    seen.observe("paused", s.with_(status="device"))
    assert len(list(seen.rounds())) == 1
    seen.observe("status", after_round(s, 5).with_(status="completed", remaining=0))
    last = list(seen.rounds())[-1]
    assert last.paused
    assert not last.unfinished
    assert (last.number, last.wire_bytes, last.remaining) == (2, 5, 0)


def test_a_pause_that_was_given_up_is_forgotten():
    seen = History()
    s = after_round(START, 10)
    seen.observe("round", s)
    seen.observe("paused", s.with_(status="device"))
    assert seen.current.paused
    seen.observe("status", s.with_(status="setup"))
    assert seen.paused_at is None
    assert not seen.current.paused


def test_another_migration_begins_anew_and_a_resumed_one_does_not():
    seen = History()
    s = after_round(START, 10)
    seen.observe("round", s)
    seen.observe("status", s.with_(status="setup"))  # resumed
    assert (seen.migrations, len(seen.closed)) == (1, 1)
    seen.observe("status", START)
    assert (seen.migrations, len(seen.closed)) == (2, 0)
    seen.observe("status", START.with_(status="failed"))
    seen.observe("status", START)
    assert seen.migrations == 3


def test_samples_are_bounded_and_reach_to_the_end(monkeypatch):
    monkeypatch.setattr(history, "MAX_SAMPLES", 16)
    seen = History()
    for tick in range(4000):
        seen.observe("progress", START.with_(status="active", total_time=tick / 10, remaining=tick))
    times = [sample.time for sample in seen.samples]
    assert len(times) <= 17
    assert times[0] == 0.0
    assert times[-1] > 300
    assert times == sorted(times)


def test_notices_are_kept_and_bounded():
    seen = History()
    for number in range(300):
        seen.observe(f"notice: {number}", START)
    assert seen.notices[-1] == "299"
    assert len(seen.notices) <= 100


def test_records_add_up_in_all_that_is_counted():
    one = difference(START, after_round(START, 3))
    two = difference(after_round(START, 3), after_round(after_round(START, 3), 4))
    both = together(one, two)
    assert (both.first, both.number) == (1, 2)
    whole = difference(START, after_round(after_round(START, 3), 4))
    for name in SUMS:
        assert getattr(both, name) == getattr(whole, name)
    assert {field.name for field in fields(both)} >= set(SUMS)
