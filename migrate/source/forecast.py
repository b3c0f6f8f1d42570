"""Predict a migration for a dry run, without moving anything.

    Way (probe.py)       round trip, bandwidth   \\
    Sample (sample.py)   pages, bytes and work    +--> simulate --> Prediction: time, bytes, rounds,
    Limits, parameters   of the user             /                  downtime, or why it never ends

The rounds are simulated with the model and the policies that decide in a real migration
(convergence.py, throttle.py). Their input is a guest that writes as the sample did, and a
destination that is as fast as this machine. `simulate` knows no clocks and no sockets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from migrate.policy.advice import abort_reason
from migrate.policy.convergence import ConvergencePolicy, Verdict
from migrate.policy.downtime import DowntimeModel, Limits, PendingWork, RoundCost
from migrate.policy.throttle import RoundLoad, ThrottleParameters, ThrottlePolicy
from migrate.source.sample import Cost, Sample
from migrate.transport.probe import Way

KIB = 1024
# Setup takes the round trips of HELLO, GUEST, CACHE_SIZE and the PINGs, and local work beside them.
SETUP_TRIPS = 6
SETUP_SECONDS = 0.02
# The end of a round and its acknowledgement, beside a round trip.
ROUND_SECONDS = 0.001
# The simulation ends here when no limit of the user ends it.
MOST_ROUNDS = 100_000


@dataclass(frozen=True)
class Prediction:
    """A predicted migration. Times in seconds, sizes in bytes.

    reason   -- why it would not converge; "" if it would
    downtime -- of the pause; if the migration would not converge, of a pause at that point
    throttle -- percent by which auto-converge would have slowed the guest
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


class _SimulatedSource:
    """The state of a simulated migration."""

    def __init__(self, sample: Sample, way: Way, limits: Limits) -> None:
        self.sample = sample
        self.limits = limits
        self.model = DowntimeModel()
        self.model.round_trip = way.round_trip
        self.policy = ConvergencePolicy(limits, self.model)
        self.throttling = ThrottlePolicy()
        self.bandwidth = way.bandwidth
        if limits.max_bandwidth:
            self.bandwidth = min(self.bandwidth, limits.max_bandwidth)
        self.elapsed = SETUP_SECONDS + SETUP_TRIPS * way.round_trip
        self.sent = 0.0
        if sample.later_stage is not None:
            self.model.compressed_share = sample.later_stage.pause_share(self.bandwidth)

    def send_round(self, cost: Cost, number: int) -> RoundCost:
        """Send the dirty pages and scan; advance the clock."""
        stage = self.sample.first_stage if number == 1 else self.sample.later_stage
        time, ratio = stage.share(self.bandwidth) if stage is not None else (1.0, 1.0)
        # The destination is taken to decode as fast as we encode: its processor is unknown.
        wall = max(time * cost.wire_bytes / self.bandwidth, cost.encode_seconds)
        wall += self.model.round_trip + ROUND_SECONDS
        sent = ratio * cost.wire_bytes
        self.sent += sent
        self.elapsed += wall + self.sample.scan_seconds
        return RoundCost(
            round(cost.pages), round(sent), wall, cost.encode_seconds, cost.encode_seconds,
            round(cost.wire_bytes - sent),
        )  # fmt: skip

    def pending(self, pages: float) -> PendingWork:
        sample = self.sample
        return PendingWork(
            round(pages), round(pages), sample.scan_seconds, whole_seconds=sample.whole_seconds,
            check_seconds=sample.check_seconds, stops_guest=sample.stops_guest,
        )  # fmt: skip

    def slow(
        self, throttle: ThrottleParameters, pending: PendingWork, cost: RoundCost, seconds: float,
        number: int,
    ) -> None:  # fmt: skip
        """Slow the guest as the source does for auto-converge."""
        before, model = self.throttling.percentage, self.model
        load = RoundLoad(
            model.predict(pending, self.limits), seconds, cost.wire_bytes,
            pending.pages * model.bytes_per_page,
            model.transfer_seconds(pending.pages, self.limits), model.overhead(pending),
        )  # fmt: skip
        if self.throttling.decide(throttle, self.limits, load) > before:
            self.policy.forget_progress(number, self.elapsed)


def simulate(
    sample: Sample, way: Way, limits: Limits, throttle: ThrottleParameters | None = None
) -> Prediction:
    """Run the rounds of a migration that is simulated.

    throttle -- parameters of auto-converge; None: the guest is not slowed
    """
    source = _SimulatedSource(sample, way, limits)
    cost = sample.first
    expected, number = 0.0, 0
    for number in range(1, MOST_ROUNDS + 1):
        measured = source.send_round(cost, number)
        source.model.learn(measured)
        seconds = measured.wall_seconds + sample.scan_seconds
        # A slowed guest writes for a shorter time.
        writing = seconds * (1 - source.throttling.percentage / 100)
        pages = sample.dirty(writing)
        pending = source.pending(pages)
        if throttle is not None:
            source.slow(throttle, pending, measured, seconds, number)
        decision = source.policy.decide(number, source.elapsed, pending)
        expected, slowed = decision.expected_downtime, source.throttling.percentage
        cost = sample.cost(pages, writing)
        if decision.abort is not None:
            reason, _ = abort_reason(source.policy, decision.abort, pending)
            return Prediction(reason, source.elapsed, source.sent, number, expected, slowed)
        if decision.verdict is Verdict.STOP_AND_COPY:
            sent = source.sent + cost.wire_bytes
            return Prediction("", source.elapsed + expected, sent, number + 1, expected, slowed)
    reason = f"no end after {number} rounds, and nothing that would end it (--stall-timeout)"
    slowed = source.throttling.percentage
    return Prediction(reason, source.elapsed, source.sent, number, expected, slowed)


# ---------------------------------------------------------------- output


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def lines(prediction: Prediction, sample: Sample, way: Way, *, xbzrle: bool) -> str:
    """Return the prediction in the style of `info migrate`."""
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
        f"predicted dirty tracking: {s.tracking.value}, {s.scan_seconds * 1e3:.1f} milliseconds",
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
    """Return the prediction by query-migrate's names, and the measurements behind it."""
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
        "dirty-tracking": s.tracking.value,
        "dirty-tracking-time": round(s.scan_seconds * 1e3, 3),
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
