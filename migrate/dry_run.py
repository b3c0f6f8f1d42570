"""A dry run: what a migration would take, without moving anything.

    Way (probe.py)      round trip, bandwidth   \\
    Sample (sample.py)  pages, bytes and work    +--> simulate --> Prediction: time, bytes, rounds,
    Limits, Throttle    what the user has set   /                  downtime, or why it never ends

The rounds are simulated with the model and the policies that decide in a real migration
(rounds.py, throttle.py); all they are given here is a guest that writes as the sample did, and a
destination that is as fast as this machine. `simulate` knows no clocks and no sockets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from migrate.probe import Way
from migrate.rounds import DowntimeModel, Limits, Measured, Pending, Policy, Verdict
from migrate.sample import Sample
from migrate.throttle import Look, Throttle, ThrottlePolicy

KIB = 1024
# HELLO, GUEST, CACHE_SIZE and the PINGs, in round trips; and what starts beside them.
SETUP_TRIPS = 6
SETUP_SECONDS = 0.02
# The end of a round and its ack, beside a round trip.
ROUND_SECONDS = 0.001
MOST_ROUNDS = 100_000


@dataclass(frozen=True)
class Prediction:
    """How a migration would go. Times in seconds, sizes in bytes.

    reason   -- why it would not converge; "" where it would
    downtime -- of the pause; where it would not converge, what it would be then
    """

    reason: str
    total_time: float
    transferred: float
    rounds: int
    downtime: float
    throttle: int = 0

    @property
    def converges(self) -> bool:
        return not self.reason


class _Migration:
    """The state of a simulated one."""

    def __init__(self, sample: Sample, way: Way, limits: Limits) -> None:
        self.sample = sample
        self.limits = limits
        self.model = DowntimeModel()
        self.model.round_trip = way.round_trip
        self.policy = Policy(limits, self.model)
        self.brake = ThrottlePolicy()
        self.bandwidth = way.bandwidth
        if limits.max_bandwidth:
            self.bandwidth = min(self.bandwidth, limits.max_bandwidth)
        self.elapsed = SETUP_SECONDS + SETUP_TRIPS * way.round_trip
        self.sent = 0.0

    def round(self, pages: float, wire_bytes: float, encode_seconds: float) -> Measured:
        """Sends what is dirty; the clock goes on."""
        # The destination decodes as fast as we encode, for all that can be known here.
        wall = max(wire_bytes / self.bandwidth, encode_seconds)
        wall += self.model.round_trip + ROUND_SECONDS
        self.sent += wire_bytes
        self.elapsed += wall
        return Measured(round(pages), round(wire_bytes), wall, encode_seconds, encode_seconds)

    def slow(self, throttle: Throttle, pending: Pending, measured: Measured, seconds: float,
             number: int) -> None:  # fmt: skip
        """auto-converge, as Source does it."""
        before, model = self.brake.percentage, self.model
        look = Look(
            model.predict(pending, self.limits), seconds, measured.wire_bytes,
            pending.pages * model.bytes_per_page, model.work(pending.pages, self.limits),
            model.overhead(pending),
        )  # fmt: skip
        if self.brake.decide(throttle, self.limits, look) > before:
            self.policy.begin_again(number, self.elapsed)


def simulate(
    sample: Sample, way: Way, limits: Limits, throttle: Throttle | None = None
) -> Prediction:
    """Runs the rounds of a migration.

    throttle -- auto-converge with these parameters; None: the guest is not slowed
    """
    run = _Migration(sample, way, limits)
    first = sample.first
    cost = (first.pages, first.wire_bytes, first.encode_seconds)
    expected, number = 0.0, 0
    for number in range(1, MOST_ROUNDS + 1):
        measured = run.round(*cost)
        run.model.learn(measured)
        run.elapsed += sample.scan_seconds
        seconds = measured.wall_seconds + sample.scan_seconds
        writes = seconds * (1 - run.brake.percentage / 100)  # a slowed guest writes for less
        pages = sample.dirty(writes)
        pending = Pending(
            round(pages),
            round(pages),
            sample.scan_seconds,
            whole_seconds=sample.whole_seconds,
            check_seconds=sample.check_seconds,
            stopped=sample.stopped,
        )
        if throttle is not None:
            run.slow(throttle, pending, measured, seconds, number)
        decision = run.policy.decide(number, run.elapsed, pending)
        expected, slowed = decision.expected_downtime, run.brake.percentage
        moved = sample.cost(pages, writes)
        if decision.verdict is Verdict.ABORT:
            return Prediction(decision.reason, run.elapsed, run.sent, number, expected, slowed)
        if decision.verdict is Verdict.STOP_AND_COPY:
            return Prediction(
                "",
                run.elapsed + expected,
                run.sent + moved.wire_bytes,
                number + 1,
                expected,
                slowed,
            )
        cost = (pages, moved.wire_bytes, moved.encode_seconds)
    reason = f"no end after {number} rounds, and nothing that would end it (--stall-timeout)"
    return Prediction(reason, run.elapsed, run.sent, number, expected, run.brake.percentage)


# ---------------------------------------------------------------- how it is printed


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def lines(prediction: Prediction, sample: Sample, way: Way, *, xbzrle: bool) -> str:
    """In the manner of `info migrate`."""
    p, s = prediction, sample
    longest = s.intervals[-1] if s.intervals else None
    fate = "would complete" if p.converges else f"would not converge ({p.reason})"
    text = [
        "dry run: nothing was moved",
        f"Migration status: {fate}",
        f"predicted total time: {p.total_time * 1e3:.0f} milliseconds",
        f"predicted downtime: {p.downtime * 1e3:.0f} milliseconds",
        f"predicted transferred ram: {p.transferred / KIB:.0f} kbytes",
        f"predicted dirty sync count: {p.rounds}",
    ]
    if p.throttle:
        text.append(f"predicted cpu throttle percentage: {p.throttle}")
    text += [
        f"total ram: {s.pages * s.page_size / KIB:.0f} kbytes",
        f"sampled: {100 * s.share:.0f} % of the pages",
        f"round trip: {way.round_trip * 1e3:.3f} milliseconds",
        f"measured throughput: {way.bandwidth * 8 / 1e6:.2f} mbps",
        f"duplicate: {s.zero:.0f} pages",
    ]
    for interval in s.intervals:
        text.append(
            f"dirty in {interval.seconds * 1e3:.0f} milliseconds: {interval.cost.pages:.0f} pages"
        )
    if longest is not None:
        each = _ratio(longest.cost.wire_bytes, longest.cost.pages)
        text.append(f"bytes per dirty page: {each:.0f}")
    if xbzrle:
        looked_up = s.hits + s.misses
        text += [
            f"xbzrle encoding rate: {_ratio(s.deltas * s.page_size, s.delta_bytes):.2f}",
            f"xbzrle cache miss rate: {_ratio(s.misses, looked_up):.2f}",
            f"xbzrle overflow rate: {_ratio(s.overflows, looked_up):.2f}",
        ]
    return "\n".join(text)


def as_json(prediction: Prediction, sample: Sample, way: Way, *, xbzrle: bool) -> dict[str, Any]:
    """One object: query-migrate's names for what is predicted, and what it rests on."""
    p, s = prediction, sample
    result: dict[str, Any] = {
        "dry-run": True,
        "status": "completed" if p.converges else "failed",
        "total-time": round(p.total_time * 1e3),
        "downtime" if p.converges else "expected-downtime": round(p.downtime * 1e3),
        "ram": {
            "transferred": round(p.transferred),
            "total": s.pages * s.page_size,
            "page-size": s.page_size,
            "dirty-sync-count": p.rounds,
        },
        "measured": {
            "round-trip": round(way.round_trip * 1e3, 3),
            "mbps": round(way.bandwidth * 8 / 1e6, 3),
            "probe-bytes": way.probed,
            "sampled": round(s.share, 6),
            "duplicate": round(s.zero),
            "dirty": [
                {
                    "time": round(interval.seconds * 1e3),
                    "pages": round(interval.cost.pages),
                    "bytes": round(interval.cost.wire_bytes),
                }
                for interval in s.intervals
            ],
        },
    }
    if p.throttle:
        result["cpu-throttle-percentage"] = p.throttle
    if p.reason:
        result["error-desc"] = p.reason
    if xbzrle:
        looked_up = s.hits + s.misses
        result["measured"]["xbzrle-cache"] = {
            "encoding-rate": round(_ratio(s.deltas * s.page_size, s.delta_bytes), 3),
            "cache-miss-rate": round(_ratio(s.misses, looked_up), 6),
            "overflow-rate": round(_ratio(s.overflows, looked_up), 6),
        }
    return result
