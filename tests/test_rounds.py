"""The policy: when a migration goes on, stops the guest, or gives up, naming the knob to turn."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.rounds import (
    FIXED_SECONDS,
    LARGE_SECONDS,
    STALL_ROUNDS,
    DowntimeModel,
    Limits,
    Measured,
    Pending,
    Policy,
    Verdict,
)

RAW = Measured(100_000, 100_000 * 4096, 4.0, 0.1, 0.1)
NOTHING = Pending(0, 0)
MUCH = Pending(100_000, 0)


def model_of(*rounds: Measured) -> DowntimeModel:
    model = DowntimeModel()
    for measured in rounds:
        model.learn(measured)
    return model


def stuck(limits: Limits) -> Policy:
    """A policy over a link where MUCH takes four seconds."""
    return Policy(limits, model_of(RAW))


# ---------------------------------------------------------------- the verdicts


def test_it_stops_the_guest_when_the_rest_fits_the_limit_and_falls_no_more():
    policy = stuck(Limits(downtime_limit=0.3))
    assert policy.decide(1, 1.0, Pending(5000, 0)).verdict is Verdict.CONTINUE
    assert policy.decide(2, 1.2, Pending(3000, 0)).verdict is Verdict.CONTINUE
    decision = policy.decide(3, 1.3, Pending(2900, 0))
    assert decision.verdict is Verdict.STOP_AND_COPY
    assert 0.1 < decision.expected_downtime <= 0.3
    assert decision.reason == ""


@pytest.mark.parametrize(
    ("limits", "pending"),
    [
        pytest.param(Limits(), Pending(100, 0), id="short already"),
        pytest.param(Limits(), Pending(2000, 0, 0.15), id="it is mostly the scan"),
        pytest.param(Limits(), Pending(10, 0, check_seconds=0.15), id="it is the look"),
        pytest.param(Limits(max_rounds=1), Pending(5000, 0), id="the last round allowed"),
        pytest.param(Limits(timeout=1.2), Pending(5000, 0), id="no time left for a round"),
    ],
)
def test_a_pause_that_fits_is_not_put_off_where_that_cannot_help(limits, pending):
    assert stuck(limits).decide(1, 1.0, pending).verdict is Verdict.STOP_AND_COPY


def test_a_pause_that_fitted_and_no_longer_does_is_waited_for_again():
    policy = stuck(Limits(downtime_limit=0.3))
    assert policy.decide(1, 1.0, Pending(5000, 0)).verdict is Verdict.CONTINUE
    assert policy.decide(2, 1.2, MUCH).verdict is Verdict.CONTINUE
    assert policy.decide(3, 5.0, Pending(5000, 0)).verdict is Verdict.STOP_AND_COPY


def test_what_is_looked_at_beside_the_last_round_counts_where_it_takes_longer():
    model = model_of(RAW)
    rest = model.predict(Pending(5000, 0), Limits())
    assert model.predict(Pending(5000, 0, check_seconds=0.1), Limits()) == rest
    longer = model.predict(Pending(5000, 0, check_seconds=1.0), Limits())
    assert longer == pytest.approx(1.0 + FIXED_SECONDS)


def test_it_goes_on_while_the_rest_is_too_much():
    decision = stuck(Limits(downtime_limit=0.3)).decide(1, 1.0, MUCH)
    assert decision.verdict is Verdict.CONTINUE
    assert decision.expected_downtime == pytest.approx(4.0, rel=0.01)


def test_without_a_limit_that_can_end_it_it_goes_on_for_ever():
    policy = stuck(Limits(stall_timeout=0))
    for number in range(1, 1000):
        assert policy.decide(number, number * 100.0, MUCH).verdict is Verdict.CONTINUE


def test_max_rounds_gives_up_and_names_the_option():
    policy = stuck(Limits(max_rounds=3))
    assert policy.decide(1, 1, MUCH).verdict is Verdict.CONTINUE
    assert policy.decide(2, 2, MUCH).verdict is Verdict.CONTINUE
    decision = policy.decide(3, 3, MUCH)
    assert decision.verdict is Verdict.ABORT
    assert "3 rounds (--max-rounds)" in decision.reason


def test_timeout_gives_up_and_names_the_option():
    policy = stuck(Limits(timeout=60))
    assert policy.decide(1, 59.9, MUCH).verdict is Verdict.CONTINUE
    decision = policy.decide(2, 60.0, MUCH)
    assert decision.verdict is Verdict.ABORT
    assert "60 s (--timeout)" in decision.reason


def test_a_round_that_makes_it_in_time_wins_over_every_limit():
    limits = Limits(max_rounds=1, timeout=1, stall_timeout=1)
    assert stuck(limits).decide(100, 1000, NOTHING).verdict is Verdict.STOP_AND_COPY


def test_a_stall_needs_both_time_and_rounds_without_progress():
    policy = stuck(Limits(stall_timeout=30))
    assert policy.decide(1, 0, MUCH).verdict is Verdict.CONTINUE
    assert policy.decide(2, 100, MUCH).verdict is Verdict.CONTINUE, "one long round is no stall"
    for number in range(3, 1 + STALL_ROUNDS):
        assert policy.decide(number, 100, MUCH).verdict is Verdict.CONTINUE
    decision = policy.decide(1 + STALL_ROUNDS, 101, MUCH)
    assert decision.verdict is Verdict.ABORT
    assert f"no progress for 101 s and {STALL_ROUNDS} rounds" in decision.reason
    assert "--downtime-limit" in decision.reason

    quick = stuck(Limits(stall_timeout=30))
    for number in range(1, 500):
        assert quick.decide(number, number * 0.05, MUCH).verdict is Verdict.CONTINUE


def test_progress_of_any_kind_postpones_the_stall():
    policy = stuck(Limits(stall_timeout=30, downtime_limit=0.001))
    pages = 100_000
    for number in range(1, 100):
        pages = int(pages * 0.95)
        decision = policy.decide(number, number * 10.0, Pending(pages, 0))
        assert decision.verdict is Verdict.CONTINUE


def test_noise_is_no_progress():
    policy = stuck(Limits(stall_timeout=30))
    verdicts = {
        policy.decide(n, n * 5.0, Pending(100_000 - 100 * (n % 20), 0)).verdict
        for n in range(1, 30)
    }
    assert Verdict.ABORT in verdicts


# ---------------------------------------------------------------- the advice


def reason(model: DowntimeModel, pending: Pending, **limits) -> str:
    decision = Policy(Limits(max_rounds=1, **limits), model).decide(1, 10.0, pending)
    assert decision.verdict is Verdict.ABORT
    return decision.reason


def test_the_reason_tells_what_was_expected_and_what_was_allowed():
    text = reason(model_of(RAW), MUCH, downtime_limit=0.05)
    assert "would be stopped for 4004 ms, the limit is 50 ms" in text


# ---------------------------------------------------------------- the prediction


def test_deltas_count():
    """QEMU's trap: 4096 bytes for each pending page over the bandwidth that small deltas reach.

    200 000 pages rewritten per round, 20 bytes each, in 0.2 s: 20 MB/s were measured, and pages
    taken for 4096 bytes would say 41 s.
    """
    deltas = Measured(200_000, 200_000 * 20, 0.2, 0.15, 0.1)
    model = model_of(Measured(262_144, 262_144 * 4096, 2.0, 0.3, 0.3), deltas, deltas, deltas)
    expected = model.predict(Pending(200_000, 0), Limits())
    assert 0.1 < expected < 0.3
    policy = Policy(Limits(), model)
    policy.decide(4, 9.0, Pending(200_000, 0))
    assert policy.decide(5, 9.2, Pending(200_000, 0)).verdict is Verdict.STOP_AND_COPY


def test_the_first_round_does_not_colour_what_follows():
    deltas = Measured(1000, 1000 * 20, 0.1, 0.001, 0.001)
    assert model_of(RAW, deltas).bytes_per_page == 20
    assert model_of(RAW, deltas).encode_per_page == pytest.approx(1e-6)


def test_a_round_of_a_few_pages_teaches_nothing_about_the_cost_of_a_page():
    deltas = Measured(1000, 1000 * 20, 0.1, 0.001, 0.001)
    model = model_of(RAW, deltas)
    model.learn(Measured(3, 3 * 4096, 0.5, 0.4, 0.4))
    model.learn(Measured(0, 16, 0.5, 0.4, 0.4))
    assert model.bytes_per_page == 20
    assert model.encode_per_page == pytest.approx(1e-6)


def test_the_prediction_is_within_the_given_bandwidth():
    model = model_of(RAW)
    free = model.predict(MUCH, Limits())
    assert model.predict(MUCH, Limits(max_bandwidth=RAW.wire_bytes // 40)) == pytest.approx(
        40, rel=0.01
    )
    assert model.predict(MUCH, Limits(max_bandwidth=1 << 50)) == free


def test_every_part_of_the_pause_is_in_the_prediction():
    model = model_of(RAW)
    base = model.predict(NOTHING, Limits())
    assert base == FIXED_SECONDS
    model.round_trip = 0.1
    assert model.predict(NOTHING, Limits()) == pytest.approx(base + 0.2)
    assert model.predict(Pending(0, 0, 0.5), Limits()) >= base + 0.5
    model.learn_digest(1000, 1.0, peer=True)
    model.learn_digest(1000, 0.5, peer=False)
    assert model.predict(Pending(0, 1000), Limits()) >= base + 1.0
    model.learn_digest(2, 2.0, peer=True)
    assert model.peer_digest == 0.001, "two pages say little"


counts = st.integers(0, 1 << 32)
times = st.floats(0, 1e6)
rounds = st.lists(st.builds(Measured, counts, st.integers(0, 1 << 44), times, times, times))
limits = st.builds(Limits, max_bandwidth=st.integers(0, 1 << 40))


@settings(deadline=None)
@given(rounds, limits, counts, counts, counts, times)
def test_prediction_is_finite_and_grows_with_what_is_left(learnt, limits, pages, more, stale, scan):
    model = model_of(*learnt)
    less = model.predict(Pending(pages, stale, scan), limits)
    most = model.predict(Pending(pages + more, stale, scan), limits)
    assert math.isfinite(less)
    assert math.isfinite(most)
    assert FIXED_SECONDS <= less <= most
    assert less <= model.predict(Pending(pages, stale + more, scan), limits)


@settings(deadline=None)
@given(rounds, st.builds(Pending, counts, counts, times), st.integers(1, 100), times)
def test_whatever_was_measured_a_decision_reads_well(learnt, pending, number, elapsed):
    decision = Policy(Limits(max_rounds=1), model_of(*learnt)).decide(number, elapsed, pending)
    assert decision.verdict is not Verdict.CONTINUE
    assert "nan" not in decision.reason
    assert (decision.verdict is Verdict.ABORT) == ("--" in decision.reason)


# ---------------------------------------------------------------- what grows with the guest

LARGE = Pending(0, 0, scan_seconds=0.4, whole_seconds=0.2)


def test_where_nobody_is_stopped_only_what_is_written_counts():
    model = DowntimeModel()
    model.round_trip = 1.0
    model.learn(Measured(1000, 1000 * 4096, 1.0, 0.001, 0.001))
    pending = Pending(0, 0, scan_seconds=5, whole_seconds=5, check_seconds=5, stopped=False)
    assert model.overhead(pending) == model.predict(pending, Limits()) == pending.size_seconds == 0
    written = replace(pending, pages=1000)
    assert model.predict(written, Limits()) == pytest.approx(1.0)
    policy = Policy(Limits(), model)
    assert policy.decide(2, 2.0, pending).verdict is Verdict.STOP_AND_COPY


def test_the_size_of_the_guest_is_in_the_prediction():
    model = model_of(RAW)
    base = model.predict(NOTHING, Limits())
    assert LARGE.size_seconds == pytest.approx(0.6)
    assert model.predict(LARGE, Limits()) == pytest.approx(base + 0.6)
    assert model.overhead(LARGE) == pytest.approx(model.overhead(NOTHING) + 0.6)


def test_a_guest_that_is_too_large_for_the_limit_is_given_up_soon():
    policy = Policy(Limits(), model_of(RAW))
    assert policy.decide(1, 1.0, LARGE).verdict is Verdict.CONTINUE, "others may have been busy"
    assert policy.decide(2, 1.7, LARGE).verdict is Verdict.CONTINUE
    decision = policy.decide(3, 1.0 + LARGE_SECONDS, LARGE)
    assert decision.verdict is Verdict.ABORT
    assert not decision.slower_helps
    assert "too large for --downtime-limit, whatever it writes" in decision.reason
    assert "finding what changed takes 400 ms" in decision.reason
    assert "checking the whole takes 200 ms" in decision.reason


def test_a_size_that_fitted_in_between_is_not_given_up():
    policy = Policy(Limits(), model_of(RAW))
    for number in range(1, 20):
        pending = LARGE if number % 2 else MUCH
        assert policy.decide(number, number * LARGE_SECONDS / 2, pending).verdict is not (
            Verdict.ABORT
        )


@pytest.mark.parametrize(
    ("limits", "pending"),
    [
        pytest.param(Limits(stall_timeout=0), LARGE, id="nothing is to end it"),
        pytest.param(Limits(downtime_limit=0), Pending(100, 0, 0.01, 0.0, 0.01), id="noise"),
        pytest.param(Limits(), MUCH, id="it writes too much"),
    ],
)
def test_size_is_no_reason_where(limits, pending):
    policy = stuck(limits)
    for number in range(1, 20):
        assert policy.decide(number, float(number), pending).verdict is Verdict.CONTINUE


def test_slowing_helps_where_the_guest_would_fit_if_it_wrote_nothing():
    limits = Limits(max_rounds=1)
    for pending, helps in (
        (MUCH, True), (LARGE, False), (Pending(100_000, 0, 0.2), True),
        (Pending(100_000, 0, 0.3), False), (Pending(100_000, 0, 0.2, 0.0, 0.1), False),
    ):  # fmt: skip
        decision = stuck(limits).decide(1, 1.0, pending)
        assert (decision.verdict, decision.slower_helps) == (Verdict.ABORT, helps)
