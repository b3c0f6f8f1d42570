"""When auto-converge slows a guest, how far, and that it never comes after the stall timeout."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import UsageError
from migrate.guests.duty_cycle import RUN_SECONDS, stopped_seconds
from migrate.policy.convergence import STALL_MARGIN
from migrate.policy.downtime import Limits
from migrate.policy.throttle import RoundLoad, ThrottleParameters, ThrottlePolicy

LIMITS = Limits(downtime_limit=0.3)
STUCK = RoundLoad(
    expected=2.0, seconds=1.0, sent_bytes=100.0, dirtied_bytes=100.0, dirtied_seconds=0.2
)


def steps(looks, throttle=None, limits=LIMITS):
    """The percentage after each look."""
    policy = ThrottlePolicy()
    return [policy.decide(throttle or ThrottleParameters(), limits, look) for look in looks]


# ---------------------------------------------------------------- the parameters


def test_defaults_match_qemu():
    assert ThrottleParameters() == ThrottleParameters(20, 10, 99, False, 50)


@pytest.mark.parametrize(
    ("values", "name", "range_"),
    [
        ({"cpu_throttle_initial": 0}, "cpu_throttle_initial", "1 to 99"),
        ({"cpu_throttle_initial": 100}, "cpu_throttle_initial", "1 to 99"),
        ({"cpu_throttle_increment": 0}, "cpu_throttle_increment", "1 to 99"),
        ({"max_cpu_throttle": 19}, "max_cpu_throttle", "cpu_throttle_initial to 99"),
        ({"max_cpu_throttle": 100}, "max_cpu_throttle", "cpu_throttle_initial to 99"),
        ({"throttle_trigger_threshold": 0}, "throttle_trigger_threshold", "1 to 100"),
        ({"throttle_trigger_threshold": 101}, "throttle_trigger_threshold", "1 to 100"),
    ],
)
def test_invalid_parameters_raise_qemu_messages(values, name, range_):
    with pytest.raises(UsageError) as caught:
        ThrottleParameters(**values)
    assert str(caught.value) == f"Parameter '{name}' expects an integer in the range of {range_}"


# ---------------------------------------------------------------- when


def test_step_after_every_two_bad_periods():
    assert steps([STUCK] * 7) == [0, 0, 20, 20, 30, 30, 40]


def test_percentage_ends_at_maximum():
    assert steps([STUCK] * 30, ThrottleParameters(50, 30, 90))[-1] == 90
    assert steps([STUCK] * 300)[-1] == 99


def test_converging_guest_is_not_slowed():
    falling = [RoundLoad(2.0 * 0.9**n, 1.0, 100.0, 100.0, 1.0) for n in range(20)]
    assert set(steps(falling)) == {0}
    short = RoundLoad(0.2, 1.0, 100.0, 100.0, 1.0)
    assert set(steps([short] * 20)) == {0}


def test_load_counts_cost_of_deltas_not_pages():
    """Many pages that cost next to nothing, in bytes and in time, are no reason."""
    cheap = RoundLoad(2.0, 1.0, 100.0, 50.0, 0.5)
    assert set(steps([cheap] * 20)) == {0}
    in_bytes = RoundLoad(2.0, 1.0, 100.0, 51.0, 0.0)
    assert steps([in_bytes] * 3)[-1] == 20
    in_time = RoundLoad(2.0, 1.0, 100.0, 0.0, 0.51)
    assert steps([in_time] * 3)[-1] == 20
    assert steps([cheap] * 3, ThrottleParameters(throttle_trigger_threshold=49))[-1] == 20


def test_good_period_resets_count():
    good = RoundLoad(1.0, 1.0, 100.0, 100.0, 0.2)
    assert steps([STUCK, STUCK, good, good, good]) == [0, 0, 0, 0, 20]


def test_short_rounds_form_one_period():
    short = RoundLoad(2.0, 0.1, 10.0, 10.0, 0.02)
    assert steps([short] * 29)[-1] == 0
    assert steps([short] * 33)[-1] == 20


def test_lower_maximum_applies_at_once():
    policy = ThrottlePolicy()
    for _ in range(9):
        policy.decide(ThrottleParameters(), LIMITS, STUCK)
    assert policy.percentage == 50
    assert policy.decide(ThrottleParameters(max_cpu_throttle=30), LIMITS, STUCK) == 30


@given(
    rounds=st.floats(0.001, 100), stall=st.floats(0.01, 1000),
    wobble=st.lists(st.floats(1 - STALL_MARGIN + 0.001, 1.5), min_size=1, max_size=20),
)  # fmt: skip
def test_step_comes_before_stall_timeout(rounds, stall, wobble):
    """The policy gives up after stall_timeout and 8 rounds without progress; each step restarts
    that time."""
    limits = Limits(downtime_limit=0.3, stall_timeout=stall)
    policy, since, count = ThrottlePolicy(), 0.0, 0
    policy.decide(ThrottleParameters(), limits, RoundLoad(2.0, rounds, 100.0, 100.0, rounds))
    while policy.percentage < 99:
        before = policy.percentage
        expected = 2.0 * wobble[count % len(wobble)]
        policy.decide(
            ThrottleParameters(), limits, RoundLoad(expected, rounds, 100.0, 100.0, rounds)
        )
        since, count = since + rounds, count + 1
        assert since < stall + 1e-6 or count < 8 or policy.percentage > before
        if policy.percentage > before:
            since, count = 0.0, 0


# ---------------------------------------------------------------- how far


def test_tailslow_steps_no_further_than_needed():
    """If the dirty rate is 60 % and may be 50 %, taking a sixth of its time is enough."""
    look = RoundLoad(2.0, 1.0, 100.0, 60.0, 0.0)
    gentle = ThrottleParameters(40, 30, cpu_throttle_tailslow=True)
    assert steps([look] * 5, gentle)[-1] == 50
    assert steps([look] * 5, ThrottleParameters(40, 30))[-1] == 70


@given(
    share=st.floats(50.1, 1e4), initial=st.integers(1, 99), increment=st.integers(1, 99),
    most=st.integers(1, 99), tailslow=st.booleans(), count=st.integers(1, 40),
)  # fmt: skip
def test_percentage_rises_within_range(share, initial, increment, most, tailslow, count):
    throttle = ThrottleParameters(min(initial, most), increment, most, tailslow)
    look = RoundLoad(2.0, 1.0, 100.0, share, 0.0)
    before = 0
    for percentage in steps([look] * count, throttle):
        assert before <= percentage <= most
        before = percentage


def test_duty_cycle_stops_for_percentage():
    for percentage in range(100):
        stopped = stopped_seconds(percentage)
        assert math.isclose(stopped / (stopped + RUN_SECONDS), percentage / 100, abs_tol=1e-9)


def test_guest_too_large_for_limit_is_not_slowed():
    """Its size is the obstacle: slowing it would only cost it time."""
    large, fits = replace(STUCK, idle_downtime=0.4), replace(STUCK, idle_downtime=0.2)
    assert steps([large] * 30) == [0] * 30
    assert steps([fits] * 3) == steps([STUCK] * 3) == [0, 0, 20]
    assert steps([large] * 10 + [fits] * 2)[-1] == 20, "from when it does fit"
