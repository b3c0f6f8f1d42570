"""Rounds are differences of snapshots: whatever was counted, the sums are the totals."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.events import Notice, SourceEvent
from migrate.statistics import Statistics, Status
from migrate.views import history
from migrate.views.history import SUMS, History, difference, merge

START = Statistics(status=Status.SETUP, total=1 << 20)
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
    return grown(s, by, status=Status.ACTIVE, dirty_sync_count=s.dirty_sync_count + rounds)


events = st.sampled_from([SourceEvent.ROUND_DONE, SourceEvent.PROGRESS, Notice("x"), "broken"])
steps = st.lists(st.tuples(events, count), max_size=60)


@given(
    steps, st.sampled_from([Status.COMPLETED, Status.FAILED, Status.CANCELLED]), st.integers(2, 8)
)
def test_round_sums_equal_totals(steps, status, most):
    """However many rounds there are, and wherever a connection broke in one."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MAX_ROUNDS", "HEAD_ROUNDS", "RECENT_ROUNDS"):
            patch.setattr(history, name, most)
        seen, s = History(), START
        seen.observe(SourceEvent.STATUS, s)
        for event, by in steps:
            s = (
                after_round(s, by)
                if event is SourceEvent.ROUND_DONE
                else grown(s, by, status=Status.ACTIVE)
            )
            if event == "broken":  # its number is not used again
                s = s.with_(status=Status.SETUP)
            seen.observe(SourceEvent.STATUS if event == "broken" else event, s)
        s = grown(s, 1, status=status)
        seen.observe(SourceEvent.STATUS, s)
    rounds = list(seen.rounds())
    for name, total in TOTALS.items():
        assert sum(getattr(r, name) for r in rounds) == getattr(s, total), name
    assert abs(sum(r.seconds for r in rounds) - s.total_time) < 1e-6
    assert [r.first for r in rounds[1:]] == [r.number + 1 for r in rounds[:-1]]
    assert len(seen.closed) <= 3 * most + 1
    assert rounds[-1].unfinished


def test_memory_is_bounded_over_many_rounds():
    seen, s = History(), START
    for _ in range(20_000):
        s = after_round(s, 1)
        seen.observe(SourceEvent.ROUND_DONE, s)
    records = seen.closed
    assert len(records) <= history.HEAD_ROUNDS + history.MAX_ROUNDS + history.RECENT_ROUNDS
    assert sum(r.normal for r in records) == 20_000
    assert records[0].count == records[-1].count == 1
    spans = [r.count for r in records[history.HEAD_ROUNDS : -history.RECENT_ROUNDS]]
    assert max(spans) == 64
    assert min(spans[:-1]) == 64


def test_round_record():
    seen = History()
    s = START.with_(page_size=4096, setup_time=0.1)
    seen.observe(SourceEvent.STATUS, s)
    one = s.with_(
        status=Status.ACTIVE, total_time=1.1, transferred=5000, duplicate=1, normal=2, skipped=3,
        remaining=8192, dirty_pages_rate=10.0, expected_downtime=0.25, cache_size=65536,
        dirty_sync_count=1,
    )  # fmt: skip
    seen.observe(SourceEvent.ROUND_DONE, one)
    seen.observe(SourceEvent.ROUND_DONE, one.with_(
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


def test_last_round_is_the_paused_one():
    seen = History()
    s = after_round(START, 10)
    seen.observe(SourceEvent.ROUND_DONE, s)
    seen.observe(SourceEvent.STATUS, s.with_(status=Status.DEVICE))
    seen.observe(SourceEvent.PAUSED, s.with_(status=Status.DEVICE))
    assert len(list(seen.rounds())) == 1
    seen.observe(SourceEvent.STATUS, after_round(s, 5).with_(status=Status.COMPLETED, remaining=0))
    last = list(seen.rounds())[-1]
    assert last.paused
    assert not last.unfinished
    assert (last.number, last.wire_bytes, last.remaining) == (2, 5, 0)


def test_abandoned_pause_is_forgotten():
    seen = History()
    s = after_round(START, 10)
    seen.observe(SourceEvent.ROUND_DONE, s)
    seen.observe(SourceEvent.PAUSED, s.with_(status=Status.DEVICE))
    assert seen.current.paused
    seen.observe(SourceEvent.STATUS, s.with_(status=Status.SETUP))
    assert seen.paused_at is None
    assert not seen.current.paused


def test_new_migration_starts_a_new_history():
    seen = History()
    s = after_round(START, 10)
    seen.observe(SourceEvent.ROUND_DONE, s)
    seen.observe(SourceEvent.STATUS, s.with_(status=Status.SETUP))  # resumed
    assert (seen.migrations, len(seen.closed)) == (1, 1)
    seen.observe(SourceEvent.STATUS, START)
    assert (seen.migrations, len(seen.closed)) == (2, 0)
    seen.observe(SourceEvent.STATUS, START.with_(status=Status.FAILED))
    seen.observe(SourceEvent.STATUS, START)
    assert seen.migrations == 3


def test_samples_are_bounded(monkeypatch):
    monkeypatch.setattr(history, "MAX_SAMPLES", 16)
    seen = History()
    for tick in range(4000):
        seen.observe(
            SourceEvent.PROGRESS,
            START.with_(status=Status.ACTIVE, total_time=tick / 10, remaining=tick),
        )
    times = [sample.time for sample in seen.samples]
    assert len(times) <= 17
    assert times[0] == 0.0
    assert times[-1] > 300
    assert times == sorted(times)


def test_notices_are_bounded():
    seen = History()
    for number in range(300):
        seen.observe(Notice(f"{number}"), START)
    assert seen.notices[-1] == "299"
    assert len(seen.notices) <= 100


def test_merged_records_add_up():
    one = difference(START, after_round(START, 3))
    two = difference(after_round(START, 3), after_round(after_round(START, 3), 4))
    both = merge(one, two)
    assert (both.first, both.number) == (1, 2)
    whole = difference(START, after_round(after_round(START, 3), 4))
    for name in SUMS:
        assert getattr(both, name) == getattr(whole, name)
    assert {field.name for field in fields(both)} >= set(SUMS)
