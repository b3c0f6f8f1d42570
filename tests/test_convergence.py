"""The policy: when a migration goes on, stops the guest, or gives up, naming the knob to turn."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.policy.advice import abort_reason
from migrate.policy.convergence import LARGE_SECONDS, STALL_ROUNDS, ConvergencePolicy, Verdict
from migrate.policy.downtime import FIXED_SECONDS, DowntimeModel, Limits, PendingWork, RoundCost

RAW = RoundCost(100_000, 100_000 * 4096, 4.0, 0.1, 0.1)
NOTHING = PendingWork(0, 0)
MUCH = PendingWork(100_000, 0)


def model_of(*rounds: RoundCost) -> DowntimeModel:
    model = DowntimeModel()
    for measured in rounds:
        model.learn(measured)
    return model


def stuck(limits: Limits) -> ConvergencePolicy:
    """A policy over a link where MUCH takes four seconds."""
    return ConvergencePolicy(limits, model_of(RAW))


# ---------------------------------------------------------------- the verdicts


def test_stop_and_copy_within_limit_once_prediction_stops_falling():
    policy = stuck(Limits(downtime_limit=0.3))
    assert policy.decide(1, 1.0, PendingWork(5000, 0)).verdict is Verdict.CONTINUE
    assert policy.decide(2, 1.2, PendingWork(3000, 0)).verdict is Verdict.CONTINUE
    decision = policy.decide(3, 1.3, PendingWork(2900, 0))
    assert decision.verdict is Verdict.STOP_AND_COPY
    assert 0.1 < decision.expected_downtime <= 0.3
    assert decision.abort is None


@pytest.mark.parametrize(
    ("limits", "pending"),
    [
        pytest.param(Limits(), PendingWork(100, 0), id="short already"),
        pytest.param(Limits(), PendingWork(2000, 0, 0.15), id="it is mostly the scan"),
        pytest.param(Limits(), PendingWork(10, 0, check_seconds=0.15), id="it is the look"),
        pytest.param(Limits(max_rounds=1), PendingWork(5000, 0), id="the last round allowed"),
        pytest.param(Limits(timeout=1.2), PendingWork(5000, 0), id="no time left for a round"),
    ],
)
def test_stop_and_copy_at_once_if_another_round_cannot_help(limits, pending):
    assert stuck(limits).decide(1, 1.0, pending).verdict is Verdict.STOP_AND_COPY


def test_prediction_that_rises_over_limit_continues():
    policy = stuck(Limits(downtime_limit=0.3))
    assert policy.decide(1, 1.0, PendingWork(5000, 0)).verdict is Verdict.CONTINUE
    assert policy.decide(2, 1.2, MUCH).verdict is Verdict.CONTINUE
    assert policy.decide(3, 5.0, PendingWork(5000, 0)).verdict is Verdict.STOP_AND_COPY


def test_writer_check_counts_only_if_longer_than_last_round():
    model = model_of(RAW)
    rest = model.predict(PendingWork(5000, 0), Limits())
    assert model.predict(PendingWork(5000, 0, check_seconds=0.1), Limits()) == rest
    longer = model.predict(PendingWork(5000, 0, check_seconds=1.0), Limits())
    assert longer == pytest.approx(1.0 + FIXED_SECONDS)


def test_continue_while_prediction_is_over_limit():
    decision = stuck(Limits(downtime_limit=0.3)).decide(1, 1.0, MUCH)
    assert decision.verdict is Verdict.CONTINUE
    assert decision.expected_downtime == pytest.approx(4.0, rel=0.01)


def test_without_limits_rounds_never_end():
    policy = stuck(Limits(stall_timeout=0))
    for number in range(1, 1000):
        assert policy.decide(number, number * 100.0, MUCH).verdict is Verdict.CONTINUE


def test_abort_at_max_rounds_names_option():
    policy = stuck(Limits(max_rounds=3))
    assert policy.decide(1, 1, MUCH).verdict is Verdict.CONTINUE
    assert policy.decide(2, 2, MUCH).verdict is Verdict.CONTINUE
    decision = policy.decide(3, 3, MUCH)
    assert decision.verdict is Verdict.ABORT
    words, _ = abort_reason(policy, decision.abort, MUCH)
    assert "3 rounds (--max-rounds)" in words


def test_abort_at_timeout_names_option():
    policy = stuck(Limits(timeout=60))
    assert policy.decide(1, 59.9, MUCH).verdict is Verdict.CONTINUE
    decision = policy.decide(2, 60.0, MUCH)
    assert decision.verdict is Verdict.ABORT
    words, _ = abort_reason(policy, decision.abort, MUCH)
    assert "60 s (--timeout)" in words


def test_stop_and_copy_wins_over_reached_limits():
    limits = Limits(max_rounds=1, timeout=1, stall_timeout=1)
    assert stuck(limits).decide(100, 1000, NOTHING).verdict is Verdict.STOP_AND_COPY


def test_stall_needs_time_and_rounds_without_progress():
    policy = stuck(Limits(stall_timeout=30))
    assert policy.decide(1, 0, MUCH).verdict is Verdict.CONTINUE
    assert policy.decide(2, 100, MUCH).verdict is Verdict.CONTINUE, "one long round is no stall"
    for number in range(3, 1 + STALL_ROUNDS):
        assert policy.decide(number, 100, MUCH).verdict is Verdict.CONTINUE
    decision = policy.decide(1 + STALL_ROUNDS, 101, MUCH)
    assert decision.verdict is Verdict.ABORT
    words, _ = abort_reason(policy, decision.abort, MUCH)
    assert f"no progress for 101 s and {STALL_ROUNDS} rounds" in words
    assert "--downtime-limit" in words

    quick = stuck(Limits(stall_timeout=30))
    for number in range(1, 500):
        assert quick.decide(number, number * 0.05, MUCH).verdict is Verdict.CONTINUE


def test_slow_progress_postpones_stall():
    policy = stuck(Limits(stall_timeout=30, downtime_limit=0.001))
    pages = 100_000
    for number in range(1, 100):
        pages = int(pages * 0.95)
        decision = policy.decide(number, number * 10.0, PendingWork(pages, 0))
        assert decision.verdict is Verdict.CONTINUE


def test_noise_counts_as_stall():
    policy = stuck(Limits(stall_timeout=30))
    verdicts = {
        policy.decide(n, n * 5.0, PendingWork(100_000 - 100 * (n % 20), 0)).verdict
        for n in range(1, 30)
    }
    assert Verdict.ABORT in verdicts


# ---------------------------------------------------------------- the advice


def reason(model: DowntimeModel, pending: PendingWork, **limits) -> str:
    policy = ConvergencePolicy(Limits(max_rounds=1, **limits), model)
    decision = policy.decide(1, 10.0, pending)
    return abort_reason(policy, decision.abort, pending)[0]


def test_abort_reason_gives_prediction_and_limit():
    text = reason(model_of(RAW), MUCH, downtime_limit=0.05)
    assert "would be stopped for 4004 ms, the limit is 50 ms" in text


# ---------------------------------------------------------------- the prediction


def test_prediction_counts_delta_bytes_not_page_bytes():
    """QEMU's trap: 4096 bytes for each pending page over the bandwidth that small deltas reach.

    200 000 pages rewritten per round, 20 bytes each, in 0.2 s: 20 MB/s were measured, and pages
    taken for 4096 bytes would say 41 s.
    """
    deltas = RoundCost(200_000, 200_000 * 20, 0.2, 0.15, 0.1)
    model = model_of(RoundCost(262_144, 262_144 * 4096, 2.0, 0.3, 0.3), deltas, deltas, deltas)
    expected = model.predict(PendingWork(200_000, 0), Limits())
    assert 0.1 < expected < 0.3
    policy = ConvergencePolicy(Limits(), model)
    policy.decide(4, 9.0, PendingWork(200_000, 0))
    assert policy.decide(5, 9.2, PendingWork(200_000, 0)).verdict is Verdict.STOP_AND_COPY


def test_second_round_replaces_cost_of_first():
    deltas = RoundCost(1000, 1000 * 20, 0.1, 0.001, 0.001)
    assert model_of(RAW, deltas).bytes_per_page == 20
    assert model_of(RAW, deltas).encode_per_page == pytest.approx(1e-6)


def test_short_round_leaves_page_cost_unchanged():
    deltas = RoundCost(1000, 1000 * 20, 0.1, 0.001, 0.001)
    model = model_of(RAW, deltas)
    model.learn(RoundCost(3, 3 * 4096, 0.5, 0.4, 0.4))
    model.learn(RoundCost(0, 16, 0.5, 0.4, 0.4))
    assert model.bytes_per_page == 20
    assert model.encode_per_page == pytest.approx(1e-6)


def test_prediction_respects_max_bandwidth():
    model = model_of(RAW)
    free = model.predict(MUCH, Limits())
    assert model.predict(MUCH, Limits(max_bandwidth=RAW.wire_bytes // 40)) == pytest.approx(
        40, rel=0.01
    )
    assert model.predict(MUCH, Limits(max_bandwidth=1 << 50)) == free


def test_prediction_contains_every_part_of_pause():
    model = model_of(RAW)
    base = model.predict(NOTHING, Limits())
    assert base == FIXED_SECONDS
    model.round_trip = 0.1
    assert model.predict(NOTHING, Limits()) == pytest.approx(base + 0.2)
    assert model.predict(PendingWork(0, 0, 0.5), Limits()) >= base + 0.5
    model.learn_digest(1000, 1.0, peer=True)
    model.learn_digest(1000, 0.5, peer=False)
    assert model.predict(PendingWork(0, 1000), Limits()) >= base + 1.0
    model.learn_digest(2, 2.0, peer=True)
    assert model.peer_digest == 0.001, "two pages say little"


counts = st.integers(0, 1 << 32)
times = st.floats(0, 1e6)
rounds = st.lists(st.builds(RoundCost, counts, st.integers(0, 1 << 44), times, times, times))
limits = st.builds(Limits, max_bandwidth=st.integers(0, 1 << 40))


@settings(deadline=None)
@given(rounds, limits, counts, counts, counts, times)
def test_prediction_is_finite_and_grows_with_pending_work(learnt, limits, pages, more, stale, scan):
    model = model_of(*learnt)
    less = model.predict(PendingWork(pages, stale, scan), limits)
    most = model.predict(PendingWork(pages + more, stale, scan), limits)
    assert math.isfinite(less)
    assert math.isfinite(most)
    assert FIXED_SECONDS <= less <= most
    assert less <= model.predict(PendingWork(pages, stale + more, scan), limits)


@settings(deadline=None)
@given(rounds, st.builds(PendingWork, counts, counts, times), st.integers(1, 100), times)
def test_every_decision_has_readable_reason(learnt, pending, number, elapsed):
    policy = ConvergencePolicy(Limits(max_rounds=1), model_of(*learnt))
    decision = policy.decide(number, elapsed, pending)
    assert decision.verdict is not Verdict.CONTINUE
    assert (decision.verdict is Verdict.ABORT) == (decision.abort is not None)
    if decision.abort is not None:
        text, _ = abort_reason(policy, decision.abort, pending)
        assert "nan" not in text
        assert "--" in text


# ---------------------------------------------------------------- what grows with the guest

LARGE = PendingWork(0, 0, scan_seconds=0.4, whole_seconds=0.2)


def test_without_stopped_guest_only_written_pages_count():
    model = DowntimeModel()
    model.round_trip = 1.0
    model.learn(RoundCost(1000, 1000 * 4096, 1.0, 0.001, 0.001))
    pending = PendingWork(0, 0, scan_seconds=5, whole_seconds=5, check_seconds=5, stops_guest=False)
    assert model.overhead(pending) == model.predict(pending, Limits()) == pending.size_seconds == 0
    written = replace(pending, pages=1000)
    assert model.predict(written, Limits()) == pytest.approx(1.0)
    policy = ConvergencePolicy(Limits(), model)
    assert policy.decide(2, 2.0, pending).verdict is Verdict.STOP_AND_COPY


def test_prediction_contains_cost_of_guest_size():
    model = model_of(RAW)
    base = model.predict(NOTHING, Limits())
    assert LARGE.size_seconds == pytest.approx(0.6)
    assert model.predict(LARGE, Limits()) == pytest.approx(base + 0.6)
    assert model.overhead(LARGE) == pytest.approx(model.overhead(NOTHING) + 0.6)


def test_abort_soon_if_guest_size_exceeds_limit():
    policy = ConvergencePolicy(Limits(), model_of(RAW))
    assert policy.decide(1, 1.0, LARGE).verdict is Verdict.CONTINUE, "others may have been busy"
    assert policy.decide(2, 1.7, LARGE).verdict is Verdict.CONTINUE
    decision = policy.decide(3, 1.0 + LARGE_SECONDS, LARGE)
    assert decision.verdict is Verdict.ABORT
    assert not decision.slower_helps
    words, _ = abort_reason(policy, decision.abort, LARGE)
    assert "too large for --downtime-limit, whatever it writes" in words
    assert "finding what changed takes 400 ms" in words
    assert "checking the whole takes 200 ms" in words


def test_size_within_limit_in_between_resets_count():
    policy = ConvergencePolicy(Limits(), model_of(RAW))
    for number in range(1, 20):
        pending = LARGE if number % 2 else MUCH
        assert policy.decide(number, number * LARGE_SECONDS / 2, pending).verdict is not (
            Verdict.ABORT
        )


@pytest.mark.parametrize(
    ("limits", "pending"),
    [
        pytest.param(Limits(stall_timeout=0), LARGE, id="nothing is to end it"),
        pytest.param(Limits(downtime_limit=0), PendingWork(100, 0, 0.01, 0.0, 0.01), id="noise"),
        pytest.param(Limits(), MUCH, id="it writes too much"),
    ],
)
def test_guest_size_alone_is_no_reason_to_abort(limits, pending):
    policy = stuck(limits)
    for number in range(1, 20):
        assert policy.decide(number, float(number), pending).verdict is Verdict.CONTINUE


def test_slower_helps_only_if_idle_guest_would_fit():
    limits = Limits(max_rounds=1)
    for pending, helps in (
        (MUCH, True), (LARGE, False), (PendingWork(100_000, 0, 0.2), True),
        (PendingWork(100_000, 0, 0.3), False), (PendingWork(100_000, 0, 0.2, 0.0, 0.1), False),
    ):  # fmt: skip
        decision = stuck(limits).decide(1, 1.0, pending)
        assert (decision.verdict, decision.slower_helps) == (Verdict.ABORT, helps)
