"""The simulation, on guests whose curves are known, and the two ways it is printed."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.policy.downtime import Limits
from migrate.policy.throttle import ThrottleParameters
from migrate.source.forecast import as_json, lines, simulate
from migrate.source.sample import Cost, Interval, Sample
from migrate.transport.probe import Way

MIB = 1 << 20
PAGES = 65536  # 256 MiB
WAY = Way(round_trip=0.0001, bandwidth=100 * MIB, probed=150 * MIB)


def guest(rate, hot=PAGES, page_bytes=4096.0, longest=100.0, scan=0.0, encode=1e-7):
    """One that writes `rate` new pages a second until all `hot` ones are written."""
    intervals = []
    full = hot / rate if rate else 1.0  # where the curve bends
    for seconds in sorted({0.001, 0.01, 0.1, 1.0, 10.0, longest, full}):
        pages = min(rate * seconds, hot)
        intervals.append(Interval(seconds, Cost(pages, pages * page_bytes, pages * encode)))
    first = Cost(PAGES, PAGES * 4096.0, PAGES * encode)
    return Sample(PAGES, 4096, first, tuple(intervals), scan_seconds=scan)


# ---------------------------------------------------------------- the rounds


def test_idle_guest_takes_one_round():
    found = simulate(guest(0), WAY, Limits())
    assert found.converges
    assert found.rounds == 2  # the last one, in the pause, is empty
    assert found.transferred == 256 * MIB
    assert found.total_time == pytest.approx(2.56, rel=0.02)
    assert found.downtime < 0.01


def test_rounds_shrink_by_ratio_of_writes_to_bandwidth():
    """A guest that writes half of it: 1 + 1/2 + 1/4 ... of its size go over the wire."""
    found = simulate(guest(25600 / 2), WAY, Limits(downtime_limit=0.03))
    assert found.converges
    assert found.transferred == pytest.approx(512 * MIB, rel=0.02)
    assert found.total_time == pytest.approx(5.12, rel=0.03)
    assert found.downtime <= 0.03


def test_guest_faster_than_link_does_not_converge():
    found = simulate(guest(50000, hot=32768), WAY, Limits())
    assert not found.converges
    assert "no progress" in found.reason
    assert "the guest writes 32768 pages" in found.reason
    assert "4.3 times less" in found.reason
    assert found.downtime == pytest.approx(1.28, rel=0.05)
    assert found.total_time > 30
    again = simulate(guest(50000, hot=32768), WAY, Limits(max_rounds=3))
    assert "--max-rounds" in again.reason
    assert again.rounds == 3


def test_guest_faster_than_link_converges_with_deltas():
    found = simulate(guest(50000, hot=32768, page_bytes=20.0), WAY, Limits())
    assert found.converges
    assert found.transferred < 260 * MIB


def test_bandwidth_is_minimum_of_measured_and_allowed():
    slow = simulate(guest(0), WAY, Limits(max_bandwidth=10 * MIB))
    assert slow.total_time == pytest.approx(25.6, rel=0.02)
    same = simulate(guest(0), WAY, Limits(max_bandwidth=1 << 40))
    assert same.total_time == pytest.approx(2.56, rel=0.02)


def test_scan_costs_time_in_each_round_and_in_pause():
    found = simulate(guest(1000, scan=0.2), WAY, Limits())
    assert found.converges
    assert found.downtime > 0.2
    stuck = simulate(guest(1000, scan=0.5), WAY, Limits())
    assert "finding what changed takes 500 ms" in stuck.reason


def test_encoder_may_be_the_bottleneck():
    found = simulate(guest(10**6, hot=32768, page_bytes=5.0, encode=1e-5), WAY, Limits())
    assert "bound by this machine's speed" in found.reason
    assert found.downtime > 0.3


def test_round_trips_lengthen_prediction():
    far = Way(0.2, 100 * MIB, MIB)
    found = simulate(guest(0), far, Limits())
    assert "round trips" in found.reason
    assert simulate(guest(0), far, Limits(downtime_limit=1)).downtime > 0.4


def test_auto_converge_slows_guest_until_it_converges():
    writes_much = guest(40000, hot=16384)
    assert not simulate(writes_much, WAY, Limits()).converges
    slowed = simulate(writes_much, WAY, Limits(), ThrottleParameters())
    assert slowed.converges
    assert 30 <= slowed.throttle <= 80
    assert simulate(guest(100), WAY, Limits(), ThrottleParameters()).throttle == 0


def test_simulation_without_limits_ends():
    found = simulate(guest(50000, hot=32768), WAY, Limits(stall_timeout=0))
    assert not found.converges
    assert "no end after" in found.reason


@given(
    rate=st.floats(0, 1e7), hot=st.integers(0, PAGES), page_bytes=st.floats(1, 5000),
    encode=st.floats(0, 1e-4), scan=st.floats(0, 2), bandwidth=st.floats(1e3, 1e11),
    trip=st.floats(0, 2), limit=st.floats(0, 10), slows=st.booleans(),
)  # fmt: skip
def test_every_simulation_ends_with_plausible_numbers(
    rate, hot, page_bytes, encode, scan, bandwidth, trip, limit, slows
):
    sample = guest(rate, hot, page_bytes, scan=scan, encode=encode)
    limits = Limits(downtime_limit=limit)
    found = simulate(
        sample, Way(trip, bandwidth, 1), limits, ThrottleParameters() if slows else None
    )
    assert found.rounds >= 1
    assert found.transferred >= 256 * MIB * 0.999
    assert found.total_time * bandwidth >= 256 * MIB * 0.99
    assert math.isfinite(found.total_time)
    assert found.converges is (found.reason == "")
    if found.converges:
        assert found.downtime <= limit


# ---------------------------------------------------------------- what is printed


def test_prediction_is_printed_like_info_migrate():
    sample = guest(25600 / 2)
    text = lines(simulate(sample, WAY, Limits()), sample, WAY, xbzrle=True).splitlines()
    assert text[:2] == ["dry run: nothing was moved", "Migration status: would complete"]
    labels = dict(line.split(": ", 1) for line in text)
    assert labels["predicted total time"].endswith(" milliseconds")
    assert labels["total ram"] == "262144 kbytes"
    assert labels["dirty in 100 milliseconds"] == "1280 pages"
    assert labels["measured throughput"] == "838.86 mbps"
    assert labels["xbzrle cache miss rate"] == "0.00"
    assert "xbzrle" not in lines(simulate(sample, WAY, Limits()), sample, WAY, xbzrle=False)


def test_failed_prediction_prints_reason():
    sample = guest(50000, hot=32768)
    found = simulate(sample, WAY, Limits())
    text = lines(found, sample, WAY, xbzrle=True).splitlines()
    assert text[1] == f"Migration status: would not converge ({found.reason})"


def test_json_has_names_of_query_migrate():
    sample = guest(25600 / 2)
    found = as_json(simulate(sample, WAY, Limits()), sample, WAY, xbzrle=True)
    assert json.loads(json.dumps(found)) == found
    assert found["dry-run"] is True
    assert found["status"] == "completed"
    assert {"total-time", "downtime", "ram", "measured"} <= found.keys()
    assert found["ram"]["total"] == 256 * MIB
    assert found["measured"]["dirty"][2] == {"time": 100, "pages": 1280, "bytes": 1280 * 4096}
    sample = guest(50000, hot=32768)
    stuck = as_json(
        simulate(sample, WAY, Limits(), ThrottleParameters(20, 1, 20)), sample, WAY, xbzrle=False
    )
    assert stuck["status"] == "failed"
    assert "no progress" in stuck["error-desc"]
    assert stuck["cpu-throttle-percentage"] == 20
    assert "expected-downtime" in stuck
    assert "xbzrle-cache" not in stuck["measured"]
